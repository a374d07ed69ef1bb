"""What plugins are: a frozen pydantic model each, and the protocols that the core calls.

A plugin's fields are its table in a recipe, its docstring is its help, its methods are what it does.
Nothing here imports torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator

from beitctl.errors import UserError
from beitctl.kinds import GROUP_MARK as GROUP_MARK
from beitctl.kinds import Kind as Kind
from beitctl.kinds import Plugin as Plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from beitctl.config import ModelConfig
    from beitctl.data.batch import Group
    from beitctl.model.multiway import Encoded


@dataclass(frozen=True)
class Object:
    """One thing in a picture, for detection."""

    label: str
    """Name of its class."""
    box: tuple[float, float, float, float]
    """Left, top, width and height in pixels, as in COCO."""
    mask: Any = None
    """Its pixels as in COCO: a list of polygons (flat lists of x, y), or a run-length encoding (a dict with
    ``size`` and ``counts``); None where only the box is known."""
    crowd: bool = False
    """Whether it is a group of which no member is told apart: not trained on, and no mistake when found."""


@dataclass(frozen=True)
class Example:
    """One raw item of a source; what it has not is None or empty."""

    id: str
    """Unique within the source, and stable: token stores and logs refer to it."""
    image: bytes | Path | None = None
    """An encoded picture, or the path of one."""
    captions: tuple[str, ...] = ()
    """Sentences that describe the picture."""
    text: str | None = None
    """A piece of prose; of a question or a statement about pictures, that one."""
    label: str | None = None
    """Name of the class."""
    second: bytes | Path | None = None
    """The other picture of a statement about two (NLVR2: the right one)."""
    answers: tuple[str, ...] = ()
    """Answers to the question in ``text``, one for each person who gave one (VQAv2: ten)."""
    segmentation: bytes | Path | None = None
    """A picture of the same size whose grey values are class numbers (ADE20K: 0 is none of them)."""
    token_ids: Any = None
    """(S,) int64 array of ids in place of ``text``, without start and end: a sequence of packed text, or the
    question or statement of an index that holds ids."""
    caption_ids: tuple[Any, ...] = ()
    """(S,) int64 arrays of ids in place of ``captions``, without start and end."""
    objects: tuple[Object, ...] = ()
    """The things in the picture (detection)."""


class Examples(Protocol):
    """An opened source: raw examples by index.

    Optional attributes: ``problems`` (list of str: what was left out, and why), ``shards`` (sizes of the runs
    of examples that lie together on disk, so that training reads only a few runs at a time), ``window`` (most
    examples to mix at a time, where more would need more runs than memory holds), ``lengths`` ((n,) ints
    that grow with the length of each text, so that ranks get equal work), ``parts`` (pairs of a weight and
    examples: a mixture, each part with its own epochs), ``label(index)`` and ``words(index)`` (the class,
    or captions and text, of an example without the rest; ask through ``beitctl.data.labels``), ``state``
    (changes whenever a file was touched, unlike the fingerprint: for caches), ``notes`` (list of str:
    what makes reading slow, for ``beitctl data check``) and ``segments`` (tuple of str: names of the classes
    1, 2, .. of ``Example.segmentation``).

    ``__getitem__`` raises ``DataError`` for an example that cannot be used, which another one replaces, and
    ``ChangedError`` when the data are not any more what was opened, which ends the run.
    """

    fingerprint: str
    """Hash of what is in it; changes when the data change."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class Source(Protocol):
    """Yields raw examples by index.

    A class method ``guess(path: Path) -> tuple[int, dict[str, Any]] | None`` is optional: how surely a file
    or folder is in the layout of this source (1 to 9), and the table, without ``kind``, that reads it. It
    looks at names and at most the beginning of one file; ``beitctl data`` asks all sources and takes the
    surest.
    """

    def open(self) -> Examples: ...


@dataclass(frozen=True)
class Item:
    """One example made ready for the model by a task; arrays live on the host."""

    image: "np.ndarray[Any, Any] | None" = None
    """(3, H, W) uint8."""
    text: "np.ndarray[Any, Any] | None" = None
    """(S,) int64 ids, special tokens included, no padding."""
    image_mask: "np.ndarray[Any, Any] | None" = None
    """(N,) bool, True where the patch is replaced by the mask token."""
    patch_targets: "np.ndarray[Any, Any] | None" = None
    """(N,) int64, -1 where nothing is predicted."""
    text_targets: "np.ndarray[Any, Any] | None" = None
    """(S,) int64, -1 where nothing is predicted."""
    label: int = -1
    """Class index."""
    chance: tuple[float, ...] = ()
    """Numbers in 0..1 for what the loss itself draws, so that it too depends on the position alone."""
    code_view: "np.ndarray[Any, Any] | None" = None
    """(3, h, h) uint8: the part of the picture that ``image`` shows, at the size of the image tokenizer. With
    it ``patch_targets`` is 0 where a code is to be predicted: codes are computed in the training step."""
    second: "np.ndarray[Any, Any] | None" = None
    """(3, H, W) uint8: the other picture, of the layout ``two-pairs``."""
    extra: "Mapping[str, np.ndarray[Any, Any]]" = field(default_factory=dict)
    """Arrays that only the task itself reads, by name: soft targets, boxes, masks."""


@dataclass(frozen=True)
class OnlineCodes:
    """What tasks need to know of an image tokenizer that computes codes in the training step."""

    codes: int
    grid: int
    """Codes along one side of a picture."""
    image_px: int
    """Side of the picture that it reads, in pixels."""


@dataclass(frozen=True)
class Tools:
    """What tasks prepare items with."""

    model: "ModelConfig"
    tokenizer: "TextTokenizer | None" = None
    tokens: "TokenViews | None" = None
    labels: tuple[str, ...] = ()
    train: bool = True
    """Whether crops and captions are drawn at random (training) or fixed (evaluation)."""
    pictures: Any = None
    """A ``beitctl.data.images.Pictures``, which decodes and crops."""
    online: "OnlineCodes | None" = None
    """Set in place of ``tokens`` where codes are computed in the training step."""


@dataclass(frozen=True)
class Term:
    """One summand of a task's loss: sum / global count * weight."""

    unit: Literal["patch", "text", "sample"]
    """What is counted: predicted patches, predicted text tokens, or samples."""
    weight: float = 1.0


class Task(Protocol):
    """A loss and a metric on the shared model, with its own heads.

    A class method ``smoke(table: Mapping[str, Any]) -> dict[str, Any]`` is optional: it gives the task's
    table (plain TOML data, without ``kind``) the settings that a toy model needs, for ``--smoke``.
    """

    layout: ClassVar[Literal["image", "text", "pair", "dual", "two-pairs"]]
    """Which sequences an item becomes: one of pictures, of text, of both joined, one of each apart, or two:
    the picture joined with the text, and the second picture joined with the same text.

    Optional class variable: ``causal_text`` (bool): in pairs, text sees its picture and earlier text alone.
    Optional method: ``augmented(pixels, group)``, which changes the normalised pictures (n, 3, H, W) of a
    training batch on its device (mixup); all its randomness comes from ``group.chance``.
    """

    def heads(self, tools: Tools) -> "dict[str, nn.Module]":
        """Heads by name; tasks that return the same name share one."""
        ...

    def prepare(self, example: Example, draw: "np.random.Generator", tools: Tools) -> Item:
        """Make one example ready; all randomness comes from ``draw``."""
        ...

    def terms(self) -> Mapping[str, Term]:
        """Loss terms by name, ``""`` for the headline; what each is averaged over, and its weight."""
        ...

    def loss(
        self, encoded: "Encoded", group: "Group", heads: "Mapping[str, nn.Module]"
    ) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        """Per term the sum of its losses over this batch, and the number of right predictions (0-d both).

        ``encoded.rows`` is the encoded batch X [T, d]; ``group`` says which rows belong to this task. A task
        that also reads rows of inner blocks has a method ``depths(config)`` with their numbers and finds
        them in ``encoded.inner``.
        """
        ...

    def output(self, encoded: "Encoded", group: "Group", heads: "Mapping[str, nn.Module]") -> Any:
        """What the task says: ids by unit when pretraining, logits or vectors when fine-tuned."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a task finds on held-out examples."""

    metrics: dict[str, float]
    """Metrics by name, the most telling first; among them ``examples``, and the baseline to beat."""
    each: "Mapping[str, Any]" = field(default_factory=dict)
    """For metrics whose confidence interval is wanted: either a (n,) array whose mean is the metric, one
    value per example or query, or a pair of n and a function from (n,) indices of examples, drawn with
    replacement, to the metric."""
    rows: Sequence[Mapping[str, Any]] = ()
    """One JSON object per example for ``predictions.jsonl``: id, what was predicted, what is true."""
    files: "Mapping[str, Any]" = field(default_factory=dict)
    """JSON content by file name, in the form that an evaluation server or tool reads."""


class FinetuneTask(Task, Protocol):
    """A task that can also measure a fine-tuned model and draw what it does.

    Optional methods: ``vocabulary(examples) -> tuple[str, ...]``: names of the classes or answers of training
    examples, which become ``Tools.labels`` (by default the labels that occur, sorted); ``fitted(config)``:
    the model's configuration as the task needs it; ``infer(learner, chunk, tools) -> Any``: the output for
    some (example, item) pairs where it is more than ``output`` of one forward pass (beam search, sliding
    windows), called without gradient on a whole, unsharded ``MultiwayLearner`` in eval mode;
    ``usable(examples, labels) -> Sequence[int]``: the indices of training examples that it can learn from;
    ``smoke_data(split) -> dict``: table of the source that ``--smoke`` reads, for split "train" or "test".
    Optional class variables: ``heads_from`` (dict): heads that begin as heads of pretraining, by name;
    ``frozen`` (tuple of str): parts of the names of parameters that are not trained. Optional property
    ``even_passes`` (bool): every forward pass of training must hold an even number of samples.
    """

    def score(
        self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Metrics; ``outputs`` are those of ``output`` for ``examples``, batch by batch, on the host."""
        ...

    def draw(self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, log: "Log") -> None:
        """Write figures of the same outputs to the log."""
        ...

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """The task's table, as of every plugin."""
        ...


class TextTokenizer(Protocol):
    """Text to ids; where the special ones are, each tokenizer says itself."""

    size: int
    """Number of ids."""
    fingerprint: str
    start_id: int
    """Before every text: <s>, [CLS]."""
    end_id: int
    """Behind every text: </s>, [SEP]."""
    pad_id: int
    """Fills up rows that are too short: <pad>, [PAD]."""
    unknown_id: int
    """What has no id of its own: <unk>, [UNK]."""
    mask_id: int
    """Stands for a hidden token: <mask>, [MASK]."""
    special_ids: Sequence[int]
    """All ids that are never hidden, predicted or drawn: those five, and whatever else stands for no text."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ones are left out."""
        ...

    def starts(self, ids: Sequence[int]) -> Sequence[bool]:
        """Whether each id begins a word; only asked for when whole words are hidden."""
        ...


class ImageTokenizer(Protocol):
    """Pixels to ids."""

    codes: int
    """Number of codes."""
    grid: int
    """Codes along one side of a picture."""
    image_px: int
    """Side of the picture it reads, in pixels."""
    fingerprint: str

    def encode(self, images: "torch.Tensor") -> "torch.Tensor":
        """(B, 3, H, W) uint8 to (B, grid * grid) int64."""
        ...

    def closest(self, images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Codes as of ``encode``, and how close each patch is to its code: larger is closer."""
        ...


class TokenViews(Protocol):
    """A token store: codes of fixed views of pictures."""

    views: int
    codes: int
    grid: int

    def view(self, id: str, number: int) -> tuple[Any, "np.ndarray[Any, Any]"]:
        """Crop and codes of one view."""
        ...


class Tokenizer(Protocol):
    """A tokenizer that can be trained, and loaded from the folder where it was."""

    def train(self, sources: Sequence[Source], job: "Job") -> Mapping[str, Any]: ...
    def plan(self) -> Mapping[str, Any]: ...
    @classmethod
    def load(cls, folder: Path) -> Any: ...


class Log(Protocol):
    """Where a stage writes what happens; only rank 0 writes."""

    def step(self, step: int, of: int, metrics: Mapping[str, float]) -> None: ...
    def samples(self, step: int, ids: Sequence[str]) -> None: ...
    def evaluation(self, name: str, step: int, metrics: Mapping[str, Any]) -> None: ...
    def checkpoint(self, step: int, path: Path, seconds: float) -> None: ...
    def figure(self, name: str, png: bytes, title: str, caption: str) -> None: ...
    def table(self, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...
    def note(self, message: str) -> None: ...
    def warning(self, code: str, message: str, fix: str) -> None: ...


@dataclass(frozen=True)
class Job:
    """Where a stage works; made by the command line."""

    folder: Path
    """The run folder."""
    log: Log
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Run folder of every stage that the table refers to, by its reference such as ``@pretrain``."""
    resume: bool = True
    """Whether a checkpoint in the folder is continued."""
    memory_hint: Callable[[], str] = lambda: ""
    """What the plan says of the memory that the table needs, for a run that does not fit."""

    def path(self, value: str) -> Path:
        """Path that a setting means: the run folder behind an ``@reference``, or the path itself.

        Raises:
            UserError: the path does not exist.
        """
        if value.startswith("@"):
            return self.inputs[value]
        path = Path(value).expanduser()
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        return path


class Stage(Protocol):
    """One command. Its module must import without torch.

    A class method ``smoke(table: Mapping[str, Any]) -> dict[str, Any]`` is optional and gives the command
    ``--smoke``: it returns the stage's table (plain TOML data, not validated yet) at toy size, on the
    embedded data. Tables of other stages that the result refers to are those of the recipe ``tiny``.

    A method ``verify(job: Job) -> Mapping[str, Any]`` is optional and gives the command ``--verify``: it
    checks what a finished run in ``job.folder`` left, changes nothing, and raises ``CheckFailed`` or
    ``DataError``; what it returns is printed.
    """

    def plan(self) -> Mapping[str, Any]:
        """What a run would do, without doing it: printed by --dry-run."""
        ...

    def run(self, job: Job) -> Mapping[str, Any]:
        """Do it; the returned numbers go to the manifest and the summary."""
        ...

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...


def _shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(
            f"smallest and largest share of a picture, 0 < smallest <= largest <= 1, not {value}"
        )
    return value


CropScale = Annotated[tuple[float, float], AfterValidator(_shares)]
TaskField = Annotated[Task, Kind("beitctl.tasks")]
SourceField = Annotated[Source, Kind("beitctl.sources")]
TokenizerField = Annotated[Tokenizer, Kind("beitctl.tokenizers", ("train", "plan"))]


class Teacher(Protocol):
    """A frozen network whose features an image tokenizer learns to reconstruct."""

    def open(self, grid: int) -> Any:
        """A module: (B, 3, H, W) float in [0, 1] to features (B, grid * grid, D)."""
        ...


TeacherField = Annotated[Teacher, Kind("beitctl.teachers")]
