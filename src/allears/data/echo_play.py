"""The far end on its way to the loudspeaker: delay, jumps of it, clocks that drift apart, steps of the volume.

Shapes: B clips, S samples, T = ceil(S / 160) + 1 frames of 10 ms, of which frame t is centred at sample 160 t.
"""

import numpy as np
import torch
from torch import Tensor

from allears.data.draws import RATE
from allears.data.echo_spec import EchoSpec
from allears.data.waves import on_device, read_at

HOP = RATE // 100
_JUMP_FADE = RATE // 200
_GAIN_FADE = RATE // 50
_NEVER = 1e9


def ramp(at: list[float], length: list[float], frames: int, device: torch.device) -> Tensor:
    """0 up to the sample ``at``, 1 from ``at + length`` on, (B, S)."""
    begin, width = on_device(device, [at, length])[..., None]
    return ((torch.arange(frames, device=device) - begin) / width.clamp_min(1.0)).clamp(0, 1)


def on_its_way(reference: Tensor, specs: list[EchoSpec]) -> Tensor:
    """The reference (B, S) as it comes to the loudspeaker, (B, S)."""
    device, samples = reference.device, reference.shape[1]
    x = _shifted(reference, [spec.delay_ms for spec in specs], [spec.drift_ppm for spec in specs])
    jumps = [(row, jump) for row, spec in enumerate(specs) if (jump := spec.delay_jump) is not None]
    if jumps:
        rows = on_device(device, [row for row, _ in jumps], np.int64)
        delays = [specs[row].delay_ms + jump.by_ms for row, jump in jumps]
        after = _shifted(reference[rows], delays, [specs[row].drift_ppm for row, _ in jumps])
        share = ramp([jump.at_s * RATE for _, jump in jumps], [_JUMP_FADE] * len(jumps), samples, device)
        x = x.index_copy(0, rows, torch.lerp(x[rows], after, share))
    for place in range(max(len(spec.gain_steps) for spec in specs)):
        steps = [spec.gain_steps[place] if place < len(spec.gain_steps) else None for spec in specs]
        at = [_NEVER if step is None else step.at_s * RATE for step in steps]
        up = on_device(device, [[0.0 if step is None else step.gain_db] for step in steps])
        x = x * 10 ** (up * ramp(at, [_GAIN_FADE] * len(specs), samples, device) / 20)
    return x


def true_delays(specs: list[EchoSpec], path: Tensor, moved_path: Tensor) -> Tensor:
    """From the reference to the direct sound of its echo, at the centre of each frame, (B, T), int64 frames.

    Args:
        path, moved_path: (B,), where the direct sound is in the response before and after a change, in samples.
    """
    device = path.device
    centre = torch.arange(-(-specs[0].frames // HOP) + 1, device=device) * HOP

    def from_then_on(seconds: list[float]) -> Tensor:
        return centre >= on_device(device, seconds)[:, None] * RATE

    changes, jumps = [spec.path_change for spec in specs], [spec.delay_jump for spec in specs]
    moved = from_then_on([_NEVER if change is None else change.at_s + change.fade_ms / 2000 for change in changes])
    jumped = from_then_on([_NEVER if jump is None else jump.at_s for jump in jumps])
    more = [0.0 if jump is None else jump.by_ms for jump in jumps]
    table = [[spec.delay_ms, by, spec.drift_ppm] for spec, by in zip(specs, more, strict=True)]
    bulk_ms, more_ms, ppm = on_device(device, table).T[..., None]
    direct = torch.where(moved, moved_path[:, None], path[:, None])
    samples = (bulk_ms + more_ms * jumped) * (RATE / 1000) - centre * ppm * 1e-6 + direct
    return (samples / HOP).round().clamp_min(0).long()


def _shifted(x: Tensor, delay_ms: list[float], drift_ppm: list[float]) -> Tensor:
    """x (B, S) delayed by whole samples; a row with drift is read between its samples, ever further ahead or behind."""
    frames = x.shape[1]
    time = torch.arange(frames, device=x.device)
    where = time - on_device(x.device, [[round(ms * RATE / 1000)] for ms in delay_ms], np.int64)
    out = torch.where(where >= 0, x.gather(1, where.clamp_min(0)), 0.0)
    drifting = [row for row, ppm in enumerate(drift_ppm) if ppm]
    if not drifting:
        return out
    rows = on_device(x.device, drifting, np.int64)
    first = torch.arange(len(drifting), device=x.device) * frames
    ahead = on_device(x.device, [[drift_ppm[row] * 1e-6] for row in drifting], np.float64) * time
    position = first[:, None] + where[rows] + ahead
    speed = torch.ones(len(drifting), device=x.device)
    return out.index_copy(0, rows, read_at(x[rows].flatten(), first, first + frames, position, speed))
