"""What the tests of checkpoints save, and how they compare it."""

import threading

import torch

from beitctl.engine.dist import Ranks
from beitctl.engine.saving import dcp
from beitctl.engine.saving.checkpoint import Checkpoints

ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def tensors_of(step):
    """Tensors of every kind that training state has, all different at every step."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(17, 8, generator=draw)
    weight[0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])
    return {
        "learner.weight": torch.nn.Parameter(weight),
        "learner.bias": torch.randn(5, generator=draw).bfloat16(),
        "learner.ids": torch.randint(0, 99, (3, 2), generator=draw),
        "learner.mask": torch.rand(3, generator=draw) > 0.5,
        "learner.turned": torch.randn(4, 6, generator=draw).t(),
        "learner.empty": torch.zeros(0, 3),
        "optimizer.step.weight": torch.tensor(float(step)),
    }


def blank():
    return {name: torch.full_like(tensor, 1).detach() for name, tensor in tensors_of(1).items()}


def bits(tensors):
    return {
        name: tensor.detach().contiguous().view(torch.uint8).tolist() if tensor.ndim else tensor.item()
        for name, tensor in tensors.items()
    }


class Kept:
    """A folder of checkpoints, the warnings it gave, and the steps that were saved in the background."""

    def __init__(self, folder, keep=3, **more):
        self.warnings, self.done = [], []
        self.checkpoints = Checkpoints(folder, ALONE, keep, self.warnings.append, **more)
        self.folder = folder

    def save(self, *steps):
        for step in steps:
            self.checkpoints.save(step, tensors_of(step), {"identity": f"run-{step}"})
        return self

    def begin(self, step, tensors=None):
        """Save a step in the background."""
        meta = {"identity": f"run-{step}"}
        self.checkpoints.begin(step, tensors or tensors_of(step), meta, self.note)

    def note(self, step, path, seconds):
        assert path.is_dir()
        assert seconds > 0
        self.done.append(step)

    def settle(self):
        self.checkpoints.settle(wait=True)

    def loaded(self):
        """Step and bits of the newest checkpoint."""
        found = self.checkpoints.newest()
        tensors = blank()
        self.checkpoints.load(found, tensors)
        return found.step, bits(tensors)

    def names(self):
        return sorted(path.name for path in self.folder.iterdir())


class Gate:
    """A disk that writes nothing until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        write = dcp.write

        def late(*arguments):
            self.reached.set()
            assert self.open.wait(30)
            write(*arguments)

        monkeypatch.setattr(dcp, "write", late)
