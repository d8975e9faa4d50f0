"""The separator for users: recordings of people who talk at once, of any rate and length, in; each talker apart out.

Shapes: C channels, J talkers (outputs of the network), T samples at the caller's rate, W of a window at the network's.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from allears.audio.activity import Span
from allears.audio.files import AudioReader
from allears.audio.session import Session, as_batch, as_given
from allears.core.device import resolve_device
from allears.core.errors import WeightsError
from allears.core.progress import OnProgress, Progress
from allears.core.weights import check_keys, load_pretrained
from allears.models.separate.chunks import ChunkedSeparator
from allears.models.separate.config import SeparateConfig
from allears.models.separate.count import COUNT_DB, MeteredSeparator
from allears.models.separate.files import TalkerFiles
from allears.models.separate.model import SeparateNet

DEFAULT = "separate-talkers-16k"
WINDOW_S = {"cpu": 30.0, "cuda": 120.0}
"""Recordings up to this are heard in one pass, longer ones in windows of it."""
_BLOCK_FRAMES = 65_536


@dataclass(frozen=True, eq=False)
class Separated:
    """A recording, separated.

    Attributes:
        talkers: (J, T), of the kind, rate and length of what was given. The first ``count`` are the talkers, by the
            time they first speak; the others hold next to nothing.
        count: estimated number of talkers.
        levels_db: RMS level of each output while it is active; -200 for silence.
        spans: when each one speaks, (begin, end) in seconds.
    """

    talkers: Any
    count: int
    levels_db: tuple[float, ...]
    spans: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class SeparateResult:
    """What :meth:`Separator.process_file` did; ``files``, levels and spans stand in the order of the talkers."""

    duration_s: float
    elapsed_s: float
    sample_rate_hz: int
    frames: int
    count: int
    files: tuple[Path, ...]
    levels_db: tuple[float, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def rtf(self) -> float:
        """Real-time factor: processing time over duration."""
        return self.elapsed_s / self.duration_s if self.duration_s else 0.0


class Separator:
    """Gives each talker of a recording a signal of their own.

    >>> separator = Separator.from_pretrained()
    >>> separated = separator(mixture, sample_rate_hz=48_000)
    >>> separated.talkers[: separated.count]

    Args:
        net: a trained network; see :meth:`from_pretrained`.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        name: shown in reports.
        count_db: an output this far below the loudest talker is no talker.
    """

    def __init__(
        self, net: SeparateNet, device: str | torch.device = "auto", name: str = "custom", count_db: float = COUNT_DB
    ) -> None:
        self.device = resolve_device(device)
        self.net = net.to(device=self.device).eval().requires_grad_(False)
        self.config: SeparateConfig = net.config
        self.name, self.count_db = name, float(count_db)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = DEFAULT, device: str | torch.device = "auto") -> "Separator":
        """Load shipped weights by name, or your own from a folder (with ``weights.safetensors`` and
        ``weights.json``) or a path stem.

        Raises:
            WeightsError: nothing is found there, or it is corrupt or of another model.
        """
        found = load_pretrained(name_or_folder, "separate", SeparateConfig)
        net = SeparateNet(found.config)
        check_keys(net, found.tensors)
        net.load_state_dict(found.tensors)
        count_db = found.record.get("count_db", COUNT_DB)
        if not isinstance(count_db, int | float) or not count_db < 0:
            raise WeightsError(f"weights {found.name!r}: count_db: {count_db!r} is no number below 0")
        return cls(net, device, found.name, count_db)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def __call__(
        self, audio: np.ndarray | Tensor, sample_rate_hz: int, *, one_pass_s: float | None = None
    ) -> Separated:
        """Separate a waveform.

        Args:
            audio: (T,) or (C, T), floating, nominally in [-1, 1]; an array or a tensor. The mean of the channels is
                heard.
            sample_rate_hz: its rate, 4,000 to 384,000.
            one_pass_s: longest recording that is heard at once, and the length of the windows of longer ones, 10 s or
                more: memory grows with it. The default is 30 s on a CPU and 120 s on a GPU.

        Raises:
            ValueError: not floating, not finite, empty, or of another shape; or an option is out of its range.
        """
        session, metered = self._session(sample_rate_hz, one_pass_s)
        x = as_batch(audio, most_dimensions=2)[0].mean(axis=0, keepdims=True)
        y = np.concatenate([session.push(x), session.flush()], axis=1)
        found = metered.talkers(self.count_db)
        return Separated(as_given(y[list(found.order)], audio), found.count, found.levels_db, found.spans)

    def process_file(
        self,
        src: str | Path,
        folder: str | Path,
        *,
        name: str | None = None,
        talkers: int | None = None,
        all_outputs: bool = False,
        one_pass_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SeparateResult:
        """Separate a file in bounded memory, whatever its length: into NAME-talker-1.wav and so on, in the order in
        which the talkers first speak.

        The files are mono, with the rate, length and, where WAV allows, bit depth of ``src``; they appear when all of
        them are complete, and replace those of an earlier run. There is one a talker, and one if nobody speaks.

        Args:
            src: a sound file; the mean of its channels is heard.
            folder: made if it is missing.
            name: NAME; the default is that of ``src`` without its suffix.
            talkers: how many there are, where that is known; the default is the estimate.
            all_outputs: write what the network gives for further talkers too.
            one_pass_s: see :meth:`__call__`.
            on_progress: told how many seconds are finished.

        Raises:
            AudioFileError: ``src`` cannot be read or the files cannot be written.
            ValueError: an option is out of its range.
        """
        begun = time.perf_counter()
        outputs = self.config.talkers
        if talkers is not None and not 1 <= talkers <= outputs:
            raise ValueError(f"talkers: {talkers} given; {self.name} tells 1 to {outputs} apart")
        src, done = Path(src), 0
        with AudioReader(src, block_frames=_BLOCK_FRAMES) as reader:
            rate, total_s = reader.info.sample_rate_hz, reader.info.duration_s
            session, metered = self._session(rate, one_pass_s)
            with TalkerFiles(Path(folder), src.stem if name is None else name, src, reader.info, outputs) as files:
                for block in reader:
                    done += block.shape[1]
                    files.write(session.push(block.mean(axis=0, keepdims=True)))
                    if on_progress is not None:
                        on_progress(Progress(files.frames / rate, total_s, "s", src.name))
                files.write(session.flush())
                found = metered.talkers(self.count_db, talkers)
                count = outputs if all_outputs else max(1, found.count)
                paths = files.put(found.order[:count])
        if on_progress is not None:
            on_progress(Progress(done / rate, total_s, "s", src.name))
        elapsed_s = time.perf_counter() - begun
        shown = found.levels_db[:count], found.spans[:count]
        return SeparateResult(done / rate, elapsed_s, rate, done, found.count, paths, *shown)

    def stream(self, sample_rate_hz: int) -> NoReturn:
        """There is no live stream.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "stream: this separator cannot follow a live signal: its attention and normalisation hear the whole "
            "window, what comes later too, before the first sample is done; record, then call it or process_file"
        )

    def _session(self, rate_hz: int, one_pass_s: float | None) -> tuple[Session, MeteredSeparator]:
        core_rate, talkers = self.config.sample_rate_hz, self.config.talkers
        window_s = WINDOW_S.get(self.device.type, WINDOW_S["cpu"]) if one_pass_s is None else one_pass_s
        chunked = ChunkedSeparator(self._run, talkers, core_rate, window_s)
        metered = MeteredSeparator(chunked, talkers, core_rate)
        return Session(metered, 1, talkers, rate_hz, core_rate), metered

    def _run(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A window (W,) to talkers (J, W) and fingerprints (J, E), both float32."""
        with torch.inference_mode():
            out, prints = self.net.fingerprints(torch.from_numpy(window).to(self.device)[None])
        return out[0].float().cpu().numpy(), prints[0].float().cpu().numpy()
