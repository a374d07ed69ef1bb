"""The benchmarks of a step and of a GPU, at sizes at which their numbers mean nothing."""

import json
import subprocess
import sys

import pytest
import torch

from beitctl.engine.dist import leave

BLOCKED = (
    "pydantic", "typer", "rich", "timm", "datasets", "torchvision", "sentencepiece", "PIL", "pyarrow",
    "safetensors", "tomlkit", "transformers", "torchscale", "scipy", "matplotlib",
)  # fmt: skip
TOY = {"layers": 1, "width": 32, "heads": 2, "ffn": 64, "patch_px": 56}


@pytest.fixture(autouse=True)
def alone():
    yield
    leave()


@pytest.fixture
def toy(monkeypatch):
    from benchmarks import captions, mixed, step

    known = (mixed.CAPTION_TOKENS, mixed.PROSE_TOKENS, "stated")
    monkeypatch.setattr(captions, "known_lengths", lambda: known)
    monkeypatch.setattr(step, "TINY_VOCABULARY", 300)
    monkeypatch.setattr(mixed, "CODES", 50)
    monkeypatch.setitem(mixed.SIZES, "tiny", TOY)


def measured(capsys, *given):
    from benchmarks import step

    found = step.main([*given, "--samples", "1", "--rounds", "1", "--no-memory"])
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == found
    return found


@pytest.mark.parametrize(
    ("model", "against"), [("beit3-tiny", "torchscale"), ("beit-tiny", "transformers"), ("beit-tiny", "timm")]
)
def test_the_official_step_has_the_same_loss_and_gradients(model, against, toy, capsys):
    pytest.importorskip(against)
    found = measured(capsys, "--model", model, "--against", against)
    assert found["loss_difference"] < 1e-6
    assert found["gradient_difference"] < 1e-4
    assert found["ratio"] > 0


def test_there_is_no_ratio_where_gradients_differ(toy, capsys, monkeypatch):
    pytest.importorskip("torchscale")
    from benchmarks import sides

    right = sides.beit3

    def wrong(size, mix, vocabulary, codes):
        match = right(size, mix, vocabulary, codes)
        return sides.Match(
            **{
                **vars(match),
                "initial": lambda name, shape: match.initial(name, shape) * (1 + ("fc2" in name)),
            }
        )

    monkeypatch.setattr(sides, "beit3", wrong)
    found = measured(capsys, "--model", "beit3-tiny")
    assert found["equal"] is False
    assert found["ratio"] is None


def test_half_precision_is_timed_on_both_sides(toy, capsys):
    pytest.importorskip("torchscale")
    found = measured(capsys, "--model", "beit3-tiny", "--dtype", "bf16")
    assert found["official_form"] in ("autocast", "cast")
    assert found["ours"]["tflops"] > 0


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path, monkeypatch):
    from benchmarks import gpu

    def fails(bench, found):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "attention", (60, fails))
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "attention", "gemm"])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["attention"]["error"] == "RuntimeError: no such kernel"
    assert parts["gemm"]["ceiling_tflops"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_training_step_and_a_save_are_measured(tmp_path):
    from benchmarks import gpu

    found = gpu.main(
        ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "step giant", "saving"]
    )["parts"]
    assert found["step giant"]["triples"] == 2
    assert len(found["saving"]["stall_seconds"]) == len(found["saving"]["written_seconds"]) == 2


def test_the_gpu_benchmark_needs_torch_and_numpy_alone(tmp_path):
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); from benchmarks import gpu; "
    given = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "gemm", "official base"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{block}gpu.main({given!r})"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])["parts"]
    assert parts["gemm"]["ceiling_tflops"] > 0
    assert "torchscale" in parts["official base"]["error"]


def test_masked_shares_are_those_of_the_paper():
    from benchmarks import mixed

    config = mixed.model_of("base", vocabulary=300)
    batch = mixed.batch_of(mixed.Mix(1, (100,), (20,)), config)
    assert len(batch.groups["image"].patch_rows) == round(0.4 * 196)
    assert len(batch.groups["text"].text_rows) == round(0.15 * 98)
    assert len(batch.groups["pair"].text_rows) == round(0.5 * 18)
    assert torch.equal(batch.groups["pair"].text_targets < 299, torch.ones(9, dtype=torch.bool))
