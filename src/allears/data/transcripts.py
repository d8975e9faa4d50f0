"""What was said: the text files that lie beside the recordings, in the form of each package."""

import gzip
import re
from collections.abc import Callable
from pathlib import PurePosixPath

Texts = dict[str, str]


def _festvox(name: str, data: bytes) -> Texts:
    """Festival ``txt.done.data``: ``( ru_0001 "text" )``; ``+`` before a vowel marks stress."""
    return dict(re.findall(r'\(\s*(\S+)\s+"((?:[^"\\]|\\.)*)"\s*\)', data.decode("utf-8", "replace")))


def _tuxpaint(name: str, data: bytes) -> Texts:
    """``X.txt``: a line ``ru.utf8=...`` a language. Key: path without suffix, then ``:ru``."""
    base = name.removesuffix(".txt")
    found = re.findall(r"^(\w+)\.utf8=[ \t]*(.+?)[ \t\r]*$", data.decode("utf-8", "replace"), re.MULTILINE)
    return {f"{base}:{language}": text for language, text in found}


def _fillets(name: str, data: bytes) -> Texts:
    """``script/LEVEL/dialogs_cs.lua``: dialogId("id", ...) then dialogStr("text"). Key: ``LEVEL/cs/id``."""
    path = PurePosixPath(name)
    language = path.stem.removeprefix("dialogs_")
    pattern = r'dialogId\(\s*"([^"]+)"(?:(?!dialogId).)*?dialogStr\(\s*"((?:[^"\\]|\\.)*)"\s*\)'
    found = re.findall(pattern, data.decode("utf-8", "replace"), re.DOTALL)
    unescaped = ((key, re.sub(r"\\(.)", r"\1", text)) for key, text in found)
    return {f"{path.parent.name}/{language}/{key}": " ".join(text.split()) for key, text in unescaped}


def _asterisk(name: str, data: bytes) -> Texts:
    """``core-sounds-en.txt.gz``: ``digits/1: one``. Descriptions in brackets are no text."""
    texts = {}
    for line in gzip.decompress(data).decode("utf-8-sig", "replace").splitlines():
        key, colon, text = line.partition(":")
        text = text.strip()
        if colon and not key.startswith(";") and text and text[0] not in "[<(":
            texts[key.strip()] = text
    return texts


_READERS: dict[str, tuple[str, Callable[[str, bytes], Texts]]] = {
    "festvox": (r"etc/txt\.done\.data$", _festvox),
    "tuxpaint": (r"tuxpaint/stamps/.*\.txt$", _tuxpaint),
    "fillets": (r"/script/[^/]+/dialogs_(cs|nl)\.lua$", _fillets),
    "asterisk": (r"/core-sounds-\w+\.txt\.gz$", _asterisk),
    "filename": (r"(?!)", lambda name, data: {}),
}
FORMS = frozenset(_READERS)
"""Names of the known forms."""


def is_text(form: str | None, path: str) -> bool:
    """Whether the member ``path`` holds texts in this form."""
    return form is not None and re.search(_READERS[form][0], path) is not None


def read_texts(form: str, path: str, data: bytes) -> Texts:
    return _READERS[form][1](path, data)


def find_text(form: str | None, texts: Texts, path: str) -> str | None:
    """The text of the recording ``path``, or ``None`` if there is none."""
    pure = PurePosixPath(path)
    stem = path.removesuffix(pure.suffix)
    if form == "festvox":
        return texts.get(pure.stem)
    if form == "tuxpaint":
        base, _, language = stem.rpartition("_desc_")
        return texts.get(f"{base}:{language}")
    if form == "fillets":
        return texts.get("/".join(PurePosixPath(stem).parts[-3:]))
    if form == "asterisk":
        return texts.get(re.sub(r"^.*/sounds/[^/]+/", "", stem))
    if form == "filename":
        return pure.stem.replace("_", " ") if "/sounds/" in path else None
    return None
