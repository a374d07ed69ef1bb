"""Captioning: words for a picture by a model that predicts masked words (COCO, nocaps)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from beitctl.api import CropScale, Example, Examples, Item, Log, Measured, Plugin, Term, TextTokenizer, Tools
from beitctl.data.batch import Group
from beitctl.data.labels import words
from beitctl.engine.learner import PIXELS, MultiwayLearner, normalise
from beitctl.errors import ChangedError, DataError, UserError
from beitctl.model import decoding
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.asking import need_language, picture_of
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.measures import captions as measures
from beitctl_plugins.tasks.measures import official
from beitctl_plugins.tasks.measures.tokens import tokens
from beitctl_plugins.tasks.preparing import caption_of, framed, loaded, longest, view_of

HEAD = "captions"
CIDER = "cider_d (python tokenizer)"
RESULTS = "captions.json"
SHOWN = 8
MOST_DRAWN, MOST_COUNTED = 1_000, 20_000
"""Examples among which those to draw are chosen, and among which the most frequent caption is."""
SHORTEST = 4
"""Tokens of the shortest captions: the released search keeps three for start, end and a mask."""
IMAGE_ID = re.compile(r"(?:.*/)?COCO_\w+_([0-9]{1,18})(?:\.\w+)?|([0-9]{1,18})(?:\.\w+)?")
RANDOM, KEPT = 0.1, 0.1
"""Shares of the hidden tokens that show another token, and that show themselves."""


class Captioning(Plugin):
    """Describe a picture in words.

    Trained as masked language modelling under a mask of attention in which a word sees the picture and what
    stands before it; the caption is then found by beam search, a mask token at a time. Source: the released
    fine-tuning code of BEiT-3 (arXiv:2208.10442), after s2s-ft.
    """

    layout: ClassVar[Literal["pair"]] = "pair"
    causal_text: ClassVar[bool] = True
    heads_from: ClassVar[Mapping[str, str]] = {HEAD: "text_tokens"}
    """The head begins as that of the pretrained words, as in the released files."""

    mask_ratio: float = Field(default=0.7, gt=0, le=1)
    """Share of a caption's tokens that are hidden, its end among them, its start never."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the target spreads over all other ids."""
    drop_worst: float = Field(default=0.2, ge=0, lt=1)
    """Share of the hidden tokens of a pass, those with the largest losses, that late steps leave out."""
    drop_worst_after: int = Field(default=12_000, ge=0)
    """Last step, counted from 0, that still learns from all of them."""
    beam_size: int = Field(default=3, ge=1)
    """Captions that the search follows at a time."""
    length_penalty: float = Field(default=0.6, ge=0)
    """A caption's log-likelihood is divided by its length to this power."""
    text_tokens: int = Field(default=0, ge=0)
    """Longest caption in tokens, start and end included (BEiT-3: 32); 0: the model's longest text."""
    crop_scale: CropScale = (0.5, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    augment: Augment = ""
    """RandAugment behind the crop: "beit3" for the published runs."""
    official: bool = False
    """Whether pycocoevalcap measures as well, which needs Java. Its SPICE fetches models at its first
    use; where it fails ``official_without_SPICE`` is 1."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task for short texts."""
        return {**table, "text_tokens": 0}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """The embedded pictures with their captions."""
        return {"kind": "embedded", "content": "pairs", "split": split}

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("text")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        need_language("captioning", tools)
        if (most := longest(self.text_tokens, tools)) < SHORTEST:
            raise UserError(
                f"captioning has no room for a word in {most} tokens: start, end and a mask take three; "
                "raise text_tokens"
            )
        if self.official:
            official.need()
        if tools.model.position != "absolute":
            raise UserError(
                f'captioning needs position = "absolute", as BEiT-3 has, not "{tools.model.position}"'
            )
        return {HEAD: nn.Linear(tools.model.width, tools.model.vocabulary)}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """No classes."""
        return ()

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        image = view_of(example, draw, tools, self.crop_scale, test="squash", augment=self.augment)
        if not tools.train:
            tokenizer = loaded(tools)
            return Item(image=image, text=framed([], tokenizer))
        ids = self._ids(example, draw, tools)
        shown, targets = hidden(ids, self.mask_ratio, draw, loaded(tools))
        return Item(image=image, text=shown, text_targets=targets)

    def _ids(self, example: Example, draw: np.random.Generator, tools: Tools) -> NDArray[np.int64]:
        tokenizer, room = loaded(tools), longest(self.text_tokens, tools) - 2
        if example.caption_ids:
            chosen = example.caption_ids[int(draw.integers(len(example.caption_ids)))]
            ids: Sequence[int] = [int(number) for number in chosen]
        else:
            ids = tokenizer.encode(caption_of(example, draw, tools))
        if wrong := [number for number in ids if not 0 <= number < tools.model.vocabulary]:
            raise DataError(f"{example.id}: id {wrong[0]} is none of the model's {tools.model.vocabulary}")
        if not ids:
            raise DataError(f"{example.id}: the caption has no token")
        return framed(ids[:room], tokenizer)

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = heads[HEAD](encoded.rows[group.text_rows]).float()
        losses = smoothed(logits, group.text_targets, self.label_smoothing)
        hits = (logits.detach().argmax(-1) == group.text_targets).sum()
        count = len(losses)
        kept = int(count * (1 - self.drop_worst))
        if group.step <= self.drop_worst_after or kept in (0, count):
            return {"": (losses.sum(), hits)}
        best = losses.topk(kept, largest=False).values
        return {"": (best.sum() * (count / kept), hits)}  # the loop divides by all: the mean is of those kept

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(m, V) logits of the hidden tokens."""
        logits: Tensor = heads[HEAD](encoded.rows[group.text_rows])
        return logits.float()

    def infer(
        self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools
    ) -> list[str]:
        """The caption of every picture, found by beam search."""
        tokenizer, model = loaded(tools), learner.model
        pictures = np.stack([np.asarray(item.image) for _, item in chunk])
        pixels = normalise(torch.from_numpy(pictures).to(model.device), PIXELS[model.config.pixels])
        search = decoding.Search(
            tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id, longest(self.text_tokens, tools),
            self.beam_size, self.length_penalty,
        )  # fmt: skip
        found = decoding.captions(model, learner.heads[HEAD], pixels, search)
        return [tokenizer.decode(ids).strip() for ids, _ in found]

    def score(
        self, outputs: Sequence[list[str]], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """CIDEr-D, BLEU and ROUGE-L where people gave captions, and CIDEr-D of one caption for all."""
        said = [caption for batch in outputs for caption in batch]
        people = [(example.id, references_of(example, tools)) for example in examples]
        rows = [
            {"id": id, "caption": caption, "references": true}
            for (id, true), caption in zip(people, said, strict=True)
        ]
        numbers = image_ids([id for id, _ in people])
        results = [{"image_id": n, "caption": caption} for n, caption in zip(numbers, said, strict=True)]
        known = [row for row in rows if row["references"]]
        metrics, each = self._metrics(known, most_frequent(train, tools)) if known else ({}, {})
        counts = {
            "distinct": len(set(said)) / len(said),
            "examples": float(len(said)),
            "references": float(sum(len(true) for _, true in people)),
            "without_references": float(len(said) - len(known)),
        }
        return Measured({**metrics, **counts}, each, rows, {RESULTS: results})

    def _metrics(
        self, known: Sequence[Mapping[str, Any]], usual: str | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of rows with references, and the values of those that need intervals."""
        mine = [tokens(row["caption"]) for row in known]
        truth = [[tokens(text) for text in row["references"]] for row in known]
        cider, bleu = measures.cider_d(mine, truth), measures.bleu(mine, truth)
        metrics = {
            CIDER: float(cider.mean()),
            "bleu4": bleu[3],
            "bleu1": bleu[0],
            "rouge_l": float(measures.rouge_l(mine, truth).mean()),
        }
        if usual is not None:
            same = measures.cider_d([tokens(usual)] * len(mine), truth)
            metrics["baseline_cider_d"] = float(same.mean())
        if self.official:
            found = official.scores([row["caption"] for row in known], [row["references"] for row in known])
            metrics |= {f"official_{name}": value for name, value in found.items()}
        return metrics, {CIDER: cider}

    def draw(self, outputs: Sequence[list[str]], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Pictures with the captions closest to people's and furthest from them, and those of people."""
        said = [caption for batch in outputs for caption in batch]
        some = spread(len(said), MOST_DRAWN)
        people = {place: references_of(examples[place], tools) for place in some}
        known = [place for place in some if people[place]]
        shown = {"no captions to compare with": some[:SHOWN]}
        if known:
            truth = [[tokens(text) for text in people[place]] for place in known]
            values = measures.cider_d([tokens(said[place]) for place in known], truth)
            order = [known[number] for number in np.argsort(-values, kind="stable")]
            half = (len(order) + 1) // 2
            shown = {
                "closest to people's": order[:half][:SHOWN], "furthest from them": order[half:][::-1][:SHOWN]
            }  # fmt: skip
        rows = []
        for title, places in shown.items():
            tiles = []
            for place in places:
                example, caption = examples[place], said[place] or "(nothing)"
                text = f"{caption} (people: {people[place][0]})" if people[place] else caption
                tiles.append(figures.Tile(picture_of(example.image, example.id, tools), text))
            rows += [figures.Row(tiles, title)] if tiles else []
        log.figure(
            "captions",
            figures.gallery(rows, tile_px=120),
            "Captions",
            "What the model says of held-out pictures, and in brackets the first caption of people. Chosen "
            "by CIDEr-D among up to 1,000 examples, evenly spread.",
        )


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spread, in order."""
    return [int(n) for n in np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))]


def hidden(
    ids: NDArray[np.int64], ratio: float, draw: np.random.Generator, tokenizer: TextTokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids to feed and ids to predict, (S,) each, of a caption with its start and end.

    Of n tokens int(n ratio + .5) are predicted, at least one and all but the start at most; 80 % of them show
    a mask, 10 % themselves, 10 % another id, the end and the mask among them, start and padding never.
    """
    count = min(max(1, int(len(ids) * ratio + 0.5)), len(ids) - 1)
    places = 1 + draw.permutation(len(ids) - 1)[:count]
    targets = np.full(len(ids), -1, np.int64)
    targets[places] = ids[places]
    shown = ids.copy()
    chance = draw.random(count)
    shown[places[chance >= RANDOM + KEPT]] = tokenizer.mask_id
    others = places[chance < RANDOM]
    allowed = random_ids(tokenizer)
    shown[others] = allowed[draw.integers(len(allowed), size=len(others))]
    return shown, targets


def random_ids(tokenizer: TextTokenizer) -> NDArray[np.int64]:
    """Ids that may stand in place of a hidden one: all but start, end and padding (BEiT-3: 3 to 64001)."""
    never = (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
    found = np.arange(tokenizer.size, dtype=np.int64)
    return found[~np.isin(found, never)]


def smoothed(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """(m,) Kullback-Leibler divergences of (m, V) logits from targets, of which ``smoothing`` is spread.

    All other ids share it evenly, and the entropy of the target is taken off, so that the best is 0.
    """
    scores = logits.log_softmax(-1)
    right = scores.gather(1, targets[:, None])[:, 0]
    if not smoothing:
        return -right
    each = smoothing / (logits.shape[-1] - 1)
    entropy = -(1 - smoothing) * np.log(1 - smoothing) - smoothing * np.log(each)
    return -(1 - smoothing) * right - each * (scores.sum(-1) - right) - float(entropy)


def references_of(example: Example, tools: Tools) -> list[str]:
    """Captions of people in words, without blank ones."""
    found = list(example.captions)
    if not found and tools.tokenizer is not None:
        found = [tools.tokenizer.decode([int(number) for number in ids]) for ids in example.caption_ids]
    return [text for text in found if text.strip()]


def most_frequent(train: Examples, tools: Tools) -> str | None:
    """The most frequent caption in training, the first of equals; None if there is none.

    Of more than 20,000 examples so many are looked at, evenly spread.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    found: Counter[str] = Counter()
    for index in spread(len(train), MOST_COUNTED):
        try:
            texts = words(train, index) or references_of(train[index], tools)
        except ChangedError:
            raise
        except DataError:
            continue
        found.update(text for text in texts if text.strip())
    return found.most_common(1)[0][0] if found else None


def image_id(id: str) -> int | str:
    """The number of a picture of COCO by its file name, or any other id as it is."""
    match = IMAGE_ID.fullmatch(id)
    return int(match[1] or match[2]) if match else id


def image_ids(ids: Sequence[str]) -> list[int | str]:
    """What the evaluation server calls each picture; their ids where two would be called the same."""
    found = [image_id(id) for id in ids]
    return found if len(set(found)) == len(set(ids)) else list(ids)
