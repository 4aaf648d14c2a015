"""Sources for the live page to show: one that has done all there is to do, one that broke."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gates import Gate, register

import input_workers as iw


class Timed:
    """Rows of which a few cannot be read, in two parts."""

    def __len__(self) -> int:
        return 400

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        with iw.timed("read"):
            bad = rows[rows % 100 == 99]
        if len(bad):
            raise iw.BadRows(bad) from OSError(f"row {bad[0]} is torn <i>")
        with iw.timed("decode"):
            return [rows.copy(), np.zeros((len(rows), 3), np.float32)]


def finished(name: str = "train", coordinator: iw.GlobalCoordinator | None = None) -> iw.GlobalCoordinator:
    """Return a coordinator with a source of two devices that has run to its end and was stopped."""
    coordinator = iw.GlobalCoordinator() if coordinator is None else coordinator
    stream, skip = iw.Stream(Timed(), rows_per_request=10), iw.ErrorPolicy(skip=True)
    for scope in ("gpu_0", "gpu_1"):
        iw.init_data_input_workers(
            "numpy", ["label", "data"], stream, 8, 1, name, name_scope=scope, on_error=skip, coordinator=coordinator
        )
    with coordinator:
        for pair in zip(coordinator[f"gpu_0/{name}"], coordinator[f"gpu_1/{name}"], strict=True):
            assert len(pair) == 2
    return coordinator


def broken(coordinator: iw.GlobalCoordinator, error: Exception, name: str = "train") -> None:
    """Start a source whose first call fails."""
    gate = Gate()
    handle = register(coordinator, gate, name=name)
    coordinator.start()
    gate.raise_in(error)
    with pytest.raises(iw.FetchFailed):
        handle.next_batch()
