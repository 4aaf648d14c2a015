"""What one seed of the stress program does, drawn at random."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from chaos.stress_rows import Faults, InputFormat, Memory, PlainRows, StreamRows

import input_workers as iw

Kind = Literal["thread", "process", "inline"]
# Rows of a run have about this many bytes together, so that a seed takes less than a second.
RUN_NBYTES = 6_000_000
MAX_ROWS = 1500
# About how many calls and reads of a run take some milliseconds.
SLOW_CALLS = 20
DTYPES = ("i1", "?", "<i2", ">i2", "f2", "<f4", ">f4", "<i8", ">f8", "c8", "c16", "S3", "S13", "U2", "M8[ns]", "i4,f8,S3")
MEMORIES = ("fresh", "fresh", "reused", "reused", "resident", "read-only", "strided", "reversed", "fortran", "out")


@dataclass(frozen=True)
class Segment:
    """One run from start to stop."""

    kind: Kind
    workers: int | Literal["auto"]
    start: Literal["forkserver", "spawn"]
    batch_sizes: tuple[int, ...]  # of each device
    max_buffered_batches: int
    max_buffered_bytes: int | None
    device_queue_depth: int
    readers: int  # threads that read; with several devices, 1 or one for each
    slow_reads: float  # share of reads after which a reader sleeps some milliseconds
    held_batches: int  # how many batches a reader keeps
    writes: bool  # whether it writes into them before it lets go
    kills: int  # of worker processes
    resets: float  # share of reads after which a device gets another batch size
    budget: int | None  # batches until the stop; None: to the end


@dataclass(frozen=True)
class Plan:
    """A source, and the runs in which it is read."""

    seed: int
    source: Literal["plain", "stream", "mix"]
    formats: tuple[InputFormat, ...]
    memory: str
    specs: bool
    rows: int  # of the source, of each worker about, or of each stream of a Mix
    rows_per_request: int | None
    shuffle: bool
    epochs: int
    epoch_end: Literal["run_on", "break"]
    shard: tuple[int, int]
    lengths: tuple[int, ...]  # of chunks of a plain function
    last_batch: Literal["drop", "keep", "pad"]
    rebatch: bool
    ordered: bool
    faults: Faults
    retries: int
    skip: bool
    max_errors: float | int | None
    fetch_timeout_s: float | None
    outcome: Literal["end", "stop", "fatal"]
    segments: tuple[Segment, ...] = field(default=())

    @property
    def tag(self) -> int:
        return self.seed % 1009 + 1

    @property
    def devices(self) -> int:
        return len(self.segments[0].batch_sizes)

    @property
    def marks(self) -> int:
        """How often a device says EndOfData until it has no more."""
        return self.epochs if self.epoch_end == "break" else 1

    def make_fetch(self, folder: str, memory: Memory | None = None) -> Any:
        """Return the fetch function, or the Stream; without `memory` the Stream of bare ids that never fails."""
        faults = Faults() if memory is None else dataclasses.replace(self.faults, folder=folder)
        memory = memory or Memory("fresh", (InputFormat(0, "<i8", (), 0),))
        if self.source == "plain":
            # Workers have from 0 to twice as many calls as they need for their part of the rows.
            calls = 2 * self.rows * len(self.lengths) / max(1, sum(self.lengths))
            return PlainRows(self.tag, max(2, math.ceil(calls)), self.lengths, memory, faults)
        if self.source == "mix":
            streams = {}
            for number in range(2):
                own = dataclasses.replace(memory, buffers={})  # each source reuses memory of its own
                data = StreamRows(self.rows * (number + 1), self.tag, own, faults, number)
                streams[str(number)] = (iw.Stream(data, self.shuffle, number, self.epochs), 1.0 + number)
            return iw.sources.Mix(streams, self.seed, ("first", "all")[self.seed % 2], self.rows_per_request)
        data = StreamRows(self.rows, self.tag, memory, faults)
        return iw.Stream(data, self.shuffle, self.seed, self.epochs, self.shard, self.rows_per_request, self.epoch_end)


def draw_plan(seed: int, kinds: tuple[Kind, ...], left_out: tuple[str, ...]) -> Plan:
    """Return what a seed does, without what is known to fail."""
    rng = random.Random(seed)
    source: Any = rng.choices(("plain", "stream", "mix"), (4, 6, 1))[0]
    formats = _formats(rng)
    row_nbytes = sum(form.row_nbytes for form in formats)
    rows = max(4, min(int(MAX_ROWS * rng.random() ** 2), RUN_NBYTES // row_nbytes))
    batch_size = max(1, min(rng.choice((1, 2, 3, 7, 16, 32, 64)), rows))
    around = (1, batch_size - 1, batch_size, batch_size + 1, batch_size * rng.randint(2, 6), rng.randint(1, 2 * batch_size))
    rebatch = source == "mix" or rng.random() > 0.12
    epoch_end: Any = "break" if source == "stream" and rng.random() < 0.35 else "run_on"
    outcome: Any = rng.choices(("end", "stop", "fatal"), (8, 1, 1))[0]
    skip = rng.random() < 0.3 and outcome != "fatal"
    retries = rng.randint(1, 2) if rng.random() < 0.3 else 0
    some_bad = skip and outcome == "end" and rng.random() < 0.7
    bad = frozenset(rng.sample(range(rows), min(rows // 2, rng.randint(1, 5)))) if some_bad else frozenset()
    shards = min(rows // 2, rng.choice((1, 1, 1, 2, 3)))
    plan = Plan(
        seed, source, formats, rng.choice(MEMORIES), rng.random() < 0.3, rows,
        rows_per_request=rng.choice((None, *(max(1, each) for each in around))),
        shuffle=rng.random() < 0.6, epochs=rng.choice((1, 1, 2, 3)), epoch_end=epoch_end,
        shard=(rng.randrange(shards), shards),
        lengths=(*rng.choices((0, *around), (1, 3, 3, 3, 3, 3, 3), k=rng.randint(1, 5)), rng.randint(1, 40)),
        last_batch=rng.choice(("drop", "keep", "pad")) if rebatch else "drop", rebatch=rebatch,
        ordered=source != "plain" and rng.random() < 0.5,
        faults=Faults(
            seed=seed, transient=rng.choice((0.0, 0.02, 0.3)) if retries or (skip and source == "plain") else 0.0,
            bad=bad, named=rng.random() < 0.5,
            fatal=rng.randint(0, 3) if outcome == "fatal" else None, no_data=rng.choice((0.0, 0.0, 0.1)),
            slow=min(rng.choice((0.0, 0.0, 0.05, 0.5)), SLOW_CALLS * max(1, sum(around) // 6) / rows),
        ),
        retries=retries, skip=skip,
        max_errors=rng.choice((None, 100_000, 1.0)) if skip else None,
        fetch_timeout_s=None, outcome=outcome,
    )  # fmt: skip
    # A failure that is fatal because too much failed, not because nothing may.
    if outcome == "fatal" and rng.random() < 0.4:
        plan = dataclasses.replace(
            plan, skip=True, max_errors=0, retries=0, faults=dataclasses.replace(plan.faults, transient=0.0)
        )
    if source == "mix" and "mix in processes" in left_out:
        kinds = tuple(kind for kind in kinds if kind != "process") or ("thread",)
    if source == "mix" and plan.memory == "reused" and "mix of sources that reuse memory" in left_out:
        plan = dataclasses.replace(plan, memory="fresh")
    if "other byte orders" in left_out:
        formats = tuple(dataclasses.replace(form, dtype=form.dtype.replace(">", "<")) for form in formats)
        plan = dataclasses.replace(plan, formats=formats)
    plan = dataclasses.replace(plan, segments=_segments(rng, plan, kinds, batch_size, row_nbytes))
    # A call that hangs takes a second, so few plans have one.
    if (
        plan.skip
        and retries
        and outcome == "end"
        and rng.random() < 0.3
        and all(each.kind != "inline" for each in plan.segments)
    ):
        faults = dataclasses.replace(plan.faults, hang=rng.randint(0, 3), slow=0.0)
        plan = dataclasses.replace(plan, fetch_timeout_s=1.0, faults=faults)
    return plan


def _formats(rng: random.Random) -> tuple[InputFormat, ...]:
    formats = []
    largest = rng.choice((8, 100, 1000, 1000, 12_000, 100_000))
    for number in range(rng.randint(1, 3)):
        dtype = rng.choice(DTYPES)
        items = max(1, rng.randint(1, largest) // np.dtype(dtype).itemsize)
        if number == 0:
            items = max(items, -(-8 // np.dtype(dtype).itemsize))
            dtype = "u1" if dtype == "?" else dtype  # the id needs all bits
            if dtype == "u1":
                items = max(items, 8)
        shape = () if items == 1 else (items,) if rng.random() < 0.5 else (2, -(-items // 2))
        formats.append(InputFormat(number, dtype, shape, rng.choice((0, 0, 1)) if shape else 0))
    return tuple(formats)


def _segments(rng: random.Random, plan: Plan, kinds: tuple[Kind, ...], batch_size: int, row_nbytes: int) -> tuple[Segment, ...]:
    devices = rng.choice((1, 1, 1, 2, 3)) if plan.rebatch and plan.faults.fatal is None else 1
    stops = rng.choice((0, 0, 1, 2, 4)) if plan.source != "plain" and plan.outcome == "end" else 0
    if plan.epoch_end == "break" and devices > 1:
        stops = 0  # each device has its own end of an epoch, and a stop comes between them
    same_sizes = rng.random() < 0.7
    segments = []
    for number in range(stops + 1):
        kind: Any = rng.choices(kinds, [{"thread": 6, "process": 3, "inline": 1}[each] for each in kinds])[0]
        if kind == "inline" and devices > 1 and plan.epoch_end == "break":
            kind = "thread"  # one thread cannot wait for the end of an epoch on several devices
        size = batch_size if number == 0 or not plan.rebatch else rng.choice((1, 5, batch_size, 2 * batch_size))
        sizes = tuple(size if same_sizes else rng.randint(1, size + 3) for _ in range(devices))
        last = number == stops
        readers = 1 if kind == "inline" else rng.choice((1, 1, 2)) if devices == 1 else devices
        if devices > 1 and plan.epoch_end == "run_on" and rng.random() < 0.3:
            readers = 1  # in turn
        segments.append(Segment(
            kind, 0 if kind == "inline" else "auto" if rng.random() < 0.1 else rng.randint(1, 4 if kind == "thread" else 2),
            "spawn" if rng.random() < 0.1 else "forkserver", sizes, rng.randint(1, 8),
            rng.choice((None, None, 1, row_nbytes * size, row_nbytes * size * 3)), rng.randint(1, 4), readers,
            slow_reads=min(rng.choice((0.0, 0.0, 0.05, 0.3)), SLOW_CALLS * size / plan.rows),
            held_batches=rng.choice((0, 0, 1, 8)), writes=rng.random() < 0.5,
            kills=rng.choice((0, 1, 2, 4)) if kind == "process" else 0,
            resets=rng.choice((0.0, 0.0, 0.1)) if plan.rebatch else 0.0,
            budget=rng.randint(0, max(1, plan.rows * plan.epochs // size)) if not last or plan.outcome == "stop" else None,
        ))  # fmt: skip
    return tuple(segments)
