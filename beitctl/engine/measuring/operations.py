"""Useful operations of one batch: of the model, and of the heads on the rows that they predict.

Letters: n samples of this rank, d width.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch import nn

from beitctl.config import ModelConfig
from beitctl.model.flops import Flops, linear_weights, of_head, of_pass
from beitctl.model.heads import Aggregation, ContrastiveHead
from beitctl.model.plan import BatchPlan

if TYPE_CHECKING:
    from beitctl.api import Task
    from beitctl.data.batch import Group

UNITS: dict[str, Literal["patch", "text"]] = {"image_codes": "patch", "text_tokens": "text"}
"""What the heads of masked prediction read, by their names; others read every sample once."""


def of_task(
    task: "Task", config: ModelConfig, plan: BatchPlan, group: "Group", heads: Mapping[str, nn.Module]
) -> Flops:
    """Operations of what a task does with the encoded batch.

    A head on hidden patches or tokens reads the predicted rows once for each term on them. A task that does
    something else, such as further passes, has a method ``operations(config, plan, group, heads)``.

    Args:
        task: the task of an objective.
        config: shape of the model.
        plan: counts and lengths of the whole batch.
        group: the rows of the objective.
        heads: the heads of the task by name.
    """
    own = getattr(task, "operations", None)
    if callable(own):
        found: Flops = own(config, plan, group, heads)
        return found
    counts, terms = group.counts, Counter(term.unit for term in task.terms().values())
    total = Flops()
    for name, head in heads.items():
        if isinstance(head, Aggregation):
            total += of_pass(config, plan, blocks=len(head.blocks), embedded=False)
        elif isinstance(head, ContrastiveHead):
            total += of_contrast(counts["sample"], head)
        else:
            unit = UNITS.get(name)
            rows = counts[unit] * terms[unit] if unit else counts["sample"]
            total += of_head(rows, linear_weights(head))
    return total


def of_contrast(samples: int, head: ContrastiveHead) -> Flops:
    """Both projections of n samples, and their logits with the samples of all ranks, both ways."""
    everywhere = samples * (dist.get_world_size() if dist.is_initialized() else 1)
    return of_head(samples, linear_weights(head) + 2 * everywhere * head.vision.out_features)
