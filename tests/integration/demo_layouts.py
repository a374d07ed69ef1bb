"""The embedded data set in other layouts, and the settings with which the recipe demo reads each.

``python tests/integration/demo_layouts.py DIR`` writes them and prints one command line for each layout.
"""

import io
import json
import shlex
import sys
import tarfile
from pathlib import Path

from beitctl_plugins.sources.embedded import Embedded

SPLITS = ("train", "test")


def examples(split, content="pairs"):
    opened = Embedded(split=split, content=content).open()
    return [opened[index] for index in range(len(opened))]


def ending(data):
    return {b"\xff\xd8\xff": "jpg", b"RIF": "webp", b"\x89PN": "png"}[data[:3]]


def write_folder(folder):
    """Pictures in a folder, captions and classes in metadata.jsonl."""
    for split in SPLITS:
        here = folder / split
        here.mkdir(parents=True)
        with (here / "metadata.jsonl").open("w") as table:
            for example in examples(split):
                name = f"{example.id}.{ending(example.image)}"
                (here / name).write_bytes(example.image)
                for caption in example.captions:
                    row = {"file_name": name, "caption": caption, "label": example.label}
                    table.write(json.dumps(row) + "\n")
    write_prose(folder)
    return settings({"kind": "image-folder"}, folder)


def write_tars(folder, size=400):
    """Tar shards as img2dataset writes them, all captions in the .json."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        found = examples(split)
        for first in range(0, len(found), size):
            with tarfile.open(folder / split / f"{first // size:05d}.tar", "w") as tar:
                for example in found[first : first + size]:
                    facts = {"captions": list(example.captions), "label": example.label}
                    for kind, data in (
                        (ending(example.image), example.image),
                        ("json", json.dumps(facts).encode()),
                        ("cls", example.label.encode()),
                    ):
                        member = tarfile.TarInfo(f"{example.id}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    write_prose(folder)
    return settings({"kind": "webdataset", "label": "cls"}, folder)


def write_prose(folder):
    """One object a line."""
    for split in SPLITS:
        lines = [json.dumps({"text": example.text}) for example in examples(split, "text")]
        (folder / f"prose-{split}.jsonl").write_text("\n".join(lines))


def settings(table, folder):
    """``--set`` for each of the recipe's named sources."""
    train, test = ({**table, "path": str(folder / split)} for split in SPLITS)
    found = {
        "train": train,
        "test": test,
        "prose": {"kind": "text", "path": str(folder / "prose-train.jsonl")},
        "prose-test": {"kind": "text", "path": str(folder / "prose-test.jsonl")},
    }
    return [f"data.{name}={toml(value)}" for name, value in found.items()]


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


LAYOUTS = {"embedded": lambda folder: [], "folder": write_folder, "tar": write_tars}


if __name__ == "__main__":
    for layout, write in LAYOUTS.items():
        found = write(Path(sys.argv[1]).resolve() / layout)
        line = [word for setting in found for word in ("--set", setting)]
        print(shlex.join(["beitctl", "run", "demo", "--out", f"runs/demo-{layout}", *line]))
