"""Options that several commands share, and those of jobs as one value."""

from pathlib import Path
from typing import Annotated

import typer

from beitctl.submit import Scheduler

CLUSTER = "On a cluster"
"""Panel of --help for options of jobs."""

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
AllowOption = Annotated[
    list[str],
    typer.Option(
        "--allow",
        metavar="KEY",
        help="Go on with the run in --out though this setting, or data, or torch, has changed. Repeatable.",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Go on with a run that was stopped, use one that is done."),
]
OnlyOption = Annotated[
    str | None,
    typer.Option("--only", metavar="NAME", help="The one table to run, of several of this stage."),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus", metavar="N", help="Processes to start, one per GPU; with --submit those of each machine."
    ),
]
RequireOption = Annotated[
    list[str],
    typer.Option(
        "--require",
        metavar="METRIC>=X",
        help="End with exit code 7 unless this holds, e.g. 'recall@1>=0.6'. Repeatable.",
    ),
]
MaxTimeOption = Annotated[
    str | None,
    typer.Option(
        "--max-time", metavar="TIME", help="Save and stop (exit 75) after 3h50m, 90m, 2:30:00 or minutes."
    ),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Try it out: toy sizes, a few steps, data that come with beitctl.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
]
VerifyOption = Annotated[bool, typer.Option("--verify", help="Check what a finished run left.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Records for scripts on stdout, one JSON a line.")]
SubmitOption = Annotated[
    Scheduler | None,
    typer.Option("--submit", help="Run it as a job that comes back after exit 75.", rich_help_panel=CLUSTER),
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", metavar="N", help="Machines.", rich_help_panel=CLUSTER)
]
PartitionOption = Annotated[
    str | None,
    typer.Option("--partition", metavar="NAME", help="Partition of the job.", rich_help_panel=CLUSTER),
]
TimeOption = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="TIME",
        help="Limit of the job, as of --max-time; by default that of the partition.",
        rich_help_panel=CLUSTER,
    ),
]
SlurmOption = Annotated[
    list[str],
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="Another option of sbatch, such as account=vision. Repeatable.",
        rich_help_panel=CLUSTER,
    ),
]
