"""Segmentation equals transformers' ``BeitForSemanticSegmentation``: logits, loss, running statistics, files.

The models are built here, small, with random weights, norms and statistics. Tolerance 2e-5 absolute in fp32:
the sums run in another order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from beitctl.api import Item, Tools
from beitctl.checkpoints import mapping
from beitctl.checkpoints.loading import load_model, read_model, state_in
from beitctl.checkpoints.native import fit, save_model
from beitctl.checkpoints.transformers import TransformersBeit
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import PIXELS, MultiwayLearner, Objective, normalise
from beitctl.engine.losses import weighted
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.segmentation import Segmentation

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
CLASSES = 5
CASES = {
    "relative positions": {
        "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 40,
        "image_size": 32, "patch_size": 8, "use_relative_position_bias": True, "out_indices": [2, 3, 4, 5],
    },
    "learned positions, odd grid, no auxiliary head": {
        "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 48,
        "image_size": 28, "patch_size": 4, "use_absolute_position_embeddings": True,
        "use_auxiliary_head": False,
        "out_indices": [2, 3, 4, 5], "layer_scale_init_value": 0.0,
    },
}  # fmt: skip


def taps(model):
    """Blocks after which transformers takes the maps."""
    return [index - 1 for index in model.config.out_indices]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def theirs(request):
    """A model in eval mode whose every number is random."""
    more = {"layer_norm_eps": 1e-6, "num_labels": CLASSES, "drop_path_rate": 0.0}
    made = transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**request.param, **more)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in [*made.named_parameters(), *made.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.add_(noise.abs() if name.endswith("running_var") else noise, alpha=0.1)
    return made


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def learner_of(folder, task):
    """Our learner with the weights of a folder."""
    stored = read_model(folder)
    config = replace(stored.model, drop_path=0.0)
    made = Tools(config, labels=tuple("abcde"))
    learner = MultiwayLearner(Multiway(config), [Objective("task", task)], {"task": made})
    fit(stored.tensors, learner, "", folder)
    return learner


def batch_of(config, count=3):
    """Pictures of noise, every pixel with a class."""
    draw = np.random.default_rng(1)
    items = [
        Item(
            image=draw.integers(0, 256, (3, *config.size)).astype(np.uint8),
            extra={"classes": draw.integers(0, CLASSES, config.size).astype(np.int16)},
        )
        for _ in range(count)
    ]
    return collate([Portion("task", "image", items)], config)


def test_logits_equal(theirs, folder):
    model = load_model(folder)
    model.taps = taps(theirs)
    generator = torch.Generator().manual_seed(0)
    side = theirs.config.image_size
    images = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        found, expected = model(images), theirs(images).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.05


def test_loss_gradients_and_running_statistics_of_training_equal(theirs, folder):
    weight = 0.4 if theirs.auxiliary_head else 0.0
    task = Segmentation(taps=taps(theirs), dropout=0.0, auxiliary_weight=weight)
    learner = learner_of(folder, task).train()
    batch = batch_of(learner.model.config)
    mine = weighted(learner(batch), learner.weights, learner.counts(batch))
    mine.backward()
    classes = torch.stack([one["classes"] for one in batch.groups["task"].extra]).long()
    loss = theirs.train()(normalise(batch.pixels, PIXELS["half"]), labels=classes).loss
    loss.backward()
    assert abs(mine.item() - loss.item()) < TOLERANCE
    names = dict(theirs.named_parameters())
    pairs = (
        (
            "decode_head.psp_modules.blocks.0.conv.convolution.weight",
            "decode_head.psp_modules.0.1.conv.weight",
        ),
        ("fpn.fpn1.conv_transpose1.weight", "fpn1.0.weight"),
        ("fpn.fpn1.normalization.bias", "fpn1.1.bias"),
    )
    ours = dict(learner.heads["segmenter"].named_parameters())
    for other, name in pairs:
        assert torch.allclose(ours[name].grad, names[other].grad, atol=TOLERANCE), name
    first = theirs.beit.embeddings.cls_token.grad.flatten()
    assert torch.allclose(learner.model.vision_embed.cls_token.grad, first, atol=TOLERANCE)
    buffers = dict(learner.heads["segmenter"].named_buffers())
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        found = buffers[f"decode_head.bottleneck.bn.{part}"]
        wanted = getattr(theirs.decode_head.psp_bottleneck.normalization, part)
        assert torch.allclose(found, wanted, atol=TOLERANCE), part


@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
def test_files_and_state_dicts_go_back_bit_for_bit(theirs, folder, memory):
    state = theirs.state_dict() if memory else load_file(folder / "model.safetensors")
    form = TransformersBeit()
    table = form.table(
        form.config(state, theirs.config.to_dict(), {}), {name: value.shape for name, value in state.items()}
    )
    assert mapping.problems(table, state) == []
    written = mapping.write(table, *mapping.read(table, state))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_what_we_write_loads_into_their_class_with_nothing_missing(theirs, folder, tmp_path):
    (tmp_path / "out").mkdir()
    save_file(
        state_in(read_model(folder), TransformersBeit.name), tmp_path / "out" / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    (tmp_path / "out" / "config.json").write_text((folder / "config.json").read_text())
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_model_of_ours_keeps_the_taps_of_its_task(folder, tmp_path):
    stored = read_model(folder)
    for given, found in (([1, 1, 2, 3], (1, 1, 2, 3)), ([], None)):
        task = {"kind": "segmentation", "taps": given}
        save_model(tmp_path, stored.tensors, stored.model, task=task, labels=tuple("abcde"))
        model = load_model(tmp_path)
        assert tuple(model.taps) == (found or Segmentation().depths(stored.model))
