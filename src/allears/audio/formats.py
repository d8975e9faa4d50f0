"""What a sound file is: container, sample format, and how to keep the sample format in another container."""

from dataclasses import dataclass

import soundfile

# Suffix to libsndfile container. All can be read and written.
CONTAINERS = {
    ".wav": "WAV",
    ".flac": "FLAC",
    ".ogg": "OGG",
    ".oga": "OGG",
    ".opus": "OGG",
    ".mp3": "MP3",
    ".aif": "AIFF",
    ".aiff": "AIFF",
    ".au": "AU",
    ".caf": "CAF",
    ".w64": "W64",
    ".rf64": "RF64",
}
# Read through FFmpeg, where the extra [media] is installed.
# fmt: off
MEDIA_SUFFIXES = frozenset({
    ".3gp", ".aac", ".ac3", ".amr", ".ape", ".avi", ".dts", ".flv", ".m4a", ".m4b", ".m4v", ".mka",
    ".mkv", ".mov", ".mp2", ".mp4", ".mpeg", ".mpg", ".ts", ".tta", ".webm", ".wma", ".wmv", ".wv",
})
# fmt: on
# Meaningful bits of the sample formats that are kept exactly where the container has a place for them.
BITS = {
    "PCM_U8": 8,
    "PCM_S8": 8,
    "PCM_16": 16,
    "ALAC_16": 16,
    "ALAC_20": 24,
    "PCM_24": 24,
    "ALAC_24": 24,
    "PCM_32": 32,
    "ALAC_32": 32,
    "FLOAT": 32,
    "DOUBLE": 64,
}
MAX_CHANNELS = {"FLAC": 8, "MP3": 2}
OPUS_RATES_HZ = (8000, 12000, 16000, 24000, 48000)


@dataclass(frozen=True)
class AudioInfo:
    """A file's header.

    Attributes:
        sample_rate_hz: samples per second and channel.
        channels: C.
        frames: samples per channel; ``None`` where the file does not say.
        subtype: the sample format in libsndfile's words (``PCM_16``, ``FLOAT``, ``VORBIS``), or FFmpeg's codec name.
        container: ``WAV``, ``FLAC``, ``OGG``, ``MP3`` ..., or FFmpeg's format name.
    """

    sample_rate_hz: int
    channels: int
    frames: int | None
    subtype: str
    container: str

    @property
    def duration_s(self) -> float | None:
        return None if self.frames is None else self.frames / self.sample_rate_hz


def container_for(suffix: str) -> str:
    """libsndfile's container for a suffix such as ``.wav``.

    Raises:
        ValueError: there is none that can be written.
    """
    container = CONTAINERS.get(suffix.lower())
    if container is None:
        raise ValueError(f"suffix: got {suffix!r}, which cannot be written; use one of {' '.join(CONTAINERS)}")
    return container


def subtypes(container: str) -> list[str]:
    """The sample formats that are written to ``container`` with an exact length."""
    if container == "OGG":
        return ["VORBIS", "OPUS"]
    if container == "MP3":
        return ["MPEG_LAYER_III"]
    return [name for name in soundfile.available_subtypes(container) if name in BITS or name in ("ULAW", "ALAW")]


def default_subtype(suffix: str) -> str:
    """The sample format written where none is asked for: ``PCM_16``, or the container's own compression."""
    if suffix.lower() == ".opus":
        return "OPUS"
    return {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(container_for(suffix), "PCM_16")


def matching_subtype(info: AudioInfo, suffix: str) -> str:
    """The sample format that a file with ``suffix`` should have to keep what ``info`` holds.

    The same one where the container has it; else the nearest that loses nothing (8-bit unsigned and signed), else the
    widest integers there are (float to FLAC: ``PCM_24``). What was compressed with loss becomes ``PCM_16``.
    """
    container, subtype = container_for(suffix), info.subtype
    if container == "OGG":
        return "OPUS" if subtype == "OPUS" or suffix.lower() == ".opus" else "VORBIS"
    if container == "MP3":
        return "MPEG_LAYER_III"
    available = subtypes(container)
    if subtype in available:
        return subtype
    bits = BITS.get(subtype, 16)
    nearest = {8: ("PCM_U8", "PCM_S8"), 16: ("PCM_16",), 24: ("PCM_24",)}.get(bits, ("PCM_32", "PCM_24"))
    return next((name for name in nearest if name in available), "PCM_16")
