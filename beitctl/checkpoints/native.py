"""beitctl's own model files: ``model.safetensors`` with ``config.json``, and the text tokenizer beside them.

Only tensors and JSON are ever read. ``beitctl.checkpoints.loading`` reads other libraries' files as well.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from beitctl import registry
from beitctl.checkpoints.files import (
    FLOATS,
    check_file,
    located,
    looked_at,
    read_tensors,
    safetensors_in,
    unchanged,
)
from beitctl.checkpoints.settings import mistyped, unknown
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
TOKENIZER_FILES = {"encode_task_layer.0.weight": "vqkd", "blocks.input.w": "dalle"}
"""A tensor of the files of other libraries' image tokenizers, and the plugin that reads them."""
SENTENCEPIECE = (".spm", ".model")
"""Ends of the names of SentencePiece models."""
NOTE = "tokenizer.json"
"""What beitctl's tokenizers say about themselves; transformers' whole tokenizers have the same name."""
UNREAD = "unread."
"""Begins the names of tensors that are kept and not read."""


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
    unread: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file of another library that no model reads, kept for the way back."""

    def open_task(self) -> Any:
        """The task plugin, or None."""
        if self.task is None:
            return None
        table = dict(self.task)
        task = registry.get("beitctl.tasks", table.pop("kind"))
        try:
            return task.model_validate(table)
        except ValidationError as error:
            listed = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise DataError(
                f"{self.folder / CONFIG}: not a task that this beitctl knows ({listed}); update beitctl"
            ) from error

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
    unread: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with its configuration, so that the folder needs nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: _plain(value.detach()).cpu().contiguous() for name, value in tensors.items()}
    whole |= {UNREAD + name: value.cpu().contiguous() for name, value in (unread or {}).items()}
    save_file(_apart(whole), folder / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them: a file may tie one to another."""
    seen: set[int] = set()
    found = {}
    for name, value in tensors.items():
        found[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return found


def is_native(path: Path) -> bool:
    """Whether a path is one of beitctl's own models, or a folder that should hold one and does not."""
    for folder in _places(path):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return '"library":"beitctl"' in re.sub(r"\s", "", (folder / CONFIG).read_text(errors="replace"))
    return False


def find_model(path: Path) -> Path:
    """The folder with ``model.safetensors`` that a path means: one of ``_places``.

    Raises:
        DataError: there is none.
    """
    for folder in _places(path):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    raise DataError(
        f"{path}: no model here; expected {WEIGHTS} and {CONFIG} in it or in its folder weights/ or export/"
    )


def _places(path: Path) -> tuple[Path, ...]:
    """Folders that a path may mean: that of a file, itself, and what training and export leave in a run."""
    return (path.parent if path.name == WEIGHTS else path, path / "weights", path / "export")


def read_model(path: Path | str) -> Stored:
    """Read a model file.

    Raises:
        DataError: missing, truncated, or not a file of tensors; a later format; tensors of the model's body
            are missing, left over or of other shapes.
    """
    folder = find_model(Path(path))
    try:
        note = json.loads((folder / CONFIG).read_text())
        with unchanged(folder / WEIGHTS):
            tensors = {name: _plain(value) for name, value in safetensors_in(folder / WEIGHTS).items()}
    except (OSError, ValueError, RecursionError, LookupError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); copy or export it again") from error
    version = note.get("format") if isinstance(note, dict) else None
    if version != FORMAT:
        raise DataError(f"{folder / CONFIG}: format {version!r}, this beitctl reads {FORMAT}")
    try:
        unread = {
            name.removeprefix(UNREAD): tensors.pop(name) for name in list(tensors) if name.startswith(UNREAD)
        }
        if strange := unknown(note["model"]):
            raise DataError(f"{folder / CONFIG}: unknown model settings {', '.join(strange)}; update beitctl")
        if wrong := [*mistyped(note["model"]), *_mistyped(note)]:
            raise ValueError("; ".join(wrong))
        found = Stored(
            folder, ModelConfig(**note["model"]), tensors, note["task"], tuple(note["labels"]), unread
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG}: damaged ({error}); copy or export it again") from error
    with torch.device("meta"):
        body = nn.ModuleDict({"model": Multiway(found.model)})
    _check_fit({k: v for k, v in tensors.items() if not k.startswith("heads.")}, body, folder)
    return found


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in FLOATS else tensor


def _mistyped(note: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the types of the other keys of a configuration."""
    task, labels = note["task"], note["labels"]
    if task is not None and not (isinstance(task, dict) and isinstance(task.get("kind"), str)):
        yield "task must be a table with kind, or null"
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        yield "labels must be a list of texts"


def fit(tensors: Mapping[str, Tensor], module: nn.Module, prefix: str, origin: Path) -> None:
    """Load the tensors whose names begin with ``prefix`` into a module, all of them and no more.

    Raises:
        DataError: names or shapes differ, or values are no numbers; lists them.
    """
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _check_fit(mine, module, origin)
    check_finite(mine, origin)
    module.load_state_dict(mine)


def check_finite(tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Refuse weights that no model can be run with.

    Raises:
        DataError: values are not finite; lists the tensors.
    """
    sums = {name: value.sum() for name, value in tensors.items() if value.is_floating_point()}
    bad = [name for name, value in sums.items() if not isfinite(float(value))]
    if bad:
        raise DataError(
            f"{origin}: {len(bad)} tensors hold values that are not finite numbers: {', '.join(bad[:8])}"
            f"{' ...' if len(bad) > 8 else ''}. The training diverged or the file is damaged: take an "
            "earlier checkpoint, or download it again"
        )


def _check_fit(mine: Mapping[str, Tensor], module: nn.Module, origin: Path) -> None:
    own = module.state_dict()
    problems = [f"missing {name}" for name in sorted(set(own) - set(mine))]
    problems += [f"left over {name}" for name in sorted(set(mine) - set(own))]
    problems += [
        f"{name} is {tuple(mine[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(mine))
        if mine[name].shape != own[name].shape
    ]
    problems += [
        f"{name} is {mine[name].dtype}, expected {own[name].dtype}"
        for name in sorted(set(own) & set(mine))
        if mine[name].is_floating_point() != own[name].is_floating_point()
    ]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise DataError(f"{origin}: does not fit the model: {'; '.join(problems[:12])}{more}")


def load_tokenizer(path: str | Path, *, heads: int | None = None) -> Any:
    """Load a text or image tokenizer from its folder, a run folder, or the file of another library.

    Args:
        path: a folder; a SentencePiece model ``.spm`` or ``.model``; the ``vocab.txt`` or
            ``tokenizer.json`` of a WordPiece, or the folder of both; a file of BEiT v2's VQ-KD or of OpenAI's
            DALL-E encoder, told apart by the names in it.
        heads: attention heads of a VQ-KD file, which does not say them; by default 64 channels each.

    Raises:
        DataError: there is no tokenizer, or it cannot be read.
        UserError: ``heads`` does not fit, or is given for another tokenizer.
    """
    path = located(path)
    if heads is not None and (wrong := mistyped({"heads": heads})):
        raise UserError(f"load_tokenizer: {wrong[0]}")
    with looked_at(path):
        kind, place = _tokenizer_at(path)
        load = registry.get("beitctl.tokenizers", kind).load
        if heads is None:
            return load(place)
        if kind != "vqkd":
            raise UserError(f"{path}: heads={heads} is a setting of VQ-KD files alone, this is '{kind}'")
        return load(place, heads)


def _tokenizer_at(path: Path) -> tuple[str, Path]:
    """Kind of the tokenizer that a path means, and the file or folder to load."""
    if path.is_file():
        return _kind_of_file(path), path.parent if path.name == NOTE else path
    for folder in (path, *(place / "tokenizer" for place in _places(path))):
        if (folder / NOTE).is_file():
            return _kind_of_note(folder / NOTE), folder
    if not path.is_dir():
        check_file(path)
    if (path / "vocab.txt").is_file():
        return _kind_of_file(path / "vocab.txt"), path
    if len(found := sorted(file for file in path.iterdir() if file.suffix in SENTENCEPIECE)) == 1:
        return _kind_of_file(found[0]), found[0]
    raise DataError(f"{path}: no tokenizer here; expected tokenizer.json in it or in its folder tokenizer/")


def _kind_of_note(note: Path) -> str:
    """Kind of the tokenizer that a ``tokenizer.json`` belongs to; one of transformers says none."""
    try:
        found = json.loads(note.read_text())
        kind = "wordpiece" if "kind" not in found and isinstance(found["model"], dict) else found["kind"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{note}: not the note of a tokenizer ({error})") from error
    if not isinstance(kind, str):
        raise DataError(f"{note}: not the note of a tokenizer (kind is {kind!r:.80}, not a text)")
    return kind


def _kind_of_file(path: Path) -> str:
    if path.suffix in SENTENCEPIECE:
        check_file(path)
        return "sentencepiece"
    if path.suffix == ".txt":
        check_file(path)
        return "wordpiece"
    if path.suffix == ".json":
        return _kind_of_note(path)
    state = read_tensors(path)
    for name, kind in TOKENIZER_FILES.items():
        if name in state:
            return kind
    shown = ", ".join(sorted(state)[:4])
    raise DataError(
        f"{path}: not the file of a tokenizer that beitctl knows ({len(state)} tensors: {shown} ...); it "
        "reads SentencePiece (.spm, .model), WordPiece (vocab.txt, tokenizer.json), VQ-KD and DALL-E's "
        "encoder, its own tokenizers by their folder"
    )
