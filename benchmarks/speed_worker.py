"""One measurement of a speed case: started as a process of its own, prints one JSON object on its last line."""

import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

RATE_HZ = 16_000


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load the system, warm it up on one second, then time one file from reading to writing."""
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    import numpy as np
    import soundfile as sf

    from benchmarks.registry import systems_for

    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(job["threads"])
    system = systems_for(job["task"], (job["system"],))[0].load(**job["options"])
    system(np.random.default_rng(0).normal(0, 0.05, RATE_HZ).astype(np.float32))
    source, folder = Path(job["source"]), Path(job["folder"])
    process_file = getattr(system, "process_file", None)
    seconds = []
    for _ in range(job["repeats"]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.perf_counter()
        if process_file is not None:
            process_file(source, folder)
        else:
            audio, rate = sf.read(source, dtype="float32")
            sf.write(folder / "out.wav", np.asarray(system(audio)).T, rate, "PCM_16")
        seconds.append(time.perf_counter() - start)
    frames_in, frames_out = sf.info(source).frames, [sf.info(path).frames for path in sorted(folder.iterdir())]
    if set(frames_out) != {frames_in}:
        raise ValueError(f"{job['system']}: {frames_in} frames went in, {frames_out} came out")
    how = "the whole file in memory" if process_file is None else "its own process_file, in bounded memory"
    return {"seconds": statistics.median(seconds), "peak_rss_gb": peak_rss_gb(), "how": how}


def peak_rss_gb() -> float:
    """Peak resident memory of this process in GB (1e9 bytes).

    Linux keeps it as VmHWM; what ``getrusage`` gives there also counts the parent, whose memory a child shares until it
    runs its own program.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
