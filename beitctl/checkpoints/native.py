"""beitctl's own model files: ``model.safetensors`` with ``config.json``, and the text tokenizer beside them.

Only tensors and JSON are ever read. ``beitctl.checkpoints.loading`` reads other libraries' files as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from beitctl import registry
from beitctl.checkpoints.files import read_tensors
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
TOKENIZER_FILES = {"encode_task_layer.0.weight": "vqkd", "blocks.input.w": "dalle"}
"""A tensor of the files of other libraries' image tokenizers, and the plugin that reads them."""
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
    unread: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with its configuration, so that the folder needs nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    whole |= {UNREAD + name: value.cpu().contiguous() for name, value in (unread or {}).items()}
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


def is_native(path: Path) -> bool:
    """Whether a path is one of beitctl's own models, or a folder that should hold one and does not."""
    for folder in (path.parent if path.name == WEIGHTS else path, path / "weights"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return '"library": "beitctl"' in (folder / CONFIG).read_text(errors="replace")
    return False


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
        unread = {
            name.removeprefix(UNREAD): tensors.pop(name) for name in list(tensors) if name.startswith(UNREAD)
        }
        strange = sorted(set(note["model"]) - {item.name for item in fields(ModelConfig)})
        if strange:
            raise DataError(f"{folder / CONFIG}: unknown model settings {', '.join(strange)}; update beitctl")
        return Stored(
            folder, ModelConfig(**note["model"]), tensors, note["task"], tuple(note["labels"]), unread
        )
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


def load_tokenizer(path: str | Path, *, heads: int | None = None) -> Any:
    """Load a text or image tokenizer from its folder, a run folder, or the file of another library.

    Args:
        path: a folder; a SentencePiece model ``.spm`` or ``.model``; a file of BEiT v2's VQ-KD or of OpenAI's
            DALL-E encoder, told apart by the names in it.
        heads: attention heads of a VQ-KD file, which does not say them; by default 64 channels each.

    Raises:
        DataError: there is no tokenizer, or it cannot be read.
        UserError: ``heads`` does not fit, or is given for another tokenizer.
    """
    path = Path(path)
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
        return _kind_of_file(path), path
    for folder in (path, path / "tokenizer", path / "weights" / "tokenizer"):
        note = folder / "tokenizer.json"
        if note.is_file():
            try:
                return json.loads(note.read_text())["kind"], folder
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{note}: not the note of a tokenizer ({error})") from error
    raise DataError(f"{path}: no tokenizer here; expected tokenizer.json in it or in its folder tokenizer/")


def _kind_of_file(path: Path) -> str:
    if path.suffix in (".spm", ".model"):
        return "sentencepiece"
    state = read_tensors(path)
    for name, kind in TOKENIZER_FILES.items():
        if name in state:
            return kind
    shown = ", ".join(sorted(state)[:4])
    raise DataError(
        f"{path}: not the file of a tokenizer that beitctl knows ({len(state)} tensors: {shown} ...); it "
        "reads SentencePiece (.spm, .model), VQ-KD and DALL-E's encoder, its own tokenizers by their folder"
    )
