"""Where and how a loop runs, and what it tells of itself."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from beitctl.engine.dist import Ranks


@dataclass(frozen=True)
class Session:
    """Where and how a loop runs, besides its settings."""

    ranks: Ranks
    folder: Path
    """Checkpoints go to ``folder / "checkpoints"``."""
    identity: str = ""
    """What the run is; a checkpoint with another identity is refused."""
    resume: bool = True
    layers: int = 1
    """Blocks of the model, for layer-wise learning-rate decay."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """Examples of every stream, for the share that may be unreadable."""
    started: Callable[[int], None] = lambda step: None
    """Called once with the step that the run starts from."""
    returned: Callable[[int], None] = lambda step: None
    """Called after a rollback with the step that the run goes on from; the learner is what it was then."""
    saved: Callable[[int, Path, float], None] = lambda step, path, seconds: None
    """Called after every checkpoint."""
    warn: Callable[[str, str, str], None] = lambda code, text, fix: None
    """Called with the code of a warning, what the user should know, and what to do about it."""
    sampled: Callable[[int, Sequence[str]], None] = lambda step, ids: None
    """Called with the sorted ids of all samples of a step, over all ranks, if ``config.log_samples``."""
    memory_hint: Callable[[], str] = lambda: ""
    """What the plan says of the memory, for the error of a step that does not fit."""

    def warns(self, code: str, fix: str) -> Callable[[str], None]:
        """Warnings of one code, by their text."""
        return lambda text: self.warn(code, text, fix)

    def warns_here(self, code: str, fix: str) -> Callable[[str], None]:
        """Warnings of what only this rank knows: the log is that of rank 0, the others say it on stderr."""

        def tell(text: str) -> None:
            os.write(2, f"rank {self.ranks.rank}: {text}\n".encode())

        return self.warns(code, fix) if self.ranks.main else tell
