"""Weight files to read, good and bad."""

import pickle
import zipfile

import pytest
import torch

from beitctl.checkpoints import pickled
from beitctl.checkpoints.files import read_tensors
from beitctl.errors import DataError

FORMATS = ("zip", "stream")
MAGIC = (pickled.MAGIC, pickled.PROTOCOL, {"little_endian": True})


def state():
    draw = torch.Generator().manual_seed(0)
    return {
        "table": torch.randn(4, 3, generator=draw),
        "scale": torch.randn((), generator=draw),
        "index": torch.arange(6).view(2, 3),
    }


def saved(path, tree, form="zip", **settings):
    torch.save(tree, path, _use_new_zipfile_serialization=form == "zip", **settings)
    return path


def written(path, tree, form="zip"):
    """A file of either format around a pickle that was made by hand."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", tree)
    else:
        path.write_bytes(b"".join(pickle.dumps(item, 2) for item in MAGIC) + tree)
    return path


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    )


def refused(path):
    with pytest.raises(DataError) as caught:
        read_tensors(path)
    return str(caught.value).replace(str(path), "FILE")
