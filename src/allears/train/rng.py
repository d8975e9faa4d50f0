"""Every random generator of a process, seeded and stored as one row of bytes."""

import random
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<624IiiId")


def seed_all(seed: int, rank: int, device: torch.device, step: int = 0) -> torch.Generator:
    """Seed the global generators of torch, numpy and ``random`` for one process, and make one on ``device``."""
    seeds = np.random.SeedSequence([seed, rank, step]).generate_state(4, np.uint32).tolist()
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[1])
    random.seed(seeds[2])
    return torch.Generator(device).manual_seed(seeds[3])


def _sources(generator: torch.Generator) -> list[Tensor]:
    _, words, gauss = random.getstate()
    python = _PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = state
    numpy = _NUMPY.pack(*keys.tolist(), position, has_gauss, 0, cached)
    states = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (python, numpy)]
    states += [torch.get_rng_state(), generator.get_state().cpu()]
    if generator.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(generator.device))
    return states


def pack_states(generator: torch.Generator) -> Tensor:
    """State of ``generator`` and of the global generators: uint8, one dimension, the same length in each process."""
    return torch.cat(_sources(generator))


def restore_states(packed: Tensor, generator: torch.Generator) -> bool:
    """Put back what :func:`pack_states` gave. False, and nothing changed, where it is of another kind of device."""
    sizes = [state.numel() for state in _sources(generator)]
    if packed.numel() != sum(sizes):
        return False
    python, numpy, torch_cpu, own, *cuda = packed.cpu().split(sizes)
    *words, has, gauss = _PYTHON.unpack(python.numpy().tobytes())
    random.setstate((3, tuple(words), gauss if has else None))
    *keys, position, has_gauss, _, cached = _NUMPY.unpack(numpy.numpy().tobytes())
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch_cpu.clone())
    generator.set_state(own.clone())
    if cuda:
        torch.cuda.set_rng_state(cuda[0].clone(), generator.device)
    return True
