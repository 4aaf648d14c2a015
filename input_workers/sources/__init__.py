"""Where rows come from: by number, in an order that is shuffled and repeated; or from generators, one for each worker."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from input_workers.sources.arrays import Arrays
from input_workers.sources.mix import Mix
from input_workers.sources.stream import Stream

if TYPE_CHECKING:
    from input_workers.sources.generators import Generators
    from input_workers.sources.image_folder import ImageFolder
    from input_workers.sources.map import Map
    from input_workers.sources.parquet import Parquet
    from input_workers.sources.shared_arrays import SharedArrays
    from input_workers.sources.tar_shards import TarShards

__all__ = ["Arrays", "Generators", "ImageFolder", "Map", "Mix", "Parquet", "SharedArrays", "Stream", "TarShards"]

# Loaded when they are used.
_MODULES = {
    "Generators": "generators",
    "ImageFolder": "image_folder",
    "Map": "map",
    "Parquet": "parquet",
    "SharedArrays": "shared_arrays",
    "TarShards": "tar_shards",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"input_workers.sources.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
