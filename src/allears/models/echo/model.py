"""The echo canceller's network: microphone and reference to the near end, offline and in steps.

Frame n of a signal is centred at sample n * hop, as in :class:`allears.audio.stft.Stft`; it is complete one hop later,
and so is the output up to its centre.

Shapes: B batch, S samples, T frames (``ceil(S / hop) + 1`` of a whole signal), F bins, D delays of the reference in
frames. Spectra are (B, 2, T, F), real and imaginary parts; features (B, 3, T, F), compressed: those, and the magnitude.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from allears.audio.stft import Stft
from allears.models.echo.align import Align, AlignState
from allears.models.echo.blocks import Stage, StageState
from allears.models.echo.config import EchoConfig
from allears.nn.causal import hold_peaks

_QUIETEST = 1e-8  # mean square of a signal below which it is not made louder: -80 dB
_RELEASE_DB = 0.06  # a frame: the level to which features are normalised falls by 6 dB a second
_SMALLEST = 1e-7  # of a bin's energy, beside that of the level
_OPEN, _CLOSED = 0.4, 0.1  # probabilities of voice at which the gate is wide open, and shut
_DB = 10.0 / math.log(10.0)


class EchoOutput(NamedTuple):
    """``near`` (B, S), behind the gate; ``stages`` (B, S) each, in the order of progress, before it. ``alignment``
    (B, T, D): softmax over the delays. ``voice`` (B, T): logits of near-end voice. The last two are ``None`` where the
    configuration leaves them out."""

    near: Tensor
    stages: tuple[Tensor, ...]
    alignment: Tensor | None
    voice: Tensor | None


class EchoState(NamedTuple):
    """What a stream carries. ``signals`` (B, 2, hop): the last hop of microphone and reference; ``tail`` (B, hop): the
    unfinished output; ``levels`` (B, 2): log energies to which features are normalised; ``gate`` (B,): its gain, dB."""

    signals: Tensor
    tail: Tensor
    levels: Tensor
    align: AlignState | None
    stages: tuple[StageState, ...]
    gate: Tensor


class Heard(NamedTuple):
    """What the network tells of each frame beside the output: ``alignment`` (B, T, D) and ``voice`` (B, T), logits; of
    :meth:`EchoNet.step`, (B, D) and (B,)."""

    alignment: Tensor | None
    voice: Tensor | None


class EchoNet(nn.Module):
    """Takes the echo of ``reference`` out of ``mic``, and noise with it.

    Features are normalised to the recent peak of each signal (up at once, down by 6 dB a second), which a filter on the
    microphone's own spectrum does not change: the output keeps its level. An untrained network returns the microphone.
    """

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = Stft(config.n_fft, config.hop)
        self.align = Align(config) if config.alignment else None
        self.first = Stage(6, False, config) if config.progressive else None
        self.last = Stage(9, True, config)
        self.voice = nn.Linear(config.hidden, 1) if config.voice else None
        if self.voice is not None:
            nn.init.zeros_(self.voice.weight)
            nn.init.constant_(self.voice.bias, 2.0)

    def forward(self, mic: Tensor, reference: Tensor, linear: Tensor | None = None) -> EchoOutput:
        """Whole signals.

        Args:
            mic, reference: (B, S), S at least 1, at the configuration's rate.
            linear: (B, S), the output of a linear echo canceller; for ``linear_input`` alone.

        Raises:
            ValueError: shapes that differ, or a linear output where there is none wanted, or none where one is.
        """
        if mic.dim() != 2 or not mic.shape[1] or reference.shape != mic.shape:
            raise ValueError(
                f"mic, reference: shapes {tuple(mic.shape)} and {tuple(reference.shape)} given; both must be (B, S) "
                "with at least 1 sample: pad or cut the reference to the microphone's length"
            )
        if (linear is not None) != self.config.linear_input or (linear is not None and linear.shape != mic.shape):
            given = None if linear is None else tuple(linear.shape)
            wanted = tuple(mic.shape) if self.config.linear_input else None
            raise ValueError(f"linear: {given} given, {wanted} wanted with linear_input={self.config.linear_input}")
        batch, length = mic.shape
        signals = [mic, reference] if linear is None else [mic, reference, linear]
        spectra = self.spectra(self.stft.forward(torch.stack(signals, dim=1)))
        state = self.initial_state(batch)
        made, gain, heard, _ = self.frames(spectra[:, :2], state, spectra[:, 2] if linear is not None else None)
        stages = tuple(self._inverse(spectrum, length) for spectrum in made)
        near = stages[-1] if gain is None else self._inverse(made[-1] * gain[:, None, :, None], length)
        return EchoOutput(near, stages, heard.alignment, heard.voice)

    def initial_state(self, batch: int) -> EchoState:
        """Of a stream before its first sample."""
        zeros, config = next(self.parameters()).new_zeros, self.config
        return EchoState(
            zeros(batch, 2, config.hop),
            zeros(batch, config.hop),
            zeros(batch, 2) + self._floor,
            self.align.initial(batch, config.bins) if self.align is not None else None,
            tuple(stage.initial(batch) for stage in self._stages),
            zeros(batch),
        )

    def step(self, mic: Tensor, reference: Tensor, state: EchoState) -> tuple[Tensor, Heard, EchoState]:
        """The next hop of a stream: (B, hop) of both signals to (B, hop) of the near end, what is heard of the frame
        ((B, D) and (B,)), and the next state.

        The output is that of the hop before: the first hop that comes out lies before the signal, and one hop of
        silence is to be put in at its end. All together equal :meth:`forward`.
        """
        near, heard, state = self.advance(mic, reference, state)
        alignment = None if heard.alignment is None else heard.alignment[:, 0]
        voice = None if heard.voice is None else heard.voice[:, 0]
        return near, Heard(alignment, voice), state

    def advance(self, mic: Tensor, reference: Tensor, state: EchoState) -> tuple[Tensor, Heard, EchoState]:
        """:meth:`step` with T hops at once: (B, T hop) to (B, T hop), with (B, T, D) and (B, T) of what is heard."""
        hop = self.config.hop
        if mic.dim() != 2 or reference.shape != mic.shape or mic.shape[1] % hop or not mic.shape[1]:
            raise ValueError(
                f"mic, reference: shapes {tuple(mic.shape)} and {tuple(reference.shape)} given; both must be (B, T) "
                f"with a whole number of hops of {hop} samples"
            )
        signals = torch.cat([state.signals, torch.stack([mic, reference], dim=1)], dim=2)
        spectrum, heard, following = self.cancel(self.spectra(self.stft.transform_frames(signals)), state)
        near, tail = self._overlap(spectrum, state.tail)
        return near, heard, following._replace(signals=signals[:, :, -hop:], tail=tail)

    def cancel(self, spectra: Tensor, state: EchoState) -> tuple[Tensor, Heard, EchoState]:
        """:meth:`advance` without its transforms: spectra (B, 2, 2, T, F) of microphone and reference to that of the
        near end, behind the gate, (B, 2, T, F). ``signals`` and ``tail`` of the state stay as they are."""
        made, gain, heard, following = self.frames(spectra, state)
        return made[-1] if gain is None else made[-1] * gain[:, None, :, None], heard, following

    def frames(
        self, spectra: Tensor, state: EchoState, linear: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None, Heard, EchoState]:
        """The network between the transforms, in real numbers alone.

        Args:
            spectra: (B, 2, 2, T, F), microphone and reference.
            state: of what came before; its ``signals`` and ``tail`` are passed through.
            linear: (B, 2, T, F), for ``linear_input``.

        Returns:
            The spectra of the stages (B, 2, T, F), the gate's gain (B, T) or ``None``, what is heard, the next state.
        """
        features, levels, held = self._features(spectra, state.levels)
        mic, reference = features[:, 0], features[:, 1]
        align, alignment = state.align, None
        if self.align is not None and align is not None:
            reference, alignment, align = self.align(mic, reference, align)
        microphone = spectrum = spectra[:, 0]
        made, states, hidden = [], [], None
        if self.first is not None:
            spectrum, hidden, following = self.first(
                torch.cat([mic, reference], dim=1), spectrum, microphone, state.stages[0]
            )
            made.append(spectrum)
            states.append(following)
        slot = spectrum if linear is None else linear
        before = mic if self.first is None and linear is None else self._compress(slot, held[:, 0])
        spectrum, hidden, following = self.last(
            torch.cat([mic, reference, before], dim=1), slot, microphone, state.stages[-1]
        )
        made.append(spectrum)
        states.append(following)
        voice, gain, gate = None, None, state.gate
        if self.voice is not None:
            voice = self.voice(hidden).float()[..., 0].transpose(0, 1)
            if self.config.voice_gate:
                gain, gate = self._gate(voice, gate)
        following_state = EchoState(state.signals, state.tail, levels, align, tuple(states), gate)
        return made, gain, Heard(alignment, voice), following_state

    @staticmethod
    def spectra(spectrum: Tensor) -> Tensor:
        """Complex (..., F, T) to (..., 2, T, F)."""
        return torch.view_as_real(spectrum).movedim(-1, -3).transpose(-1, -2)

    @property
    def _stages(self) -> list[Stage]:
        return [self.last] if self.first is None else [self.first, self.last]

    @property
    def _floor(self) -> float:
        """Log of a bin's mean energy at the quietest level; the window's squares sum to n_fft / 2."""
        return math.log(_QUIETEST * self.config.n_fft / 2)

    def _features(self, spectra: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spectra (B, 2, 2, T, F) to features (B, 2, 3, T, F), the next levels (B, 2), and those of all frames."""
        energy = spectra.square().sum(2).mean(-1).clamp_min(1e-30).log().clamp_min(self._floor)
        held, levels = hold_peaks(energy, _RELEASE_DB / _DB, last)
        return self._compress(spectra, held), levels, held

    def _compress(self, spectrum: Tensor, level: Tensor) -> Tensor:
        """Spectra (..., 2, T, F) at log energies (..., T) to features (..., 3, T, F)."""
        x = spectrum * torch.exp(-0.5 * level)[..., None, :, None]
        log_energy = (x.square().sum(-3, keepdim=True) + _SMALLEST).log()
        power = self.config.power
        return torch.cat([x * (0.5 * (power - 1.0) * log_energy).exp(), (0.5 * power * log_energy).exp()], dim=-3)

    def _gate(self, voice: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T) and the gate's last value to gains (B, T): open at once, held, then closed slowly."""
        config = self.config
        share = ((voice.sigmoid() - _CLOSED) / (_OPEN - _CLOSED)).clamp(1e-6, 1.0)
        release = config.gate_release_db_per_s * config.hop_s
        hold = config.gate_hold_s * config.gate_release_db_per_s
        held, last = hold_peaks((2.0 * _DB * share.log()).clamp_min(config.gate_floor_db - hold), release, last)
        return ((held + hold).clamp(config.gate_floor_db, 0.0) / (2.0 * _DB)).exp(), last

    def _overlap(self, spectrum: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum (B, 2, T, F) and the half of a frame before it, (B, hop), to (B, T hop) and the half that is left.
        The squares of the windows sum to 1."""
        frames = torch.fft.irfft(torch.complex(spectrum[:, 0], spectrum[:, 1]), n=self.config.n_fft)
        early, late = (frames * self.stft.window_on(frames.device)).chunk(2, dim=-1)
        near = early + torch.cat([tail[:, None], late[:, :-1]], dim=1)
        return near.flatten(1), late[:, -1]

    def _inverse(self, spectrum: Tensor, length: int) -> Tensor:
        return self.stft.inverse(_as_complex(spectrum), length)


def _as_complex(spectrum: Tensor) -> Tensor:
    """(B, 2, T, F) to (B, F, T)."""
    return torch.complex(spectrum[:, 0], spectrum[:, 1]).transpose(-1, -2)


def transfer_from_linear(net: EchoNet, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy the weights of a pretraining network (``linear_input``) into ``net``, where name and shape are the same.

    In the pretraining network the output of a linear echo canceller stands where the first stage's output goes into the
    second; all weights have the same shapes there, so that normally every one is copied.

    Returns:
        The names of the weights of ``net`` that were copied, and of those that stay as they were.

    Raises:
        ValueError: nothing fits.
    """
    own = net.state_dict()
    copied = [name for name, value in own.items() if name in tensors and tensors[name].shape == value.shape]
    if not copied:
        raise ValueError(
            f"tensors: none of {len(tensors)} has a name and shape of EchoNet's; give the state_dict of an EchoNet"
        )
    with torch.no_grad():
        for name in copied:
            own[name].copy_(tensors[name])
    return copied, [name for name in own if name not in copied]
