"""Captioning: words for a picture by a model that predicts masked words (COCO, nocaps)."""

import importlib.util
import re
import shutil
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
from beitctl.errors import DataError, SetupError, UserError
from beitctl.model import decoding
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.asking import need_language, picture_of
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.measures import captions as measures
from beitctl_plugins.tasks.measures.tokens import tokens
from beitctl_plugins.tasks.preparing import caption_of, framed, loaded, longest, view_of

HEAD = "captions"
CIDER = "cider_d (python tokenizer)"
RESULTS = "captions.json"
SHOWN = 8
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
    """Step from which on that is so."""
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
    """Whether pycocoevalcap measures as well, which needs Java."""

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
        if not ids:
            raise DataError(f"{example.id}: the caption has no token")
        return framed(ids[:room], tokenizer)

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = heads[HEAD](encoded.rows[group.text_rows]).float()
        losses = smoothed(logits, group.text_targets, self.label_smoothing)
        hits = (logits.detach().argmax(-1) == group.text_targets).sum()
        count = len(losses)
        kept = int(count * (1 - self.drop_worst))
        if group.step < self.drop_worst_after or kept in (0, count):
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
        """CIDEr-D, BLEU and ROUGE-L of the examples that have captions, and those of one caption for all."""
        said = [caption for batch in outputs for caption in batch]
        rows, results, references = [], [], []
        for example, caption in zip(examples, said, strict=True):
            true = references_of(example, tools)
            rows.append({"id": example.id, "caption": caption, "references": true})
            results.append({"image_id": image_id(example.id), "caption": caption})
            references.append(true)
        known = [place for place, true in enumerate(references) if true]
        metrics: dict[str, float] = {}
        each: dict[str, Any] = {}
        if known:
            truth = [[tokens(text) for text in references[place]] for place in known]
            values = measures.cider_d([tokens(said[place]) for place in known], truth)
            metrics, each = (
                self._metrics(values, [said[place] for place in known], truth, train),
                {CIDER: values},
            )
            if self.official:
                metrics |= official([said[p] for p in known], [references[p] for p in known])
        counts = {
            "distinct": len(set(said)) / len(said),
            "examples": float(len(said)),
            "references": float(sum(map(len, references))),
            "without_references": float(len(said) - len(known)),
        }
        return Measured({**metrics, **counts}, each, rows, {RESULTS: results})

    @staticmethod
    def _metrics(
        cider: NDArray[np.float64], said: Sequence[str], truth: list[list[list[str]]], train: Examples
    ) -> dict[str, float]:
        mine = [tokens(caption) for caption in said]
        bleu = measures.bleu(mine, truth)
        usual = tokens(most_frequent(train))
        return {
            CIDER: float(cider.mean()),
            "bleu4": bleu[3],
            "bleu1": bleu[0],
            "rouge_l": float(measures.rouge_l(mine, truth).mean()),
            "baseline_cider_d": float(measures.cider_d([usual] * len(mine), truth).mean()),
        }

    def draw(self, outputs: Sequence[list[str]], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Pictures with the captions that fit people's best and worst, and those of people."""
        said = [caption for batch in outputs for caption in batch]
        known = [n for n, example in enumerate(examples) if references_of(example, tools)][:1000]
        if not known:
            return
        truth = [references_of(examples[n], tools) for n in known]
        values = measures.cider_d(
            [tokens(said[n]) for n in known], [[tokens(text) for text in texts] for texts in truth]
        )
        order = [int(place) for place in np.argsort(-values, kind="stable")]
        rows = []
        for title, chosen in (
            ("closest to people's", order[:SHOWN]),
            ("furthest from them", order[::-1][:SHOWN]),
        ):
            tiles = []
            for place in chosen:
                example, caption = examples[known[place]], said[known[place]] or "(nothing)"
                text = f"{caption} (people: {truth[place][0]})"
                tiles.append(figures.Tile(picture_of(example.image, example.id, tools), text))
            rows.append(figures.Row(tiles, title))
        log.figure(
            "captions",
            figures.gallery(rows, tile_px=120),
            "Captions",
            "What the model says of held-out pictures, and in brackets the first caption of people.",
        )


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
    """Captions of people, in words."""
    if example.captions or not example.caption_ids or tools.tokenizer is None:
        return list(example.captions)
    return [tools.tokenizer.decode([int(number) for number in ids]) for ids in example.caption_ids]


def most_frequent(train: Examples, most: int = 20_000) -> str:
    """The most frequent caption of the first training examples, the first of equals."""
    found: Counter[str] = Counter()
    for index in range(min(len(train), most)):
        try:
            found.update(words(train, index))
        except DataError:
            continue
    return found.most_common(1)[0][0] if found else ""


def image_id(id: str) -> int | str:
    """The number of a picture of COCO by its file name, or any other id as it is."""
    match = re.fullmatch(r"(?:COCO_\w+_)?(\d+)(?:\.\w+)?", id)
    return int(match[1]) if match else id


def official(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What pycocoevalcap measures, under ``official_`` and its names.

    Raises:
        SetupError: it or Java is missing.
    """
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        raise SetupError(
            "official = true needs pycocoevalcap and Java: pip install pycocoevalcap, and a Java runtime "
            "(Debian: default-jre-headless)"
        )
    from pycocoevalcap.bleu.bleu import Bleu  # noqa: PLC0415 - only where it is installed
    from pycocoevalcap.cider.cider import Cider  # noqa: PLC0415
    from pycocoevalcap.meteor.meteor import Meteor  # noqa: PLC0415
    from pycocoevalcap.rouge.rouge import Rouge  # noqa: PLC0415
    from pycocoevalcap.spice.spice import Spice  # noqa: PLC0415
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # noqa: PLC0415

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({n: [{"caption": t} for t in texts] for n, texts in enumerate(references)})
    mine = tokenizer.tokenize({n: [{"caption": caption}] for n, caption in enumerate(said)})
    found: dict[str, float] = {}
    for name, scorer in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider()), ("SPICE", Spice())):
        found[f"official_{name}"] = float(scorer.compute_score(truth, mine)[0])
    bleu = Bleu(4).compute_score(truth, mine)[0]
    return found | {f"official_Bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
