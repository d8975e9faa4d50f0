"""Layers over the channels of many short rows, with backward passes that read each row once."""
