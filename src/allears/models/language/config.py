"""Configuration of the language model, and its sizes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LanguageConfig:
    """What defines a language model. Sizes are presets (:data:`PRESETS`).

    Args:
        vocabulary: entries of the tokenizer.
        context: positions of a training sequence; the model itself takes any length.
        layers: blocks.
        channels: width, a multiple of ``heads``.
        heads: query heads.
        kv_heads: key/value heads, a divisor of ``heads`` (grouped-query attention); ``None``: as many as ``heads``.
        hidden: width of the gated feed-forward.
        qk_norm: RMS-normalise queries and keys of each head, with a learned gain.
        tied: the output layer shares the embedding's weights.
        init_std: standard deviation of the weights at the start.
        init_qk_gain: factor on the queries and on the keys at the start: on their weights, or with ``qk_norm`` on the
            gains of the norms. Logits grow with its square; it makes a small model meet what a long training of a
            large one comes to (arXiv 2603.02170, section 4).
    """

    vocabulary: int = 8192
    context: int = 1024
    layers: int = 6
    channels: int = 512
    heads: int = 8
    kv_heads: int | None = None
    hidden: int = 1408
    qk_norm: bool = True
    tied: bool = True
    init_std: float = 0.02
    init_qk_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "channels", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; wanted at least 1")
        for name in ("init_std", "init_qk_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; wanted more than 0")
        if self.channels % self.heads or (self.channels // self.heads) % 2:
            raise ValueError(f"heads: {self.heads} must divide {self.channels} channels into heads of even size")

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token: 6 a weight of the products, and causal attention."""
        shares = 2 + 2 * (self.kv_heads or self.heads) / self.heads
        weights = self.layers * self.channels * (shares * self.channels + 3 * self.hidden)
        attention = self.layers * self.channels * 2 * self.context * 3.5
        return 6 * (weights + self.channels * self.vocabulary) + attention


_STUDY = LanguageConfig()
PRESETS: dict[str, LanguageConfig] = {
    "test": replace(_STUDY, vocabulary=512, context=64, layers=2, channels=32, heads=2, hidden=96),
    "study": _STUDY,
    "study-wide-heads": replace(_STUDY, heads=4),
}
