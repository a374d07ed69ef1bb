"""ImageNet-1k (ILSVRC 2012): pictures in classes."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, existing
from beitctl_plugins.sources.reading.annotations import Builder, Layout, lines, read_json, some_names
from beitctl_plugins.sources.reading.rows import UnusableError, short

WNID = re.compile(r"n\d{8}")
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
BASES = ("", "ILSVRC2012/", "Data/CLS-LOC/", "ILSVRC/Data/CLS-LOC/")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
MAPS = ("LOC_val_solution.csv", "val_map.txt", "val.txt", "imagenet_2012_validation_synset_labels.txt")
TREE = f"""
train/n01440764/n01440764_10026.JPEG ...
val/n01440764/ILSVRC2012_val_00000293.JPEG ...
or val/ILSVRC2012_val_00000001.JPEG ... and one of {", ".join(MAPS)},
or {GROUND_TRUTH} and {META} of the development kit
"""
DEVELOPMENT_KIT = ("", "data/", "ILSVRC2012_devkit_t12/data/", "val/", "ILSVRC/")


class ImageNet(Plugin):
    """Pictures of ImageNet-1k with their classes, in the layout of image-net.org, torchvision or Kaggle.

    A class is named by its WordNet id. An example is named by its path, such as ``val/n01440764/...JPEG``.
    """

    path: Path
    """The folder with ``train`` and ``val``."""
    split: Literal["train", "val"] = "train"
    """Which part: 1,281,167 and 50,000 pictures."""
    names: str = ""
    """File with names of the classes, such as LOC_synset_mapping.txt or imagenet_class_index.json; empty:
    they are called by their WordNet ids."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable pictures to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with class folders that are called by WordNet ids, or with the pictures of the test."""
        for base in BASES:
            for split in ("train", "val"):
                names = some_names(path / base / split)
                if any(WNID.fullmatch(name) or NUMBER.fullmatch(name) for name in names):
                    return 8, {"path": str(path), "split": split}
        return None

    def open(self) -> Opened:
        """List the class folders.

        Raises:
            DataError: not such a folder, labels that cannot be read, or too many unusable pictures.
        """
        layout = Layout(self.path, "ImageNet", TREE)
        folder = layout.folder(*(f"{base}{self.split}" for base in BASES))
        base = folder.removesuffix(self.split)
        builder = Builder(layout.root / base if base else layout.root)
        called = _names(existing(Path(self.names))) if self.names else {}
        files = [existing(Path(self.names))] if self.names else []
        flat = builder.pictures.names(self.split)

        def add(place: str, label: str | None) -> None:
            picture = builder.pictures.find(place)
            if label is None:
                raise UnusableError("no class for it")
            if called and label not in called:
                raise UnusableError(f"no name of class {label} in {self.names}")
            builder.add(place, image=picture, label=called.get(label, label))

        for wnid in builder.pictures.folders(self.split):
            if wnid.startswith("."):
                continue
            if not WNID.fullmatch(wnid):
                builder.problems.append(f"{self.split}/{wnid}: not called by a WordNet id, such as n01440764")
                continue
            for name in builder.pictures.names(f"{self.split}/{wnid}"):
                place = f"{self.split}/{wnid}/{name}"
                builder.attempt(place, lambda p=place, w=wnid: add(p, w))  # type: ignore[misc]
        if flat and self.split == "val":
            labels, used = _labels(layout)
            files += used
            for name in flat:
                place = f"val/{name}"
                builder.attempt(place, lambda p=place, n=name: add(p, labels.get(_key(n))))  # type: ignore[misc]
        else:
            builder.problems += [f"{self.split}/{name}: lies in no class folder" for name in flat]
        return builder.opened(self, files, self.max_bad_share)


def _key(name: str) -> str:
    return name.rpartition(".")[0] if "." in name else name


def _labels(layout: Layout) -> tuple[dict[str, str], list[Path]]:
    """Classes of the pictures in a flat folder, by their names without ending."""
    for place in (*MAPS, *(f"{folder}{name}" for folder in DEVELOPMENT_KIT for name in MAPS)):
        if (layout.root / place).is_file():
            return _map(layout.root / place, layout), [layout.root / place]
    truth = layout.file(*(folder + GROUND_TRUTH for folder in DEVELOPMENT_KIT), *MAPS)
    meta = layout.file(*(folder + META for folder in DEVELOPMENT_KIT))
    wnids = _meta(meta)
    labels = {}
    for number, line in lines(truth):
        if line.strip() not in wnids:
            raise DataError(
                f"{truth}:{number}: no class {line.strip()[:60]!r} in {meta}; download both again"
            )
        labels[f"ILSVRC2012_val_{number:08d}"] = wnids[line.strip()]
    return labels, [truth, meta]


def _map(file: Path, layout: Layout) -> dict[str, str]:
    """Lines of a name and a class, or of classes alone in the order of the numbers."""
    labels = {}
    classes: list[str] = []
    for number, line in lines(file):
        words = line.replace(",", " ").split()
        if words[:1] == ["ImageId"]:  # first line of Kaggle's table
            continue
        name, label = (f"ILSVRC2012_val_{number:08d}", words[0]) if len(words) == 1 else words[:2]
        if label.isdecimal():  # as in Caffe's val.txt: number of the class in sorted order, from 0
            classes = classes or [n for n in some_names(layout.root / "train", 10000) if WNID.fullmatch(n)]
            label = classes[int(label)] if int(label) < len(classes) else label
        if not WNID.fullmatch(label):
            raise DataError(f"{file}:{number}: expected a WordNet id such as n01440764, found {label[:60]!r}")
        labels[_key(name.rpartition("/")[2])] = label
    return labels


def _meta(file: Path) -> dict[str, str]:
    """WordNet ids by the numbers that the ground truth gives."""
    from scipy.io import loadmat  # noqa: PLC0415  # slow to import, and for this one file only

    try:
        synsets = loadmat(file, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets.reshape(-1)}
    except Exception as error:  # whatever a damaged file makes of it
        raise DataError(f"{file}: cannot be read ({str(error)[:200]}); download it again") from error


def _names(file: Path) -> dict[str, str]:
    """Names of classes by WordNet id, all different."""
    found = {}
    if file.suffix.lower() == ".json":
        content = read_json(file)
        rows = list(content.values()) if isinstance(content, dict) else []
        if not rows or not all(isinstance(r, list) and len(r) == 2 and isinstance(r[0], str) for r in rows):
            raise DataError(
                f"{file}: expected {{number: [WordNet id, name]}}, found {short(json.dumps(content))}"
            )
        found = {row[0]: str(row[1]) for row in rows}
    else:
        for number, line in lines(file):
            wnid, _, name = line.strip().replace("\t", " ").partition(" ")
            if not WNID.fullmatch(wnid) or not name.strip():
                raise DataError(f"{file}:{number}: expected a WordNet id and a name, found {line[:60]!r}")
            found[wnid] = name.strip()
    times = Counter(found.values())
    return {wnid: f"{name} ({wnid})" if times[name] > 1 else name for wnid, name in found.items()}
