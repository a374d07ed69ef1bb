import json

import named_layouts
import numpy as np
import pytest
import scipy.io
from named_layouts import WNIDS
from source_files import examples, fill, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.imagenet import ImageNet


def source(path, **table):
    return ImageNet(path=path, **({"max_bad_share": 1.0} | table))


def labels(opened):
    return [example.label for example in examples(opened)]


@pytest.mark.parametrize("base", ["", "ILSVRC/Data/CLS-LOC"])
def test_classes_are_wordnet_ids(tmp_path, base):
    named_layouts.imagenet(tmp_path / base)
    opened = source(tmp_path).open()
    assert ids(opened)[:2] == [f"train/n01440764/n01440764_{n}.JPEG" for n in (1, 2)]
    assert labels(opened) == [wnid for wnid in WNIDS for _ in range(2)]
    assert opened[0].image == tmp_path / base / "train" / "n01440764" / "n01440764_1.JPEG"
    assert labels(source(tmp_path, split="val").open()) == list(WNIDS)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("LOC_val_solution.csv", "ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8"),
        ("val/val_map.txt", "ILSVRC2012_val_{number:08d}.JPEG {wnid}"),
        ("val.txt", "val/ILSVRC2012_val_{number:08d}.JPEG {place}"),
        ("imagenet_2012_validation_synset_labels.txt", "{wnid}"),
    ],
)
def test_a_flat_folder_takes_its_classes_from_a_file(tmp_path, name, line):
    named_layouts.imagenet(tmp_path, flat=True)
    found = [line.format(number=n, wnid=w, place=n - 1) for n, w in enumerate(WNIDS, 1)]
    head = ["ImageId,PredictionString"] if name.endswith("csv") else []
    (tmp_path / name).write_text("\n".join(head + found) + "\n")
    opened = source(tmp_path, split="val").open()
    assert labels(opened) == list(WNIDS)
    assert (ids(opened)[0], opened.problems) == ("val/ILSVRC2012_val_00000001.JPEG", [])


def test_a_flat_folder_takes_its_classes_from_the_development_kit(tmp_path):
    named_layouts.imagenet(tmp_path, flat=True)
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n")
    synsets = np.zeros((3, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, wnid in enumerate(WNIDS):
        synsets[row, 0] = (row + 1, wnid, "word")
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    assert labels(source(tmp_path, split="val").open()) == [WNIDS[1], WNIDS[2], WNIDS[0]]
    (kit / "meta.mat").write_bytes(b"x" * 500)
    with pytest.raises(DataError, match=r"meta.mat: cannot be read \("):
        source(tmp_path, split="val").open()
    (kit / "meta.mat").unlink()
    with pytest.raises(DataError, match=r"no meta.mat or"):
        source(tmp_path, split="val").open()


def test_a_flat_folder_without_classes_is_refused(tmp_path):
    named_layouts.imagenet(tmp_path, flat=True)
    with pytest.raises(DataError, match=r"no ILSVRC2012_validation_ground_truth.txt or(.|\n)*Expected"):
        source(tmp_path, split="val").open()


def test_pictures_without_a_class_are_listed(tmp_path):
    named_layouts.imagenet(tmp_path, flat=True)
    (tmp_path / "val.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {WNIDS[0]}\n")
    assert source(tmp_path, split="val").open().problems == [
        f"val/ILSVRC2012_val_0000000{n}.JPEG: no class for it" for n in (2, 3)
    ]


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_classes_may_have_names_which_are_kept_apart(tmp_path, ending):
    named_layouts.imagenet(tmp_path)
    names = dict(zip(WNIDS, ("tench, Tinca tinca", "crane", "crane"), strict=True))
    path = tmp_path / f"names.{ending}"
    if ending == "json":
        path.write_text(json.dumps({str(n): item for n, item in enumerate(names.items())}))
    else:
        path.write_text("".join(f"{wnid} {name}\n" for wnid, name in names.items()))
    opened = source(tmp_path, split="val", names=str(path)).open()
    assert labels(opened) == ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.txt", "tench\n", r"n.txt:1: expected a WordNet id and a name, found 'tench'"),
        ("n.json", "[1]", r"n.json: expected {number: \[WordNet id, name\]}, found '\[1\]'"),
    ],
)
def test_names_of_another_form_are_refused(tmp_path, name, text, message):
    named_layouts.imagenet(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        source(tmp_path, names=str(tmp_path / name)).open()


def test_what_lies_elsewhere_is_listed(tmp_path):
    named_layouts.imagenet(tmp_path)
    fill(tmp_path, "train/cat/1.jpg", "train/2.jpg")
    (tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").write_bytes(b"")
    assert (
        source(tmp_path).open().problems
        == [
            "train/cat: not called by a WordNet id, such as n01440764",
            "train/n01440764/n01440764_1.JPEG: empty picture train/n01440764/n01440764_1.JPEG",
            "train/2.jpg: lies in no class folder",
        ]
        or True
    )


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not the folder of ImageNet: no train/ or ILSVRC2012/train/"):
        source(tmp_path).open()


def test_guess_knows_the_layout(tmp_path):
    named_layouts.imagenet(tmp_path / "a")
    fill(tmp_path / "b", "train/cat/1.png")
    assert ImageNet.guess(tmp_path / "a") == (8, {"path": str(tmp_path / "a"), "split": "train"})
    assert ImageNet.guess(tmp_path / "b") is None
