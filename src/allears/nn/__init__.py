"""Modules that several models share."""
