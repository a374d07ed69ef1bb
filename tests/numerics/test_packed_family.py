"""The settings of the family on packed batches equal a plain forward of each sequence alone, in fp64.

Relative positions, LayerScale, VLMo's text embedding, DeiT's second token, captions, the fused route, inner
rows and BEiT v2's bottleneck; pictures are not square, so that height and width cannot be mixed up.
Tolerance 1e-12: both sides are fp64 and differ in the order of sums only.
"""

import math

import pytest
import torch
from test_packed import CASES, TOLERANCE, linear, norm
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.heads import Aggregation
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway, Packed
from beitctl.model.plan import BatchPlan

TEXT_TOKENS = 10
VLMO = {
    "position": "relative-per-block",
    "norm": "pre",
    "key_bias": False,
    "layer_scale": 0.1,
    "text_norm": True,
    "token_types": 2,
    "fusion_layers": 1,
}
MODELS = {
    "relative per block": {"position": "relative-per-block"},
    "relative shared": {"position": "relative-shared"},
    "relative per block, decoupled": {"position": "relative-per-block", "attention": "decoupled"},
    "relative shared, fusion": {"position": "relative-shared", "fusion_layers": 2},
    "layer scale": {"layer_scale": 0.1},
    "text norm": {"text_norm": True},
    "token types": {"token_types": 2},
    "distillation token": {"distill_token": True},
    "VLMo": VLMO,
    "no final norm": {"final_norm": False},
}
DOUBLE = torch.float64


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def filled(module, config, prefix=""):
    """The module in fp64, with initial weights that are moved so that none is trivially zero or one."""
    module.double()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            parameter.copy_(initial(f"{prefix}{name}", parameter.shape, config, 0))
            parameter += 0.3 * drawn(*parameter.shape, seed=number)
    return module


def model_of(**settings):
    config = ModelConfig(
        **{"layers": 3, "width": 12, "heads": 2, "ffn": 20, "image_px": (8, 12), "patch_px": 4}
        | {"vocabulary": 30, "text_tokens": TEXT_TOKENS}
        | settings
    )
    return filled(Multiway(config), config)


def packed_of(model, case="all", causal=False, types=None):
    """A packed batch with random pictures, masks, ids and stochastic depth."""
    images, pairs, texts = CASES[case]
    plan = BatchPlan(model.config.picture_tokens, images, tuple(pairs), tuple(texts), causal)
    generator = torch.Generator().manual_seed(2)
    return Packed(
        layout=model.layout(plan),
        pixels=drawn(plan.pictures, 3, 8, 12, seed=3),
        image_mask=torch.rand(plan.pictures, model.config.patches, generator=generator) < 0.4,
        ids=torch.randint(0, 30, (sum(pairs) + sum(texts),), generator=generator),
        keep=torch.rand(3, 2, plan.sequences, generator=generator, dtype=DOUBLE) + 0.5,
        picture_types=types,
    )


def places(config):
    """Names of the rows of a table of relative positions, in their order."""
    (h, w), longest = config.grid, config.text_tokens
    patches = [(dy, dx) for dy in range(1 - h, h) for dx in range(1 - w, w)]
    pictures = [*patches, "class asks", "class is asked", "class itself"]
    if not config.vocabulary:
        return pictures
    texts = [*range(2 - longest, longest - 1), "first asks", "first is asked", "first itself"]
    return [*pictures, "text asks picture", "picture asks text", *texts]


def place(query, key):
    """Name of the relative position of two tokens, each (modality, its place: None for the first)."""
    (asking, a), (asked, b) = query, key
    if asking != asked:
        return "text asks picture" if asking == "language" else "picture asks text"
    first = "class" if asking == "vision" else "first"
    if a is None or b is None:
        return f"{first} itself" if a == b else f"{first} asks" if a is None else f"{first} is asked"
    return (a[0] - b[0], a[1] - b[1]) if asking == "vision" else b - a


class Plain:
    """One sequence through the model, written from the definition: token by token, head by head."""

    def __init__(self, model, picture, mask, text, kind, keep, causal=False):
        self.model, self.config, self.keep, self.causal = model, model.config, keep, causal
        self.tokens, parts = [], []
        if picture is not None:
            parts.append(self.seen(picture, mask, kind))
        if text is not None:
            parts.append(self.read(text))
        self.pair = len(parts) == 2
        self.states = [torch.cat(parts)]
        for index, block in enumerate(model.blocks):
            self.states.append(self.block(block, self.states[-1], self.keep[index]))

    def seen(self, picture, mask, kind):
        embed, (h, w) = self.model.vision_embed, self.config.grid
        grid = [(y, x) for y in range(h) for x in range(w)]
        cut = [picture[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(-1) for y, x in grid]
        rows = [
            embed.mask_token if hidden else linear(embed.proj, patch)
            for patch, hidden in zip(cut, mask, strict=True)
        ]
        rows = [embed.cls_token, *([embed.distill_token] * self.config.distill_token), *rows]
        self.tokens += [("vision", p) for p in [None] * (len(rows) - len(grid)) + grid]
        found = torch.stack(rows)
        if embed.position is not None:
            found = found + embed.position
        return found if self.model.token_type is None else found + self.model.token_type.weight[kind]

    def read(self, text):
        embed = self.model.text_embed
        found = embed.token.weight[text]
        if embed.position is not None:
            found = found + embed.position.weight[: len(text)]
        if embed.type_row is not None:
            found = norm(embed.norm, found + embed.type_row)
        self.tokens += [("language", number or None) for number in range(len(text))]
        return found if self.model.token_type is None else found + self.model.token_type.weight[0]

    def block(self, block, x, keep, fused=False):
        scales = [
            torch.ones(self.config.width, dtype=DOUBLE) if scale is None else scale
            for scale in (block.attention_scale, block.ffn_scale)
        ]
        x = x + keep[0] * scales[0] * self.attention(block, x)
        out = []
        for row, (modality, _) in zip(x, self.tokens, strict=True):
            expert = block.ffn["fusion" if "fusion" in block.ffn and (self.pair or fused) else modality]
            hidden = F.gelu(linear(expert.fc1, norm(expert.norm, row)))
            out.append(linear(expert.fc2, self.inner(expert, hidden)))
        return x + keep[1] * scales[1] * torch.stack(out)

    def inner(self, part, x):
        return norm(part.inner_norm, x) if self.config.norm == "sub" else x

    def attention(self, block, x):
        branches, d = [self.branch(block.attention, token) for token in self.tokens], self.config.width
        qkv = []
        for row, branch in zip(x, branches, strict=True):
            bias = branch.qkv.bias
            if not self.config.key_bias:
                bias = torch.cat([branch.q_bias, torch.zeros(d, dtype=DOUBLE), branch.v_bias])
            qkv.append(branch.qkv.weight @ norm(branch.norm, row) + bias)
        q, k, v = torch.stack(qkv).split(d, dim=1)
        size, contexts = d // self.config.heads, []
        for head in range(self.config.heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[:, part] @ k[:, part].T / math.sqrt(size) + self.bias(block, head)
            contexts.append(logits.softmax(-1) @ v[:, part])
        merged = torch.cat(contexts, 1)
        return torch.stack(
            [linear(b.out, self.inner(b, row)) for row, b in zip(merged, branches, strict=True)]
        )

    @staticmethod
    def branch(branches, token):
        return branches["shared"] if "shared" in branches else branches[token[0]]

    def bias(self, block, head):
        """What is added to the logits: the relative positions, and minus infinity where nothing is seen."""
        table = next((part.table for part in (block.relative, self.model.relative) if part is not None), None)
        names, count = places(self.config), len(self.tokens)
        found = [[torch.zeros((), dtype=DOUBLE)] * count for _ in range(count)]
        for i, query in enumerate(self.tokens):
            for j, key in enumerate(self.tokens):
                if table is not None:
                    found[i][j] = table[names.index(place(query, key)), head]
                if self.hidden(query, key):
                    found[i][j] = torch.tensor(-math.inf, dtype=DOUBLE)
        return torch.stack([torch.stack(row) for row in found])

    def hidden(self, query, key):
        """Captions: nothing sees a word but itself and the words after it."""
        if not (self.causal and self.pair) or key[0] == "vision":
            return False
        return query[0] == "vision" or (key[1] or 0) > (query[1] or 0)

    def final(self, x):
        if not self.config.final_norm:
            return x
        return torch.stack(
            [norm(self.branch(self.model.norm, t), row) for row, t in zip(x, self.tokens, strict=True)]
        )


def plain(model, packed):
    """Every sequence of a batch alone."""
    plan, found = packed.layout.plan, []
    texts = iter(() if packed.ids is None else packed.ids.split([*plan.pair_lengths, *plan.text_lengths]))
    for s in range(plan.sequences):
        pictured = s < plan.pictures
        types = packed.picture_types
        found.append(
            Plain(
                model,
                packed.pixels[s] if pictured else None,
                packed.image_mask[s] if pictured else None,
                next(texts) if s >= plan.images else None,
                int(types[s]) if pictured and types is not None else 1,
                packed.keep[:, :, s],
                plan.causal_text,
            )
        )
    return found


def rows(model, packed, values):
    """Values (M, d) of all sequences in the order of the packed buffer: pictures, then texts."""
    plan, count = packed.layout.plan, model.config.picture_tokens
    pictures = [value[:count] for value in values[: plan.pictures]]
    texts = [value[count if s < plan.pictures else 0 :] for s, value in enumerate(values)][plan.images :]
    return torch.cat([*pictures, *texts])


def gradients(modules, value, cotangent):
    """Gradients of all parameters, zeros where one takes no part."""
    named = {f"{i}.{name}": p for i, m in enumerate(modules) for name, p in m.named_parameters()}
    found = torch.autograd.grad((value * cotangent).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def assert_equal(found, expected, *modules):
    """Values and the gradients of all parameters are equal."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    cotangent = drawn(*expected.shape, seed=4)
    wanted = gradients(modules, expected, cotangent)
    for name, gradient in gradients(modules, found, cotangent).items():
        assert (gradient - wanted[name]).abs().max() < 100 * TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", MODELS)
def test_packed_equals_each_sequence_alone(settings, case):
    model = model_of(**MODELS[settings])
    packed = packed_of(model, case)
    alone = rows(model, packed, [one.final(one.states[-1]) for one in plain(model, packed)])
    assert_equal(model.encode(packed), alone, model)


@pytest.mark.parametrize("settings", ["relative per block", "distillation token", "no final norm"])
def test_a_model_of_pictures_alone_equals_each_picture_alone(settings):
    model = model_of(**MODELS[settings], vocabulary=0, text_tokens=0)
    packed = packed_of(model, "images only")
    alone = rows(model, packed, [one.final(one.states[-1]) for one in plain(model, packed)])
    assert_equal(model.encode(packed), alone, model)


@pytest.mark.parametrize("settings", ["relative per block", "VLMo", "token types"])
def test_captions_see_their_picture_and_earlier_words_alone(settings):
    model = model_of(**MODELS[settings])
    packed = packed_of(model, "all", causal=True)
    alone = rows(model, packed, [one.final(one.states[-1]) for one in plain(model, packed)])
    assert_equal(model.encode(packed), alone, model)


def test_a_second_picture_has_the_third_token_type():
    model = model_of(**VLMO | {"token_types": 3})
    packed = packed_of(model, "pairs only", types=torch.tensor([2, 1, 2]))
    alone = rows(model, packed, [one.final(one.states[-1]) for one in plain(model, packed)])
    assert_equal(model.encode(packed), alone, model)


@pytest.mark.parametrize("case", CASES)
def test_the_fused_route_takes_the_experts_of_pairs_from_where_they_begin(case):
    model = model_of(**VLMO | {"fusion_layers": 2})
    packed = packed_of(model, case)
    alone = []
    for one in plain(model, packed):
        x = one.states[1]
        for index in (1, 2):
            x = one.block(model.blocks[index], x, one.keep[index], fused=True)
        alone.append(one.final(x))
    assert_equal(model.encoded(packed, [1]).fused(), rows(model, packed, alone), model)


def test_the_fused_route_of_a_shared_table_adds_its_biases():
    model = model_of(position="relative-shared", fusion_layers=1)
    packed = packed_of(model)
    alone = []
    for one in plain(model, packed):
        alone.append(one.final(one.block(model.blocks[2], one.states[2], one.keep[2], fused=True)))
    assert_equal(model.encoded(packed, [2]).fused(), rows(model, packed, alone), model)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_inner_rows_are_those_after_as_many_blocks(depth):
    model = model_of(**VLMO)
    packed = packed_of(model)
    alone = rows(model, packed, [one.states[depth] for one in plain(model, packed)])
    assert_equal(model.encoded(packed, [depth]).inner[depth], alone, model)


def test_inner_rows_have_the_depths_that_were_asked_for():
    model = model_of()
    assert sorted(model.encoded(packed_of(model), [2, 0]).inner) == [0, 2]


def test_the_last_rows_are_those_before_the_final_norm():
    model = model_of(**VLMO)
    packed = packed_of(model)
    alone = rows(model, packed, [one.states[-1] for one in plain(model, packed)])
    assert_equal(model.encoded(packed).last, alone, model)


@pytest.mark.parametrize("case", ["images only", "all", "texts only"])
@pytest.mark.parametrize("settings", ["relative shared", "relative per block", "VLMo"])
def test_the_bottleneck_is_extra_blocks_on_early_patches_and_the_last_class_token(settings, case):
    model = model_of(**MODELS[settings])
    head = filled(Aggregation(model.config, 1, 2), model.config, "heads.aggregation.")
    packed = packed_of(model, case)
    alone = []
    for one in plain(model, packed):
        x = one.states[1]
        if one.tokens[0][0] == "vision":
            x = torch.cat([one.states[3][:1], x[1:]])
        for number in (1, 2):
            x = one.block(head.blocks[str(number)], x, one.keep[number])
        alone.append(one.final(x))
    assert_equal(head(model.encoded(packed, [1])), rows(model, packed, alone), model, head)


def test_extra_blocks_behind_the_last_one_have_its_stochastic_depth():
    model = model_of(position="relative-shared")
    head = filled(Aggregation(model.config, 3, 1), model.config, "heads.aggregation.")
    packed = packed_of(model, "images only")
    alone = [
        one.final(one.block(head.blocks["3"], one.states[3], one.keep[2])) for one in plain(model, packed)
    ]
    assert_equal(head(model.encoded(packed, [3])), rows(model, packed, alone), model, head)


@pytest.mark.parametrize("case", ["images only", "texts only", "pairs only"])
@pytest.mark.parametrize("settings", MODELS)
def test_every_parameter_has_a_gradient_though_a_modality_is_empty(settings, case):
    model = model_of(**MODELS[settings])
    model.encode(packed_of(model, case)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("settings", MODELS)
def test_every_parameter_has_a_gradient_though_the_batch_is_empty(settings):
    model = model_of(**MODELS[settings])
    plan = BatchPlan(model.config.picture_tokens, 0)
    packed = Packed(
        model.layout(plan),
        torch.zeros(0, 3, 8, 12, dtype=DOUBLE),
        torch.zeros(0, 6, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64),
    )
    model.encode(packed).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_forward_gives_the_text_of_a_pair_first_where_the_settings_say_so():
    model = model_of(**VLMO | {"text_first": True})
    packed = packed_of(model, "pairs only")
    image, text = drawn(2, 3, 8, 12, seed=5), torch.randint(0, 30, (2, 4))
    pad = torch.tensor([[False] * 4, [False] * 3 + [True]])
    both, alone = model(image, text, text_pad=pad), model(image[1:], text[1:, :3])
    assert torch.equal(packed.layout.text_positions[:3], torch.arange(3))
    assert both.shape == (2, 4 + 7, 12)
    assert not both[1, 3].any()
    assert (torch.cat([both[1, :3], both[1, 4:]]) - alone[0]).abs().max() < TOLERANCE


def test_pictures_of_turned_sides_are_refused():
    with pytest.raises(ValueError, match=r"pictures are 3 x 12 x 8, this model reads 3 x 8 x 12"):
        model_of()(drawn(1, 3, 12, 8, seed=0))
