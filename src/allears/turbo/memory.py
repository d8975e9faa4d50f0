"""Peak memory of a video, estimated before anything runs.

Weights are counted exactly. What lives during a block is counted at its two widest points, in tensors of one token:
around self-attention (hidden state, q, k, v, their rotated forms, the output and its float32 or 8-bit companions) and
in the feed-forward part (hidden state, its norm, and the wide tensor before and after its activation).
"""

from dataclasses import dataclass

from allears.turbo.spec import TurboSpec
from allears.turbo.wan.shapes import VideoSize, WanShape

_STOCK_ATTENTION, _FUSED_ATTENTION = 18, 20  # bytes a token and channel
_STOCK_WIDE, _FUSED_WIDE = (4, 4), (3, 3)  # bytes a token and channel of the width, and of the wide layer
_BASE_BYTES = 2**28  # latents, embeddings of text, workspaces of libraries


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak.

    Args:
        weight_bytes: weights of the transformers on the device.
        original_bytes: weights on the device that 8-bit layers have replaced, kept for ``restore``.
        activation_bytes: all that a step needs beside them.
        host_bytes: weights that wait in the host's memory.
    """

    weight_bytes: int
    original_bytes: int
    activation_bytes: int
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """On the device, without the text encoder, the decoder, and what CUDA itself takes (about half a gigabyte)."""
        return self.weight_bytes + self.original_bytes + self.activation_bytes

    def __str__(self) -> str:
        parts = [f"{self.weight_bytes / 1e9:.1f} GB of weights"]
        if self.original_bytes:
            parts.append(f"{self.original_bytes / 1e9:.1f} GB of replaced weights")
        parts.append(f"{self.activation_bytes / 1e9:.1f} GB for a step")
        text = f"about {self.peak_bytes / 1e9:.1f} GB at the peak ({', '.join(parts)})"
        return text + (f", and {self.host_bytes / 1e9:.1f} GB in the host's memory" if self.host_bytes else "")


def estimate_memory(
    shape: WanShape,
    size: VideoSize,
    spec: TurboSpec | None = None,
    *,
    experts: int = 1,
    ranks: int = 1,
    batch: int = 1,
    weight_bytes: int = 2,
) -> MemoryEstimate:
    """Peak of the denoising of one video.

    Args:
        spec: what is changed; ``None``: nothing.
        experts: transformers of the pipeline, 2 in Wan 2.2; with ``spec.offload == "experts"`` one is on the device.
        ranks: over how many devices the tokens are split.
        batch: videos at a time.
        weight_bytes: of a weight as loaded.
    """
    linear = shape.layers * shape.block_parameters()
    other = shape.other_parameters() * weight_bytes
    full = linear * weight_bytes
    originals = 0
    if spec is not None and spec.linear is not None:
        originals = full if spec.originals != "drop" else 0
        full = linear
    swapped = spec is not None and spec.offload == "experts" and experts > 1
    on_device = 1 if swapped else experts
    stays = spec is not None and spec.originals == "stay" and not swapped
    tokens = batch * -(-size.tokens(shape.patch) // ranks)
    fused = spec is not None and spec.norms and spec.linear is not None
    attention = _FUSED_ATTENTION if fused else _STOCK_ATTENTION
    of_width, of_wide = _FUSED_WIDE if fused else _STOCK_WIDE
    a_token = max(attention * shape.width, of_width * shape.width + of_wide * shape.ffn_dim)
    return MemoryEstimate(
        weight_bytes=on_device * full + experts * other,
        original_bytes=experts * originals if stays else 0,
        activation_bytes=tokens * a_token + _BASE_BYTES,
        host_bytes=(experts * full if swapped else 0) + (0 if stays else experts * originals),
    )
