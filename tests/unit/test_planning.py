"""``beitctl plan``: what a training needs, told before it runs."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from planned import MODEL, TEXT_TOKENS, TRAIN, place, plan, told, work  # noqa: F401 - the fixture works by being here
from small import Letters
from torch.utils.flop_counter import FlopCounterMode

from beitctl import recipe
from beitctl.api import Item
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.measuring.gpus import CARDS, Gpu, named
from beitctl.model.multiway import Multiway
from beitctl.planning import estimate, text
from beitctl.planning.memory import per_gpu
from beitctl.planning.work import work_of
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.contrast import ContrastAndMatch
from beitctl_plugins.tasks.masked import Bottleneck, MaskedImage, MaskedPair
from beitctl_plugins.tasks.retrieval import Retrieval
from beitctl_plugins.tasks.vqa import VQA

# --- parameters ---


def test_the_giant_on_512_gpus_is_planned_in_seconds_and_has_the_counted_parameters(capsys):
    begun = time.monotonic()
    found = told(capsys, "--recipe", "beit3-giant", "--gpus", "512")
    assert time.monotonic() - begun < 30
    counted = recipe.load("beit3-giant").tables["pretrain"].plugin.plan()["parameters"]
    assert found["parameters"]["total"] == counted["total"]
    assert found["parameters"]["total"] == pytest.approx(1.95e9, rel=0.01)


@pytest.mark.parametrize(("name", "key"), [("beitv2-base", "pretrain"), ("vlmo-base", "pretrain.pairs")])
def test_parameters_are_those_of_the_dry_run(name, key, capsys):
    found = told(capsys, "--recipe", name, "--only", key)
    counted = recipe.load(name).tables[key].plugin.plan()["parameters"]
    assert found["parameters"] == {part.replace(" ", "_"): n for part, n in counted.items()} | {
        "trainable": counted["total"]
    }


def test_frozen_parameters_have_neither_gradient_nor_moments():
    free, frozen = work(MaskedImage()), work(MaskedImage(), frozen=("attention", "ffn"))
    assert free.sizes.trainable == free.sizes.parts["total"] > 10 * frozen.sizes.trainable > 0
    before, after = (per_gpu(each, 1, 0).parts for each in (free, frozen))
    assert after["master_weights"] == before["master_weights"]
    assert (after["moments"], after["gradients"]) == (8 * frozen.sizes.trainable, 4 * frozen.sizes.trainable)


# --- work ---


def counted(made):
    """Operations that torch counts in forward and backward of the real learner on the batch of the plan."""
    learner = MultiwayLearner(
        Multiway(made.model),
        [Objective(part.name, part.task) for part in made.parts],
        {part.name: replace(made.tools, tokenizer=Letters()) for part in made.parts},
    )
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.02)
    batch = collate([Portion(p.name, p.task.layout, items(p), None) for p in made.parts], made.model)
    with FlopCounterMode(display=False) as counter:
        torch.stack([total for total, _ in learner(batch).values()]).sum().backward()
    return counter.get_total_flops()


def items(part):
    """As many items as the part has samples, and predicted rows as it says."""
    found = {"label": 0, "chance": (0.3, 0.6)}
    if part.task.layout != "text":
        hidden = np.arange(MODEL.patches) < part.patches
        codes = np.where(hidden, 1, -1)
        found |= {
            "image": np.zeros((3, *MODEL.size), np.uint8),
            "image_mask": hidden,
            "patch_targets": codes,
        }
    if part.task.layout != "image":
        words = np.where(np.arange(part.text_tokens) < part.words, 5, -1)
        found |= {"text": np.full(part.text_tokens, 6), "text_targets": words}
    return [Item(**found)] * part.samples


TASKS = {
    "masked pictures and pairs": (MaskedImage(), MaskedPair()),
    "bottleneck": (MaskedImage(bottleneck=Bottleneck(early_layers=2)),),
    "transform before the words": (MaskedPair(head="bert", image_mask_ratio=0.0),),
    "classification": (Classification(pool="cls"),),
    "retrieval": (Retrieval(),),
    "contrast and match beside pairs": (ContrastAndMatch(), MaskedPair()),
    "contrast alone": (ContrastAndMatch(match=False),),
}


@pytest.mark.parametrize("tasks", TASKS.values(), ids=TASKS)
def test_work_of_every_task_is_what_torch_counts(tasks):
    made = work(*tasks)
    assert made.flops().training == pytest.approx(counted(made), rel=0.01)


def test_predicted_rows_follow_from_the_shares_of_the_tasks(capsys):
    step = told(capsys, "--recipe", "beit3-giant", "--gpus", "8")["step"]["objectives"]
    assert step["image"]["predicted_patches"] == 2048 * 102
    assert step["text"] == {
        "samples": 2048, "pictures": 0, "text_tokens": 128, "rows": 2048 * 128, "predicted_patches": 0,
        "predicted_tokens": 2048 * 19,
    }  # fmt: skip
    assert step["pair"]["rows"] == 2048 * (257 + 24)


def test_captions_are_as_long_as_asked_and_no_longer_than_the_task_reads(capsys):
    asked = ("--only", "pairs", "--recipe", "vlmo-base", "--caption-tokens")
    lengths = [
        told(capsys, *asked, tokens)["step"]["objectives"]["words"]["text_tokens"] for tokens in ("12", "99")
    ]
    assert lengths == [12, 40]


def test_what_is_assumed_of_prose_is_said():
    found = recipe.load("beit3-base")
    said = work_of(found, found.tables["pretrain"], 24).assumptions
    assert (
        said[0]
        == f"text: prose fills the model's {found.tables['pretrain'].plugin.model.text_tokens} text tokens"
    )


# --- the rest of the plan ---


def test_time_follows_from_the_share_of_the_peak(capsys):
    found = told(capsys, "--recipe", "beit3-giant", "--gpus", "64", "--gpu", "h200", "--mfu", "0.5")
    seconds = found["flops"]["training"] / 64 / 989e12 / 0.5
    assert found["time"]["step_seconds"] == pytest.approx(seconds)
    assert found["time"]["days"] == pytest.approx(seconds * 1e6 / 86400)
    assert found["loader"]["pictures_per_second_per_gpu"] == pytest.approx(4096 / seconds / 64)


def test_without_a_known_gpu_time_and_fit_are_hidden_and_it_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    found = told(capsys, "--recipe", "beit3-base")
    assert (found["gpu"], found["memory"]["fits"], set(found["time"].values())) == (None, None, {None})
    assert "no known GPU" in found["assumptions"][-1]


def test_the_gpu_of_the_machine_is_taken_if_its_figures_are_known(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert told(capsys, "--recipe", "beit3-base")["gpu"]["name"] == "h200"


def test_every_card_is_found_by_the_name_that_cuda_gives_it():
    assert [named(card.device_names[0]) for card in CARDS.values()] == list(Gpu)


def test_in_fp32_there_is_no_time(capsys):
    asked = ("--recipe", "beit3-base", "--gpu", "h100", "--set", "train.precision=fp32")
    found = told(capsys, *asked)
    assert found["time"]["step_seconds"] is None
    assert found["assumptions"][-1].startswith("no time")


def test_checkpoints_have_twelve_bytes_a_parameter(capsys):
    found = told(capsys, "--recipe", "beit3-giant")
    total = found["parameters"]["total"]
    assert found["disk"]["checkpoint"] == 12 * total
    assert (found["disk"]["checkpoints"], found["disk"]["checkpoints_at_most"]) == (36 * total, 48 * total)


def test_the_token_store_is_unknown_where_the_data_are_not_there(capsys):
    store = told(capsys, "--recipe", "beit3-giant")["disk"]["token_store"]
    assert store == {"pictures": None, "views": 8, "bytes_per_picture": 8 * (2 * 256 + 32), "bytes": None}


def test_the_token_store_and_the_epochs_are_known_where_the_data_are_there(capsys):
    found = told(capsys, "--recipe", "tiny")
    store = found["disk"]["token_store"]
    assert store["bytes"] == store["pictures"] * store["bytes_per_picture"] > 0
    assert {name: held["examples"] for name, held in found["data"].items()} == {
        "image": 96, "text": 96, "pair": 96,
    }  # fmt: skip


def test_one_gpu_has_no_traffic_and_more_gather_twice_and_scatter_once():
    made = work(MaskedImage(), MaskedPair(), samples=32)
    network = [estimate._network(made, per_gpu(made, gpus, 0), estimate.Asked(gpus), None) for gpus in (1, 4)]
    total = made.sizes.parts["total"]
    assert [found["total"] for found in network] == [0, int(4 * total * 0.75) + int(4 * total * 0.75)]


def test_groups_with_a_copy_each_add_up_their_gradients():
    made = work(MaskedImage(), MaskedPair(), samples=32)
    found = estimate._network(made, per_gpu(made, 32, 0), estimate.Asked(32), None)
    total = made.sizes.parts["total"]
    assert found["all_gather"] == int(4 * total * 7 / 8)
    assert found["all_reduce"] == int(2 * 4 * total / 8 * 3 / 4)


def test_gpus_without_samples_are_told(capsys):
    found = told(capsys, "--recipe", "tiny", "--gpus", "512")
    assert any("for 512 GPUs leave some without" in text for text in found["warnings"])


def test_finetuning_is_planned_for_the_model_of_another_table(capsys):
    found = told(capsys, "--recipe", "beit3-base", "--only", "finetune.classification")
    assert found["step"]["samples"] == 1024
    assert found["parameters"]["heads"] == 1000 * 769 + 2 * 768


def test_answers_are_counted_as_the_task_counts_them(capsys):
    found = told(capsys, "--recipe", "tasks", "--only", "finetune.vqa")
    answers = len(VQA(min_answer_count=1).vocabulary(Embedded(content="questions").open()))
    assert found["parameters"]["heads"] == (
        2 * 128 + 128 * 129 + 128 * 256 + 256 + 2 * 256 + 256 * answers + answers
    )


@pytest.mark.parametrize(
    "asked",
    [("beit3-giant", "--gpus", "1", "--gpu", "l40s"), ("vlmo-base", "--only", "pairs"), ("tiny",)],
    ids=["does not fit", "no GPU", "small"],
)
def test_people_get_80_columns(asked, capsys):
    code, out, _ = plan(capsys, "--recipe", *asked)
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "assumptions" in out


def test_what_does_not_fit_is_told_with_settings_that_make_it_fit(capsys):
    asked = ("--recipe", "beit3-giant", "--gpus", "8", "--gpu", "l40s")
    found = told(capsys, *asked)
    assert found["memory"]["fits"] is False
    (setting, *_) = [fix for fix in found["fixes"] if fix.startswith("--set ")]
    assert told(capsys, *asked, *setting.split())["memory"]["fits"] is True


# --- bad input ---


def test_require_fit_ends_with_5_the_numbers_and_the_setting_to_change(capsys):
    asked = ("--recipe", "beit3-giant", "--gpus", "8", "--gpu", "l40s", "--require-fit")
    code, out, err = plan(capsys, *asked)
    assert (code, "beit3-giant [pretrain]" in out) == (5, True)
    assert "an l40s has 45.0 GiB; one of these makes it fit: --set pretrain.train.micro_samples=" in err


def test_a_contrastive_task_on_a_number_of_gpus_that_does_not_divide_it_is_told(capsys):
    found = told(capsys, "--recipe", "vlmo-base", "--only", "pairs", "--gpus", "3")
    assert (
        "contrast: a contrastive task needs samples (1024) to be a multiple of the 3" in found["problems"][0]
    )


def test_require_fit_ends_with_2_where_something_else_would_not_run(capsys):
    asked = ("--recipe", "tiny", "--gpu", "h100", "--gpus", "7", "--set", "train.shard_ranks=3")
    code, out, err = plan(capsys, *asked, "--require-fit")
    assert (code, "does not work" in out, "7 GPUs are no whole number of groups of 3" in err) == (
        2,
        True,
        True,
    )


def test_no_next_command_is_named_where_something_would_not_run(capsys):
    asked = ("--recipe", "tiny", "--gpu", "h100", "--gpus", "7", "--set", "train.shard_ranks=3")
    code, _, err = plan(capsys, *asked)
    assert (code, "next:" in err) == (0, False)


def test_the_next_command_repeats_what_was_set(capsys):
    code, _, err = plan(capsys, "--recipe", "tiny", "--set", "train.optim={ peak_lr = 1e-3 }")
    said = "next: beitctl pretrain --recipe tiny --set 'train.optim={ peak_lr = 1e-3 }' --dry-run\n"
    assert (code, err) == (0, said)


def test_figures_of_a_small_model_have_units_in_which_they_are_not_zero(capsys):
    _, out, _ = plan(capsys, "--recipe", "tiny", "--gpu", "h100")
    rows = dict(line.strip().partition("  ")[::2] for line in out.splitlines())
    units = {name: rows[name].split()[1] for name in ("master weights", "one checkpoint", "a step", "whole")}
    assert units == {"master weights": "MiB", "one checkpoint": "MB", "a step": "pictures", "whole": "µs"}
    assert " 0.00 " not in out


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (2.5e-7, "0.25 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (90, "1m30s"), (7200, "2h00m"),
        (864_000, "10.00 days"),
    ],
)  # fmt: skip
def test_times_have_the_unit_that_suits_them(seconds, shown):
    assert text._seconds(seconds) == shown


def test_require_fit_is_quiet_where_it_fits(capsys):
    assert plan(capsys, "--recipe", "tiny", "--gpu", "h100", "--require-fit", "--json")[0] == 0


def test_an_unknown_gpu_is_refused_with_the_known_ones_and_what_to_do(capsys):
    code, _, err = plan(capsys, "--recipe", "tiny", "--gpu", "b200")
    assert (code, "--gpu b200: its figures are not known" in err, "leave --gpu out" in err) == (2, True, True)
    for name in Gpu:
        assert name in err


def test_no_gpus_are_refused(capsys):
    code, _, err = plan(capsys, "--recipe", "tiny", "--gpus", "0")
    assert (code, "'--gpus'" in err) == (2, True)


def test_require_fit_without_a_known_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = plan(capsys, "--recipe", "tiny", "--require-fit")
    assert (code, "say --gpu h200|h100|a100|l40s" in err) == (2, True)


def test_a_recipe_without_pretraining_is_refused_with_the_tables_that_it_has(capsys):
    code, out, err = plan(capsys, "--recipe", "codebook-embedded", "--json")
    assert (code, out) == (2, "")
    assert "has no table [pretrain]; it has train-tokenizer." in err


def test_several_tables_are_refused_with_their_names(capsys):
    code, _, err = plan(capsys, "--recipe", "vlmo-base")
    assert code == 2
    assert "vlmo-base has pretrain.vision, pretrain.text, pretrain.pairs; choose one with --only" in err


def test_a_table_that_is_not_there_is_refused_with_those_that_are(capsys):
    code, _, err = plan(capsys, "--recipe", "tiny", "--only", "paris")
    assert (code, "pretrain, finetune.classification, finetune.retrieval" in err) == (2, True)


def test_finetuning_from_a_file_is_refused_for_its_shape_is_not_known(capsys):
    asked = ("--only", "finetune.retrieval", "--set", "finetune.retrieval.init=model.pth")
    code, _, err = plan(capsys, "--recipe", "tiny", *asked)
    assert (code, "its model comes from model.pth" in err) == (2, True)
