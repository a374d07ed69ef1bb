"""Recipes of published rows: their settings and figures are those of the papers and of the released commands.

The numbers stand here a second time, taken from the sources and not from the recipes.
"""

import json
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

from beitctl import cli, recipe
from beitctl.checkpoints.adapt import adapted
from beitctl.config import ModelConfig
from beitctl.smoke import shrunk

FOLDER = Path(__file__).parents[2] / "recipes"
IMAGENET, CAPTIONS, FLICKR, NLVR2 = 1_281_167, 566_747, 145_000, 86_373
"""Examples that the released code trains on in an epoch."""
QUESTIONS = 443_757 + 214_354 - 5_292
"""VQA v2: those of train and of val, less those about 1,000 of the 40,504 pictures of val; how many of them
have no answer of the list is not said."""


@dataclass(frozen=True)
class Row:
    """What is published of one fine-tuning."""

    init: str
    samples: int
    length: tuple[float, float]
    """Steps, and those of warm-up."""
    peak_lr: float
    layer_decay: float
    weight_decay: float
    drop_path: float | None
    published: dict[str, float]
    px: int = 0
    """Side of the pictures where it is not that of pretraining."""
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    head_factor: float = 1.0
    text: int = 0
    """Longest text in tokens."""
    settings: dict[str, object] = field(default_factory=dict)
    """Settings of the task."""


def epochs(count, rows, samples, warm):
    return count * rows / samples, warm * rows / samples


MIXED = {"mixup": 0.8, "cutmix": 1.0}
"""Pictures of ImageNet after self-supervised pretraining."""
FRAMED = {"label_smoothing": 0.1, "augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "crop_scale": (0.08, 1.0)}
DENSE = {"auxiliary_weight": 0.4, "dropout": 0.1, "resize": (0.5, 2.0), "distort": True}
WORDS = {
    "mask_ratio": 0.7, "label_smoothing": 0.1, "drop_worst": 0.2, "drop_worst_after": 12_000, "beam_size": 3,
    "length_penalty": 0.6, "augment": "beit3",
}  # fmt: skip


def beit3(size, got):
    """Rows of BEiT-3 by task, for one size; ``got`` holds what differs between sizes."""
    file = f"beit3_{size}_patch16_224.pth"
    itc = f"beit3_{size}_itc_patch16_224.pth"
    vqa = epochs(10, QUESTIONS, 128, 1)
    captions = epochs(10, CAPTIONS, 256, 1)
    ranked = {"duplicates": False, "augment": ""}
    return {
        "imagenet": Row(
            file, 1024, epochs(50, IMAGENET, 1024, 5), *got["imagenet"],
            settings={**MIXED, **FRAMED, "crop_pct": 1.0},
        ),
        "vqav2": Row(
            file, 128, vqa, *got["vqav2"], px=480, betas=(0.9, 0.98), head_factor=20.0, text=64,
            settings={"augment": "beit3"},
        ),
        "nlvr2": Row(file, 256, epochs(20, NLVR2, 256, 5), *got["nlvr2"], text=64, settings={"augment": ""}),
        "captioning": Row(file, 256, captions, *got["captioning"], px=480, text=32, settings=WORDS),
        "nocaps": Row(file, 256, captions, *got["nocaps"], px=480, text=32, settings=WORDS),
        "coco-retrieval": Row(
            itc, 3072, epochs(15, CAPTIONS, 3072, 3), *got["coco-retrieval"], px=384, text=64, settings=ranked
        ),
        "flickr30k-retrieval": Row(
            itc, 3072, epochs(20, FLICKR, 3072, 5), *got["flickr30k-retrieval"], px=384, text=64,
            settings=ranked,
        ),
    }  # fmt: skip


# learning rate, layer decay, weight decay, stochastic depth, figures: model-spec 4.1, 4.4 to 4.7 and 5.4
BASE = {
    "imagenet": (7e-4, 0.65, 0.05, 0.15, {"imagenet_top1": 85.4, "imagenet_top5": 97.6}),
    "vqav2": (3e-5, 1.0, 0.01, 0.1, {"vqav2_test_dev": 77.65, "vqav2_test_dev_indomain": 78.46}),
    "nlvr2": (
        7e-4, 0.65, 0.2, 0.2, {"nlvr2_dev": 83.6, "nlvr2_test_p": 84.4, "nlvr2_test_p_indomain": 85.3},
    ),
    "captioning": (4e-5, 1.0, 0.05, 0.1, {"coco_cider": 133.6, "coco_cider_indomain": 135.0}),
    "nocaps": (1e-5, 1.0, 0.05, 0.1, {"nocaps_val_cider": 104.4, "nocaps_val_cider_indomain": 105.6}),
    "coco-retrieval": (2e-4, 0.65, 0.05, 0.2, {"coco_i2t_r1": 79.1, "coco_t2i_r1": 61.4}),
    "flickr30k-retrieval": (1e-4, 0.65, 0.05, 0.2, {"flickr30k_i2t_r1": 96.3, "flickr30k_t2i_r1": 86.2}),
}  # fmt: skip
LARGE = {
    "imagenet": (2e-4, 0.8, 0.05, 0.25, {"imagenet_top1": 87.6, "imagenet_top5": 98.3}),
    "vqav2": (2e-5, 1.0, 0.01, 0.15, {"vqav2_test_dev": 81.85, "vqav2_test_dev_indomain": 82.53}),
    "nlvr2": (
        3e-4, 0.85, 0.2, 0.2, {"nlvr2_dev": 88.5, "nlvr2_test_p": 89.4, "nlvr2_test_p_indomain": 90.0},
    ),
    "captioning": (8e-6, 1.0, 0.05, 0.1, {"coco_cider": 143.2}),
    "nocaps": (8e-6, 1.0, 0.05, 0.1, {"nocaps_val_cider": 120.2}),
    "coco-retrieval": (5e-5, 0.85, 0.05, 0.2, {"coco_i2t_r1": 82.1, "coco_t2i_r1": 63.4}),
    "flickr30k-retrieval": (5e-5, 0.85, 0.05, 0.2, {"flickr30k_i2t_r1": 97.2, "flickr30k_t2i_r1": 88.1}),
}  # fmt: skip


def ade20k(init, rates, published, px):
    pixels = "" if init.startswith("beit3") else "imagenet"
    lr, decay, depth = rates
    settings = {**DENSE, "pixels": pixels}
    return Row(
        init, 16, (160_000, 1500), lr, decay, 0.05, depth, published, px=px, schedule="linear",
        settings=settings,
    )  # fmt: skip


def imagenet(init, samples, lengths, rates, published, mixed):
    """BEiT-1 and BEiT v2: the shorter side is 256 pixels of which 224 are seen."""
    settings = {**FRAMED, **(MIXED if mixed else {"mixup": 0.0, "cutmix": 0.0}), "crop_pct": 0.875}
    length = epochs(lengths[0], IMAGENET, samples, lengths[1])
    return Row(init, samples, length, *rates, published, settings=settings)


def linear(size, accuracy):
    init, length = f"beit_{size}_patch16_224_pt22k.pth", epochs(50, IMAGENET, 1024, 0)
    settings = {"crop_scale": (0.08, 1.0), "crop_pct": 0.875}
    return Row(init, 1024, length, 4e-3, 1.0, 1e-4, None, {"imagenet_linear": accuracy}, settings=settings)


def vlmo(init, samples, length, lr, depth, published, px, head_factor=1.0, **settings):
    return Row(
        init, samples, length, lr, 1.0, 0.01, depth, published, px=px, betas=(0.9, 0.98), schedule="linear",
        head_factor=head_factor, text=40, settings={"augment": "beit3", **settings},
    )  # fmt: skip


def vlmos(size, lrs, depths, figures):
    """The four rows of one size: VQA v2, NLVR2, COCO, Flickr30k."""
    file, coco = f"vlmo_{size}_patch16_224.pt", f"vlmo_{size}_patch16_384_coco.pt"
    vqa, nlvr2, i2t, t2i, flickr_i2t, flickr_t2i = figures
    asked, told = epochs(10, QUESTIONS, 128, 1), epochs(10, NLVR2, 128, 1)
    ranked = {"coco_i2t_r1": i2t, "coco_t2i_r1": t2i}
    flickr = {"flickr30k_i2t_r1": flickr_i2t, "flickr30k_t2i_r1": flickr_t2i}
    found = {
        "vqav2": vlmo(file, 128, asked, lrs[0], depths[0], {"vqav2_test_dev": vqa}, 480, 20.0),
        "nlvr2": vlmo(file, 128, told, lrs[1], depths[1], {"nlvr2_test_p": nlvr2}, 384),
        "coco-retrieval": vlmo(file, 3072, (3000, 300), lrs[2], depths[2], ranked, 384, duplicates=False),
        "flickr30k-retrieval": vlmo(
            coco, 3072, (1500, 150), lrs[3], depths[3], flickr, 384, duplicates=False
        ),
    }
    return {f"vlmo-{size}-{name}": row for name, row in found.items()}


BEIT, BEIT2 = "beit_{}_patch16_224_pt22k_ft22k.pth", "beitv2_{}_patch16_224_pt1k.pth"
ROWS = {
    **{f"beit3-base-{name}": row for name, row in beit3("base", BASE).items()},
    **{f"beit3-large-{name}": row for name, row in beit3("large", LARGE).items()},
    # nothing is published of these: settings of BEiT v2, and of ViTDet
    "beit3-base-ade20k": ade20k("beit3_base_patch16_224.pth", (5e-5, 0.75, 0.15), {}, 512),
    "beit3-base-coco-detection": Row(
        "beit3_base_patch16_224.pth", 64, (184_375, 250), 1e-4, 0.7, 0.1, 0.1, {}, px=1024,
        settings={"scale_jitter": (0.1, 2.0), "masks": True},
    ),
    "beit-base-imagenet": imagenet(
        BEIT.format("base"), 512, (30, 5), (2e-5, 0.85, 1e-8, 0.1),
        {"imagenet_top1": 85.2, "imagenet_top5": 97.6}, mixed=False,
    ),
    "beit-large-imagenet": imagenet(
        BEIT.format("large"), 512, (30, 5), (2e-5, 0.9, 1e-8, 0.4),
        {"imagenet_top1": 87.4, "imagenet_top5": 98.3}, mixed=False,
    ),
    "beit-base-ade20k": ade20k(
        BEIT.format("base"), (3e-5, 0.9, 0.1), {"ade20k_miou": 53.6, "ade20k_miou_ms": 54.2}, 640
    ),
    "beit-large-ade20k": ade20k(
        BEIT.format("large"), (2e-5, 0.95, 0.2), {"ade20k_miou": 56.7, "ade20k_miou_ms": 57.0}, 640
    ),
    "beit-base-linear": linear("base", 56.7),
    "beit-large-linear": linear("large", 73.5),
    "beitv2-base-imagenet": imagenet(
        BEIT2.format("base"), 1024, (100, 20), (5e-4, 0.6, 0.05, 0.2), {"imagenet_top1": 85.5}, mixed=True
    ),
    "beitv2-large-imagenet": imagenet(
        BEIT2.format("large"), 1024, (50, 5), (2e-4, 0.8, 0.05, 0.2), {"imagenet_top1": 87.3}, mixed=True
    ),
    "beitv2-base-ade20k": ade20k(BEIT2.format("base"), (5e-5, 0.75, 0.15), {"ade20k_miou": 53.1}, 512),
    "beitv2-large-ade20k": ade20k(BEIT2.format("large"), (4e-5, 0.9, 0.2), {"ade20k_miou": 56.7}, 512),
    **vlmos("base", (3e-5, 5e-5, 3e-5, 3e-5), (0.15, 0.1, 0.2, 0.15), (76.6, 83.3, 74.8, 57.2, 92.3, 79.3)),
    **vlmos(
        "large", (1.5e-5, 3e-5, 2e-5, 2e-5), (0.15, 0.15, 0.2, 0.2), (79.9, 86.9, 78.2, 60.6, 95.3, 84.5)
    ),
}  # fmt: skip
NAMES = sorted(ROWS)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch, tmp_path):
    """Bundled recipes only, and no data in the working folder."""
    monkeypatch.delenv("BEITCTL_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)


@cache
def loaded(name):
    return recipe.load(str(FOLDER / f"{name}.toml"))


def stage(name):
    found = [table.plugin for table in loaded(name).tables.values() if table.stage == "finetune"]
    assert len(found) == 1
    return found[0]


def test_every_recipe_that_begins_with_a_released_file_has_its_row_here():
    files = {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.toml")}
    begun = {
        name
        for name, tables in files.items()
        if "weights/" in json.dumps(tables.get("finetune", {}).get("init", ""))
    }
    assert begun == set(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_figures_are_those_of_the_source(name):
    assert loaded(name).meta["published"] == ROWS[name].published
    assert all(isinstance(value, float) for value in ROWS[name].published.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_is_that_of_the_source(name):
    row, found = ROWS[name], stage(name).train.optim
    assert (found.peak_lr, found.layer_decay, found.weight_decay) == (
        row.peak_lr,
        row.layer_decay,
        row.weight_decay,
    )
    assert (found.betas, found.schedule, found.head_factor) == (row.betas, row.schedule, row.head_factor)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_long_as_published(name):
    row, found = ROWS[name], stage(name)
    steps, warm = row.length
    assert found.samples == row.samples
    assert found.train.steps == pytest.approx(steps, rel=0.03)
    assert found.train.optim.warmup_steps == pytest.approx(warm, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_task_and_the_model_are_those_of_the_source(name):
    row, found = ROWS[name], stage(name)
    assert found.init == f"weights/{row.init}"
    assert (found.image_px, found.drop_path) == (row.px, row.drop_path)
    assert getattr(found.task, "text_tokens", 0) == row.text
    assert {key: getattr(found.task, key) for key in row.settings} == row.settings
    assert found.keep_heads == (name.endswith("retrieval") or name.startswith("vlmo"))


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_released_file_does_not(name):
    found, large = stage(name), "-large-" in name
    heads = {"heads": 16 if large else 12} if name.startswith("beit3") else {}
    normalised = name.endswith("imagenet") and not name.startswith("beit-")
    assert found.init_settings == heads | ({"pixels": "imagenet"} if normalised else {})
    tokenizer = {"beit3": "weights/beit3.spm", "vlmo": "weights/bert-base-uncased/vocab.txt"}
    reads_text = found.task.layout != "image"
    assert found.text_tokenizer == (tokenizer[name.split("-")[0]] if reads_text else "")


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_at_toy_size_validates(name):
    small = shrunk(loaded(name), "finetune", ["finetune"]).tables["finetune"].plugin
    full = stage(name)
    assert (type(small.task), small.train.steps) == (type(full.task), 8)
    assert small.train.optim.head_factor == full.train.optim.head_factor


KINDS = {
    "beit-base-ade20k": "segmentation",
    "beit-base-linear": "linear-probe",
    "beit3-base-captioning": "captioning",
    "beit3-base-coco-detection": "detection",
    "beit3-base-coco-retrieval": "retrieval",
    "beit3-base-imagenet": "classification",
    "beit3-base-nlvr2": "nlvr2",
    "beit3-base-vqav2": "vqa",
}
"""One recipe of every kind of task."""


def test_one_recipe_of_every_kind_is_planned():
    assert {loaded(name).tables["finetune"].table["task"]["kind"] for name in NAMES} == set(KINDS.values())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_dry_run_at_toy_size_says_how_long_it_is(name, capsys):
    assert loaded(name).tables["finetune"].table["task"]["kind"] == KINDS[name]
    assert cli.execute(["finetune", "--recipe", name, "--smoke", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["finetune"]
    assert (plan["steps"], plan["examples"], plan["held out"]) == (8, 96, 32)


def test_contrastive_tuning_can_begin_with_the_released_file():
    model = loaded("beit3-base-itc").tables["pretrain"].plugin.model
    released = ModelConfig(  # shapes of beit3_base_patch16_224.pth: 1,024 rows for texts, two of them unread
        layers=12, width=768, heads=12, ffn=3072, vocabulary=64_010, text_tokens=1022, attention="decoupled"
    )
    assert adapted({}, released, model, grown=True) == {}
    assert replace(model, drop_path=released.drop_path, init=released.init) == released


def test_contrastive_tuning_is_as_long_as_published():
    found = loaded("beit3-base-itc").tables["pretrain"].plugin
    contrast = found.objectives["contrast"]
    assert (contrast.samples, contrast.task.text_tokens) == (16_384, 64)
    assert found.train.steps * contrast.samples == pytest.approx(5 * 21e6, rel=0.01)
    assert found.train.optim.warmup_steps * 5 == found.train.steps
    assert {name: table.task.layout for name, table in found.objectives.items()} == {
        "contrast": "dual", "image": "image", "text": "text", "pair": "pair",
    }  # fmt: skip
