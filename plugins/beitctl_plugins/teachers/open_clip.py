"""Models of open_clip as teachers."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import Field
from torch import Tensor

from beitctl.api import Plugin
from beitctl.errors import SetupError, UserError
from beitctl_plugins.teachers import weights as weight_files
from beitctl_plugins.teachers.features import REFUSALS, Features, Reader, Sight, brief, needed
from beitctl_plugins.teachers.timm import final_map

INSTALL = "pip install open_clip_torch"
TOWER, TRUNK = "visual.", "visual.trunk."
Colours = tuple[float, float, float]


class OpenClipTeacher(Plugin):
    """A picture tower of open_clip: patch tokens after the last norm, times the visual projection.

    Towers that are a model of timm (SigLIP, EVA, ConvNeXt) give their features without a projection: theirs
    is made for the pooled picture.
    """

    model: str = "ViT-B-16"
    """Name of the model in open_clip."""
    weights: str = "openai"
    """A tag of open_clip (``laion2b_s34b_b88k``), which fetches them, a file, or ``random``. For a file, the
    model's name says the activation: ``ViT-B-16-quickgelu`` for OpenAI's."""
    mean: Colours | None = None
    """Channel means of values in 0..1; by default those of the weights, or of all tags of the model."""
    std: Colours | None = None
    """Channel deviations; by default as the means."""
    input_px: int = Field(default=224, ge=32)
    """Side of the picture that the teacher sees, in pixels; positions are resampled."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            SetupError: open_clip is not installed, or the weights cannot be fetched.
            UserError: there is no such model or tag, or it has no features of places.
            DataError: the weights do not fit the model, or give features that are not finite.
        """
        library = needed("open_clip", INSTALL)
        known = library.list_models()
        if self.model not in known:
            close = get_close_matches(self.model, known, n=5)
            raise UserError(f"open_clip has no model '{self.model}'; similar: {', '.join(close) or 'none'}")
        tags = library.list_pretrained_tags_by_model(self.model)
        file = self._file(tags)
        tower = self._tower(library, self.weights if self.weights in tags else None)
        if file is not None:
            _load(library, tower, file)
        mean, std = self._look(library, tower, tags)
        sight = Sight(f"open-clip {self.model}", self.input_px, mean, std)
        return Features(tower, self._reader(tower, sight.name), sight, grid)

    def _tower(self, library: Any, tag: str | None) -> Any:
        """The picture tower with the weights of a tag."""
        said = library.pretrained.get_pretrained_cfg(self.model, tag) if tag else {}
        quick = said.get("quick_gelu", False)
        named = library.get_model_config(self.model).get("quick_gelu", False)
        if tag and named and not quick:
            raise UserError(
                f"open-clip: the weights {tag} were trained with the exact GELU, {self.model} has another "
                f"activation; name the model {self.model.removesuffix('-quickgelu')}"
            )
        try:
            whole = library.create_model(
                self.model, pretrained=tag, force_quick_gelu=quick, force_image_size=self.input_px,
                pretrained_text=False,
            )  # fmt: skip
        except (*REFUSALS, OSError) as error:
            if tag:
                raise SetupError(
                    f"open-clip: the weights {tag} of {self.model} cannot be fetched, or do not fit: "
                    f"{brief(error)}"
                ) from error
            raise UserError(
                f"open-clip: {self.model} cannot be made for input_px = {self.input_px}: {brief(error)}"
            ) from error
        return whole.visual

    def _file(self, tags: Sequence[str]) -> Path | None:
        """The file of the weights, if they are one."""
        if self.weights in (*tags, "random"):
            return None
        file = weight_files.existing(self.weights)
        if file is None:
            raise UserError(
                f"open-clip: no weights '{self.weights}' for {self.model}: neither a file nor one of its "
                f"tags: {', '.join(tags) or 'it has none'}"
            )
        return file

    def _look(self, library: Any, tower: Any, tags: Sequence[str]) -> tuple[Sequence[float], Sequence[float]]:
        """Means and deviations; of a file those on which all tags of the model agree."""
        own, known = tower.preprocess_cfg, library.pretrained.get_pretrained_cfg
        said = [own] if self.weights in tags else [own | known(self.model, tag) for tag in tags] or [own]
        looks = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in said}
        if len(looks) > 1 and not (self.mean and self.std):
            raise UserError(
                f"open-clip: weights of {self.model} were trained with different means and deviations: "
                f"{' or '.join(map(str, sorted(looks)))}; set mean and std"
            )
        mean, std = looks.pop()
        return self.mean or mean, self.std or std

    def _reader(self, tower: Any, name: str) -> Reader:
        """What reads the tower's patches.

        Raises:
            UserError: nothing does.
        """
        if hasattr(tower, "trunk"):
            return partial(_trunk_map, name=name)
        if hasattr(tower, "ln_post") and getattr(tower, "attn_pool", None) is None:
            return _projected
        raise UserError(
            f"{name}: pools its picture by attention, so that single patches have no features in CLIP's "
            "common space; choose a plain ViT"
        )


def _load(library: Any, tower: Any, file: Path) -> None:
    """Load the tower's tensors of a file; positions are resampled."""
    state = {n: t for n, t in weight_files.tensors(file).items() if n.startswith(TOWER)}
    if hasattr(tower, "trunk"):
        state = {n.removeprefix(TRUNK): t for n, t in state.items() if n.startswith(TRUNK)}
        weight_files.check_kernel(tower.trunk, state, file)
        return weight_files.load_named(tower.trunk, weight_files.in_timms_names(state, tower.trunk), file)
    library.model.resize_pos_embed(state, SimpleNamespace(visual=tower))
    return weight_files.load_named(tower, {n.removeprefix(TOWER): t for n, t in state.items()}, file)


def _trunk_map(tower: Any, pixels: Tensor, name: str) -> Tensor:
    return final_map(tower.trunk, pixels, name)


def _projected(tower: Any, pixels: Tensor) -> Tensor:
    found = tower.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
    )
    maps: Tensor = found["image_intermediates"][-1]
    return maps if tower.proj is None else (maps.permute(0, 2, 3, 1) @ tower.proj).permute(0, 3, 1, 2)
