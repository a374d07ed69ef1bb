"""What a model is given has to have the right shape and type: nothing is broadcast or cast without a word."""

import pytest
import torch
from small import MODEL
from torch import nn

from beitctl.checkpoints.models import model_with
from beitctl.config import ModelConfig
from beitctl.model.heads import MlpHead, Pooler
from beitctl.model.multiway import Multiway

IMAGE, TEXT = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"image": IMAGE[0]}, r"image is \(3, 16, 16\) torch.float32; it must be \(B, C, H, W\)"),
        ({"image": IMAGE.byte()}, r"image is \(2, 3, 16, 16\) torch.uint8; .* normalised floats"),
        ({"image": IMAGE, "image_mask": torch.ones(2, 1, dtype=torch.bool)}, r"it must be \(2, 16\) bool"),
        ({"image": IMAGE, "image_mask": torch.ones(1, 16, dtype=torch.bool)}, r"it must be \(2, 16\) bool"),
        ({"image": IMAGE, "image_mask": torch.ones(2, 16)}, r"torch.float32; it must be \(2, 16\) bool"),
        ({"text": TEXT[0]}, r"text is \(4,\) torch.int64; it must be \(B, S\) int64"),
        ({"text": TEXT.float()}, r"torch.float32; it must be \(B, S\) int64"),
        (
            {"text": TEXT, "text_pad": torch.zeros(2, 4, dtype=torch.int64)},
            r"text_pad is .* it must be \(2, 4\) bool",
        ),
        ({"text": TEXT, "text_pad": torch.zeros(2, 3, dtype=torch.bool)}, r"text_pad is \(2, 3\)"),
    ],
)
def test_an_input_of_another_shape_or_type_is_refused(inputs, said):
    with pytest.raises(ValueError, match=said):
        Multiway(MODEL)(**inputs)


@pytest.mark.parametrize(
    "heads",
    [
        {"answers": MlpHead(8, 16, 5), "pooler": Pooler(8, norm=False)},
        {"captions": nn.Linear(8, 52)},
        {"matching": nn.Linear(8, 2), "pooler": Pooler(8, norm=False)},
    ],
    ids=["answers", "captions", "matching"],
)
def test_a_model_of_pairs_asks_for_both(heads):
    shapes = {name: value.shape for name, value in nn.ModuleDict(heads).state_dict().items()}
    with pytest.raises(ValueError, match="this model reads pairs: give image and text"):
        model_with(MODEL, shapes)(IMAGE, None)


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_an_epsilon_that_is_not_positive_is_refused(eps):
    with pytest.raises(ValueError, match=r"norm_eps .* must be above 0"):
        ModelConfig(layers=1, width=8, heads=2, ffn=8, norm_eps=eps)
