"""Memory of a GPU counted tensor by tensor, in a process of its own: what it sets up cannot be undone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 300
"""After so long the count is given up."""


def counted(
    recipe: str | None, settings: Sequence[str], key: str, gpus: int, caption_tokens: int
) -> dict[str, Any]:
    """What ``beitctl.planning.tracked`` says of one table of a recipe, or why it cannot say it.

    Returns:
        What ``tracked.count`` returns; ``{"problem": text}`` where that failed or took too long.
    """
    asked = {
        "recipe": recipe,
        "settings": list(settings),
        "key": key,
        "gpus": gpus,
        "caption_tokens": caption_tokens,
    }
    command = [sys.executable, "-m", "beitctl.planning.tracked", json.dumps(asked)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {SECONDS} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines() or ["nothing said"]
        return {"problem": f"the process that counts ended with code {done.returncode}: {last[-1][:300]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
