"""The commands ``beitctl data``: check, peek, pack and index what lies at a path.

Their modules are imported inside the commands, so that --help answers at once.
"""
# ruff: noqa: PLC0415

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitctl.errors import Interrupted, UserError

if TYPE_CHECKING:
    from beitctl.api import TextTokenizer
    from beitctl.inspecting.finding import Found

data = typer.Typer(
    help="See what a file or folder holds, and make fast shards of it.",
    epilog="PATH is a file, a folder, or 'embedded': the data that come with beitctl. See docs/data.md.",
    no_args_is_help=True,
)

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="File or folder; 'embedded': the data that come with beitctl.")
]
KindOption = Annotated[
    str | None, typer.Option("--kind", metavar="KIND", help="Source to read it with; by default the surest.")
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting of the source; VALUE is TOML. Repeatable."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, max=256, help="Threads; by default one per core."),
]
ShareOption = Annotated[
    float,
    typer.Option(
        "--max-bad-share", metavar="SHARE", min=0, max=1,
        help="Largest share of broken examples; above it the exit code is 3.",
    ),
]  # fmt: skip


class Format(StrEnum):
    """Formats of shards."""

    parquet = "parquet"
    tar = "tar"


@data.command("check")
def _check(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    path: PathArgument,
    kind: KindOption = None,
    settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Look at N examples only, evenly spread."),
    ] = None,
    workers: WorkersOption = None,
    max_bad_share: ShareOption = 0.001,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what is there: layout, counts, sizes, classes, captions, and what is broken, twice or left out."""
    from beitctl.inspecting import checking, showing
    from beitctl.report.naming import printable

    quiet = context.obj.quiet
    found = _found(path, kind, settings)
    try:
        report = checking.check(
            found, found.open(), limit=limit, workers=workers or _cores(), quiet=quiet or as_json
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    if as_json:
        sys.stdout.write(json.dumps({"path": path, **report}) + "\n")
    else:
        showing.show(report)
    sys.stdout.flush()
    checking.refuse(report, path, max_bad_share)
    if not quiet:
        say = _again(path, kind, settings)
        sys.stderr.write(f"next: beitctl data peek {say}, or put into a recipe: {printable(found.line)}\n")


@data.command("peek")
def _peek(
    context: typer.Context,
    path: PathArgument,
    kind: KindOption = None,
    settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="PNG to write.")] = Path("sheet.png"),
    count: Annotated[
        int, typer.Option("--count", metavar="N", min=1, max=200, help="Examples to show, at most 200.")
    ] = 24,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Choose at random by this seed, instead of evenly spread."),
    ] = None,
) -> None:
    """Draw a contact sheet: pictures with id, class and first caption."""
    from beitctl.inspecting.sheet import sheet
    from beitctl.replacing import replace_file

    if out.is_dir():
        raise UserError(
            f"--out {out}: a folder, but it must be the file to write, such as {out / 'sheet.png'}"
        )
    found = _found(path, kind, settings)
    try:
        replace_file(out, sheet(found.open(), path, count=count, seed=seed))
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    sys.stdout.write(f"{out}\n")
    if not context.obj.quiet:
        sys.stderr.write(f"next: beitctl data check {_again(path, kind, settings)}\n")


@data.command("pack")
def _pack(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the shards.")],
    kind: KindOption = None,
    settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    px: Annotated[
        int,
        typer.Option(
            "--px", metavar="N", min=1, help="Shrink pictures to this short side; none is enlarged."
        ),
    ] = 256,
    quality: Annotated[int, typer.Option("--quality", metavar="N", min=1, max=100, help="Of JPEG.")] = 90,
    format: Annotated[Format, typer.Option("--format", help="Kind of shards.")] = Format.parquet,
    shard_mib: Annotated[
        int, typer.Option("--shard-mib", metavar="N", min=1, help="Size of a shard, about.")
    ] = 256,
    workers: WorkersOption = None,
    max_bad_share: ShareOption = 0.001,
) -> None:
    """Write small pictures with all that belongs to them as Parquet or tar shards, which are read fast."""
    from beitctl.inspecting import sharding
    from beitctl.inspecting.finding import recipe_line
    from beitctl.inspecting.showing import size
    from beitctl.report.naming import printable

    quiet = context.obj.quiet
    found = _found(path, kind, settings)
    done = sharding.write(
        found,
        found.open(),
        out,
        sharding.Settings(px, quality, format.value, shard_mib * 2**20),
        sharding.Limits(workers or _cores(), max_bad_share, quiet),
    )
    sys.stdout.write(f"{out}\n")
    if quiet:
        return
    lost = done["left_out"] + done["left_out_by_source"]
    count = len(done["shards"])
    sys.stderr.write(
        f"{done['packed']:,} examples in {count:,} shard{'s' if count > 1 else ''}, {size(done['bytes'])}"
        + (f"; {lost:,} left out, see {out / 'left-out.jsonl'}" if lost else "")
        + "\n"
    )
    table = {"path": str(out), **done["read"]}
    line = recipe_line(table.pop("kind"), table)
    sys.stderr.write(
        f"next: beitctl data check {_again(str(out))}, or put into a recipe: {printable(line)}\n"
    )


@data.command("index")
def _index(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="imagenet, nlvr2, vqav2, coco-captioning, coco-retrieval, flickr30k or nocaps.",
        ),
    ],
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder of the data set: annotations and pictures.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the index files.")],
    splits: Annotated[
        list[str], typer.Option("--split", metavar="SPLIT", help="Write this part only. Repeatable.")
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="FILE", help="Write ids of this text tokenizer in place of texts."
        ),
    ] = None,
    rest_val: Annotated[
        int,
        typer.Option("--rest-val", metavar="N", min=1, help="vqav2: pictures of val to keep for validation."),
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="vqav2: chooses those pictures.")] = 0,
    max_bad_share: Annotated[
        float,
        typer.Option(
            "--max-bad-share", metavar="SHARE", min=0, max=1, help="Largest share of unusable rows."
        ),
    ] = 0.01,
) -> None:
    """Write the index files of BEiT-3's fine-tuning code from published annotations."""
    from beitctl.inspecting import indexing

    quiet = context.obj.quiet
    settings = indexing.Settings(
        tuple(dict.fromkeys(splits)), _text_tokenizer(tokenizer), rest_val, seed, max_bad_share, quiet
    )
    try:
        note = indexing.write(task, path, out, settings)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; files that are there are whole, give the same command again"
        ) from None
    sys.stdout.write(f"{out}\n")
    lost = {name: found["count"] for name, found in note["left_out"].items()}
    for name, count in lost.items():
        sys.stderr.write(f"{name}: {count:,} left out, see {out / indexing.NOTE}\n")
    for name, count in note.get("without_known_answer", {}).items():
        sys.stderr.write(f"{name}: {count:,} questions without an answer of the vocabulary dropped\n")
    if not quiet:
        sys.stderr.write("".join(f"{count:>11,} {name}\n" for name, count in note["rows"].items()))
        first = next(name for name in note["rows"] if name != indexing.ANSWERS)
        again = _again(
            str(path), "beit3-index", [f"index={json.dumps(str(out.resolve()))}", f'files=["{first}"]']
        )
        sys.stderr.write(f"next: beitctl data check {again}\n")


def _text_tokenizer(path: Path | None) -> "TextTokenizer | None":
    """The tokenizer of ``--tokenizer``.

    Raises:
        UserError: it is none of texts.
        DataError: there is none.
    """
    if path is None:
        return None
    from beitctl.checkpoints.native import load_tokenizer

    found = load_tokenizer(path)
    if not hasattr(found, "start_id"):
        raise UserError(f"--tokenizer {path}: reads pictures, but it must be a tokenizer of texts")
    tokenizer: TextTokenizer = found
    return tokenizer


def _found(path: str, kind: str | None, settings: list[str]) -> "Found":
    """The source that reads a path; what could not be asked, and what fits as well, is said on stderr."""
    from beitctl.inspecting import finding

    found = finding.find(path, kind, settings)
    sys.stderr.write("".join(f"{line}\n" for line in found.warnings))
    if found.also:
        others = " and ".join(found.also)
        sys.stderr.write(
            f"{path} fits {found.kind} and {others} alike: read as {found.kind}; --kind changes that\n"
        )
    return found


def _again(path: str, kind: str | None = None, settings: list[str] | tuple[str, ...] = ()) -> str:
    """Path and options of the source, to be pasted into a shell."""
    words = [path, *(["--kind", kind] if kind else [])]
    for text in settings:
        words += ["--set", text]
    return shlex.join(words)


def _cores() -> int:
    """Cores that this process may use."""
    return min(len(os.sched_getaffinity(0)), 32) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
