"""Read random input sources in random ways, and check every row, batch, count and thread of each.

    PYTHONPATH=.:tests python -m chaos.stress --seconds 60 --seed 1
    PYTHONPATH=.:tests python -m chaos.stress --seeds 17-17 --kinds thread

A seed draws a plan (stress_plan.py); the rows prove themselves (stress_rows.py). Only the public API is used. The first
failure ends the program with status 1, a hang with status 3, after printing the seed, its plan and every thread's stack.
"""

# ruff: noqa: T201  a program that prints

from __future__ import annotations

import argparse
import collections
import faulthandler
import gc
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos.stress_check import Batch, check_rows
from chaos.stress_plan import Kind, Plan, Segment, draw_plan
from chaos.stress_rows import EPOCH_SHIFT, Faults, InputFormat, Memory, StreamRows, decode

import input_workers as iw

HANG_SECONDS = 20.0
LEAK_SECONDS = 5.0
NAME = "train"


class SegmentRun:
    """One run of a source, from start to stop, and what its readers saw."""

    def __init__(self, plan: Plan, segment: Segment, memory: Memory, folder: str, marks: int, state: Any) -> None:
        self.plan, self.segment = plan, segment
        self.coordinator = iw.GlobalCoordinator()
        self.folder = folder
        self.fetch = plan.make_fetch(folder, memory)
        self.scopes = [f"gpu_{number}" for number in range(plan.devices)] if plan.devices > 1 else [""]
        self.devices = [f"{scope}/{NAME}" if scope else NAME for scope in self.scopes]
        self.logs: list[list[Batch]] = [[] for _ in range(segment.readers)]
        self.marks = [marks] * len(self.devices)
        self.first_marks = marks
        self.sizes = [[size] for size in segment.batch_sizes]  # every batch size that a device was given
        self.states: list[tuple[int, int, Any]] = []  # batches and marks before it
        self.failure: BaseException | None = None
        self.errors: list[BaseException] = []
        self.stopping = False
        self.killed = 0  # worker processes
        self.enough = threading.Event()  # as many batches as the budget says were read, or no reader is left
        self._last: dict[int, Batch] = {}  # by device
        self._lock = threading.Lock()
        self._left = segment.budget if segment.budget is not None else sys.maxsize
        self._alive = segment.readers
        self._register()
        if state is not None:
            self.coordinator[NAME].load_state_dict(state)

    def _register(self) -> None:
        plan, segment = self.plan, self.segment
        fetchers: Any = "thread"
        if segment.kind == "process":
            fetchers = iw.Processes(start=segment.start, restarts=1000)
        policy = iw.ErrorPolicy(plan.retries, 0.001, 0.01, plan.skip, plan.max_errors if plan.skip else None)
        for scope, size in zip(self.scopes, segment.batch_sizes, strict=True):
            iw.init_data_input_workers(
                "numpy", [f"input_{form.number}" for form in plan.formats], self.fetch, size, segment.workers, NAME,
                segment.max_buffered_batches, fetchers=fetchers, rebatch=plan.rebatch, last_batch=plan.last_batch,
                batch_axes=[form.axis for form in plan.formats], ordered=plan.ordered, timeout_s=HANG_SECONDS,
                fetch_timeout_s=plan.fetch_timeout_s, on_error=policy, max_buffered_bytes=segment.max_buffered_bytes,
                device_queue_depth=segment.device_queue_depth, name_scope=scope,
                specs=[iw.ArraySpec(form.shape, form.dtype) for form in plan.formats] if plan.specs else None,
                coordinator=self.coordinator,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether every device has said EndOfData for the last time."""
        return min(self.marks) >= self.plan.marks

    def read(self, known_children: set[int]) -> None:
        """Start, read as the segment says, and stop. Raises the first error of a reader."""
        # A stop comes in the middle of reading. Several readers must not stop by themselves: each would wait for batches
        # behind those of another device, which are read no more.
        stops_readers = self.segment.budget is not None and self.segment.kind != "inline"
        stops_readers = stops_readers and (self.plan.outcome == "stop" or self.segment.readers > 1)
        if stops_readers:
            self._left = sys.maxsize
        self.coordinator.start()
        shares = [[each] for each in range(len(self.devices))] if self.segment.readers == len(self.devices) else None
        work = [(number, shares[number] if shares else [*range(len(self.devices))]) for number in range(self.segment.readers)]
        threads = [threading.Thread(target=self._read_or_note, args=each, name=f"reader-{each[0]}") for each in work]
        killer = threading.Thread(target=self._kill, args=(known_children,), name="killer")
        if self.segment.kills:
            threads.append(killer)
        elif len(threads) == 1 and not stops_readers:
            threads = []
        for thread in threads:
            thread.start()
        if not threads:
            self._read_or_note(*work[0])
        self.enough.wait()
        self.release_calls()
        if stops_readers or self.errors:
            self.stopping = True
            assert self.coordinator.stop(HANG_SECONDS), self.coordinator.last_stop
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def release_calls(self) -> None:
        """Let calls that hang end."""
        Faults(self.folder).release()

    def _read_or_note(self, reader: int, devices: list[int]) -> None:
        try:
            self._read(reader, devices)
        except BaseException as error:
            self.errors.append(error)
            if isinstance(error, iw.WaitTimeout):  # the stacks of this moment say who waits for whom
                faulthandler.dump_traceback(all_threads=True)
        finally:
            with self._lock:
                self._alive -= 1
            if not self._alive or self.errors:
                self.enough.set()

    def _read(self, reader: int, devices: list[int]) -> None:
        plan, segment, log = self.plan, self.segment, self.logs[reader]
        rng = random.Random(f"{plan.seed} {reader} {self.first_marks}")
        handles = [self.coordinator[device] for device in self.devices]
        held: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
        turn = 0
        while waiting := [device for device in devices if self.marks[device] < plan.marks]:
            device = waiting[turn % len(waiting)]
            with self._lock:
                if self._left <= 0:
                    break
                self._left -= 1
            try:
                batch = handles[device].next_batch()
            except iw.EndOfData:
                with self._lock:
                    self.marks[device] += 1
                    self._left += 1
                turn += len(devices) == len(waiting) and plan.epoch_end == "break"
                continue
            except iw.QueueClosed:
                assert self.stopping, "QueueClosed, and nothing was stopped"
                break
            except iw.SourceFailed as error:
                self.failure = error
                break
            turn += 1
            held.append((batch, self._see(batch, device, log)))
            if self.segment.budget is not None and sum(map(len, self.logs)) >= self.segment.budget:
                self.enough.set()
            while len(held) > segment.held_batches:
                self._let_go(*held.popleft())
            self._do_other_things(rng, device, log)
        while held:
            self._let_go(*held.popleft())

    def _see(self, batch: Any, device: int, log: list[Batch]) -> np.ndarray:
        """Check a batch and note it; return the ids of all its rows."""
        plan = self.plan
        ids = decode(batch, plan.formats, plan.tag)
        valid, size, sizes = batch.valid_rows, len(ids), self.sizes[device]
        assert 0 < valid <= size, f"{valid} valid rows of {size}"
        assert (ids[valid:] == ids[valid - 1]).all(), "padding is not the last row"
        assert all(array.flags.writeable for array in batch), "a batch is read-only"
        epoch = 0 if plan.source != "stream" else int(ids[0]) >> EPOCH_SHIFT & 0xFF
        assert batch.epoch == epoch, f"batch.epoch is {batch.epoch}, its first row's {epoch}"
        assert valid == size or plan.last_batch == "pad", "padding"
        if plan.rebatch:
            # A reset may have happened after this batch was laid out, and a short one is shorter than any size.
            assert size in sizes or (plan.last_batch == "keep" and size < max(sizes)), f"{size} rows, not {sizes}"
        if self.segment.readers <= len(self.devices):  # else another reader may have read what came before
            last = self._last.get(device)
            short = plan.rebatch and last is not None and last.size < min(sizes) and last.marks == self.marks[device]
            assert not short, "a batch after a short one, without an end between them"
            if plan.epoch_end == "break":
                epochs = set((ids >> EPOCH_SHIFT & 0xFF).tolist())
                assert epochs == {self.marks[device]}, f"rows of epochs {epochs} in epoch {self.marks[device]}"
        self._last[device] = Batch(device, ids[:valid], size, self.marks[device])
        log.append(self._last[device])
        return ids

    def _let_go(self, batch: Any, ids: np.ndarray) -> None:
        again = decode(batch, self.plan.formats, self.plan.tag)
        assert np.array_equal(again, ids), "a batch changed while it was held"
        if self.segment.writes:
            for array in batch:
                array[...] = np.zeros((), array.dtype)

    def _do_other_things(self, rng: random.Random, device: int, log: list[Batch]) -> None:
        handle, one = self.coordinator[NAME], len(self.devices) == self.segment.readers == 1
        if rng.random() < self.segment.slow_reads:
            time.sleep(0.01 * rng.random())
        if rng.random() < self.segment.resets:
            size = rng.choice((1, 3, self.segment.batch_sizes[device], self.segment.batch_sizes[device] + 2))
            self.sizes[device].append(size)  # before: a batch of that size may come at once
            self.coordinator.reset_data_input(self.scopes[device], NAME, "numpy", size)
        if rng.random() < 0.1:
            stats = handle.stats()
            assert stats.rows_in_flight >= 0, stats.ledger
        if one and self.plan.source != "plain" and rng.random() < 0.2:
            state = handle.state_dict()
            assert state == handle.state_dict(), "state_dict() is not the same twice"
            self.states.append((len(log), self.marks[0], json.loads(json.dumps(state))))

    def _kill(self, known_children: set[int]) -> None:
        rng = random.Random(self.plan.seed)
        for _ in range(self.segment.kills):
            if self.enough.wait(0.1 * rng.random()):
                return
            workers = [each.pid for each in psutil.Process().children(recursive=True) if each.pid not in known_children]
            if workers:
                try:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    self.killed += 1
                except ProcessLookupError:
                    pass  # it has ended meanwhile

    def stop(self) -> None:
        """Stop, and check that the ends stay as they are, and the ledger."""
        handle, plan = self.coordinator[NAME], self.plan
        if not self.stopping:
            end = type(self.failure) if self.failure is not None else iw.EndOfData if self.ended else None
            self._check_end(end)
        assert self.coordinator.stop(HANG_SECONDS), self.coordinator.last_stop
        self._check_end(iw.QueueClosed)
        report = self.coordinator.last_stop
        assert self.failure is not None or not report.failures, report.failures
        stats, batches = handle.stats(), [batch for log in self.logs for batch in log]
        delivered, sizes = sum(len(each.ids) for each in batches), sum(each.size for each in batches)
        dropped = stats.rows_dropped
        assert stats.rows_in_flight == 0, stats.ledger
        assert stats.rows_fetched == stats.rows_delivered + sum(dropped.values()), stats.ledger
        assert stats.rows_delivered == delivered, f"{delivered} rows were read: {stats.ledger}"
        assert stats.batches_delivered == len(batches), f"{len(batches)} batches were read, not {stats.batches_delivered}"
        assert not self.ended or stats.rows_padded == sizes - delivered, f"{sizes - delivered} rows are padding: {stats}"
        assert not dropped["device_error"], stats.ledger
        assert not self.ended or self.failure or not dropped["stopped"], f"the data have ended: {stats.ledger}"
        assert dropped["final_partial"] == 0 or plan.last_batch == "drop", stats.ledger

    def _check_end(self, end: type[BaseException] | None) -> None:
        """Check that every device says this again, if it has ended."""
        for device in self.devices if end is not None else ():
            try:
                self.coordinator[device].next_batch()
            except end:
                continue
            raise AssertionError(f"{device}: a batch after {end.__name__}")

    def position(self, rng: random.Random) -> tuple[Any, int, int]:
        """Return a state of this run, and the marks and batches before it."""
        handle, total = self.coordinator[NAME], sum(map(len, self.logs))
        batches, marks, state = total, min(self.marks), handle.state_dict()
        which = rng.random()
        if len(self.devices) == self.segment.readers == 1:
            if which < 0.4 and self.states:
                batches, marks, state = rng.choice(self.states)
            elif which < 0.6 and total:
                batches = rng.randint(max(1, total - 60), total)
                state, marks = handle.state_dict(delivered=batches), self.logs[0][batches - 1].marks
        # Rows that filled no batch at the end are not delivered: the next run, of smaller batches, may deliver them.
        return json.loads(json.dumps(state)), marks if self.plan.epoch_end == "break" else 0, batches

    def forget(self, batches: int) -> None:
        """Forget the batches that were read after this many: the next run delivers them again."""
        if len(self.logs) == 1:
            del self.logs[0][batches:]


def run_seed(plan: Plan, known_children: set[int]) -> dict[str, int]:
    """Do what a plan says; return how much was done. Raises AssertionError for whatever is wrong."""
    rng = random.Random(plan.seed)
    memory = Memory(plan.memory, plan.formats)
    runs: list[SegmentRun] = []
    state, marks = None, 0
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        for segment in plan.segments:
            own = str(Path(folder, str(len(runs))))
            os.mkdir(own)
            run = SegmentRun(plan, segment, memory, own, marks, state)
            runs.append(run)
            try:
                run.read(known_children)
                # The position is the same before the stop and after it.
                before = segment is not plan.segments[-1] and rng.random() < 0.5
                if before:
                    state, marks, batches = run.position(rng)
                run.stop()
                if not before and segment is not plan.segments[-1]:
                    state, marks, batches = run.position(rng)
                if segment is not plan.segments[-1]:
                    run.forget(batches)
            finally:
                run.release_calls()
                run.coordinator.stop(HANG_SECONDS)
        check_rows(plan, runs)
    memory.check_resident()
    rows = sum(len(batch.ids) for run in runs for log in run.logs for batch in log)
    return {"rows": rows, "runs": len(runs), "killed": sum(run.killed for run in runs)}


def _descriptors() -> collections.Counter[str]:
    targets: collections.Counter[str] = collections.Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            targets[os.readlink(f"/proc/self/fd/{name}").partition(":")[0]] += 1
        except FileNotFoundError:  # the one that lists the folder
            pass
    return targets


class LeftBehind:
    """What there was before: threads, child processes and file descriptors."""

    def __init__(self) -> None:
        gc.collect()
        self.threads = set(threading.enumerate())
        self.children = {child.pid for child in psutil.Process().children(recursive=True)}
        self.descriptors = _descriptors()

    def check(self) -> None:
        """Wait a little for what ends by itself; raise AssertionError for what is left."""
        deadline = time.monotonic() + LEAK_SECONDS
        while left := self._left():
            assert time.monotonic() < deadline, f"left behind: {left}"
            gc.collect()
            time.sleep(0.01)

    def _left(self) -> list[str]:
        left = [thread.name for thread in set(threading.enumerate()) - self.threads]
        left += [str(child) for child in psutil.Process().children(recursive=True) if child.pid not in self.children]
        return left + [f"{count} more of {target}" for target, count in (_descriptors() - self.descriptors).items()]


class HangGuard:
    """A thread that ends the program when a seed takes too long, after dumping all stacks."""

    def __init__(self) -> None:
        self._text, self._deadline = "", float("inf")
        threading.Thread(target=self._watch, name="hang-guard", daemon=True).start()

    @contextmanager
    def watch(self, text: str) -> Iterator[None]:
        self._text, self._deadline = text, time.monotonic() + 2 * HANG_SECONDS
        faulthandler.dump_traceback_later(3 * HANG_SECONDS, exit=True)  # where a thread holds the interpreter lock
        yield
        faulthandler.cancel_dump_traceback_later()
        self._deadline = float("inf")

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            if time.monotonic() > self._deadline:
                print(f"HANG in {self._text}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(3)


def _probe(kind: Any, start: Any = None, mixed: bool = False, dtype: str = "<i2", bad: frozenset[int] = frozenset()) -> None:
    """Read a small Stream, or a Mix of two over the ends of their epochs, whose sources reuse their memory."""
    forms = InputFormat(0, "<i8", (), 0), InputFormat(1, dtype, (2, 3), 1)
    rows = [StreamRows(4, 1, Memory("reused", forms), Faults(bad=bad), number) for number in range(2)]
    streams = [iw.Stream(each, epochs=2) for each in rows]
    stream = (
        iw.sources.Mix({str(number): (each, 1.0) for number, each in enumerate(streams)}, ends="all") if mixed else streams[0]
    )
    coordinator = iw.GlobalCoordinator()
    fetchers: Any = iw.Processes(start=start) if kind == "process" else "thread"
    iw.init_data_input_workers(
        "numpy", ["id", "data"], stream, 16 if mixed else 4, 1, NAME, fetchers=fetchers, batch_axes=[0, 1], timeout_s=20.0,
        on_error=iw.ErrorPolicy(skip=True), coordinator=coordinator,
    )  # fmt: skip
    try:
        coordinator.start()
        ids = decode(coordinator[NAME].next_batch(), forms, 1)
        assert len(np.unique(ids)) == len(ids), f"rows are lost and repeated: {ids}"
    finally:
        coordinator.stop()


def _warm_up(kinds: Sequence[Kind]) -> tuple[str, ...]:
    """Start what stays for the life of the program, such as a fork server; return what to leave out, because it fails."""
    for start in ("forkserver", "spawn") if "process" in kinds else ():
        _probe("process", start)
    probes: dict[str, list[dict[str, Any]]] = {
        "mix in processes": [{"kind": "process", "mixed": True}],
        "mix of sources that reuse memory": [{"kind": "thread", "mixed": True}],
        "other byte orders": [{"kind": "process", "dtype": ">i2"}, {"kind": "thread", "dtype": ">i2", "bad": frozenset([2])}],
    }
    left_out = []
    for what, calls in probes.items():
        for arguments in calls:
            try:
                if arguments["kind"] in kinds:
                    _probe(**arguments)
            except Exception as error:
                print(f"LEFT OUT because it fails: {what} ({arguments['kind']}): {str(error)[:150]!r}", flush=True)
                left_out.append(what)
    return tuple(left_out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Read random input sources, and check every row.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", help="A-B: the first seed and the last")
    parser.add_argument("--kinds", default="thread,process,inline", help="kinds of fetchers")
    parser.add_argument("--verbose", action="store_true", help="print the time of each seed")
    options = parser.parse_args()
    kinds: Any = tuple(options.kinds.split(","))
    first, last = options.seed, sys.maxsize
    if options.seeds:
        first, last = map(int, options.seeds.split("-"))
    elif options.seconds == float("inf"):
        last = first
    logging.getLogger("input_workers").setLevel(logging.CRITICAL)  # faults are made by the thousand
    started = time.monotonic()
    guard = HangGuard()
    left_out = _warm_up(kinds)
    before = LeftBehind()
    totals: collections.Counter[str] = collections.Counter()
    seed = first
    while seed <= last and time.monotonic() - started < options.seconds:
        plan = draw_plan(seed, kinds, left_out)
        text = f"seed {seed}: python -m chaos.stress --seeds {seed}-{seed} --kinds {options.kinds}\n{plan}"
        began = time.monotonic()
        try:
            with guard.watch(text):
                totals.update(run_seed(plan, before.children))
                before.check()
        except BaseException:
            traceback.print_exc()
            print(f"FAILED {text}", file=sys.stderr, flush=True)
            os._exit(1)  # threads that are left must not hold up the end
        totals["seeds"] += 1
        totals[plan.source] += 1
        for segment in plan.segments:
            totals[segment.kind] += 1
        if options.verbose:
            print(f"{seed}: {time.monotonic() - began:.2f} s", flush=True)
        seed += 1
    minutes = (time.monotonic() - started) / 60
    print(f"{totals['seeds'] / minutes:.0f} seeds a minute: {dict(totals)}, seeds {first} to {seed - 1}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
