"""Rooms: drawing them, their impulse responses, and what those tell. The front door to three files."""

from allears.audio.image_source import image_source_rir
from allears.audio.rir import decay_curve_db, direct_delay, early_part, rt60_of
from allears.audio.shoebox import SPEED_OF_SOUND_M_S, Room, RoomRanges, absorption_for_rt60, random_room

__all__ = [
    "SPEED_OF_SOUND_M_S",
    "Room",
    "RoomRanges",
    "absorption_for_rt60",
    "decay_curve_db",
    "direct_delay",
    "early_part",
    "image_source_rir",
    "random_room",
    "rt60_of",
]
