"""The text encoder and the decoder of Wan's pipelines, as transformers and diffusers have them, with random weights."""

import time
from typing import Any

import torch

from allears.bench import results
from allears.bench.attention.run import Report, one_line
from allears.core.errors import require
from allears.turbo.wan.shapes import VideoSize

TEXT_TOKENS = 512
_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64, "vocab_size": 256_384}
_TINY_TEXT = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
_TINY_VIDEO = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def measure_whole(
    case: str, size: VideoSize, device: torch.device, seed: int, report: Report, tiny: bool = False
) -> None:
    """Rows ``total_s`` of the systems ``encode`` (UMT5-XXL, 512 tokens, bfloat16) and ``decode`` (Wan's, bfloat16)."""
    for name, make in (("encode", _encoder), ("decode", _decoder)):
        try:
            call = make(size, device, seed, tiny)
            call()
            seconds = min(_seconds(call, device) for _ in range(2))
        except (ImportError, RuntimeError, ValueError) as error:
            report.note(f"{case}: {name}: not available: {one_line(error)}")
            continue
        report.rows.append(results.row(case, name, "total_s", seconds))
        del call


def _seconds(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _encoder(size: VideoSize, device: torch.device, seed: int, tiny: bool) -> Any:
    transformers = require("transformers", "hub", "timing the text encoder")
    config = transformers.UMT5Config(**(_TINY_TEXT if tiny else _XXL))
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config).to(torch.bfloat16)
    model = _fill(model, device, seed)
    tokens = torch.randint(config.vocab_size, (1, TEXT_TOKENS), device=device)
    mask = torch.ones_like(tokens)

    def encode() -> None:
        with torch.no_grad():
            model(tokens, mask)

    return encode


def _decoder(size: VideoSize, device: torch.device, seed: int, tiny: bool) -> Any:
    diffusers = require("diffusers", "hub", "timing the decoder")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan(**(_TINY_VIDEO if tiny else {}))
    model = model.to(device, torch.bfloat16).eval().requires_grad_(False)
    latents = torch.randn(1, model.config.z_dim, *size.latent, device=device, dtype=torch.bfloat16)

    def decode() -> None:
        with torch.no_grad():
            model.decode(latents, return_dict=False)

    return decode


@torch.no_grad()
def _fill(model: Any, device: torch.device, seed: int) -> Any:
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)
