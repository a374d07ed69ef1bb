"""What the plan says of a training that has run out of memory."""

from beitctl.errors import BeitctlError
from beitctl.planning.command import STAGES, here
from beitctl.planning.estimate import Asked, estimate
from beitctl.planning.text import gib
from beitctl.planning.work import work_of
from beitctl.recipe import Recipe

CAPTION_TOKENS = 24
"""Mean length of a caption that ``beitctl plan`` assumes."""


def memory(recipe: Recipe, key: str, ranks: int) -> str:
    """One sentence with the plan's numbers for a table; empty for one that cannot be planned."""
    table = recipe.tables[key]
    if table.stage not in STAGES:
        return ""
    try:
        work = work_of(recipe, table, CAPTION_TOKENS)
        found = estimate(recipe, work, Asked(ranks, here()))
    except BeitctlError:
        return ""
    counted = found["memory"]
    kept = counted["judged_by"]
    total, activations = counted["total"][kept], counted["activations"][kept]
    fixes = f"; one of these would make it fit: {'; '.join(found['fixes'])}" if found["fixes"] else ""
    return f"beitctl plan counts {gib(total)} a GPU, {gib(activations)} of it activations ({kept}){fixes}"
