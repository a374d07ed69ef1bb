"""The command line: the installed stages, and run, recipes, plugins, doctor.

Heavy modules are imported inside the commands, so that --help answers at once.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from beitctl import catalog, datacommand, failures, launch, registry
from beitctl.errors import Stopped, UserError
from beitctl.planning import command as planning

if TYPE_CHECKING:
    from types import FrameType

    from beitctl.pipeline import Options, Pipeline, Ranks
    from beitctl.recipe import Recipe

STAGES = "beitctl.stages"


@dataclass
class Terminal:
    """One call of the program."""

    arguments: tuple[str, ...]
    quiet: bool = False
    ended: bool = False
    """Whether the end event of --json is written."""

    @property
    def json(self) -> bool:
        """Whether a command that runs stages was asked for records on stdout."""
        others = {"recipes", "plugins", "doctor", "data", "plan"}
        words = [word for word in self.arguments if not word.startswith("-")]
        return "--json" in self.arguments and not others & set(words[:1])


class Stages(TyperGroup):
    """The commands below and one per installed stage; a stage is imported when it is shown or run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Stages in the order of the work, those of others after them, then the commands."""
        stages, refused = _stage_names()
        return [*stages, *super().list_commands(ctx), *refused]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, made for a stage when it is asked for."""
        stages, refused = _stage_names()
        return (
            _stage_command(cmd_name) if cmd_name in stages + refused else super().get_command(ctx, cmd_name)
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; stages count when a similar name is looked for."""
        known = dict(self.commands)
        stages = [name for name in _stage_names()[0] if name not in args[:1]]
        self.commands = {**known, **dict.fromkeys(stages, self.commands["run"])}
        try:
            return super().resolve_command(ctx, args)
        finally:
            self.commands = known


app = typer.Typer(
    cls=Stages,
    name="beitctl",
    help="Pretrain the BEiT family: BEiT-3 from a folder of pictures to an exported model.",
    epilog="Start with: beitctl doctor, then beitctl run tiny",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(catalog.recipes, name="recipes")
app.add_typer(catalog.plugins, name="plugins")
app.add_typer(datacommand.data, name="data")
app.command("doctor")(catalog.check_environment)
app.command("plan")(planning.plan)

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="Recipe to use; by default beitctl.toml in this folder."
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting; VALUE is TOML. KEY+=X appends, KEY=! removes. Repeatable.",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to work in.")]
GpusOption = Annotated[int, typer.Option("--gpus", metavar="N", help="Processes to start, one per GPU.")]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Try it out: toy sizes, a few steps, data that come with beitctl.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Records for scripts on stdout, one JSON a line.")]


def main() -> None:
    """Entry point: runs the command of ``sys.argv`` and exits with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    code = execute(sys.argv[1:])
    if launch.world(os.environ) > 1:
        # without finalizers: after a failure leaving the group in order would take all the other ranks, and
        # after success threads of the collectives now and then end the process with SIGABRT
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def execute(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code, with every error told on stderr."""
    terminal = Terminal(tuple(arguments))
    code = 0
    try:
        app(args=list(arguments), prog_name="beitctl", obj=terminal)
    except BaseException as error:
        code = failures.show(error)
    try:
        if code and terminal.json and not terminal.ended and failures.rank() == 0:
            from beitctl.pipeline import write_event

            write_event("end", status="stopped" if code in (75, 130) else "failed", exit=code, metrics={})
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads any more: that is no error of ours
        code = code or 1
    return code


def _terminated(number: int, frame: "FrameType | None") -> None:
    """End with 75, and by no exception that a plugin or what surrounds it would catch."""
    if failures.rank() == 0:
        os.write(2, b"stopped by SIGTERM; the same command goes on where this one ended\n")
    raise SystemExit(Stopped.exit_code)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"beitctl {metadata.version('beitctl')}\n")
        raise typer.Exit


@app.callback()
def _everywhere(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
) -> None:
    if debug:
        os.environ["BEITCTL_DEBUG"] = "1"
    context.obj.quiet = quiet


def _stage_names() -> tuple[list[str], list[str]]:
    """Names of the stages, built-in ones first; and of those that have the name of a command, with origin."""
    order = ("train-tokenizer", "tokenize-images", "pretrain", "finetune", "eval", "export")
    names = registry.names(STAGES)
    usable = [name for name in names if name not in catalog.COMMANDS]
    refused = [f"{name} ({registry.origin(STAGES, name)})" for name in names if name in catalog.COMMANDS]
    return sorted(usable, key=lambda name: order.index(name) if name in order else len(order)), refused


def _stage_command(label: str) -> Any:
    """The command of a stage; one that only tells what is wrong if the stage cannot be used."""
    name = label.partition(" ")[0]
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command(  # noqa: PLR0913 - one parameter per option
        context: typer.Context,
        recipe: RecipeOption = None,
        settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
        out: OutOption = None,
        gpus: GpusOption = 1,
        resume: Annotated[
            bool,
            typer.Option(
                "--resume/--no-resume", help="Go on with a run that was stopped, use one that is done."
            ),
        ] = True,
        only: Annotated[
            str | None,
            typer.Option("--only", metavar="NAME", help="The one table to run, of several of this stage."),
        ] = None,
        smoke: SmokeOption = False,
        verify: Annotated[bool, typer.Option("--verify", help="Check what a finished run left.")] = False,
        dry_run: DryOption = False,
        as_json: JsonOption = False,
    ) -> None:
        catalog.plugin(STAGES, name)
        found, keys = _stage_tables(name, recipe, settings, only, smoke=smoke)
        if out is not None and len(keys) > 1:
            raise UserError(
                f"--out names one folder, but {found.name} has {', '.join(keys)}; choose one with --only"
            )
        if verify:
            return _show(catalog.verified(found, keys, out), as_json)
        if dry_run:
            return _show({key: found.tables[key].plugin.plan() for key in keys}, as_json)
        _launched(context, gpus)
        options = _options(context, found, as_json, out=out, resume=resume)
        _run_stage(context, _pipeline(found, options), keys)

    single.command(label, help=catalog.stage_help(name))(command)
    return typer.main.get_command(single)


def _stage_tables(
    stage: str, recipe: str | None, settings: Sequence[str], only: str | None, *, smoke: bool
) -> tuple["Recipe", list[str]]:
    """The recipe, at toy size if asked for, and the keys of its tables of a stage that are to run."""
    found = _load(recipe, [] if smoke else settings, stage)
    keys = _chosen(found, stage, only)
    if smoke:
        from beitctl.smoke import shrunk

        found = shrunk(found, stage, keys, settings)
    return found, keys


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


def _load(name: str | None, settings: Sequence[str], stage: str | None = None) -> "Recipe":
    from beitctl.recipe import load

    found = load(name, settings, stage=stage)
    for table in found.tables.values():
        catalog.plugin(STAGES, table.stage)
    return found


def _launched(context: typer.Context, gpus: int) -> None:
    """Start one process per GPU if more than one is asked for, and end with their exit code."""
    if launch.needed(gpus, os.environ):
        context.obj.ended = True  # rank 0 writes it
        raise typer.Exit(launch.run(gpus, context.obj.arguments))


def _options(
    context: typer.Context, recipe: "Recipe", as_json: bool, *, out: Path | None = None,
    root: Path | None = None, resume: bool = True,
) -> "Options":  # fmt: skip
    from beitctl import pipeline, runs

    terminal = context.obj
    return pipeline.Options(
        root=root or runs.root() / recipe.name,
        out=out,
        resume=resume,
        json=as_json,
        quiet=terminal.quiet,
        command=("beitctl", *terminal.arguments),
    )


def _pipeline(recipe: "Recipe", options: "Options") -> "Pipeline":
    from beitctl import pipeline

    ranks: Ranks = pipeline.Alone()
    if launch.world(os.environ) > 1:
        from beitctl.engine import dist

        ranks = dist.start()
    return pipeline.Pipeline(recipe, options, ranks, _write_page)


def _write_page(folder: Path) -> None:
    from beitctl.report import page

    page.write(folder)


@contextlib.contextmanager
def _together(context: typer.Context, pipeline: "Pipeline") -> Iterator[None]:
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
            dist.Ranks.stop()


def _run_stage(context: typer.Context, pipeline: "Pipeline", keys: Sequence[str]) -> None:
    with _together(context, pipeline):
        pipeline.stage(keys)
    if not pipeline.ranks.main:
        return
    folders = [pipeline.folders[key] for key in keys]
    if not pipeline.options.json:
        sys.stdout.write("".join(f"{folder}\n" for folder in folders))
    if not pipeline.options.quiet:
        sys.stderr.write(_next_step(pipeline, keys[-1], folders[-1]) + "\n")


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


@app.command("run")
def _run(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or file of a recipe.")],
    settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    out: OutOption = None,
    gpus: GpusOption = 1,
    force: Annotated[bool, typer.Option("--force", help="Run everything again, also what is done.")] = False,
    until: Annotated[str | None, typer.Option("--until", metavar="KEY", help="Last table to run.")] = None,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run all stages of a recipe in order, except those that are done."""
    from beitctl.pipeline import write_event, write_summary

    found = _load(recipe, settings)
    if dry_run:
        return _show({key: table.plugin.plan() for key, table in found.tables.items()}, as_json)
    _launched(context, gpus)
    pipeline = _pipeline(found, _options(context, found, as_json, root=out, resume=not force))
    with _together(context, pipeline):
        pipeline.everything(until)
    if not pipeline.ranks.main:
        return
    context.obj.ended = False
    summary = write_summary(pipeline, _write_pipeline_page)
    root = pipeline.options.root
    if as_json:
        write_event("summary", recipe=found.name, dir=str(root), summary=summary, report="report.html")
    else:
        sys.stdout.write(f"{root / 'summary.json'}\n")
    if not context.obj.quiet:
        sys.stderr.write(f"report: {root / 'report.html'}\n")


def _write_pipeline_page(folder: Path, run_folders: Sequence[Path]) -> None:
    from beitctl.report import page

    page.write_pipeline(folder, run_folders)


def _show(found: dict[str, Any], as_json: bool) -> None:
    """Print what stages would do, or what their finished runs were found to hold, by the keys of tables."""
    from beitctl import plans
    from beitctl.report.events import plain

    plans.show(plain(found), as_json=as_json)
