"""Labels by the nearest labelled pictures (k-NN) in the features of a frozen model; imported inside ``run``.

Sources: the weighted vote with a temperature is DINO's (arXiv:2104.14294, appendix: k = 20, temperature
0.07); weighing a vote by the similarity itself is this project's.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beitctl.api import Examples, Job, Measured, Tools
from beitctl.checkpoints.native import Stored
from beitctl.config import ModelConfig
from beitctl.engine.agreement import as_told, everywhere
from beitctl.engine.dist import Ranks
from beitctl.errors import DivergedError, UserError
from beitctl_plugins.stages import measuring
from beitctl_plugins.stages.probing.features import (
    Features,
    extracted,
    frozen,
    random_weights,
    tell_left_out,
)

SIMILARITIES = 2**26
"""Similarities that are in memory at once."""


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how neighbours vote."""

    features: Features
    neighbours: int
    temperature: float = 0.0
    """0: a vote weighs its cosine similarity s; else exp(s / temperature)."""
    seed: int = 0
    """Of the random weights that the model is compared with."""

    def words(self, config: ModelConfig, known: int) -> str:
        """The protocol for people, so that a number can be compared with others.

        Args:
            config: of the model.
            known: pictures that neighbours are looked up in.
        """
        weight = f"exp(similarity / {self.temperature:g})" if self.temperature else "similarity"
        return (
            f"k-NN, k = {min(self.neighbours, known)}, cosine similarity, votes weighed by {weight}, "
            f"{self.features.words(config)}, fp32"
        )


def votes(
    asked: Tensor, known: Tensor, labels: Sequence[str], protocol: Protocol, most: int = SIMILARITIES
) -> list[str]:
    """The label with the most weight among the nearest neighbours of every row; of equal ones the nearer.

    Args:
        asked: (n, D) unit vectors.
        known: (m, D) unit vectors.
        labels: of ``known``.
        protocol: how many neighbours vote, and with what weight.
        most: similarities that are in memory at once.

    Raises:
        DivergedError: vectors are not numbers, which are near to nothing.
    """
    if not (asked.isfinite().all() and known.isfinite().all()):
        raise DivergedError("k-NN: features are not numbers; the model diverged")
    count, rows = min(protocol.neighbours, len(labels)), max(1, most // len(labels))
    found = []
    for start in range(0, len(asked), rows):
        near = (asked[start : start + rows] @ known.T).topk(count, dim=1)
        for values, places in zip(near.values.tolist(), near.indices.tolist(), strict=True):
            weights: dict[str, float] = {}
            for value, place in zip(values, places, strict=True):
                # the nearest weighs 1, so that no temperature is too small
                vote = math.exp((value - values[0]) / protocol.temperature) if protocol.temperature else value
                weights[labels[place]] = weights.get(labels[place], 0.0) + vote
            found.append(max(weights, key=lambda label: weights[label]))
    return found


def measured(
    stored: Stored, protocol: Protocol, sources: Mapping[str, Examples], tools: Tools, job: Job,
    ranks: Ranks, workers: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Share of right labels for a model and for random weights, the same on every rank.

    Rank 0 writes ``predictions.jsonl``, and what could not be used.

    Args:
        stored: the model.
        protocol: what is compared.
        sources: the pictures that are asked about, ``source``, and those with known labels, ``reference``.
        tools: open pictures.
        job: where to write.
        ranks: all processes.
        workers: data-loading processes per rank.

    Raises:
        UserError: the reference has fewer than two classes.
        DivergedError: features are not numbers.
    """
    found: dict[str, list[str]] = {}
    held: dict[str, measuring.Held] = {}
    for name in ("pretrained", "random_init"):
        weights = stored.tensors if name == "pretrained" else random_weights(stored.model, protocol.seed)
        learner = frozen(weights, stored, ranks)
        held = {
            key: extracted(learner, protocol.features, (key, examples), tools, ranks, workers)
            for key, examples in sources.items()
        }
        found[name] = everywhere(ranks, partial(_votes, held, protocol, ranks), as_told)[0]
    tell_left_out(list(held.values()), job, ranks)

    def on_main() -> Any:
        return _metrics(found, held, protocol, stored.model, job) if ranks.main else None

    metrics: dict[str, Any] = everywhere(ranks, on_main, as_told)[0]
    return metrics


def _joined(held: measuring.Held, key: str) -> list[str]:
    return [one for output in held.outputs for one in output[key]]


def _votes(held: Mapping[str, measuring.Held], protocol: Protocol, ranks: Ranks) -> list[str]:
    if not ranks.main:
        return []
    labels = _joined(held["reference"], "labels")
    if len(set(labels)) < 2:
        raise UserError(
            f"reference: k-NN needs at least two classes, all {len(labels)} pictures are {labels[0]!r}"
        )
    asked, known = (
        torch.cat([output["vectors"] for output in held[key].outputs]).to(ranks.device)
        for key in ("source", "reference")
    )
    return votes(asked, known, labels, protocol)


def _metrics(
    found: Mapping[str, Sequence[str]], held: Mapping[str, measuring.Held], protocol: Protocol,
    config: ModelConfig, job: Job,
) -> dict[str, Any]:  # fmt: skip
    asked, known = held["source"], held["reference"]
    truth, labels = _joined(asked, "labels"), _joined(known, "labels")
    each = {
        name: np.array([vote == true for vote, true in zip(said, truth, strict=True)], np.float64)
        for name, said in found.items()
    }
    counts = Counter(labels)
    frequent = max(counts, key=lambda label: counts[label])
    metrics: dict[str, Any] = {
        **{name: float(right.mean()) for name, right in each.items()},
        "majority": truth.count(frequent) / len(truth),
        "examples": float(len(truth)),
        "left_out": float(len(asked.left_out)),
        "reference": float(len(labels)),
        "reference_left_out": float(len(known.left_out)),
        "label_not_in_reference": float(sum(label not in counts for label in truth)),
        "protocol": protocol.words(config, len(labels)),
    }
    if bounds := measuring.intervals(each):
        metrics["intervals_95"] = bounds
    rows = [
        {"id": id, "label": true, **{name: said[place] for name, said in found.items()}}
        for place, (id, true) in enumerate(zip(_joined(asked, "ids"), truth, strict=True))
    ]
    measuring.write_predictions(Measured(metrics, rows=rows), job)
    return metrics
