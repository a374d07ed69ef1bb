"""A small classifier as files: beitctl's own and those of other libraries."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import MODEL, weights

from beitctl.checkpoints.loading import load_model, state_in
from beitctl.checkpoints.native import Stored, save_model
from beitctl.model.heads import Classifier
from beitctl.model.multiway import Multiway

BEIT = replace(
    MODEL, layers=2, vocabulary=0, text_tokens=0, norm="pre", key_bias=False, norm_eps=1e-6, final_norm=False,
    mask_token=False, position="relative-per-block", layer_scale=0.1, init="beit",
)  # fmt: skip
ABSOLUTE = replace(BEIT, position="absolute")
CLASSES = 3
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def whole(config=BEIT):
    """A classifier in our names."""
    tensors = weights(Multiway(config), "model.", config)
    return tensors | weights(Classifier(config, CLASSES), "heads.classifier.", config)


def official(config=BEIT, form="unilm BEiT"):
    """The same in the names of another library."""
    return state_in(Stored(Path("made"), config, whole(config)), form)


def file(folder, tree, name="model.pth"):
    path = Path(folder) / name
    torch.save(tree, path)
    return path


def native(folder, config=BEIT, tensors=None):
    save_model(Path(folder), whole(config) if tensors is None else tensors, config)
    return Path(folder)


def noted(folder, change):
    note = json.loads((folder / "config.json").read_text())
    change(note)
    (folder / "config.json").write_text(json.dumps(note))
    return folder


def logits(path, **settings):
    with torch.no_grad():
        return load_model(path, **settings)(PICTURES)


def said(error, path, **settings):
    """What the error says, the path left out."""
    with pytest.raises(error) as caught:
        load_model(path, **settings)
    return str(caught.value).replace(str(path), "PATH")
