"""Sparse-linear attention for a trained model: record its layers, fit a router to each, put them in, take them out."""

from allears.turbo.sparse.fit import Sample
from allears.turbo.sparse.install import Installed, apply
from allears.turbo.sparse.record import Recording, record
from allears.turbo.sparse.report import read_reports
from allears.turbo.sparse.search import LayerReport, SparseSettings, Trial
from allears.turbo.sparse.sparsify import sparsify

__all__ = [
    "Installed",
    "LayerReport",
    "Recording",
    "Sample",
    "SparseSettings",
    "Trial",
    "apply",
    "read_reports",
    "record",
    "sparsify",
]
