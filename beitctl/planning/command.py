"""The command ``beitctl plan``; its modules are imported inside it, so that --help answers at once."""
# ruff: noqa: PLC0415

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from beitctl.engine.measuring.gpus import CARDS, Gpu, named
from beitctl.errors import CapacityError, UserError

if TYPE_CHECKING:
    from beitctl.recipe import Recipe, StageTable

STAGES = ("pretrain", "finetune")


def plan(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="NAME|FILE", help="Recipe to use; by default beitctl.toml in this folder."
        ),
    ] = None,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; VALUE is TOML. Repeatable."),
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="TABLE", help="The table to plan, of several; also one of finetune."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="|".join(CARDS), help="What they are; by default what this machine has."
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1, help="Share of the nominal peak that is reached.")
    ] = 0.4,
    caption_tokens: Annotated[
        int, typer.Option("--caption-tokens", metavar="N", min=2, help="Mean length of a caption.")
    ] = 24,
    exactly: Annotated[
        bool,
        typer.Option("--exact", help="Also count the memory tensor by tensor; takes a minute, needs no GPU."),
    ] = False,
    require_fit: Annotated[
        bool, typer.Option("--require-fit", help="Exit with 5 if it does not fit, else it is only told.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what a training needs: parameters, FLOPs, memory, time, disk, network, pictures per second."""
    from beitctl.planning import estimate, exact, text, work
    from beitctl.recipe import load

    card = here() if gpu is None else _known(gpu)
    found = load(recipe, settings, stage="pretrain")
    table = _table(found, only)
    if require_fit and card is None:
        raise UserError(f"--require-fit needs a known GPU; say --gpu {'|'.join(CARDS)}")
    made = estimate.estimate(
        found, work.work_of(found, table, caption_tokens), estimate.Asked(gpus, card, mfu)
    )
    if exactly:
        made["exact"] = exact.counted(recipe, settings, table.key, gpus, caption_tokens)
    sys.stdout.write(json.dumps(made) + "\n" if as_json else text.text(made))
    sys.stdout.flush()
    if require_fit and not made["memory"]["fits"]:
        fixes = f"; one of these makes it fit: {'; '.join(made['fixes'])}" if made["fixes"] else ""
        raise CapacityError(made["problems"][0] + fixes)
    if require_fit and made["problems"]:
        raise UserError("; ".join(made["problems"]))
    if not (context.obj.quiet or as_json or made["problems"]):
        sys.stderr.write(_next(table, recipe or str(found.path), settings))


def _next(table: "StageTable", recipe: str, settings: Sequence[str]) -> str:
    """The command that follows, with what was set for this one."""
    name = table.key.partition(".")[2]
    words = ["beitctl", table.stage, "--recipe", recipe, *(["--only", name] if name else [])]
    words += [word for setting in settings for word in ("--set", setting)]
    return f"next: {shlex.join([*words, '--dry-run'])}\n"


def _known(gpu: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UserError: its figures are not known.
    """
    if gpu not in CARDS:
        raise UserError(
            f"--gpu {gpu}: its figures are not known, only those of {', '.join(CARDS)}; leave --gpu out: "
            "time, and whether it fits, are then not told, the rest is"
        )
    return Gpu(gpu)


def _table(recipe: "Recipe", only: str | None) -> "StageTable":
    """The one table to plan.

    Raises:
        UserError: there is none, or there are several and none is named.
    """
    tables = {key: table for key, table in recipe.tables.items() if table.stage in STAGES}
    if only is not None:
        chosen = [table for key, table in tables.items() if only in (key, key.partition(".")[2])]
        if len(chosen) == 1:
            return chosen[0]
        names = ", ".join(tables) or "none"
        raise UserError(
            f"--only {only}: {recipe.name} has {'several' if chosen else 'no'} such table to plan; "
            f"say one of {names}"
        )
    pretrain = [table for table in tables.values() if table.stage == "pretrain"]
    if not pretrain:
        raise UserError(
            f"{recipe.path} has no table [pretrain]; it has {', '.join(recipe.tables) or 'none'}. Add one, "
            "use another recipe, or name a finetune table with --only"
        )
    if len(pretrain) > 1:
        raise UserError(
            f"{recipe.name} has {', '.join(table.key for table in pretrain)}; choose one with --only"
        )
    return pretrain[0]


def here() -> Gpu | None:
    """The GPU of this machine, if it has one whose figures are known."""
    import torch

    return named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
