"""The stage ``tokenize-images``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from beitctl.api import CropScale, Job, Plugin, SourceField
from beitctl.data.opening import opened

if TYPE_CHECKING:
    import numpy as np
    import torch

    from beitctl.api import Examples
    from beitctl.data.store import TokenStore, TokenStoreWriter
    from beitctl.engine.dist import Ranks
    from beitctl_plugins.stages.tokenizing import Unusable, Work

NAMES = 100
"""First pictures of each source whose names are compared."""
TYPICAL_FROM = 2000
"""Pictures that the patches which stand for the codes are chosen from."""
TIES = 0.001
"""Share of codes that may differ in bf16, where the closest of close codes is a matter of rounding."""
LISTED = 20
"""Pictures that a message names."""


class TokenizeImages(Plugin):
    """Write the codes of every picture, for fixed random views, to a token store.

    ``--verify`` encodes a sample of the pictures of a finished store again and compares.
    """

    tokenizer: str
    """The image tokenizer: ``@train-tokenizer.image`` or a path."""
    tokenizer_settings: dict[str, Any] = Field(default_factory=dict)
    """What the file of another library's tokenizer does not say, such as ``{ heads = 12 }``."""
    sources: list[SourceField] = Field(min_length=1)
    """Sources of pictures; ids must not repeat among them."""
    views: int = Field(default=8, ge=1)
    """Random views (crop, flip, colours) of each picture."""
    crop_scale: CropScale = (0.2, 1.0)
    """Smallest and largest share of the picture that a view shows."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Strength of the random brightness, contrast and saturation (papers: 0.4)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the views."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the tokenizer computes in; ``auto``: bf16 where the machine has it. Codes are always chosen in
    fp32."""
    shard_pictures: int = Field(default=4096, ge=1)
    """Pictures per Parquet shard; a stopped run continues after its last whole shard."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """Share of the pictures that may be unreadable; one always may."""
    workers: int = Field(default=0, ge=0, exclude=True)
    """Threads that decode and crop ahead of the tokenizer; 0: one for each core, 16 at most."""
    verify_pictures: int = Field(default=256, ge=1, exclude=True)
    """Pictures that ``--verify`` encodes again, rounded up to whole batches."""
    verify_differing: float | None = Field(default=None, ge=0, le=1, exclude=True)
    """Share of codes that may differ in ``--verify``; by default 0 in fp32, 0.001 in bf16."""

    def plan(self) -> Mapping[str, Any]:
        """How many views of how many pictures."""
        pictures = sum(len(opened(source)) for source in self.sources)
        return {"pictures": pictures, "views": pictures * self.views, "tokenizer": self.tokenizer}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return ",".join(opened(source).fingerprint for source in self.sources)

    def run(self, job: Job) -> Mapping[str, Any]:
        """Encode all views shard by shard; each rank takes every n-th shard that is left."""
        from beitctl.data.store import TokenStore, TokenStoreWriter
        from beitctl.engine import dist
        from beitctl.engine.shard import compute_dtype
        from beitctl_plugins.stages import shared

        ranks = dist.start()
        _check_names([shared.opened(f"sources.{k}", source, job) for k, source in enumerate(self.sources)])
        work = self._work(job, ranks.device, compute_dtype(self.precision, ranks.device))
        writer = TokenStoreWriter(job.folder / "tokens", self.meta(work))
        skipped: list[str] = []

        def skip(found: "Unusable") -> None:
            skipped.append(found.reason)
            text = f"skipped {found.place}: {found.reason}"
            job.log.warning("W301", text, "look at the file, or remove it")

        def wrote(number: int) -> None:
            job.log.step(number + 1, work.shards, {"pictures": float(len(work.places(number)))})
            self._check_share(skipped, work.total)

        with _alone(writer, ranks, anew=not job.resume):
            left = _left(writer, ranks, work.shards)
            work.write(left[ranks.rank :: ranks.world], writer, skip, wrote)
            ranks.barrier()  # rank 0 finishes shards that other ranks wrote
            self._finish(work, writer, ranks)
            return self.measure(TokenStore.open(writer.folder), work, job) if ranks.main else {}

    def verify(self, job: Job) -> Mapping[str, Any]:
        """Encode a seeded sample of the pictures of a finished store again and compare; changes nothing.

        Raises:
            DataError: pictures are gone or have changed, or the store is damaged or of another tokenizer.
            CheckFailed: more codes differ than may.
        """
        import torch

        from beitctl.data.store import TokenStore
        from beitctl.engine import dist
        from beitctl_plugins.stages.checking import compared

        device = dist.start().device
        work = self._work(job, device, torch.float32)
        free = ("source", "precision", "shard_pictures")
        expect = {key: value for key, value in self.meta(work).items() if key not in free}
        store = TokenStore.open(job.folder / "tokens", expect=expect)
        if store.precision == "bf16":
            work.dtype = torch.bfloat16
        found = compared(store, work, self.verify_pictures)
        allowed = TIES if store.precision == "bf16" else 0.0
        found.check(allowed if self.verify_differing is None else self.verify_differing)
        return {
            "pictures": found.pictures,
            "of": len(store.ids),
            "codes": found.codes,
            "differing": sum(found.differing.values()),
            "precision": store.precision,
        }

    def _work(self, job: Job, device: "torch.device", dtype: "torch.dtype") -> "Work":
        from beitctl_plugins.stages.image_codes import open_tokenizer
        from beitctl_plugins.stages.tokenizing import Work

        tokenizer = open_tokenizer(job.path(self.tokenizer), self.tokenizer_settings, "tokenizer")
        tokenizer.model.to(device)
        return Work(self, tokenizer, [opened(source) for source in self.sources], device, dtype)

    def meta(self, work: "Work") -> dict[str, Any]:
        """What the store says about itself."""
        import torch

        from beitctl_plugins.stages.tokenizing import BATCH

        tokenizer = work.tokenizer
        return {
            "tokenizer": tokenizer.fingerprint,
            "codes": tokenizer.codes,
            "grid": tokenizer.grid,
            "image_px": tokenizer.image_px,
            "views": self.views,
            "source": self.inputs_fingerprint(),
            "crop_scale": self.crop_scale,
            "jitter": self.jitter,
            "seed": self.seed,
            "precision": "bf16" if work.dtype == torch.bfloat16 else "fp32",
            "batch": BATCH,
            "shard_pictures": self.shard_pictures,
        }

    def _check_share(self, skipped: Sequence[str], pictures: int) -> None:
        """Refuse sources of which too little can be read.

        Raises:
            DataError: more than the allowed share is unreadable; names the first ones.
        """
        from beitctl.errors import DataError

        if len(skipped) > max(1, self.max_bad_share * pictures):
            raise DataError(
                f"{len(skipped)} of {pictures} pictures cannot be read "
                f"(max_bad_share = {self.max_bad_share}; remove them, or raise it): "
                + "; ".join(skipped[:LISTED])
            )

    def _finish(self, work: "Work", writer: "TokenStoreWriter", ranks: "Ranks") -> None:
        """Make the store complete, unless too many pictures could not be read."""
        shards = writer.shards(work.shards) if ranks.main else []
        skipped = [line for shard in shards for line in shard.skipped]  # also those before a resume
        self._check_share(ranks.broadcast_object(skipped), work.total)
        if ranks.main:
            writer.finish(shards, _made(ranks))
        ranks.barrier()

    def measure(self, store: "TokenStore", work: "Work", job: Job) -> Mapping[str, Any]:
        """Usage of the codes over the whole store, and the patches that stand for each code."""
        import io

        import numpy as np
        import torch

        from beitctl.data.store import write_whole
        from beitctl.model.codebook import perplexity
        from beitctl.report import figures

        counts = store.usage()
        patches, file = _typical(store, work), io.BytesIO()
        np.save(file, patches)
        write_whole(store.folder / "patches.npy", file.getvalue())
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


def _check_names(found: "Sequence[Examples]") -> None:
    """Look whether first pictures of two sources share a name, as those of two sets of img2dataset do.

    Raises:
        UserError: they do; the whole store would be refused at its end.
    """
    from beitctl.errors import DataError, UserError

    known: dict[str, int] = {}
    for number, examples in enumerate(found):
        for index in range(min(NAMES, len(examples))):
            try:
                id = examples[index].id
            except DataError:
                continue
            if known.setdefault(id, number) != number:
                raise UserError(
                    f"sources {known[id]} and {number} both have a picture named '{id}', by which a token "
                    "store tells pictures apart; make one source of them: "
                    '{ kind = "mixture", sources = [...] }'
                )


@contextmanager
def _alone(writer: "TokenStoreWriter", ranks: "Ranks", *, anew: bool) -> "Iterator[None]":
    """Keep other jobs from the store while this one writes; ``anew`` removes what is there.

    Raises:
        UserError: another job writes there; on every rank.
    """
    from beitctl.data.lock import locked
    from beitctl.errors import UserError

    with ExitStack() as stack:
        problem = ""
        if ranks.main:
            try:
                stack.enter_context(locked(writer.folder))
            except UserError as error:
                problem = str(error)
            else:
                if anew:
                    writer.clear()
        if problem := ranks.broadcast_object(problem):
            raise UserError(problem)
        yield


def _left(writer: "TokenStoreWriter", ranks: "Ranks", count: int) -> list[int]:
    """Shards that are still to be written, of which each rank has looked for its share.

    Raises:
        UserError: there are shards of a store with other settings; on every rank.
    """
    from beitctl.errors import UserError

    found: dict[str, Any] = {"done": [], "problem": ""}
    try:
        found["done"] = sorted(writer.done(range(ranks.rank, count, ranks.world)))
    except UserError as error:
        found["problem"] = str(error)
    answers = ranks.gather_objects(found)
    for answer in answers:
        if answer["problem"]:
            raise UserError(answer["problem"])
    done = {number for answer in answers for number in answer["done"]}
    return [number for number in range(count) if number not in done]


def _made(ranks: "Ranks") -> dict[str, Any]:
    """When, where and with what a store was made."""
    import platform
    from datetime import UTC, datetime
    from importlib import metadata

    return {
        "host": platform.node(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": ranks.world,
        "device": ranks.device.type,
        "versions": {name: metadata.version(name) for name in ("beitctl", "torch", "pillow", "pyarrow")},
    }


def _typical(store: "TokenStore", work: "Work") -> "np.ndarray[Any, Any]":
    """(codes, 3, p, p) uint8: for each code the patch closest to it, among first views of pictures."""
    import numpy as np
    import torch

    from beitctl_plugins.stages.tokenizing import BATCH, chunks, encoded

    side, grid = store.image_px // store.grid, store.grid
    patches = np.zeros((store.codes, 3, side, side), np.uint8)
    best = np.full(store.codes, -np.inf)
    places = work.located(store.ids[:TYPICAL_FROM])
    for ids in chunks(iter(store.ids[:TYPICAL_FROM]), BATCH):
        pictures = [work.pictures.open(*encoded(work.example(places[id]))) for id in ids]
        crops = [store.view(id, 0)[0] for id in ids]
        views = np.stack(
            [work.pictures.crop(*pair, store.image_px) for pair in zip(pictures, crops, strict=True)]
        )
        codes, near = (x.float().cpu().numpy() for x in work.tokenizer.closest(torch.from_numpy(views)))
        cut = views.reshape(len(views), 3, grid, side, grid, side).transpose(0, 2, 4, 1, 3, 5)
        cut, codes, near = cut.reshape(-1, 3, side, side), codes.ravel().astype(np.int64), near.ravel()
        for place in np.flatnonzero(near > best[codes]):
            if near[place] > best[codes[place]]:
                best[codes[place]], patches[codes[place]] = near[place], cut[place]
    return patches
