"""Fresh memory full of what a kernel must overwrite."""

import math

import torch


def poison_new_empty(monkeypatch) -> None:
    """``Tensor.new_empty`` gives NaN, or the byte 0x7F where there is no NaN."""
    empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        if out.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
            out.view(torch.uint8).fill_(0x7F)
        elif out.is_floating_point():
            out.fill_(math.nan)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
