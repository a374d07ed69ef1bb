"""What pycocoevalcap says of captions: COCO's evaluation itself, with Stanford's tokenizer, METEOR and SPICE.

Source: pycocoevalcap 1.2, after coco-caption (arXiv:1504.00325).
"""

import contextlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from beitctl.errors import SetupError

PACKAGE = "pycocoevalcap"
SCORERS = (
    ("METEOR", "meteor.meteor.Meteor"),
    ("ROUGE_L", "rouge.rouge.Rouge"),
    ("CIDEr", "cider.cider.Cider"),
)
ADVICE = f"pip install {PACKAGE}, and a Java runtime (Debian: default-jre-headless)"


def need() -> None:
    """Look for what ``scores`` needs.

    Raises:
        SetupError: the package or Java is missing.
    """
    if importlib.util.find_spec(PACKAGE) is None or shutil.which("java") is None:
        raise SetupError(f"official = true needs {PACKAGE} and Java: {ADVICE}")


def scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of captions by the names of the package, each 0 to 1 but CIDEr, 0 to 10.

    SPICE fetches models when it is first used; where it fails it is left out, and ``without_SPICE`` is 1.
    What the package prints goes to standard error.

    Args:
        said: a caption each.
        references: several captions of people for each.

    Raises:
        SetupError: the package or Java is missing, or does not work.
    """
    need()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return _scores(said, references)
        except (OSError, subprocess.SubprocessError, AssertionError, ValueError, LookupError) as error:
            raise SetupError(
                f"{PACKAGE} does not work here ({error!r}): set official = false, or mend it: {ADVICE}"
            ) from error


def _scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    tokenizer = _made("tokenizer.ptbtokenizer.PTBTokenizer")
    truth = _tokenized(tokenizer, dict(enumerate(references)))
    mine = _tokenized(tokenizer, {number: [caption] for number, caption in enumerate(said)})
    bleu = _made("bleu.bleu.Bleu", 4).compute_score(truth, mine)[0]
    found = {f"Bleu_{size}": float(value) for size, value in enumerate(bleu, 1)}
    for name, place in SCORERS:
        found[name] = float(_made(place).compute_score(truth, mine)[0])
    try:
        found["SPICE"] = float(_made("spice.spice.Spice").compute_score(truth, mine)[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        found["without_SPICE"] = 1.0
    return found


def _made(place: str, *values: Any) -> Any:
    module, name = place.rsplit(".", 1)
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)(*values)


def _tokenized(tokenizer: Any, texts: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Captions as the Java tokenizer gives them, each one line: a line end inside would shift all others.

    Raises:
        ValueError: it gave more or fewer lines.
    """
    found: dict[int, list[str]] = tokenizer.tokenize(
        {number: [{"caption": one_line(text)} for text in several] for number, several in texts.items()}
    )
    if {number: len(lines) for number, lines in found.items()} != {n: len(t) for n, t in texts.items()}:
        raise ValueError("its tokenizer gave another number of lines than it was given")
    return found


def one_line(text: str) -> str:
    """A text without line ends of any kind, nor what cannot be written as UTF-8."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
