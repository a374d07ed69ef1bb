"""Visual question answering: an answer of a fixed list to a question about a picture (VQA v2)."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import CropScale, Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.errors import UserError
from beitctl.model.heads import MlpHead, Pooler
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks import answers
from beitctl_plugins.tasks.asking import Choices, need_language, picture_of, text_ids, text_of
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.preparing import view_of

POOLER, HEAD = "pooler", "answers"
RESULTS = "vqa-results.json"
SHOWN = 8
KINDS = ("yes_no", "number", "other")


class VQA(Plugin):
    """Answer a question about a picture with one of the answers that were frequent in training (VQA v2).

    The model's form follows from its ``text_first``: BEiT-3 reads the picture's class token, without the
    final norm but under a norm of the pooler; VLMo reads the text's first token after the final norm.

    Every answer is a yes or no of its own (binary cross-entropy), so several may be right. The targets are
    those of the official code: an answer that 1, 2, 3 or more of ten people gave is right to 0.3, 0.6, 0.9
    or 1. Of fewer than four answers the share counts, so that a single one is right to 1. Sources:
    arXiv:2208.10442 and its fine-tuning code; arXiv:2111.02358.
    """

    layout: ClassVar[Literal["pair"]] = "pair"

    answer_file: str = ""
    """File of the answers that can be given, BEiT-3's ``answer2label.txt``; needed where a released head is
    continued. Empty: the answers of the training examples."""
    min_answer_count: int = Field(default=9, ge=1)
    """Without ``answer_file``: to how many training questions an answer must be the one that most people gave
    (VQA v2: 9, which leaves 3,129)."""
    lookup: Literal["given", "normalised"] = "given"
    """How answers are looked up among those of the list, which are normalised: as people ``given`` them, like
    the released code, or ``normalised`` too, for answers in capitals, number words or with articles."""
    text_tokens: int = Field(default=0, ge=0)
    """Longest question in tokens, start and end included; the rest is cut off and counted. 0: the model's."""
    crop_scale: CropScale = (0.5, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    augment: Augment = ""
    """RandAugment behind the crop: "beit3" for the published runs."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with every answer that occurs."""
        kept = {key: value for key, value in table.items() if key not in ("answer_file", "text_tokens")}
        return {**kept, "min_answer_count": 1}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """Questions made from the labels of the embedded pictures."""
        return {"kind": "embedded", "content": "questions", "split": split}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """The answers that can be given, in the order of their numbers."""
        if self.answer_file:
            return answers.read_vocabulary(Path(self.answer_file))
        return answers.frequent(examples, self.min_answer_count)

    def usable(self, examples: Examples, labels: Sequence[str]) -> list[int]:
        """Indices of the examples that are trained on: those with an answer of the list, as in BEiT-3's code.

        Examples that cannot be read stay among them, so that the training counts them.
        """
        return [
            index
            for index, example in answers.readable(examples)
            if example is None or len(self._targets(example, tuple(labels))[0])
        ]

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        need_language("vqa", tools)
        if len(tools.labels) < 2:
            raise UserError(
                f"vqa needs at least two answers to choose from, found {len(tools.labels)}: no more are "
                f"given to {self.min_answer_count} questions; lower min_answer_count, or name an answer_file"
            )
        width = tools.model.width
        pooler = Pooler(width, norm=not tools.model.text_first)
        return {POOLER: pooler, HEAD: MlpHead(width, 2 * width, len(tools.labels))}

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """BEiT-3's head has a norm in place of the model's last one; VLMo's has none."""
        return replace(config, final_norm=config.text_first)

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        text, _ = text_ids(example, tools, self.text_tokens)
        image = view_of(example, draw, tools, self.crop_scale, test="squash", augment=self.augment)
        numbers, values = self._targets(example, tools.labels)
        return Item(image=image, text=text, extra={"answers": numbers, "scores": values})

    def _targets(
        self, example: Example, labels: tuple[str, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return answers.targets(example.answers, _numbers(labels), alike=self.lookup == "normalised")

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, V) logits of the answers."""
        first = group.text_first if encoded.model.config.text_first else group.picture_rows[:, 0]
        logits: Tensor = heads[HEAD](heads[POOLER](encoded.rows[first]))
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Binary cross-entropy, summed over answers; and the targets of the likeliest answers."""
        logits = self.output(encoded, group, heads)
        wanted = dense_targets(group, logits)
        total = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        said = logits.detach().argmax(-1, keepdim=True)
        return {"": (total, wanted.gather(1, said).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Official score, that of training, and those of the most frequent answer and of the question alone.

        Questions without given answers (a test set) have predictions alone. An answer that is not on the
        list makes no question easier: it counts as missed.
        """
        chosen, baselines = Choices.of(outputs, apart=True), _Baselines.of(train)
        judged = [
            self._judged(examples[i], tools.labels[place], float(sure), tools, baselines)
            for i, (place, sure) in enumerate(zip(chosen.places, chosen.sure, strict=True))
        ]
        known = [one for one in judged if one.kind]
        each = {
            "vqa_score": np.array([one.score for one in known]),
            "accuracy": np.array([one.soft for one in known]),
        }
        metrics = {name: float(values.mean()) for name, values in each.items() if known}
        if known and baselines.majority is not None:
            metrics |= {
                "majority": float(np.mean([one.majority for one in known])),
                "question_only": float(np.mean([one.by_question for one in known])),
            }
        for kind in KINDS:
            if scores := [one.score for one in known if one.kind == kind]:
                metrics[f"vqa_score_{kind}"] = float(np.mean(scores))
        metrics |= {
            "examples": float(len(judged)),
            "without_answers": float(len(judged) - len(known)),
            "without_answer_in_vocabulary": float(sum(not one.on_list for one in known)),
            "truncated_questions": float(sum(one.cut for one in judged)),
        }
        results = [{"question_id": _number(row["id"]), "answer": row["predicted"]} for row in _rows(judged)]
        return Measured(metrics, each if known else {}, _rows(judged), {RESULTS: results})

    def _judged(
        self, example: Example, said: str, sure: float, tools: Tools, baselines: "_Baselines"
    ) -> "_Judged":
        given, best = example.answers, answers.agreed(example.answers)
        numbers, values = self._targets(example, tools.labels)
        soft = {tools.labels[n]: float(v) for n, v in zip(numbers, values, strict=True)}
        found = answers.score(said, given)
        row = {
            "id": example.id, "question": text_of(example, tools), "predicted": said, "probability": sure,
            "answers": list(given),
        }  # fmt: skip
        return _Judged(
            row if best is None else {**row, "vqa_score": found},
            kind="" if best is None else answers.kind(best),
            score=found,
            soft=soft.get(said, 0.0),
            majority=answers.score(baselines.majority or "", given),
            by_question=answers.score(baselines.by_question(answers.question(example)), given),
            on_list=bool(soft),
            cut=text_ids(example, tools, self.text_tokens)[1],
        )

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Pictures with questions: the surest right answers, the surest mistakes, what nobody can judge."""
        chosen = Choices.of(outputs, apart=True)
        titles = ("surest right answers", "surest mistakes", "no answer to compare with")
        tiles: dict[str, list[figures.Tile]] = {title: [] for title in titles}
        for place in chosen.spread():
            example, said = examples[place], tools.labels[chosen.places[place]]
            best = answers.agreed(example.answers)
            right = None if best is None else answers.score(said, example.answers) >= 0.5
            row = tiles[titles[2] if right is None else titles[0] if right else titles[1]]
            if len(row) < SHOWN:
                row.append(_tile(example, said, float(chosen.sure[place]), tools, right))
        log.figure(
            "answers",
            figures.gallery([figures.Row(row, title) for title, row in tiles.items() if row], tile_px=110),
            "Questions and answers",
            "Held-out pictures with the question, the answer given and its probability; right ones, with an "
            "official score of at least a half, have a green frame. The surest of up to 1,000 questions, "
            "evenly spread.",
        )


def dense_targets(group: Group, logits: Tensor) -> Tensor:
    """(n, V) float32 scores of all answers, from the sparse ones in ``group.extra``."""
    lengths = torch.tensor([len(one["answers"]) for one in group.extra], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(logits.device)
    found = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    if len(rows):
        columns = torch.cat([one["answers"] for one in group.extra])
        found[rows, columns] = torch.cat([one["scores"] for one in group.extra])
    return found


@functools.lru_cache(maxsize=4)
def _numbers(labels: tuple[str, ...]) -> dict[str, int]:
    return {answer: number for number, answer in enumerate(labels)}


@dataclass(frozen=True)
class _Baselines:
    """What can be said without looking at the picture."""

    majority: str | None
    """None: no training question has an answer."""
    by_question: answers.QuestionOnly

    @classmethod
    def of(cls, train: Examples) -> "_Baselines":
        asked = [
            (answers.question(example), answer)
            for _, example in answers.readable(train)
            if example is not None and (answer := answers.agreed(example.answers)) is not None
        ]
        counted = Counter(answer for _, answer in asked)
        return cls(counted.most_common(1)[0][0] if asked else None, answers.QuestionOnly(asked))


@dataclass(frozen=True)
class _Judged:
    """A question with its answer."""

    row: Mapping[str, Any]
    kind: str
    """Kind of the answer that most people gave; empty where nobody gave one."""
    score: float
    """Official score of the answer."""
    soft: float
    """Its score in the targets of training."""
    majority: float
    """Official score of the most frequent answer."""
    by_question: float
    """Official score of what the question alone tells."""
    on_list: bool
    """Whether an answer that was given can be given by the model."""
    cut: bool
    """Whether the question was too long."""


def _rows(judged: Sequence[_Judged]) -> list[Mapping[str, Any]]:
    return [one.row for one in judged]


def _number(id: str) -> int | str:
    """An example's id as the evaluation server wants it: VQA v2 numbers its questions."""
    return int(id) if id.isascii() and id.isdigit() else id


def _tile(example: Example, said: str, sure: float, tools: Tools, right: bool | None) -> figures.Tile:
    best = answers.agreed(example.answers)
    caption = f"{text_of(example, tools)} – {said}, {sure:.0%}"
    if right is False:
        caption += f" (people: {best})"
    image = picture_of(example.image, example.id, tools)
    return figures.Tile(image, caption, None if right is None else "right" if right else "wrong")
