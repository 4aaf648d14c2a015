"""Re-chunking beside a bare copy of the same rows and beside torchdata.nodes: rows/s and processor time."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from input_workers.bench.bare import copy_chunks, copy_in_threads, read_torchdata
from input_workers.bench.chunks import (
    IMAGE,
    MIXED_SIZES,
    DataSet,
    hand_over,
    make_chunks,
    read_buffers,
    read_handed_over,
    read_in_order,
    read_resident,
    resident_rows,
    slices_of_buffers,
)
from input_workers.bench.measure import BATCH, Drained, Result, compare, drain_all, median_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["KEEP_FREED_MEMORY", "handed_over", "in_a_child", "small"]

# Freeing an array of hundreds of KB gives its pages back to the system, which takes as long as copying it did. That is the
# fetch function's memory and no cost of the service, so the limit has none of it; glibc can be told to keep the pages.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

LARGE_ROWS = 1024  # of a chunk of 12.6 MB: copying it takes far longer than handing it over

Chunks = Iterable[Sequence["NDArray[Any]"]]


def rechunk(
    name: str,
    make: Callable[[], Chunks],
    ours: Callable[[], Drained],
    target: float,
    shape: tuple[int, ...] = IMAGE,
    peer_target: float | None = None,
) -> list[Result]:
    """Compare the service with the bare copy of the same chunks and, with a target for it, with torchdata.nodes.

    Args:
        name: what the lines of the report begin with.
        make: returns the chunks.
        ours: reads the same chunks through the service.
        target: of the bare copy's rate.
        shape: of a row.
        peer_target: how many times as fast as torchdata.nodes; None: not compared with it.
    """
    limits: dict[str, Callable[[], float]] = {"limit": lambda: copy_chunks(make(), shape)}
    sides: dict[str, Callable[[], Drained]] = {"ours": ours}
    has_peer = peer_target is not None and importlib.util.find_spec("torchdata") is not None
    if has_peer:
        sides["torchdata"] = lambda: read_torchdata(make())
    measured: dict[str, list[Any]] = compare({**limits, **sides})
    rates = {side: [each.rate for each in measured[side]] for side in sides} | {"limit": measured["limit"]}
    note = f"{statistics.median(rates['ours']):,.0f} rows/s"
    results = [Result(f"{name}, of one bare copy", median_ratio(rates, "ours", "limit"), target, "", note)]
    if peer_target is None:
        return results
    ratio = median_ratio(rates, "ours", "torchdata") if has_peer else None
    note = "torchdata.nodes.Batcher" if has_peer else "pip install input-workers[bench]"
    used = {side: statistics.median(each.processor_us for each in measured[side]) for side in sides}
    return [
        *results,
        Result(f"{name}, times torchdata.nodes", ratio, peer_target, "", note),
        Result(
            f"{name}, processor time a row",
            used["ours"],
            # Rounded as it is printed.
            float(f"{used['torchdata']:.3g}") if has_peer else None,
            "us",
            "target: torchdata.nodes' own" if has_peer else note,
            at_most=True,
        ),
    ]


def handed_over() -> list[Result]:
    """Chunks of 1 to 64 rows of 12 KB, made beforehand and handed over."""
    return rechunk(
        "re-chunk 1 to 64 rows of 12 KB",
        lambda: make_chunks(MIXED_SIZES, IMAGE),
        lambda: read_handed_over(MIXED_SIZES),
        0.6,
        peer_target=2.5,
    )


def resident() -> list[Result]:
    """The same chunks, slices of a data set that stays in memory."""
    data_set = DataSet(MIXED_SIZES)
    name = "re-chunk, arrays that stay"
    return rechunk(name, data_set.chunks, lambda: read_resident(data_set), 0.55, peer_target=2.0)


def buffers() -> list[Result]:
    """The same chunks, slices of one reused buffer per fetcher."""
    name = "re-chunk, one reused buffer per fetcher"
    return rechunk(name, lambda: slices_of_buffers(MIXED_SIZES), lambda: read_buffers(MIXED_SIZES), 0.55)


def small() -> list[Result]:
    """Chunks of one row of 72 bytes, out of arrays that stay."""
    return rechunk("1-row chunks of 72 bytes", lambda: resident_rows(300_000, (16,)), read_small, 0.35, (16,))


def read_small() -> Drained:
    """Read chunks of one row of 72 bytes by one fetcher."""
    return drain_all(hand_over(resident_rows(300_000, (16,))), 300_000, 1)


def copying() -> list[Result]:
    """Large chunks of a data set that stays in memory, copied by 1 to 4 fetchers, of one and of two bare copying threads.

    Above the share of one fetcher, copying is not bound to one thread.
    """
    data_set = DataSet([LARGE_ROWS] * 64)
    counts = (1, 2, 3, 4)
    bare: dict[str, Callable[[], float]] = {
        "one bare thread": lambda: copy_in_threads(list(data_set.chunks()), IMAGE, 1),
        "two bare threads": lambda: copy_in_threads(list(data_set.chunks()), IMAGE, 2),
    }

    def ours(count: int) -> float:
        return read_resident(data_set, count).rate

    rates = compare(bare | {f"{count}": functools.partial(ours, count) for count in counts})
    return [
        Result(
            f"copying chunks of 12.6 MB, {count} fetcher{'s' * (count > 1)}, of {limit}",
            median_ratio(rates, f"{count}", limit),
            None,
            "",
            f"{statistics.median(rates[f'{count}']):,.0f} of {statistics.median(rates[limit]):,.0f} rows/s",
        )
        for limit in ("one bare thread", "two bare threads")
        for count in counts
    ]


def exact() -> list[Result]:
    """Chunks that are exactly one batch."""
    sizes = [BATCH] * 512
    data_set = DataSet(sizes)
    sides = {"handed over": lambda: read_handed_over(sizes), "arrays that stay": lambda: read_resident(data_set)}
    return [
        Result(
            f"exact-batch chunks, {name}",
            statistics.median(each.rate for each in measured) / 1e6,
            None,
            "M/s",
            f"processor time {statistics.median(each.processor_us for each in measured):.3g} us/row",
        )
        for name, measured in compare(sides).items()
    ]


def order() -> list[Result]:
    """Ordered delivery beside unordered, of requests that cost no more than copying their rows."""
    data_set = DataSet([1])
    sides = {name: functools.partial(read_in_order, data_set, name == "ordered") for name in ("ordered", "unordered")}
    rates = {name: [each.rate for each in drained] for name, drained in compare(sides).items()}
    note = f"{statistics.median(rates['ordered']):,.0f} rows/s"
    name = "ordered, requests of 32 rows of 12 KB, of unordered"
    return [Result(name, median_ratio(rates, "ordered", "unordered"), None, "", note)]


PARTS = {
    "handed_over": handed_over,
    "resident": resident,
    "buffers": buffers,
    "copying": copying,
    "exact": exact,
    "order": order,
    "small": small,
}


def in_a_child(part: str, environment: dict[str, str] | None = None) -> list[Result]:
    """Run a part in a fresh process, whose malloc has no history, with these further environment variables."""
    command = [sys.executable, "-m", "input_workers.bench.rechunk", part]
    answer = subprocess.run(command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True)
    return [Result(**row) for row in json.loads(answer.stdout)]


def handed_over_in_children() -> list[Result]:
    """Run `handed_over` in two processes: with glibc's malloc keeping freed memory, and as it is (no target)."""
    given_back = in_a_child("handed_over")
    return [
        *in_a_child("handed_over", KEEP_FREED_MEMORY),
        *(replace(result, name=f"{result.name}, memory given back", target=None) for result in given_back),
    ]


if __name__ == "__main__":
    print(json.dumps([asdict(result) for result in PARTS[sys.argv[1]]()]))
