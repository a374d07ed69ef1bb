"""The frozen image tokenizer that VQ-KD makes, trained here or by BEiT v2's official code."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.native import fit
from beitctl.checkpoints.unilm_vqkd import NAME, is_vqkd, read_vqkd
from beitctl.engine.learner import HALF, normalise
from beitctl.errors import DataError, UserError
from beitctl.model.vqkd import VQKDModel


class VQKDTokenizer:
    """A trained, frozen image tokenizer."""

    def __init__(self, model: VQKDModel, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.encoder.config
        self.codes, self.grid, self.image_px = model.codebook.codes, config.grid[0], config.side_px
        self.fingerprint = fingerprint

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, grid * grid) int64."""
        device = self.model.codebook.vectors.device
        return self.model.tokens(normalise(images.to(device), HALF))

    @torch.no_grad()
    def closest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, N) of (B, 3, H, W) uint8, and the cosine (B, N) of each patch to its code."""
        book = self.model.codebook
        z = self.model.vectors(normalise(images.to(book.vectors.device), HALF))
        codes = book.assign(z.flatten(0, 1)).view(z.shape[:2])
        return codes, (z * book.vectors[codes]).sum(-1)

    @torch.no_grad()
    def similarity(self, images: Tensor, target: Tensor) -> Tensor:
        """Cosine (B, N) between reconstructed and true teacher features."""
        features, _, _ = self.model(normalise(images, HALF))
        return F.cosine_similarity(features, target - self.model.feature_mean, dim=-1)


def official(file: Path, heads: int | None = None) -> VQKDTokenizer:
    """Read the tokenizer of a file of BEiT v2's official code.

    Args:
        file: such as ``vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth``.
        heads: attention heads, which the file does not say; by default 64 channels each.

    Raises:
        DataError: it cannot be read, or is not of this kind.
        UserError: ``heads`` is needed, or does not fit.
    """
    state = read_tensors(file)
    if not is_vqkd(state):
        raise DataError(
            f"{file}: not a VQ-KD tokenizer of microsoft/unilm: it has no encode_task_layer.0.weight or no "
            "quantize.embedding.weight"
        )
    try:
        sizes, tensors, _ = read_vqkd(state, heads)
    except ValueError as error:
        raise DataError(f"{file}: looks like {NAME}, but {error}") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    model = sizes.model()
    fit(tensors, model, "", file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return VQKDTokenizer(model, digest)
