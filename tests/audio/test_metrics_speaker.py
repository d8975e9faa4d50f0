import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest

from allears.audio.metrics import collect_reasons, speaker_embedding, speaker_similarity
from allears.audio.metrics.speaker import _mel_filters, _mel_power, _partial_starts
from allears.core.errors import MissingDependencyError

RATE = 16_000
NOISE = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
needs_weights = pytest.mark.skipif(find_spec("resemblyzer") is None, reason="resemblyzer is not installed")


def test_mel_features_equal_librosa():
    librosa = pytest.importorskip("librosa")
    filters = librosa.filters.mel(sr=RATE, n_fft=400, n_mels=40).T
    np.testing.assert_allclose(_mel_filters(), filters, atol=1e-7)
    mel = librosa.feature.melspectrogram(y=NOISE, sr=RATE, n_fft=400, hop_length=160, n_mels=40).T
    np.testing.assert_allclose(_mel_power(NOISE), mel, rtol=1e-4, atol=1e-9)


def test_mel_filters_have_unit_area():
    area = _mel_filters().sum(axis=0) * 40  # 40 Hz a bin
    np.testing.assert_allclose(area[10:], 1, atol=0.12)


def test_partials_cover_the_clip():
    assert list(_partial_starts(100)) == [0]
    assert list(_partial_starts(RATE * 4)) == [0, 77, 154, 231]
    assert list(_partial_starts(RATE * 4 - 8000)) == [0, 77, 154]  # the rest would be mostly padding


def test_silence_has_no_voice():
    with pytest.raises(ValueError, match="silent"):
        speaker_embedding(np.zeros(RATE))
    with collect_reasons() as reasons:
        assert np.isnan(speaker_similarity(np.zeros(RATE), NOISE))
    assert reasons == {"speaker_similarity": "the estimate is silent or empty"}


@pytest.mark.skipif(find_spec("resemblyzer") is not None, reason="resemblyzer is installed")
def test_missing_weights_say_how_to_get_them():
    with pytest.raises(MissingDependencyError, match="pip install --no-deps resemblyzer"):
        speaker_similarity(NOISE, NOISE)


@needs_weights
def test_embedding_is_a_unit_vector_and_the_same_clip_has_similarity_one():
    embedding = speaker_embedding(NOISE)
    assert embedding.shape == (256,) and np.linalg.norm(embedding) == pytest.approx(1, abs=1e-6)
    assert speaker_similarity(NOISE, NOISE) == pytest.approx(1, abs=1e-6)


@needs_weights
@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_embedding_equals_the_package(monkeypatch, seconds):
    pytest.importorskip("librosa")
    if find_spec("webrtcvad") is None:
        monkeypatch.setitem(sys.modules, "webrtcvad", ModuleType("webrtcvad"))
    package = pytest.importorskip("resemblyzer")
    clip = NOISE[: int(seconds * RATE)] * 0.05
    louder = package.normalize_volume(clip, -30, increase_only=True)
    theirs = package.VoiceEncoder("cpu", verbose=False).embed_utterance(louder)
    np.testing.assert_allclose(speaker_embedding(clip), theirs, atol=1e-5)
