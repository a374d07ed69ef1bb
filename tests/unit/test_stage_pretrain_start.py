"""How pretraining begins: weights of other runs and files, and parts that stay as they are."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretraining import near, objective, run, stage
from small import MODEL, Codes, Given, Record, pieces, stored, training, weights

from beitctl.api import Example, Job
from beitctl.checkpoints.loading import read_model
from beitctl.checkpoints.native import save_model
from beitctl.config import OptimConfig, TrainConfig
from beitctl.engine.dist import start
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl.report.events import EventLog, read
from beitctl_plugins.stages import shared
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.masked import MaskedText

REFERENCE = Path("/work/shared/reference")
PROSE = Given(examples=tuple(Example(f"t{i}", text="a red boat on the calm sea") for i in range(4)))
FC1 = "model.blocks.0.ffn.vision.fc1.weight"
CLASSIFIER = "heads.classifier.linear.weight"


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Codes())


def saved(folder, model=MODEL, kind="", labels=("blue", "red"), **extra):
    """A model on disk whose weights no seed gives."""
    stored(folder, kind, labels)
    tensors = read_model(folder).tensors if model is MODEL else weights(Multiway(model), "model.", model)
    moved = {name: value + 0.5 for name, value in (tensors | extra).items()}
    save_model(folder, moved, model)
    return moved


# --- init ------------------------------------------------------------------------------------------------


def test_training_begins_with_the_weights_of_init(tmp_path):
    given = saved(tmp_path / "a")
    _, found, _ = run(tmp_path / "run", stage(tmp_path / "a"))
    assert all(near(found[name], value) for name, value in given.items())


def test_what_init_has_not_begins_with_the_seeds_values(tmp_path):
    saved(tmp_path / "a")
    _, found, _ = run(tmp_path / "run", stage(tmp_path / "a"))
    name = "heads.image_codes.weight"
    assert near(found[name], initial(name, found[name].shape, MODEL, 5))


def test_without_init_all_begins_with_the_seeds_values(tmp_path):
    _, found, notes = run(tmp_path / "run", stage())
    assert near(found[FC1], initial(FC1, found[FC1].shape, MODEL, 5))
    assert notes == []


def test_the_log_says_what_begins_how_and_what_is_not_used(tmp_path):
    saved(tmp_path / "a", kind="classification")
    _, found, notes = run(tmp_path / "run", stage(tmp_path / "a"))
    assert notes == [
        f"{len(found) - 2} parameters begin with the weights of init; 2 begin at random: "
        "heads.image_codes.bias, heads.image_codes.weight; 2 of its tensors are not used: "
        "heads.classifier.linear.bias, heads.classifier.linear.weight"
    ]


def test_a_long_list_in_the_log_is_cut(tmp_path):
    saved(tmp_path / "a", replace(MODEL, vocabulary=0, text_tokens=0))
    _, _, (note,) = run(tmp_path / "run", stage(tmp_path / "a"))
    assert "12 begin at random: heads.image_codes.bias" in note
    assert note.endswith(" ...")


def test_a_run_of_pretrain_is_what_another_begins_with(tmp_path):
    _, first, _ = run(tmp_path / "first", stage(train=training(2, seed=1)))
    _, second, (note,) = run(tmp_path / "second", stage(tmp_path / "first"))
    assert all(near(second[name], value) for name, value in first.items())
    assert note == f"{len(first)} parameters begin with the weights of init"


def test_init_may_refer_to_another_stage(tmp_path):
    given = saved(tmp_path / "a")
    made = stage("@pretrain.vision")
    job = Job(tmp_path, Record(), {"@pretrain.vision": tmp_path / "a"})
    assert all(torch.equal(made._start(job)[name], value) for name, value in given.items())


def test_positions_are_resampled_for_the_model_that_begins(tmp_path):
    saved(tmp_path / "a", replace(MODEL, image_px=32))
    _, found, _ = run(tmp_path / "run", stage(tmp_path / "a"))
    assert found["model.vision_embed.position"].shape == (17, 8)


def test_a_model_grows_from_pictures_to_texts_to_pairs(tmp_path):
    """The stages of VLMo: a shared table, then texts on top, then experts of pairs."""
    vision = replace(MODEL, vocabulary=0, text_tokens=0, position="relative-shared", norm="pre")
    text = replace(
        vision, position="relative-per-block", vocabulary=52, text_tokens=10, text_norm=True, token_types=2
    )
    pieces().save(tmp_path / "tokenizer")
    words = {
        "objectives": {"text": objective(MaskedText(), PROSE)},
        "text_tokenizer": f"{tmp_path}/tokenizer",
    }
    _, first, _ = run(tmp_path / "1", stage(model=vision))
    _, second, _ = run(tmp_path / "2", stage(tmp_path / "1", model=text, **words))
    _, third, _ = run(tmp_path / "3", stage(tmp_path / "2", model=replace(text, fusion_layers=1), **words))
    table = "model.blocks.0.relative.table"
    assert near(second[FC1], first[FC1])
    assert near(second[table][:52], first["model.relative.table"])
    assert all(near(third[name], value) for name, value in second.items())
    assert {name.split(".")[4] for name in set(third) - set(second)} == {"fusion"}


def test_weights_of_another_model_are_refused_with_all_that_differs(tmp_path):
    saved(tmp_path / "a", replace(MODEL, layers=2, ffn=8))
    with pytest.raises(UserError, match=r"weights cannot be changed \(ffn: 8 to 16; layers: 2 to 1\)"):
        run(tmp_path / "run", stage(tmp_path / "a"))


def test_weights_of_which_none_belongs_to_the_model_are_refused(tmp_path):
    save_model(tmp_path / "a", {"model.strange": torch.zeros(2), "heads.other": torch.zeros(2)}, MODEL)
    with pytest.raises(DataError, match=r"a: does not fit the model: missing model\.blocks\.0\."):
        run(tmp_path / "run", stage(tmp_path / "a"))


def test_a_head_of_another_size_begins_at_random_and_the_log_says_so(tmp_path):
    given = saved(tmp_path / "a", kind="classification", labels=("blue", "green", "red"))
    _, found, (note,) = run(tmp_path / "run", stage(tmp_path / "a", task=Classification(pool="cls")))
    assert near(found[CLASSIFIER], initial(CLASSIFIER, found[CLASSIFIER].shape, MODEL, 5))
    assert near(found[FC1], given[FC1])
    assert note.count(CLASSIFIER) == 2


def test_a_head_of_the_same_size_goes_on(tmp_path):
    given = saved(tmp_path / "a", kind="classification")
    _, found, _ = run(tmp_path / "run", stage(tmp_path / "a", task=Classification(pool="cls")))
    assert near(found[CLASSIFIER], given[CLASSIFIER])


def test_a_part_of_the_body_of_another_size_is_refused(tmp_path):
    given = saved(tmp_path / "a")
    save_model(tmp_path / "a", given | {FC1: torch.zeros(3, 8)}, MODEL)
    with pytest.raises(DataError, match=rf"does not fit the model: {FC1} is \(3, 8\), expected \(16, 8\)"):
        run(tmp_path / "run", stage(tmp_path / "a"))


def test_an_init_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        run(tmp_path / "run", stage(tmp_path / "nowhere"))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match="no model here"):
        run(tmp_path / "run", stage(tmp_path))


official = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the official files are not here")


class Nine(Codes):
    """A store for a grid of 3 x 3 patches with as many codes as the official file has, or others."""

    grid = 3

    def __init__(self, codes):
        self.codes = codes

    def view(self, id, number):
        return super().view(id, number)[0], super().view(id, number)[1][:9]


@official
@pytest.mark.parametrize(("codes", "random"), [(64, 0), (40, 2)])
def test_an_official_file_is_what_training_begins_with(tmp_path, monkeypatch, codes, random):
    file = REFERENCE / "beit12" / "beit_mim.pth"
    known = read_model(file)
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Nine(codes))
    _, found, (note,) = run(tmp_path / "run", stage(file, model=known.model))
    body = {name: value for name, value in known.tensors.items() if name.startswith("model.")}
    assert all(near(found[name], value) for name, value in body.items())
    assert note.startswith(f"{len(found) - random} parameters begin with the weights of init")


@official
def test_init_settings_say_what_an_official_file_does_not(tmp_path, monkeypatch):
    file = REFERENCE / "beit3" / "beit3_retrieval.pth"
    known = read_model(file, {"heads": 4})
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Nine(40))
    _, found, _ = run(tmp_path / "run", stage(file, model=known.model, init_settings={"heads": 4}))
    assert near(found["model.vision_embed.position"], known.tensors["model.vision_embed.position"])


@official
def test_an_official_file_that_does_not_say_enough_names_the_setting(tmp_path):
    with pytest.raises(UserError, match="does not say the number of attention heads: give heads="):
        run(tmp_path / "run", stage(REFERENCE / "beit3" / "beit3_retrieval.pth"))


# --- frozen ----------------------------------------------------------------------------------------------

QUICK = training(3, optim=OptimConfig(peak_lr=0.1, weight_decay=0.5))
FROZEN = ["attention", "ffn.vision", "vision_embed.p"]


def starts(found):
    return {name: initial(name, value.shape, MODEL, 0) for name, value in found.items()}


def split(found):
    """Names that are equal to their initial values to the bit, and the others."""
    begun = starts(found)
    equal = {name for name, value in found.items() if torch.equal(value, begun[name])}
    return equal, set(found) - equal


def test_frozen_weights_stay_to_the_bit_and_all_others_move(tmp_path):
    _, found, _ = run(tmp_path / "run", stage(train=QUICK, frozen=FROZEN))
    equal, moved = split({n: v for n, v in found.items() if "language" not in n and "text_embed" not in n})
    assert {n for n in equal | moved if any(part in n for part in FROZEN)} == equal
    assert moved == {
        "model.norm.shared.weight",
        "model.norm.shared.bias",
        "model.vision_embed.cls_token",
        "model.vision_embed.mask_token",
        "heads.image_codes.weight",
        "heads.image_codes.bias",
    }


def frozen_as_ranks(folder):
    """On each rank: names that stayed to the bit and names that moved, as rank 0 wrote them."""
    ranks = start()
    shared.open_tokens = lambda job, value: Codes()
    _, found, _ = run(Path(folder), stage(train=QUICK, frozen=FROZEN), main=ranks.main)
    ranks.stop()
    return [sorted(names) for names in split(found)]


def test_frozen_weights_stay_to_the_bit_on_two_processes(on_ranks, tmp_path):
    (equal, moved), _ = on_ranks(frozen_as_ranks, 2, tmp_path / "run")
    assert {n for n in equal + moved if any(part in n for part in FROZEN)} <= set(equal)
    assert "heads.image_codes.weight" in moved
    assert "model.vision_embed.mask_token" in moved


def test_frozen_weights_of_init_stay_to_the_bit(tmp_path):
    given = saved(tmp_path / "a")
    _, found, _ = run(tmp_path / "run", stage(tmp_path / "a", train=QUICK, frozen=["model."]))
    assert all(torch.equal(found[name], value) for name, value in given.items())


def test_a_frozen_run_that_is_resumed_equals_one_without_a_break(tmp_path):
    made = stage(train=replace(QUICK, steps=4, save_every_steps=2), frozen=FROZEN)
    _, straight, _ = run(tmp_path, made)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    _, resumed, notes = run(tmp_path, made)
    assert notes == ["resuming from step 2"]
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_a_part_that_no_parameter_has_is_named(tmp_path):
    with pytest.raises(UserError, match=r"frozen: no parameter has 'attenton', 'x\.y' in its name"):
        run(tmp_path / "run", stage(frozen=["attenton", "attention", "x.y"]))


@pytest.mark.parametrize("parts", [["model.", "heads."], ["e"], [""]])
def test_nothing_left_to_train_is_refused(tmp_path, parts):
    with pytest.raises(UserError, match="frozen: nothing is left to train"):
        run(tmp_path / "run", stage(frozen=parts))


@pytest.mark.parametrize(("compile", "said"), [("on", True), ("auto", False)])
def test_blocks_that_are_compiled_are_told_before_the_first_step(monkeypatch, tmp_path, compile, said):
    config = TrainConfig(steps=1, optim=OptimConfig(peak_lr=1e-3), compile=compile)
    ranks = SimpleNamespace(device=torch.device("cpu"), main=True)
    monkeypatch.setattr(shared, "sharded", lambda *arguments, **words: None)
    with EventLog(tmp_path, stage="pretrain", recipe="r", run="x", quiet=True) as log:
        shared.build(None, ranks, config, None, Job(tmp_path, log, {}, False))
    notes = [record["message"] for record in read(tmp_path)]
    assert [note.startswith("blocks are compiled in the first steps") for note in notes] == [True] * said
