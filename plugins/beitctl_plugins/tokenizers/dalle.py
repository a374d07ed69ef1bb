"""OpenAI's DALL-E encoder as an image tokenizer: the targets of BEiT-1."""

import hashlib
import json
import math
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from beitctl.api import Plugin
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.native import fit
from beitctl.errors import DataError, UserError
from beitctl.model.dalle import DalleDecoder, DalleEncoder, map_pixels

WEIGHTS = "tokenizer.safetensors"
NOTE = "tokenizer.json"
DECODER = "decoder"
"""Name, without its ending, of the decoder's file beside that of the encoder."""
IMAGE_PX = 112
"""14 x 14 codes: one for each 16 px patch of a picture of 224 px (microsoft/unilm issue 358)."""


class DalleTokenizer:
    """A frozen DALL-E encoder; the code of a patch is its most likely one."""

    def __init__(
        self, model: DalleEncoder, image_px: int = IMAGE_PX, decoder: DalleDecoder | Path | None = None
    ) -> None:
        """``decoder``: the decoder, or its file, which is read when it is first needed."""
        self.model = model.eval().requires_grad_(False)
        self.codes, self.grid, self.image_px = model.codes, image_px // model.shrink, image_px
        self.fingerprint = fingerprint(model)
        self.decoder = decoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, grid * grid) int64."""
        return self.model.tokens(self._pixels(images))

    @torch.no_grad()
    def closest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, N) of (B, 3, H, W) uint8, and the log-probability (B, N) of each."""
        best = self.model(map_pixels(self._pixels(images))).log_softmax(1).max(1)
        return best.indices.flatten(1), best.values.flatten(1)

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes (B, N) of square pictures to the pictures (B, 3, H, W) uint8 that they stand for.

        Raises:
            UserError: there is no decoder, or it has other codes.
            DataError: its file cannot be read.
            ValueError: N is no square number, or there is no such code.
        """
        check_codes(codes, self.codes)
        device = next(self.model.parameters()).device
        decoder = self._decoder().to(device)
        side = math.isqrt(codes.shape[1])
        made = decoder.pictures(codes.to(device).reshape(-1, side, side))
        return made.mul(255).round().to(torch.uint8)

    def _decoder(self) -> DalleDecoder:
        if self.decoder is None:
            raise UserError(
                "this tokenizer has no decoder to draw codes with: put OpenAI's decoder.pkl beside "
                "encoder.pkl (cdn.openai.com/dall-e/decoder.pkl) and load the encoder again"
            )
        if isinstance(self.decoder, Path):
            self.decoder = read_decoder(self.decoder)
        if self.decoder.codes != self.codes:
            raise UserError(
                f"the decoder has {self.decoder.codes} codes, the encoder {self.codes}: take both files of "
                "one model"
            )
        return self.decoder

    def save(self, folder: Path) -> None:
        """Write the weights, the decoder's too if there is one, and the note that says what they are."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        if self.decoder is not None:
            drawing = {name: value.cpu().contiguous() for name, value in self._decoder().state_dict().items()}
            save_file(drawing, folder / f"{DECODER}.safetensors")
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

        A file ``decoder`` with the same ending beside it is read when codes are to be drawn.

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
        decoder = file.with_stem(DECODER)
        found = decoder if decoder != file and decoder.is_file() else None
        return DalleTokenizer(model, self.image_px, found)


def read_decoder(file: Path) -> DalleDecoder:
    """Read a file of the decoder's weights, such as OpenAI's ``decoder.pkl``.

    Raises:
        DataError: it cannot be read, or holds another model.
    """
    tensors = read_tensors(file)
    try:
        model = DalleDecoder.from_shapes(tensors)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    fit(tensors, model, "", file)
    return model.eval().requires_grad_(False)


def check_codes(codes: Tensor, limit: int) -> None:
    """Refuse codes that no square picture has.

    Raises:
        ValueError: they are not (B, side * side) with values in 0..limit - 1.
    """
    square = codes.ndim == 2 and math.isqrt(codes.shape[1]) ** 2 == codes.shape[1]
    if not square or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < limit):
        raise ValueError(
            f"codes {tuple(codes.shape)} must be (pictures, side * side) with values in 0..{limit - 1}"
        )


def fingerprint(model: nn.Module, *settings: int) -> str:
    """Hash of names and values, the same for every file format, and of settings that no tensor says."""
    digest = hashlib.blake2b(repr(settings).encode() if settings else b"", digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()
