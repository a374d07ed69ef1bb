"""How long ``beitctl --help`` takes, beside the imports that it cannot do without.

    python -m benchmarks.help

Wanted: under half a second on a desktop, and no more than four times those imports. The last line on stdout
is one JSON object.
"""

import json
import subprocess
import sys
import time

ROUNDS = 7
NEEDED = "import typer.rich_utils, rich.markdown, pydantic"


def seconds(arguments: list[str]) -> float:
    """Wall time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turn; the fastest round of each counts."""
    rounds = [(seconds(["-m", "beitctl", "--help"]), seconds(["-c", NEEDED])) for _ in range(ROUNDS)]
    ours, needed = (min(times) for times in zip(*rounds, strict=True))
    print(f"beitctl --help {ours:.2f} s, the imports it needs {needed:.2f} s")
    print(json.dumps({"benchmark": "help", "seconds": ours, "imports": needed, "ratio": ours / needed}))


if __name__ == "__main__":
    main()
