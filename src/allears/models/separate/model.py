"""The separator's network, whatever its family: mixtures of any level and length to one waveform for each talker.

Shapes: B batch, S samples, J talkers, R stages, E numbers of a fingerprint; n places of C features.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from allears.models.separate.config import SeparateConfig
from allears.models.separate.locoformer import Locoformer
from allears.models.separate.sepreformer import Separation, SepReformer

_AUXILIARY = "core.auxiliary."
_QUIET = 1e-8  # -160 dB; below it, level is not made up for


class SeparateNet(nn.Module):
    """(B, S) to (B, J, S). The mixture is brought to a root mean square of 1 and the outputs back, so that a louder
    mixture gives louder outputs and nothing else; a silent one gives zeros.

    Args:
        config: which family, size and attention.
        aux_heads: with an output of each stage, for training (SepReformer).

    Raises:
        ValueError: ``aux_heads`` is asked of a family that has no stages.
    """

    def __init__(self, config: SeparateConfig, aux_heads: bool = False) -> None:
        super().__init__()
        self.config = config
        if config.sepreformer is None and aux_heads:
            raise ValueError("aux_heads: True given for TF-Locoformer, which has no stages; leave it out")
        self.core = SepReformer(config, aux_heads) if config.sepreformer is not None else Locoformer(config)

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixtures (B, S), S at least 1, to (B, J, S) in float32."""
        return self._run(mixture)[0]

    def with_auxiliary(self, mixture: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The outputs (B, J, S), and those of the R stages from the lowest rate up.

        Raises:
            ValueError: the network was built without the heads.
        """
        if getattr(self.core, "auxiliary", None) is None:
            raise ValueError("with_auxiliary: this network has no auxiliary heads; build it with aux_heads=True")
        out, made = self._run(mixture, with_auxiliary=True)
        level = _level(mixture)[..., None]
        return out, [y * level for y in made.auxiliary]

    def fingerprints(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (B, J, S), and for each a vector of unit length (B, J, E) that tells whose voice it holds.

        It is the mean and the standard deviation of the network's last features over time (TF-Locoformer: and
        frequency), weighted by the energy of that output there, so that pauses do not count; E = 2 C. The network was
        not trained to tell voices apart by it. Two parts of one recording should be compared by which pairing of their
        outputs has the larger sum of inner products; the size of a product means little. A silent output has zeros.
        """
        out, made = self._run(mixture)
        return out, weighted_print(made.features, made.energy)

    def _run(self, mixture: Tensor, **how: Any) -> tuple[Tensor, Separation]:
        if mixture.dim() != 2 or not mixture.shape[1]:
            raise ValueError(f"mixture: shape {tuple(mixture.shape)} given; it must be (B, S) with at least 1 sample")
        level = _level(mixture)
        made = cast(Separation, self.core(mixture / level.clamp_min(_QUIET), **how))
        return made.out * level[..., None], made


def _level(mixture: Tensor) -> Tensor:
    """Root mean square, (B, 1)."""
    return mixture.square().mean(1, keepdim=True).sqrt()


def weighted_print(features: Tensor, energy: Tensor) -> Tensor:
    """Mean and standard deviation of features (B, J or 1, n, C) over n, weighted by energy (B, J, n), as one vector of
    unit length (B, J, 2 C); zeros where there is no energy."""
    wide, weight = features.float(), energy.float()
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    mean = (weight.unsqueeze(-2) @ wide).squeeze(-2)
    square = (weight.unsqueeze(-2) @ wide.square()).squeeze(-2)
    both = torch.cat([mean, (square - mean.square()).clamp_min(0.0).sqrt()], dim=-1)
    return torch.nn.functional.normalize(both, dim=-1)


def export_state(net: SeparateNet) -> dict[str, Tensor]:
    """The weights without the auxiliary heads: what is shipped."""
    return {name: value for name, value in net.state_dict().items() if not name.startswith(_AUXILIARY)}
