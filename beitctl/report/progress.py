"""What a person sees while a stage runs: one live block on a terminal, plain lines elsewhere; stderr only."""

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_SECONDS = 5.0
LIVE_SECONDS = 0.1
BAR_WIDTH = 30


def duration(seconds: float) -> str:
    """Two leading units of a time span: ``42s``, ``3m10s``, ``2h05m``, ``17d08h``."""
    whole = round(seconds)
    for size, part, unit, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{small}"
    return f"{whole}s"


def number(value: float) -> str:
    """Number with four significant digits, whole numbers in full."""
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def on_terminal() -> bool:
    """Whether stderr can redraw a block: a terminal, no CI job, not a dumb one."""
    return (
        sys.stderr.isatty()
        and os.environ.get("CI", "") in ("", "0", "false")
        and os.environ.get("TERM") != "dumb"
    )


class Progress:
    """Draws the steps of one stage; does nothing if ``quiet``."""

    def __init__(self, stage: str, *, quiet: bool = False, live: bool = True) -> None:
        self._stage = stage
        self._quiet = quiet
        self._redraw = live and on_terminal()
        self._block: Live | None = None
        self._marks: deque[tuple[int, float]] = deque(maxlen=50)  # step and when it ended, for the speed
        self._of = 0
        self._drawn_at = float("-inf")
        self._pending: dict[str, float] | None = None  # numbers of the last step, where a line is still due

    def step(self, step: int, of: int, metrics: Mapping[str, float]) -> None:
        """Show the numbers of a step; the first and the last of a training always, others when it is time."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._marks and (step <= self._marks[-1][0] or of != self._of):
            self._finish()  # another training begins
        first = not self._marks
        self._marks.append((step, now))
        self._of = of
        self._pending = dict(metrics)
        due = now - self._drawn_at >= (LIVE_SECONDS if self._redraw else PLAIN_SECONDS)
        if first or step >= of or due:
            self._drawn_at = now
            self._draw(self._pending)

    def line(self, text: str) -> None:
        """Write a line that stays, above the live block."""
        if self._quiet:
            return
        if self._block is not None:
            self._block.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Take the live block away and leave the last state as one line."""
        self._finish()

    def _finish(self) -> None:
        if self._block is not None:
            self._block.stop()
            self._block = None
        if self._pending is not None:
            self.line(self._plain(self._pending))
        self._pending = None
        self._marks.clear()
        self._drawn_at = float("-inf")

    def _draw(self, metrics: Mapping[str, float]) -> None:
        if self._redraw:
            self._draw_live(metrics)
        else:
            self.line(self._plain(metrics))
            self._pending = None

    def _eta(self) -> str:
        (step, then), (last, now) = self._marks[0], self._marks[-1]
        if last >= self._of or last == step:
            return ""
        return duration((self._of - last) * (now - then) / (last - step))

    def _plain(self, metrics: Mapping[str, float]) -> str:
        step = self._marks[-1][0]
        parts = [f"{time.strftime('%H:%M:%S')} {self._stage} step={step}"]
        parts += [f"of={self._of}"] if self._of else []
        parts += [f"{name}={number(value)}" for name, value in metrics.items()]
        eta = self._eta()
        return " ".join([*parts, f"eta={eta}"] if eta else parts)

    def _draw_live(self, metrics: Mapping[str, float]) -> None:
        # rich takes longer to import than the rest of the command line, and most runs have no terminal
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        if self._block is None:
            bare = bool(os.environ.get("NO_COLOR"))
            console = Console(file=sys.stderr, no_color=bare, highlight=False, markup=False)
            self._block = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._block.start()
        console = self._block.console
        accent = "" if console.no_color else "cyan"
        text = Text(no_wrap=False)
        text.append(self._stage, style="" if console.no_color else "bold")
        text.append(f" step {self._marks[-1][0]:,}")
        if self._of:
            share = min(self._marks[-1][0] / self._of, 1.0)
            full = round(share * BAR_WIDTH)
            done, left = ("━", "─") if console.encoding.startswith("utf") else ("#", "-")
            text.append(f"/{self._of:,} ").append(done * full, style=accent).append(left * (BAR_WIDTH - full))
            text.append(f" {share:.1%}")
        eta = self._eta()
        text.append(f"  eta {eta}" if eta else "")
        losses = {n: v for n, v in metrics.items() if n.endswith(("loss", "accuracy"))}
        for group in (losses, {n: v for n, v in metrics.items() if n not in losses}):
            if group:
                text.append("\n" + "  ".join(f"{name} {number(value)}" for name, value in group.items()))
        self._block.update(text, refresh=True)
