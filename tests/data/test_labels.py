import pytest

from allears.data.labels import CAPTIONS, find_label, is_ambience, words


def test_words():
    assert words("a/WolfHowl_02.ogg") == "wolf howl"
    assert words("doors_steel_door_open.ogg") == "doors steel door open"
    assert words("x!a/LRTrain_slowing-01.wav") == "lrtrain slowing"


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Bark2.ogg", "dog"),
        ("sheep10.wav", "sheep"),
        ("default_dirt_footstep.1.ogg", "footsteps"),
        ("Rain_Loop.ogg", "rain"),
        ("cave_wind_loop.ogg", "wind"),
        ("thunder_10.ogg", "thunder"),
        ("fire_large.ogg", "fire"),
        ("FireStation1.wav", None),
        ("carhorn3.wav", "car_horn"),
        ("car.wav", "car_passing"),
        ("carpet_walk.wav", None),
        ("horse-canter.wav", "horse"),
        ("drum_cowbell.flac", None),
        ("808_Cowbell.wav", None),
        ("Bell-Hard.wav", "bell"),
        ("crossbow.ogg", "bow"),
        ("rubberband.wav", None),
        ("thunderstick.ogg", None),
        ("WindowOpen.wav", None),
        ("wind_chimes01.ogg", "bell"),
        ("fire_truck.ogg", "siren"),
        ("SewingMachine.mp3", "sewing"),
        ("tabla_ghe1.flac", "tabla"),
        ("archer_ack1.wav", None),
        ("chat_message_02_type_writer_short.mp3", "typing"),
        ("zap.wav", None),
    ],
)
def test_labels_by_file_name(path, label):
    assert find_label(f"usr/share/x/{path}") == label
    assert label is None or CAPTIONS[label]


def test_ambience_is_long_and_not_an_instrument():
    assert is_ambience("rain", 10.0) and is_ambience(None, 5.0)
    assert not is_ambience("rain", 1.0) and not is_ambience("piano", 10.0) and not is_ambience("laugh", 5.0)
