"""The stage ``tokenize-images``."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import Field

from beitctl.api import Job, Plugin, SourceField

if TYPE_CHECKING:
    import numpy as np

    from beitctl.api import ImageTokenizer
    from beitctl.data.images import Crop, Pictures
    from beitctl.data.store import TokenStoreWriter
    from beitctl.engine.dist import Ranks

BATCH = 64
TYPICAL_FROM = 2000
"""Pictures that the patches which stand for the codes are chosen from."""


class TokenizeImages(Plugin):
    """Write the codes of every picture, for fixed random views, to a token store."""

    tokenizer: str
    """The image tokenizer: ``@train-tokenizer.image`` or a path."""
    sources: list[SourceField] = Field(min_length=1)
    """Sources of pictures; ids must not repeat among them."""
    views: int = Field(default=8, ge=1)
    """Random views (crop, flip, colours) of each picture."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the picture that a view shows."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Strength of the random brightness, contrast and saturation (papers: 0.4)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the views."""
    shard_pictures: int = Field(default=4096, ge=1)
    """Pictures per Parquet shard; a stopped run continues after its last whole shard."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """Share of the pictures that may be unreadable; one always may."""

    def plan(self) -> Mapping[str, Any]:
        """How many views of how many pictures."""
        pictures = sum(len(source.open()) for source in self.sources)
        return {"pictures": pictures, "views": pictures * self.views, "tokenizer": self.tokenizer}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return ",".join(source.open().fingerprint for source in self.sources)

    def run(self, job: Job) -> Mapping[str, Any]:
        """Encode all views shard by shard; each rank takes every n-th shard."""
        import torch

        from beitctl.checkpoints.native import load_tokenizer
        from beitctl.data.images import Pictures
        from beitctl.data.store import TokenStoreWriter
        from beitctl.engine import dist
        from beitctl.engine.shard import compute_dtype

        ranks = dist.start()
        tokenizer = load_tokenizer(job.path(self.tokenizer))
        tokenizer.model.to(ranks.device)
        opened = [source.open() for source in self.sources]
        places = [(s, i) for s, examples in enumerate(opened) for i in range(len(examples))]
        meta = {
            "tokenizer": tokenizer.fingerprint,
            "codes": tokenizer.codes,
            "grid": tokenizer.grid,
            "image_px": tokenizer.image_px,
            "views": self.views,
            "source": self.inputs_fingerprint(),
            "shard_pictures": self.shard_pictures,
        }
        writer = TokenStoreWriter(job.folder / "tokens", meta)
        work = _Work(self, tokenizer, opened, Pictures(), job)
        shards = [places[i : i + self.shard_pictures] for i in range(0, len(places), self.shard_pictures)]
        done = writer.done() if job.resume else set()
        with torch.autocast(
            ranks.device.type, torch.bfloat16, compute_dtype("auto", ranks.device) != torch.float32
        ):
            for index, shard in enumerate(shards):
                if index % ranks.world == ranks.rank and index not in done:
                    work.shard(index, shard, writer)
                    job.log.step(index + 1, len(shards), {"pictures": float(len(shard))})
        return self._finish(work, writer, ranks, job, len(places))

    def _finish(
        self, work: "_Work", writer: "TokenStoreWriter", ranks: "Ranks", job: Job, pictures: int
    ) -> Mapping[str, Any]:
        from beitctl.errors import DataError

        ranks.barrier()  # rank 0 finishes shards that other ranks wrote
        skipped = ranks.broadcast_object(writer.skipped() if ranks.main else None)  # also before a resume
        if len(skipped) > max(1, self.max_bad_share * pictures):
            raise DataError(
                f"{len(skipped)} of {pictures} pictures cannot be read "
                f"(max_bad_share = {self.max_bad_share}; remove them, or raise it): "
                + "; ".join(skipped[:20])
            )
        if ranks.main:
            writer.finish()
        ranks.barrier()
        return work.measure(job) if ranks.main else {}


class _Work:
    """Encodes shards and remembers how codes are used."""

    def __init__(
        self,
        stage: TokenizeImages,
        tokenizer: "ImageTokenizer",
        opened: Sequence[Any],
        pictures: "Pictures",
        job: Job,
    ) -> None:
        self.stage, self.tokenizer, self.opened, self.pictures, self.job = (
            stage,
            tokenizer,
            opened,
            pictures,
            job,
        )
        self.skipped: list[str] = []

    def shard(self, index: int, places: Sequence[tuple[int, int]], writer: "TokenStoreWriter") -> None:
        """Encode the views of one shard's pictures and write them."""
        import numpy as np

        ids, crops, codes, before = [], [], [], len(self.skipped)
        for batch in _chunks(self._views(places), max(1, BATCH // self.stage.views)):
            pixels = np.concatenate([views for _, _, views in batch])
            encoded = self._encode(pixels).reshape(len(batch), self.stage.views, -1)
            ids += [id for id, _, _ in batch]
            crops += [drawn for _, drawn, _ in batch]
            codes.append(encoded)
        grid = self.tokenizer.grid
        empty = np.zeros((0, self.stage.views, grid * grid), np.uint16)
        found = np.concatenate([empty, *codes]).astype(np.uint16)
        writer.write_shard(index, ids, crops, found, self.skipped[before:])

    def _encode(self, pixels: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        import torch

        return self.tokenizer.encode(torch.from_numpy(pixels)).cpu().numpy()

    def _views(
        self, places: Sequence[tuple[int, int]]
    ) -> "Iterator[tuple[str, list[Crop], np.ndarray[Any, Any]]]":
        """Id, crops and pixels (views, 3, px, px) of every picture that can be read."""
        import numpy as np

        from beitctl.data.images import random_crop
        from beitctl.data.order import generator
        from beitctl.errors import DataError

        stage = self.stage
        for source, index in places:
            place = f"source {source}, example {index}"
            try:
                example = self.opened[source][index]
                place = example.id
                if example.image is None:
                    raise DataError(f"{place}: no picture")
                picture = self.pictures.open(example.image, place)
            except DataError as error:
                self.skipped.append(str(error))
                self.job.log.warning("W301", f"skipped {place}: {error}", "look at the file, or remove it")
                continue
            rng = generator(stage.seed, "views", example.id)
            crops = [
                random_crop(*picture.size, rng, scale=stage.crop_scale, jitter=stage.jitter)
                for _ in range(stage.views)
            ]
            pixels = [self.pictures.crop(picture, crop, self.tokenizer.image_px) for crop in crops]
            yield example.id, crops, np.stack(pixels)

    def measure(self, job: Job) -> Mapping[str, Any]:
        """Usage of the codes over the whole store, and the patches that stand for each code."""
        import numpy as np
        import torch

        from beitctl.data.store import TokenStore
        from beitctl.model.vqkd import perplexity
        from beitctl.report import figures

        store = TokenStore.open(job.folder / "tokens")
        counts = np.zeros(store.codes, np.int64)
        for id in store.ids:
            for view in range(store.views):
                counts += np.bincount(store.view(id, view)[1], minlength=store.codes)
        patches = self._typical(store)
        np.save(job.folder / "tokens" / "patches.npy", patches)
        used = int((counts > 0).sum())
        order = np.argsort(-counts)
        chosen = [*order[:48], *order[max(0, used - 16) : used]]
        tiles = [figures.Tile(patches[c].transpose(1, 2, 0), f"{c}: {counts[c]}") for c in chosen]
        job.log.figure(
            "codes",
            figures.gallery([figures.Row(tiles[i : i + 16]) for i in range(0, len(tiles), 16)], tile_px=56),
            "What the codes stand for",
            "The training patch closest to each code, with the code and how often it is used: three rows of "
            "the most used codes, then the rarest. Codes that mean something look alike within a code "
            "and differ between codes.",
        )
        return {
            "pictures": len(store.ids),
            "views": len(store.ids) * store.views,
            "skipped": len(store.skipped),
            "codebook_used": used,
            "codebook_perplexity": perplexity(torch.from_numpy(counts)),
        }

    def _typical(self, store: Any) -> "np.ndarray[Any, Any]":
        """(codes, 3, p, p) uint8: for each code the patch closest to it, among first views of pictures."""
        import numpy as np
        import torch

        side, grid = self.tokenizer.image_px // self.tokenizer.grid, self.tokenizer.grid
        patches = np.zeros((store.codes, 3, side, side), np.uint8)
        best = np.full(store.codes, -2.0)
        for ids in _chunks(iter(store.ids[:TYPICAL_FROM]), BATCH):
            crops = [(self._picture(id), store.view(id, 0)[0]) for id in ids]
            views = np.stack([self.pictures.crop(*crop, self.tokenizer.image_px) for crop in crops])
            codes, near = (x.cpu().numpy() for x in self.tokenizer.closest(torch.from_numpy(views)))
            cut = views.reshape(len(views), 3, grid, side, grid, side).transpose(0, 2, 4, 1, 3, 5)
            cut, codes, near = cut.reshape(-1, 3, side, side), codes.ravel(), near.ravel()
            for place in np.flatnonzero(near > best[codes]):
                if near[place] > best[codes[place]]:
                    best[codes[place]], patches[codes[place]] = near[place], cut[place]
        return patches

    def _picture(self, id: str) -> Any:
        if not hasattr(self, "_index"):
            self._index = {e[i].id: (s, i) for s, e in enumerate(self.opened) for i in range(len(e))}
        source, index = self._index[id]
        return self.pictures.open(self.opened[source][index].image, None)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk
