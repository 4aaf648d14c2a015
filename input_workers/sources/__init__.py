"""Where rows come from: by number, in an order that is shuffled and repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from input_workers.sources.arrays import Arrays
from input_workers.sources.stream import Stream

if TYPE_CHECKING:
    from input_workers.sources.image_folder import ImageFolder

__all__ = ["Arrays", "ImageFolder", "Stream"]


def __getattr__(name: str) -> Any:
    if name == "ImageFolder":
        from input_workers.sources.image_folder import ImageFolder

        return ImageFolder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
