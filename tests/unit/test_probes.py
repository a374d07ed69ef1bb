"""Probes of a frozen model, and zero-shot classification by the names of classes."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from small import ALONE, MODEL, Record, coloured, pieces, rng, stored, tools, training, weights
from torch.nn import functional as F

from beitctl.api import Job
from beitctl.checkpoints.native import read_model, save_model
from beitctl.config import OptimConfig
from beitctl.data.batch import collate
from beitctl.data.loader import Stream, portion_of
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import measuring
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.tasks.probes import AttentiveProbe, LinearProbe
from beitctl_plugins.tasks.prompted import ZeroShotClassification

LABELS = ("blue", "red")
DEEP = replace(MODEL, layers=3)


def batch_of(task, made, *labels):
    items = [task.prepare(example, rng(), made) for example in coloured(*labels).examples]
    return collate([portion_of("task", task, items)], made.model)


def learner_of(task, made):
    torch.manual_seed(0)
    learner = MultiwayLearner(Multiway(made.model), [Objective("task", task)], {"task": made})
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return learner.eval()


def test_every_block_has_a_probe_on_its_class_token_and_mean_patch():
    made = tools(model=DEEP, labels=LABELS, train=False)
    learner, batch = learner_of(LinearProbe(), made), batch_of(LinearProbe(), made, "red", "blue")
    logits = learner.outputs(batch)["task"]
    assert logits.shape == (2, 3, 2)
    encoded = learner.encode(batch)
    tokens = learner.model.through(
        learner.model.embed(encoded.packed), encoded.packed, range(2)
    ).view(2, DEEP.picture_tokens, -1)  # fmt: skip
    feature = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
    assert torch.allclose(logits[:, 1], learner.heads["linear_probe"][1](feature), atol=1e-5)


def test_the_linear_loss_adds_up_the_blocks():
    made = tools(model=DEEP, labels=LABELS)
    learner, batch = learner_of(LinearProbe(), made), batch_of(LinearProbe(), made, "red", "blue")
    total, hits = learner(batch)["task"]
    logits = learner.outputs(batch)["task"]
    expected = sum(
        F.cross_entropy(logits[:, block], torch.tensor([1, 0]), reduction="sum") for block in range(3)
    )
    assert torch.allclose(total, expected)
    assert float(hits) == pytest.approx(
        float((logits.argmax(-1) == torch.tensor([[1], [0]])).float().mean(1).sum())
    )


def test_the_best_block_is_reported_with_all_of_them():
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 1] = logits[1, 1, 0] = 1.0  # block 2 is right twice
    logits[:, 0, 0] = logits[:, 2, 0] = 1.0
    held = coloured("red", "blue")
    found = LinearProbe().score([logits], held.examples, tools(labels=LABELS), held.open())
    assert (found.metrics["accuracy"], found.metrics["best_block"]) == (1.0, 2.0)
    assert [found.metrics[f"accuracy_block_{n}"] for n in (1, 2, 3)] == [0.5, 1.0, 0.5]


def attended(head, patches):
    """The attentive probe by torch's own attention."""
    k, v = head.kv(head.norm(patches)).chunk(2, dim=-1)
    split = [x.view(len(x), -1, head.heads, 4).transpose(1, 2) for x in (k, v)]
    q = head.query.weight.view(1, head.heads, 1, 4).expand(len(patches), -1, -1, -1)
    pooled = F.scaled_dot_product_attention(q, *split).transpose(1, 2).reshape(len(patches), -1)
    return head.linear(head.pooled_norm(pooled))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_attentive_probe_reads_the_patches_of_its_block(depth):
    task, made = AttentiveProbe(depth=depth), tools(model=DEEP, labels=LABELS, train=False)
    learner, batch = learner_of(task, made), batch_of(task, made, "red", "blue")
    packed = learner.encode(batch).packed
    rows = learner.model.through(learner.model.embed(packed), packed, range(depth or 3))
    patches = rows.view(2, DEEP.picture_tokens, -1)[:, 1:]
    expected = attended(learner.heads["attentive_probe"], patches)
    assert torch.allclose(learner.outputs(batch)["task"], expected, atol=1e-5)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"depth \(9\) must not exceed the model's 3 blocks"):
        AttentiveProbe(depth=9).depths(DEEP)


def probe(tmp_path, task, steps=30, source=None):
    made = Finetune(
        init=str(stored(tmp_path / "model")), task=task, source=source or coloured("red", "blue"),
        held_out=coloured("blue", "red"), samples=4, train=training(steps, optim=OptimConfig(peak_lr=0.05)),
    )  # fmt: skip
    return made.run(Job(tmp_path / "run", Record()))


@pytest.mark.parametrize("task", [LinearProbe(), AttentiveProbe()], ids=["linear", "attentive"])
def test_a_probe_learns_and_leaves_the_model_as_it_was(tmp_path, task):
    metrics = probe(tmp_path, task)
    assert metrics["accuracy"] == 1
    before, after = read_model(tmp_path / "model").tensors, read_model(tmp_path / "run").tensors
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = Eval(model=str(tmp_path / "run"), protocol="task", source=coloured("blue", "red"))
    assert again.run(Job(tmp_path / "again", Record()))["accuracy"] == 1


def test_a_probe_of_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="a probe needs at least two classes, the source has 1"):
        probe(tmp_path, LinearProbe(), source=coloured("red", "red"))


def contrastive(folder):
    return stored(folder, "retrieval", tokenizer=pieces())


def test_pictures_are_compared_with_the_mean_of_all_sentences_about_a_class(tmp_path):
    found = read_model(contrastive(tmp_path))
    task = ZeroShotClassification(templates=["a small {} boat", "the {} sea"])
    made = tools(labels=LABELS, train=False, tokenizer=found.text_tokenizer())

    def make():
        return MultiwayLearner(Multiway(MODEL), [Objective("task", task)], {"task": made})

    learner = measuring.whole(make, found.tensors, ALONE, torch.float32)
    stream = Stream("task", task, coloured("red", "blue", "red").open(), 1, made)
    logits = torch.cat(measuring.outputs(learner, stream, ALONE, size=2).outputs)
    from beitctl.checkpoints.loading import load_model

    model, tokenizer = load_model(tmp_path), made.tokenizer
    vectors = []
    for name in LABELS:
        texts = [f"a small {name} boat", f"the {name} sea"]
        ids = [torch.tensor([[0, *tokenizer.encode(text)[:8], 2]]) for text in texts]
        vectors.append(F.normalize(torch.cat([model.embed_text(one) for one in ids]).mean(0), dim=-1))
    batch = batch_of(task, made, "red", "blue", "red")
    pictures = learner.outputs(batch)["task"]
    assert torch.allclose(logits, pictures @ torch.stack(vectors).T / 0.07, atol=1e-4)


def test_zero_shot_classification_is_measured_by_eval(tmp_path):
    stage = Eval(
        model=str(contrastive(tmp_path / "model")), protocol="task", source=coloured("red", "blue"),
        task=ZeroShotClassification(),
    )  # fmt: skip
    found = stage.run(Job(tmp_path / "run", Record()))
    assert found["examples"] == 2
    assert 0 <= found["accuracy"] <= 1


def test_a_model_without_a_contrastive_head_cannot_classify_zero_shot(tmp_path):
    stage = Eval(
        model=str(stored(tmp_path)), protocol="task", source=coloured("red", "blue"),
        task=ZeroShotClassification(),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"contrastive\.vision\.weight missing"):
        stage.run(Job(tmp_path / "run", Record()))


def test_it_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="trains nothing: use it in"):
        probe(tmp_path, ZeroShotClassification())


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_sentence_without_one_place_for_the_name_is_refused(template):
    with pytest.raises(ValidationError, match=r"each must hold \{\} once"):
        ZeroShotClassification(templates=[template])


def test_readable_names_stand_in_the_place_of_those_of_the_classes(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("blue sky\nred rose\n")
    task = ZeroShotClassification(readable_names=str(file))
    assert task._names(tools(labels=("n01", "n02"))) == ("blue sky", "red rose")
    with pytest.raises(DataError, match="has 2 names, there are 3 classes"):
        task._names(tools(labels=("a", "b", "c")))


def test_heads_of_a_probe_have_initial_weights(tmp_path):
    made = tools(model=DEEP, labels=LABELS)
    heads = {**LinearProbe().heads(made), **AttentiveProbe().heads(made)}
    found = weights(torch.nn.ModuleDict(heads), "heads.", DEEP)
    assert all(torch.isfinite(value).all() for value in found.values())
    save_model(tmp_path, found, DEEP)
