"""Data sets of the Hugging Face Hub."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from beitctl.api import Plugin
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.progress import on_terminal
from beitctl_plugins.sources.opened import Opened, check_share
from beitctl_plugins.sources.reading import hub_rows, table_files, table_rows
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.hub_files import Streamed, Urls
from beitctl_plugins.sources.reading.names import CAPTION_COLUMNS, TEXT_COLUMNS
from beitctl_plugins.sources.reading.rows import Files
from beitctl_plugins.sources.reading.table_files import InGroups, one_line
from beitctl_plugins.sources.reading.table_rows import Columns, Judge

TIMEOUT = 10.0
"""Seconds to wait for the Hub's first answer."""
CONVERTED = "refs/convert/parquet"
"""Branch where the Hub keeps its own conversion of a data set."""


class Hub(Plugin):
    """A data set of the Hugging Face Hub, downloaded or streamed, or a local one that ``datasets`` reads.

    Columns that are left empty are guessed from the features: the first picture, else the text; a caption if
    there is a picture; a class label. An example is named by its row, as in ``train[12]``. Streaming reads
    the Parquet files row group by row group, in the same exact order and without a buffer; rows without a
    picture then show when they are read.
    """

    dataset: str
    """Name on the Hub, such as ``nlphuji/flickr30k``, or a folder, also one of ``save_to_disk``."""
    name: str = ""
    """Configuration, for data sets that have several."""
    split: str = "train"
    """Which part."""
    revision: str = ""
    """Branch, tag or commit; name a commit for a run that can be repeated. Empty: the newest."""
    streaming: bool = False
    """Whether to read over the network while training, and download nothing."""
    image: str = ""
    """Column of the pictures."""
    caption: str = ""
    """Column of the captions; if it is named, rows without are unusable."""
    label: str = ""
    """Column of the class; if it is named, rows without are unusable."""
    text: str = ""
    """Column of prose; if it is named and ``image`` is not, pictures are left out."""
    id: str = ""
    """Column with a name for each example; empty: the number of the row."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.dataset.strip():
            raise ValueError("dataset is empty; give a name on the Hub or a folder")
        if self.streaming and self.id:
            raise ValueError("id needs all rows at the beginning; remove it, or set streaming to false")
        return self

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders that ``save_to_disk`` wrote."""
        if all(os.path.isfile(path / name) for name in ("state.json", "dataset_info.json")):
            return 6, {"dataset": str(path)}
        try:
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            split = "train" if "train" in splits else str(splits[0])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return 6, {"dataset": str(path)} | ({"split": split} if split != "train" else {})

    def open(self) -> Opened:
        """Download the data set if need be, or read the footers of its files.

        Raises:
            DataError: it is not there, not to be reached, not readable, has no such part or column, or too
                many of its rows are unusable.
        """
        # takes a second, which only this source shall cost
        from datasets import disable_progress_bars  # noqa: PLC0415

        if not on_terminal():
            disable_progress_bars()
        with self._explained():
            return self._stream() if self.streaming else self._download()

    def _download(self) -> Opened:
        data, classes = self._loaded()
        schema = data.features.arrow_schema
        columns = self._columns(data.features, schema)
        table_rows.check_types(self.dataset, schema, columns)
        data = data.select_columns(columns.names())
        judged = replace(columns, label=self.label, need_caption=bool(self.caption))
        judge = Judge(judged, classes.get(columns.label, []), str(self._folder() or ""))
        where = f"{self.dataset}/{self.split}"
        good, lengths, key, problems = hub_rows.judged(data, judge, where)
        check_share(Path(self.dataset), problems, len(good), self.max_bad_share)
        if columns.id and hub_rows.repeated(data, columns.id, good):
            raise DataError(f"{self.dataset}: rows with the same '{columns.id}'; name another column or none")
        files = Files(file["filename"] for file in data.cache_files)
        reader = self._reader(
            columns, classes, lambda names: hub_rows.Loaded(data.select_columns(names), files)
        )
        sized = lengths if columns.caption or columns.text else None
        key = digest(key, judge.named.key(), self._settings(columns))
        return Opened(
            good,  # type: ignore[arg-type]
            reader.example,
            key.hex(),
            problems,
            lengths=sized,
            labelled=reader.label if columns.label else None,
            worded=reader.words if sized is not None else None,
            state=digest(FileHash.of(files).state(), judge.named.state()).hex(),
        )

    def _loaded(self) -> tuple[Any, dict[str, list[str]]]:
        """The data set with encoded pictures, and the names of the classes of its columns."""
        import datasets  # noqa: PLC0415

        folder = self._folder()
        if folder and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                self._need_split(data)
                data = data[self.split]
        else:
            if folder is None:
                self._reach()
            place = str(folder or self.dataset)
            revision = self.revision or None
            data = datasets.load_dataset(place, self.name or None, split=self.split, revision=revision)
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        return data, _classes(data.features)

    def _stream(self) -> Opened:
        from datasets import Features  # noqa: PLC0415

        urls, features = self._parquet_files()
        files = Urls(urls)
        counts = files.index()
        schema = files.schema()
        features = features or Features.from_arrow_schema(schema)
        columns = self._columns(features, schema)
        table_rows.check_types(self.dataset, schema, columns)
        reader = self._reader(columns, _classes(features), lambda names: Streamed(files, counts, names))
        names = [os.path.relpath(url, self.dataset) if "://" not in url else url for url in urls]
        key = digest(*names, files.sizes.tobytes(), counts.tobytes(), self._settings(columns)).hex()
        rows = counts[:, 2].tolist()
        if not sum(rows):
            raise DataError(f"{self.dataset}: no row in '{self.split}'; correct 'split'")
        sizes = files.group_sizes(columns.names())
        return InGroups(
            range(sum(rows)),
            reader.example,
            key,
            shards=[count for count in rows if count],
            window=table_files.window(sizes, rows),
            labelled=reader.label if columns.label else None,
            worded=reader.words if columns.caption or columns.text else None,
            state=key if any("://" in url for url in urls) else FileHash.of(Files(urls)).state(),
            notes=table_files.notes(self.dataset, sizes),
        )

    def _reader(
        self, columns: Columns, classes: Mapping[str, list[str]], rows: Callable[[list[str]], hub_rows.Rows]
    ) -> hub_rows.Reader:
        return hub_rows.Reader(
            f"{self.dataset}/",
            self.split,
            self._folder(),
            columns,
            classes.get(columns.label, []),
            bool(self.caption),
            rows(columns.names()),
            rows(columns.label_names()),
            rows(columns.word_names()),
        )

    def _parquet_files(self) -> tuple[list[str], Any]:
        """Addresses of the Parquet files, and the features if they are known."""
        from datasets import load_dataset_builder  # noqa: PLC0415
        from datasets.packaged_modules.parquet.parquet import Parquet  # noqa: PLC0415

        folder = self._folder()
        if folder is None:
            self._reach()
        elif (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            raise DataError(f"{folder}: is read in place anyway; set streaming to false")
        builder = load_dataset_builder(
            str(folder or self.dataset), self.name or None, revision=self.revision or None
        )
        if not isinstance(builder, Parquet):
            advice = f"set revision = '{CONVERTED}', or " if folder is None and not self.revision else ""
            raise DataError(
                f"{self.dataset}: not made of Parquet files, which streaming needs; {advice}set streaming to "
                "false"
            )
        splits = builder.config.data_files or {}
        self._need_split(splits)
        return [str(url) for url in splits[self.split]], builder.info.features

    def _folder(self) -> Path | None:
        """The local folder that ``dataset`` means, if it does."""
        path = Path(self.dataset).expanduser()
        if path.is_dir():
            return path
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.dataset) or path.exists() or self.dataset[0] in ".~":
            raise DataError(f"{self.dataset}: neither a folder nor a name on the Hub; correct 'dataset'")
        return None

    def _reach(self) -> None:
        """Ask the Hub for the data set once, as ``datasets`` tries for minutes."""
        from huggingface_hub import HfApi, constants  # noqa: PLC0415

        if constants.is_offline_mode():
            return
        api = HfApi()
        found = api.dataset_info(self.dataset, revision=self.revision or None, timeout=TIMEOUT)
        if found.gated:
            api.auth_check(self.dataset, repo_type="dataset")

    def _need_split(self, splits: Iterable[str]) -> None:
        if self.split not in (names := [str(split) for split in splits]):
            raise DataError(f"{self.dataset}: no split '{self.split}'; it has {', '.join(names) or 'none'}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever the libraries raise into a message that helps."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # their builders raise anything
            raise DataError(f"{self.dataset}: {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        from huggingface_hub import constants, errors  # noqa: PLC0415

        text, kind = one_line(error), type(error).__name__
        if isinstance(error, errors.GatedRepoError) or "gated" in text:
            return (
                f"is gated; accept its terms at {constants.ENDPOINT}/datasets/{self.dataset}, then run "
                "`hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision '{self.revision}'; correct 'revision'"
        if isinstance(error, errors.RepositoryNotFoundError):
            return "no such data set on the Hub, or a private one; correct 'dataset', or run `hf auth login`"
        if constants.is_offline_mode() and (kind == "DatasetNotFoundError" or isinstance(error, OSError)):
            return f"not downloaded yet, and HF_HUB_OFFLINE is set; unset it once ({text})"
        # of httpx, httpx2, requests or Python, whichever the installed libraries use
        if {"TransportError", "ConnectionError"} & {base.__name__ for base in type(error).__mro__}:
            return (
                f"{constants.ENDPOINT} cannot be reached ({text or kind}); check the network, or set "
                "HF_HUB_OFFLINE=1 if the data set was downloaded before"
            )
        for sign, setting in (("split", "split"), ("BuilderConfig", "name"), ("Config name", "name")):
            if isinstance(error, ValueError) and sign in text:
                return f"{text.rstrip('.')}; correct '{setting}'"
        if kind in ("DatasetNotFoundError", "DataFilesNotFoundError", "EmptyDatasetError"):
            return f"no data in it that the library datasets reads ({text}); correct 'dataset'"
        return f"cannot be loaded ({kind}: {text})"

    def _columns(self, features: Mapping[str, Any], schema: Any) -> Columns:
        """Columns to read: those that are named, and guesses for the others."""
        from datasets import ClassLabel, Image  # noqa: PLC0415

        kinds = {name: schema.field(name).type for name in schema.names}
        texts = [name for name, kind in kinds.items() if table_rows.is_text(kind)]
        spoken = [*texts, *(name for name, kind in kinds.items() if table_rows.is_list(kind))]
        image, text = self.image, self.text
        if not image and not text:
            pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
            binary = [
                name
                for name in ("image", "img", "jpg", "png")
                if table_rows.is_binary(kinds.get(name, pa.null()))
            ]
            image = next(iter(pictures + binary), "")
            text = "" if image else next((name for name in TEXT_COLUMNS if name in texts), "")
        if not image and not text:
            raise DataError(
                f"{self.dataset}: no column of pictures or prose found among {', '.join(kinds)}; name one as "
                "'image' or 'text'"
            )
        caption = self.caption
        if image and not text and not caption:
            caption = next((name for name in CAPTION_COLUMNS if name in spoken), "")
        classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        label = self.label or next(iter(classes), "label" if "label" in texts else "")
        columns = Columns(image, caption, label, text, self.id)
        if image in texts and self._folder() is None:
            raise DataError(
                f"{self.dataset}: column '{image}' holds paths or addresses, but no pictures; download them, "
                "and read them with the source 'pairs' or 'parquet'"
            )
        return columns

    def _settings(self, columns: Columns) -> str:
        return f"{self.split} {columns.image} {columns.caption} {columns.label} {columns.text} {columns.id}"


def _classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the classes of every column that has some."""
    return {
        name: list(feature.names) for name, feature in features.items() if getattr(feature, "names", None)
    }
