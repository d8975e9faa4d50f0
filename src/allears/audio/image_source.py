"""Room impulse responses of shoeboxes by the image-source method, on any device.

Allen and Berkley, "Image method for efficiently simulating small-room acoustics", JASA 65(4), 1979. A reflection on a
wall with energy absorption a multiplies the pressure by sqrt(1 - a); a path of d metres by 1 / (4 pi d).

Shapes: B rooms, M microphones, L samples of the response, I images. One axis of the room at a time has its own list of
image distances and reflection gains; an image of the room is one choice from each of the three lists.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from allears.audio.butterworth import butterworth
from allears.audio.shoebox import SPEED_OF_SOUND_M_S, Room

Axis = tuple[Tensor, Tensor, Tensor]  # distances in metres, gains, reflections; each (I,)

TAPS = 81  # of the windowed sinc that a fractional delay is
OVERSAMPLING = 4  # of the grid of delays for late images
_BLOCK = {"cpu": 1 << 16}  # images at a time: what stays in a core's cache
_DEVICE_BLOCK = 1 << 23


def image_source_rir(
    rooms: Sequence[Room],
    sample_rate_hz: int,
    length_s: float | None = None,
    *,
    max_order: int | None = None,
    exact_ms: float = 100.0,
    highpass_hz: float = 20.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Impulse responses (B, M, L), float32; sample n is n / sample_rate_hz seconds after the source's impulse.

    Every image with at most ``max_order`` reflections that arrives within the response is there. An image that arrives
    before ``exact_ms`` is a windowed sinc (81 taps, Hann) at its exact delay. A later one is the same sinc at its delay
    rounded to a quarter of a sample: its error is below pi/4 * f / sample_rate_hz of its own amplitude at frequency f,
    its energy is right. Memory does not grow with the number of images. On a GPU the order of summing, and so
    the last bits, may differ between runs.

    Args:
        rooms: all with the same number of microphones M.
        sample_rate_hz: of the responses.
        length_s: their length; by default the longest reverberation time of the rooms.
        max_order: most reflections of one path; no limit by default.
        exact_ms: up to where delays are exact.
        highpass_hz: corner of a second-order Butterworth high-pass against the low rumble of purely positive
            reflections; 0 for none.
        device: where to compute.

    Raises:
        ValueError: the rooms differ in M, or a number is out of its range.
    """
    if not rooms or len({len(room.mics_m) for room in rooms}) != 1:
        raise ValueError("rooms: wanted one or more rooms, all with the same number of microphones")
    if length_s is None:
        length_s = max(room.rt60_s for room in rooms)
    length = round(length_s * sample_rate_hz) if math.isfinite(length_s) else 0
    if length < 1:
        raise ValueError(f"length_s: got {length_s}, wanted a finite time of 1 sample or more")
    if max_order is not None and max_order < 0:
        raise ValueError(f"max_order: got {max_order}, wanted 0 or more, or None for no limit")
    device = torch.device(device)
    with torch.no_grad():
        responses = [
            torch.stack([_one(room, mic, sample_rate_hz, length, max_order, exact_ms, device) for mic in room.mics_m])
            for room in rooms
        ]
        rir = torch.stack(responses)
        if highpass_hz <= 0:
            return rir
        return butterworth(rir, sample_rate_hz, torch.tensor(float(highpass_hz)), lowest_hz=highpass_hz)


def _one(
    room: Room,
    mic: tuple[float, ...],
    rate: int,
    length: int,
    max_order: int | None,
    exact_ms: float,
    device: torch.device,
) -> Tensor:
    """The response (L,) from the room's source to ``mic``."""
    half = TAPS // 2
    reach = length + half  # samples: a later image does not touch the response
    exact = min(max(1, round(exact_ms * rate / 1000)), reach)
    per_metre = rate / SPEED_OF_SOUND_M_S
    axes = [_axis(room, axis, mic, reach / per_metre, max_order) for axis in range(3)]
    response = _early(axes, per_metre, exact, reach, max_order).to(device=device, dtype=torch.float32)
    if reach > exact:
        on_device = [(d.float().to(device), g.float().to(device), n.to(device)) for d, g, n in axes]
        response = response + _late(on_device, per_metre, exact, reach, max_order)
    return response[:length]


def _axis(room: Room, axis: int, mic: tuple[float, ...], reach_m: float, max_order: int | None) -> Axis:
    """Images along one axis within ``reach_m``: signed distances (I,), rising; gains (I,); reflections (I,). Float64.

    Image m (a whole number) lies in the m-th copy of the room and is a mirror image where m is odd; on the way to it
    sound crosses |m| walls, the near and the far one by turns.
    """
    side, source = room.size_m[axis], room.source_m[axis]
    most = math.ceil(reach_m / side) + 1
    if max_order is not None:
        most = min(most, max_order)
    m = torch.arange(-most, most + 1)
    position = m * side + (m % 2).double() * (side - 2 * source) + source
    count = m.abs()
    first, second = (count + 1) // 2, count // 2
    low, high = (math.sqrt(1 - share) for share in room.absorption[2 * axis : 2 * axis + 2])
    on_low, on_high = torch.where(m < 0, first, second).double(), torch.where(m < 0, second, first).double()
    gain = torch.pow(low, on_low) * torch.pow(high, on_high)
    distance = position - mic[axis]
    return _nearer((distance, gain, count), reach_m)


def _nearer(axis: Axis, reach_m: float) -> Axis:
    distance, gain, count = axis
    near = distance.abs() <= reach_m
    return distance[near], gain[near], count[near]


def _early(axes: list[Axis], per_metre: float, exact: int, reach: int, max_order: int | None) -> Tensor:
    """The images before sample ``exact`` as windowed sincs at their exact delays, (reach,), in float64."""
    (dx, gx, nx), (dy, gy, ny), (dz, gz, nz) = (_nearer(axis, exact / per_metre) for axis in axes)
    distance = (dx[:, None, None].square() + dy[:, None].square() + dz.square()).sqrt()
    delay = distance * per_metre
    keep = (delay * OVERSAMPLING).round() < exact * OVERSAMPLING
    if max_order is not None:
        keep &= nx[:, None, None] + ny[:, None] + nz <= max_order
    delay = delay[keep]
    amplitude = (gx[:, None, None] * gy[:, None] * gz)[keep] / (4 * math.pi * distance[keep])
    half = TAPS // 2
    response = torch.zeros(reach + 2 * half + 2, dtype=torch.float64)  # with room for taps on both sides
    taps = torch.arange(-half, half + 1)
    for start in range(0, len(delay), 4096):
        late, size = delay[start : start + 4096, None], amplitude[start : start + 4096, None]
        centre = late.round()
        index = (centre.long() + taps + half).clamp_max(len(response) - 1)
        response.index_add_(0, index.flatten(), (size * _kernel(centre + taps - late)).flatten())
    return response[half : half + reach]


def _kernel(t: Tensor) -> Tensor:
    """The sinc under a Hann window, at ``t`` samples from its middle."""
    width = TAPS / 2
    return torch.sinc(t) * torch.cos(math.pi / (2 * width) * t.clamp(-width, width)).square()


def _late(axes: list[Axis], per_metre: float, exact: int, reach: int, max_order: int | None) -> Tensor:
    """The images from sample ``exact`` on, (reach,): summed on a fine grid of delays, then filtered and thinned out."""
    (dx, gx, nx), (dy, gy, ny), (dz, gz, nz) = axes
    device = dx.device
    fine = per_metre * OVERSAMPLING
    bins = reach * OVERSAMPLING
    grid = torch.zeros(bins + 1, device=device)  # the last bin takes what comes too late
    block = _BLOCK.get(device.type, _DEVICE_BLOCK)
    # Distances in steps of the grid, so that the root is the bin itself.
    x2, y2, z2 = ((d * fine).square() for d in (dx, dy, dz))
    gx, gz = gx * (fine / (4 * math.pi)), gz
    rows = max(1, block // (len(dy) * len(dz)))
    for start in range(0, len(dx), rows):
        part = slice(start, start + rows)
        nearest = float(x2[part].min()) if device.type == "cpu" else 0.0
        wide = y2 <= max(float(bins) ** 2 - nearest, 0.0) if nearest else slice(None)
        flat2 = x2[part, None] + y2[wide]
        flat_gain = gx[part, None] * gy[wide]
        steps = (flat2[..., None] + z2).sqrt_()
        amplitude = (flat_gain[..., None] * gz).div_(steps)
        if max_order is not None:
            amplitude *= nx[part, None, None] + ny[wide][:, None] + nz <= max_order
        index = steps.add_(0.5).clamp_max_(bins).long()
        grid.index_add_(0, index.flatten(), amplitude.flatten())
    grid[: exact * OVERSAMPLING] = 0
    return _thin_out(grid[:bins], reach)


def _thin_out(grid: Tensor, reach: int) -> Tensor:
    """The fine grid (reach * OVERSAMPLING,) through the windowed sinc, at the response's own rate, (reach,)."""
    half = (TAPS // 2 + 1) * OVERSAMPLING
    kernel = _kernel(torch.arange(-half, half + 1, device=grid.device) / OVERSAMPLING)
    size = 1 << (len(grid) + 2 * half).bit_length()
    spectrum = torch.fft.rfft(grid, n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[half : half + len(grid) : OVERSAMPLING][:reach]
