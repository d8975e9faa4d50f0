"""What each process of the data-parallel test does; started by torchrun with the output folder as its argument."""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny_objective import TRUTH, TinyObjective, tiny_model
from torch import nn

from allears.core.weights import save_weights
from allears.train import TrainConfig, train


def joined_batch(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + step))


class Share:
    """Rows ``first`` to ``first + count`` of a batch that is the same everywhere; the loss calls no ``forward``."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def loss(self, model, step, generator):
        x = joined_batch(step)[self.first : self.first + self.count]
        return (model.other_way(x) - x @ TRUTH).square().mean(), {}

    def validate(self, model):
        return {"ranks": float(os.environ.get("RANK", "0"))}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.unused = nn.Parameter(torch.zeros(3))

    def other_way(self, x):
        return self.body(x)


def share_config(out: Path) -> TrainConfig:
    return TrainConfig(out=str(out), steps=12, lr=0.02, warmup_steps=2, precision="fp32", device="cpu", ema_decay=0.5)


class Drawing(TinyObjective):
    """Notes the first draw of this process, and asks rank 1 alone to stop in step ``stop_step``."""

    def __init__(self, stop_step=None):
        rank = int(os.environ["RANK"])

        def at_step(step):
            if rank == 1 and step == stop_step:
                signal.raise_signal(signal.SIGTERM)

        super().__init__(at_step)
        self.first = None

    def loss(self, model, step, generator):
        if self.first is None:
            self.first = torch.randn(3, generator=generator.clone_state())
        return super().loss(model, step, generator)


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # the first process's weights must win
    net = Net()
    train(net, Share(4 * rank, 4), share_config(out / "share"))
    found = {f"share/{name}": value for name, value in net.state_dict().items()}

    def run(folder, stop_step=None):
        config = TrainConfig(out=str(out / folder), steps=8, precision="fp32", device="cpu", log_every=3)
        objective = Drawing(stop_step)
        model = tiny_model(rank)
        result = train(model, objective, config)
        found.update({f"{folder}{result.step}/{name}": value for name, value in model.state_dict().items()})
        found[f"{folder}{result.step}/draw"] = objective.first
        assert result.stop == ("signal" if stop_step else "steps")

    run("whole")
    run("parts", stop_step=4)
    run("parts")
    save_weights(out / f"rank{rank}", found, {}, dtype=None)


if __name__ == "__main__":
    sys.modules.update({"torch.utils.tensorboard": None, "matplotlib": None})  # slow to import, and optional
    os.fsync = lambda number: None  # slow on a busy disk
    main(Path(sys.argv[1]))
