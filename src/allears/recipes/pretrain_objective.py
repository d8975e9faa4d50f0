"""What the language model trains on: windows of tokens in an order of their own, and the loss on them.

Shapes: B sequences a step, L positions of a context, N tokens of a split.
"""

import os

import numpy as np
import torch
from torch import Tensor, nn

from allears.data.tokens import TokenData
from allears.models.language.loss import bits_per_byte, next_token_loss
from allears.models.language.model import LanguageModel, use_attention
from allears.ops.attention import AttentionSpec

_MICRO_TOKENS = 32_768


class Windows:
    """Windows of L + 1 tokens that lie side by side in a split, in an order of their own for each pass over it.

    The order depends on the seed alone: step 0 of a large batch sees what the first steps of a small one see.

    Args:
        tokens: (N,) uint16.
        context: L.
        seed: of the order.
        device: where the tokens are kept, as int32.

    Raises:
        ValueError: the split is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int, device: torch.device) -> None:
        self.count = (len(tokens) - 1) // context
        if self.count < 1:
            raise ValueError(f"tokens: {len(tokens)} given, fewer than one window of {context} + 1; take more text")
        self.context, self.seed, self.device = context, seed, device
        self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._offsets = torch.arange(context + 1, device=device)
        self._orders: dict[int, Tensor] = {}

    def _order(self, lap: int) -> Tensor:
        if lap not in self._orders:
            order = np.random.default_rng([self.seed, lap]).permutation(self.count)
            self._orders[lap] = torch.from_numpy(order).to(self.device)
        return self._orders[lap]

    def at(self, first: int, count: int) -> Tensor:
        """Windows ``first`` to ``first + count`` of the endless order, int64 (count, L + 1)."""
        laps = range(first // self.count, (first + count - 1) // self.count + 1)
        endless = torch.cat([self._order(lap) for lap in laps])
        start = first - laps[0] * self.count
        return self._cut(endless[start : start + count])

    def spread(self, count: int) -> Tensor:
        """``count`` windows (all, if there are fewer) spread evenly over the split, int64 (count, L + 1)."""
        count = min(count, self.count)
        return self._cut(torch.arange(count, device=self.device) * self.count // count)

    def _cut(self, numbers: Tensor) -> Tensor:
        return self._tokens[numbers[:, None] * self.context + self._offsets].long()


class LanguageObjective:
    """Next-token loss on windows of the training split; validation on fixed windows of the other one."""

    def __init__(
        self, data: TokenData, context: int, batch: int, seed: int, device: torch.device, validation_windows: int
    ) -> None:
        self.batch, self.device = batch, device
        self.bytes_per_token = data.val_bytes_per_token
        self.windows = Windows(data.train, context, seed, device)
        self.validation = Windows(data.val, context, seed, device).spread(validation_windows)
        self._rank, self._world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        window = self.windows.at((step * self._world + self._rank) * self.batch, self.batch)
        return next_token_loss(model(window[:, :-1]), window[:, 1:]), {}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``val_loss`` in nats a token and ``val_bits_per_byte``, with the attention that trains; ``val_loss_exact``
        with exact attention on the same weights.
        """
        assert isinstance(model, LanguageModel)
        own = model.attentions()[0].spec
        found = {"val_loss": self._mean_loss(model)}
        found["val_bits_per_byte"] = bits_per_byte(found["val_loss"], self.bytes_per_token)
        if own.numerics == "exact":
            return found | {"val_loss_exact": found["val_loss"]}
        use_attention(model, AttentionSpec(causal=True))
        try:
            return found | {"val_loss_exact": self._mean_loss(model)}
        finally:
            use_attention(model, own)

    def _mean_loss(self, model: nn.Module) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.validation.split(max(1, _MICRO_TOKENS // self.windows.context)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                total += len(part) * next_token_loss(model(part[:, :-1]), part[:, 1:]).double()
        return float(total / len(self.validation))
