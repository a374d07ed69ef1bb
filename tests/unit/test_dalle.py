"""The DALL-E encoder: the official names and numbers, the official file, and the tokenizer around it."""

import json
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from beitctl import registry
from beitctl.api import Plugin, TokenizerField
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.native import load_tokenizer
from beitctl.errors import DataError, UserError
from beitctl.model.dalle import DalleDecoder, DalleEncoder, map_pixels, unmap_pixels
from beitctl_plugins.tokenizers.dalle import Dalle, DalleTokenizer

HIDDEN, CODES = 8, 12


def encoder(hidden=HIDDEN, codes=CODES, blocks=2):
    torch.manual_seed(0)
    model = DalleEncoder(hidden, codes, blocks)
    for name, value in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(value, std=0.1)
    return model.requires_grad_(False)


def decoder(codes=CODES):
    torch.manual_seed(1)
    return DalleDecoder(HIDDEN, codes, first=4).requires_grad_(False)


def pictures(height=16, width=24):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=draw)


def plain(state, x, blocks=2):
    """The encoder in words of functions, from the facts of its paper and repository."""

    def conv(x, name):
        kernel = state[f"{name}.w"].shape[-1]
        return F.conv2d(x, state[f"{name}.w"], state[f"{name}.b"], padding=(kernel - 1) // 2)

    x = conv(x, "blocks.input")
    for group in (1, 2, 3, 4):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            inner = x
            for number in (1, 2, 3, 4):
                inner = conv(F.relu(inner), f"{name}.res_path.conv_{number}")
            widens = f"{name}.id_path.w" in state
            x = (conv(x, f"{name}.id_path") if widens else x) + inner / (4 * blocks) ** 2
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv(F.relu(x), "blocks.output.conv")


def official_shapes():
    """Names and shapes of the official file."""
    shapes = {"blocks.input": (256, 3, 7), "blocks.output.conv": (8192, 2048, 1)}
    before = 256
    for group, width in enumerate((256, 512, 1024, 2048), 1):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            if before != width:
                shapes[f"{name}.id_path"] = (width, before, 1)
            shapes[f"{name}.res_path.conv_1"] = (width // 4, before, 3)
            shapes[f"{name}.res_path.conv_2"] = (width // 4, width // 4, 3)
            shapes[f"{name}.res_path.conv_3"] = (width // 4, width // 4, 3)
            shapes[f"{name}.res_path.conv_4"] = (width, width // 4, 1)
            before = width
    weights = {f"{name}.w": (*shape, shape[-1]) for name, shape in shapes.items()}
    return weights | {f"{name}.b": shape[:1] for name, shape in shapes.items()}


def test_names_and_shapes_are_the_official_ones():
    with torch.device("meta"):
        state = DalleEncoder().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == official_shapes()
    assert sum(value.numel() for value in state.values()) == 53_786_240  # of the class in openai/DALL-E


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_logits_are_those_of_the_plain_functions(blocks):
    model, x = encoder(blocks=blocks), torch.rand(2, 3, 16, 24)
    logits = model(x)
    assert logits.shape == (2, CODES, 2, 3)
    assert torch.allclose(logits, plain(model.state_dict(), x, blocks), atol=1e-6)


def test_pixels_are_mapped_away_from_black_and_white():
    assert torch.allclose(map_pixels(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.5, 0.9]))


def test_tokens_are_the_most_likely_codes_row_by_row():
    model, x = encoder(), pictures().float() / 255
    logits = plain(model.state_dict(), 0.8 * x + 0.1)
    tokens = model.tokens(x)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.view(3, 2, 3), logits.argmax(1))
    assert len(tokens.unique()) > 1


def test_autocast_does_not_change_the_logits():
    model, x = encoder(), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(x))


@pytest.mark.parametrize("size", [(16, 20), (12, 16)])
def test_sides_that_the_pools_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=rf"pictures of \({size[0]}, {size[1]}\) .* multiples of 8"):
        encoder()(torch.rand(1, 3, *size))


@pytest.mark.parametrize("sizes", [(8, 12, 2), (16, 5, 1), (4, 9, 3)])
def test_the_size_is_read_off_the_tensors(sizes):
    state = encoder(*sizes).state_dict()
    found = DalleEncoder.from_shapes(state)
    found.load_state_dict(state)
    assert found.codes == sizes[1]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({}, "found nothing"),
        ({"cls_token": torch.ones(1, 1, 4)}, r"found cls_token \(1, 1, 4\)"),
        ({"blocks.input.w": torch.ones(8, 12, 1, 1)}, r"found blocks.input.w \(8, 12, 1, 1\)"),
    ],
)
def test_tensors_of_another_model_are_refused(state, found):
    with pytest.raises(DataError, match=rf"not the weights of a DALL-E encoder: expected .*; {found}$"):
        DalleEncoder.from_shapes(state)


def fake_package():
    """Modules like openai/DALL-E's, whose classes hold what the official ones hold."""
    names = {
        "dall_e": (),
        "dall_e.encoder": ("Encoder", "EncoderBlock"),
        "dall_e.decoder": ("Decoder", "DecoderBlock"),
        "dall_e.utils": ("Conv2d",),
    }
    modules = {}
    for name, classes in names.items():
        modules[name] = ModuleType(name)
        for title in classes:
            setattr(modules[name], title, type(title, (nn.Module,), {"__module__": name}))
    return modules


def as_official(model, modules):
    """The same tree of modules and tensors, made of the classes of the package."""
    kinds = {
        "Conv": modules["dall_e.utils"].Conv2d,
        "Block": modules["dall_e.encoder"].EncoderBlock,
        "DalleEncoder": modules["dall_e.encoder"].Encoder,
        "DalleDecoder": modules["dall_e.decoder"].Decoder,
    }
    if type(model).__name__ not in kinds:
        children = OrderedDict((name, as_official(child, modules)) for name, child in model.named_children())
        return nn.Sequential(children) if children else model
    made = kinds[type(model).__name__]()
    made.device, made.use_float16, made.n_layers = torch.device("cpu"), True, 8
    for name, value in model.named_parameters(recurse=False):
        made.register_parameter(name, value)
    for name, child in model.named_children():
        setattr(made, name, as_official(child, modules))
    return made


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["zip", "stream"])
def test_the_official_file_is_read_without_its_package(tmp_path, monkeypatch, form, protocol):
    model, modules, path = encoder(), fake_package(), tmp_path / "encoder.pkl"
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        official = as_official(model, modules)
        torch.save(official, path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    assert not any(name.startswith("dall_e") for name in sys.modules)
    found = read_tensors(path)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert torch.equal(Dalle.load(path).encode(pictures()), DalleTokenizer(model).encode(pictures()))


def test_the_official_decoder_beside_it_draws_the_codes(tmp_path, monkeypatch):
    modules, whole = fake_package(), DalleTokenizer(encoder(), decoder=decoder())
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for model, name in ((encoder(), "encoder.pkl"), (decoder(), "decoder.pkl")):
            torch.save(as_official(model, modules), tmp_path / name)
    found, codes = Dalle.load(tmp_path / "encoder.pkl"), torch.arange(8).view(2, 4)
    assert found.reconstruct(codes).shape == (2, 3, 16, 16)
    assert torch.equal(found.reconstruct(codes), whole.reconstruct(codes))


def test_the_decoder_has_the_official_size():
    with torch.device("meta"):
        state = DalleDecoder().state_dict()
    assert state["blocks.input.w"].shape == (128, 8192, 1, 1)
    assert state["blocks.group_1.block_1.id_path.w"].shape == (2048, 128, 1, 1)
    assert state["blocks.group_4.block_2.res_path.conv_4.w"].shape == (256, 64, 3, 3)
    assert state["blocks.output.conv.w"].shape == (6, 256, 1, 1)
    assert sum(value.numel() for value in state.values()) == 43_829_766  # of the class in openai/DALL-E


def test_pixels_come_back_from_their_map():
    x = torch.rand(2, 3)
    assert torch.allclose(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.05, 0.95])).tolist() == [0.0, 1.0]


def test_without_a_decoder_codes_cannot_be_drawn():
    with pytest.raises(UserError, match=r"no decoder to draw codes with: put OpenAI's decoder\.pkl beside"):
        DalleTokenizer(encoder()).reconstruct(torch.zeros(1, 4, dtype=torch.int64))


def test_a_decoder_of_other_codes_is_refused():
    found = DalleTokenizer(encoder(), decoder=decoder(codes=9))
    with pytest.raises(UserError, match=r"the decoder has 9 codes, the encoder 12: take both files of one"):
        found.reconstruct(torch.zeros(1, 4, dtype=torch.int64))


def test_the_encoder_in_the_decoders_place_is_refused_by_its_name(tmp_path):
    for name in ("encoder.pth", "decoder.pth"):
        torch.save(encoder().state_dict(), tmp_path / name)
    with pytest.raises(
        DataError, match=r"decoder.pth: not the weights of a DALL-E decoder: .* \(8, 3, 7, 7\)"
    ):
        Dalle.load(tmp_path / "encoder.pth").reconstruct(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("codes", [[[0, 1]], [[0, 1, 2, CODES]], [[0, 1, 2, -1]], [0, 1, 2, 3]])
def test_codes_that_no_picture_has_are_refused(codes):
    with pytest.raises(ValueError, match=r"must be \(pictures, side \* side\) with values in 0..11"):
        DalleTokenizer(encoder(), decoder=decoder()).reconstruct(torch.tensor(codes))


def test_the_decoder_is_kept_in_the_folder(tmp_path):
    before = DalleTokenizer(encoder(), decoder=decoder())
    before.save(tmp_path)
    codes = torch.arange(8).view(2, 4)
    assert torch.equal(load_tokenizer(tmp_path).reconstruct(codes), before.reconstruct(codes))


def test_buffers_of_a_pickled_module_are_read_unless_they_are_not_saved(tmp_path):
    module = nn.Sequential(nn.ReLU())
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module.register_parameter("bias", None)
    torch.save(module, tmp_path / "m.pkl")
    assert list(read_tensors(tmp_path / "m.pkl")) == list(module.state_dict()) == ["kept"]


def test_a_pickled_module_that_holds_itself_is_refused(tmp_path):
    module = nn.Sequential(nn.ReLU())
    module.register_buffer("kept", torch.ones(2))
    module._modules["again"] = module
    torch.save(module, tmp_path / "m.pkl")
    with pytest.raises(DataError, match=r"more than tensors with names: again\.again.* \(module\)"):
        read_tensors(tmp_path / "m.pkl")


def test_the_tokenizer_says_what_it_reads():
    found = DalleTokenizer(encoder())
    assert (found.codes, found.grid, found.image_px) == (CODES, 14, 112)
    assert not found.model.training


def test_codes_of_pictures_are_the_tokens_of_their_values():
    found = DalleTokenizer(encoder())
    assert torch.equal(found.encode(pictures()), found.model.tokens(pictures() / 255))


def test_closeness_is_the_log_probability_of_the_code():
    found = DalleTokenizer(encoder())
    codes, near = found.closest(pictures())
    logs = found.model(map_pixels(pictures() / 255)).log_softmax(1).flatten(2)
    assert torch.equal(codes, found.encode(pictures()))
    assert torch.allclose(near, logs.gather(1, codes[:, None]).squeeze(1))


def test_a_tokenizer_comes_back_from_its_folder(tmp_path):
    before = DalleTokenizer(encoder(), 16)
    before.save(tmp_path)
    found = load_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == "dalle"
    assert (found.grid, found.image_px, found.fingerprint) == (2, 16, before.fingerprint)
    assert torch.equal(found.encode(pictures()), before.encode(pictures()))


def test_a_note_without_a_fingerprint_is_enough(tmp_path):
    save_file(encoder().state_dict(), tmp_path / "tokenizer.safetensors")
    (tmp_path / "tokenizer.json").write_text('{"kind": "dalle", "image_px": 224}')
    assert Dalle.load(tmp_path).grid == 28


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.safetensors"])
def test_a_file_of_the_weights_alone_is_a_tokenizer(tmp_path, name):
    state = encoder().state_dict()
    save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
    found = Dalle.load(tmp_path / name)
    assert (found.image_px, found.fingerprint) == (112, DalleTokenizer(encoder()).fingerprint)


def test_the_picture_size_of_a_file_is_a_setting(tmp_path):
    torch.save(encoder().state_dict(), tmp_path / "encoder.pth")
    assert Dalle(image_px=224).read(tmp_path / "encoder.pth").grid == 28


def test_other_weights_have_another_fingerprint():
    assert DalleTokenizer(encoder()).fingerprint != DalleTokenizer(encoder(blocks=1)).fingerprint


def test_changed_weights_in_a_folder_are_refused(tmp_path):
    DalleTokenizer(encoder()).save(tmp_path)
    save_file({k: v + 1 for k, v in encoder().state_dict().items()}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(DataError, match=r"tokenizer.safetensors was changed: its hash is not the one in"):
        Dalle.load(tmp_path)


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"kind": "dalle"}'])
def test_a_folder_without_a_readable_note_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r": not a readable image tokenizer \("):
        Dalle.load(tmp_path)


@pytest.mark.parametrize("px", [0, 100, -8])
def test_a_picture_size_that_no_grid_of_codes_has_is_refused(tmp_path, px):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "dalle", "image_px": px}))
    with pytest.raises(DataError, match=rf"tokenizer.json: image_px is {px}: Input should be"):
        Dalle.load(tmp_path)


def test_a_file_of_another_model_is_refused_by_its_name(tmp_path):
    torch.save({"cls_token": torch.ones(1)}, tmp_path / "beit.pth")
    with pytest.raises(DataError, match=r"beit.pth: not the weights of a DALL-E encoder"):
        Dalle.load(tmp_path / "beit.pth")


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    state = encoder().state_dict()
    del state["blocks.group_3.block_2.res_path.conv_4.b"]
    torch.save(state | {"more": torch.ones(1)}, tmp_path / "e.pth")
    with pytest.raises(DataError, match=r"missing blocks.group_3.block_2.res_path.conv_4.b; left over more"):
        Dalle.load(tmp_path / "e.pth")


class Table(Plugin):
    """Holds a tokenizer that is to be trained."""

    tokenizer: TokenizerField


def test_the_plugin_is_installed():
    assert registry.get("beitctl.tokenizers", "dalle") is Dalle


def test_it_cannot_be_trained():
    with pytest.raises(
        ValidationError, match=r"the tokenizer 'dalle' has no method train, plan, which is needed here"
    ):
        Table.model_validate({"tokenizer": {"kind": "dalle"}})


def test_tokenizers_that_can_be_trained_still_are():
    assert Table.model_validate({"tokenizer": {"kind": "sentencepiece"}}).tokenizer.pieces == 64_000
