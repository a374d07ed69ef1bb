"""Whether a token store still holds the codes of its pictures; imports torch."""

from dataclasses import dataclass, field

import numpy as np

from beitctl.data.order import generator
from beitctl.data.store import TokenStore
from beitctl.errors import ChangedError, CheckFailed, DataError
from beitctl_plugins.stages.tokenizing import Views, Work

LISTED = 20


@dataclass
class Compared:
    """What encoding a sample of a store's pictures again gave."""

    pictures: int = 0
    codes: int = 0
    gone: list[str] = field(default_factory=list)
    """Pictures that no source has, or that cannot be read any more; one line each."""
    changed: list[str] = field(default_factory=list)
    """Pictures whose bytes are others than when they were encoded."""
    moved: list[str] = field(default_factory=list)
    """Pictures whose views are drawn otherwise now."""
    differing: dict[str, int] = field(default_factory=dict)
    """Codes that differ, by picture."""

    @property
    def share(self) -> float:
        """Share of the codes that differ."""
        return sum(self.differing.values()) / max(1, self.codes)

    def check(self, allowed: float) -> None:
        """Refuse a store that does not hold.

        Raises:
            DataError: pictures are gone or have changed.
            CheckFailed: views are drawn otherwise, or more than ``allowed`` of the codes differ.
        """
        if self.gone or self.changed:
            lines = [*self.gone, *(f"{id}: changed since its codes were made" for id in self.changed)]
            raise DataError(
                f"{len(lines)} of {self.pictures} pictures are not those of the store: {_listed(lines)}; put "
                "them back, or run tokenize-images again"
            )
        if self.moved:
            raise CheckFailed(
                f"views of {len(self.moved)} of {self.pictures} pictures are drawn otherwise now: "
                f"{_listed(self.moved)}; run tokenize-images again"
            )
        if self.share > allowed:
            lines = [f"{id} ({count} codes)" for id, count in self.differing.items()]
            raise CheckFailed(
                f"{sum(self.differing.values())} of {self.codes} codes differ (allowed: {allowed:g}, "
                f"verify_differing), in {len(lines)} of {self.pictures} pictures: {_listed(lines)}; run "
                "tokenize-images again"
            )


def compared(store: TokenStore, work: Work, pictures: int) -> Compared:
    """Encode a seeded sample of a store's pictures again, in the batches that it was made in.

    The result of a matrix product may depend on the number of its rows, so that codes of single pictures
    would not be those of the store to the last bit.
    """
    found = Compared()
    batches, chosen = _batches(store, work.batch), list[list[str]]()
    for number in generator(store.seed, "verify").permutation(len(batches)):
        if sum(map(len, chosen)) >= pictures:
            break
        chosen.append(batches[number])
    places = work.located(id for ids in chosen for id in ids)
    for ids in chosen:
        found.pictures += len(ids)
        views = [made for id in ids if (made := _views(store, work, id, places.get(id), found)) is not None]
        if not views:
            continue
        codes = work.encode(np.concatenate([made.pixels for made in views])).cpu().numpy()
        for made, new in zip(views, codes.reshape(len(views), store.views, -1), strict=True):
            id = made.row.id
            old = np.stack([store.view(id, number)[1] for number in range(store.views)])
            found.codes += old.size
            if differing := int((old != new).sum()):
                found.differing[id] = differing
    return found


def _batches(store: TokenStore, size: int) -> list[list[str]]:
    """Ids of the pictures that the tokenizer read at once."""
    found, first = [], 0
    for count in store.sizes:
        ids = store.ids[first : first + count]
        found += [ids[start : start + size] for start in range(0, count, size)]
        first += count
    return found


def _views(store: TokenStore, work: Work, id: str, place: int | None, found: Compared) -> Views | None:
    """The views of a picture as they are made now; None, with a note why, if they cannot be compared."""
    if place is None:
        found.gone.append(f"{id}: no longer in the sources")
        return None
    try:
        made = work.views(work.example(place))
    except ChangedError:
        raise
    except DataError as error:
        found.gone.append(str(error))
        return None
    if made.row.picture != store.picture(id):
        found.changed.append(id)
        return None
    if made.row.crops != [store.view(id, number)[0] for number in range(store.views)]:
        found.moved.append(id)
        return None
    return made


def _listed(lines: list[str]) -> str:
    return "; ".join(lines[:LISTED]) + (" ..." if len(lines) > LISTED else "")
