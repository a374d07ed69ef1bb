"""The packed model equals a plain forward of each sequence alone, in fp64: outputs and gradients.

Tolerance 1e-12: both sides are fp64 and differ in the order of sums only.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway, Packed
from beitctl.model.plan import plan_of

TOLERANCE = 1e-12
CASES = {
    "all": (2, [3, 7], [5, 1]),
    "images only": (3, [], []),
    "pairs only": (0, [4, 9, 2], []),
    "texts only": (0, [], [6, 2]),
    "no pairs": (2, [], [4]),
    "no images": (0, [5], [3]),
}
MODELS = {
    "shared, fusion": {"attention": "shared", "fusion_layers": 1},
    "shared": {"attention": "shared", "fusion_layers": 0},
    "decoupled": {"attention": "decoupled", "fusion_layers": 0},
    "decoupled, fusion": {"attention": "decoupled", "fusion_layers": 2},
    "pre-norm": {"attention": "shared", "norm": "pre", "key_bias": False},
}


def model_of(settings):
    config = ModelConfig(
        layers=3,
        width=24,
        heads=3,
        ffn=40,
        image_px=12,
        patch_px=4,
        vocabulary=30,
        text_tokens=12,
        **settings,
    )
    model = Multiway(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape, config, 0))
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(model, case):
    images, pairs, texts = case
    plan = plan_of(model.config.patches + 1, images, pairs, texts)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(plan.pictures, 3, 12, 12, generator=generator, dtype=torch.float64)
    mask = torch.rand(plan.pictures, model.config.patches, generator=generator) < 0.4
    ids = torch.randint(0, 30, (sum(pairs) + sum(texts),), generator=generator)
    keep = torch.rand(3, 2, plan.sequences, generator=generator, dtype=torch.float64) + 0.5
    return plan, pixels, mask, ids, keep


def linear(module, x):
    return x @ module.weight.T + module.bias


def norm(module, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias
    )


def one_sequence(model, picture, mask, text, keep):
    """A plain forward of one sequence, written from the definition: split, loop over heads, softmax."""
    config, parts, kinds = model.config, [], []
    if picture is not None:
        rows = [
            picture[:, y : y + 4, x : x + 4].reshape(-1) for y in range(0, 12, 4) for x in range(0, 12, 4)
        ]
        patches = linear(model.vision_embed.proj, torch.stack(rows))
        patches = torch.where(mask[:, None], model.vision_embed.mask_token, patches)
        parts.append(torch.cat([model.vision_embed.cls_token[None], patches]) + model.vision_embed.position)
        kinds += ["vision"] * len(parts[-1])
    if text is not None:
        embed = model.text_embed
        parts.append(embed.token.weight[text] + embed.position.weight[: len(text)])
        kinds += ["language"] * len(text)
    x, pair = torch.cat(parts), len(parts) == 2
    for index, block in enumerate(model.blocks):
        x = x + keep[index, 0] * attention(block.attention, x, kinds, config)
        out = []
        for row, kind in zip(x, kinds, strict=True):
            expert = block.ffn["fusion" if pair and "fusion" in block.ffn else kind]
            hidden = F.gelu(linear(expert.fc1, norm(expert.norm, row)))
            out.append(
                linear(expert.fc2, norm(expert.inner_norm, hidden) if config.norm == "sub" else hidden)
            )
        x = x + keep[index, 1] * torch.stack(out)
    return torch.stack([norm(_branch(model.norm, kind), row) for row, kind in zip(x, kinds, strict=True)])


def _branch(branches, kind):
    return branches["shared"] if "shared" in branches else branches[kind]


def attention(branches, x, kinds, config):
    qkv = []
    for row, kind in zip(x, kinds, strict=True):
        branch = _branch(branches, kind)
        bias = branch.qkv.bias
        if not config.key_bias:
            bias = torch.cat([branch.q_bias, torch.zeros(config.width).double(), branch.v_bias])
        qkv.append(branch.qkv.weight @ norm(branch.norm, row) + bias)
    q, k, v = torch.stack(qkv).split(config.width, dim=1)
    size, contexts = config.width // config.heads, []
    for head in range(config.heads):
        part = slice(head * size, (head + 1) * size)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1)
        contexts.append(weights @ v[:, part])
    out = []
    for row, kind in zip(torch.cat(contexts, 1), kinds, strict=True):
        branch = _branch(branches, kind)
        out.append(linear(branch.out, norm(branch.inner_norm, row) if config.norm == "sub" else row))
    return torch.stack(out)


def reference(model, plan, pixels, mask, ids, keep):
    """Rows of the packed buffer, sequence by sequence."""
    rows = {}
    starts = [
        plan.cuts[1],
        *(plan.cuts[1] + x for x in torch.tensor(plan.pair_lengths + plan.text_lengths).cumsum(0).tolist()),
    ]
    for s in range(plan.sequences):
        picture = s if s < plan.pictures else None
        text = s - plan.images if s >= plan.images else None
        words = None
        if text is not None:
            first = starts[text] - plan.cuts[1]
            words = ids[first : first + (plan.pair_lengths + plan.text_lengths)[text]]
        seen = one_sequence(
            model,
            None if picture is None else pixels[picture],
            None if picture is None else mask[picture],
            words,
            keep[:, :, s],
        )
        if picture is not None:
            for t in range(plan.picture_tokens):
                rows[picture * plan.picture_tokens + t] = seen[t]
            seen = seen[plan.picture_tokens :]
        if words is not None:
            for t in range(len(words)):
                rows[starts[text] + t] = seen[t]
    return torch.stack([rows[r] for r in range(plan.tokens)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", MODELS)
def test_packed_equals_each_sequence_alone(settings, case):
    model = model_of(MODELS[settings])
    plan, pixels, mask, ids, keep = inputs(model, CASES[case])
    cotangent = torch.randn(plan.tokens, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    expected = reference(model, plan, pixels, mask, ids, keep)
    (expected * cotangent).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = model.encode(Packed(model.layout(plan), pixels, mask, ids, keep))
    (found * cotangent).sum().backward()

    assert (found - expected).abs().max() < TOLERANCE
    for name, parameter in model.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert (parameter.grad - wanted[name]).abs().max() < 100 * TOLERANCE, name


@pytest.mark.parametrize("settings", ["shared, fusion", "decoupled"])
def test_every_parameter_has_a_gradient_though_a_modality_is_empty(settings):
    model = model_of(MODELS[settings])
    plan, pixels, mask, ids, keep = inputs(model, CASES["images only"])
    model.encode(Packed(model.layout(plan), pixels, mask, ids, keep)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_forward_of_padded_pairs_equals_pairs_alone():
    model = model_of(MODELS["shared, fusion"])
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    text = torch.randint(0, 30, (2, 6))
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    both = model(image, text, text_pad=pad)
    alone = model(image[1:], text[1:, :4])
    assert both.shape == (2, 16, 24)
    assert (both[1, :14] - alone[0]).abs().max() < TOLERANCE
    assert not both[1, 14:].any()


def test_image_only_forward_ignores_the_language_branch():
    model = model_of(MODELS["decoupled"])
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    before = model(image)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language" in name or "text_embed" in name:
                parameter.normal_()
    assert torch.equal(before, model(image))


def test_a_text_of_padding_only_is_refused():
    model = model_of(MODELS["shared"])
    with pytest.raises(ValueError, match="text 0 of the batch has no token"):
        model(text=torch.zeros(1, 3, dtype=torch.int64), text_pad=torch.ones(1, 3, dtype=torch.bool))


def test_text_for_a_model_without_language_is_refused():
    model = Multiway(ModelConfig(layers=1, width=8, heads=1, ffn=8, image_px=8, patch_px=4))
    with pytest.raises(ValueError, match="no language branch"):
        model(text=torch.zeros(1, 3, dtype=torch.int64))


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="give image, text or both"):
        model_of(MODELS["shared"])()


def test_the_output_of_all_blocks_is_what_the_final_norm_reads():
    model = model_of(MODELS["shared"])
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    last = model.patches(image, depth=3)
    assert (norm(model.norm["shared"], last) - model.patches(image)).abs().max() < TOLERANCE
    assert (last - model.patches(image, depth=2)).abs().max() > 1e-3
