import re

import pytest

from allears.core.errors import CorpusError
from allears.data.archives import SEALED_MEMBERS
from allears.data.packages import known_packages, parse_packages

HEAD = 'name = "tiny"\nversion = "1"\nsha256 = "00"\nlicence = "x"\nsplit = "train"\n'
STAMPS = "usr/share/tuxpaint/stamps/"
TUX, TUX_PACKAGE = STAMPS + "food/nuts/", "tuxpaint-stamps-default"
FISH, PHONE = "usr/share/games/fillets-ng/sound/", "usr/share/asterisk/sounds/"
RU, SSR = "usr/share/festival/voices/russian/msu_ru_nsh_clunits/", "usr/share/ssr/impulse_responses/hrirs/"
G722 = "asterisk-core-sounds-{}-g722"


def speaker_and_split(package: str, path: str) -> tuple[str, str, str] | None:
    entry = known_packages()[package]
    found = entry.find_rule(path)
    if found is None:
        return None
    _, rule, groups = found
    return rule.kind, (rule.speaker or "-").format(**groups), rule.split or entry.split


def test_every_rule_compiles_and_every_package_is_pinned():
    for package in known_packages().values():
        assert re.fullmatch(r"[0-9a-f]{8,64}", package.sha256) and package.licence
        for rule in package.rules:
            groups = dict.fromkeys(re.compile(rule.match).groupindex, "x")
            assert "{" not in (rule.speaker or "").format(**groups) + (rule.language or "").format(**groups)
        if package.texts_from:
            assert package.texts_from in known_packages()


@pytest.mark.parametrize(
    ("package", "path", "wanted"),
    [
        ("festvox-ru", RU + "wav/ru_0001.wav", ("speech", "festvox-ru", "train")),
        (G722.format("en"), PHONE + "en_US_f_Allison/added.g722", ("speech", "allison-smith", "train")),
        (G722.format("es"), PHONE + "es_MX_f_Allison/letters/z.g722", ("speech", "allison-smith", "train")),
        (G722.format("fr"), PHONE + "fr_CA_f_June/added.g722", ("speech", "june-wallack", "test")),
        (G722.format("it"), PHONE + "it_IT_m_Carlo/added.g722", ("speech", "carlo-flora", "test")),
        (G722.format("ru"), PHONE + "ru_RU_f_IvrvoiceRU/added.g722", ("speech", "ivrvoice-ru", "test")),
        (G722.format("en"), PHONE + "en_US_f_Allison/silence/3.g722", None),
        (G722.format("en"), PHONE + "en_US_f_Allison/tt-monkeys.g722", None),
        (TUX_PACKAGE, TUX + "nut_desc_be.ogg", ("speech", "tuxpaint-be", "train")),
        (TUX_PACKAGE, TUX + "nut_desc_ro.ogg", ("speech", "tuxpaint-ro", "val")),
        (TUX_PACKAGE, TUX + "nut_desc_da.ogg", ("speech", "tuxpaint-da", "val")),
        (TUX_PACKAGE, TUX + "nut_desc_es.ogg", None),
        (TUX_PACKAGE, TUX + "nut_desc.ogg", None),
        (TUX_PACKAGE, STAMPS + "animals/birds/owl.ogg", ("sound", "-", "train")),
        ("fillets-ng-data-cs", FISH + "airplane/cs/let-m-divna.ogg", ("speech", "fillets-cs-small", "train")),
        ("fillets-ng-data-cs", FISH + "rush/cs/m-myslis.ogg", ("speech", "fillets-cs-small", "train")),
        ("fillets-ng-data-cs", FISH + "linux/cs/v-ven.ogg", ("speech", "fillets-cs-big", "train")),
        ("fillets-ng-data-cs", FISH + "fdto/cs/drzel-v.ogg", ("speech", "fillets-cs-big", "train")),
        ("fillets-ng-data-cs", FISH + "city/cs/vit-hs-a.ogg", ("speech", "fillets-cs-minor", "train")),
        ("fillets-ng-data-nl", FISH + "city/nl/help3.ogg", None),
        ("klettres-data", "usr/share/klettres/it/alpha/a.ogg", None),
        ("klettres-data", "usr/share/klettres/hu/alpha/a.ogg", None),
        ("klettres-data", "usr/share/klettres/de/alpha/a.ogg", ("speech", "klettres-de", "train")),
        ("ktuberling-data", "usr/share/ktuberling/sounds/sr@latin/a.ogg", None),
        ("ktuberling-data", "usr/share/ktuberling/sounds/el/a.ogg", None),
        ("ktuberling-data", "usr/share/ktuberling/sounds/uk/a.ogg", ("speech", "ktuberling-uk", "train")),
        ("hedgewars-data", "usr/share/games/hedgewars/Data/Sounds/voices/Robot/Hello.ogg", None),
        ("qabcs-data", "usr/share/qabcs/abcs/fr/sounds/words/zèbre.ogg", None),
        ("scratch", "usr/share/scratch/Media/Sounds/Animal/Dog1.wav", ("sound", "-", "test")),
        ("widelands-data", "usr/share/games/widelands/data/music/intro.ogg", ("music", "-", "test")),
        ("lincity-ng-data", "usr/share/games/lincity-ng/sounds/Fire1.wav", ("sound", "-", "test")),
        ("gcompris-qt-data", "usr/share/gcompris-qt/rcc/x.rcc!gcompris/a/owl.ogg", ("sound", "-", "test")),
        ("csoundqt-examples", "usr/share/csoundqt/Examples/SourceMaterials/StairwellL.wav", ("rir", "-", "test")),
        ("soundscaperenderer-common", SSR + "hrirs_fabian_min_phase_eq.wav", ("hrtf", "FABIAN", "test")),
        ("libmysofa1", "usr/share/libmysofa/MIT_KEMAR_normal_pinna.sofa", ("hrtf", "KEMAR", "train")),
    ],
)  # fmt: skip
def test_binding_split(package, path, wanted):
    assert not SEALED_MEMBERS.search(path)
    assert speaker_and_split(package, path) == wanted


def test_table_cannot_name_a_sealed_package():
    with pytest.raises(CorpusError, match="sealed"):
        parse_packages("[[package]]\n" + HEAD.replace("tiny", "ufoai-sound"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{ match = 'x', kind = 'song' }", "kind 'song'"),
        ("{ match = 'x', kind = 'speech', split = 'dev' }", "split 'dev'"),
        ("{ match = 'x', kind = 'speech', every = 0 }", "every=0"),
        ("{ match = 'x', kind = 'speech', sped = 1 }", "sped"),
        ("{ match = ", "package table"),
    ],
)
def test_bad_tables_are_refused(rule, message):
    with pytest.raises(CorpusError, match=message):
        parse_packages(f"[[package]]\n{HEAD}rules = [{rule}]\n")
