"""What must have been delivered: the rows that were read, against those that the plan says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from chaos.stress_plan import Plan
from chaos.stress_rows import EPOCH_SHIFT, PROCESS_MASK, WORKER_SHIFT, PlainRows

import input_workers as iw

ROW_MASK = (1 << EPOCH_SHIFT) - 1


@dataclass(frozen=True)
class Batch:
    """What is kept of a batch that was read."""

    device: int
    ids: np.ndarray  # of its real rows
    size: int
    marks: int  # how often its device had said EndOfData in this run


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *pieces])


def _in_order(run: Any) -> np.ndarray | None:
    """Return the rows of a run in the order in which they were laid out, or None if that is not known."""
    logs: list[list[Batch]] = run.logs
    devices = len(run.segment.batch_sizes)
    if len(logs) == 1:
        return _joined([batch.ids for batch in logs[0]])
    # A thread for each device: batches are dealt in turn, where no device was stopped before another.
    if len(logs) == devices and run.ended and run.plan.epoch_end == "run_on":
        turns = itertools.zip_longest(*logs)
        return _joined([batch.ids for turn in turns for batch in turn if batch is not None])
    return None


def check_rows(plan: Plan, runs: Sequence[Any]) -> None:
    """Raise AssertionError unless the rows of all runs together are those of the plan, in its order."""
    assert (runs[-1].failure is not None) == _must_fail(plan, runs[-1]), f"failure: {runs[-1].failure!r}"
    failure = runs[-1].failure
    assert failure is None or (isinstance(failure, iw.FetchFailed) and "fatal" in str(failure)), f"failure: {failure!r}"
    assert all(run.failure is None for run in runs[:-1])
    read = _joined([batch.ids for run in runs for log in run.logs for batch in log])
    assert len(np.unique(read)) == len(read), f"repeated: {_twice(read)}"
    orders = [_in_order(run) for run in runs]
    order = None if any(each is None for each in orders) else _joined([each for each in orders if each is not None])
    missing = (_check_plain if plan.source == "plain" else _check_stream)(plan, runs, read, order)
    if not runs[-1].ended or runs[-1].failure is not None:
        return
    largest = max(sum(max(sizes) for sizes in run.sizes) for run in runs)  # batches that the devices get in turn
    if plan.last_batch != "drop" or not plan.rebatch:
        assert not any(missing), f"rows of each epoch that are missing: {missing}"
    assert max(missing, default=0) < largest, f"rows of each epoch that are missing: {missing}, of {largest} at most"
    stats = runs[-1].coordinator["train"].stats()
    # With "auto" the rows of a worker may all be among those that fill no batch: then it is not known that it worked.
    unknown_worker = plan.source == "plain" and runs[0].segment.workers == "auto"
    if len(runs) == 1 and not runs[0].segment.kills and not unknown_worker:
        assert stats.rows_dropped["final_partial"] == sum(missing), f"{missing} are missing: {stats.ledger}"


def _must_fail(plan: Plan, run: Any) -> bool:
    """Whether the last run had to end with a failure. Only a plan with a fatal call can fail, if there is such a call."""
    if plan.outcome != "fatal":
        return False
    if isinstance(run.fetch, PlainRows):
        return any(run.fetch.calls_of(worker) > plan.faults.fatal for worker in run.coordinator.get_worker_ids() or [0])
    rows = plan.rows_per_request or run.segment.batch_sizes[0]
    order = reference_order(plan)
    _, counts = np.unique(order >> EPOCH_SHIFT, return_counts=True)
    requests = -(-len(order) // rows) if plan.source == "mix" else sum(-(-count // rows) for count in counts.tolist())
    return requests > plan.faults.fatal


def _twice(ids: np.ndarray) -> list[int]:
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1][:5].tolist()


def reference_order(plan: Plan) -> np.ndarray:
    """Return the ids of the Stream in order, read in the simplest way, after checking that they are the right ones."""
    shards = range(plan.shard[1]) if plan.source == "stream" else [plan.shard[0]]
    by_shard = {shard: _read_simply(plan, shard) for shard in shards}
    if plan.source == "stream":
        together = _joined(list(by_shard.values()))
        for epoch in range(plan.epochs):
            rows = np.sort(together[together >> EPOCH_SHIFT & 0xFF == epoch] & ROW_MASK)
            if plan.last_batch == "drop":  # those that do not divide are left out
                assert len(rows) == plan.rows // plan.shard[1] * plan.shard[1]
                assert len(np.unique(rows)) == len(rows)
            elif plan.last_batch == "keep":
                assert np.array_equal(rows, np.arange(plan.rows)), "an epoch is not all rows"
            else:
                assert np.array_equal(np.unique(rows), np.arange(plan.rows)), "an epoch is not all rows"
            if not plan.shuffle and plan.shard[1] == 1:
                assert (np.diff(together[together >> EPOCH_SHIFT & 0xFF == epoch]) > 0).all()
    return by_shard[plan.shard[0]]


def _read_simply(plan: Plan, shard: int) -> np.ndarray:
    """Read a shard in this thread: without faults, and with nothing left over."""
    stream = plan.make_fetch("")
    if plan.source == "stream":
        stream = iw.Stream(stream.source, plan.shuffle, plan.seed, plan.epochs, (shard, plan.shard[1]), 500)
    coordinator = iw.GlobalCoordinator()
    drop = plan.last_batch == "drop"  # it decides how many rows a shard has
    iw.init_data_input_workers("numpy", ["id"], stream, 500, 0, "reference", rebatch=not drop, last_batch=plan.last_batch,
                               coordinator=coordinator)  # fmt: skip
    with coordinator:
        return _joined([batch.id[: batch.valid_rows] for batch in coordinator["reference"]])


def _check_stream(plan: Plan, runs: Sequence[Any], read: np.ndarray, order: np.ndarray | None) -> list[int]:
    """Check the rows of a Stream or a Mix; return how many are missing, of each epoch where it stands for itself."""
    reference = reference_order(plan)
    assert len(np.unique(reference)) == len(reference), "the reference repeats rows"
    expected = reference[~np.isin(reference & ROW_MASK, list(plan.faults.bad))] if plan.faults.bad else reference
    place = {row: index for index, row in enumerate(expected.tolist())}
    assert np.isin(read, expected).all(), f"rows that are none of this run: {read[~np.isin(read, expected)][:5]}"
    last = runs[-1]
    if last.ended and len(runs) == 1:
        stats = last.coordinator["train"].stats()
        bad = len(reference) - len(expected)
        assert stats.rows_dropped["skipped_error"] == bad, f"{bad} rows are bad: {stats.ledger}"
        assert stats.rows_fetched == len(reference), f"{len(reference)} rows: {stats.ledger}"
    groups = [expected]
    if plan.epoch_end == "break":
        groups = [expected[expected >> EPOCH_SHIFT & 0xFF == epoch] for epoch in range(plan.epochs)]
    if plan.ordered:
        for run in runs:
            for log in run.logs:
                places = [place[row] for batch in log for row in batch.ids.tolist()]
                assert all(a < b for a, b in itertools.pairwise(places)), "a reader's rows are not in order"
        # After a stop with several devices, or readers, what was delivered has gaps, which the next run fills.
        if order is not None and all(len(run.logs) == len(run.segment.batch_sizes) == 1 or len(runs) == 1 for run in runs):
            for group in groups:
                mine = order[np.isin(order, group)]
                assert np.array_equal(mine, group[: len(mine)]), "the order is not that of the requests"
    elif order is not None and len(runs) == 1 and plan.rows_per_request and not plan.skip:
        _check_requests(plan, reference, order)
    return [int(len(group) - np.isin(group, read).sum()) for group in groups]


def _check_requests(plan: Plan, reference: np.ndarray, order: np.ndarray) -> None:
    """Check that the rows of each request came in order, and with nothing of the same fetcher between them."""
    epochs = reference >> EPOCH_SHIFT & 0xFF if plan.source == "stream" else np.zeros(len(reference), np.int64)
    begins = {int(epoch): int(np.flatnonzero(epochs == epoch)[0]) for epoch in np.unique(epochs)}
    last: dict[tuple[int, int], int] = {}
    where = {row: index for index, row in enumerate(reference.tolist())}
    for row in order.tolist():
        index = where[row]
        epoch = int(epochs[index])
        offset = index - begins[epoch]
        request = epoch, offset // plan.rows_per_request
        assert last.get(request, -1) < offset, f"the rows of request {request} are not in order"
        last[request] = offset


def _check_plain(plan: Plan, runs: Sequence[Any], read: np.ndarray, order: np.ndarray | None) -> list[int]:
    """Check the rows of a plain function; return how many are missing in all."""
    run = runs[0]
    workers = set(run.coordinator.get_worker_ids())
    if run.segment.workers == "auto":  # some may never have been at work
        workers = set((read >> WORKER_SHIFT & 0xFF).tolist())
    workers = workers or {0}
    missing = 0
    whole = run.ended or len(run.logs) == len(run.segment.batch_sizes) == 1
    rows = read if order is None else order
    for worker in workers:
        expected = run.fetch.expected(worker)
        mine = rows[rows >> WORKER_SHIFT & 0xFF == worker]
        found = [0]
        # The process that was started in place of a killed one begins with the worker's first call.
        for process in np.unique(mine & PROCESS_MASK).tolist():
            ids = mine[mine & PROCESS_MASK == process] & ~PROCESS_MASK
            if order is None:
                ids = np.sort(ids)
            if whole:
                assert np.array_equal(ids, expected[: len(ids)]), f"worker {worker}: rows are lost or not in order"
            assert np.isin(ids, expected).all(), f"worker {worker}: rows that it never returned"
            found.append(len(ids))
        missing += len(expected) - max(found)
    for log in run.logs:
        ids = _joined([batch.ids for batch in log])
        for key in np.unique(ids >> WORKER_SHIFT & 0xFF).tolist():
            mine = ids[ids >> WORKER_SHIFT & 0xFF == key]
            for process in np.unique(mine & PROCESS_MASK).tolist():
                assert (np.diff(mine[mine & PROCESS_MASK == process]) > 0).all(), f"worker {key}: not in order"
    assert set((read >> WORKER_SHIFT & 0xFF).tolist()) <= workers, "rows of workers that do not exist"
    return [missing]
