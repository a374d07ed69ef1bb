"""The stage ``export``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from beitctl.api import Job, Plugin
from beitctl.errors import CheckFailed

if TYPE_CHECKING:
    import torch

PROBES = 4


class Export(Plugin):
    """Write a model as safetensors with its configuration, and prove that it reloads to the same outputs."""

    model: str
    """The model: ``@pretrain``, ``@finetune.retrieval`` or a folder with model.safetensors."""
    model_settings: dict[str, Any] = Field(default_factory=dict)
    """What a file of another library does not say, such as ``{ heads = 12 }``."""
    format: Literal["beitctl"] = "beitctl"
    """``beitctl``: model.safetensors and config.json, read by ``beitctl.load_model``."""
    tolerance: float = Field(default=1e-5, ge=0)
    """Largest difference allowed between the outputs before and after; above it the run exits with 7."""

    def plan(self) -> Mapping[str, Any]:
        """What is written."""
        return {"model": self.model, "format": self.format}

    def run(self, job: Job) -> Mapping[str, Any]:
        """Write ``export/``, load it again, compare outputs on random inputs."""
        from beitctl.checkpoints.loading import load_model, read_model
        from beitctl.checkpoints.native import save_model
        from beitctl.engine import dist

        ranks = dist.start()
        if not ranks.main:
            ranks.barrier()
            return {}
        stored = read_model(job.path(self.model), self.model_settings)
        folder = job.folder / "export"
        save_model(
            folder, stored.tensors, stored.model, task=stored.task, labels=stored.labels,
            tokenizer=stored.text_tokenizer(), unread=stored.unread,
        )  # fmt: skip
        before, after = load_model(stored.folder, **self.model_settings), load_model(folder)
        difference = _largest(_probe(before, stored.model), _probe(after, stored.model))
        ranks.barrier()
        job.log.note(f"exported to {folder}, largest difference after reloading {difference:.1e}")
        if not difference <= self.tolerance:
            raise CheckFailed(
                f"outputs differ by {difference:.2e} after reloading (tolerance {self.tolerance:.0e})"
            )
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        parameters = sum(value.numel() for value in stored.tensors.values())
        return {"max_difference": difference, "parameters": parameters, "bytes": size}


def _largest(before: "list[torch.Tensor]", after: "list[torch.Tensor]") -> float:
    """Largest difference of two lists of outputs; NaN if there is one in either."""
    import torch

    return float(torch.stack([(a - b).abs().max() for a, b in zip(before, after, strict=True)]).max())


def _probe(model: Any, config: Any) -> "list[torch.Tensor]":
    """Outputs of a model on fixed random pictures, and texts where it reads them."""
    import torch

    from beitctl.checkpoints.models import ClassificationModel, ReasoningModel

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(PROBES, config.channels, *config.size, generator=generator)
    text = None
    if config.vocabulary:
        text = torch.randint(4, config.vocabulary, (PROBES, config.text_tokens), generator=generator)
    alone = text is None or getattr(getattr(model, "task", None), "layout", "") == "image"
    more = {"image2": image.flip(0)} if isinstance(model, ReasoningModel) else {}
    with torch.no_grad():
        out = model(image) if alone or isinstance(model, ClassificationModel) else model(image, text, **more)
    found = list(out.values()) if isinstance(out, dict) else out
    return list(found) if isinstance(found, (tuple, list)) else [found]
