"""CUDA C++ kernels that ship as source and are compiled at first use by NVRTC, the compiler library that comes with
torch's CUDA wheels: no toolkit, nothing at install. Compiled kernels are kept in ``~/.cache/allears/kernels``
(``ALLEARS_CACHE`` moves it). Compiling alone needs no GPU, and beside a torch without CUDA the package
``nvidia-cuda-nvrtc``.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

from allears.ops.nvrtc_launch import Kernel, KernelError, current_stream, driver, zero_words
from allears.ops.nvrtc_maps import TensorMap, TensorMaps, tensor_map

__all__ = [
    "Kernel",
    "KernelError",
    "TensorMap",
    "TensorMaps",
    "available",
    "compile_cubin",
    "current_stream",
    "tensor_map",
    "zero_words",
]

log = logging.getLogger(__name__)


@cache
def _nvrtc() -> ctypes.CDLL:
    built = (torch.version.cuda or "").split(".")[0]
    majors = [built] if built else ["13", "12"]  # beside a torch without CUDA: what is installed
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [] if spec else [])]
    names: list[str] = []
    for major in majors:
        folders = [root / inner / "lib" for root in roots for inner in (f"cu{major}", "cuda_nvrtc")]
        names += [str(folder / f"libnvrtc.so.{major}") for folder in folders] + [f"libnvrtc.so.{major}"]
    for name in (*names, "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelError(
        f"libnvrtc.so.{majors[0]} was not found; it comes with torch's CUDA wheels, or with pip install "
        f"nvidia-cuda-nvrtc"
    )


def available() -> str:
    """Why kernels cannot be compiled here; an empty string if they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU answers"
    try:
        _nvrtc(), driver()
    except KernelError as error:
        return str(error)
    return ""


def _cache_folder() -> Path:
    return Path(os.environ.get("ALLEARS_CACHE", "~/.cache/allears")).expanduser() / "kernels"


def compile_cubin(
    source: str,
    name: str,
    headers: Mapping[str, str],
    defines: Mapping[str, int | str],
    arch: str = "sm_90a",
    flags: Sequence[str] = (),
) -> bytes:
    """Machine code of ``source`` for ``arch``, from the cache where it is there.

    What the compiler says of a source that it accepts is logged at level INFO.

    Args:
        headers: texts by the names under which ``source`` includes them.
        defines: preprocessor macros.
        flags: more options of NVRTC, such as ``--ptxas-options=-v``.

    Raises:
        KernelError: the compiler refused the source; the message holds its log.
    """
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())] + list(flags)
    lib = _nvrtc()
    major, minor = c_int(), c_int()
    lib.nvrtcVersion(byref(major), byref(minor))
    identity = repr((source, sorted(headers.items()), options, major.value, minor.value))
    path = _cache_folder() / f"{Path(name).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    program = c_void_p()
    texts = (c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (c_char_p * len(headers))(*(key.encode() for key in headers))
    if lib.nvrtcCreateProgram(byref(program), source.encode(), name.encode(), len(headers), texts, names):
        raise KernelError(f"{name}: NVRTC did not take the source")
    given = (c_char_p * len(options))(*(option.encode() for option in options))
    status = lib.nvrtcCompileProgram(program, len(options), given)
    size = c_size_t()
    lib.nvrtcGetProgramLogSize(program, byref(size))
    text = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, text)
    said = text.value.decode(errors="replace").strip()
    if status:
        lib.nvrtcDestroyProgram(byref(program))
        raise KernelError(f"{name} does not compile for {arch}:\n{said}")
    if said:
        log.info("%s for %s: %s", name, arch, said)
    lib.nvrtcGetCUBINSize(program, byref(size))
    code = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, code)
    lib.nvrtcDestroyProgram(byref(program))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code.raw)
        os.replace(file.name, path)
    except OSError as error:
        log.info("compiled kernels are not kept: %s", error)
    return code.raw
