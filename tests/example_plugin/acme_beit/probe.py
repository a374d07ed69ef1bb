"""The stage ``probe``; what is heavy is imported inside ``run``, so that ``beitctl --help`` stays quick."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from beitctl.api import Job, Plugin, SourceField


class Probe(Plugin):
    """Count the labels of a source, and the weights of a model."""

    model: str
    """The model: ``@pretrain`` or a folder with model.safetensors."""
    source: SourceField
    """What is counted."""

    def plan(self) -> Mapping[str, Any]:
        """How many examples are read."""
        return {"examples": len(self.source.open())}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return self.source.open().fingerprint

    def run(self, job: Job) -> Mapping[str, Any]:
        """Count, and write a table for the report."""
        from beitctl.checkpoints.loading import read_model

        examples = self.source.open()
        labels = Counter(examples[index].label for index in range(len(examples)))
        job.log.table("labels", "Labels of the source", ["label", "examples"], labels.most_common())
        weights = read_model(job.path(self.model)).tensors
        return {"labels": len(labels), "examples": len(examples), "weights": len(weights)}
