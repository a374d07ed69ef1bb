"""One hash of the files of a source, for all sources."""

import os
from collections.abc import Iterable
from hashlib import blake2b

from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl_plugins.sources import opened
from beitctl_plugins.sources.reading.rows import Files


class FileHash:
    """Hash of files by name and size, and by content if they are small together."""

    def __init__(self, root: str = "") -> None:
        """Begin with no files.

        Args:
            root: folder that the names are relative to.
        """
        self._root, self._bytes, self._paths = root, 0, list[str]()
        self._names, self._times = blake2b(digest_size=16), blake2b(digest_size=16)

    @classmethod
    def of(cls, files: Files, names: Iterable[str] | None = None) -> "FileHash":
        """Hash of files with the given names, or called by their paths."""
        found = cls()
        status = zip(
            names or files.paths, files.sizes.tolist(), files.modified.tolist(), files.paths, strict=True
        )
        for name, size, modified, path in status:
            found.add(name, size, modified, path)
        return found

    def add(self, name: str, size: int, modified: int = 0, path: str | None = None) -> None:
        """Add a file.

        Args:
            name: the same on every machine.
            size: in bytes.
            modified: when it was changed, in nanoseconds.
            path: where it is; by default below the root.
        """
        data = name.encode("utf-8", "surrogateescape")
        self._names.update(b"%d %d " % (len(data), size) + data)
        self._times.update(b"%d " % modified)
        self._bytes += size
        if self._bytes > opened.SMALL_BYTES:
            self._paths.clear()
        else:
            self._paths.append(os.path.join(self._root, name) if path is None else path)

    def key(self, *settings: str) -> str:
        """Hash of all of them, and of the settings that chose them.

        Raises:
            DataError: one cannot be read.
        """
        whole = blake2b(digest(*settings, self._names.digest()), digest_size=16)
        for path in self._paths:
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            whole.update(b"%d " % len(data) + data)
        return whole.hexdigest()

    def state(self) -> str:
        """Hash that changes whenever one of them was touched."""
        return digest(self._names.digest(), self._times.digest()).hex()
