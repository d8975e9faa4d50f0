"""Pre-training of the small language model, from tokens to weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from allears.core.config import from_dict, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import load_weights, save_weights
from allears.data.tokens import TokenData, read_tokens
from allears.models.language.config import PRESETS, LanguageConfig
from allears.models.language.model import LanguageModel
from allears.ops.attention import AttentionSpec, LowBit, Numerics
from allears.ops.attention.lowbit.options import GradScales
from allears.recipes.pretrain_objective import LanguageObjective
from allears.train import TrainConfig, TrainResult, train


def spec_of(
    numerics: Numerics = "exact",
    smooth_k: bool = True,
    smooth_q: bool | None = None,
    grad_scales: GradScales = "row",
) -> AttentionSpec:
    """Causal attention with these numerics; see :class:`LowBit` for the rest, which exact attention does not read."""
    lowbit = LowBit(smooth_k=smooth_k, smooth_q=smooth_q, grad_scales=grad_scales)
    return AttentionSpec(numerics=numerics, causal=True, lowbit=lowbit)


def language_config(preset: str, vocabulary: int, qk_norm: bool | None, init_qk_gain: float | None) -> LanguageConfig:
    """A size of :data:`PRESETS` for a tokenizer, with its QK-norm and first gain overridden where they are given.

    Raises:
        ValueError: the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    config = replace(PRESETS[preset], vocabulary=vocabulary)
    if qk_norm is not None:
        config = replace(config, qk_norm=qk_norm)
    return config if init_qk_gain is None else replace(config, init_qk_gain=init_qk_gain)


@matmul_precision("high")
def train_language(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "study",
    seed: int = 0,
    tokens_per_step: int = 8192,
    token_budget: int = 8_388_608,
    qk_norm: bool | None = None,
    init_qk_gain: float | None = None,
    numerics: Numerics = "exact",
    smooth_k: bool = True,
    smooth_q: bool | None = None,
    grad_scales: GradScales = "row",
    lr: float = 2e-3,
    final_lr_ratio: float = 0.1,
    warmup_share: float = 0.05,
    weight_decay: float = 0.1,
    validations: int = 8,
    log_rows: int = 96,
    validation_windows: int = 64,
    compile: bool = False,
    data: TokenData | None = None,
    watch: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a language model from scratch and leave ``out/export.safetensors`` (float16) with its configuration.

    The learning rate, the log and the validations follow the tokens: runs that differ in ``tokens_per_step`` alone see
    the same tokens in the same order, at the same rates. Weights are not averaged.

    Args:
        corpus: one folder made by :func:`allears.data.text.build_text_corpus`.
        steps: in place of ``token_budget``.
        preset: a size of :data:`allears.models.language.PRESETS`.
        tokens_per_step: a multiple of the preset's context.
        token_budget: tokens to train on.
        qk_norm, init_qk_gain: override the preset's.
        numerics, smooth_k, smooth_q, grad_scales: of the attention; see :class:`AttentionSpec` and :class:`LowBit`.
        lr, final_lr_ratio, weight_decay: see :class:`allears.train.TrainConfig`.
        warmup_share: of the run, up to 0.1.
        validations, log_rows: in all, evenly.
        validation_windows: sequences to validate on.
        data: what :func:`allears.data.tokens.read_tokens` gave, in place of ``corpus``.
        watch: called with the step number before each step.

    Raises:
        ValueError: a setting is out of range, or no kernel here can run the attention.
    """
    if data is None:
        if len(corpus) != 1:
            raise ValueError(f"corpus: {len(corpus)} folders given; a language model takes the one of its tokenizer")
        data = read_tokens(corpus[0])
    config = language_config(preset, data.report.vocabulary, qk_norm, init_qk_gain)
    if tokens_per_step < config.context or tokens_per_step % config.context:
        raise ValueError(f"tokens_per_step: {tokens_per_step} given; wanted a multiple of the context {config.context}")
    if not 0 <= warmup_share <= 0.1:
        raise ValueError(f"warmup_share: {warmup_share} given; wanted 0 to 0.1 of the run")
    steps = max(1, token_budget // tokens_per_step) if steps is None else steps
    where = resolve_device(device)
    torch.manual_seed(seed)
    model = LanguageModel(config, spec_of(numerics, smooth_k, smooth_q, grad_scales)).to(where)
    batch = tokens_per_step // config.context
    objective = LanguageObjective(data, config.context, batch, seed, where, validation_windows)
    settings = TrainConfig(
        out=out,
        steps=steps,
        minutes=minutes,
        lr=lr,
        final_lr_ratio=final_lr_ratio,
        warmup_steps=round(warmup_share * steps),
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        precision="bf16" if where.type == "cuda" else "fp32",
        ema_decay=0.0,
        log_every=max(1, steps // log_rows),
        validate_every=max(1, steps // validations),
        save_every_minutes=30.0,
        seed=seed,
        compile=compile,
        device=device,
    )
    result = train(model, objective if watch is None else _Watched(objective, watch), settings)
    record = {
        "model": "language",
        "config": to_dict(config),
        "training": {
            "recipe": "pretrain",
            "preset": preset,
            "numerics": numerics,
            "lowbit": to_dict(model.attentions()[0].spec.lowbit),
            "steps": result.step,
            "tokens_per_step": tokens_per_step,
            "tokens": result.step * tokens_per_step,
            "seconds_of_training": round(result.elapsed_s, 1),
            "lr": lr,
            "seed": seed,
            "packages": [source["package"] for source in data.report.sources],
            "licences": sorted({source["licence"] for source in data.report.sources}),
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in model.state_dict().items()}, record)
    return result


def load_run(out: str | Path, device: torch.device) -> LanguageModel:
    """The model that :func:`train_language` left in ``out``, in float32, with exact attention, in evaluation mode.

    Raises:
        WeightsError: there is none.
    """
    _, record = load_weights(Path(out) / "export")
    tensors, _ = load_weights(Path(out) / "ema")
    model = LanguageModel(from_dict(LanguageConfig, record["config"], "config"))
    model.load_state_dict(tensors)
    return model.to(device).eval()


class _Watched:
    """An objective that tells somebody of each step."""

    def __init__(self, objective: LanguageObjective, watch: Callable[[int], None]) -> None:
        self._objective, self._watch = objective, watch
        self.validate = objective.validate

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        self._watch(step)
        return self._objective.loss(model, step, generator)
