"""The codebook's start, update and revival on 1, 2 and 4 processes are the same (1e-6)."""

import pytest
import torch
from processes import run_on_ranks
from torch.nn import functional as F

from beitctl.data.order import share
from beitctl.engine.dist import start
from beitctl.model.codebook import Codebook, Rules, Upkeep

PICTURES, PATCHES, CODES, WIDTH, STEPS = 6, 9, 12, 4, 8


def follow(rules):
    """Codes, uses and pool after some steps on vectors that leave part of the codes idle."""
    ranks = start()
    book = Codebook(CODES, WIDTH)
    upkeep = Upkeep(book, Rules(**rules), PICTURES)
    book.reset_buffers()
    upkeep.reset_buffers()
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step // 4)
        every = F.normalize(torch.randn(PICTURES, PATCHES, WIDTH, generator=draw), dim=-1)
        places = torch.tensor(list(share(PICTURES, ranks.world, ranks.rank)), dtype=torch.int64)
        z = every[places]
        codes = book.assign(z.flatten(0, 1)).view(z.shape[:2]) if upkeep.awake else None
        upkeep.see(z, codes, places, upkeep.chosen(places, PATCHES))
        upkeep.after_step()
    return [x.flatten().tolist() for x in (book.vectors, upkeep.usage, upkeep.pool)]


@pytest.mark.parametrize("rules", [{}, {"revive_after": 2, "start_after": 2}, {"start": "random"}])
def test_1_2_and_4_processes_give_the_same_codebook(rules, tmp_path):
    (alone,) = run_on_ranks(tmp_path / "1", follow, 1, rules)
    for world in (2, 4):
        for found in run_on_ranks(tmp_path / str(world), follow, world, rules):
            for mine, theirs in zip(found, alone, strict=True):
                assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-6)
