"""Scores for speech and sound: how close an estimate is to its reference, and how good it sounds on its own.

=====================  =========  ===========================================================  ===============
metric                 better is  what it says                                                 needs
=====================  =========  ===========================================================  ===============
``si_sdr_db``          higher     scale-invariant signal-to-distortion ratio, dB               nothing
``pesq_wb``            higher     ITU-T P.862.2 listening quality, 1.02 to 4.64                ``pesq``
``estoi``              higher     extended short-time objective intelligibility, up to 1       ``pystoi``
``dnsmos_sig``         higher     DNSMOS P.835 speech quality, 1 to 5; takes no reference      ``speechmos``
``dnsmos_bak``         higher     DNSMOS P.835 freedom from background noise                   ``speechmos``
``dnsmos_ovrl``        higher     DNSMOS P.835 overall quality                                 ``speechmos``
``speaker_similarity`` higher     cosine between GE2E voice embeddings, 0 to 1                 ``resemblyzer``
``phone_error_rate``   lower      phones heard in the estimate against those in the reference  ``pocketsphinx``
=====================  =========  ===========================================================  ===============

``score_clip`` computes several at once and resamples where a metric asks for 16 kHz. A clip that a metric cannot judge
(no speech, too short) scores NaN, and ``collect_reasons`` says why.
"""

from .alignment import align, delay_samples
from .bootstrap import Interval, bootstrap_interval, paired_bootstrap_interval
from .intelligibility import estoi
from .non_intrusive import Dnsmos, dnsmos
from .pesq import pesq_wb
from .reasons import collect_reasons
from .recognition import edit_distance, error_rate, phone_error_rate, recognise_phones, recognise_words, word_error_rate
from .score import DEFAULT_METRICS, METRICS, REFERENCE_FREE_METRICS, score_clip
from .si_sdr import si_sdr_db
from .speaker import speaker_embedding, speaker_similarity

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "REFERENCE_FREE_METRICS",
    "Dnsmos",
    "Interval",
    "align",
    "bootstrap_interval",
    "collect_reasons",
    "delay_samples",
    "dnsmos",
    "edit_distance",
    "error_rate",
    "estoi",
    "paired_bootstrap_interval",
    "pesq_wb",
    "phone_error_rate",
    "recognise_phones",
    "recognise_words",
    "score_clip",
    "si_sdr_db",
    "speaker_embedding",
    "speaker_similarity",
    "word_error_rate",
]
