"""Other ways to use the service: what other programs call goes in, a source or a pool of workers is what they get."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from input_workers.adapters import dataflow, keras, tf_data, torch
    from input_workers.adapters.background_generator import BackgroundGenerator
    from input_workers.adapters.producer_pool import ProducerPool

__all__ = ["BackgroundGenerator", "ProducerPool", "dataflow", "keras", "tf_data", "torch"]

# Loaded when they are used: classes; modules, with the package that they need and what to install for it.
_CLASSES = {"BackgroundGenerator": "background_generator", "ProducerPool": "producer_pool"}
_MODULES = {
    "dataflow": ("", ""),
    "keras": ("", ""),  # it says so itself
    "tf_data": ("tensorflow", "tensorflow"),
    "torch": ("torch", "torch"),
}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(f"input_workers.adapters.{_CLASSES[name]}"), name)
    if name in _MODULES:
        needed, extra = _MODULES[name]
        try:
            return importlib.import_module(f"input_workers.adapters.{name}")
        except ModuleNotFoundError as error:
            if not needed or error.name != needed:
                raise
            raise ConfigError(f"adapters.{name} needs {needed}: pip install input-workers[{extra}]") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
