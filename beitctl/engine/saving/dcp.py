"""torch's distributed checkpoint (DCP), without code in its files and with errors that say what happened."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from beitctl.engine.saving.pieces import Piece
from beitctl.errors import DataError, UserError

INDEX = ".metadata"
"""The file in which DCP says where each tensor lies; a pickle."""
PICKLED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}  # fmt: skip
"""All that the index may name, besides dtypes: containers of numbers and names."""
SHOWN = 10
"""Names that a message lists before it says how many more there are."""


def write(folder: Path, pieces: Sequence[Piece], group: Any) -> None:
    """Write one shard per rank and the index; called by all ranks, and fails on all or on none.

    Args:
        folder: where to.
        pieces: what this rank holds; of parts that several ranks hold, one rank writes each.
        group: process group of all ranks.

    Raises:
        OSError: the first that any rank met.
    """
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    on_host = all(piece.local.device.type == "cpu" for piece in pieces)
    # DCP's loader for GPU tensors would make a thread that has none wait for the GPU
    writer = _Writer(folder, per_thread_copy_ahead=0) if on_host else _Writer(folder)
    try:
        save(
            {piece.name: piece for piece in pieces},
            storage_writer=writer,
            planner=planner,
            process_group=group,
        )
    except CheckpointException as error:
        raise _cause(error) from error


def read(folder: Path, index: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place; called by all ranks, and fails on all or on none.

    Raises:
        DataError: the files are not what the index says.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(dict(tensors), storage_reader=_Reader(folder, index), planner=planner)
    except CheckpointException as error:
        raise DataError(
            f"{folder} changed while it was read ({_cause(error)}); run the command again"
        ) from error


def index_of(folder: Path, tensors: Mapping[str, Tensor]) -> Metadata:
    """The index of a checkpoint that holds exactly these tensors. Nothing in it is run.

    Raises:
        UserError: names, shapes or dtypes differ.
        DataError: it cannot be read, or names what tensors do not need.
    """
    index = _unpickled(folder)
    stored = {
        name: f"{tuple(entry.size)} {entry.properties.dtype}"
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    strange = sorted(index.state_dict_metadata.keys() - stored.keys())
    paths = {entry.relative_path for entry in index.storage_data.values()}
    strange += sorted(path for path in paths if path != Path(path).name)
    if strange:
        raise DataError(
            f"{folder}: {INDEX} holds {some(strange)}, which are no tensors of this folder; "
            "such checkpoints are refused. Use one that beitctl wrote"
        )
    wanted = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} is not part of this run" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name} is {stored[name]} instead of {wanted[name]}"
        for name in wanted.keys() & stored.keys()
        if wanted[name] != stored[name]
    ]
    if problems:
        raise UserError(
            f"{folder} is a checkpoint from another recipe: {some(sorted(problems))}; "
            "use another --out, or the recipe it came from"
        )
    return index


def some(names: list[str]) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class _Planner(DefaultSavePlanner):
    """DCP's planner, for pieces."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        piece: Piece = self.state_dict[index.fqn]
        return piece.local


class _Writer(FileSystemWriter):
    """DCP's writer, with write failures as OSError and without the folder's path in the index."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save hides the OSError, and DCP drops what led to an error
            raise next((e for e in _chain(error) if isinstance(e, OSError)), error) from error

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(FileSystemReader):
    """DCP's reader, with an index that was read and checked before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], folder: Path) -> None:
        super().__init__(stream)
        self.folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PICKLED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise DataError(
            f"{self.folder}: {INDEX} names {module}.{name}, which tensors do not need; "
            "checkpoints with code are refused. Use one that beitctl wrote"
        )


def _unpickled(folder: Path) -> Metadata:
    with (folder / INDEX).open("rb") as stream:
        try:
            index = _Unpickler(stream, folder).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
        ) as error:
            raise DataError(
                f"{folder}: {INDEX} cannot be read by torch {torch.__version__} ({error!r}); "
                "use the torch that manifest.json names, or a newer one"
            ) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise DataError(f"{folder}: {INDEX} describes no checkpoint; use one that beitctl wrote")
    return index


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: CheckpointException) -> BaseException:
    """What the first failing rank met."""
    cause: BaseException = error.failures[min(error.failures)][0]
    return cause
