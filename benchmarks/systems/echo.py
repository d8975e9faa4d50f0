"""Echo cancellers: none at all, the linear filter that is told the delay, and this library's network.

A system of ``echo`` is a callable: clips of one length -> what it gives for each.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.echo_clips import HOP, Cancelled, EchoClip
from benchmarks.registry import NotInstalledError, system

if TYPE_CHECKING:
    from torch import Tensor

Cancel = Callable[[Sequence[EchoClip]], list[Cancelled]]


@system("echo", about="the microphone as it is")
def input() -> Cancel:
    return lambda clips: [Cancelled(clip.truth.mic) for clip in clips]


@system("echo", about="the near end itself, direct sound and 50 ms of reflections: what a perfect canceller would give")
def truth() -> Cancel:
    return lambda clips: [Cancelled(clip.truth.near) for clip in clips]


@system("echo", about="the near end itself with all of its room, without its noise")
def truth_reverberant() -> Cancel:
    return lambda clips: [Cancelled(clip.truth.near_reverberant) for clip in clips]


@system("echo", about="allears.audio.kalman, a linear filter of 320 ms; the reference comes with the true delay")
def kalman_oracle() -> Cancel:
    from allears.audio.kalman import KalmanEchoFilter, aligned

    def cancel(clips: Sequence[EchoClip]) -> list[Cancelled]:
        import torch

        delays = torch.from_numpy(np.stack([clip.truth.delay_frames for clip in clips]))
        mic, reference = stacked(clips)
        error, _ = KalmanEchoFilter()(mic, aligned(reference, HOP * delays))
        return [Cancelled(row) for row in error.numpy()]

    return cancel


@system("echo", about="allears.models.echo, whole clips in PyTorch (streams give the same)")
def allears(**options: Any) -> Cancel:
    """``options`` go to ``EchoCanceller.from_pretrained``."""
    import torch

    from allears.core.errors import WeightsError

    try:
        from allears.models.echo import EchoCanceller

        canceller = EchoCanceller.from_pretrained(**options)
    except (ImportError, WeightsError) as error:
        raise NotInstalledError(str(error)) from error

    @torch.inference_mode()
    def cancel(clips: Sequence[EchoClip]) -> list[Cancelled]:
        mic, reference = (x.to(canceller.device) for x in stacked(clips))
        found = canceller.net(mic, reference)
        delays = [None] * len(clips) if found.alignment is None else found.alignment.argmax(-1).cpu().numpy()
        return [Cancelled(*row) for row in zip(found.near.float().cpu().numpy(), delays, strict=True)]

    cancel.canceller = canceller  # type: ignore[attr-defined]  # the case names its size
    return cancel


def stacked(clips: Sequence[EchoClip]) -> "tuple[Tensor, Tensor]":
    """Microphones and references of clips of one length, (B, S) each."""
    import torch

    mic, reference = (np.stack([getattr(clip.truth, name) for clip in clips]) for name in ("mic", "reference"))
    return torch.from_numpy(mic), torch.from_numpy(reference)
