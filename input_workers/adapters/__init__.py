"""Other ways to use the service: what other programs call goes in, a source or a pool of workers is what they get."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from input_workers.adapters import dataflow, keras, tf_data
    from input_workers.adapters.background_generator import BackgroundGenerator
    from input_workers.adapters.producer_pool import ProducerPool

__all__ = ["BackgroundGenerator", "ProducerPool", "dataflow", "keras", "tf_data"]

# Loaded when they are used: classes, and modules, some of which need another package.
_CLASSES = {"BackgroundGenerator": "background_generator", "ProducerPool": "producer_pool"}
_MODULES = {"dataflow", "keras", "tf_data"}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(f"input_workers.adapters.{_CLASSES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"input_workers.adapters.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
