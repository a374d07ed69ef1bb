"""Damaged files by the thousand: each is read by a worker process that may die of it.

``python tests/faults/fuzzing.py --files 10000 --seed 0`` prints one JSON object, and ends with 1 if anything
came out of a file but examples or an error with an exit code, if a file took too long, or if memory did.
Seconds are those of the processor, so that a busy machine makes no hang; ``WAITING`` times as many may pass.
A file follows from (kind, seed, number) alone; ``--only KIND:NUMBER`` runs one of them in this process.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("jpeg", "png", "webp", "tar", "parquet", "jsonl", "csv", "gif", "tiff", "arrow", "text", "other")
PLANTED = (
    "planted-good",
    "planted-error",
    "planted-crash",
    "planted-hang",
    "planted-hog",
    "planted-lazy-hog",
)
"""Kinds that show that the harness finds what it looks for."""
START_SECONDS = 120
POLL_SECONDS = 0.02
WAITING = 6
MIB = 2**20


# in the worker process


def work(folder: Path) -> None:
    """Judge the files that are asked for on stdin, one line of JSON each."""
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    judge: Any = None
    for line in sys.stdin:
        kind, seed, number, seconds = json.loads(line)
        if judge is None or isinstance(judge, Planted) != (kind in PLANTED):
            judge = Planted(folder) if kind in PLANTED else _judge(folder)
        path = judge.file(kind, seed, number)
        print(json.dumps({"file": str(path)}), file=answers, flush=True)
        faulthandler.dump_traceback_later(seconds * 0.9, repeat=True)  # where it hangs, into the log
        print(json.dumps(_answer(judge, (kind, seed, number), path)), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()


def _answer(judge: Any, what: tuple[str, int, int], path: Path) -> dict[str, Any]:
    shutil.copyfile(path, path.with_name("last"))
    began, worked, detail = time.monotonic(), processor_seconds(), ""
    try:
        result = judge.judged(*what, path)
    except BaseException:
        result, detail = "error", traceback.format_exc()
    seconds = {"seconds": processor_seconds() - worked, "passed": time.monotonic() - began}
    return {"result": result, **seconds, "peak_mib": peak_mib(), "detail": detail}


def _judge(folder: Path) -> Any:
    # torch and pyarrow: not in the process that watches
    from fuzz_judges import Judge

    return Judge(folder)


def processor_seconds() -> float:
    """Of this process so far, and of its children that ended."""
    return sum(os.times()[:4])


def peak_mib() -> int:
    """Most memory of this process so far, and of its children."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) // 1024


class Planted:
    """Judges nothing, but does what a file should never bring about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, kind: str, seed: int, number: int) -> Path:
        path = self.folder / "fuzz.planted"
        path.write_text(f"{kind} {seed} {number}")
        return path

    def judged(self, kind: str, seed: int, number: int, path: Path) -> str:
        if number == 1:  # of three files the second is the bad one
            getattr(self, kind.removeprefix("planted-").replace("-", "_"))()
        return "accepted"

    def good(self) -> None:
        pass

    def error(self) -> None:
        raise KeyError("planted")

    def crash(self) -> None:
        ctypes.string_at(0)

    def hang(self) -> None:
        time.sleep(1000)

    def hog(self) -> None:
        b"x" * (400 * MIB)

    def lazy_hog(self) -> None:
        kept = [b"x" * (400 * MIB)]
        time.sleep(1000)
        del kept


# in the process that watches


@dataclass
class Limits:
    """What a file may take."""

    seconds: float
    mib: int


@dataclass
class Totals:
    """What came out."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0})
    peak: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


class Worker:
    """A worker process, started again whenever it died."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.log = folder / "stderr.txt"
        self.process: subprocess.Popen[str] | None = None
        self._rest = b""

    def _started(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-W", "ignore", __file__, "--work", str(self.folder)]
        own = {"BEITCTL_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._rest = b""
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            return subprocess.Popen(command, env=os.environ | own, start_new_session=True, **pipes)

    def judge(self, kind: str, seed: int, number: int) -> dict[str, Any]:
        """What came of a file: the worker's answer, or why there is none."""
        fresh = self.process is None
        self.process = self.process or self._started()
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([kind, seed, number, self.limits.seconds]), file=self.process.stdin, flush=True)
        made = self._answer(START_SECONDS if fresh else START_SECONDS / 2)
        answer = made if "result" in made else self._answer(self.limits.seconds)
        if answer["result"] in ("accepted", "refused"):
            if answer["seconds"] > self.limits.seconds:
                answer["result"] = "hang"
            if answer["peak_mib"] > self.limits.mib:
                answer["result"] = "memory"
        if answer["result"] not in ("accepted", "refused", "error"):
            answer["detail"] = answer.get("detail") or self.log.read_text(errors="replace")[-5000:]
            self.stop()
        return answer

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process
        assert self.process.stdout
        began, worked, pipe = time.monotonic(), self._worked(), self.process.stdout.fileno()
        while b"\n" not in self._rest:
            passed, used = time.monotonic() - began, self._worked() - worked
            peak = self._now_mib()
            answer = {"seconds": used, "passed": passed, "peak_mib": peak}
            if peak > self.limits.mib:
                return {"result": "memory", **answer}
            if used > seconds or passed > WAITING * seconds:
                return {"result": "hang", **answer}
            if select.select([pipe], [], [], POLL_SECONDS)[0]:
                data = os.read(pipe, 2**16)
                self._rest += data
                if not data:
                    code = self.process.wait()
                    return {"result": "crash", **answer, "code": code}
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _now_mib(self) -> int:
        """Memory of the worker at this moment."""
        assert self.process
        try:
            return (
                int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
                * os.sysconf("SC_PAGE_SIZE")
                // MIB
            )
        except (OSError, IndexError):
            return 0

    def _worked(self) -> float:
        """Processor seconds of the worker so far."""
        assert self.process
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return 0.0

    def stop(self) -> None:
        """End the process and those that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


def numbered(files: int, kinds: list[str], first: int = 0) -> Iterator[tuple[str, int]]:
    """As many files of each kind, one kind after the other."""
    for place, kind in enumerate(kinds):
        count = files // len(kinds) + (place < files % len(kinds))
        yield from ((kind, number) for number in range(first, first + count))


def run(options: argparse.Namespace) -> Totals:
    """Judge all files."""
    limits, totals = Limits(options.limit_seconds, options.limit_mib), Totals()
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
    worker = Worker(folder, limits)
    try:
        for kind, number in numbered(options.files, options.kinds.split(","), options.first):
            answer = worker.judge(kind, options.seed, number)
            _count(totals, options, {"kind": kind, "seed": options.seed, "number": number, **answer}, folder)
    finally:
        worker.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return totals


def _count(totals: Totals, options: argparse.Namespace, answer: dict[str, Any], folder: Path) -> None:
    counts = totals.counts.setdefault(answer["kind"], Counter(files=0, accepted=0, refused=0))
    counts["files"] += 1
    totals.peak = max(totals.peak, answer["peak_mib"])
    if answer["seconds"] > totals.slowest["seconds"]:
        totals.slowest = {key: answer[key] for key in ("kind", "number", "seconds", "passed")}
    if answer["result"] in ("accepted", "refused"):
        counts[answer["result"]] += 1
        return
    options.save.mkdir(parents=True, exist_ok=True)
    kept = options.save / f"{answer['kind']}-{answer['seed']}-{answer['number']}"
    with contextlib.suppress(OSError):
        shutil.copyfile(folder / "last", kept)
    totals.findings.append(answer | {"saved": str(kept)})
    if not options.quiet:
        print(f"{answer['result']}: {kept}\n{answer.get('detail', '')}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--save",
        type=Path,
        default=Path(tempfile.gettempdir(), "fuzz-findings"),
        help="folder of files that did harm",
    )
    parser.add_argument("--limit-seconds", type=float, default=10)
    parser.add_argument("--limit-mib", type=int, default=2048)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="judge one file, in this process")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.kinds.split(",")) - {*KINDS, *PLANTED}
    if unknown:
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if options.work:
        work(options.work)
        return 0
    if options.only:
        return only(options)
    began = time.monotonic()
    totals = run(options)
    report = {
        "seed": options.seed,
        "files": sum(counts["files"] for counts in totals.counts.values()),
        "kinds": {kind: dict(counts) for kind, counts in totals.counts.items()},
        "slowest": totals.slowest,
        "peak_mib": totals.peak,
        "seconds": round(time.monotonic() - began, 1),
        "findings": totals.findings,
    }
    print(json.dumps(report, indent=1))
    return 1 if totals.findings else 0


def only(options: argparse.Namespace) -> int:
    """Judge one file here, with its traceback if it has one."""
    kind, _, number = options.only.partition(":")
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
        os.environ["BEITCTL_CACHE"] = str(Path(folder, "cache"))
        judge = _judge(Path(folder))
        path = judge.file(kind, options.seed, int(number))
        print(judge.judged(kind, options.seed, int(number), path), f"{peak_mib()} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
