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
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SHARED_LIMIT_ATTRIBUTE = 8
_EARLY_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAP_TYPES = dict.fromkeys((torch.uint8, torch.int8, torch.float8_e4m3fn), 0) | {
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLE = {32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256 = 3


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


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


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver library does not load: {error}") from None


def available() -> str:
    """Why kernels cannot be compiled here; an empty string if they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU answers"
    try:
        _nvrtc(), _driver()
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


def _check(status: int, what: str) -> None:
    if status:
        text = c_char_p()
        _driver().cuGetErrorString(status, byref(text))
        raise KernelError(f"{what}: {(text.value or b'?').decode()} ({status})")


def _enter(device: int) -> None:
    """Make torch's context current in this thread: threads that torch starts for backward passes may have none."""
    found = c_void_p()
    _check(_driver().cuCtxGetCurrent(byref(found)), "context")
    if not found.value:
        _check(_driver().cuDevicePrimaryCtxRetain(byref(found), c_int(device)), "context")
        _check(_driver().cuCtxSetCurrent(found), "context")


@cache
def _launch() -> Callable[..., int]:
    call = _driver().cuLaunchKernel
    call.argtypes = (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p)
    return call


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: a kind, four bytes of nothing, and a union of 64 bytes."""

    _fields_ = (("kind", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("number", c_uint),
    )


@cache
def _launch_ex() -> Callable[..., int]:
    call = _driver().cuLaunchKernelEx
    call.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
    return call


class Kernel:
    """A compiled kernel on one device.

    Args:
        code: what :func:`compile_cubin` gave.
        function: name of the ``extern "C"`` kernel.
        shared_bytes: dynamic shared memory of each launch.
    """

    def __init__(self, code: bytes, function: str, device: torch.device, shared_bytes: int = 0) -> None:
        self.shared_bytes = shared_bytes
        self._module, self._function = c_void_p(), c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # starts CUDA
            _enter(torch.cuda.current_device())
            _check(_driver().cuModuleLoadData(byref(self._module), code), "module")
            _check(_driver().cuModuleGetFunction(byref(self._function), self._module, function.encode()), function)
            if shared_bytes > 48 * 1024:
                _check(
                    _driver().cuFuncSetAttribute(self._function, _SHARED_LIMIT_ATTRIBUTE, shared_bytes), "shared memory"
                )

    def __call__(
        self, grid: tuple[int, int, int], threads: int, *arguments: ctypes._SimpleCData | ctypes.Structure
    ) -> None:
        """Launch on the current stream."""
        self.bind(threads, *arguments)(*grid)

    def bind(
        self, threads: int, *arguments: ctypes._SimpleCData | ctypes.Structure, early: bool = False
    ) -> Callable[[int, int, int], None]:
        """A function of the grid that launches on the stream that is current now, with the arguments as they are when
        it is called: for many launches in a row.

        Args:
            early: the kernel may begin before the one before it in the stream has ended, and waits for that end itself
                (``griddepcontrol.wait``) before it touches memory. Compute capability 9.0 on.
        """
        launch, stream = self.launcher(threads, *arguments, early=early), current_stream()

        def launch_here(x: int, y: int, z: int) -> None:
            launch(x, y, z, stream)

        return launch_here

    def launcher(
        self, threads: int, *arguments: ctypes._SimpleCData | ctypes.Structure, early: bool = False
    ) -> Callable[[int, int, int, int], None]:
        """As :meth:`bind`, for a caller that keeps the function: of the grid and of what :func:`current_stream` says
        then, so that a stream is asked for once for many kernels. One thread at a time may call it.
        """
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        kept: tuple[object, ...] = (pointers, arguments, self)  # by the function, as the driver reads them
        function, shared_bytes, call = self._function, self.shared_bytes, _launch()
        if early:
            attribute = _LaunchAttribute(_EARLY_ATTRIBUTE, 0, 1)
            config = _LaunchConfig(1, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.addressof(attribute), 1)
            kept = (*kept, attribute, config)
            at, launch_ex = byref(config), _launch_ex()

            def launch_early(x: int, y: int, z: int, stream: int) -> None:
                config.grid_x, config.grid_y, config.grid_z, config.stream = x, y, z, stream
                status = launch_ex(at, function, pointers, None)
                if status:
                    _check(status, "launch")

            launch_early.kept = kept  # pyrefly: ignore
            return launch_early

        def launch(x: int, y: int, z: int, stream: int) -> None:
            status = call(function, x, y, z, threads, 1, 1, shared_bytes, stream, pointers, None)
            if status:
                _check(status, "launch")

        launch.kept = kept  # pyrefly: ignore
        return launch


def current_stream() -> int:
    """Handle of the stream that is current on the current device, whose context it makes this thread's."""
    device = torch.cuda.current_device()
    _enter(device)
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _set_words() -> Callable[..., int]:
    call = _driver().cuMemsetD32Async
    call.argtypes = (c_void_p, c_uint, c_size_t, c_void_p)
    return call


def zero_words(address: int, number: int, stream: int) -> None:
    """Zeros to ``number`` words of four bytes from ``address`` on, in the order of the stream: a third of the time of
    torch's own fill to issue."""
    _check(_set_words()(address, 0, number, stream), "zeros")


class TensorMap(ctypes.Structure):
    """Descriptor of a tensor for bulk copies: 128 bytes, aligned to 64."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)
    _align_ = 64


def tensor_map(x: Tensor, box: Sequence[int], swizzle_bytes: int) -> TensorMap:
    """For copies of boxes of ``x``, whose last dimension is contiguous. Reads past an edge give zeros.

    Args:
        box: elements in each dimension, in the order of ``x.shape``.
        swizzle_bytes: 32, 64 or 128: bytes of the innermost row of the box.
    """
    made = TensorMaps(x, box, swizzle_bytes)
    made.move(x.data_ptr())
    return made.map


class TensorMaps:
    """The :func:`tensor_map` of tensors like ``x``, one after the other: ``map``, since the last :meth:`move`."""

    def __init__(self, x: Tensor, box: Sequence[int], swizzle_bytes: int) -> None:
        dims = x.dim()
        if x.stride(-1) != 1:
            raise ValueError(f"x: last stride {x.stride(-1)} given; bulk copies need 1")
        buffer = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
        address = (ctypes.addressof(buffer) + 63) & ~63
        self.map = TensorMap.from_address(address)
        self.map._keep = buffer  # type: ignore[attr-defined]
        sizes = (ctypes.c_uint64 * dims)(*reversed(x.shape))
        strides = (ctypes.c_uint64 * (dims - 1))(*(x.stride(i) * x.element_size() for i in reversed(range(dims - 1))))
        boxes = (ctypes.c_uint32 * dims)(*reversed(tuple(box)))
        steps = (ctypes.c_uint32 * dims)(*([1] * dims))
        self._before = c_void_p(address), c_int(_MAP_TYPES[x.dtype]), c_uint(dims)
        self._after = (
            sizes, strides, boxes, steps, c_int(0), c_int(_SWIZZLE[swizzle_bytes]), c_int(_L2_PROMOTION_256), c_int(0),
        )  # fmt: skip
        self._at: int | None = None

    def move(self, address: int) -> None:
        """To the tensor whose first element is there."""
        if address != self._at:
            self._at = None
            _check(_driver().cuTensorMapEncodeTiled(*self._before, c_void_p(address), *self._after), "tensor map")
            self._at = address
