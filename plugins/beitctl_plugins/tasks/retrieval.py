"""Image-text retrieval with two encoders: the branches of the model, each on its own."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from beitctl.api import Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.data.batch import Group
from beitctl.data.images import centre_crop
from beitctl.engine.losses import info_nce
from beitctl.errors import DataError
from beitctl.model.heads import ContrastiveHead
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.preparing import caption_of, framed, loaded, view_of

HEAD = "contrastive"


class Retrieval(Plugin):
    """Bring a picture and its caption together and all others apart (symmetric InfoNCE over all ranks)."""

    layout: ClassVar[Literal["dual"]] = "dual"

    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the target spreads over the whole batch."""

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        return {HEAD: ContrastiveHead(tools.model.width)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        tokenizer = loaded(tools)
        ids = tokenizer.encode(caption_of(example, draw, tools))
        image = view_of(example, draw, tools, self.crop_scale)
        return Item(image=image, text=framed(ids[: tools.model.text_tokens - 2], tokenizer))

    def output(
        self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of pictures and of texts, (n, d) each, and the scale of the logits."""
        found: tuple[Tensor, Tensor, Tensor] = heads[HEAD](
            encoded.rows[group.picture_rows[:, 0]], encoded.rows[group.text_first]
        )
        return found

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        pictures, texts, scale = self.output(encoded, group, heads)
        total, hits, _ = info_nce(pictures, texts, scale, self.label_smoothing)
        return {"": (total, hits)}

    def score(
        self,
        outputs: Sequence[tuple[Tensor, Tensor, Tensor]],
        examples: Sequence[Example],
        tools: Tools,
        train: Examples,
    ) -> Measured:
        """Recall at 1, 5, 10 both ways. A picture with an equal caption is a hit: the texts are the same."""
        pictures, texts = (torch.cat([out[i] for out in outputs]).cpu() for i in (0, 1))
        return Measured(recalls(texts @ pictures.T, same_caption(examples)))

    def draw(
        self,
        outputs: Sequence[tuple[Tensor, Tensor, Tensor]],
        examples: Sequence[Example],
        tools: Tools,
        log: Log,
    ) -> None:
        """Captions with the five pictures found for each."""
        pictures, texts = (torch.cat([out[i] for out in outputs]).cpu() for i in (0, 1))
        retrieval_gallery(texts @ pictures.T, examples, tools, log)


def same_caption(examples: Sequence[Example]) -> Tensor:
    """(n, n) bool: whether two examples have the same first caption."""
    numbers: dict[str, int] = {}
    found = torch.tensor([numbers.setdefault(example.captions[0], len(numbers)) for example in examples])
    return found[:, None] == found[None, :]


def recalls(scores: Tensor, hits: Tensor) -> dict[str, float]:
    """Recalls of a (texts, pictures) table of scores, where ``hits`` says which pairs belong together."""
    found: dict[str, float] = {}
    for way, table, right in (("t2i", scores, hits), ("i2t", scores.T, hits.T)):
        ranked = right.gather(1, table.argsort(dim=1, descending=True))
        found |= {f"{way}_r{k}": float(ranked[:, :k].any(1).float().mean()) for k in (1, 5, 10)}
    found["chance_r5"] = chance(hits, 5)
    return found | {"examples": float(len(scores))}


def chance(hits: Tensor, k: int) -> float:
    """Recall at k of a random order, averaged over the queries of both ways."""
    means = []
    for right in (hits, hits.T):
        total = right.shape[1]
        for good in right.sum(1).tolist():
            missed = 1.0
            for drawn in range(min(k, total)):
                missed *= max(0, total - good - drawn) / (total - drawn)
            means.append(1 - missed)
    return sum(means) / len(means)


def retrieval_gallery(
    scores: Tensor, examples: Sequence[Example], tools: Tools, log: Log, shown: int = 8
) -> None:
    """Draw captions with their five best pictures, the right ones framed."""
    hits = same_caption(examples)
    rows = []
    for query in torch.linspace(0, len(examples) - 1, min(shown, len(examples))).round().int().tolist():
        best = scores[query].argsort(descending=True)[:5].tolist()
        tiles = [
            figures.Tile(
                _thumbnail(examples[i], tools), examples[i].captions[0], "right" if hits[query, i] else None
            )
            for i in best
        ]
        rows.append(figures.Row(tiles, examples[query].captions[0]))
    log.figure(
        "retrieval",
        figures.gallery(rows, ("1st", "2nd", "3rd", "4th", "5th"), tile_px=110),
        "Pictures found for captions",
        "Each row is a held-out caption and the five held-out pictures that fit it best, with their own "
        "captions; the right one has a green frame.",
    )


def _thumbnail(example: Example, tools: Tools) -> "np.ndarray[Any, Any]":
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    picture = tools.pictures.open(example.image, example.id)
    found: np.ndarray[Any, Any] = tools.pictures.crop(picture, centre_crop(*picture.size), 110).transpose(
        1, 2, 0
    )
    return found
