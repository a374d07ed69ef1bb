"""Tensors out of anybody's weight files: safetensors, files of ``torch.save``, transformers' folders.

Only tensors and JSON are ever read; nothing that a file names is run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from beitctl.checkpoints.pickled import Entry, Module, Odd, Other, opened
from beitctl.errors import DataError

FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Files that a folder's weights are looked for in, first one first."""
WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training code keeps the state dict; the first that holds tensors is it."""
PARALLEL = "module."
"""What DistributedDataParallel puts before every name."""
LFS = b"version https://git-lfs"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
         torch.int8, torch.int16, torch.int32, torch.int64)  # fmt: skip
SHOWN = 10
"""Names that a message lists before it says how many more there are."""
KINDS = {Entry: "tensor", Odd: "tensor", Module: "module", Other: "object"}
"""What messages call the stand-ins."""
DEPTH = 8
"""Deepest nesting of wrappers or modules that is followed; a damaged file may hold itself."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file or folder by their names, on the CPU; floating ones as fp32.

    Wrappers (``model``, ``module``, ``state_dict``) are opened, and DistributedDataParallel's ``module.`` is
    taken off. A file of ``torch.save`` may also be OpenAI's ``encoder.pkl``, which is a whole module.

    Args:
        path: ``.safetensors``, an index of shards ``.index.json``, a file of ``torch.save`` under any other
            name, or a folder with one of ``FOLDER``.

    Raises:
        DataError: there is no such file; it is empty, cut short, a Git LFS pointer or of another kind; it
            names code; it holds no tensors, or something else among them.
    """
    if path.is_dir():
        path = _in_folder(path)
    found = _shards(path) if path.name.endswith(".index.json") else _one(path)
    if found and all(name.startswith(PARALLEL) for name in found):
        return {name.removeprefix(PARALLEL): tensor for name, tensor in found.items()}
    return found


def _in_folder(folder: Path) -> Path:
    for name in FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder}: no weights in this folder; expected one of {', '.join(FOLDER)}, or name a file"
    )


def _shards(index: Path) -> dict[str, Tensor]:
    """Tensors of several files, as their index lists them."""
    _check_file(index)
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = {str(file) for file in places.values()}
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{index}: not an index of shards ({error!r}); download or copy it again") from error
    outside = sorted(file for file in files if file != Path(file).name)
    if outside:
        raise DataError(f"{index}: names files outside of its folder: {_some(outside)}; they are not read")
    tensors: dict[str, Tensor] = {}
    for file in sorted(files):
        shard = _one(index.parent / file)
        listed = {name for name, place in places.items() if place == file}
        problems = [f"{name} is missing" for name in sorted(listed - shard.keys())]
        problems += [f"{name} is not in the index" for name in sorted(shard.keys() - listed)]
        if problems:
            raise DataError(
                f"{index.parent / file}: not what {index.name} lists: {_some(problems)}; "
                "download or copy all files again"
            )
        tensors |= shard
    return tensors


def _one(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, its wrappers opened."""
    _check_file(path)
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not start:
        raise DataError(f"{path}: the file is empty; download or copy it again")
    if start == LFS:
        raise DataError(
            f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' in its repository, "
            "or download the file"
        )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read as safetensors ({error}); "
            "it may be cut short or of another kind: download or copy it again"
        ) from error
    _check_kinds(path, found)
    return {name: _plain(tensor) for name, tensor in found.items()}


def _pickled(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        state = _state_dict(file.tree, path)
        strange = [
            f"{name!s:.80} ({_kind(value)})"
            for name, value in state.items()
            if not isinstance(name, str) or not isinstance(value, Entry | Odd)
        ]
        if strange:
            raise DataError(
                f"{path}: the state dict holds more than tensors with names: {_some(strange)}; "
                "save it again without, or name a file that holds only weights"
            )
        _check_kinds(path, state)
        return {name: _plain(file.tensor(entry, name)) for name, entry in state.items()}


def _state_dict(tree: Any, path: Path) -> dict[Any, Any]:
    found = _unwrapped(tree)
    if not found:
        keys = f" with the keys {_some([f'{key!s:.80}' for key in tree])}" if isinstance(tree, dict) else ""
        raise DataError(
            f"{path}: no tensors inside; found {_kind(tree)}{keys}. Expected a state dict, alone or under "
            f"one of {', '.join(WRAPPERS)}"
        )
    return found


def _unwrapped(value: Any, depth: int = 0) -> dict[Any, Any]:
    """The state dict in a tree of wrappers; empty where there is none."""
    if isinstance(value, Module):
        return _flat(value)
    if not isinstance(value, dict) or depth == DEPTH:
        return {}
    for key in WRAPPERS:
        if found := _unwrapped(value.get(key), depth + 1):
            return found
    return value if any(isinstance(item, Entry | Odd) for item in value.values()) else {}


def _flat(module: Module, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """The state dict of a module that was pickled as a whole."""
    found = {f"{prefix}{name}": value for name, value in module.table("_parameters").items()}
    found |= {f"{prefix}{name}": value for name, value in module.table("_buffers").items()}
    for name, child in module.table("_modules").items():
        place = f"{prefix}{name}"
        whole = isinstance(child, Module) and depth < DEPTH
        found |= _flat(child, f"{place}.", depth + 1) if whole else {place: child}
    return found


def _check_kinds(path: Path, tensors: Mapping[str, Tensor | Entry | Odd]) -> None:
    kinds = {name: item.kind if isinstance(item, Odd) else _dtype(item) for name, item in tensors.items()}
    problems = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in FLOATS + WHOLE]
    if problems:
        raise DataError(
            f"{path}: tensors of kinds that are not read: {_some(problems)}. Save them as dense fp32, fp16, "
            "bf16 or integer tensors with values (Tensor.dequantize(), Tensor.to_dense())"
        )


def _dtype(item: Tensor | Entry) -> torch.dtype:
    return item.dtype if isinstance(item, Tensor) else item.dtype or item.storage.dtype


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in FLOATS else tensor


def _kind(value: Any) -> str:
    return KINDS.get(type(value)) or type(value).__name__.strip("_").lower()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
