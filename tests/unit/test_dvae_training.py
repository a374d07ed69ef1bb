"""The plugin dvae: it trains, resumes, survives bad pictures; its tokenizer comes back from disk."""

import json
import math
import signal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small import Given, Record, coloured, training

from beitctl import registry
from beitctl.api import Example, Job
from beitctl.checkpoints.native import load_tokenizer
from beitctl.config import OptimConfig, TrainConfig
from beitctl.data.loader import Place
from beitctl.engine.dist import start
from beitctl.errors import DataError, DivergedError, Stopped
from beitctl.model.dvae import DiscreteVAE, initial_dvae
from beitctl_plugins.tokenizers.dvae import DVAE, DVAETokenizer, Shape
from beitctl_plugins.tokenizers.dvae_learner import Schedule, ShotSteps

COLOURS = coloured("red", "blue", "green", "grey")
SHAPE = {"layers": 2, "width": 8, "blocks": 1, "image_px": 8}


def plugin(steps=4, micro_samples=0, lr=0.01, save=1000, **settings):
    loop = training(
        steps,
        micro_samples=micro_samples,
        optim=OptimConfig(peak_lr=lr),
        save_every_steps=save,
        precision="fp32",
    )
    given = {"shape": SHAPE, "codes": 6, "code_width": 5, "samples": 4, "min_used_share": 0.0} | settings
    return DVAE.model_validate({"train": loop, **given})


def run(folder, made=None, sources=(COLOURS,), resume=True):
    log = Record()
    return (made or plugin()).train(sources, Job(folder, log, resume=resume)), log.said


def tokenizer(seed=0, layers=2, image_px=8):
    model = DiscreteVAE(layers, 8, 1, 6, 5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(initial_dvae(name, value.shape, seed))
    return DVAETokenizer(model, image_px)


def pictures(count=3, px=8):
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, generator=draw)


def losses(said):
    return [metrics["loss"] for _, _, metrics in said["step"]]


def test_training_gives_numbers_figures_and_a_tokenizer(tmp_path):
    found, said = run(tmp_path)
    assert sorted(found) == [
        "codebook_perplexity", "codebook_size", "codebook_used", "reconstruction_psnr",
    ]  # fmt: skip
    assert found["codebook_size"] == 6
    assert 1 <= found["codebook_perplexity"] <= found["codebook_used"] <= 6
    assert [name for name, *_ in said["figure"]] == ["codebook", "reconstructions"]
    assert all(png.startswith(b"\x89PNG") for _, png, *_ in said["figure"])
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, DVAETokenizer)
    assert (loaded.codes, loaded.grid, loaded.image_px) == (6, 2, 8)


def test_every_record_tells_losses_use_and_temperature(tmp_path):
    steps = run(tmp_path)[1]["step"]
    assert [number for number, *_ in steps] == [1, 2, 3, 4]
    expected = {
        "pixels/loss", "pixels/mse", "kl/loss", "kl/nats", "balance/loss", "temperature", "codebook_used",
        "codebook_perplexity",
    }  # fmt: skip
    assert expected <= set(steps[0][2])
    assert steps[0][2]["temperature"] == 1.0
    assert steps[0][2]["pixels/mse"] == pytest.approx(steps[0][2]["pixels/loss"])


def test_pictures_are_learned(tmp_path):
    found, said = run(tmp_path, plugin(40, lr=0.03, kl_weight=0.0, temperature_end=0.3))
    first, last = (said["step"][place][2]["pixels/loss"] for place in (0, -1))
    assert last < 0.25 * first
    assert found["codebook_used"] > 2
    assert found["reconstruction_psnr"] > 10


def test_the_psnr_is_that_of_the_central_views(tmp_path):
    found, _ = run(tmp_path)
    loaded = load_tokenizer(tmp_path)
    colours = torch.tensor([(255, 0, 0), (0, 0, 255), (0, 255, 0), (90, 90, 90)], dtype=torch.uint8)
    views = colours[:, :, None, None].expand(4, 3, 8, 8)
    error = loaded.reconstruct(loaded.encode(views)).float() - views.float()
    assert found["reconstruction_psnr"] == pytest.approx(
        float(10 * torch.log10(255**2 / error.square().mean()))
    )


class Impatient(Record):
    """Asks the run to stop after its third step."""

    def step(self, number, of, metrics):
        if number == 3:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path):
    made = plugin(6, save=2, usage_weight=0.1)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    _, whole = run(tmp_path / "whole", made)
    with pytest.raises(Stopped):
        made.train([COLOURS], Job(tmp_path / "parts", Impatient()))
    _, rest = run(tmp_path / "parts", made)
    assert [number for number, *_ in rest["step"]] == [4, 5, 6]
    assert losses(rest) == losses(whole)[3:]
    assert load_tokenizer(tmp_path / "parts").fingerprint == load_tokenizer(tmp_path / "whole").fingerprint


def test_passes_do_not_change_the_result(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    settings = {"usage_weight": 0.1, "codes": 6}
    _, one = run(tmp_path / "one", plugin(**settings))
    _, two = run(tmp_path / "two", plugin(micro_samples=3, **settings))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert [m["codebook_used"] for *_, m in one["step"]] == [m["codebook_used"] for *_, m in two["step"]]


def test_a_picture_has_its_noise_wherever_it_is_loaded():
    streams = plugin()._streams([COLOURS])
    schedule = Schedule(1.0, 0.1, 4, 0, 2)
    (whole,) = ShotSteps(streams, schedule, 0, Place())[3]
    shared = [ShotSteps(streams, schedule, 0, Place(rank, 3))[3][0] for rank in range(3)]
    passes = ShotSteps(streams, schedule, 0, Place(micro_samples=1))[3]
    for parts in (shared, passes):
        assert torch.equal(torch.cat([part.keys for part in parts]), whole.keys)
    assert len({tuple(key) for key in whole.keys.tolist()}) == 4
    (other,) = ShotSteps(streams, schedule, 0, Place())[2]
    assert not (other.keys == whole.keys).any()


def test_a_rank_without_pictures_takes_part():
    (batch,) = ShotSteps(plugin(samples=1)._streams([COLOURS]), Schedule(1, 1, 1, 0, 1), 0, Place(0, 4))[0]
    assert (batch.pixels.shape, batch.keys.shape) == ((0, 3, 8, 8), (0, 2))


def test_unreadable_pictures_are_replaced_and_named(tmp_path):
    broken = Given(examples=(*COLOURS.examples, Example("broken", b"no picture")))
    found, said = run(tmp_path, plugin(), sources=(broken,))
    assert any("broken: not a readable picture" in text for _, text, _ in said["warning"])
    assert found["codebook_used"] >= 1


def test_too_many_unreadable_pictures_end_the_run(tmp_path):
    broken = Given(examples=(*COLOURS.examples, *(Example(f"broken-{i}", b"no picture") for i in range(3))))
    with pytest.raises(DataError, match=r"(?s)of 7 examples of 'pictures0' cannot be used .*broken-"):
        run(tmp_path, plugin(8), sources=(broken,))


def test_two_sources_share_the_step():
    streams = plugin(samples=6)._streams([COLOURS, coloured("red", "red")])
    assert [stream.samples for stream in streams] == [4, 2]


def test_a_codebook_that_nothing_uses_ends_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"the codebook collapsed: at step \d+, for 3 windows in a row"):
        run(tmp_path, plugin(8, codes=200, min_used_share=1.0, lr=1e-5))


def test_the_plan_tells_the_size():
    found = plugin().plan()
    assert found["tokenizer"] == "discrete VAE, 6 codes of width 5, 2 x 2"
    assert found["parameters"] == sum(p.numel() for p in DiscreteVAE(2, 8, 1, 6, 5).parameters())
    assert found["pictures seen"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_px": 100}, r"image_px \(100\) must be a multiple of 2 \*\* layers \(8\), such as 96"),
        ({"image_px": 2}, r"image_px \(2\) must be a multiple of 2 \*\* layers \(8\), such as 8"),
        ({"image_px": 0}, r"image_px \(0\) must be a multiple"),
        ({"layers": 0}, r"layers \(0\) must lie in 1..8"),
        ({"width": 0}, r"width \(0\) must be at least 1"),
        ({"blocks": -1}, r"blocks \(-1\) at least 0"),
        ({"depth": 3}, "Unexpected keyword argument"),
    ],
)
def test_a_size_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        plugin(shape=settings)


@pytest.mark.parametrize(
    "settings", [{"codes": 1}, {"codes": 65_537}, {"temperature_end": 0}, {"kl_weight": -1}, {"samples": 0}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        plugin(**settings)


def test_the_default_is_beits():
    shape = Shape()
    assert (shape.layers, shape.width, shape.blocks, shape.image_px // shape.patch_px) == (3, 256, 1, 14)


def test_codes_of_pictures_are_the_models_tokens():
    found, x = tokenizer(), pictures()
    assert found.encode(x).dtype == torch.int64
    assert torch.equal(found.encode(x), found.model.tokens(x / 127.5 - 1))


def test_closeness_is_the_log_probability_of_the_code():
    found, x = tokenizer(), pictures()
    codes, near = found.closest(x)
    logs = found.model.logits(x / 127.5 - 1).log_softmax(-1)
    assert torch.equal(codes, found.encode(x))
    assert torch.allclose(near, logs.gather(-1, codes[..., None]).squeeze(-1))


def test_reconstructions_are_the_decoders_pictures():
    found = tokenizer()
    codes = torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5]])
    made = found.model.pictures(found.model.codebook.weight[codes], (2, 2))
    assert found.reconstruct(codes).shape == (2, 3, 8, 8)
    assert torch.equal(found.reconstruct(codes), ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("codes", [[[0, 1, 2]], [[0, 1, 2, 6]], [[0, 1, 2, -1]], [0, 1, 2, 3]])
def test_codes_that_no_picture_has_are_refused(codes):
    with pytest.raises(ValueError, match=r"must be \(pictures, side \* side\) with values in 0..5"):
        tokenizer().reconstruct(torch.tensor(codes))


def test_a_tokenizer_comes_back_from_its_folder(tmp_path):
    before = tokenizer()
    before.save(tmp_path)
    found = load_tokenizer(tmp_path)
    assert (found.fingerprint, found.grid) == (before.fingerprint, 2)
    assert torch.equal(found.encode(pictures()), before.encode(pictures()))


def test_other_weights_or_another_size_have_another_fingerprint():
    marks = {tokenizer().fingerprint, tokenizer(seed=1).fingerprint, tokenizer(image_px=16).fingerprint}
    assert len(marks) == 3


def test_changed_weights_are_refused(tmp_path):
    tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(DataError, match="weights or note were changed after training"):
        DVAE.load(tmp_path)


def changed(folder, **values):
    tokenizer().save(folder)
    note = json.loads((folder / "tokenizer.json").read_text()) | values
    (folder / "tokenizer.json").write_text(json.dumps(note))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_px": 16}, "weights or note were changed after training"),
        ({"image_px": 10}, "image_px is 10, expected a multiple of 4"),
        ({"image_px": "8"}, "image_px is '8', expected a multiple of 4"),
        ({"image_px": True}, "image_px is True, expected"),
        ({"image_px": -8}, "image_px is -8, expected"),
        ({"fingerprint": None}, "weights or note were changed after training"),
        ({"kind": "vqkd"}, "kind is 'vqkd', expected 'dvae'"),
    ],
)
def test_a_wrong_note_is_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=message):
        DVAE.load(changed(tmp_path, **values))


@pytest.mark.parametrize("text", ["no json", "[]", "{}", "7", '{"kind": "dvae"}'])
def test_a_folder_without_a_readable_note_is_refused(tmp_path, text):
    tokenizer().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r": not a readable image tokenizer \("):
        DVAE.load(tmp_path)


def test_the_file_of_another_model_is_refused_by_its_name(tmp_path):
    tokenizer().save(tmp_path)
    save_file({"cls_token": torch.ones(1)}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(DataError, match=r"tokenizer.safetensors: not the weights of a discrete VAE"):
        DVAE.load(tmp_path)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    tokenizer().save(tmp_path)
    state = load_file(tmp_path / "tokenizer.safetensors")
    del state["decoder.1.net.4.bias"]
    save_file(state, tmp_path / "tokenizer.safetensors")
    with pytest.raises(DataError, match=r"does not fit the model: missing decoder.1.net.4.bias"):
        DVAE.load(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"tokenizer\.safetensors"):
        DVAE.load(tmp_path)


def test_the_plugin_is_installed():
    assert registry.get("beitctl.tokenizers", "dvae") is DVAE


def as_ranks(folder):
    """Losses, use and measures of a training on this rank, and the bytes that it wrote."""
    ranks = start()
    found, said = run(folder, plugin(usage_weight=0.1, samples=5))
    ranks.stop()
    tensors = load_file(folder / "tokenizer" / "tokenizer.safetensors")
    whole = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    use = [metrics["codebook_used"] for *_, metrics in said["step"]]
    return [losses(said), use, found, whole.tolist()]


def on(folder):
    folder.mkdir()
    return folder


def test_two_ranks_give_the_result_of_one(on_ranks, tmp_path):
    first, second = on_ranks(as_text, 2, on(tmp_path / "two"))
    alone_losses, alone_use, alone, weights = as_ranks(on(tmp_path / "one"))
    assert first == second
    assert first[0] == pytest.approx(alone_losses, rel=1e-5)
    assert first[1] == alone_use
    assert first[2] == pytest.approx(alone, rel=1e-4)
    assert first[3] == pytest.approx(weights, abs=1e-5)


def as_text(folder):
    from pathlib import Path

    return as_ranks(Path(folder))


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"workers": 1}])
def test_it_trains_in_other_ways(tmp_path, changes):
    settings = {"steps": 2, "optim": OptimConfig(peak_lr=0.01), "log_every_steps": 1}
    made = plugin(usage_weight=0.1, straight_through=True, loss="smooth-l1")
    made = made.model_copy(update={"train_config": TrainConfig(**settings, **changes)})
    _, said = run(tmp_path, made)
    assert all(math.isfinite(loss) for loss in losses(said))
