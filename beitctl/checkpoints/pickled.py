"""Files of ``torch.save``, read without running anything that they name.

Such a file is a pickle that describes tensors, with the bytes of the tensors beside it: a zip archive, or
before torch 1.6 a stream of pickles. The pickle is read here with stand-ins: each class or function that it
may name is one of the classes below, which keep what describes a tensor and forget all else. Any other name
is refused.

Not ``torch.load(weights_only=True)``: it reads no whole modules of the stream format and no pickle protocol
above 3, cannot fill a defaultdict, and calls functions of torch with what the file gives them.
"""

import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from beitctl.errors import DataError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What the stream format begins with."""
ZIP = b"PK\x03\x04"
"""What the zip format begins with."""
_BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError,
    MemoryError, RuntimeError, OSError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged file raises."""


class Storage(NamedTuple):
    """The bytes of one or more tensors: where they are, and how they are read."""

    key: str
    dtype: torch.dtype
    elements: int
    first: int = 0
    """Elements of the file's storage before this one."""


class Entry(NamedTuple):
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None
    """What the storage's bytes mean, if not its own dtype."""


class Odd(NamedTuple):
    """A tensor of a kind that is not read."""

    kind: str


class _Sealed(type):
    """Metaclass of the stand-ins: a pickle can set attributes of what it names, but not of these."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} cannot be changed")


class Other(metaclass=_Sealed):
    """Stands for an object that is no tensor: arguments, numbers, paths, hooks."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        """Forgets them."""

    def __setstate__(self, state: Any) -> None:
        """Forgets it."""


class Module(metaclass=_Sealed):
    """Stands for a ``torch.nn.Module`` that was pickled as a whole."""

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "Module":
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def table(self, name: str) -> dict[Any, Any]:
        """``_parameters``, ``_buffers`` or ``_modules``, without what is None or not saved."""
        found = self.state.get(name)
        transient = self.state.get("_non_persistent_buffers_set")
        skipped = transient if name == "_buffers" and isinstance(transient, set) else ()
        items = found.items() if isinstance(found, dict) else ()
        return {key: value for key, value in items if value is not None and key not in skipped}


class _Dict(dict[Any, Any], metaclass=_Sealed):
    """Stands for the dicts of ``collections``."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*[item for item in arguments if isinstance(item, dict | list)])

    def __setstate__(self, state: Any) -> None:
        """Forgets it: the versions of modules."""


class _List(list[Any], metaclass=_Sealed):
    """Stands for ``collections.deque``."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments[:1])


class _Tensor(metaclass=_Sealed):
    """Stands for the functions that make a tensor of a storage."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = next((item for item in more if isinstance(item, torch.dtype)), None)
        negated = any(isinstance(item, dict) and ("neg" in item or "conj" in item) for item in more[2:])
        return Odd("conjugated") if negated else Entry(storage, offset, size, stride, dtype)


class _Parameter(metaclass=_Sealed):
    """Stands for the functions that make a parameter of a tensor."""

    def __new__(cls, data: Any, *more: Any) -> Any:
        return data


class _Typed(metaclass=_Sealed):
    """Stands for the function that makes a tensor with attributes."""

    def __new__(cls, make: Any, kind: Any, arguments: Any, *more: Any) -> Any:
        return make(*arguments)


def _odd(kind: str) -> _Sealed:
    return _Sealed("Odd", (), {"__new__": lambda cls, *arguments: Odd(kind)})


_UTILS = {
    "_rebuild_tensor": _Tensor,
    "_rebuild_tensor_v2": _Tensor,
    "_rebuild_tensor_v3": _Tensor,
    "_rebuild_parameter": _Parameter,
    "_rebuild_parameter_with_state": _Parameter,
    "_rebuild_qtensor": _odd("quantised"),
    "_rebuild_sparse_tensor": _odd("sparse"),
    "_rebuild_sparse_csr_tensor": _odd("sparse"),
    "_rebuild_nested_tensor": _odd("nested"),
    "_rebuild_meta_tensor_no_storage": _odd("on the meta device, without values"),
}
_MODULES = (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.utils.Conv2d",
    "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock", "torch.nn.modules.upsampling.Upsample",
    "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.pooling.MaxPool2d",
)  # fmt: skip
"""Classes of the official files that are whole modules: OpenAI's ``encoder.pkl`` and ``decoder.pkl``."""
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OTHERS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "_codecs": ("encode",),
    "builtins": ("list", "dict", "tuple", "int", "float", "str", "bool", "bytes", "bytearray", "complex"),
    "numpy": (
        "dtype", "ndarray", "bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
        "uint64", "longlong", "float16", "float32", "float64", "str_", "bytes_",
    ),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": (
        "Size", "device", "Tensor", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
        "per_channel_symmetric", "per_channel_affine_float_qparams",
    ),
    "torch.nn.parameter": ("Parameter",),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip
"""What training code keeps beside the weights: arguments, states of optimizers, paths."""
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
        "Byte": torch.uint8, "Bool": torch.bool, "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128, "QInt8": torch.int8, "QUInt8": torch.uint8,
        "QInt32": torch.int32, "Untyped": torch.uint8,
    }.items()
}  # fmt: skip
STANDS_FOR: dict[str, Any] = {
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "collections.OrderedDict": _Dict,
    "collections.Counter": _Dict,
    "collections.defaultdict": _Dict,
    "collections.deque": _List,
    "torch._tensor._rebuild_from_type_v2": _Typed,
    **{f"torch._utils.{name}": stand_in for name, stand_in in _UTILS.items()},
    **{f"{place}.{name}": dtype for place in ("torch", "torch.cuda", "torch.storage")
       for name, dtype in _STORAGES.items()},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **dict.fromkeys(_MODULES, Module),
    **{f"{place}.{name}": Other for place, names in _OTHERS.items() for name in names},
}  # fmt: skip
"""All that a pickle may name, and what it gets instead. Nothing here has an effect outside of itself."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream, encoding="latin1")  # Python 2 wrote bytes, which may be anything
        self.path = path
        self.dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in STANDS_FOR:
            raise DataError(
                f"{self.path}: refused, because it wants {full}. Only tensors are ever read, and no code "
                "that a file names is run. Where you trust the file, save the tensors alone: "
                "safetensors.torch.save_file(model.state_dict(), ...) or torch.save(model.state_dict(), ...)"
            )
        return STANDS_FOR[full]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # class, with the source that it had
            return pid[1]
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count):
                view = None
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, view):
                pass
            case _:
                raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        self.dtypes.setdefault(key, dtype)
        return Storage(key, dtype, count) if view is None else Storage(key, dtype, view[2], view[1])


class _File(Protocol):
    """One of the two formats."""

    tree: Any

    def data(self, key: str) -> bytearray:
        """All bytes of a storage."""
        ...


class _Archive:
    """The zip format."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive = archive
        self.top = archive.namelist()[0].partition("/")[0]
        if f"{self.top}/byteorder" in archive.namelist():
            _check_order(archive.read(f"{self.top}/byteorder").decode(), path)
        with archive.open(f"{self.top}/data.pkl") as stream:
            self.tree = _Unpickler(stream, path).load()

    def data(self, key: str) -> bytearray:
        """All bytes of a storage; the archive's checksum is verified."""
        return bytearray(self.archive.read(f"{self.top}/data/{key}"))


class _Stream:
    """The format before torch 1.6."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream = stream
        head = [_Unpickler(stream, path).load() for _ in range(3)]
        if head[:2] != [MAGIC, PROTOCOL] or not isinstance(head[2], dict):
            raise pickle.UnpicklingError("not a file of torch.save")
        _check_order("little" if head[2].get("little_endian", True) else "big", path)
        unpickler = _Unpickler(stream, path)
        self.tree = unpickler.load()
        self.places: dict[str, tuple[int, int]] = {}
        end = path.stat().st_size
        for key in _Unpickler(stream, path).load():
            size = struct.unpack("<Q", stream.read(8))[0] * unpickler.dtypes[key].itemsize
            self.places[key] = stream.tell(), size
            if stream.seek(size, 1) > end:
                raise EOFError("the file ends within its tensors")

    def data(self, key: str) -> bytearray:
        """All bytes of a storage."""
        place, size = self.places[key]
        self.stream.seek(place)
        return bytearray(self.stream.read(size))


class TorchFile:
    """An open file: its tree of objects, with an ``Entry`` for each tensor, read on demand."""

    def __init__(self, file: _File, path: Path) -> None:
        self.tree, self._file, self._path = file.tree, file, path
        self._read: dict[str, Tensor] = {}

    def tensor(self, entry: Entry, name: str) -> Tensor:
        """Read a tensor; tensors that share a storage in the file share it here.

        Raises:
            DataError: its bytes are not there, or not as many as it says.
        """
        storage = entry.storage
        dtype = entry.dtype or storage.dtype
        try:
            raw = self._bytes(storage.key)
            if (storage.first + storage.elements) * storage.dtype.itemsize > raw.numel():
                raise ValueError(f"only {raw.numel()} bytes are there")
            return raw.view(dtype).as_strided(entry.size, entry.stride, storage.first + entry.offset)
        except _BROKEN as error:
            raise _damaged(self._path, error, f"{name} cannot be read") from error

    def _bytes(self, key: str) -> Tensor:
        if key not in self._read:
            data = self._file.data(key)
            found = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            self._read[key] = found
        return self._read[key]


@contextmanager
def opened(path: Path) -> Iterator[TorchFile]:
    """Open a file of ``torch.save``.

    Raises:
        DataError: it is damaged, of another kind, or names what tensors do not need.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
            file: _File
            if stream.peek(len(ZIP))[: len(ZIP)] == ZIP:
                file = _Archive(stack.enter_context(zipfile.ZipFile(stream)), path)
            else:
                file = _Stream(stream, path)
        except _BROKEN as error:
            raise _damaged(path, error, "cannot be read as a file of torch.save") from error
        yield TorchFile(file, path)


def _damaged(path: Path, error: BaseException, what: str) -> DataError:
    return DataError(
        f"{path}: {what} ({type(error).__name__}: {error}); "
        "it may be cut short or of another kind: download or copy it again"
    )


def _check_order(order: str, path: Path) -> None:
    if order != sys.byteorder:
        raise DataError(f"{path}: written on a {order}-endian machine; save it with safetensors there")
