"""A decoder in the manner of Llama: pre-norm blocks of causal attention with rotary positions and a gated feed-forward.

RMSNorm (Zhang and Sennrich, 2019), RoPE (Su et al., 2021), SwiGLU (Shazeer, 2020), grouped-query attention (Ainslie et
al., 2023), QK-norm (Henry et al., 2020).

Shapes: B batch, L positions, C channels, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.language.config import LanguageConfig
from allears.nn.attention import SelfAttention
from allears.ops.attention import AttentionSpec


class FeedForward(nn.Module):
    """SwiGLU: (B, L, C) to (B, L, C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, 2 * hidden, bias=False)
        self.narrow = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.widen(x).chunk(2, dim=-1)
        return self.narrow(F.silu(gate) * value)


class Block(nn.Module):
    """(B, L, C) to (B, L, C)."""

    def __init__(self, config: LanguageConfig, spec: AttentionSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.channels, eps=1e-6)
        self.attention = SelfAttention(
            config.channels, config.heads, qk_norm=config.qk_norm, spec=spec, kv_heads=config.kv_heads, causal=True
        )
        self.feed_norm = nn.RMSNorm(config.channels, eps=1e-6)
        self.feed = FeedForward(config.channels, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class LanguageModel(nn.Module):
    """Tokens (B, L) to logits (B, L, V).

    Args:
        config: sizes.
        spec: which attention; it is made causal. The default is exact.
    """

    def __init__(self, config: LanguageConfig, spec: AttentionSpec | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(Block(config, spec or AttentionSpec()) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.channels, eps=1e-6)
        self.head = nn.Linear(config.channels, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 in 0 to V - 1; logits (B, L, V) of the token after each."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def attentions(self) -> list[SelfAttention]:
        """The attention of each layer, first to last."""
        return [block.attention for block in self.blocks]  # pyrefly: ignore

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights; those that end a residual branch smaller by sqrt(2 layers) (GPT-2, Radford et al., 2019)."""
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                ends = name.endswith(("attention.out.weight", "feed.narrow.weight"))
                nn.init.normal_(parameter, std=config.init_std / (math.sqrt(2 * config.layers) if ends else 1.0))
        for attention in self.attentions():
            if attention.q_norm is not None and attention.k_norm is not None:
                attention.q_norm.weight.fill_(config.init_qk_gain)
                attention.k_norm.weight.fill_(config.init_qk_gain)
            else:
                rows = (attention.heads + attention.kv_heads) * attention.head_dim
                attention.qkv.weight[:rows] *= config.init_qk_gain


def use_attention(model: LanguageModel, spec: AttentionSpec) -> None:
    """Give every layer of ``model`` another attention, in place; it must be causal.

    Raises:
        ValueError: ``spec`` is not causal.
    """
    if not spec.causal:
        raise ValueError("spec: causal=False given; a language model must not see what follows, so use causal=True")
    for attention in model.attentions():
        attention.spec = spec
