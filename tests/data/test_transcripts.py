import gzip

from allears.data.transcripts import find_text, is_text, read_texts

FISH = """
dialogId("let-m-divna", "font_small", "What kind of ship?")
dialogStr("Co je to za \\"divnou\\" loď?")
dialogId("no-text", "font_small", "nothing")
dialogId("let-v-vrak", "font_big", "A wreck.")
dialogStr("Vrak.
 Starý.")
"""


def test_festvox():
    path = "usr/share/festival/voices/russian/msu_ru_nsh_clunits/etc/txt.done.data"
    texts = read_texts("festvox", path, '( ru_0001 "Прядь вол+ос." )\n( ru_0002 "Да, да." )\n'.encode())
    assert is_text("festvox", path)
    assert find_text("festvox", texts, "a/wav/ru_0001.wav") == "Прядь вол+ос."
    assert find_text("festvox", texts, "a/wav/ru_0003.wav") is None


def test_tuxpaint():
    path = "usr/share/tuxpaint/stamps/animals/birds/vulture.txt"
    texts = read_texts(
        "tuxpaint", path, "A vulture.\nru.utf8=Гриф. \nro.utf8=Un vultur.\npt_BR.utf8=Um abutre.\n".encode()
    )
    assert is_text("tuxpaint", path) and not is_text("tuxpaint", "usr/share/doc/tuxpaint/README.txt")
    assert find_text("tuxpaint", texts, path.replace(".txt", "_desc_ru.ogg")) == "Гриф."
    assert find_text("tuxpaint", texts, path.replace(".txt", "_desc_ro.ogg")) == "Un vultur."
    assert find_text("tuxpaint", texts, path.replace(".txt", "_desc_bg.ogg")) is None


def test_fillets():
    path = "usr/share/games/fillets-ng/script/airplane/dialogs_cs.lua"
    texts = read_texts("fillets", path, FISH.encode())
    sound = "usr/share/games/fillets-ng/sound/airplane/cs/{}.ogg"
    assert is_text("fillets", path) and not is_text("fillets", path.replace("_cs", "_en"))
    assert find_text("fillets", texts, sound.format("let-m-divna")) == 'Co je to za "divnou" loď?'
    assert find_text("fillets", texts, sound.format("let-v-vrak")) == "Vrak. Starý."
    assert find_text("fillets", texts, sound.format("no-text")) is None
    assert find_text("fillets", texts, sound.format("let-v-vrak").replace("airplane", "city")) is None


def test_asterisk():
    text = "\ufeff; Sounds\n\nadded: Added.\ndigits/1: one\nbeep: [a tone]\nsilence/1: (1 second)\nodd: at 5:30\n"
    texts = read_texts("asterisk", "x", gzip.compress(text.encode()))
    base = "usr/share/asterisk/sounds/en_US_f_Allison/"
    found = [find_text("asterisk", texts, f"{base}{name}.g722") for name in ("added", "digits/1", "beep", "odd", "1")]
    assert found == ["Added.", "one", None, "at 5:30", None]


def test_file_name_as_text():
    assert find_text("filename", {}, "usr/share/qabcs/abcs/pl/sounds/words/żyrafa.ogg") == "żyrafa"
    assert find_text("filename", {}, "usr/share/qabcs/abcs/all/noises/dog.ogg") is None
    assert find_text(None, {}, "a/b.ogg") is None
