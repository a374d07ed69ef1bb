"""``beitctl plan`` on the command line, and the work of tasks on a small model."""

import json
from dataclasses import replace

import pytest
from small import coloured

from beitctl import cli
from beitctl.api import Tools
from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.planning.work import Part, Work, _Codes, _Words

MODEL = ModelConfig(
    layers=3, width=64, heads=2, ffn=256, image_px=24, patch_px=4, vocabulary=52, text_tokens=24,
    fusion_layers=1,
)  # fmt: skip
TRAIN = TrainConfig(steps=10, optim=OptimConfig(peak_lr=1e-3))
TEXT_TOKENS = 9


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEITCTL_DEBUG", "")
    monkeypatch.delenv("BEITCTL_RECIPES", raising=False)


def plan(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.execute(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def told(capsys, *arguments):
    code, out, err = plan(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def work(*tasks, samples=4, **settings):
    """Work of tasks on the small model, four samples each unless said otherwise."""
    tools = Tools(MODEL, _Words(52), _Codes(40, 6), ("a", "b", "c"))
    parts = []
    for number, task in enumerate(tasks):
        text = 0 if task.layout == "image" else TEXT_TOKENS
        parts.append(Part(f"part{number}", task, samples, text, 12, 2, coloured("red")))
    given = {"train": TRAIN, "model": MODEL} | settings
    return Work(key="pretrain", parts=tuple(parts), tools=replace(tools, model=given["model"]), **given)
