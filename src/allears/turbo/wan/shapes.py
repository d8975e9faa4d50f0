"""Sizes of Wan's diffusion transformers, and of the videos that they make."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128  # of every published Wan
VAE_TIME, VAE_SPACE = 4, 8  # pixels to latents; frames 1 + 4 n become 1 + n


@dataclass(frozen=True)
class WanShape:
    """Sizes of a network, from its weights or its configuration.

    Args:
        layers: transformer blocks.
        heads, head_dim: of the attention; their product is the width C.
        ffn_dim: width between the two linear layers of a block.
        in_channels, out_channels: of the latents; image to video reads more than it writes.
        text_dim, freq_dim: widths of the text and of the time embedding before their projections.
        image_dim: width of the image features of Wan 2.1's image to video; ``None`` without.
        pos_embed_seq_len: positions of the image features of first-and-last-frame models; ``None`` without.
        cross_attn_norm: whether a norm with weights stands before cross-attention.
        eps: of all norms.
    """

    layers: int
    heads: int
    ffn_dim: int
    head_dim: int = HEAD_DIM
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None
    cross_attn_norm: bool = True
    eps: float = 1e-6
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def width(self) -> int:
        """C."""
        return self.heads * self.head_dim

    def to_diffusers(self) -> dict[str, Any]:
        """The arguments of diffusers' ``WanTransformer3DModel``."""
        return {
            "patch_size": self.patch,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "cross_attn_norm": self.cross_attn_norm,
            "eps": self.eps,
            "image_dim": self.image_dim,
            "added_kv_proj_dim": None if self.image_dim is None else self.width,
            "pos_embed_seq_len": self.pos_embed_seq_len,
        }

    @classmethod
    def from_diffusers(cls, config: Any) -> "WanShape":
        """Of a configuration of diffusers, an object or a mapping."""
        values = config if isinstance(config, Mapping) else vars(config)
        return cls(
            layers=values["num_layers"],
            heads=values["num_attention_heads"],
            ffn_dim=values["ffn_dim"],
            head_dim=values["attention_head_dim"],
            in_channels=values["in_channels"],
            out_channels=values["out_channels"] or values["in_channels"],
            text_dim=values["text_dim"],
            freq_dim=values["freq_dim"],
            image_dim=values.get("image_dim"),
            pos_embed_seq_len=values.get("pos_embed_seq_len"),
            cross_attn_norm=values["cross_attn_norm"],
            eps=values["eps"],
            patch=tuple(values["patch_size"]),
        )

    def block_parameters(self) -> int:
        """Weights of one block that are in linear layers: what 8-bit layers replace."""
        width = self.width
        attention = 8 * width * width + 8 * width
        image = 0 if self.image_dim is None else 2 * width * width + 2 * width
        return attention + image + 2 * width * self.ffn_dim + width + self.ffn_dim

    def other_parameters(self) -> int:
        """Weights outside the linear layers of blocks: embeddings, norms, modulation, output layer."""
        width, patch = self.width, math.prod(self.patch)
        norms = 4 + (2 if self.cross_attn_norm else 0) + (1 if self.image_dim is not None else 0)
        total = self.layers * width * (6 + norms)
        total += self.in_channels * patch * width + width
        total += self.text_dim * width + width * width + 2 * width
        total += self.freq_dim * width + width * width + 2 * width + 6 * width * width + 6 * width
        total += width * self.out_channels * patch + self.out_channels * patch + 2 * width
        if self.image_dim is not None:
            total += self.image_dim**2 + 3 * self.image_dim + self.image_dim * width + 3 * width
            total += (self.pos_embed_seq_len or 0) * self.image_dim
        return total

    def tera_ops(self, tokens: int, text_tokens: int = 512) -> dict[str, float]:
        """Operations of a step in 1e12, multiplications and additions apart, by kind, with dense attention."""
        width = self.width
        linear = 2 * tokens * (6 * width * width + 2 * width * self.ffn_dim) + 4 * text_tokens * width * width
        return {
            "linear": self.layers * linear / 1e12,
            "self_attention": self.layers * 4 * tokens**2 * width / 1e12,
            "cross_attention": self.layers * 4 * tokens * text_tokens * width / 1e12,
        }


@dataclass(frozen=True)
class VideoSize:
    """A video in pixels.

    Args:
        frames: 1 + 4 n.
        height, width: multiples of 16.
    """

    frames: int = 81
    height: int = 480
    width: int = 832

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames - 1) % VAE_TIME:
            raise ValueError(f"frames: {self.frames} given; wanted 1 + 4 n, such as 81")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 1 or value % (2 * VAE_SPACE):
                raise ValueError(f"{name}: {value} pixels given; wanted a multiple of {2 * VAE_SPACE}")

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        return 1 + (self.frames - 1) // VAE_TIME, self.height // VAE_SPACE, self.width // VAE_SPACE

    def tokens(self, patch: tuple[int, int, int] = (1, 2, 2)) -> int:
        """Positions of the transformer."""
        return math.prod(size // part for size, part in zip(self.latent, patch, strict=True))


WAN_1_3B = WanShape(layers=30, heads=12, ffn_dim=8960)
WAN_14B = WanShape(layers=40, heads=40, ffn_dim=13824)
WAN_22_I2V = WanShape(layers=40, heads=40, ffn_dim=13824, in_channels=36)
VIDEO_480P = VideoSize(81, 480, 832)
VIDEO_720P = VideoSize(81, 720, 1280)
