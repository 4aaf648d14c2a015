"""Other ways to use the service: what other programs call goes in, a source or a pool of workers is what they get."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from input_workers.adapters import torch
    from input_workers.adapters.producer_pool import ProducerPool

__all__ = ["ProducerPool", "torch"]

# Loaded when they are used.
_MODULES = {"ProducerPool": "producer_pool"}
_FRAMEWORKS = {"torch": "PyTorch"}  # modules that import one


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"input_workers.adapters.{_MODULES[name]}"), name)
    if name in _FRAMEWORKS:
        try:
            return importlib.import_module(f"input_workers.adapters.{name}")
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ConfigError(f"adapters.{name} needs {_FRAMEWORKS[name]}: pip install input-workers[{name}]") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
