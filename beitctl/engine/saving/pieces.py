"""What one rank holds of the training state: the local part of every tensor, and copies in host memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from beitctl.engine.dist import Ranks
from beitctl.errors import CapacityError

BLOCK = 1 << 28
"""Bytes of host memory taken at a time: a power of two, to which pinned memory is rounded up."""
ALIGNED = 64
"""Bytes that the start of every copy is a multiple of."""


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that this rank holds. Other ranks may hold the same one."""

    name: str
    local: Tensor
    shape: torch.Size
    """Shape of the whole tensor."""
    offsets: torch.Size
    """Where ``local`` begins in it."""
    holders: tuple[int, ...]
    """All ranks that hold this part, ascending."""

    def words(self) -> np.ndarray[Any, Any]:
        """(rows, numbers per row) the bits of ``local`` as unsigned integers of its element size."""
        local = self.local.detach().cpu().contiguous()
        rows = local.shape[0] if local.ndim else 1
        flat = local.reshape(-1).view(torch.uint8).numpy().view(f"u{local.element_size()}")
        return flat.reshape(rows, flat.size // max(1, rows))

    def __create_write_items__(self, name: str, piece: Any) -> list[WriteItem]:
        """What DCP asks its tensors: the parts of this one that this rank can write."""
        return [
            WriteItem(
                index=MetadataIndex(name, self.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape),
                    properties=TensorProperties(dtype=self.local.dtype),
                    size=self.shape,
                ),
            )
        ]


def pieces_of(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[Piece]:
    """What this rank holds of tensors, uncopied; what is no DTensor is whole on all ranks."""
    return [_piece(name, tensor, ranks) for name, tensor in tensors.items()]


def _piece(name: str, tensor: Tensor, ranks: Ranks) -> Piece:
    if not isinstance(tensor, DTensor):
        start = torch.Size([0] * tensor.ndim)
        return Piece(name, tensor.detach(), tensor.shape, start, tuple(range(ranks.world)))
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    mesh = tensor.device_mesh
    place = zip(mesh.get_coordinate() or [], tensor.placements, strict=True)
    same = mesh.mesh[tuple(slice(None) if kind.is_replicate() else index for index, kind in place)]
    local = tensor.to_local().detach()
    return Piece(name, local, tensor.shape, chunk.offsets, tuple(sorted(same.flatten().tolist())))


class Memory:
    """Host memory for one copy of the training state, kept for the next; pinned if a GPU copies to it."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._blocks: list[Tensor] = []

    def copied(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Copies of pieces, finished when this returns; an earlier copy is overwritten.

        Raises:
            CapacityError: there is not enough memory.
        """
        copies, block, used = [], 0, 0
        for piece in pieces:
            size = piece.local.numel() * piece.local.element_size()
            while block < len(self._blocks) and used + size > self._blocks[block].numel():
                block, used = block + 1, 0
            if block == len(self._blocks):
                self._blocks.append(self._block(max(size, BLOCK)))
            room = self._blocks[block][used : used + size].view(piece.local.dtype).view(piece.local.shape)
            copies.append(replace(piece, local=room.copy_(piece.local, non_blocking=True)))
            used += -(-size // ALIGNED) * ALIGNED
        if self.pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def _block(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        except (RuntimeError, MemoryError) as error:
            held = sum(block.numel() for block in self._blocks)
            raise CapacityError(
                f"no host memory for a copy of the training state ({held / 1e9:.2f} GB are held, "
                f"{size / 1e9:.2f} GB more cannot be had: {error}); set async_save = false, or use more ranks"
            ) from error
