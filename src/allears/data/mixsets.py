"""Fixed sets of mixtures for judging: drawn once, kept as manifests, rendered anywhere."""

from dataclasses import replace

import numpy as np

from allears.audio.rooms import Room
from allears.core.config import to_dict
from allears.data.bank import AudioBank
from allears.data.mix import MixConfig, MixSampler, MixSpec
from allears.data.reverb import room_with_sources

JUDGE_MIX = MixConfig(
    seconds=5.0,
    snr_db=(0.0, 15.0),
    reverberant=0.0,
    noise_reverberant=0.0,
    silent_talker=0.0,
    noiseless=0.0,
    synthetic=0.0,
    babble=0.0,
    change_speed=0.0,
    eq=0.0,
    lowpass=0.0,
    clip=0.0,
    codec=0.0,
    level_db=(-32.0, -18.0),
)


def judging_set(
    speech: AudioBank,
    noise: AudioBank,
    clips: int,
    seed: int,
    recorded_rooms: tuple[str, ...] = (),
    config: MixConfig = JUDGE_MIX,
) -> list[MixSpec]:
    """``clips`` mixtures, talkers in turn, signal-to-noise ratios evenly over the range, every second one in a room.

    Of the reverberant ones, every tenth takes a recorded room (an id of an ``rir`` item with its channel, ``ID#0``)
    where there are any;
    in half of them the noise is in the room too.
    """
    rng = np.random.default_rng(seed)
    talkers = {name: speech.select(lambda item, name=name: item.speaker == name) for name in sorted(speech.speakers())}
    samplers = [MixSampler(bank, noise, config, rng) for bank in talkers.values()]
    order = rng.permutation(clips)
    low, high = config.snr_db
    specs = []
    for index in range(clips):
        spec = samplers[index % len(samplers)].sample(f"clip-{index:03d}")
        snr = low + (high - low) * (float(order[index]) + 0.5) / clips
        spec = replace(spec, snr_db=round(snr, 2), level_db=round(spec.level_db, 2))
        if (index // len(samplers)) % 2:
            room = rounded_room(room_with_sources(rng))
            reference = {"room": to_dict(room)}
            if recorded_rooms and rng.random() < 0.1:
                reference = {"item": str(rng.choice(list(recorded_rooms)))}
            noise_room = {"room": to_dict(room)} if rng.random() < 0.5 else None
            spec = replace(spec, rir=reference, noise_rir=noise_room)
        specs.append(spec)
    return specs


def rounded_room(room: Room) -> Room:
    """To a millimetre, so that a manifest is short."""

    def point(values: tuple[float, float, float]) -> tuple[float, float, float]:
        x, y, z = (round(value, 3) for value in values)
        return (x, y, z)

    absorption = tuple(round(share, 4) for share in room.absorption)
    return Room(point(room.size_m), absorption, point(room.source_m), tuple(point(mic) for mic in room.mics_m))  # type: ignore[arg-type]
