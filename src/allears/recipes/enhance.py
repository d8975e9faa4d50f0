"""Training of the enhancer, from corpus to weights."""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from allears.core.config import to_dict
from allears.core.device import resolve_device
from allears.core.weights import load_weights, save_weights
from allears.data.bank import AudioBank
from allears.data.mix import MixConfig, MixSampler, MixSpec
from allears.data.render import Renderer
from allears.data.reverb import RirBank
from allears.models.enhance.config import PRESETS, EnhanceConfig
from allears.models.enhance.loss import LossWeights, flow_loss, waveform_terms
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance
from allears.models.enhance.state import level_of
from allears.train import TrainConfig, TrainResult, train

log = logging.getLogger(__name__)

NOISE_KINDS = ("noise", "event", "music", "babble")
TRAIN_MIX = MixConfig()
VAL_MIX = replace(
    TRAIN_MIX,
    snr_db=(0.0, 15.0),
    silent_talker=0.0,
    noiseless=0.0,
    change_speed=0.0,
    eq=0.0,
    lowpass=0.0,
    clip=0.0,
    codec=0.0,
    reverberant=0.5,
)


def load_bank(folders: list[str], kinds: tuple[str, ...], splits: tuple[str, ...]) -> AudioBank:
    """Items of prepared corpora or packs (see ``allears data``), in memory."""
    if all((Path(folder) / "manifest.jsonl").is_file() for folder in folders) and len(folders) == 1:
        return AudioBank.from_corpus(folders[0], kinds=kinds, splits=splits)
    return AudioBank.from_pack(folders, kinds=kinds, splits=splits)


class EnhanceObjective:
    """Draws a batch of mixtures a step, seeded by the step; validates on fixed mixtures of other talkers, noises and
    rooms.
    """

    def __init__(
        self,
        config: EnhanceConfig,
        sampler_parts: tuple[AudioBank, AudioBank, MixConfig],
        renderer: Renderer,
        validation: tuple[Tensor, Tensor],
        batch: int,
        seed: int,
        weights: LossWeights,
    ) -> None:
        self.config, self.weights, self.batch, self.seed = config, weights, batch, seed
        self._parts, self._renderer, self._validation = sampler_parts, renderer, validation
        self._sampler = MixSampler(*sampler_parts, np.random.default_rng(seed))
        self._rank = int(os.environ.get("RANK", "0"))
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[tuple[int, int], Future[list[MixSpec]]] | None = None
        self._last = (-1, 0)

    def _draw(self, key: tuple[int, int]) -> list[MixSpec]:
        self._sampler.rng = np.random.default_rng([self.seed, self._rank, *key])
        return [self._sampler.sample(f"{key[0]}-{key[1]}-{row}") for row in range(self.batch)]

    def _specs(self, step: int) -> list[MixSpec]:
        """The specs of this call; the next call's are drawn meanwhile."""
        key = (step, self._last[1] + 1 if step == self._last[0] else 0)
        self._last = key
        ahead, self._ahead = self._ahead, None
        specs = ahead[1].result() if ahead is not None else []
        if ahead is None or ahead[0] != key:
            specs = self._draw(key)
        guess = (step + 1, 0)
        self._ahead = (guess, self._pool.submit(self._draw, guess))
        return specs

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        noisy, clean = self._renderer(self._specs(step))
        total, terms = flow_loss(model, self.config, noisy, clean, generator, self.weights)
        return total, dict(terms)

    def validate(self, model: nn.Module) -> dict[str, float]:
        noisy, clean = self._validation
        device = noisy.device
        scores: dict[str, float] = {}
        for steps in (1, 2, 4):
            generator = torch.Generator().manual_seed(7)
            outs = []
            for part in noisy.split(16):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    outs.append(enhance(model, self.config, part, steps, "euler", generator=generator))
            out = torch.cat(outs)
            level = level_of(noisy)
            terms = waveform_terms(out / level, clean / level)
            scores[f"si_sdr_gain_{steps}"] = float((_si_sdr(out, clean) - _si_sdr(noisy, clean)).mean())
            scores[f"spectra_{steps}"] = float(terms["spectra"].mean())
        return scores


def _si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    scale = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    target = scale * reference
    return 10 * torch.log10(target.square().sum(-1) / (estimate - target).square().sum(-1))


def train_enhance(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "base",
    seed: int = 0,
    batch: int = 32,
    seconds: float = 4.0,
    rirs: int = 2000,
    lr: float = 8e-4,
    prior: Literal["noisy", "gaussian"] | None = None,
    start: str | None = None,
    compile: bool = False,
    validation_clips: int = 64,
    loss: LossWeights = LossWeights(),  # noqa: B008
) -> TrainResult:
    """Train the enhancer and leave float16 weights as ``out/export.safetensors`` with their configuration.

    Args:
        corpus: folders made by ``allears data prepare`` or ``allears data pack``.
        preset: a size of :data:`PRESETS`.
        batch, seconds: clips a step, and their length.
        rirs: simulated rooms for training.
        prior: overrides the preset's: ``noisy`` or ``gaussian``.
        start: weights to start from, a path stem.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    config = PRESETS[preset] if prior is None else replace(PRESETS[preset], prior=prior)
    where = resolve_device(device)
    torch.set_float32_matmul_precision("high")
    mix = replace(TRAIN_MIX, seconds=seconds, rirs=rirs)
    speech = load_bank(corpus, ("speech",), ("train",))
    noise = load_bank(corpus, NOISE_KINDS, ("train",))
    renderer = Renderer(speech, noise, RirBank.simulate(rirs, seed, where) if rirs else None, where)
    validation = _validation_set(corpus, validation_clips, min(64, validation_clips) if rirs else 0, where)
    net = EnhanceNet(config)
    before = None
    if start is not None:
        tensors, origin = load_weights(start)
        net.load_state_dict(tensors)
        before = origin.get("training")
    net = net.to(device=where).to(memory_format=torch.channels_last)  # type: ignore
    objective = EnhanceObjective(config, (speech, noise, mix), renderer, validation, batch, seed, loss)
    precision = "bf16" if where.type == "cuda" else "fp32"
    settings = TrainConfig(
        out=out,
        steps=steps or 100_000,
        minutes=minutes,
        lr=lr,
        seed=seed,
        compile=compile,
        device=device,
        precision=precision,
    )
    result = train(net, objective, settings)
    record = {
        "model": "enhance",
        "config": to_dict(config),
        "training": {
            "recipe": "enhance",
            "started_from": before,
            "preset": preset,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "clip_seconds": seconds,
            "rooms": rirs,
            "lr": lr,
            "seed": seed,
            "loss": to_dict(loss),
            "mix": to_dict(mix),
            "speech_hours": round(float(speech.lengths.sum()) / 16_000 / 3600, 2),
            "speakers": len(speech.speakers()),
            "noise_hours": round(float(noise.lengths.sum()) / 16_000 / 3600, 2),
            "licences": sorted({item.licence for item in (*speech.items, *noise.items)}),
            "packages": sorted({item.package for item in (*speech.items, *noise.items)}),
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in net.state_dict().items()}, record)
    return result


def _validation_set(corpus: list[str], clips: int, rooms: int, device: torch.device) -> tuple[Tensor, Tensor]:
    speech = load_bank(corpus, ("speech",), ("val",))
    noise = load_bank(corpus, NOISE_KINDS, ("val",))
    sampler = MixSampler(speech, noise, replace(VAL_MIX, rirs=rooms), np.random.default_rng(1234))
    specs = [sampler.sample(f"val-{row}") for row in range(clips)]
    renderer = Renderer(speech, noise, RirBank.simulate(rooms, 4321, device) if rooms else None, device)
    pairs = [renderer(specs[at : at + 16]) for at in range(0, clips, 16)]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
