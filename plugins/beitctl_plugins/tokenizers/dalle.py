"""OpenAI's DALL-E encoder as an image tokenizer: the targets of BEiT-1."""

import hashlib
import json
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from beitctl.api import Plugin
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.native import fit
from beitctl.errors import DataError
from beitctl.model.dalle import DalleEncoder, map_pixels

WEIGHTS = "tokenizer.safetensors"
NOTE = "tokenizer.json"
IMAGE_PX = 112
"""14 x 14 codes: one for each 16 px patch of a picture of 224 px (microsoft/unilm issue 358)."""


class DalleTokenizer:
    """A frozen DALL-E encoder; the code of a patch is its most likely one."""

    def __init__(self, model: DalleEncoder, image_px: int = IMAGE_PX) -> None:
        self.model = model.eval().requires_grad_(False)
        self.codes, self.grid, self.image_px = model.codes, image_px // model.shrink, image_px
        self.fingerprint = _fingerprint(model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, grid * grid) int64."""
        return self.model.tokens(self._pixels(images))

    @torch.no_grad()
    def closest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, N) of (B, 3, H, W) uint8, and the log-probability (B, N) of each."""
        best = self.model(map_pixels(self._pixels(images))).log_softmax(1).max(1)
        return best.indices.flatten(1), best.values.flatten(1)

    def save(self, folder: Path) -> None:
        """Write the weights and the note that says what they are."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        note = {"kind": "dalle", "image_px": self.image_px, "fingerprint": self.fingerprint}
        (folder / NOTE).write_text(json.dumps(note, indent=1))

    def _pixels(self, images: Tensor) -> Tensor:
        return images.to(next(self.model.parameters()).device).float() / 255


class Dalle(Plugin):
    """OpenAI's DALL-E encoder (BEiT-1): 8192 codes, one for each 8 x 8 pixels. It is read, not trained."""

    image_px: int = Field(default=IMAGE_PX, ge=8, multiple_of=8)
    """Side of the picture that is tokenized, in pixels: 112 gives the 14 x 14 codes of a 224 px model."""

    @classmethod
    def load(cls, folder: Path) -> DalleTokenizer:
        """Read the tokenizer of a folder, or a file of the encoder alone such as OpenAI's ``encoder.pkl``.

        Raises:
            DataError: a file is missing, damaged or not of this kind.
        """
        if not folder.is_dir():
            return cls().read(folder)
        try:
            note = json.loads((folder / NOTE).read_text())
            plugin, fingerprint = cls(image_px=note["image_px"]), note.get("fingerprint")
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise DataError(f"{folder / NOTE}: image_px is {note['image_px']!r}: {problem}") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{folder}: not a readable image tokenizer ({error!r})") from error
        found = plugin.read(folder / WEIGHTS)
        if fingerprint not in (None, found.fingerprint):
            raise DataError(f"{folder / WEIGHTS} was changed: its hash is not the one in {NOTE}")
        return found

    def read(self, file: Path) -> DalleTokenizer:
        """Read a file of the encoder's weights, to tokenize pictures of ``image_px``.

        Raises:
            DataError: it cannot be read, or holds another model.
        """
        tensors = read_tensors(file)
        try:
            model = DalleEncoder.from_shapes(tensors)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        fit(tensors, model, "", file)
        return DalleTokenizer(model, self.image_px)


def _fingerprint(model: DalleEncoder) -> str:
    """Hash of names and values, the same for every file format."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()
