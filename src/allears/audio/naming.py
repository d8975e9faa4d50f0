"""Names of the files that come out of one recording."""

import re


def talker_file(name: str, number: int) -> str:
    """The file of talker ``number``, from 1, of the recording NAME."""
    return f"{name}-talker-{number}.wav"


def is_talker_file(name: str, file: str) -> bool:
    """Whether ``file`` is what :func:`talker_file` gives for NAME and some number."""
    return re.fullmatch(rf"{re.escape(name)}-talker-[1-9][0-9]*\.wav", file) is not None
