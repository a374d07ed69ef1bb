"""Tensors out of anybody's weight files: safetensors, files of ``torch.save``, transformers' folders.

Only tensors and JSON are ever read; nothing that a file names is run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from beitctl.checkpoints.pickled import ZIP, Entry, Module, Odd, Other, opened
from beitctl.errors import DataError

FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Files that a folder's weights are looked for in, first one first."""
WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training code keeps the state dict; the first that holds tensors is it."""
AROUND = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
LFS = b"version https://git-lfs"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
         torch.int8, torch.int16, torch.int32, torch.int64)  # fmt: skip
SHOWN = 10
"""Names that a message lists before it says how many more there are."""
KINDS = {Entry: "tensor", Odd: "tensor", Module: "module", Other: "object"}
"""What messages call the stand-ins."""
LONGEST = 200
"""Characters of a path that the system refuses which a message shows."""
DEPTH = 8
"""Deepest nesting of wrappers or modules that is followed; a damaged file may hold itself."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file or folder by their names, on the CPU; floating ones as fp32.

    Wrappers (``model``, ``module``, ``state_dict``) are opened, and what DistributedDataParallel and
    torch.compile put before every name is taken off. A file of ``torch.save`` may also be OpenAI's
    ``encoder.pkl``, which is a whole module.

    Args:
        path: safetensors or a file of ``torch.save``, told apart by how they begin; an index of shards
            ``.index.json``; a folder with one of ``FOLDER``.

    Raises:
        DataError: there is no such file; it is empty, cut short, a Git LFS pointer or of another kind; it
            names code; it holds no tensors, or something else among them.
    """
    if path.is_dir():
        path = _in_folder(path)
    found = _shards(path) if path.name.endswith(".index.json") else _one(path)
    while prefix := next((p for p in AROUND if found and all(name.startswith(p) for name in found)), ""):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def located(path: Path | str) -> Path:
    """A path with ``~`` replaced.

    Raises:
        DataError: it names a user that does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no such user; give the whole path") from error


@contextmanager
def looked_at(path: Path) -> Iterator[None]:
    """Turn what the system says against a path into a DataError."""
    try:
        yield
    except OSError as error:
        name = str(path) if len(str(path)) <= LONGEST else f"{str(path)[:LONGEST]} ..."
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def safetensors_in(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file as they are stored.

    Not ``safe_open``: it maps the file, so that a copy written over it ends the program with SIGBUS, and it
    opens no names that are not UTF-8.
    """
    return load(path.read_bytes())


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Watch a file while it is read.

    Raises:
        DataError: it was written to.
    """
    before = path.stat()
    yield
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (
        after.st_ino,
        after.st_size,
        after.st_mtime_ns,
    ):
        raise DataError(f"{path}: changed while it was read; wait until it is written, then try again")


def _in_folder(folder: Path) -> Path:
    for name in FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder}: no weights in this folder; expected one of {', '.join(FOLDER)}, or name a file"
    )


def _shards(index: Path) -> dict[str, Tensor]:
    """Tensors of several files, as their index lists them."""
    check_file(index)
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
    start = check_file(path)
    told = start[8:9] == b"{" and not start.startswith(ZIP)  # the length of a header, then the header
    named = path.suffix == ".safetensors" and not start.startswith(ZIP)
    with unchanged(path):
        return _safetensors(path) if told or named else _pickled(path)


def check_file(path: Path) -> bytes:
    """The first bytes of a file with content.

    Raises:
        DataError: there is no such file; it is empty, a Git LFS pointer, or no file but a pipe or a device.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: a pipe or a device; name a file")
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
    return start


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found = safetensors_in(path)
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
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
            f"{_shown(name)} ({_kind(value)})"
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
        keys = (
            f" with the keys {_some([_shown(key) for key in tree])}"
            if tree and isinstance(tree, dict)
            else ""
        )
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


def _shown(name: Any) -> str:
    """A name that may be no text: that of a tensor in a damaged or foreign file."""
    return f"{name!s:.80}" if isinstance(name, str | int) else "a name that is no text"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
