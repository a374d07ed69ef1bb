"""Pretrain BEiT-3 yourself: the BEiT family end to end."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beitctl.checkpoints.native import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Offer the public names without importing torch before one is used."""
    if name in __all__:
        return getattr(import_module("beitctl.checkpoints.native"), name)
    raise AttributeError(f"module 'beitctl' has no attribute '{name}'")
