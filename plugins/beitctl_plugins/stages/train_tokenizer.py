"""The stage ``train-tokenizer``."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from beitctl.api import Job, Plugin, SourceField, TokenizerField
from beitctl.data.opening import opened


class TrainTokenizer(Plugin):
    """Train a tokenizer: SentencePiece or WordPiece for text, VQ-KD or a discrete VAE for pictures."""

    tokenizer: TokenizerField
    """The tokenizer and its settings."""
    sources: list[SourceField] = Field(min_length=1)
    """What it is trained on."""

    def plan(self) -> Mapping[str, Any]:
        """The tokenizer's own plan and the size of its sources."""
        found = [opened(source) for source in self.sources]
        return {**self.tokenizer.plan(), "examples": sum(map(len, found))}

    def run(self, job: Job) -> Mapping[str, Any]:
        """Train, write ``tokenizer/``, measure."""
        from beitctl_plugins.stages import shared

        for number, source in enumerate(self.sources):
            shared.opened(f"sources.{number}", source, job)
        return self.tokenizer.train(self.sources, job)

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return ",".join(opened(source).fingerprint for source in self.sources)
