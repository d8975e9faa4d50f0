"""Ahead-of-time compilation of Triton kernels for a GPU that is not there, and what came out of it.

``compile_case(case, 120)`` gives the PTX, the machine code and the registers, shared memory and local memory that a
kernel takes on that chip. Nothing runs, no driver is asked, and nothing is read from or left in Triton's cache. A
file with ``@triton.jit`` kernels below ``allears.ops`` registers them with a function ``aot_cases()`` that returns
:class:`AotCase` values; ``aot_modules()`` finds these files.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from allears.core.errors import require

CAPABILITIES = (80, 90, 100, 120)
"""Compute capabilities times ten: Ampere, Hopper, Blackwell of the data centre, Blackwell of the desk."""


@dataclass(frozen=True)
class AotCase:
    """One way to compile one kernel, and what its code must contain.

    Args:
        name: unique, for messages.
        kernel: the ``@triton.jit`` function (not the interpreter's: ``TRITON_INTERPRET`` must not be set).
        signature: argument name -> Triton type (``"*bf16"``, ``"*u8"``, ``"i32"``, ``"fp32"``) of each argument that is
            not in ``constexprs``.
        constexprs: argument name -> value; also None for a pointer that is not given, and 1 for a stride of 1, as the
            launcher does it.
        instructions: capability -> regular expressions, each of which must be found in the PTX or in the SASS, at least
            n times where it is given as (expression, n). Its keys are the chips that the case is compiled for; an
            empty tuple asks for compilation alone.
        num_warps, num_stages: as at launch.
        aligned: names of the pointers and integers that are multiples of 16, as the launcher finds out at run time.
        spills: bytes of local memory (spilled registers) that a thread may take; True: any number.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    instructions: Mapping[int, tuple[str | tuple[str, int], ...]]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    spills: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.instructions) - set(CAPABILITIES))
        if unknown or not self.instructions:
            raise ValueError(
                f"instructions: keys {unknown} given for {self.name}; use capabilities out of {CAPABILITIES}"
            )
        strangers = sorted(set(self.aligned) - set(self.signature))
        if strangers:
            raise ValueError(f"aligned: {strangers} given for {self.name}; only names of its signature can be aligned")


@dataclass(frozen=True)
class AotBuild:
    """A compiled kernel: its PTX and machine code, registers a thread, bytes of shared memory a block, and bytes of
    local memory a thread.
    """

    case: AotCase
    capability: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    registers: int
    shared_bytes: int
    local_bytes: int

    @cached_property
    def sass(self) -> str:
        """The machine code as text; disassembled when it is first asked for."""
        return _read_cubin("nvdisasm", "-c", self.cubin)

    def opcodes(self) -> Counter[str]:
        """How often each SASS instruction occurs, by its name up to the first dot (``"HMMA"``, ``"LDL"``)."""
        found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", self.sass, flags=re.MULTILINE)
        return Counter(found)

    def faults(self) -> list[str]:
        """What the case asked for and did not get; empty if all is well."""
        where = f"{self.case.name} for sm_{self.capability}"
        faults = []
        for wanted in self.case.instructions[self.capability]:
            pattern, least = (wanted, 1) if isinstance(wanted, str) else wanted
            found = len(re.findall(pattern, self.ptx))
            if found < least:
                found = max(found, len(re.findall(pattern, self.sass)))
            if found < least:
                faults.append(f"{where}: {found} instructions match {pattern!r}, and {least} should")
        allowed = self.case.spills
        if allowed is not True and self.local_bytes > allowed:
            counts = self.opcodes()
            should = f"{allowed} bytes are its bound" if allowed else f"it should stay in {self.registers} registers"
            faults.append(
                f"{where}: {self.local_bytes} bytes of local memory a thread, {counts['STL']} stores and "
                f"{counts['LDL']} loads; {should}"
            )
        return faults


@contextmanager
def _private_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="allears-aot-") as folder:
        ours = {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1"}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _read_cubin(tool: str, option: str, cubin: bytes) -> str:
    """What ``tool``, one of those that come with Triton, says about a cubin."""
    folder = Path(require("triton.backends.nvidia", "gpu", "compiling kernels").__path__[0])
    with tempfile.TemporaryDirectory(prefix="allears-aot-") as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(folder / "bin" / tool), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread."""
    usage = _read_cubin("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump says nothing on resources: {usage}"
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def compile_case(case: AotCase, capability: int) -> AotBuild:
    """Compile ``case`` for a chip of ``capability`` (80, 90, 100, 120); no GPU and no CUDA driver are needed.

    Raises:
        ValueError: the case does not name this capability, or its kernel is one for Triton's interpreter.
        MissingDependencyError: Triton is not installed.
    """
    if capability not in case.instructions:
        raise ValueError(f"capability: {capability} given; {case.name} is compiled for {sorted(case.instructions)}")
    triton = require("triton", "gpu", "compiling kernels")
    compiler = require("triton.compiler", "gpu", "compiling kernels")
    target = require("triton.backends.compiler", "gpu", "compiling kernels").GPUTarget("cuda", capability, 32)
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        raise ValueError(
            f"kernel: {type(case.kernel).__name__} given for {case.name}; compile in a process without TRITON_INTERPRET"
        )
    names = case.kernel.arg_names
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(given) != set(names):
        raise ValueError(f"signature: {case.name} lacks or adds {sorted(set(given) ^ set(names))}")
    source = compiler.ASTSource(
        fn=case.kernel,
        signature={name: given[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    with _private_cache():
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        built = triton.compile(source, target=target, options=options)
    cubin = built.asm["cubin"]
    registers, local_bytes = _resources(cubin)
    return AotBuild(case, capability, built.asm["ptx"], cubin, registers, built.metadata.shared, local_bytes)


def aot_modules() -> list[str]:
    """Full names of the files below ``allears.ops`` that hold Triton kernels, without importing them."""
    root = Path(__file__).parent
    paths = [path for path in root.rglob("*.py") if "\n@triton.jit" in path.read_text(encoding="utf-8")]
    return sorted(".".join(("allears", "ops", *path.relative_to(root).with_suffix("").parts)) for path in paths)
