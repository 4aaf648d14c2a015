"""Other ways to use the service: what other programs call goes in, a source or a pool of workers is what they get."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import input_workers.adapters.dataflow as dataflow
    from input_workers.adapters.background_generator import BackgroundGenerator
    from input_workers.adapters.producer_pool import ProducerPool

__all__ = ["BackgroundGenerator", "ProducerPool", "dataflow"]

# Loaded when they are used.
_MODULES = {"BackgroundGenerator": "background_generator", "ProducerPool": "producer_pool"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"input_workers.adapters.{_MODULES[name]}"), name)
    if name == "dataflow":
        return importlib.import_module("input_workers.adapters.dataflow")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
