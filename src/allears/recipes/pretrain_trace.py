"""Where 8-bit attention errs in a trained model: each tensor of SageBwd against float32, layer by layer.

Shapes: B sequences, L positions, H query heads, G key heads (H a multiple of G), D head size.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from allears.core.device import matmul_precision
from allears.models.language.loss import next_token_loss
from allears.models.language.model import LanguageModel, use_attention
from allears.ops.attention import AttentionSpec, LowBit
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.lowbit.int8_reference import int8_scores
from allears.ops.attention.lowbit.online_softmax import LN_2, hidden_keys, key_tiles
from allears.ops.attention.lowbit.options import GradScales
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_backward, sagebwd_forward
from allears.ops.attention.lowbit.smooth import corrected, smooth_keys

TENSORS = ("S", "P", "D", "dP", "dS", "O", "dQ", "dK", "dV")
Q_SMOOTHING = "row-q-smoothing"
"""``grad_scales`` of the rows with scales a row and smoothed queries."""


@dataclass(frozen=True)
class Activations:
    """What one layer's attention took and was given back: q, d_out (B, L, H, D), k, v (B, L, G, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor


def record_activations(model: LanguageModel, tokens: Tensor) -> list[Activations]:
    """Run ``model`` forward and backward on ``tokens`` (B, L + 1) with exact attention; a row a layer.

    On a GPU under bf16 autocast, as in training, so that the tensors are those which the kernels would get. The model's
    attention is put back; its gradients are cleared.
    """
    own = model.attentions()[0].spec
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []

    def keep_output(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        outputs.append(arguments[0])

    for attention in model.attentions():
        hooks.append(attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0])))
        hooks.append(attention.out.register_forward_pre_hook(keep_output))
    use_attention(model, AttentionSpec(causal=True))
    device = tokens.device.type
    try:
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
            found = []
            for attention, x, out in zip(model.attentions(), inputs, outputs, strict=True):
                q, k, v = (part.detach().to(out.dtype) for part in attention._project(x, 0))
                assert out.grad is not None
                found.append(Activations(q, k, v, out.grad.unflatten(-1, (attention.heads, -1)).to(out.dtype)))
    finally:
        for hook in hooks:
            hook.remove()
        use_attention(model, own)
        model.zero_grad(set_to_none=True)
    return found


def exact_tensors(act: Activations, smooth_k: bool) -> dict[str, Tensor]:
    """Every tensor of :data:`TENSORS` in float32; scores and probabilities (B, H, L, L), 0 where hidden.

    With ``smooth_k`` the scores are those of the smoothed keys, which are what is quantised; P is the same.
    """
    q, k, v, d_out = (x.float().transpose(1, 2) for x in (act.q, act.k, act.v, act.d_out))
    ratio, factor = q.shape[1] // k.shape[1], softmax_scale(None, q.shape[-1])
    keys = (smooth_keys(act.k)[0] if smooth_k else act.k.float()).transpose(1, 2)
    k, v, keys = (x.repeat_interleave(ratio, dim=1) for x in (k, v, keys))
    hidden = hidden_keys(q.shape[2], k.shape[2], slice(0, k.shape[2]), q.device)
    scores = q @ keys.transpose(-1, -2) * factor
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    out, d_weights = weights @ v, d_out @ v.transpose(-1, -2)
    row_sums = (d_out * out).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - row_sums)
    of_group = (q.shape[0], -1, ratio, *q.shape[2:])
    return {
        "S": scores.masked_fill(hidden, 0.0),
        "P": weights,
        "D": row_sums.squeeze(-1),
        "dP": d_weights.masked_fill(hidden, 0.0),
        "dS": d_scores,
        "O": out,
        "dQ": factor * d_scores @ k,
        "dK": (factor * d_scores.transpose(-1, -2) @ q).reshape(of_group).sum(2),
        "dV": (weights.transpose(-1, -2) @ d_out).reshape(of_group).sum(2),
    }


def sagebwd_tensors(act: Activations, options: LowBit) -> dict[str, Tensor]:
    """The same tensors as SageBwd has them; P and dS are those before they are quantised for the products.

    With smoothed queries S is the sum of the integers' product and of what they lack.

    dP is a product in 16 bit of 16-bit inputs and sums in float32, so that it is exact but for the order of the sum.
    """
    out, _, saved = sagebwd_forward(act.q, act.k, act.v, causal=True, options=options)
    d_q, d_k, d_v = sagebwd_backward(act.d_out, saved, causal=True, options=options)
    length, factor = act.q.shape[1], softmax_scale(None, act.q.shape[-1])
    tile_scores = int8_scores(saved.q8, saved.q_scale, saved.k8, saved.k_scale, factor)
    if saved.correction is not None:
        tile_scores = corrected(tile_scores, saved.correction, factor, length, act.k.shape[2])
    scores = torch.cat([tile_scores(tile) for tile in key_tiles(length)], dim=-1).flatten(1, 2) * LN_2
    hidden = hidden_keys(length, length, slice(0, length), act.q.device)
    weights = (scores - saved.lse.unsqueeze(-1)).exp().masked_fill(hidden, 0.0)
    v, d_out = act.v.float().transpose(1, 2), act.d_out.float().transpose(1, 2)
    d_weights = d_out @ v.repeat_interleave(d_out.shape[1] // v.shape[1], dim=1).transpose(-1, -2)
    row_sums = (act.d_out.float() * out.float()).sum(-1).transpose(1, 2)
    rest = {name: x.float().transpose(1, 2) for name, x in (("O", out), ("dQ", d_q), ("dK", d_k), ("dV", d_v))}
    return {
        "S": scores.masked_fill(hidden, 0.0),
        "P": weights,
        "D": row_sums,
        "dP": d_weights.masked_fill(hidden, 0.0),
        "dS": weights * (d_weights - row_sums.unsqueeze(-1)),
        **rest,
    }


def cosine(x: Tensor, y: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape, taken as vectors; in float64."""
    x, y = x.double().flatten(), y.double().flatten()
    return float((x @ y) / (x.norm() * y.norm()))


def rel_l2(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|; in float64."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def trace_errors(model: LanguageModel, tokens: Tensor, options: LowBit | None = None) -> list[dict[str, Any]]:
    """Errors of SageBwd on the activations of ``model``, layer by layer, in both granularities of ``grad_scales``, and
    with scales a row once more with smoothed queries (:data:`Q_SMOOTHING`).

    Args:
        model: trained; run with exact attention.
        tokens: (B, L + 1) int64, on the model's device.
        options: ``smooth_k`` counts.

    Returns:
        Rows of ``layer``, ``grad_scales``, ``tensor``, ``metric`` and ``value``. Metrics ``cosine`` and ``rel_l2`` for
        each of :data:`TENSORS`; with ``grad_scales`` None what the layer holds: ``sigma`` of Q, K and smoothed K
        (``K'``), ``rms`` of P, dP and dS over what causal attention shows.
    """
    options = replace(options or LowBit(), smooth_q=None)
    forms = {str(scales): replace(options, grad_scales=scales) for scales in get_args(GradScales)}
    forms[Q_SMOOTHING] = replace(options, grad_scales="row", smooth_q=True)
    rows: list[dict[str, Any]] = []
    activations = record_activations(model, tokens)

    def add(layer: int, scales: str | None, tensor: str, metric: str, value: float) -> None:
        rows.append({"layer": layer, "grad_scales": scales, "tensor": tensor, "metric": metric, "value": value})

    with matmul_precision("highest"):
        for layer, act in enumerate(activations):
            exact = exact_tensors(act, options.smooth_k)
            for name, x in (("Q", act.q), ("K", act.k), ("K'", smooth_keys(act.k)[0])):
                add(layer, None, name, "sigma", float(x.float().std()))
            length = act.q.shape[1]
            for name in ("P", "dP", "dS"):
                shown = exact[name].numel() * (length + 1) / (2 * length)
                add(layer, None, name, "rms", float((exact[name].double().square().sum() / shown).sqrt()))
            for scales, form in forms.items():
                found = sagebwd_tensors(act, form)
                for name in TENSORS:
                    add(layer, scales, name, "cosine", cosine(found[name], exact[name]))
                    add(layer, scales, name, "rel_l2", rel_l2(found[name], exact[name]))
    return rows
