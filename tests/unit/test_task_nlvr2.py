"""Statements about two pictures: what is prepared, learnt, said, scored and refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import COLOURS, MODEL, Given, Letters, Record, png, rng, tools
from torch import nn
from torch.nn import functional as F

from beitctl.api import Example
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.models import ReasoningModel
from beitctl.checkpoints.native import save_model
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.engine.measuring import operations
from beitctl.errors import DataError, UserError
from beitctl.model.flops import linear_weights, of_head
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.nlvr2 import CLASSES, NLVR2Task, consistency

VLMO = replace(MODEL, layers=2, fusion_layers=1, text_norm=True, token_types=2, text_first=True)
MODELS = {"beit3": MODEL, "vlmo": VLMO}


def stated(id="x", text="both red", label="True", colours=("red", "red")):
    first, second = (png(COLOURS[colour]) for colour in colours)
    return Example(id, first, text=text, label=label, second=second)


def kit(**changes):
    return tools(**{"labels": CLASSES} | changes)


def prepared(*examples, **changes):
    return [NLVR2Task().prepare(example, rng(), kit(**changes)) for example in examples]


def learner(model=MODEL):
    task = NLVR2Task()
    config = task.fitted(model)
    made = MultiwayLearner(Multiway(config), [Objective("task", task)], {"task": kit(model=config)}).eval()
    weights = {k: initial(k, v.shape, config, 0) for k, v in made.state_dict().items()}
    for name in ("heads.reasoning.up.weight", "heads.reasoning.out.weight"):
        weights[name] = weights[name] * 1000  # begun at a thousandth, differences would not show
    made.load_state_dict(weights)
    return made


def batch(items, model=MODEL):
    return collate([Portion("task", "two-pairs", items)], model)


def test_an_item_has_both_pictures_and_the_framed_statement():
    (item,) = prepared(stated(label="False", colours=("red", "blue")))
    assert (item.image[0].min(), item.second[2].min()) == (255, 255)
    assert item.text.tolist() == [0, *Letters().encode("both red"), 2]
    assert item.label == 0


def test_each_picture_gets_its_own_random_crop():
    gradient = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(gradient).save(stream, "PNG")
    example = Example("x", stream.getvalue(), text="t", label="True", second=stream.getvalue())
    (train,) = prepared(example)
    (test,) = prepared(example, train=False)
    assert not np.array_equal(train.image, train.second)
    assert np.array_equal(test.image, test.second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": None}, "x: no second picture"),
        ({"image": None}, "x: no picture"),
        ({"text": " ", "token_ids": np.array([], np.int64)}, "x: no text"),
        ({"label": "maybe"}, "x: label 'maybe' is neither True nor False"),
        ({"label": None}, "x: label None is neither True nor False"),
    ],
)
def test_a_statement_that_lacks_something_is_named(change, message):
    with pytest.raises(DataError, match=message):
        NLVR2Task().prepare(replace(stated(), **change), rng(), kit())


def test_a_statement_without_a_label_can_be_answered():
    (item,) = prepared(stated(label=None), train=False)
    assert item.label == -1


def test_false_is_class_0_whatever_occurs():
    only = Given(examples=(stated(label="True"),)).open()
    assert NLVR2Task().vocabulary(only) == ("False", "True")


def test_a_model_that_reads_no_text_is_refused():
    with pytest.raises(UserError, match="nlvr2 reads text, but the model of init has no language branch"):
        NLVR2Task().heads(kit(model=replace(MODEL, vocabulary=0, text_tokens=0)))


def test_heads_have_the_shapes_of_the_released_files():
    shapes = {
        name: {key: tuple(v.shape) for key, v in nn.ModuleDict(NLVR2Task().heads(kit(model=model))).items()
               for key, v in v.state_dict(prefix=f"{key}.").items()}
        for name, model in MODELS.items()
    }  # fmt: skip
    assert shapes["beit3"]["reasoning.norm.weight"] == (32,)
    assert shapes["beit3"]["reasoning.up.weight"] == (16, 32)
    assert shapes["vlmo"]["reasoning.up.weight"] == (16, 16)
    assert {key for key in shapes["vlmo"] if "norm" in key} == {
        "reasoning.inner_norm.weight", "reasoning.inner_norm.bias",
    }  # fmt: skip
    assert {key.split(".")[0] for key in shapes["beit3"]} == {"reasoning"}


def test_the_head_of_beit3_begins_at_a_thousandth():
    made = {
        name: initial(f"heads.reasoning.{name}.weight", (16, 16), MODEL, 0).std() for name in ("up", "out")
    }
    other = initial("heads.answers.up.weight", (16, 16), MODEL, 0).std()
    assert all(value / other == pytest.approx(1e-3, rel=0.2) for value in made.values())


def test_the_final_norm_is_on_and_vlmo_gets_a_token_type_for_second_pictures():
    fitted = {name: NLVR2Task().fitted(replace(model, final_norm=False)) for name, model in MODELS.items()}
    assert [config.final_norm for config in fitted.values()] == [True, True]
    assert [config.token_types for config in fitted.values()] == [0, 3]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_the_file_is_loaded_as(tmp_path, name):
    examples = [stated("a"), stated("b", "blue", colours=("blue", "grey"))]
    items = prepared(*examples, model=MODELS[name], train=False)
    made = learner(MODELS[name])
    save_model(tmp_path, made.state_dict(), made.model.config, task={"kind": "nlvr2"}, labels=CLASSES)
    loaded = load_model(tmp_path)
    assert type(loaded) is ReasoningModel
    text = torch.ones(2, 10, dtype=torch.int64)
    for row, item in enumerate(items):
        text[row, : len(item.text)] = torch.from_numpy(item.text)
    pad = torch.tensor([[i >= len(item.text) for i in range(10)] for item in items])
    first, second = (
        normalise(torch.from_numpy(np.stack([getattr(item, which) for item in items])), HALF)
        for which in ("image", "second")
    )
    with torch.no_grad():
        expected = loaded(first, text, image2=second, text_pad=pad)
        swapped = loaded(second, text, image2=first, text_pad=pad)
        found = made.outputs(batch(items, made.model.config))["task"]
    assert torch.allclose(found, expected, atol=1e-6)
    assert (expected - swapped).abs().max() > 1e-4  # the order of the pictures matters


def test_the_loss_is_cross_entropy_over_samples_not_pairs():
    items = prepared(stated(), stated(label="False", colours=("blue", "red")), stated(text="blue"))
    made, packed = learner(), batch(items)
    total, right = made(packed)["task"]
    with torch.no_grad():
        logits = made.outputs(packed)["task"]
    truth = torch.tensor([1, 0, 1])
    assert made.counts(packed) == {"task": 3.0}
    assert total.item() / 3 == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5)
    assert right.item() == (logits.argmax(1) == truth).sum().item()


def test_a_rank_without_samples_still_uses_every_head():
    for model in MODELS.values():
        made = learner(model)
        total, _ = made(batch([], made.model.config))["task"]
        total.backward()
        assert total.item() == 0
        assert all(p.grad is not None for p in made.heads.parameters())


@pytest.mark.parametrize(("name", "times"), [("beit3", 0), ("vlmo", 2)])
def test_vlmos_pooler_is_counted_for_both_pictures(name, times):
    made = learner(MODELS[name])
    packed = batch(prepared(stated(), stated(), model=MODELS[name]), made.model.config)
    heads, config = dict(made.heads.items()), made.model.config
    found = operations.of_task(NLVR2Task(), config, packed.plan, packed.groups["task"], heads)
    expected = of_head(2, linear_weights(heads["reasoning"]))
    if times:
        expected = expected + of_head(2 * times, linear_weights(heads["pooler"]))
    assert found == expected


HELD = (
    stated("dev-1-0-0", label="True"),
    stated("dev-1-1-0", label="False"),
    stated("dev-1-0-1", label="True"),
    stated("dev-2-0-0", label="True", text="a long statement"),
)
SAID = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])


TRAIN = Given(examples=(stated(label="False"),))


def scored(held=HELD):
    return NLVR2Task().score([SAID[:1], SAID[1:]], held, kit(train=False), TRAIN.open())


def test_the_score_is_accuracy_beside_the_majority_and_consistency():
    found = scored()
    assert found.metrics == {
        "accuracy": 0.75, "majority": 0.25, "consistency": pytest.approx(2 / 3), "examples": 4,
        "without_label": 0, "truncated_statements": 1,
    }  # fmt: skip
    assert found.each["accuracy"].tolist() == [True, False, True, True]


def test_predictions_say_what_was_stated_said_and_true():
    assert scored().rows[1] == {
        "id": "dev-1-1-0", "statement": "both red", "predicted": "True", "label": "False",
        "probability": pytest.approx(1 / (1 + np.exp(-2))),
    }  # fmt: skip


def test_statements_without_a_label_are_counted_and_predicted():
    found = scored(held=(replace(HELD[0], label=None), *HELD[1:]))
    assert (found.metrics["without_label"], found.metrics["examples"]) == (1, 4)
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert len(found.rows) == 4


def test_labels_nobody_knows_leave_predictions_alone():
    found = scored(held=tuple(replace(example, label=None) for example in HELD))
    assert "accuracy" not in found.metrics
    assert (len(found.rows), dict(found.each)) == (4, {})


def test_consistency_needs_ids_that_tell_the_statement():
    assert consistency(["dev-1-0-0", "x"], [True, True]) == {}
    assert consistency(["train-1-0-0", "train-1-1-0", "dev-1-1-0"], [True, False, True]) == {
        "consistency": 0.5
    }


def test_pairs_of_pictures_are_drawn():
    log = Record()
    NLVR2Task().draw([SAID], HELD, kit(train=False), log)
    ((name, data, *_),) = log.said["figure"]
    assert name == "statements"
    assert data.startswith(b"\x89PNG")


def test_smoke_names_its_data():
    assert NLVR2Task(**NLVR2Task.smoke({"augment": "beit3", "text_tokens": 64})) == NLVR2Task(augment="beit3")
    assert NLVR2Task.smoke_data("train") == {"kind": "embedded", "content": "statements", "split": "train"}
