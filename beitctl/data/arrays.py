"""Large tables in little memory: texts in one block, and arrays that are computed once and kept on disk.

Worker processes share both; a Python list of a million names would be copied into each of them.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

FOLDER = "BEITCTL_CACHE"
"""Environment variable with the folder of what can be computed again."""

Arrays = dict[str, NDArray[Any]]


class Texts(Sequence[str]):
    """Texts that do not change, as one block of UTF-8 and where each of them ends."""

    def __init__(self, block: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Pack texts; undecodable bytes of file names (surrogate escapes) come back as they were."""
        block, ends = bytearray(), []
        for text in texts:
            block += text.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        return cls(np.frombuffer(bytes(block), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "list[str]": ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        first = int(self.ends[place - 1]) if place else 0
        return self.block[first : int(self.ends[place])].tobytes().decode("utf-8", "surrogateescape")


def cache_folder() -> Path:
    """Where what can be computed again is kept: ``$BEITCTL_CACHE``, else the user's cache folder."""
    return Path(os.environ.get(FOLDER) or user_cache_path("beitctl")).expanduser()


def cached(kind: str, key: str, build: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
    """Arrays of a name that says all they depend on: memory-mapped from the cache, or built and put there.

    Several processes may ask at the same time: each builds, one wins. A cache that is damaged is built again,
    one that cannot be written only costs the time.

    Args:
        kind: folder in the cache, such as ``tar``.
        key: hash of everything that the arrays depend on; a name that a file may have.
        build: computes the arrays by their names.
    """
    place = cache_folder() / kind / key
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _stored(place)
    built = dict(build())
    draft = place.with_name(f".{key}.{uuid.uuid4().hex}.tmp")
    try:
        draft.mkdir(parents=True)
        for name, array in built.items():
            np.save(draft / f"{name}.npy", array, allow_pickle=False)
        (draft / "complete").touch()
        if place.exists():  # damaged
            shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        return _stored(place)
    except (OSError, ValueError, EOFError):
        return built
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _stored(place: Path) -> Arrays:
    (place / "complete").stat()
    return {
        file.stem: np.load(file, mmap_mode="r" if file.stat().st_size > 4096 else None, allow_pickle=False)
        for file in sorted(place.glob("*.npy"))
    }
