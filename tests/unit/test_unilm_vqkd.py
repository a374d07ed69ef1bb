"""Files of image tokenizers of other code: what is recognised, what is refused and why, the way back."""

import hashlib
from dataclasses import replace

import pytest
import torch
from small import pieces

import beitctl
from beitctl.checkpoints.unilm_vqkd import VQKDSizes, is_vqkd, read_vqkd, sizes_of, write_vqkd
from beitctl.errors import DataError, UserError
from beitctl.model.dalle import DalleEncoder
from beitctl_plugins.tokenizers.vqkd import VQKD, Shape
from beitctl_plugins.tokenizers.vqkd_tokenizer import VQKDTokenizer

SHAPE = Shape(layers=2, decoder_layers=1, width=64, heads=2, ffn=24, image_px=16, patch_px=8)
SIZES = VQKDSizes(encoder=SHAPE.encoder(), decoder_layers=1, features=5, codes=7, code_width=3)
AVERAGES = ("quantize.cluster_size", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")


def random(sizes=SIZES):
    """State dict of a tokenizer that has been trained for a while."""
    draw = torch.Generator().manual_seed(1)
    found = {name: torch.randn(p.shape, generator=draw) for name, p in sizes.model().state_dict().items()}
    return found | {"codebook.ready": torch.tensor(1), "feature_mean": torch.zeros(sizes.features)}


def official(sizes=SIZES):
    """The state dict of a small tokenizer, with numbers in the averages that nothing reads."""
    kept = {name: torch.randn(7, 3) if name.endswith("avg") else torch.randn(7) for name in AVERAGES}
    return write_vqkd(sizes, random(sizes), kept)


@pytest.fixture
def file(tmp_path):
    """Saves a state dict as the official code does."""

    def save(state):
        torch.save({"model": state}, tmp_path / "vqkd.pth")
        return tmp_path / "vqkd.pth"

    return save


def said(path):
    """What a file is refused with."""
    with pytest.raises(DataError, match=r"vqkd\.pth: looks like unilm VQ-KD, but ") as caught:
        beitctl.load_tokenizer(path, heads=2)
    return str(caught.value).partition("but ")[2]


def test_a_file_is_recognised_and_gives_a_tokenizer(file):
    tokenizer = beitctl.load_tokenizer(file(official()), heads=2)
    assert isinstance(tokenizer, VQKDTokenizer)
    assert (tokenizer.codes, tokenizer.grid, tokenizer.image_px) == (7, 2, 16)
    assert not tokenizer.model.training
    expected = SIZES.model()
    expected.load_state_dict(random())
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(images), expected.eval().tokens(images / 127.5 - 1))


def test_the_name_of_a_file_does_not_matter(file):
    path = file(official()).rename(file(official()).with_name("tokenizer"))
    assert beitctl.load_tokenizer(path, heads=2).codes == 7


def test_the_fingerprint_is_that_of_the_file(file):
    path = file(official())
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert beitctl.load_tokenizer(path, heads=2).fingerprint == digest


def test_sizes_follow_from_the_shapes():
    assert sizes_of(official(), heads=2) == SIZES
    assert SIZES.encoder == SHAPE.encoder()


def test_heads_have_64_channels_unless_told(file):
    assert sizes_of(official()).encoder.heads == 1
    assert beitctl.load_tokenizer(file(official())).model.encoder.config.heads == 1
    assert VQKD.load(file(official()), 4).model.encoder.config.heads == 4


def test_heads_are_asked_for_where_64_channels_do_not_divide_the_width(file):
    narrow = replace(SIZES, encoder=replace(SIZES.encoder, width=48))
    with pytest.raises(
        UserError, match=r"vqkd\.pth: .* its width 48 is no multiple of 64, .*give heads=\.\.\."
    ):
        beitctl.load_tokenizer(file(official(narrow)))


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused(file, heads):
    with pytest.raises(UserError, match=rf"vqkd\.pth: heads \({heads}\) must divide the width 64"):
        beitctl.load_tokenizer(file(official()), heads=heads)


def test_ours_is_written_back_bit_for_bit():
    state = official()
    sizes, tensors, unread = read_vqkd(state, heads=2)
    written = write_vqkd(sizes, tensors, unread)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
    assert set(unread) == set(AVERAGES)


def test_a_file_says_all_but_the_mean_which_is_zero():
    _, tensors, _ = read_vqkd(official(), heads=2)
    assert not tensors["feature_mean"].any()
    assert tensors.keys() == SIZES.model().state_dict().keys()
    assert all(tensors[name].dtype == value.dtype for name, value in SIZES.model().state_dict().items())


def test_a_tokenizer_of_ours_is_written_with_all_official_names():
    ours = random()
    written = write_vqkd(SIZES, ours)
    assert written.keys() == official().keys()
    assert torch.equal(written["quantize.embedding.embed_avg"], ours["codebook.vectors"])
    assert not written["quantize.cluster_size"].any()
    assert torch.equal(written["quantize.embedding.initted"], torch.ones(1))


def test_a_tokenizer_of_centred_features_cannot_be_written():
    with pytest.raises(ValueError, match=r"features are without the teacher's mean \(centre = true\)"):
        write_vqkd(SIZES, random() | {"feature_mean": torch.ones(SIZES.features)})


@pytest.mark.parametrize("name", ["teacher_model.visual.proj", "scaling_layer.shift", "loss.weight"])
def test_the_teacher_is_left_out(file, name):
    state = official() | {name: torch.zeros(3)}
    assert beitctl.load_tokenizer(file(state), heads=2).codes == 7
    assert name not in read_vqkd(state, heads=2)[2]


@pytest.mark.parametrize(
    "gone",
    [
        "encoder.blocks.1.mlp.fc2.bias",
        "encoder.fc_norm.weight",
        "decoder.blocks.0.attn.q_bias",
        "decoder.pos_embed",
        "decode_task_layer.0.bias",
        "quantize.embedding.initted",
        "quantize.embedding.embed_avg",
    ],
)
def test_a_missing_tensor_is_named(file, gone):
    state = official()
    del state[gone]
    assert said(file(state)) == f"missing {gone}"


@pytest.mark.parametrize("gone", ["encoder.pos_embed", "decode_task_layer.2.weight"])
def test_a_missing_tensor_that_says_a_size_is_named(file, gone):
    state = official()
    del state[gone]
    assert said(file(state)) == f"there is no {gone}, which says a size of the model"


def test_a_missing_block_is_named(file):
    state = {
        name: value for name, value in official().items() if not name.startswith("encoder.blocks.0.attn")
    }
    assert said(file(state)).startswith("missing encoder.blocks.0.attn.qkv.weight; ")


def test_many_problems_are_cut_short(file):
    state = official() | {f"extra.{number}": torch.zeros(1) for number in range(25)}
    assert said(file(state)).endswith("; and 5 more")


def test_what_is_left_over_is_named(file):
    state = official() | {"encoder.mask_token": torch.zeros(1, 1, 64)}
    assert said(file(state)) == "left over encoder.mask_token"


def test_a_wrong_shape_is_named(file):
    state = official() | {"decoder.pos_embed": torch.zeros(1, 10, 64)}
    assert said(file(state)) == "decoder.pos_embed is (1, 10, 64), expected (1, 5, 64)"


def test_patches_that_fill_no_square_are_refused(file):
    state = official() | {"encoder.pos_embed": torch.zeros(1, 7, 64)}
    assert said(file(state)) == "encoder.pos_embed is for 6 patches, which are no square"


def test_a_file_without_a_codebook_is_no_tokenizer(file):
    state = official()
    del state["quantize.embedding.weight"]
    assert not is_vqkd(state)
    with pytest.raises(DataError, match=r"not a VQ-KD tokenizer of microsoft/unilm: it has no encode_task"):
        beitctl.load_tokenizer(file(state))


def test_the_file_of_a_dalle_encoder_is_recognised(file):
    encoder = DalleEncoder(hidden=8, codes=11, blocks=1)
    tokenizer = beitctl.load_tokenizer(file(encoder.state_dict()))
    assert (tokenizer.codes, tokenizer.grid) == (11, 14)


def test_another_file_is_no_tokenizer(file):
    with pytest.raises(
        DataError,
        match=r"not the file of a tokenizer that beitctl knows \(1 tensors: cls_token \.\.\.\); it reads",
    ):
        beitctl.load_tokenizer(file({"cls_token": torch.zeros(1)}))


def test_a_file_that_cannot_be_read_is_refused(file):
    path = file(official())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"vqkd\.pth: "):
        beitctl.load_tokenizer(path)


def test_heads_are_for_files_of_vqkd_alone(tmp_path):
    pieces().save(tmp_path)
    with pytest.raises(UserError, match="heads=2 is a setting of VQ-KD files alone, this is 'sentencepiece'"):
        beitctl.load_tokenizer(tmp_path, heads=2)
    with pytest.raises(UserError, match="heads=2 is for official files; a folder says it itself"):
        VQKD.load(tmp_path, 2)


def test_neither_half_has_a_mask_token():
    assert not [name for name in SIZES.model().state_dict() if "mask_token" in name]
