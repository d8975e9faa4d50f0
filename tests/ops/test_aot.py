"""Every Triton kernel of the library, compiled for chips that are not here, contains the matrix instruction that it
means to use, and keeps out of local memory.

The kernels are compiled in processes of their own, as this one may hold them for Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from allears.ops import aot

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install 'allears[gpu]'", allow_module_level=True)

WORKER = """
import fcntl, importlib, json, os, sys, traceback
from allears.ops.aot import compile_case

jobs = []
for module in json.loads(sys.argv[1]):
    try:
        cases = importlib.import_module(module).aot_cases()
        jobs += [(module, case, capability) for case in cases for capability in case.instructions]
    except Exception:
        jobs.append((module, None, traceback.format_exc()))

def row(module, case, capability):
    if case is None:
        return [module, "aot_cases", 0, 0, 0, [capability]]
    try:
        build = compile_case(case, capability)
        return [module, case.name, capability, build.registers, build.shared_bytes, build.faults()]
    except Exception:
        return [module, case.name, capability, 0, 0, [traceback.format_exc()]]

for waits in (fcntl.LOCK_NB, 0):  # first what nobody has taken; then, until the others are done
    for number, job in enumerate(jobs):
        with open(os.path.join(sys.argv[2], f"job-{number}.json"), "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | waits)
            except BlockingIOError:
                continue
            file.seek(0)
            if not file.read(1):  # nobody took it, or who did was ended
                json.dump(row(*job), file)
"""

PROBE = """
import sys
from dataclasses import replace

import triton
import triton.language as tl
from allears.ops.aot import AotCase, compile_case


@triton.jit
def product(a, b, c, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = row * N + column
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def crowd(a, N: tl.constexpr):
    at = a + tl.arange(0, N)
    numbers = tl.load(at)
    tl.store(at, numbers / tl.sum(numbers))


case = AotCase(
    name="product",
    kernel=product,
    signature={"a": "*fp16", "b": "*fp16", "c": "*fp32"},
    constexprs={"N": 32},
    instructions={80: ((r"mma\\.sync\\S*f16", 4), (r"mma\\.sync\\S*f16", 999), r"mma\\.sync\\S*s8"), 90: ()},
)
build = compile_case(case, 80)
pieces = build.opcodes()["HMMA"]
assert pieces >= 4, build.opcodes()
assert 16 <= build.registers <= 255
assert build.faults() == [
    rf"product for sm_80: {pieces} instructions match 'mma\\\\.sync\\\\S*f16', and 999 should",
    r"product for sm_80: 0 instructions match 'mma\\\\.sync\\\\S*s8', and 1 should",
], build.faults()

# A warp that holds 16,384 numbers at once needs 512 registers a thread, and has 255.
case = AotCase("crowd", crowd, {"a": "*fp32"}, {"N": 16_384}, {90: ()}, num_warps=1)
crowded = compile_case(case, 90)
assert crowded.local_bytes > 0
assert len(crowded.faults()) == 1 and "local memory" in crowded.faults()[0], crowded.faults()
assert replace(crowded, case=replace(case, spills=True)).faults() == []
bounded = replace(crowded, case=replace(case, spills=crowded.local_bytes - 1))
assert len(bounded.faults()) == 1 and f"{crowded.local_bytes - 1} bytes are its bound" in bounded.faults()[0]
assert replace(crowded, case=replace(case, spills=crowded.local_bytes)).faults() == []

bad = replace(case, signature={})
for wrong, chip, words in ((bad, 90, "lacks or adds ['a']"), (case, 120, "capability: 120 given")):
    try:
        compile_case(wrong, chip)
    except ValueError as error:
        assert words in str(error), error
    else:
        sys.exit("no error")
"""


def environment(folder: Path) -> dict[str, str]:
    """Not interpreted, and with a cache folder in which nothing may appear."""
    return {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int, int, int, list[str]]]:
    """One process compiles for each worker of pytest-xdist that comes here, and none what another has: they share a
    folder of the session. Without pytest-xdist there are two."""
    ours = tmp_path_factory.getbasetemp()
    shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = (ours.parent if shared else ours) / "aot"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", WORKER, json.dumps(aot.aot_modules()), str(folder)]
    workers = [
        subprocess.Popen(command, env=environment(folder), stderr=subprocess.PIPE, text=True)
        for _ in range(1 if shared else 2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(said)
    assert not (folder / "cache").exists()
    return [tuple(json.loads(path.read_text())) for path in folder.glob("job-*.json")]


def test_every_kernel_file_is_compiled(builds) -> None:
    broken = {row[0]: row[5][0] for row in builds if row[2] == 0}
    assert not broken, "\n".join(broken.values())
    found = {row[0] for row in builds}
    assert found == set(aot.aot_modules())
    assert "allears.ops.attention.lowbit.triton_nvfp4" in found
    names = [(row[1], row[2]) for row in builds]
    assert len(names) == len(set(names)), "two cases have one name and chip"


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_kernels_contain_the_instructions_that_they_mean_to_use(builds, capability) -> None:
    ours = [row for row in builds if row[2] == capability]
    assert ours, f"nothing was compiled for sm_{capability}"
    faults = [fault for row in ours for fault in row[5]]
    assert not faults, "\n".join(faults)


def test_shared_memory_fits_the_chip(builds) -> None:
    limits_kib = {80: 163, 90: 227, 100: 227, 120: 99}  # CUDA C++ Programming Guide, "Compute Capabilities"
    too_much = [row[:5] for row in builds if row[2] and row[4] > limits_kib[row[2]] * 1024]
    assert not too_much


def test_a_missing_instruction_a_spill_and_a_wrong_case_are_found(tmp_path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_cases_that_name_no_chip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"instructions: keys \[75\] given for k"):
        aot.AotCase("k", None, {}, {}, {75: ()})
    with pytest.raises(ValueError, match=r"aligned: \['z'\] given for k"):
        aot.AotCase("k", None, {"x": "i32"}, {}, {80: ()}, aligned=("z",))
