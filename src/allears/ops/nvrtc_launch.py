"""Launches of the kernels of ``nvrtc.py`` through the CUDA driver, at little of the host's time."""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache

import torch

_SHARED_LIMIT_ATTRIBUTE = 8
_EARLY_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver.

    Raises:
        KernelError: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver library does not load: {error}") from None


def check(status: int, what: str) -> None:
    """What the driver returned for ``what``.

    Raises:
        KernelError: ``status`` is not 0; the message holds the driver's own.
    """
    if status:
        text = c_char_p()
        driver().cuGetErrorString(status, byref(text))
        raise KernelError(f"{what}: {(text.value or b'?').decode()} ({status})")


def enter(device: int) -> None:
    """Make torch's context current in this thread: threads that torch starts for backward passes may have none."""
    found = c_void_p()
    check(driver().cuCtxGetCurrent(byref(found)), "context")
    if not found.value:
        check(driver().cuDevicePrimaryCtxRetain(byref(found), c_int(device)), "context")
        check(driver().cuCtxSetCurrent(found), "context")


@cache
def _launch() -> Callable[..., int]:
    call = driver().cuLaunchKernel
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
    call = driver().cuLaunchKernelEx
    call.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
    return call


class Kernel:
    """A compiled kernel on one device.

    Args:
        code: what :func:`allears.ops.nvrtc.compile_cubin` gave.
        function: name of the ``extern "C"`` kernel.
        shared_bytes: dynamic shared memory of each launch.
    """

    def __init__(self, code: bytes, function: str, device: torch.device, shared_bytes: int = 0) -> None:
        self.shared_bytes = shared_bytes
        self._module, self._function = c_void_p(), c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # starts CUDA
            enter(torch.cuda.current_device())
            check(driver().cuModuleLoadData(byref(self._module), code), "module")
            check(driver().cuModuleGetFunction(byref(self._function), self._module, function.encode()), function)
            if shared_bytes > 48 * 1024:
                check(
                    driver().cuFuncSetAttribute(self._function, _SHARED_LIMIT_ATTRIBUTE, shared_bytes), "shared memory"
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
                    check(status, "launch")

            launch_early.kept = kept  # pyrefly: ignore
            return launch_early

        def launch(x: int, y: int, z: int, stream: int) -> None:
            status = call(function, x, y, z, threads, 1, 1, shared_bytes, stream, pointers, None)
            if status:
                check(status, "launch")

        launch.kept = kept  # pyrefly: ignore
        return launch


def current_stream() -> int:
    """Handle of the stream that is current on the current device, whose context it makes this thread's."""
    device = torch.cuda.current_device()
    enter(device)
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _set_words() -> Callable[..., int]:
    call = driver().cuMemsetD32Async
    call.argtypes = (c_void_p, c_uint, c_size_t, c_void_p)
    return call


def zero_words(address: int, number: int, stream: int) -> None:
    """Zeros to ``number`` words of four bytes from ``address`` on, in the order of the stream: a third of the time of
    torch's own fill to issue."""
    check(_set_words()(address, 0, number, stream), "zeros")
