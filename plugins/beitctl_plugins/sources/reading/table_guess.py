"""How a table, or a folder of tables, is read that nobody has described."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beitctl.errors import DataError
from beitctl_plugins.sources.reading import table_files, table_rows
from beitctl_plugins.sources.reading.names import CAPTION_COLUMNS, IMAGE_COLUMNS
from beitctl_plugins.sources.reading.table_files import ENDINGS

GUESS_FILES = 1000


def guess(path: Path) -> tuple[int, dict[str, Any]] | None:
    """How surely a path is a table with pictures or prose, and the settings that read it."""
    file = path if path.is_file() and path.name.lower().endswith(ENDINGS) else _first_table(path)
    if file is None:
        return None
    try:
        schema = table_files.opened(file).schema
    except DataError:
        return 1, {"path": str(path)}
    table = _guessed(schema)
    return 4 if table else 1, {"path": str(path), **table}


def _first_table(folder: Path) -> Path | None:
    """The first table of a folder in which most files are tables; its folders count too, to the second."""
    if not folder.is_dir():
        return None
    try:
        found = itertools.islice(
            itertools.chain(_files(folder), *map(_files, sorted(_folders(folder)))), GUESS_FILES
        )
        names = [path for path in found if not path.name.startswith(".")]
    except OSError:
        return None
    tables = [path for path in names if path.name.lower().endswith(ENDINGS)]
    return min(tables) if len(tables) * 2 > len(names) else None


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        yield from (Path(entry.path) for entry in found if entry.is_file())


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as found:
        return [Path(entry.path) for entry in itertools.islice(found, GUESS_FILES) if entry.is_dir()]


def _guessed(schema: Any) -> dict[str, Any]:
    """Settings for the columns of a table; empty if it has neither pictures nor prose."""
    kinds = {name: schema.field(name).type for name in schema.names}
    pictures = [name for name, kind in kinds.items() if table_rows.is_picture(kind)]
    texts = [name for name, kind in kinds.items() if table_rows.is_text(kind)]
    captions = texts + [name for name, kind in kinds.items() if table_rows.is_list(kind)]
    paths = [name for name in IMAGE_COLUMNS if name in texts and name != "url"]
    image = "image" if "image" in pictures else next(iter([*pictures, *paths]), "")
    if not image:
        return {"text": "text"} if "text" in texts else {}
    table = {} if image == "image" else {"image": image}
    caption = next((name for name in CAPTION_COLUMNS if name in captions), "")
    if caption and caption not in ("caption", "captions"):
        table["caption"] = caption
    label = next(
        (name for name in ("label", "fine_label", "class") if table_rows.class_names(schema, name)), ""
    )
    return {"image": image} | table | ({"label": label} if label else {})
