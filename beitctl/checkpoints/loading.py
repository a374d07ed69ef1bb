"""``beitctl.load_model``: any file of the family to a module, whatever library wrote it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from beitctl.api import Tools
from beitctl.checkpoints import files, mapping, native
from beitctl.checkpoints.adapt import adapted
from beitctl.checkpoints.formats import FORMATS
from beitctl.checkpoints.models import SegmentationModel, model_with
from beitctl.checkpoints.native import Stored, check_finite, fit
from beitctl.checkpoints.settings import HINTS, mistyped, unknown
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Encoded, Multiway
from beitctl.problems import suggest

UNSAID = ("drop_path", "init", "pixels", "text_first")
"""Settings that change no tensor, so that no file need say them."""


def read_model(path: Path | str, settings: Mapping[str, Any] | None = None) -> Stored:
    """Read a model file of beitctl or of another library; its format is recognised from the names in it.

    Args:
        path: a run folder, its ``weights``, or a file: ``.safetensors``, ``.pth``, ``.bin`` ...
        settings: what the file does not say, such as ``heads``.

    Raises:
        DataError: it cannot be read, its format is unknown, tensors are missing, left over or of other
            shapes, or values are not finite.
        UserError: a setting is needed that the file does not say, does not exist, or is not what it says.
    """
    path, settings = files.located(path), _typed(settings or {}, str(path))
    stored = _read(path, settings)
    config = _changed(stored, settings)
    before, after = (asdict(model) | {"image_px": model.size} for model in (stored.model, config))
    against = [name for name in settings if name not in UNSAID and before[name] != after[name]]
    if against:
        listed = "; ".join(f"{name} is {before[name]!r}, not {after[name]!r}" for name in against)
        raise UserError(
            f"{path}: says otherwise than the settings given with it ({listed}); leave them out: they are "
            f"for what a file does not say{_beside(path)}"
        )
    return replace(stored, model=config)


def _typed(settings: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The settings, if they exist and have the types that they must have.

    Raises:
        UserError: they do not; lists them.
    """
    if strange := unknown(settings):
        raise UserError(f"{where}: unknown settings {', '.join(strange)}{suggest(strange[0], HINTS)}")
    if wrong := mistyped(settings):
        raise UserError(f"{where}: {'; '.join(wrong)}")
    return settings


def _changed(stored: Stored, settings: Mapping[str, Any]) -> ModelConfig:
    try:
        return replace(stored.model, **settings)
    except ValueError as error:
        raise UserError(f"{stored.folder}: {error}") from error


def _read(path: Path, settings: Mapping[str, Any]) -> Stored:
    """A model file as it is; settings are read where it says nothing."""
    with files.looked_at(path):
        if native.is_native(path) or (path.is_dir() and not any((path / n).exists() for n in files.FOLDER)):
            stored = native.read_model(path)
        else:
            stored = _translated(path, files.read_tensors(path), settings)
    check_finite(stored.tensors, path)
    return stored


def _translated(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Stored:
    """The model that the tensors of another library are."""
    found = [form for form in FORMATS if form.matches(state)]
    if not found:
        shown = ", ".join(sorted(state)[:6])
        own = "model.vision_embed.cls_token" in state
        raise DataError(
            f"{path}: not a model of this family that beitctl knows ({len(state)} tensors: {shown} ...); "
            f"it reads beitctl's own folders and {', '.join(form.name for form in FORMATS)}"
            + (f". These tensors are beitctl's, which needs the {native.CONFIG} beside them" if own else "")
        )
    form = found[0]
    try:
        config = form.config(state, _note(path), settings)
        table = form.table(config, {name: value.shape for name, value in state.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ArithmeticError) as error:  # the settings have their types, the note may have any
        raise DataError(
            f"{path}: looks like {form.name}, but the {native.CONFIG} beside it is not that of such a model "
            f"({error}); put the right one there, or none"
        ) from error
    except ValueError as error:
        if any(re.search(rf"\b{name} \(", str(error)) for name in settings):
            raise UserError(f"{path}: {error}") from error
        beside = "" if native.CONFIG in str(error) else _beside(path)
        raise DataError(f"{path}: looks like {form.name}, but {error}{beside}") from error
    if wrong := mistyped(asdict(config)):
        raise DataError(f"{path}: looks like {form.name}, but {'; '.join(wrong)}{_beside(path)}")
    problems = mapping.problems(table, state)
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{path}: looks like {form.name}, but {'; '.join(problems[:20])}{more}")
    tensors, unread = mapping.read(table, state)
    return Stored(path, config, tensors, unread=unread)


def _note(path: Path) -> dict[str, Any]:
    """The ``config.json`` beside a file, as transformers and timm write it; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / native.CONFIG
    try:
        note = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        note = {}
    return note if isinstance(note, dict) else {}


def _beside(path: Path) -> str:
    """What a message adds where another file may be the cause."""
    note = _note(path)
    if not note or note.get("library") == "beitctl":
        return ""
    return f"; a {native.CONFIG} is beside it: is that of another model?"


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
        depths = getattr(self.task, "depths", None)
        encoded: Encoded = self.model.encoded(packed, depths(self.model.config) if callable(depths) else ())
        group: Any = SimpleNamespace(
            picture_rows=torch.from_numpy(plan.image_rows(0, len(image))).to(device),
            text_first=torch.from_numpy(plan.text_starts.copy()).to(device),
        )
        return self.task.output(encoded, group, self.heads)


def changed(stored: Stored, config: ModelConfig, *, grown: bool = False) -> dict[str, Tensor]:
    """Tensors of a model file for other settings: ``beitctl.checkpoints.adapt``, with the file in errors.

    Raises:
        UserError: settings differ that cannot be changed; lists them.
        DataError: tensors are not what the settings beside them say.
    """
    try:
        return adapted(stored.tensors, stored.model, config, grown=grown)
    except (UserError, DataError) as error:
        raise type(error)(f"{stored.folder}: {error}{_beside(stored.folder)}") from error


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
    stored = _read(files.located(path), _typed(settings, "load_model"))
    config = _changed(stored, settings)
    tensors = changed(stored, config)
    shapes = {k.removeprefix("heads."): v.shape for k, v in tensors.items() if k.startswith("heads.")}
    try:
        model: nn.Module | None = model_with(config, shapes) if shapes else Multiway(config)
    except LookupError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
        raise DataError(f"{stored.folder}: its heads are damaged: {listed}") from error
    if model is not None:
        fit(tensors, model, "" if shapes else "model.", stored.folder)
        if isinstance(model, SegmentationModel) and stored.task:
            model.taps = tuple(stored.task.get("taps") or model.taps)
        return model.eval()
    task = stored.open_task()
    if task is None:
        raise DataError(
            f"{stored.folder}: holds heads that no model has: {', '.join(sorted(shapes)[:8])}; remove the "
            "tensors of all heads but one from the file"
        )
    heads = nn.ModuleDict(task.heads(Tools(config, labels=stored.labels)))
    body = Multiway(config)
    fit(tensors, body, "model.", stored.folder)
    fit(tensors, heads, "heads.", stored.folder)
    return TaskModel(body, heads, task).eval()
