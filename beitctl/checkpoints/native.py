"""beitctl's own model files: ``model.safetensors`` with ``config.json``, and the text tokenizer beside them.

Only tensors and JSON are ever read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from beitctl import registry
from beitctl.api import Tools
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.attention import Layout
from beitctl.model.multiway import Multiway, Packed, unpadded
from beitctl.model.plan import plan_of

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1


@dataclass(frozen=True)
class Stored:
    """A model file that was read."""

    folder: Path
    model: ModelConfig
    tensors: dict[str, Tensor]
    """``model.*`` and ``heads.*``, fp32."""
    task: dict[str, Any] | None = None
    """Table of the task whose heads the file holds."""
    labels: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def open_task(self) -> Any:
        """The task plugin, or None."""
        if self.task is None:
            return None
        table = dict(self.task)
        return registry.get("beitctl.tasks", table.pop("kind")).model_validate(table)

    def text_tokenizer(self) -> Any:
        """The text tokenizer beside the weights, or None."""
        folder = self.folder / "tokenizer"
        return load_tokenizer(folder) if folder.is_dir() else None


def save_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    *,
    task: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
) -> None:
    """Write a model with its configuration, so that the folder needs nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    save_file(whole, folder / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.tmp").replace(folder / WEIGHTS)
    note = {
        "format": FORMAT,
        "library": "beitctl",
        "model": asdict(model),
        "task": dict(task) if task else None,
        "labels": list(labels),
    }
    (folder / CONFIG).write_text(json.dumps(note, indent=1))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


def find_model(path: Path) -> Path:
    """The folder with ``model.safetensors`` that a path means: itself, its ``weights``, or that file.

    Raises:
        DataError: there is none.
    """
    for folder in (path.parent if path.name == WEIGHTS else path, path / "weights"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    raise DataError(f"{path}: no model here; expected {WEIGHTS} and {CONFIG} in it or in its folder weights/")


def read_model(path: Path | str) -> Stored:
    """Read a model file.

    Raises:
        DataError: missing, truncated, or not a file of tensors; a later format.
    """
    folder = find_model(Path(path))
    try:
        note = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); copy or export it again") from error
    version = note.get("format") if isinstance(note, dict) else None
    if version != FORMAT:
        raise DataError(f"{folder / CONFIG}: format {version!r}, this beitctl reads {FORMAT}")
    try:
        strange = sorted(set(note["model"]) - {item.name for item in fields(ModelConfig)})
        if strange:
            raise DataError(f"{folder / CONFIG}: unknown model settings {', '.join(strange)}; update beitctl")
        return Stored(folder, ModelConfig(**note["model"]), tensors, note["task"], tuple(note["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG}: damaged ({error}); copy or export it again") from error


def fit(tensors: Mapping[str, Tensor], module: nn.Module, prefix: str, origin: Path) -> None:
    """Load the tensors whose names begin with ``prefix`` into a module, all of them and no more.

    Raises:
        DataError: names or shapes differ; lists them.
    """
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = module.state_dict()
    problems = [f"missing {name}" for name in sorted(set(own) - set(mine))]
    problems += [f"left over {name}" for name in sorted(set(mine) - set(own))]
    problems += [
        f"{name} is {tuple(mine[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(mine))
        if mine[name].shape != own[name].shape
    ]
    if problems:
        raise DataError(f"{origin}: does not fit the model: {'; '.join(problems[:12])}")
    module.load_state_dict(mine)


class TaskModel(nn.Module):
    """A Multiway Transformer with the head of one task; ``forward`` gives the task's output."""

    def __init__(self, model: Multiway, heads: nn.ModuleDict, task: Any) -> None:
        super().__init__()
        self.model, self.heads, self.task = model, heads, task

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        text_pad: Tensor | None = None,
    ) -> Any:
        """The task's output for pictures (B, 3, H, W) and texts (B, S); arguments of ``Multiway.forward``."""
        config, device = self.model.config, self.model.vision_embed.position.device
        if image is None or (self.task.layout == "dual" and text is None):
            wanted = "image and text" if self.task.layout == "dual" else "image"
            raise ValueError(f"this task needs {wanted}")
        _, ids, lengths = unpadded(text, text_pad)
        dual = self.task.layout == "dual"
        plan = plan_of(
            config.patches + 1,
            len(image) if dual or text is None else 0,
            [] if dual else lengths,
            lengths if dual else [],
        )
        rows = self.model.encode(Packed(Layout.of(plan, device), image, image_mask, ids))
        group: Any = SimpleNamespace(
            picture_rows=torch.from_numpy(plan.image_rows(0, len(image))).to(device),
            text_first=torch.from_numpy(plan.text_starts.copy()).to(device),
        )
        return self.task.output(rows, group, self.heads)


def load_model(path: str | Path, **settings: Any) -> nn.Module:
    """Load a model in eval mode: a ``Multiway``, or with the head of a task a module that gives its output.

    Args:
        path: a run folder, its ``weights`` folder, or a ``.safetensors`` file with ``config.json`` beside it.
        **settings: overrides of ``ModelConfig`` fields.

    Raises:
        DataError: the file cannot be read or does not fit.
        UserError: a setting that does not exist.
    """
    stored = read_model(path)
    unknown = sorted(set(settings) - {item.name for item in fields(ModelConfig)})
    if unknown:
        raise UserError(f"load_model: unknown settings {', '.join(unknown)}")
    config = ModelConfig(**(asdict(stored.model) | settings))
    model = Multiway(config)
    fit(stored.tensors, model, "model.", stored.folder)
    task = stored.open_task()
    if task is None:
        return model.eval()
    heads = nn.ModuleDict(task.heads(Tools(config, labels=stored.labels)))
    fit(stored.tensors, heads, "heads.", stored.folder)
    return TaskModel(model, heads, task).eval()


def load_tokenizer(path: str | Path) -> Any:
    """Load a text or image tokenizer from its folder, a run folder, or a bare SentencePiece file.

    Raises:
        DataError: there is no tokenizer, or it cannot be read.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".spm", ".model"):
        return registry.get("beitctl.tokenizers", "sentencepiece").load(path)
    for folder in (path, path / "tokenizer", path / "weights" / "tokenizer"):
        note = folder / "tokenizer.json"
        if note.is_file():
            try:
                kind = json.loads(note.read_text())["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{note}: not the note of a tokenizer ({error})") from error
            return registry.get("beitctl.tokenizers", kind).load(folder)
    raise DataError(f"{path}: no tokenizer here; expected tokenizer.json in it or in its folder tokenizer/")
