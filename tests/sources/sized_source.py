"""What every sized source must do behind a shuffled Stream, checked through the coordinator."""

from __future__ import annotations

from typing import Any

import numpy as np
from gates import register

import input_workers as iw


def fetch(source: Any, *rows: int, out: list[Any] | None = None) -> list[Any]:
    """Return what the source gives for these rows."""
    numbers = np.array(rows, np.int64)
    request = iw.FetchRequest(0, 0, numbers)
    request.out = out
    return source.fetch(numbers, request)


def check_every_row_comes_once(coordinator: iw.GlobalCoordinator, source: Any, inputs: int, rows: list[Any]) -> None:
    """The last input names the row: after an epoch of shuffled batches each of `rows` came exactly once, in another order."""
    names = [*[f"input_{number}" for number in range(inputs - 1)], "number"]
    stream = iw.Stream(source, shuffle=True, seed=3, rows_per_request=3)
    handle = register(coordinator, stream, 4, input_names=names, num_workers=3, last_batch="keep")
    with coordinator:
        batches = list(handle)
    delivered = [number for batch in batches for number in batch.number.tolist()]
    assert [len(batch.number) for batch in batches[:-1]] == [4] * (len(rows) // 4 - (len(rows) % 4 == 0))
    assert sorted(delivered) == sorted(rows)
    assert len(set(rows)) == len(rows) > 8
    assert delivered != rows
    again = fetch(source, *range(len(source)))[-1].tolist()
    assert again == rows
