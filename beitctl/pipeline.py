"""Running the tables of a recipe: what is done already, what goes on, what begins, and in which order.

With several processes rank 0 decides and writes; the others follow what it says.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from beitctl import drift, failures, runs
from beitctl.api import Job
from beitctl.data import opening
from beitctl.errors import DataError, RecipeError, UserError
from beitctl.recipe import Recipe, StageTable
from beitctl.report.events import EventLog, plain
from beitctl.runs import Identity, Run, Workplace


class Ranks(Protocol):
    """The processes of this job, as far as this module cares; ``beitctl.engine.dist`` has the real ones."""

    @property
    def main(self) -> bool: ...
    @property
    def world(self) -> int: ...
    @property
    def store(self) -> Any: ...
    def broadcast_object(self, value: Any) -> Any: ...
    def barrier(self) -> None: ...


@dataclass(frozen=True)
class Alone:
    """The only process of a job."""

    main: bool = True
    world: int = 1
    store: Any = None

    def broadcast_object(self, value: Any) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """There is nobody to wait for."""


class Elsewhere(SystemExit):
    """Rank 0 says why; this process ends with the same exit code."""


@dataclass(frozen=True)
class Options:
    """How tables are run; from the command line."""

    root: Path
    """Folder of the recipe: runs are ``root / key / <time>-<hash8>``."""
    out: Path | None = None
    """Exact run folder of the one table that was asked for."""
    resume: bool = True
    """Whether a run that did not finish is continued, and one that did is used."""
    json: bool = False
    quiet: bool = False
    command: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    """What the run in ``out`` may differ in from how it began: keys of settings, ``data``, ``torch``."""


@dataclass(frozen=True)
class Ticket:
    """What rank 0 decided about a table."""

    key: str
    folder: str
    run: bool
    """Whether it is run now; else it is done."""
    resume: bool = False
    id: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    drift: list[dict[str, Any]] = field(default_factory=list)
    """What has changed since the run began, see ``beitctl.drift.records``."""


@dataclass
class Pipeline:
    """One use of a recipe. Every process makes one and calls the same methods."""

    recipe: Recipe
    options: Options
    ranks: Ranks = field(default_factory=Alone)
    write_page: Callable[[Path], Any] | None = None
    """Writes the report of a run folder."""
    memory_hint: Callable[[str], str] = lambda key: ""
    """What the plan says of the memory that a table needs."""
    ended: bool = False
    """Whether the last record on stdout is an end event."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Run folders of the tables that are done, in the order in which they were."""
    _place: Workplace | None = None

    def stage(self, keys: Sequence[str]) -> None:
        """Run tables, and before each what it refers to and is not there yet."""
        with opening.once():
            self._check_data(keys)
            for key in keys:
                self._parents(key)
                ticket = self._obtain(key, wanted=True)
                if not ticket.run:
                    self._say(f"already done: {ticket.folder}")
                    self._replay(Path(ticket.folder))

    def everything(self, until: str | None = None) -> None:
        """Run all tables in order, up to and including ``until``, except those that are done."""
        keys = list(self.recipe.tables)
        keys = keys[: keys.index(until) + 1] if until else keys
        with opening.once():
            self._check_data(keys)
            for key in keys:
                ticket = self._obtain(key, wanted=True)
                if not ticket.run:
                    self._say(f"{key}: cached, {ticket.folder}")
                    self._replay(Path(ticket.folder))

    def summary(self) -> dict[str, Any]:
        """The numbers that the recipe's [summary] picks from the tables that are done; all without one."""
        metrics = {key: run.metrics for key, folder in self.folders.items() if (run := runs.read(folder))}
        found = _picked(self.recipe.summary, metrics, "summary") if self.recipe.summary else metrics
        return found or {}

    def _check_data(self, keys: Sequence[str]) -> None:
        """Open the sources of all tables before the first one runs: a wrong path must not show after hours.

        Raises:
            DataError: data of one or more tables are missing or unusable; names them all.
        """

        def look() -> dict[str, Any]:
            problems = []
            for key in self._with_parents(keys):
                fingerprint = getattr(self.recipe.tables[key].plugin, "inputs_fingerprint", None)
                try:
                    if callable(fingerprint):
                        fingerprint()
                except DataError as error:
                    problems.append(f"[{key}] {error}")
            if problems:
                raise DataError("\n".join(problems))
            return {}

        self._share(look)

    def _with_parents(self, keys: Sequence[str]) -> list[str]:
        found: list[str] = []
        for key in keys:
            found += [k for k in self._with_parents(self.recipe.tables[key].references) if k not in found]
            found += [key] if key not in found else []
        return found

    def _parents(self, key: str) -> None:
        for parent in self.recipe.tables[key].references:
            if parent in self.folders:
                continue
            self._parents(parent)
            self._obtain(parent, wanted=False, child=key)

    def _obtain(self, key: str, *, wanted: bool, child: str = "") -> Ticket:
        """Have a table done: find its run, go on with it, or make a new one."""
        self.ended = False
        table = self.recipe.tables[key]
        ticket = Ticket(**self._share(lambda: vars(self._decide(table, wanted))))
        if ticket.run:
            if not wanted:
                self._say(f"[{child}] needs [{key}], which has no finished run: running that first")
            self._perform(table, ticket)
        self.folders[key] = Path(ticket.folder)
        return ticket

    def _share(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 decides, on all ranks; an error there ends all, and only rank 0 says why."""
        if self.ranks.world == 1:
            return decide()
        answer: dict[str, Any] = {}
        if self.ranks.main:
            try:
                answer = {"value": decide()}
            except BaseException as error:
                self.ranks.broadcast_object({"exit": failures.exit_code(error)})
                raise
        answer = self.ranks.broadcast_object(answer)
        if "exit" in answer:
            raise Elsewhere(answer["exit"])
        value: dict[str, Any] = answer["value"]
        return value

    def _decide(self, table: StageTable, wanted: bool) -> Ticket:
        """Find or make the run folder of a table, and lock it if there is something to do."""
        parents = {key: self._parent(key) for key in table.references}
        identity = runs.identify(table, parents)
        exact = self.options.out if wanted else None
        run = self._exact(exact, table) if exact is not None else self._usual(table, identity, wanted)
        changed = self._changed(run, table, identity, parents) if run is not None else []
        if run is not None and run.ok and not changed:
            return Ticket(table.key, str(run.folder), run=False, id=str(run.manifest.get("id", "")))
        there = run.folder if run is not None else exact
        if run is not None and changed and drift.nothing_done(run, table):
            self._say(f"{there}: nothing there to go on from; the run begins anew with what has changed")
            run, changed = None, []
        folder = there or runs.new_folder(self.options.root / table.key, identity)
        runs.make_folder(folder)
        self._place = Workplace(folder)
        facts = runs.facts(
            table, self.recipe.name, identity, parents, command=self.options.command, world=self.ranks.world
        )
        records = drift.records(run, changed, identity) if run is not None else []
        if run is not None:
            facts["id"] = run.manifest.get("id", facts["id"])  # it stays, even if the code has changed since
            facts["drift"] = [*run.manifest.get("drift", []), *records]
        runs.write_file(folder / "recipe.toml", self.recipe.text)
        self._place.begin(table, facts)
        inputs = {f"@{key}": str(parent.folder) for key, parent in parents.items()}
        return Ticket(table.key, str(folder), True, run is not None, str(facts["id"]), inputs, records)

    def _parent(self, key: str) -> Run:
        run = runs.read(self.folders[key])
        if run is None:
            raise UserError(f"{self.folders[key]}: the manifest of the run of [{key}] is gone; run it again")
        return run

    def _usual(self, table: StageTable, identity: Identity, wanted: bool) -> Run | None:
        """The run of a table to use or to go on with, at the usual place."""
        if wanted and not self.options.resume:
            return None
        found = runs.find(self.options.root / table.key, table.key)
        if not wanted and self.options.out is not None:
            found += runs.find(self.options.out.resolve().parent, table.key)
        found = [run for run in found if run.manifest["config_hash"] == identity.config]
        if not wanted:
            found.sort(key=lambda run: not run.ok)  # any finished run will do, the newest first
            return found[0] if found else None
        if not found or (found[0].ok and found[0].manifest["fingerprint"] != identity.fingerprint):
            return None
        return found[0]

    def _exact(self, folder: Path, table: StageTable) -> Run | None:
        """The run of this table in the folder of --out, if there is one."""
        run = runs.read(folder)
        if run is None:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--out {folder}: is a file; name a folder")
            if folder.is_dir() and any(path.name not in (runs.LOCK, runs.SLURM) for path in folder.iterdir()):
                raise UserError(f"--out {folder}: holds files but no run; name a new or an empty folder")
            return None
        if not self.options.resume:
            raise UserError(
                f"--out {folder}: holds a run already; with --no-resume name a new folder, or leave out "
                "--no-resume to go on with it"
            )
        held = run.manifest["key"]
        if held != table.key or run.manifest.get("stage") != table.stage:
            raise UserError(f"{folder} holds a run of [{held}], not of [{table.key}]; choose another --out")
        return run

    def _changed(
        self, run: Run, table: StageTable, identity: Identity, parents: Mapping[str, Run]
    ) -> list[drift.Change]:
        """What has changed since a run began, all of it allowed."""
        found = drift.changes(run, table, identity, parents)
        exact = self.options.out is not None and run.folder == self.options.out
        other = "undo the changes, or choose another folder with --out"
        advice = other if exact else f"begin a new run: beitctl {table.stage} --no-resume"
        binding = [] if drift.nothing_done(run, table) else found
        drift.check(run, table, binding, self.options.allow if exact else (), advice)
        if exact and run.ok and not found and run.manifest["fingerprint"] != identity.fingerprint:
            self._say(
                f"{run.folder}: was made by another version of the code; to run again use another --out"
            )
        return found

    def _perform(self, table: StageTable, ticket: Ticket) -> None:
        """Run a stage in its folder and record how it ended."""
        folder = Path(ticket.folder)
        log = EventLog(
            folder, stage=table.stage, recipe=self.recipe.name, run=ticket.id, json_stdout=self.options.json,
            quiet=self.options.quiet, active=self.ranks.main,
        )  # fmt: skip
        inputs = {ref: Path(path) for ref, path in ticket.inputs.items()}
        job = Job(folder, log, inputs, ticket.resume, lambda: self.memory_hint(table.key))
        with log:
            try:
                if self.ranks.main:
                    self._say(f"{table.key}: {'going on with' if ticket.resume else 'running in'} {folder}")
                    log.start(table.plugin.plan())
                    for record in ticket.drift:
                        log.warning("W310", *drift.told(record))
                metrics = plain(table.plugin.run(job))
                self.ranks.barrier()  # raises where a rank failed, which leaves instead of coming here
            except BaseException as error:
                self._failed(log, error)
                if failures.told_by_main(self.ranks.store, self.ranks.world, error):
                    raise Elsewhere(failures.exit_code(error)) from error
                raise
            self._finished(log, "ok", 0, metrics)

    def _failed(self, log: EventLog, error: BaseException) -> None:
        """Record an error as well as the disk still allows; the error itself is what matters."""
        try:
            self._finished(log, failures.status(error), failures.exit_code(error), {})
        except OSError as second:
            self._say(f"the record of this failure is incomplete: {second}")

    def _finished(self, log: EventLog, status: str, code: int, metrics: Any) -> None:
        if self._place is None:
            return  # not rank 0
        try:
            self._place.end(status, code, metrics)
            page = self._page(log)
            log.end(status, code, metrics, report=page)
            self.ended = True
        finally:
            self._place.close()
            self._place = None

    def _page(self, log: EventLog) -> str | None:
        if self.write_page is None:
            return None
        try:
            self.write_page(log.folder)
        except Exception as error:  # a page must never fail a run that is done
            text = f"the report could not be written: {type(error).__name__}: {error}"
            log.warning("W401", text, "the run itself is complete; events.jsonl holds all numbers")
            return None
        return "report.html"

    def _replay(self, folder: Path) -> None:
        """The end event of a run that was done before, for scripts that read stdout."""
        run = runs.read(folder)
        if self.options.json and self.ranks.main and run is not None:
            name, stage, recipe = (run.manifest.get(key) for key in ("id", "stage", "recipe"))
            end = {"run": name, "recipe": recipe, "dir": str(folder), "status": "ok", "exit": 0}
            write_event("end", stage=stage, **end, cached=True, metrics=run.metrics, report="report.html")
            self.ended = True

    def _say(self, text: str) -> None:
        if self.ranks.main and not self.options.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def write_event(event: str, **fields: Any) -> None:
    """Write a record to stdout that belongs to no log of a run."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    sys.stdout.write(json.dumps({"v": 1, "event": event, "time": time, **plain(fields)}) + "\n")
    sys.stdout.flush()


def write_summary(pipeline: Pipeline, write_page: Callable[[Path, Sequence[Path]], Any]) -> dict[str, Any]:
    """Write ``summary.json`` and the report of all tables into the recipe's folder; returns the summary.

    Raises:
        RecipeError: [summary] names a number that a stage did not return.
    """
    root, summary = pipeline.options.root, pipeline.summary()
    text, folders = json.dumps(summary, indent=2) + "\n", list(pipeline.folders.values())
    if runs.up_to_date(root / "report.html", folders) and (root / "summary.json").read_text() == text:
        return summary
    runs.write_file(root / "summary.json", text)
    try:
        write_page(root, folders)
    except Exception as error:  # a page must never fail what is done
        sys.stderr.write(f"warning: the report could not be written: {type(error).__name__}: {error}\n")
    return summary


def _picked(table: Mapping[str, Any], metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for name, value in table.items():
        full = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            if inner := _picked(value, metrics, full):
                found[name] = inner
            continue
        key, _, path = str(value).removeprefix("@").partition(":")
        if key in metrics:
            found[name] = _number(metrics[key], path, f"{full} = {value!r}")
    return found


def _number(metrics: Any, path: str, where: str) -> Any:
    for part in path.split(".") if path else []:
        if not isinstance(metrics, Mapping) or part not in metrics:
            there = ", ".join(metrics) if isinstance(metrics, Mapping) else json.dumps(metrics)
            raise RecipeError([f"{where}: no '{part}'; there is {there}"])
        metrics = metrics[part]
    return metrics
