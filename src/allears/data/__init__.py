"""Corpora, mixing and simulation."""
