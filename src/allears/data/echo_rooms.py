"""Rooms with a microphone, a loudspeaker that may be moved, a talker and a noise."""

from dataclasses import dataclass

import numpy as np

from allears.audio.rooms import Room, RoomRanges, random_room
from allears.data.reverb import free_place

PLACES = 3
"""Of a room: the loudspeaker, where it is moved to, the talker; the noise, which is the last one, does not count."""
LOUDSPEAKER, MOVED, NEAR, NOISE = 0, 1, 2, -1
"""``source`` of a reference to a room."""


@dataclass(frozen=True)
class EchoRoomRanges:
    """What :func:`room_with_loudspeaker` draws from.

    Args:
        device: share of rooms whose loudspeaker is in one device with the microphone, ``device_m`` away; in the others
            it stands ``apart_m`` away, as a television set does.
        moved_m: how far the loudspeaker, or what reflects it, is moved where a path changes.
    """

    rt60_s: tuple[float, float] = (0.1, 0.8)
    device: float = 0.7
    device_m: tuple[float, float] = (0.05, 1.0)
    apart_m: tuple[float, float] = (1.0, 3.0)
    near_m: tuple[float, float] = (0.3, 3.0)
    moved_m: tuple[float, float] = (0.05, 0.5)


def room_with_loudspeaker(
    rng: np.random.Generator, talkers: int = PLACES, ranges: EchoRoomRanges | None = None
) -> Room:
    """A random room whose *source* is the microphone and whose *microphones* are the other places, the noise last.

    By reciprocity the responses are those from these places to the microphone. For ``RirBank.simulate`` as its
    ``draw``, with :data:`PLACES` as ``talkers``.

    Raises:
        ValueError: another number of places is asked for.
    """
    if talkers != PLACES:
        raise ValueError(f"talkers: got {talkers}, wanted {PLACES}: loudspeaker, moved loudspeaker and talker")
    ranges = ranges or EchoRoomRanges()
    room = random_room(rng, RoomRanges(rt60_s=ranges.rt60_s, distance_m=ranges.near_m))
    mic, near = room.mics_m[0], room.source_m
    span = ranges.device_m if rng.random() < ranges.device else ranges.apart_m
    speaker = free_place(rng, room.size_m, mic, span, [near], 0.1)
    moved = free_place(rng, room.size_m, speaker, ranges.moved_m, [mic, near], 0.03)
    noise = free_place(rng, room.size_m, mic, (0.3, 10.0), [speaker, near], 0.2)
    return Room(room.size_m, room.absorption, mic, (speaker, moved, near, noise))
