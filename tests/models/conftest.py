import pytest
import torch

from allears.models.enhance import PRESETS, Enhancer
from allears.models.enhance.model import EnhanceNet


@pytest.fixture
def perturbed_net() -> EnhanceNet:
    """The smallest enhancer with every weight moved: an untrained one returns its input, this one does not."""
    net = EnhanceNet(PRESETS["test"])
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return net


@pytest.fixture
def small_enhancer(perturbed_net) -> Enhancer:
    return Enhancer(perturbed_net, "cpu")


@pytest.fixture
def identity_enhancer() -> Enhancer:
    """Of an untrained network: what goes in comes out, through the whole pipeline."""
    return Enhancer(EnhanceNet(PRESETS["test"]), "cpu")
