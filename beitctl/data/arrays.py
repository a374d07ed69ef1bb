"""Large tables in little memory: texts in one block, and arrays that are computed once and kept on disk.

Worker processes share both; a Python list of a million names would be copied into each of them.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

FOLDER = "BEITCTL_CACHE"
"""Environment variable with the folder of what can be computed again."""

SMALL_BYTES = 4096
"""Arrays up to this size are read into memory from the cache."""

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

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


class New(Protocol):
    """Gives an array of zeros to fill: ``new(name, shape, type)``."""

    def __call__(self, name: str, shape: tuple[int, ...], kind: Any, /) -> NDArray[Any]: ...


def cached(kind: str, key: str, build: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
    """Arrays of a name that says all they depend on: memory-mapped from the cache, or built and put there.

    Of several processes one builds while the others wait. A cache that is damaged is built again; one that
    cannot be written costs the time, and the memory in every process.

    Args:
        kind: folder in the cache, such as ``tar``.
        key: hash of everything that the arrays depend on; a name that a file may have.
        build: computes the arrays by their names.
    """

    def fill(new: New) -> None:
        for name, array in build().items():
            new(name, array.shape, array.dtype)[...] = array

    return filled(kind, key, fill)


def filled(kind: str, key: str, fill: Callable[[New], None]) -> Arrays:
    """As ``cached``, for arrays that may be larger than memory: ``fill`` asks for each and writes into it."""
    place = cache_folder() / kind / key
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _stored(place)
    with _alone(place):
        with contextlib.suppress(OSError, ValueError, EOFError):
            return _stored(place)  # another process has been faster
        draft = _Draft(place.with_name(f".{key}.{uuid.uuid4().hex}.tmp"))
        try:
            fill(draft.new)
            return draft.stored(place)
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)


class _Draft:
    """Arrays on their way into the cache; in memory where the disk does not take them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.arrays, self.whole = folder, dict[str, NDArray[Any]](), True

    def new(self, name: str, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        """An array in a file, or in memory."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.arrays[name] = _allocated(self.folder / f"{name}.npy", shape, kind)
        except OSError:
            self.whole = False
            self.arrays[name] = np.zeros(shape, kind)
        return self.arrays[name]

    def stored(self, place: Path) -> Arrays:
        """The arrays from their place in the cache, or as they are if that cannot be written."""
        if not self.whole:
            return self.arrays
        try:
            for array in self.arrays.values():
                if isinstance(array, np.memmap):
                    array.flush()
            (self.folder / "complete").write_text("\n".join(self.arrays))
            with contextlib.suppress(OSError, ValueError, EOFError):
                return _stored(place)  # where no locks are kept, another process may have been faster
            shutil.rmtree(place, ignore_errors=True)  # damaged, if it is there at all
            self.folder.rename(place)
            return _stored(place)
        except (OSError, ValueError, EOFError):
            return self.arrays


def _allocated(file: Path, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """An array of zeros in a file, whose room on the disk is taken at once: later it could only crash."""
    if not np.prod(shape, dtype=np.int64):
        np.save(file, np.zeros(shape, kind), allow_pickle=False)
        return np.zeros(shape, kind)
    array: NDArray[Any] = np.lib.format.open_memmap(file, "w+", kind, shape)
    with file.open("rb+") as opened:
        os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
    return array


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other processes from computing the same, where the file system keeps locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(place.with_name(f".{place.name}.lock").open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stored(place: Path) -> Arrays:
    found: Arrays = {}
    for name in (place / "complete").read_text().splitlines():
        file = place / f"{name}.npy"
        large = file.stat().st_size > SMALL_BYTES
        found[name] = np.load(file, mmap_mode="r" if large else None, allow_pickle=False)
    return found
