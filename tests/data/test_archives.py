import struct
import sys
import zlib

import debs
import pytest

from allears.core.errors import CorpusError
from allears.data.archives import (
    deb_control,
    deb_members,
    qt_resource_members,
    queen_members,
    refuse_sealed,
    zip_members,
)

SEALED = (
    "torcs-data", "ufoai-sound", "unknown-horizons", "searchandrescue-data", "moonshine-voice", "pocketsphinx-testdata",
    "codec2-examples", "asterisk-prompt-it-menardi-wav", "asterisk-prompt-fr-armelle",
)  # fmt: skip
SEALED_FILES = (
    "usr/share/tuxpaint/stamps/animals/birds/owl_desc_el.ogg",
    "usr/share/tuxpaint/stamps/animals/birds/owl_desc_fr.ogg",
    "usr/share/tuxpaint/stamps/symbols/math/0_el.ogg",
    "usr/share/tuxpaint/stamps/symbols/math/6_fr.ogg",
    "usr/share/tuxpaint/stamps/symbols/math/6_fr_CA.ogg",
    "usr/share/tuxpaint/stamps/clothes/hat_desc_fr.ogg.ogg",
    "usr/share/jconvolver/config-files/demo-reverbs/street2-L.wav",
    "usr/share/csoundqt/Examples/SourceMaterials/impulse_big_hall.wav",
)


def take_all(name: str) -> bool:
    return True


@pytest.mark.parametrize("suffix", ["xz", "gz", "tar"])
def test_members_come_out_whole_and_in_order(tmp_path, suffix):
    files = {"usr/a.bin": bytes(range(256)) * 40, "usr/b.txt": b"odd", "usr/c": b""}
    deb = debs.make_deb(tmp_path, "tiny", files, suffix=suffix, version="2:3.4-5")
    assert deb_control(deb)["Package"] == "tiny" and deb_control(deb)["Version"] == "2:3.4-5"
    assert list(deb_members(deb, take_all)) == list(files.items())
    assert [name for name, _ in deb_members(deb, lambda name: name.endswith(".txt"))] == ["usr/b.txt"]


def test_zstd_and_unknown_compression(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    deb = debs.make_deb(tmp_path, "small", {"usr/a": b"x" * 5000}, suffix="zst")
    assert list(deb_members(deb, take_all)) == [("usr/a", b"x" * 5000)]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match="pip install zstandard"):
        deb_members(deb, take_all)
    with pytest.raises(CorpusError, match="unknown compression 'bz2'"):
        deb_control(debs.make_deb(tmp_path, "odd", {}, suffix="bz2"))


@pytest.mark.parametrize("name", SEALED)
def test_sealed_package_is_refused_by_name_and_by_control(tmp_path, name):
    with pytest.raises(CorpusError, match=f"{name}.*sealed"):
        refuse_sealed(name)
    honest = debs.make_deb(tmp_path, name, {"usr/x.wav": b"x"})
    renamed = debs.make_deb(tmp_path, name, {"usr/x.wav": b"x"}, file_name="harmless_1_all.deb")
    for deb in (honest, renamed):
        with pytest.raises(CorpusError, match="sealed"):
            deb_members(deb, take_all)


def test_sealed_files_are_never_offered_nor_read(tmp_path):
    near = [
        "usr/share/tuxpaint/stamps/a/owl_desc_ru.ogg",
        "usr/share/tuxpaint/stamps/a/owl_elf.ogg",
        "usr/street20.wav",
    ]
    deb = debs.make_deb(tmp_path, "mixed", dict.fromkeys([*SEALED_FILES, *near], b"secret"))
    offered = []
    taken = [name for name, _ in deb_members(deb, lambda name: offered.append(name) or True)]
    assert taken == offered == near


def test_open_packages_pass():
    for name in ("festvox-ru", "asterisk-core-sounds-fr", "torcs", "moonshine"):
        assert refuse_sealed(name) is None


def test_damage_is_told(tmp_path):
    bad = tmp_path / "bad_1_all.deb"
    bad.write_bytes(b"<html>404</html>")
    with pytest.raises(CorpusError, match="not a Debian package"):
        deb_members(bad, take_all)
    whole = debs.make_deb(tmp_path, "cut", {"usr/x": bytes(np_noise(200_000))})
    whole.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(CorpusError, match="damaged"):
        list(deb_members(whole, take_all))


def np_noise(count: int) -> bytes:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, count, np.uint8).tobytes()


def test_zip_and_queen():
    files = {"A.SB": b"one", "B.SB": b"two two", "C.TXT": b"three"}
    for make, read in ((debs.make_zip, zip_members), (debs.make_queen, queen_members)):
        assert dict(read(make(files), take_all)) == files
        assert dict(read(make(files), lambda name: name == "B.SB")) == {"B.SB": b"two two"}
    with pytest.raises(CorpusError, match="QTBL"):
        list(queen_members(b"nothing of the kind", take_all))


@pytest.mark.parametrize("version", [1, 2])
def test_qt_resource(version):
    long = b"abc" * 500
    packed = struct.pack(">I", len(long)) + zlib.compress(long)
    data = debs.make_qt_resource("sounds", {"ü.wav": (b"plain", 0), "b.ogg": (packed, 1)}, version)
    assert dict(qt_resource_members(data, take_all)) == {"sounds/ü.wav": b"plain", "sounds/b.ogg": long}
    with pytest.raises(CorpusError, match="qres"):
        list(qt_resource_members(b"RIFF0000", take_all))
