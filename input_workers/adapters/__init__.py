"""Other ways to use the service: what other programs call goes in, a source or a pool of workers is what they get."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from input_workers.adapters.producer_pool import ProducerPool

__all__ = ["ProducerPool"]

# Loaded when they are used.
_MODULES = {"ProducerPool": "producer_pool"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"input_workers.adapters.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
