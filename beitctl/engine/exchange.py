"""Values of all ranks on rank 0: tensors, arrays, bytes, texts and numbers in lists, tuples and dicts.

Sent as torch saves them and read with ``weights_only``: nothing that could run code is ever unpickled.
"""

import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beitctl.engine.dist import Ranks

ARRAY = "#array"
"""Key of the one-entry dict that stands for a NumPy array on the way."""


def on_host(value: Any) -> Any:
    """The value with its tensors on the host, without gradient."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


def gathered(ranks: Ranks, value: Any) -> list[Any]:
    """The values of all ranks in rank order on rank 0, which must be on the host; nothing elsewhere."""
    if ranks.world == 1:
        return [value]
    stream = io.BytesIO()
    torch.save(_sendable(value), stream)
    data = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    sizes = [int(size) for size in ranks.gather_objects(len(data))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in sizes] if ranks.main else None
    dist.gather(padded, parts, dst=0, group=ranks.group)
    return [
        _received(torch.load(io.BytesIO(part[:size].numpy().tobytes()), weights_only=True))
        for part, size in zip(parts or [], sizes, strict=False)
    ]


def _sendable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {ARRAY: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_sendable(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value  # a view would send all it is a view of


def _received(value: Any) -> Any:
    if isinstance(value, dict):
        return value[ARRAY].numpy() if set(value) == {ARRAY} else {k: _received(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_received(item) for item in value)
    return value
