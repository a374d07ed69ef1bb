"""``beitctl.load_model``: any file of the family to a module, whatever library wrote it."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from beitctl.api import Tools
from beitctl.checkpoints import files, mapping, native
from beitctl.checkpoints.adapt import adapted
from beitctl.checkpoints.formats import FORMATS
from beitctl.checkpoints.models import model_with
from beitctl.checkpoints.native import Stored, fit
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Encoded, Multiway


def read_model(path: Path | str, settings: Mapping[str, Any] | None = None) -> Stored:
    """Read a model file of beitctl or of another library; its format is recognised from the names in it.

    Args:
        path: a run folder, its ``weights``, or a file: ``.safetensors``, ``.pth``, ``.bin`` ...
        settings: what the file does not say, such as ``heads``.

    Raises:
        DataError: it cannot be read, its format is unknown, or tensors are missing, left over or of other
        shapes. UserError: a setting is needed that the file does not say.
    """
    path = Path(path).expanduser()
    if native.is_native(path) or (path.is_dir() and not any((path / name).exists() for name in files.FOLDER)):
        return native.read_model(path)
    state = files.read_tensors(path)
    found = [form for form in FORMATS if form.matches(state)]
    if not found:
        shown = ", ".join(sorted(state)[:6])
        raise DataError(
            f"{path}: not a model of this family that beitctl knows ({len(state)} tensors: {shown} ...); "
            f"it reads beitctl's own folders and {', '.join(form.name for form in FORMATS)}"
        )
    form = found[0]
    try:
        config = form.config(state, _note(path), settings or {})
        table = form.table(config, {name: value.shape for name, value in state.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: looks like {form.name}, but {error}") from error
    problems = mapping.problems(table, state)
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{path}: looks like {form.name}, but {'; '.join(problems[:20])}{more}")
    tensors, unread = mapping.read(table, state)
    return Stored(path, config, tensors, unread=unread)


def _note(path: Path) -> dict[str, Any]:
    """The ``config.json`` beside a file, as transformers and timm write it; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        note = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError):
        note = {}
    return note if isinstance(note, dict) else {}


def state_in(stored: Stored, name: str) -> dict[str, Tensor]:
    """A model's tensors as another library stores them: the way back of ``read_model``, bit for bit.

    Raises:
        UserError: there is no such format, or it has no place for parts of this model; lists them.
    """
    named = {form.name: form for form in FORMATS}
    if name not in named:
        raise UserError(f"no format '{name}'; there are {', '.join(named)}")
    try:
        table = named[name].table(stored.model, {key: value.shape for key, value in stored.tensors.items()})
    except ValueError as error:
        raise UserError(f"{stored.folder}: cannot be written as {name}: {error}") from error
    untold = mapping.untold(table, stored.tensors)
    if untold:
        raise UserError(
            f"{stored.folder}: {name} has no place for {len(untold)} tensors: {', '.join(untold[:8])}"
            f"{' ...' if len(untold) > 8 else ''}"
        )
    found = mapping.write(table, stored.tensors, stored.unread)
    lacking = [text for text in mapping.problems(table, found) if text.startswith("missing ")]
    if lacking:
        raise UserError(f"{stored.folder}: cannot be written as {name}: {'; '.join(lacking[:8])}")
    return found


class TaskModel(nn.Module):
    """A Multiway Transformer with the head of a plugin's task; ``forward`` gives the task's output."""

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
        dual = self.task.layout == "dual"
        if image is None or (dual and text is None):
            raise ValueError(f"this task needs {'image and text' if dual else 'image'}")
        packed, _ = self.model.pack(image, text, image_mask, text_pad, dual=dual)
        plan, device = packed.layout.plan, self.model.device
        encoded: Encoded = self.model.encoded(packed)
        group: Any = SimpleNamespace(
            picture_rows=torch.from_numpy(plan.image_rows(0, len(image))).to(device),
            text_first=torch.from_numpy(plan.text_starts.copy()).to(device),
        )
        return self.task.output(encoded, group, self.heads)


def load_model(path: str | Path, **settings: Any) -> nn.Module:
    """Load a model in eval mode: a ``Multiway``, or with heads a module that gives their output.

    Args:
        path: a run folder, its ``weights``, or a model file of beitctl, unilm (BEiT, BEiT v2, BEiT-3, VLMo),
        timm
            or transformers.
        **settings: fields of ``ModelConfig``: what the file does not say (``heads=12``), and what is to be
        changed
            (``image_px=384``: positions are resampled).

    Raises:
        DataError: the file cannot be read or does not fit; lists what is missing or left over.
        UserError: a setting that does not exist, is needed, or cannot be changed.
    """
    unknown = sorted(set(settings) - {item.name for item in fields(ModelConfig)})
    if unknown:
        raise UserError(f"load_model: unknown settings {', '.join(unknown)}")
    stored = read_model(path, settings)
    try:
        config = replace(stored.model, **settings)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = adapted(stored.tensors, stored.model, config)
    shapes = {k.removeprefix("heads."): v.shape for k, v in tensors.items() if k.startswith("heads.")}
    model: nn.Module | None = model_with(config, shapes) if shapes else Multiway(config)
    if model is not None:
        fit(tensors, model, "" if shapes else "model.", stored.folder)
        return model.eval()
    task = stored.open_task()
    if task is None:
        raise DataError(f"{stored.folder}: holds heads that no model has: {', '.join(sorted(shapes)[:8])}")
    heads = nn.ModuleDict(task.heads(Tools(config, labels=stored.labels)))
    body = Multiway(config)
    fit(tensors, body, "model.", stored.folder)
    fit(tensors, heads, "heads.", stored.folder)
    return TaskModel(body, heads, task).eval()
