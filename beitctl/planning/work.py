"""From a table of a recipe to the work of a step: samples, lengths, predicted rows, passes, parameters.

Imported by ``beitctl plan`` when it runs, because it imports torch. Letters as in ``beitctl.model.flops``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from beitctl import registry
from beitctl.api import Task, Tools
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.labels import classes
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import BeitctlError, PluginError, UserError
from beitctl.model.flops import Flops, linear_weights, of_head, of_pass
from beitctl.model.heads import Aggregation, ContrastiveHead
from beitctl.model.multiway import Block, Multiway
from beitctl.model.plan import BatchPlan
from beitctl.model.sizes import parameter_parts
from beitctl.recipe import Recipe, StageTable

PATCH_HEAD, WORD_HEAD = "image_codes", "text_tokens"
"""Names of the heads on hidden patches and on hidden tokens; other heads read one row a sample."""
CONTRAST_AND_MATCH = "contrast-and-match"
KNOWN = ("classification", "retrieval", CONTRAST_AND_MATCH)
"""Tasks whose samples are what is predicted."""
CLASSES = 1000
"""Classes where the source cannot be asked."""
RATIOS = {"patch": ("image_mask_ratio", "mask_ratio", 0.4), "text": ("text_mask_ratio", "mask_ratio", 0.15)}
"""Where a task says its share of hidden patches and tokens, and the share of one that does not."""


@dataclass(frozen=True)
class Part:
    """What one objective brings to a step or to a pass of it."""

    name: str
    task: Task
    samples: int
    text_tokens: int
    """Tokens of each of its texts; 0 without."""
    patches: int
    """Patches that are predicted of each picture."""
    words: int
    """Tokens that are predicted of each text."""
    source: Any

    @property
    def pictures(self) -> int:
        """Pictures of the samples."""
        return 0 if self.task.layout == "text" else self.sequences

    @property
    def sequences(self) -> int:
        """Sequences of the samples, where pictures and texts apart count once."""
        return self.samples * (2 if self.task.layout == "two-pairs" else 1)

    def rows(self, picture_tokens: int) -> int:
        """Rows of the packed buffer."""
        return self.pictures * picture_tokens + self.sequences * self.text_tokens

    def predicted(self, unit: str) -> int:
        """Rows that a head of a unit reads, as often as there are terms of that unit."""
        terms = sum(term.unit == unit for term in self.task.terms().values())
        return self.samples * terms * {"patch": self.patches, "text": self.words}.get(unit, 1)


@dataclass(frozen=True)
class Pass:
    """Rows that go through some blocks."""

    plan: BatchPlan
    blocks: int
    embedded: bool = True


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    parts: Mapping[str, int]
    """By part of the model, with ``total``."""
    trainable: int
    block: int
    """Of the largest unit that FSDP gathers at a time."""
    root: int
    """Of what is in no block: embeddings, heads, last norm."""


@dataclass(frozen=True)
class Work:
    """A training as far as its size matters."""

    key: str
    model: ModelConfig
    train: TrainConfig
    parts: tuple[Part, ...]
    tools: Tools
    frozen: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    tokens: str = ""
    """The token store that it reads, as the recipe says it."""

    @property
    def samples(self) -> int:
        """Samples of a step, over all GPUs."""
        return sum(part.samples for part in self.parts)

    @cached_property
    def learner(self) -> MultiwayLearner:
        """The learner on the meta device, where parameters have shapes and no memory."""
        objectives = [Objective(part.name, part.task) for part in self.parts]
        with torch.device("meta"):
            tools = dict.fromkeys([part.name for part in self.parts], self.tools)
            return MultiwayLearner(Multiway(self.model), objectives, tools)

    @cached_property
    def heads(self) -> Mapping[str, Mapping[str, nn.Module]]:
        """The heads of every objective by name."""
        with torch.device("meta"):
            return {part.name: part.task.heads(self.tools) for part in self.parts}

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers of parameters."""
        learner = self.learner
        blocks = [_count(m) for m in learner.modules() if isinstance(m, Block)]
        whole = _count(learner)
        trained = sum(
            p.numel() for name, p in learner.named_parameters() if not any(f in name for f in self.frozen)
        )
        counted = parameter_parts(learner.model, dict(learner.heads.items()))
        return Sizes(counted, trained, max(blocks), whole - sum(blocks))

    def share(self, gpus: int, micro_samples: int) -> tuple[int, "Work"]:
        """Forward passes of a step on one GPU, and the largest share of a pass, as the loader deals them."""
        mine = -(-self.samples // gpus)
        passes = 1 if not micro_samples else -(-mine // micro_samples)
        parts = tuple(replace(part, samples=-(-part.samples // (gpus * passes))) for part in self.parts)
        return passes, replace(self, parts=parts)

    def batch(self) -> BatchPlan:
        """The packed batch of all parts."""
        joint = [p for p in self.parts if p.task.layout in ("pair", "two-pairs")]
        texts = [p for layout in ("text", "dual") for p in self.parts if p.task.layout == layout]
        images = sum(p.pictures for p in self.parts if p not in joint)
        causal = any(getattr(p.task, "causal_text", False) for p in joint)
        return BatchPlan(self.model.picture_tokens, images, _lengths(joint), _lengths(texts), causal)

    def passes(self) -> Iterator[Pass]:
        """Everything that goes through blocks in one forward pass."""
        batch = self.batch()
        yield Pass(batch, self.model.layers)
        for part in self.parts:
            for head in self.heads[part.name].values():
                if isinstance(head, Aggregation):
                    yield Pass(batch, len(head.blocks), embedded=False)
            if _kind(part.task) == CONTRAST_AND_MATCH:
                yield Pass(batch, self.model.fusion_layers, embedded=False)
                if getattr(part.task, "match", False):
                    pairs = (part.text_tokens,) * (3 * part.samples)
                    yield Pass(BatchPlan(batch.picture_tokens, 0, pairs), self.model.layers)

    def flops(self) -> Flops:
        """Operations of a step, over all GPUs."""
        total = Flops()
        for each in self.passes():
            total += of_pass(self.model, each.plan, blocks=each.blocks, embedded=each.embedded)
        for part in self.parts:
            for name, head in self.heads[part.name].items():
                total += self._of_head(part, name, head)
        return total

    def _of_head(self, part: Part, name: str, head: nn.Module) -> Flops:
        if isinstance(head, Aggregation):
            return Flops()  # its blocks are a pass
        weights = linear_weights(head)
        if isinstance(head, ContrastiveHead):
            return of_head(part.samples, weights + 2 * part.samples * self.model.width)
        if name in (PATCH_HEAD, WORD_HEAD):
            return of_head(part.predicted("patch" if name == PATCH_HEAD else "text"), weights)
        return of_head(part.samples * (3 if _kind(part.task) == CONTRAST_AND_MATCH else 1), weights)

    def logits(self) -> int:
        """Logits of a forward pass: predicted rows times answers."""
        codes = self.tools.tokens.codes if self.tools.tokens else 0
        found = 0
        for part in self.parts:
            found += part.predicted("patch") * codes + part.predicted("text") * self.model.vocabulary
            if any(isinstance(head, ContrastiveHead) for head in self.heads[part.name].values()):
                found += 2 * part.samples**2
        return found


def work_of(recipe: Recipe, table: StageTable, caption_tokens: int) -> Work:
    """The work of a table.

    Raises:
        UserError: it is no table that trains a model of known shape.
    """
    plugin: Any = table.plugin
    model: ModelConfig = plugin.model if table.stage == "pretrain" else _fine_tuned(recipe, table)
    objectives = plugin.objectives if table.stage == "pretrain" else {"task": plugin}
    said: list[str] = []
    labels = _labels(objectives, said)
    codes = _Codes(getattr(plugin, "expect_codes", 0), model.grid[0])
    tools = Tools(model, _Words(model.vocabulary), codes, labels)  # type: ignore[arg-type]
    parts = tuple(_part(name, found, model, caption_tokens, said) for name, found in objectives.items())
    if getattr(plugin, "image_tokenizer", ""):
        said.append("the image tokenizer that computes codes in the step is not counted: its work and memory")
    if any(getattr(part.task, "distil", None) for part in parts):
        said.append("the teacher's forward passes are not counted")
    return Work(
        table.key, model, plugin.train, parts, tools, tuple(getattr(plugin, "frozen", ())), tuple(said),
        getattr(plugin, "tokens", ""),
    )  # fmt: skip


def examples(source: Any) -> int | None:
    """How many examples a source has; None where they are not there."""
    try:
        return len(source.open())
    except BeitctlError:
        return None


def _part(name: str, table: Any, model: ModelConfig, caption_tokens: int, said: list[str]) -> Part:
    task: Task = table.task
    length = 0
    if task.layout == "text":
        length = model.text_tokens
        said.append(f"{name}: prose fills the model's {length} text tokens")
    elif task.layout in ("pair", "dual", "two-pairs"):
        longest = getattr(task, "text_tokens", 0) or model.text_tokens
        length = min(caption_tokens, longest)
        said.append(f"{name}: a caption has {length} tokens, <s> and </s> included (--caption-tokens)")
    units = {term.unit for term in task.terms().values()}
    if not getattr(task, "exact", True):
        said.append(
            f"{name}: blocks hide their whole share of the patches; without exact they may stay short"
        )
    patches = _hidden("patch", task, model.patches, name, said) if "patch" in units else 0
    words = _hidden("text", task, max(0, length - 2), name, said) if "text" in units else 0
    if not units & {"patch", "text"} and _kind(task) not in KNOWN:
        said.append(f"{name}: a task of somebody else's; its heads count once a sample, no further pass")
    return Part(name, task, table.samples, length, patches, words, table.source)


def _hidden(unit: str, task: Task, of: int, name: str, said: list[str]) -> int:
    """Predicted patches or tokens of a sample, as masking rounds them."""
    *names, default = RATIOS[unit]
    ratio = next((getattr(task, str(key)) for key in names if hasattr(task, str(key))), None)
    if ratio is None:
        ratio = default
        said.append(f"{name}: {default:.0%} of its {unit} positions are predicted; the task does not say")
    return min(of, max(1, round(float(ratio) * of)))


def _labels(objectives: Mapping[str, Any], said: list[str]) -> tuple[str, ...]:
    """Stand-ins for the classes or answers: as many as the sources have, or a usual number."""
    found: set[str] = set()
    try:
        for table in objectives.values():
            own = getattr(table.task, "vocabulary", None)
            if callable(own) or getattr(table.task, "labelled", False):
                found |= set((own if callable(own) else classes)(table.source.open()))
    except BeitctlError:
        found = {str(number) for number in range(CLASSES)}
        said.append(f"{CLASSES:,} classes: the source is not there to be asked")
    return tuple(sorted(found))


def _fine_tuned(recipe: Recipe, table: StageTable) -> ModelConfig:
    """The model of a fine-tuning whose start is another table of the recipe."""
    plugin: Any = table.plugin
    begun = recipe.tables.get(plugin.init.removeprefix("@")) if plugin.init.startswith("@") else None
    model: ModelConfig | None = getattr(begun.plugin, "model", None) if begun else None
    if model is None:
        raise UserError(
            f"{table.key}: its model comes from {plugin.init}, which is no pretrain table of {recipe.path}; "
            "plan can tell the size of those alone"
        )
    changed: dict[str, Any] = {} if plugin.drop_path is None else {"drop_path": plugin.drop_path}
    changed |= {"image_px": plugin.image_px} if plugin.image_px else {}
    changed |= {"position": "relative-per-block"} if model.position == "relative-shared" else {}
    fitted = getattr(plugin.task, "fitted", None)
    try:
        model = replace(model, **changed)
        return fitted(model) if callable(fitted) else model
    except ValueError as error:
        raise UserError(
            f"{table.key}: the model of {plugin.init} cannot be fine-tuned so: {error}"
        ) from error


def _kind(task: Task) -> str:
    """Name of a task's kind; empty if it is not installed."""
    try:
        return registry.name_of("beitctl.tasks", type(task))
    except PluginError:
        return ""


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _lengths(parts: Sequence[Part]) -> tuple[int, ...]:
    return tuple(length for part in parts for length in (part.text_tokens,) * part.sequences)


@dataclass(frozen=True)
class _Words:
    """Stands for a text tokenizer."""

    size: int
    fingerprint: str = ""


@dataclass(frozen=True)
class _Codes:
    """Stands for a token store."""

    codes: int
    grid: int
    views: int = 1
