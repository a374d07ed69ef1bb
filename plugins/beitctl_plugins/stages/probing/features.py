"""Features of a frozen model: one vector for every labelled picture, at any depth; imported inside ``run``.

Letters: n pictures, d width of the model, D width of a feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from beitctl.api import Example, Examples, Item, Job, Tools
from beitctl.checkpoints.native import Stored, fit
from beitctl.config import ModelConfig
from beitctl.data.loader import Stream
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import PIXELS, MultiwayLearner, normalise
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway, Packed
from beitctl.model.plan import plan_of
from beitctl_plugins.stages import measuring
from beitctl_plugins.tasks.preparing import view_of

Kind = Literal["patches", "class", "both"]
WORDS = {
    "patches": "mean patch",
    "class": "class token",
    "both": "class token beside mean patch",
}


@dataclass(frozen=True)
class Features:
    """Which vector stands for a picture.

    To ``measuring.outputs`` it is what a task is, so pictures are shared out over ranks, loaded batch by
    batch, and counted where they cannot be used.
    """

    depth: int
    """The block whose output is read; the final norm is left out."""
    kind: Kind = "patches"
    layout: ClassVar[Literal["image"]] = "image"

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """The centre of a picture.

        Raises:
            DataError: it has no label, or no picture that can be read.
        """
        if not example.label:
            raise DataError(f"{example.id}: no label")
        return Item(image=view_of(example, draw, tools, (1.0, 1.0)))

    def infer(
        self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools
    ) -> dict[str, Any]:
        """``vectors`` (n, D) of length one, and the ``labels`` and ``ids`` of the pictures."""
        pixels = torch.from_numpy(np.stack([item.image for _, item in chunk if item.image is not None]))
        pixels = normalise(pixels.to(learner.model.device), PIXELS[learner.model.config.pixels])
        return {
            "vectors": torch.nn.functional.normalize(self.of(learner.model, pixels), dim=-1),
            "labels": [str(example.label) for example, _ in chunk],
            "ids": [example.id for example, _ in chunk],
        }

    def of(self, model: Multiway, pixels: Tensor) -> Tensor:
        """(n, D) features of normalised pictures (n, 3, H, W); D is d, or 2 d for ``both``."""
        config = model.config
        layout = model.layout(plan_of(config.picture_tokens, len(pixels), [], []))
        rows = model.encode(Packed(layout, pixels), self.depth)
        tokens = rows.view(len(pixels), config.picture_tokens, -1)
        own, patches = tokens[:, 0], tokens[:, config.prefix :].mean(1)
        return {"patches": patches, "class": own, "both": torch.cat([own, patches], dim=-1)}[self.kind]

    def words(self, config: ModelConfig) -> str:
        """What is read of a picture, for people."""
        return f"{WORDS[self.kind]} after block {self.depth} of {config.layers}, centre crop {config.side_px}"


def depth_of(setting: int, config: ModelConfig) -> int:
    """Number of the block that is read; by default two thirds up.

    Raises:
        UserError: there are fewer blocks.
    """
    if setting > config.layers:
        raise UserError(f"depth ({setting}) must not exceed the model's {config.layers} blocks")
    return setting or max(1, round(config.layers * 2 / 3))


def frozen(tensors: Mapping[str, Tensor], stored: Stored, ranks: Ranks) -> MultiwayLearner:
    """The model without heads, in fp32 on the rank's device.

    Raises:
        DataError: the weights are not those of the model.
    """
    model = Multiway(stored.model).to(ranks.device).eval()
    fit(tensors, model, "model.", stored.folder)
    return MultiwayLearner(model, [], {}).eval()


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights of a model that was never trained, by name."""
    with torch.device("meta"):
        model = Multiway(config)
    return {
        f"model.{name}": initial(f"model.{name}", value.shape, config, seed)
        for name, value in model.named_parameters()
    }


def extracted(
    learner: MultiwayLearner, features: Features, named: tuple[str, Examples], tools: Tools,
    ranks: Ranks, workers: int,
) -> measuring.Held:  # fmt: skip
    """Features of all labelled pictures of a source, on rank 0.

    Args:
        learner: the model, whole on every rank.
        features: what is read.
        named: the setting that the source stands in, and its examples.
        tools: open pictures.
        ranks: all processes; each reads a share.
        workers: data-loading processes of each.

    Raises:
        DataError: not a single picture can be used; the source is named.
    """
    name, examples = named
    stream = Stream(name, cast("Any", features), examples, 1, tools)
    try:
        return measuring.outputs(learner, stream, ranks, workers=workers)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def tell_left_out(held: Sequence[measuring.Held], job: Job, ranks: Ranks) -> None:
    """Warn of pictures that could not be used, and list them in a file for each source."""
    for one in held:
        if not one.left_out or not ranks.main:
            continue
        name, bad, such = one.stream.name, len(one.left_out), one.left_out[0]
        text = f"{name}: {bad} of {bad + len(one.examples)} pictures could not be used, such as {such}"
        measuring.tell_left_out(one.left_out, f"left-out-measured-{name}.txt", text, job)
