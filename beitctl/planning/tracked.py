"""One training step on one of many GPUs, with tensors that have shapes and no data: what is in memory when.

``python -m beitctl.planning.tracked JSON`` prints one JSON object; ``beitctl.planning.exact`` starts it. The
other GPUs are a fake process group. PyTorch's tracker counts every tensor that FSDP, the model and the losses
make. It sees blocks as they run uncompiled, on a fake CPU, with padded attention that keeps what the kernels
of a GPU keep; it does not see the workspace of kernels, the allocator or NCCL. The optimizer's step is left
out: it works in place.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from beitctl.api import Item
from beitctl.data.batch import Batch, collate
from beitctl.data.loader import portion_of
from beitctl.engine import optim
from beitctl.engine.compiling import prepare
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import sharded
from beitctl.errors import BeitctlError, UserError
from beitctl.model import attention
from beitctl.model.multiway import Multiway
from beitctl.planning.memory import MACHINE, compute_bytes
from beitctl.planning.work import CONTRAST_AND_MATCH, Part, Work, _kind, work_of
from beitctl.recipe import load

CPU = torch.device("cpu")
NAMES = {
    "Sharded Param": "master_weights",
    "OptState": "moments",
    "Sharded Grad": "gradients",
    "Unsharded Param": "gathered_weights",
    "Unsharded Grad": "full_gradients",
    "Activation": "activations",
    "Temp": "temporary",
    "All Gather": "all_gather",
    "Reduce Scatter": "reduce_scatter",
    "Buffer": "buffers",
    "Inputs": "inputs",
}
"""The tracker's kinds of tensors, and their names here."""


@dataclass(frozen=True)
class _Fake(Ranks):
    """Rank 0 of a fake process group, with a mesh that was made before tensors became fake."""

    made: DeviceMesh | None = None

    def mesh(self, shard_ranks: int = 0) -> DeviceMesh:
        assert self.made is not None
        return self.made


def count(work: Work, gpus: int) -> dict[str, Any]:
    """Bytes on one GPU when it holds most in a step, by kind, and those of the states between steps.

    Starts a fake process group, which this process keeps.

    Raises:
        UserError: the task needs the values of tensors, or the GPUs make no whole number of groups.
    """
    for part in work.parts:
        if _kind(part.task) == CONTRAST_AND_MATCH or getattr(part.task, "distil", None):
            raise UserError(
                f"{part.name}: this task draws pairs by their likeness or asks a teacher, which needs data"
            )
    passes, mine = work.share(gpus, work.train.micro_samples)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    ranks = _Fake(0, gpus, 0, CPU, local_world=min(MACHINE, gpus))
    ranks = replace(ranks, made=Ranks.mesh(ranks, work.train.shard_ranks))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        learner = _learner(mine, ranks)
        optimizer = optim.adamw(learner, work.train.optim, work.model.layers)
        optim.moments(learner, optimizer)
        if passes > 1:  # the gradients of the passes before
            for parameter in learner.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        batch = _batch(mine, fake)
        tracker = FSDPMemTracker(learner, optimizer)
        tracker.track_inputs(_tensors(batch))
        with tracker:
            losses = [loss for loss, _ in learner(batch).values()]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            after = _named(tracker.get_tracker_snapshot("current"))
        peak = _named(tracker.get_tracker_snapshot("peak"))
    states = {name: after[name] for name in ("master_weights", "moments", "gradients")}
    return {"states": states, "peak": peak, "total": sum(peak.values()), "micro_samples": mine.samples}


def _named(snapshot: Mapping[Any, Mapping[Any, int]]) -> dict[str, int]:
    """Bytes by kind from what the tracker says of the one device."""
    (sizes,) = snapshot.values()
    by_value = {getattr(kind, "value", kind): size for kind, size in sizes.items()}
    return {name: by_value.get(value, 0) for value, name in NAMES.items()}


def _learner(work: Work, ranks: Ranks) -> Any:
    """The learner, sharded as in a run, with the settings of its blocks that hold without a compiler."""
    settings = replace(work.train, compile="off", attention_backend="padded", memory_budget=1.0)

    def build() -> nn.Module:
        objectives = [Objective(part.name, part.task) for part in work.parts]
        made = MultiwayLearner(
            Multiway(work.model), objectives, dict.fromkeys([part.name for part in work.parts], work.tools)
        )
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(not any(frozen in name for frozen in work.frozen))
        return made

    return sharded(
        build,
        ranks,
        "bf16" if compute_bytes(work.train.precision) == 2 else "fp32",
        lambda name, shape: torch.empty(shape),
        prepare=functools.partial(prepare, config=settings, device=CPU, warn=lambda text: None),
    )


def _batch(work: Work, fake: FakeTensorMode) -> Batch:
    """One pass of the largest share, without data."""
    portions = [portion_of(part.name, part.task, [_item(part, work)] * part.samples) for part in work.parts]
    made = collate(portions, work.model)
    pixels = torch.empty(len(made.pixels), work.model.channels, *work.model.size, dtype=torch.uint8)
    keep = torch.empty(work.model.layers, 2, made.plan.sequences) if work.model.drop_path else None
    convert: Callable[[Tensor], Tensor] = fake.from_tensor
    return replace(replace(made, pixels=made.pixels[:0])._each(convert), pixels=pixels, keep=keep)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch._each(note)
    return tuple(found)


def _item(part: Part, work: Work) -> Any:
    """A sample of an objective; its picture has no pixels yet."""
    patches, words = np.full(work.model.patches, -1), np.full(part.text_tokens, -1)
    patches[: part.patches], words[: part.words] = 0, 0
    pictured, written = part.task.layout != "text", bool(part.text_tokens)
    return Item(
        second=np.zeros((work.model.channels, 0, 0), np.uint8) if part.task.layout == "two-pairs" else None,
        image=np.zeros((work.model.channels, 0, 0), np.uint8) if pictured else None,
        image_mask=patches >= 0 if pictured else None,
        patch_targets=patches if pictured else None,
        text=np.zeros(part.text_tokens, np.int64) if written else None,
        text_targets=words if written else None,
        label=0,
    )


def _as_on_gpus(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Attention that keeps no logits, in place of the products that are faster on a CPU."""
    if bias is not None:
        added = bias.to(q.dtype).expand(len(q), -1, -1, -1)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What ``count`` says of a table, or ``{"problem": text}``."""
    attention._plain = _as_on_gpus
    try:
        recipe = load(asked["recipe"], asked["settings"], stage="pretrain")
        return count(work_of(recipe, recipe.tables[asked["key"]], asked["caption_tokens"]), asked["gpus"])
    except BeitctlError as error:
        return {"problem": str(error)}
    except Exception as error:  # what tensors without data cannot do is told, the rest of the plan stands
        first = (str(error).strip().splitlines() or [""])[0]
        return {"problem": f"{type(error).__name__}: {first[:300]}"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
