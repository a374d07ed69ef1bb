"""The command line: the installed stages, and run, recipes, plugins, doctor.

Heavy modules are imported inside the commands, so that --help answers at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from beitctl import catalog, datacommand, failures, launch, registry, running
from beitctl.catalog import STAGES
from beitctl.errors import Stopped
from beitctl.options import (
    AllowOption,
    DryOption,
    GpusOption,
    JsonOption,
    MaxTimeOption,
    NodesOption,
    OnlyOption,
    OutOption,
    PartitionOption,
    RecipeOption,
    RequireOption,
    ResumeOption,
    SetOption,
    SlurmOption,
    SmokeOption,
    SubmitOption,
    TimeOption,
    VerifyOption,
)
from beitctl.planning import command as planning
from beitctl.submit import Request

if TYPE_CHECKING:
    from types import FrameType


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


def main() -> None:
    """Entry point: runs the command of ``sys.argv`` and exits with its code."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _terminated)
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
        name = signal.Signals(number).name
        os.write(2, f"stopped by {name}; the same command goes on where this one ended\n".encode())
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
        allow: AllowOption = [],  # noqa: B006
        gpus: GpusOption = None,
        resume: ResumeOption = True,
        only: OnlyOption = None,
        require: RequireOption = [],  # noqa: B006
        max_time: MaxTimeOption = None,
        smoke: SmokeOption = False,
        verify: VerifyOption = False,
        dry_run: DryOption = False,
        as_json: JsonOption = False,
        where: SubmitOption = None,
        nodes: NodesOption = None,
        partition: PartitionOption = None,
        time: TimeOption = None,
        slurm: SlurmOption = [],  # noqa: B006
    ) -> None:
        catalog.plugin(STAGES, name)
        found, keys = running.stage_tables(name, recipe, settings, only, smoke=smoke)
        if require:
            more = running.requirements(found, keys, require)
            found, keys = running.stage_tables(name, recipe, [*settings, *more], only, smoke=smoke)
        running.check_places(found, keys, out, allow)
        request = Request(nodes, gpus, partition, time, tuple(slurm))
        if verify or dry_run:
            running.check_unused("--verify" if verify else "--dry-run", request, max_time, where)
            found_out = catalog.verified(found, keys, out) if verify else running.plans(found, keys)
            return running.show(found_out, as_json)
        running.check_shards(found, keys, request, job=where is not None)
        running.processes(context, found, request, max_time, where=where, logs=out, as_json=as_json)
        options = running.options(context, found, as_json, out=out, resume=resume, allow=allow)
        running.run_stage(context, running.pipeline(found, options), keys)

    single.command(label, help=catalog.stage_help(name))(command)
    return typer.main.get_command(single)


@app.command("run")
def _run(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or file of a recipe.")],
    settings: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
    out: OutOption = None,
    gpus: GpusOption = None,
    force: Annotated[bool, typer.Option("--force", help="Run everything again, also what is done.")] = False,
    until: Annotated[str | None, typer.Option("--until", metavar="KEY", help="Last table to run.")] = None,
    max_time: MaxTimeOption = None,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
    where: SubmitOption = None,
    nodes: NodesOption = None,
    partition: PartitionOption = None,
    time: TimeOption = None,
    slurm: SlurmOption = [],  # noqa: B006
) -> None:
    """Run all stages of a recipe in order, except those that are done."""
    found = running.load(recipe, settings)
    if until is not None:
        running.check_until(found, until)
    request = Request(nodes, gpus, partition, time, tuple(slurm))
    if dry_run:
        running.check_unused("--dry-run", request, max_time, where)
        return running.show(running.plans(found, list(found.tables)), as_json)
    running.check_shards(found, list(found.tables), request, job=where is not None)
    running.processes(context, found, request, max_time, where=where, logs=out, as_json=as_json)
    options = running.options(context, found, as_json, root=out, resume=not force)
    running.run_recipe(context, running.pipeline(found, options), until)
    return None
