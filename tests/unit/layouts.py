"""One small set of pictures, and one of prose, in every layout that a source reads.

By hand: ``python tests/unit/layouts.py DIR`` writes everything and lists how each is read.
"""

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from named_layouts import WNIDS, dump, karpathy
from one_set import LABELS, PROSE, Row, rows
from source_files import tar

from beitctl import registry
from beitctl.api import Plugin
from beitctl.data.tar_keys import key
from beitctl.inspecting import finding, sharding
from beitctl.inspecting.journal import packed
from beitctl_plugins.sources.coco import Coco
from beitctl_plugins.sources.flickr30k import Flickr30k
from beitctl_plugins.sources.hub import Hub
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.imagenet import ImageNet
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.path_list import PathList
from beitctl_plugins.sources.text import Text
from beitctl_plugins.sources.webdataset import WebDataset


def files(folder: Path, content: Iterable[tuple[str, bytes]]) -> Path:
    """Write files by their relative names; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pictures(folder: Path, made: Sequence[Row]) -> Path:
    """Write the pictures into class folders; returns the folder."""
    return files(folder, ((row.id, row.data) for row in made))


def json_lines(path: Path, content: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    return path


def separated(path: Path, columns: Sequence[str], content: Iterable[Sequence[str]]) -> Path:
    """Write a .csv or .tsv file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([columns, *content])
    return path


def table(made: Sequence[Row], image: Callable[[Row], Any]) -> pa.Table:
    """All of it as a table."""
    cells = [
        {"id": row.id, "image": image(row), "captions": list(row.captions), "label": row.label}
        for row in made
    ]
    return pa.Table.from_pylist(cells)


def folder_csv(folder: Path, made: Sequence[Row]) -> Plugin:
    """Class folders, and a row for each caption."""
    pictures(folder, made)
    told = [(row.id, caption, row.label) for row in made for caption in row.captions]
    separated(folder / "metadata.csv", ("file_name", "caption", "label"), told)
    return ImageFolder(path=folder, labels="folders")


def folder_jsonl(folder: Path, made: Sequence[Row]) -> Plugin:
    """A row for each picture, with a list of captions."""
    pictures(folder, made)
    told = [{"file_name": row.id, "caption": row.captions, "label": row.label} for row in made]
    json_lines(folder / "metadata.jsonl", told)
    return ImageFolder(path=folder)


def folder_classes(folder: Path, made: Sequence[Row]) -> Plugin:
    return ImageFolder(path=pictures(folder, made), labels="folders")


def path_list(folder: Path, made: Sequence[Row]) -> Plugin:
    pictures(folder, made)
    path = folder / "list.txt"
    path.write_text("".join(f"{row.id}\t{row.label}\n" for row in reversed(made)))
    return PathList(path=path, labels="column")


def parquet_bytes(folder: Path, made: Sequence[Row]) -> Plugin:
    pq.write_table(table(made, lambda row: row.data), files(folder, []) / "set.parquet")
    return Parquet(path=folder / "set.parquet", id="id", label="label")


def parquet_struct(folder: Path, made: Sequence[Row]) -> Plugin:
    """As Hugging Face writes pictures; named by the paths in there."""
    rows = table(made, lambda row: {"bytes": row.data, "path": row.id}).drop_columns(["id"])
    pq.write_table(rows, files(folder, []) / "set.parquet")
    return Parquet(path=folder / "set.parquet", label="label")


def parquet_paths(folder: Path, made: Sequence[Row]) -> Plugin:
    rows = table(made, lambda row: row.id).drop_columns(["id"])
    pq.write_table(rows, pictures(folder, made) / "set.parquet")
    return Parquet(path=folder / "set.parquet", label="label")


def parquet_shards(folder: Path, made: Sequence[Row]) -> Plugin:
    """Three files with row groups of three."""
    files(folder, [])
    for number in range(3):
        part = table(made[number::3], lambda row: row.data)
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=3)
    return Parquet(path=folder, id="id", label="label")


def arrow_file(folder: Path, made: Sequence[Row]) -> Plugin:
    return _arrow(folder, made, pa.ipc.new_file)


def arrow_stream(folder: Path, made: Sequence[Row]) -> Plugin:
    return _arrow(folder, made, pa.ipc.new_stream)


def _arrow(folder: Path, made: Sequence[Row], writer: Any) -> Plugin:
    found, path = table(made, lambda row: row.data), files(folder, []) / "set.arrow"
    with writer(str(path), found.schema) as out:
        out.write_table(found, max_chunksize=5)
    return Parquet(path=path, id="id", label="label")


def feather_file(folder: Path, made: Sequence[Row]) -> Plugin:
    path = files(folder, []) / "set.feather"
    feather.write_feather(table(made, lambda row: row.data), str(path))
    return Parquet(path=path, id="id", label="label")


def webdataset(folder: Path, made: Sequence[Row]) -> Plugin:
    """Two tars; as what stands behind the first dot is no part of a key, it is percent-encoded."""
    for number in range(2):
        members = []
        for row in made[number::2]:
            told = {"id": row.id, "caption": row.captions[0], "captions": row.captions}
            for ending, data in (
                (row.id.rpartition(".")[2], row.data),
                ("txt", row.captions[0].encode()),
                ("cls", row.label.encode()),
                ("json", json.dumps(told).encode()),
            ):
                members.append((f"{key(row.id)}.{ending}", data))
        tar(folder / f"{number:05d}.tar", members)
    return WebDataset(path=folder, label="cls")


def webdataset_plain(folder: Path, made: Sequence[Row]) -> Plugin:
    """Without .json, so with one caption each, and without the endings in the keys."""
    members = []
    for row in made:
        stem, _, ending = row.id.rpartition(".")
        members += [(f"{stem}.{ending}", row.data), (f"{stem}.txt", row.captions[0].encode())]
        members.append((f"{stem}.cls", row.label.encode()))
    return WebDataset(path=tar(folder / "set.tar", members), label="cls")


def pairs_jsonl(folder: Path, made: Sequence[Row]) -> Plugin:
    told = [{"image": row.id, "caption": row.captions, "label": row.label} for row in made]
    return _pairs(json_lines(pictures(folder, made) / "pairs.jsonl", told))


def pairs_json(folder: Path, made: Sequence[Row]) -> Plugin:
    told = [{"image": r.id, "caption": c, "label": r.label} for r in made for c in r.captions]
    return _pairs(dump(pictures(folder, made) / "pairs.json", told))


def pairs_csv(folder: Path, made: Sequence[Row]) -> Plugin:
    return _separated_pairs(pictures(folder, made) / "pairs.csv", made)


def pairs_tsv(folder: Path, made: Sequence[Row]) -> Plugin:
    return _separated_pairs(pictures(folder, made) / "pairs.tsv", made)


def _separated_pairs(path: Path, made: Sequence[Row]) -> Plugin:
    told = [(row.id, caption, row.label) for row in made for caption in row.captions]
    return _pairs(separated(path, ("image", "caption", "label"), told))


def pairs_parquet(folder: Path, made: Sequence[Row]) -> Plugin:
    rows = table(made, lambda row: row.id).rename_columns(["id", "image", "caption", "label"])
    pq.write_table(rows, pictures(folder, made) / "pairs.parquet")
    return _pairs(folder / "pairs.parquet")


def _pairs(path: Path) -> Plugin:
    return Pairs(path=path, label="label")


def _hub(made: Sequence[Row]) -> Any:
    import datasets  # takes a second

    found = table(made, lambda row: {"bytes": row.data, "path": None}).to_pydict()
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=list(LABELS)),
    )
    return datasets.Dataset.from_dict(found, features=features)


def hub_parquet(folder: Path, made: Sequence[Row]) -> Plugin:
    """The files of a repository on the Hub."""
    files(folder / "data", [])
    half = len(made) // 2
    for number, part in enumerate((made[:half], made[half:])):
        _hub(part).to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet", batch_size=4)
    return Hub(dataset=str(folder), id="id")


def hub_streaming(folder: Path, made: Sequence[Row]) -> Plugin:
    hub_parquet(folder, made)
    return Hub(dataset=str(folder), streaming=True)


def hub_saved(folder: Path, made: Sequence[Row]) -> Plugin:
    _hub(made).save_to_disk(folder)
    return Hub(dataset=str(folder), id="id")


def hub_pictures(folder: Path, made: Sequence[Row]) -> Plugin:
    """A folder of pictures as the library ``datasets`` reads it."""
    pictures(folder, made)
    told = [{"file_name": r.id, "id": r.id, "caption": r.captions, "label": r.label} for r in made]
    json_lines(folder / "metadata.jsonl", told)
    return Hub(dataset=str(folder), id="id")


def coco(folder: Path, made: Sequence[Row]) -> Plugin:
    files(folder / "train2017", ((row.name, row.data) for row in made))
    images = [{"id": number, "file_name": row.name} for number, row in enumerate(made, 1)]
    told = [
        {"image_id": number, "id": 10 * number + place, "caption": caption}
        for number, row in enumerate(made, 1)
        for place, caption in enumerate(row.captions)
    ]
    dump(folder / "annotations" / "captions_train2017.json", {"images": images, "annotations": told})
    return Coco(path=folder)


def flickr30k(folder: Path, made: Sequence[Row]) -> Plugin:
    files(folder / "flickr30k-images", ((row.name, row.data) for row in made))
    karpathy(folder, "flickr30k", [("train", "", row.name, 0, list(row.captions)) for row in made])
    return Flickr30k(path=folder)


def imagenet(folder: Path, made: Sequence[Row]) -> Plugin:
    wnids = dict(zip(LABELS, WNIDS, strict=True))
    files(folder / "train", ((f"{wnids[row.label]}/{row.name}", row.data) for row in made))
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{w} {name}\n" for name, w in wnids.items()))
    return ImageNet(path=folder, names=str(folder / "LOC_synset_mapping.txt"))


def pack_parquet(folder: Path, made: Sequence[Row]) -> Plugin:
    return _pack(folder, made, "parquet")


def pack_tar(folder: Path, made: Sequence[Row]) -> Plugin:
    return _pack(folder, made, "tar")


def _pack(folder: Path, made: Sequence[Row], format: Any) -> Plugin:
    """What ``beitctl data pack`` makes of the Parquet file."""
    source: Any = parquet_bytes(folder / "from", made)
    found = finding.Found("parquet", source.model_dump(exclude_defaults=True), source)
    settings = sharding.Settings(px=64, format=format, shard_bytes=3000)
    sharding.write(found, source.open(), folder / "pack", settings, sharding.Limits(workers=1, quiet=True))
    read = packed(folder / "pack") or {}
    plugin: Plugin = registry.get(finding.GROUP, read.pop("kind")).model_validate(read)
    return plugin


def text_lines(folder: Path, pieces: Sequence[str]) -> Plugin:
    content = "\n\n".join(pieces).encode()
    return Text(path=files(folder, [("a.txt", content)]) / "a.txt")


def text_paragraphs(folder: Path, pieces: Sequence[str]) -> Plugin:
    content = "\n\n \n".join(pieces).encode()
    return Text(path=files(folder, [("a.txt", content)]), documents="paragraphs")


def text_files(folder: Path, pieces: Sequence[str]) -> Plugin:
    content = ((f"{number}.txt", piece.encode()) for number, piece in enumerate(pieces))
    return Text(path=files(folder, content), documents="files")


def text_gz(folder: Path, pieces: Sequence[str]) -> Plugin:
    content = gzip.compress("\n".join(pieces).encode(), mtime=0)  # else the time is in it
    return Text(path=files(folder, [("a.txt.gz", content)]) / "a.txt.gz")


def text_jsonl(folder: Path, pieces: Sequence[str]) -> Plugin:
    return Text(path=json_lines(files(folder, []) / "a.jsonl", ({"text": piece} for piece in pieces)))


def text_parquet(folder: Path, pieces: Sequence[str]) -> Plugin:
    pq.write_table(pa.table({"text": list(pieces)}), files(folder, []) / "a.parquet")
    return Text(path=folder / "a.parquet")


def parquet_text(folder: Path, pieces: Sequence[str]) -> Plugin:
    pq.write_table(pa.table({"text": list(pieces)}), files(folder, []) / "a.parquet")
    return Parquet(path=folder / "a.parquet", text="text")


def webdataset_text(folder: Path, pieces: Sequence[str]) -> Plugin:
    members = [(f"{number}.txt", piece.encode()) for number, piece in enumerate(pieces)]
    return WebDataset(path=tar(folder / "a.tar", members), text="txt")


PICTURES: tuple[Callable[[Path, Sequence[Row]], Plugin], ...] = (
    folder_csv, folder_jsonl, folder_classes, path_list, parquet_bytes, parquet_struct, parquet_paths,
    parquet_shards, arrow_file, arrow_stream, feather_file, webdataset, webdataset_plain, pairs_jsonl,
    pairs_json, pairs_csv, pairs_tsv, pairs_parquet, hub_parquet, hub_streaming, hub_saved, hub_pictures,
    coco, flickr30k, imagenet, pack_parquet, pack_tar,
)  # fmt: skip
TEXTS: tuple[Callable[[Path, Sequence[str]], Plugin], ...] = (
    text_lines, text_paragraphs, text_files, text_gz, text_jsonl, text_parquet, parquet_text, webdataset_text,
)  # fmt: skip
"""What writes a layout into a folder that is not there yet, and returns the source that reads it."""


def write_all(folder: Path, *, changed: bool = False) -> dict[str, Plugin]:
    """Write every layout into a folder of its name; returns the sources that read them.

    Args:
        folder: where to write.
        changed: let one picture, or one piece of prose, be another.
    """
    made, pieces = rows(changed), [*PROSE[:3], "Other." if changed else PROSE[3]]
    found = {write.__name__: write(folder / write.__name__, made) for write in PICTURES}
    return found | {write.__name__: write(folder / write.__name__, pieces) for write in TEXTS}


if __name__ == "__main__":
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for layout, source in write_all(Path(sys.argv[1])).items():
        sys.stdout.write(f"{layout}: {source!r}\n")
