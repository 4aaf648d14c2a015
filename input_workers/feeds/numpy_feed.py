"""The host as a device: the slot's arrays are the batch. The plain reference of the DeviceFeed Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import ArraySpec, Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NumpyFeed"]


class NumpyFeed:
    """Delivers NumPy arrays without a copy. The trainer may write to them and hold them as long as it likes."""

    chunk_alignment: int | None = 1

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Nothing is needed."""

    def send(self, slot: Slot) -> Sequence[NDArray[Any]]:
        """Return the slot's arrays."""
        return slot.arrays

    def receive(self, ticket: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """Return the same arrays."""
        return ticket

    def close(self) -> None:
        """Nothing was taken."""
