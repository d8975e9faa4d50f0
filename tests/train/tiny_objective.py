"""A regression that draws from every generator a checkpoint must hold, for the tests of the loop."""

import random

import numpy as np
import torch
from torch import nn


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 2))


TRUTH = torch.linspace(-1, 1, 8).view(4, 2)


class TinyObjective:
    """``at_step``: called with the step number before each loss."""

    def __init__(self, at_step=None, batch: int = 6):
        self.at_step, self.batch, self.validations = at_step, batch, 0

    def loss(self, model, step, generator):
        if self.at_step is not None:
            self.at_step(step)
        x = torch.randn(self.batch, 4, generator=generator, device=generator.device)
        x = x + random.gauss(0, 0.1) + float(np.random.standard_normal()) * 0.1 + 0.1 * torch.rand(()).item()
        error = (model(x) - x @ TRUTH.to(x.device)).float().square().mean()
        return error, {"error": error.detach(), "spread": float(step)}

    def validate(self, model):
        self.validations += 1
        assert not model.training and not torch.is_grad_enabled()
        x = torch.randn(32, 4, device=next(model.parameters()).device)
        return {"error": float((model(x) - x @ TRUTH.to(x.device)).square().mean())}
