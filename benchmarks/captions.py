"""Lengths of real captions and prose, in tokens: of the data set that is embedded in the package."""

import functools
from typing import Any

from beitctl.errors import BeitctlError
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece
from benchmarks.mixed import CAPTION_TOKENS, PROSE_TOKENS, TEXT_TOKENS

PIECES = 8000
"""As many as 1.5 MB of prose and two thousand captions carry."""


class Quiet:
    """A log that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values: None


@functools.cache
def known_lengths() -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Lengths of all captions and of all passages of prose, and where they come from."""
    kind: Any = Embedded
    pairs, prose = kind(content="pairs"), kind(content="text")
    try:
        captions, passages = pairs.open(), prose.open()
    except (BeitctlError, OSError):
        return CAPTION_TOKENS, PROSE_TOKENS, "64 quantiles of the embedded data set, stated"
    log: Any = Quiet()
    maker = SentencePiece(pieces=PIECES)
    tokenizer = maker.fit(maker.sample([pairs, prose], log))

    def tokens(text: str) -> int:
        return min(len(tokenizer.encode(text)) + 2, TEXT_TOKENS)

    return (
        tuple(tokens(caption) for number in range(len(captions)) for caption in captions[number].captions),
        tuple(tokens(passages[number].text or "") for number in range(len(passages))),
        f"embedded data set, SentencePiece of {tokenizer.size} ids trained on it",
    )
