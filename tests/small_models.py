"""Small random models of transformers and diffusers for tests; a test is skipped where the package is missing."""

from typing import Any

import pytest
import torch


def small_llama(positions: int = 512) -> Any:
    """Two layers of four heads that share two key heads, causal; 50 words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    return transformers.LlamaForCausalLM(config).eval()


def small_wan(**more: Any) -> Any:
    """Wan's transformer with two layers of two heads of 12, and what ``more`` says."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    shape = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 24,
        "num_layers": 2,
        "rope_max_seq_len": 16,
    }
    return diffusers.WanTransformer3DModel(**{**shape, **more}).eval()


def small_dit(size: int) -> Any:
    """Two layers of two heads of 8, on latents of ``size`` by ``size`` in patches of two."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(4)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=size, patch_size=2
    ).eval()
