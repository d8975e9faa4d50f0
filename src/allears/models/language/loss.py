"""The loss of a language model.

Shapes: B batch, L positions, V vocabulary.
"""

import math

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, float32.

    Args:
        logits: (B, L, V), of the token after each position; any floating dtype, the sums are in float32.
        targets: (B, L) int64, those tokens.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)} given; logits {tuple(logits.shape)} need {tuple(logits.shape[:-1])}"
        )
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss as bits a byte of text, which does not depend on the tokenizer."""
    return nats_per_token / (math.log(2) * bytes_per_token)
