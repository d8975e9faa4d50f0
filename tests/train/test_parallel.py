import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import Net, Share, share_config

import allears
from allears.core.weights import load_weights
from allears.train import train
from allears.train.logs import read_log


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel")
    here = Path(__file__).parent
    roots = [str(Path(allears.__file__).parents[1]), str(here), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (out / "printed").open("w") as printed:
        launcher = subprocess.Popen(
            [*command, str(here / "parallel_worker.py"), str(out)], env=env, stdout=printed, stderr=printed
        )
        try:
            status = launcher.wait(timeout=60)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # torchrun ends its workers
            status = launcher.wait(timeout=40)
    assert status == 0, (out / "printed").read_text()[-3000:]
    return out, load_weights(out / "rank0", dtype=None)[0], load_weights(out / "rank1", dtype=None)[0]


def pick(found, prefix):
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def test_processes_hold_the_same_weights_and_draw_differently(two_processes):
    _, first, second = two_processes
    # Buffers (batch statistics) are each process's own; what is saved are those of the first.
    shared = [name for name in first if "running" not in name and not name.endswith("draw")]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["whole8/draw"], second["whole8/draw"])


def test_two_halves_equal_one_process_with_the_joined_batch(two_processes, tmp_path):
    out, first, _ = two_processes
    torch.manual_seed(0)
    net = Net()
    before = net.body[0].weight.detach().clone()
    train(net, Share(0, 8), share_config(tmp_path))
    assert (net.body[0].weight - before).abs().max() > 0.05
    for name, value in net.state_dict().items():
        assert torch.allclose(first[f"share/{name}"], value, rtol=0, atol=1e-6), name
    assert read_log(out / "share" / "log.jsonl")[-1]["ranks"] == 0  # the first process alone validates, once


def test_a_signal_to_one_process_stops_both_and_the_run_resumes_exactly(two_processes):
    out, first, second = two_processes
    for found in (first, second):
        assert "parts5/draw" in found
        whole, parts = pick(found, "whole8/"), pick(found, "parts8/")
        del whole["draw"], parts["draw"]
        if found is second:  # its own batch statistics are not in the checkpoint
            whole = {name: value for name, value in whole.items() if "running" not in name}
        for name, value in whole.items():
            assert torch.equal(value, parts[name]), name
    rows = [row for row in read_log(out / "parts" / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 8]
