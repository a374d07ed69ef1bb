"""Image-text retrieval with two encoders: the branches of the model, each on its own."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from beitctl.api import CropScale, Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.data.batch import Group
from beitctl.data.images import centre_crop
from beitctl.engine.learner import PIXELS, MultiwayLearner, normalise
from beitctl.engine.losses import info_nce
from beitctl.errors import DataError
from beitctl.model.heads import ContrastiveHead
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.matching import Ints, Matches, recalls
from beitctl_plugins.tasks.preparing import framed, loaded, longest, view_of

HEAD = "contrastive"
TEXTS = 256
"""Captions in one forward pass of evaluation."""
SHOWN = 8
WAYS = ("i2t", "t2i")


class Retrieval(Plugin):
    """Bring a picture and its caption together and all others apart (symmetric InfoNCE over all ranks).

    Evaluation uses all captions of every picture: recall at k is the share of pictures of which any caption
    is among the k best texts (``i2t``), and of captions of which the picture is among the k best pictures
    (``t2i``). Source: BEiT-3, arXiv:2208.10442, section 3.1, and its fine-tuning code.
    """

    layout: ClassVar[Literal["dual"]] = "dual"

    crop_scale: CropScale = (0.5, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    augment: Augment = ""
    """RandAugment behind the crop; the published runs have none."""
    text_tokens: int = Field(default=0, ge=0)
    """Longest caption in tokens, start and end included; the rest is cut off and counted. 0: the model's."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the target spreads over the whole batch."""
    duplicates: bool = True
    """Whether a picture that was given an equal caption is a hit too; the published figures of COCO and
    Flickr30k are without (false)."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with captions as long as a small model reads."""
        return {key: value for key, value in table.items() if key != "text_tokens"}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """The embedded pictures with their captions."""
        return {"kind": "embedded", "content": "pairs", "split": split}

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        return {HEAD: ContrastiveHead(tools.model.width)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """A picture with any one of its captions in training, with all of them in evaluation.

        Those are in ``extra``: ``texts`` (k, S) int64, padded, their ``lengths`` (k,) int64, and whether each
        was ``cut`` (k,) uint8. ``text`` is the first.

        Raises:
            DataError: no picture, no caption, or one of the captions is empty.
        """
        count = len(captions_of(example))
        if not count:
            raise DataError(f"{example.id}: no caption")
        numbers = [int(draw.integers(count))] if tools.train else range(count)
        texts, cut = zip(*(caption_ids(example, n, tools, self.text_tokens) for n in numbers), strict=True)
        image = view_of(example, draw, tools, self.crop_scale, test="squash", augment=self.augment)
        if tools.train:
            return Item(image=image, text=texts[0])
        lengths = np.array([len(text) for text in texts], np.int64)
        padded = np.full((count, lengths.max()), loaded(tools).pad_id, np.int64)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        extra = {"texts": padded, "lengths": lengths, "cut": np.array(cut, np.uint8)}
        return Item(image=image, text=texts[0], extra=extra)

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

    def infer(
        self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools
    ) -> dict[str, Tensor]:
        """Every picture and every caption encoded once.

        Returns:
            ``pictures`` (n, d) and ``texts`` (M, d) unit vectors; ``counts`` (n,) captions of each picture,
            and ``cut`` (n,) those that were too long.
        """
        model, head = learner.model, learner.heads[HEAD]
        items = [item for _, item in chunk]
        pixels = torch.from_numpy(np.stack([item.image for item in items if item.image is not None]))
        packed, _ = model.pack(image=normalise(pixels.to(model.device), PIXELS[model.config.pixels]))
        first = torch.from_numpy(packed.layout.plan.image_rows(0, len(items))[:, 0].copy()).to(model.device)
        pictures = head.pictures(model.encode(packed)[first])  # type: ignore[operator]
        texts = [
            row[:length]
            for item in items
            for row, length in zip(item.extra["texts"], item.extra["lengths"], strict=True)
        ]
        found = [_text_vectors(learner, texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)]
        return {
            "pictures": pictures,
            "texts": torch.cat(found),
            "counts": torch.tensor([len(item.extra["lengths"]) for item in items]),
            "cut": torch.tensor([int(item.extra["cut"].sum()) for item in items]),
        }

    def score(
        self,
        outputs: Sequence[Mapping[str, Tensor]],
        examples: Sequence[Example],
        tools: Tools,
        train: Examples,
    ) -> Measured:
        """Recall at 1, 5, 10 both ways over all captions, and that of a random order.

        Raises:
            DivergedError: the vectors are not numbers.
        """
        pictures, texts = _vectors(outputs)
        read = (examples[i] for i in range(len(examples)))
        known = [(one.id, caption_keys(one), words_of(one, tools)) for one in read]
        matches = Matches.of([keys for _, keys, _ in known], self.duplicates)
        ranks = matches.by_vectors(pictures, texts)
        best = _best(pictures, texts)
        words = [caption for _, _, own in known for caption in own]
        starts = np.searchsorted(matches.owners, np.arange(len(known) + 1))
        rows = [
            {
                "id": id,
                "captions": list(own),
                "best text": words[best[i]],
                "rank of the first own caption": int(ranks[0][i]) + 1,
                "ranks of the picture": (ranks[1][starts[i] : starts[i + 1]] + 1).tolist(),
            }
            for i, (id, _, own) in enumerate(known)
        ]
        cut = float(sum(int(out["cut"].sum()) for out in outputs))
        each = {f"{way}_r1": (found < 1).astype(np.float64) for way, found in zip(WAYS, ranks, strict=True)}
        return Measured({**recalls(ranks, matches), "truncated_captions": cut}, each, rows)

    def draw(
        self, outputs: Sequence[Mapping[str, Tensor]], examples: Sequence[Example], tools: Tools, log: Log
    ) -> None:
        """First captions with the five pictures found for each: some evenly spread, and the worst."""
        pictures, texts = _vectors(outputs)
        matches = Matches.of([caption_keys(examples[i]) for i in range(len(examples))], self.duplicates)
        firsts = np.searchsorted(matches.owners, np.arange(len(pictures)))

        def scores(asked: Ints) -> Tensor:
            return texts[firsts[asked]] @ pictures.T

        retrieval_gallery(scores, examples, tools, log, duplicates=self.duplicates)
        ranks = matches.by_vectors(pictures, texts)[1][firsts]
        worst = [int(i) for i in np.argsort(-ranks, kind="stable")[:SHOWN] if ranks[i]]
        if worst:
            retrieval_gallery(scores, examples, tools, log, worst, duplicates=self.duplicates)


def captions_of(example: Example) -> Sequence[Any]:
    """Captions of an example: arrays of ids where it has them, else sentences."""
    return example.caption_ids or example.captions


def caption_ids(
    example: Example, number: int, tools: Tools, setting: int = 0
) -> tuple[NDArray[np.int64], bool]:
    """Ids (S,) of a caption, start and end included, and whether it was too long.

    Args:
        example: has captions.
        number: which of them.
        tools: the tokenizer, and the model's longest text.
        setting: the task's ``text_tokens``; 0: the model's.

    Raises:
        DataError: the caption is empty, or has an id that the model has not.
    """
    tokenizer, room = loaded(tools), longest(setting, tools) - 2
    caption = captions_of(example)[number]
    ids = tokenizer.encode(caption) if isinstance(caption, str) else [int(one) for one in caption]
    if wrong := [one for one in ids if not 0 <= one < tools.model.vocabulary]:
        raise DataError(f"{example.id}: id {wrong[0]} is none of the model's {tools.model.vocabulary}")
    if not ids:
        raise DataError(f"{example.id}: caption {number + 1} is empty")
    return framed(ids[:room], tokenizer), len(ids) > room


def words_of(example: Example, tools: Tools) -> tuple[str, ...]:
    """The captions of an example in words."""
    if len(example.captions) >= len(example.caption_ids) or tools.tokenizer is None:
        return example.captions
    return tuple(tools.tokenizer.decode([int(one) for one in ids]) for ids in example.caption_ids)


def caption_keys(example: Example) -> list[Hashable]:
    """The captions as values that are equal where the captions are."""
    return [one if isinstance(one, str) else tuple(map(int, one)) for one in captions_of(example)]


def _text_vectors(learner: MultiwayLearner, texts: Sequence[NDArray[np.int64]]) -> Tensor:
    """(k, d) unit vectors of texts."""
    model = learner.model
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((len(texts), lengths.max()), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    pad = np.arange(ids.shape[1])[None] >= lengths[:, None]
    packed, _ = model.pack(
        text=torch.from_numpy(ids).to(model.device), text_pad=torch.from_numpy(pad).to(model.device)
    )
    first = torch.from_numpy(packed.layout.plan.text_starts.copy()).to(model.device)
    found: Tensor = learner.heads[HEAD].texts(model.encode(packed)[first])  # type: ignore[operator]
    return found


def _vectors(outputs: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """All pictures (n, d) and texts (M, d) of some batches."""
    pictures, texts = (
        torch.cat([out[key] for out in outputs]).cpu().float() for key in ("pictures", "texts")
    )
    return pictures, texts


def _best(pictures: Tensor, texts: Tensor, size: int = TEXTS) -> list[int]:
    """The text that fits each picture best."""
    parts = [(pictures[at : at + size] @ texts.T).argmax(1) for at in range(0, len(pictures), size)]
    return [int(number) for number in torch.cat(parts)]


def retrieval_gallery(
    scores: Callable[[Ints], Tensor], examples: Sequence[Example], tools: Tools, log: Log,
    worst: Sequence[int] = (), *, duplicates: bool = True,
) -> None:  # fmt: skip
    """Draw first captions with their five best pictures, the right ones framed.

    Args:
        scores: numbers of examples to the scores of their first captions with all pictures (q, n).
        examples: all n.
        tools: open pictures.
        log: where the figure goes.
        worst: the examples to show, as mistakes; by default some that are evenly spread.
        duplicates: whether a picture that was given an equal caption is right too.
    """
    spread = np.linspace(0, len(examples) - 1, min(SHOWN, len(examples))).round().astype(np.int64)
    asked = np.array(worst, np.int64) if worst else spread
    rows = []
    for query, found in zip(asked.tolist(), scores(asked), strict=True):
        wanted = examples[query]
        tiles = []
        for place in found.argsort(descending=True, stable=True)[:5].tolist():
            shown = examples[place]
            right = place == query or (duplicates and caption_keys(wanted)[0] in caption_keys(shown))
            tiles.append(
                figures.Tile(_thumbnail(shown, tools), words_of(shown, tools)[0], "right" if right else None)
            )
        rows.append(figures.Row(tiles, words_of(wanted, tools)[0]))
    log.figure(
        "retrieval-mistakes" if worst else "retrieval",
        figures.gallery(rows, ("1st", "2nd", "3rd", "4th", "5th"), tile_px=110),
        "Captions whose picture was found last" if worst else "Pictures found for captions",
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
