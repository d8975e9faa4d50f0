"""Focused linear attention: time and memory that grow with the length, not with its square."""
