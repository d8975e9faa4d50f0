"""What computes: groups of hops equal single ones, both engines equal the canceller, one's fault is nobody else's."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from tests.models.echo_nets import ABLATIONS, SMALL, make
from tests.serve.stubs import Subtract

from allears.models.echo import EchoCanceller
from allears.models.echo.stream import EchoSession
from allears.serve import engines
from allears.serve.combine import Combiner
from allears.serve.engines import Engine, Hop, TorchSteps, choose_engine, hops_per_s
from allears.serve.hall import fitting

RATE = SMALL.sample_rate_hz


@pytest.fixture(scope="module")
def canceller():
    return EchoCanceller(make(), device="cpu")


@pytest.fixture(scope="module")
def onnx(canceller):
    pytest.importorskip("onnx", reason="the engine onnx needs onnx: pip install 'allears[onnx]'")
    pytest.importorskip("onnxruntime", reason="the engine onnx needs onnxruntime: pip install 'allears[onnx]'")
    return choose_engine(canceller.net, "onnx", 2)


def test_a_group_of_sessions_is_what_each_is_alone(canceller):
    steps, rng = TorchSteps(canceller.net), np.random.default_rng(0)
    alone = [steps.initial() for _ in range(3)]
    together = [steps.initial() for _ in range(3)]
    for _ in range(20):
        spectra = rng.standard_normal((3, 2, 2, SMALL.bins)).astype(np.float32)
        made = steps.run([Hop(*job) for job in zip(spectra, together, strict=True)])
        single = [steps.run([Hop(*job)])[0] for job in zip(spectra, alone, strict=True)]
        for ours, wanted in zip(made, single, strict=True):
            np.testing.assert_allclose(ours.spectrum, wanted.spectrum, atol=1e-4)
            np.testing.assert_allclose(ours.alignment, wanted.alignment, atol=1e-5)
            assert ours.voice == pytest.approx(wanted.voice, abs=1e-4)
        together, alone = [m.state for m in made], [s.state for s in single]


@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_onnxruntime_is_the_canceller(canceller, onnx, rate):
    assert onnx.name == "onnxruntime" and onnx.threads == 2
    is_the_canceller(canceller, onnx, rate)


@pytest.mark.parametrize("ablation", ["all", "no-voice", "unaligned"])
def test_pytorch_is_the_canceller(ablation):
    canceller = EchoCanceller(make(ABLATIONS[ablation]), device="cpu")
    engine = choose_engine(canceller.net, "torch", 1)
    assert engine.name == "pytorch" and engine.threads == 8
    for rate in (8_000, RATE, 48_000):
        is_the_canceller(canceller, engine, rate)


def is_the_canceller(canceller, engine, rate):
    mic, reference = 0.1 * np.random.default_rng(0).standard_normal((2, 1500)).astype(np.float32)
    found = []
    session = EchoSession(engine, 1, rate, on_facts=found.append)
    got = np.concatenate([session.push(mic[:700], reference[:700]), session.push(mic[700:], reference[700:])])
    got = np.concatenate([got, session.flush()])
    told = []
    whole = canceller.stream(rate, on_facts=told.append)
    wanted = np.concatenate([whole.push(mic, reference), whole.flush()])
    if rate == RATE:
        np.testing.assert_allclose(wanted, canceller(mic, reference, RATE), atol=1e-5)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    for fact in ("delay_ms", "voice"):
        ours, theirs = getattr(found[0], fact), getattr(told[0], fact)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs[:, : ours.shape[1]], atol=1e-3)


def test_sessions_of_one_onnx_file_do_not_mix(onnx):
    steps = onnx.steps
    rng = np.random.default_rng(1)
    spectra = rng.standard_normal((2, 12, 2, 2, SMALL.bins)).astype(np.float32)
    mixed, states = [[], []], [steps.initial(), steps.initial()]
    for index in range(12):
        for who in (0, 1):
            made = steps.run([Hop(spectra[who, index], states[who])])[0]
            states[who] = made.state
            mixed[who].append(made.spectrum)
    for who in (0, 1):
        state = steps.initial()
        for index in range(12):
            made = steps.run([Hop(spectra[who, index], state)])[0]
            state = made.state
            np.testing.assert_array_equal(made.spectrum, mixed[who][index])


def test_auto_takes_onnx_where_it_is_and_says_where_it_is_not(canceller, monkeypatch, caplog):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert choose_engine(canceller.net, "auto", 1).name == "pytorch"
    assert "onnx and onnxruntime are not installed: PyTorch computes" in caplog.text
    with pytest.raises(ValueError, match="engine: 'tvm' given; one of auto, onnx, torch"):
        choose_engine(canceller.net, "tvm", 1)


def test_an_onnx_file_that_differs_is_refused(canceller, monkeypatch):
    monkeypatch.setattr(engines, "require", lambda *_: None)
    monkeypatch.setattr(engines, "export_onnx", lambda net, path, spectra: path)
    monkeypatch.setattr(engines, "check_onnx", lambda net, path: float("nan"))
    with pytest.raises(ValueError, match=r"onnxruntime differs from PyTorch by nan; use --engine torch"):
        choose_engine(canceller.net, "onnx", 1)


def test_capacity_follows_the_speed(monkeypatch):
    """A hop takes 5 ms and more on each of two seats, in groups of up to 4: no machine makes over 1,600 in a second."""
    engine = Engine(Subtract(slow_s=0.005), 2)
    assert 0 < hops_per_s(engine, 0.2) <= 1700
    for live, share, sessions in ((3.4, 1.0, 3), (3.4, 0.6, 2), (10.1, 0.6, 6), (0.2, 1.0, 1)):
        rate = live / engine.config.hop_s
        monkeypatch.setattr("allears.serve.hall.hops_per_s", lambda engine, seconds, rate=rate: rate)
        assert fitting(engine, share=share) == sessions


def run_all(call, jobs):
    """Each job in a thread of its own; results or errors in order."""
    found = [None] * len(jobs)

    def work(index):
        try:
            found[index] = call(jobs[index])
        except RuntimeError as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return found


def test_jobs_that_wait_are_worked_on_together():
    groups, running, most_running, lock, all_there = [], [0], [0], threading.Lock(), threading.Event()

    def run(jobs):
        assert all_there.wait(10)
        with lock:
            running[0] += 1
            most_running[0] = max(most_running[0], running[0])
            groups.append(len(jobs))
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return [job * job for job in jobs]

    combiner = Combiner(run, seats=2, most=4)
    entered = itertools.count(1)

    def call(job):
        if next(entered) == 30:  # by then the others wait or are about to
            threading.Timer(0.2, all_there.set).start()
        return combiner(job)

    assert run_all(call, list(range(30))) == [job * job for job in range(30)]
    assert sum(groups) == 30 and max(groups) == 4 and len(groups) < 15 and most_running[0] == 2


def test_a_fault_hits_its_own_job_alone():
    def run(jobs):
        time.sleep(0.005)
        if 3 in jobs:
            raise RuntimeError("three")
        return [-job for job in jobs]

    found = run_all(Combiner(run, seats=1, most=8), list(range(8)))
    assert [str(f) for f in found] == ["0", "-1", "-2", "three", "-4", "-5", "-6", "-7"]


def test_one_job_alone_waits_for_nobody():
    groups = []
    combine = Combiner(lambda jobs: groups.append(len(jobs)) or [str(job) for job in jobs], seats=1, most=8)
    assert [combine(job) for job in range(3)] == ["0", "1", "2"] and groups == [1, 1, 1]


def test_an_engine_steps_hop_after_hop():
    engine = Engine(Subtract(), 1)
    spectra = torch.randn(1, 2, 2, 3, SMALL.bins)
    made, heard, count = engine.cancel(spectra, engine.initial_state(1))
    assert torch.equal(made, spectra[:, 0] - spectra[:, 1])
    assert count == 3 and heard.alignment.shape == (1, 3, SMALL.align_frames) and heard.voice.tolist() == [[9.0] * 3]
