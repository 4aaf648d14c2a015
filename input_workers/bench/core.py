"""`input-workers bench core`: what the service costs, as ratios to a bare copy, a bare decode and a peer in the same run."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import input_workers as iw
from input_workers.bench.bare import assemble_pictures, decode_pictures
from input_workers.bench.chunks import MIXED_SIZES, DataSet, read_buffers, read_handed_over, read_in_order, read_resident
from input_workers.bench.measure import BATCH, Result, compare, median_ratio, report
from input_workers.bench.rechunk import KEEP_FREED_MEMORY, handed_over_in_children, in_a_child, read_small
from input_workers.bench.scrape import scraped
from input_workers.bench.versions import Figure, Workload, figures_of, run_in_child
from input_workers.bench.workloads import (
    PICTURE_SIZE,
    make_large_arrays,
    next_batch_s,
    read_pictures,
    run_many_sources,
    wait_in_fetchers,
    write_pictures,
)

__all__ = ["WORKLOADS", "main"]


def decode() -> list[Result]:
    """Compare ImageFolder with two threads that decode and resize with nothing between, and that assemble batches."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(folder, 1024)
        rates = compare({
            "limit": lambda: decode_pictures(paths, PICTURE_SIZE),
            "assembled": lambda: assemble_pictures(paths, PICTURE_SIZE),
            "by 64": lambda: read_pictures(folder).rate,
            "by 16": lambda: read_pictures(folder, 16).rate,
        })  # fmt: skip
    lines = {
        "by 64": ("decode, of two bare decoding threads", 0.96),
        "by 16": ("decode, chunks of 16 rows, of two bare decoding threads", 0.96),
        "assembled": ("two bare threads that assemble 64 rows, of two that only decode", None),
    }
    return [
        Result(
            name,
            median_ratio(rates, side, "limit"),
            target,
            "",
            f"{statistics.median(rates[side]):,.0f} pictures/s",
        )
        for side, (name, target) in lines.items()
    ]


def waiting() -> list[Result]:
    """64 fetchers that wait 20 ms a call: is every wait used?"""
    ratios = compare({"ours": wait_in_fetchers})["ours"]
    return [Result("waiting work, of 64 x 32 rows / 20 ms", statistics.median(ratios), 0.98, "", "64 fetchers")]


def next_batch(feed: str, target_us: float) -> list[Result]:
    """How long `next_batch` takes where a batch is ready."""
    name = f"next_batch, full queue, {feed}"
    if importlib.util.find_spec(feed) is None:
        return [Result(name, None, target_us, "us", f"pip install input-workers[{feed}]", at_most=True)]
    return [Result(name, next_batch_s(feed) * 1e6, target_us, "us", "64x224x224x3 uint8", at_most=True)]


def many_sources() -> list[Result]:
    """200 sources at 1,000 rows/s each: processor time per row, of one source's; and how long they take to start."""
    ratios, starts = [], []
    for _ in range(3):
        one = run_many_sources(1, 8.0)
        many = run_many_sources(200, 3.0)
        ratios.append(many.processor_us / one.processor_us)
        starts.append(many.start_s)
    return [
        Result("200 sources, cost a row of one's", statistics.median(ratios), 1.5, "", "1,000 rows/s each", at_most=True),
        Result("200 sources, start", statistics.median(starts), 1.0, "s", "", at_most=True),
    ]


def flat_memory() -> list[Result]:
    """Growth of the resident set over 100,000 batches, after the first 10,000."""
    data, label = np.zeros((32, 64), np.float32), np.zeros(32, np.int64)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    coordinator = iw.init_data_input_workers(
        "numpy",
        ["data", "label"],
        lambda worker_id, batch_size: [data, label],  # noqa: ARG005
        32,
        2,
        "bench",
        coordinator=iw.GlobalCoordinator(),
    )
    with coordinator:
        source = coordinator["bench"]
        for _ in range(10_000):
            source.next_batch()
        before = resident()
        for _ in range(100_000):
            source.next_batch()
        grown = (resident() - before) / 1e6
    return [Result("memory grown over 100,000 batches", grown, 2.0, "MB", "batches of 8.4 KB", at_most=True)]


def kept_memory() -> list[Result]:
    """Threads that return new arrays of 38.5 MB, with freed memory kept and given back."""

    def rate(name: str) -> float:
        (figure,) = run_in_child("core", name)
        return figure.value

    rates = compare({name: functools.partial(rate, name) for name in ("large_kept", "large_given_back")})
    note = f"{statistics.median(rates['large_kept']):,.0f} rows/s"
    name = "new arrays of 38.5 MB, Threads(keep_freed_memory=True), of without"
    return [Result(name, median_ratio(rates, "large_kept", "large_given_back"), 1.3, "", note)]


def _read_exact() -> list[Figure]:
    sizes = [BATCH] * 512
    return [
        *figures_of("exact batches, handed over", read_handed_over(sizes)),
        *figures_of("exact batches, arrays that stay", read_resident(DataSet(sizes))),
    ]


def _decode_by_16() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(folder, 768)
        return [Figure("decode, chunks of 16 rows", read_pictures(folder, 16).rate, "pictures/s")]


def _read_in_order() -> list[Figure]:
    data_set = DataSet([1])
    return [
        *figures_of("ordered", read_in_order(data_set, ordered=True)),
        *figures_of("unordered", read_in_order(data_set, ordered=False)),
    ]


def _run_sources() -> list[Figure]:
    cost = run_many_sources(200, 2.0)
    return [
        Figure("200 sources, processor time", cost.processor_us, "us/row", lower_is_better=True),
        Figure("200 sources, start", cost.start_s, "s", lower_is_better=True),
    ]


# Run in child processes, most of them to be compared with another version.
WORKLOADS = {
    "resident": Workload(lambda: figures_of("arrays that stay", read_resident(DataSet(MIXED_SIZES)))),
    "buffers": Workload(lambda: figures_of("one reused buffer per fetcher", read_buffers(MIXED_SIZES))),
    "handed_over": Workload(lambda: figures_of("handed over, memory kept", read_handed_over(MIXED_SIZES)), KEEP_FREED_MEMORY),
    "handed_over_given_back": Workload(lambda: figures_of("handed over, memory given back", read_handed_over(MIXED_SIZES))),
    "small": Workload(lambda: figures_of("1-row chunks of 72 bytes", read_small())),
    "exact": Workload(_read_exact),
    "order": Workload(_read_in_order),
    "decode": Workload(_decode_by_16),
    "waiting": Workload(lambda: [Figure("waiting work", wait_in_fetchers(calls=50), "of the waits")]),
    "next_batch_numpy": Workload(
        lambda: [Figure("next_batch, full queue, numpy", next_batch_s("numpy") * 1e6, "us", lower_is_better=True)]
    ),
    "sources": Workload(_run_sources),
    # An earlier version does not have the option.
    "large_given_back": Workload(
        lambda: [Figure("memory given back", make_large_arrays(iw.Threads()), "rows/s")], is_compared=False
    ),
    "large_kept": Workload(
        lambda: [Figure("memory kept", make_large_arrays(iw.Threads(keep_freed_memory=True)), "rows/s")], is_compared=False
    ),
}


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    parts: dict[str, Callable[[], list[Result]]] = {
        "rechunk": handed_over_in_children,
        "resident": lambda: in_a_child("resident"),
        "buffers": lambda: in_a_child("buffers"),
        "copying": lambda: in_a_child("copying"),
        "exact": lambda: in_a_child("exact"),
        "order": lambda: in_a_child("order"),
        "small": lambda: in_a_child("small"),
        "decode": decode,
        "waiting": waiting,
        "next_batch_numpy": lambda: next_batch("numpy", 20),
        "next_batch_tensorflow": lambda: next_batch("tensorflow", 30),
        "next_batch_torch": lambda: next_batch("torch", 30),
        "next_batch_jax": lambda: next_batch("jax", 30),
        "memory": flat_memory,
        "kept_memory": kept_memory,
        "sources": many_sources,
        "scrape": scraped,
    }
    return report(parts, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
