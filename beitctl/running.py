"""What the commands that run stages do: find the tables, start processes or a job, run, say what follows.

Heavy modules are imported inside the functions, so that --help answers at once.
"""
# ruff: noqa: PLC0415

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from beitctl import catalog, launch, limits, submit
from beitctl.errors import UserError

if TYPE_CHECKING:
    from beitctl.pipeline import Options, Pipeline, Ranks
    from beitctl.recipe import Recipe


def load(name: str | None, settings: Sequence[str], stage: str | None = None) -> "Recipe":
    """A recipe whose stages can all be used."""
    from beitctl.recipe import load

    found = load(name, settings, stage=stage)
    for table in found.tables.values():
        catalog.plugin(catalog.STAGES, table.stage)
    return found


def stage_tables(
    stage: str, recipe: str | None, settings: Sequence[str], only: str | None, *, smoke: bool
) -> tuple["Recipe", list[str]]:
    """The recipe, at toy size if asked for, and the keys of its tables of a stage that are to run."""
    found = load(recipe, [] if smoke else settings, stage)
    keys = _chosen(found, stage, only)
    if smoke:
        from beitctl.smoke import shrunk

        found = shrunk(found, stage, keys, settings)
    return found, keys


def requirements(recipe: "Recipe", keys: Sequence[str], conditions: Sequence[str]) -> list[str]:
    """What ``--require`` means as ``--set``.

    Raises:
        UserError: a table is of a stage that measures nothing.
    """
    for key in keys:
        if "require" not in getattr(recipe.tables[key].plugin, "__pydantic_fields__", {}):
            raise UserError(
                f"--require: the stage {recipe.tables[key].stage} measures nothing that a condition could be "
                "about; use it with finetune or eval"
            )
    return [f"{key}.require+={json.dumps(condition)}" for key in keys for condition in conditions]


def _chosen(found: "Recipe", stage: str, only: str | None) -> list[str]:
    """Keys of the tables of a stage, or the one that ``--only`` names."""
    keys = [key for key, table in found.tables.items() if table.stage == stage]
    if not keys:
        there = ", ".join(found.tables)
        raise UserError(
            f"{found.path} has no table [{stage}]; it has {there}. Add one, or use another recipe"
        )
    if only is None:
        return keys
    chosen = [key for key in keys if only in (key, key.partition(".")[2])]
    if not chosen:
        names = ", ".join(key.partition(".")[2] or key for key in keys)
        raise UserError(f"--only {only}: {found.name} has no such table of {stage}; it has {names}")
    return chosen


def check_places(recipe: "Recipe", keys: Sequence[str], out: Path | None, allow: Sequence[str]) -> None:
    """Refuse --out for several tables, and --allow without a run or for what no run can go on with."""
    if out is not None and len(keys) > 1:
        raise UserError(
            f"--out names one folder, but {recipe.name} has {', '.join(keys)}; choose one with --only"
        )
    if allow and out is None:
        raise UserError(
            f"--allow {allow[0]} needs --out DIR, the folder of the run that is to go on: without it other "
            "settings and other data make another run"
        )
    if allow and out is not None:
        from beitctl import drift, runs

        run = runs.read(out)
        if run is None:
            raise UserError(f"--out {out}: holds no run that --allow could let go on; check the path")
        drift.refuse_unknown(recipe.tables[keys[0]], run, allow)


def check_until(recipe: "Recipe", until: str) -> None:
    """Refuse --until a table that is not there."""
    if until not in recipe.tables:
        raise UserError(f"--until {until}: {recipe.name} has the tables {', '.join(recipe.tables)}")


def processes(
    context: typer.Context, recipe: "Recipe", request: submit.Request, max_time: str | None, *,
    where: submit.Scheduler | None, logs: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Submit a job, or start one process per GPU, if either is asked for, and end with what came of it.

    A process that does the work itself arms the clock of ``--max-time`` instead.
    """
    moment = limits.deadline(max_time, os.environ)
    if where is not None:
        return _submitted(context, recipe, request, logs, as_json)
    request.refuse_alone()
    if launch.needed(request.gpus, os.environ):
        context.obj.ended = True  # rank 0 writes it
        if moment is not None:
            os.environ[limits.DEADLINE] = str(moment)
        raise typer.Exit(launch.run(request.gpus or 1, context.obj.arguments))
    if moment is not None:
        limits.stop_at(moment)
    return None


def check_shards(recipe: "Recipe", keys: Sequence[str], request: submit.Request, *, job: bool) -> None:
    """Refuse groups of ``shard_ranks`` that do not divide the processes, before any of them is started.

    Processes that torchrun or Slurm has started find it out together.

    Raises:
        UserError: names the setting and the number of processes.
    """
    from beitctl import settings

    if request.world < 1 or (not job and launch.world(os.environ) > 1):
        return
    for key in keys:
        flat = settings.flat(recipe.tables[key].plugin)
        for place in settings.trainings(recipe.tables[key].plugin):
            shard = flat[f"{place}.shard_ranks"]
            if shard and request.world % shard:
                raise UserError(
                    f"{key}.{place}.shard_ranks ({shard}) must divide the number of processes, "
                    f"{request.world} (--nodes x --gpus); change one of them"
                )


def check_unused(
    option: str, request: submit.Request, max_time: str | None, where: submit.Scheduler | None
) -> None:
    """Check what is said about processes and jobs where ``option`` starts none.

    Raises:
        UserError: it would be refused without ``option`` too, or there is a job to submit.
        SetupError: there are not as many GPUs.
    """
    if where is not None:
        raise UserError(f"--submit {where.value} runs no {option}: leave one of them out")
    request.refuse_alone()
    limits.deadline(max_time, os.environ)
    launch.needed(request.gpus, os.environ)


def _submitted(
    context: typer.Context, recipe: "Recipe", request: submit.Request, logs: Path | None, as_json: bool
) -> None:
    from beitctl import runs

    folder = (logs or runs.root() / recipe.name) / runs.SLURM
    arguments = context.obj.arguments
    made = submit.submit(request, arguments, f"beitctl-{recipe.name}", folder)
    if as_json:
        from beitctl.pipeline import write_event

        write_event("submitted", recipe=recipe.name, **submit.record(made, arguments))
    else:
        sys.stdout.write(f"{made.job}\n")
    if not context.obj.quiet:
        sys.stderr.write(
            f"job {made.job} is submitted; it comes back by itself until it is done\n"
            f"log: {made.logs}   script: {made.script}   cancel: scancel {made.job}\n"
        )
    raise typer.Exit(0)


def options(
    context: typer.Context, recipe: "Recipe", as_json: bool, *, out: Path | None = None,
    root: Path | None = None, resume: bool = True, allow: Sequence[str] = (),
) -> "Options":  # fmt: skip
    """How tables are run."""
    from beitctl import pipeline, runs

    terminal = context.obj
    return pipeline.Options(
        root=root or runs.root() / recipe.name,
        out=out,
        resume=resume,
        json=as_json,
        quiet=terminal.quiet,
        command=("beitctl", *terminal.arguments),
        allow=tuple(allow),
    )


def pipeline(recipe: "Recipe", options: "Options") -> "Pipeline":
    """One use of a recipe, by as many processes as there are."""
    from beitctl import pipeline

    ranks: Ranks = pipeline.Alone()
    if launch.world(os.environ) > 1:
        from beitctl.engine import dist

        ranks = dist.start()

    def memory_hint(key: str) -> str:
        from beitctl.planning import hint

        return hint.memory(recipe, key, ranks.world)

    return pipeline.Pipeline(recipe, options, ranks, write_page, memory_hint)


def write_page(folder: Path) -> None:
    """Write the report of a run."""
    from beitctl.report import page

    page.write(folder)


def write_pipeline_page(folder: Path, run_folders: Sequence[Path]) -> None:
    """Write the report of all runs of a recipe."""
    from beitctl.report import page

    page.write_pipeline(folder, run_folders)


@contextlib.contextmanager
def together(context: typer.Context, pipeline: "Pipeline") -> Iterator[None]:
    """Run tables on all ranks and then leave the process group, if a stage has joined one."""
    orderly = pipeline.ranks.world == 1
    try:
        yield
        pipeline.ranks.barrier()
        orderly = True
    finally:
        context.obj.ended = pipeline.ended
        dist = sys.modules.get("beitctl.engine.dist")
        if dist is not None and orderly:
            dist.leave()


def run_stage(context: typer.Context, pipeline: "Pipeline", keys: Sequence[str]) -> None:
    """Run tables of one stage; tells their folders, and what follows."""
    with together(context, pipeline):
        pipeline.stage(keys)
    if not pipeline.ranks.main:
        return
    folders = [pipeline.folders[key] for key in keys]
    if not pipeline.options.json:
        sys.stdout.write("".join(f"{folder}\n" for folder in folders))
    if not pipeline.options.quiet:
        sys.stderr.write(_next_step(pipeline, keys[-1], folders[-1]) + "\n")


def run_recipe(context: typer.Context, pipeline: "Pipeline", until: str | None) -> None:
    """Run all tables of a recipe; writes and tells the summary."""
    from beitctl.pipeline import write_event, write_summary

    with together(context, pipeline):
        pipeline.everything(until)
    if not pipeline.ranks.main:
        return
    context.obj.ended = False
    summary = write_summary(pipeline, write_pipeline_page)
    root = pipeline.options.root
    if pipeline.options.json:
        name = pipeline.recipe.name
        write_event("summary", recipe=name, dir=str(root), summary=summary, report="report.html")
    else:
        sys.stdout.write(f"{root / 'summary.json'}\n")
    if not pipeline.options.quiet:
        sys.stderr.write(f"report: {root / 'report.html'}\n")


def _next_step(pipeline: "Pipeline", key: str, folder: Path) -> str:
    """What to do after a stage."""
    recipe = pipeline.recipe
    following = list(recipe.tables)[list(recipe.tables).index(key) + 1 :]
    look = f"report: {folder / 'report.html'}"
    if not following or any(word.startswith("--set") for word in pipeline.options.command):
        return look  # what --set changed would have to be said again, in terms of the next table
    table = recipe.tables[following[0]]
    only = f" --only {table.key.partition('.')[2]}" if "." in table.key else ""
    return f"{look}   next: beitctl {table.stage} --recipe {_given(recipe)}{only}"


def _given(recipe: "Recipe") -> str:
    """How the recipe is named on a command line: bundled ones by name."""
    from beitctl.recipe import find, names

    bundled = recipe.name in names() and find(recipe.name) == recipe.path
    return recipe.name if bundled else str(recipe.path)


def plans(recipe: "Recipe", keys: Sequence[str]) -> dict[str, Any]:
    """What the stages of some tables would do, by key."""
    return {key: recipe.tables[key].plugin.plan() for key in keys}


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print what stages would do, or what their finished runs were found to hold, by the keys of tables."""
    from beitctl import plans
    from beitctl.report.events import plain

    plans.show(plain(found), as_json=as_json)
