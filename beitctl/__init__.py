"""Pretrain BEiT-3 yourself: the BEiT family end to end."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beitctl.checkpoints.loading import load_model
    from beitctl.checkpoints.native import load_tokenizer

_HOMES = {"load_model": "beitctl.checkpoints.loading", "load_tokenizer": "beitctl.checkpoints.native"}
__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Offer the public names without importing torch before one is used."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'beitctl' has no attribute '{name}'")
