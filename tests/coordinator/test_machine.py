"""A source against a model: any sequence of steps, each one known because every fetch waits at a gate."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from self_certifying import Witness

import input_workers as iw


class Source:
    """A registered source, what its gate was told, and what its witness saw."""

    def __init__(self, coordinator: iw.GlobalCoordinator, number: int, workers: int, batch_size: int) -> None:
        self.gate = Gate(number)
        self.handle = register(coordinator, self.gate, batch_size, name=f"source_{number}", num_workers=workers,
                               max_buffered_batches=64, device_queue_depth=64)  # fmt: skip
        self.witness = Witness(number)
        self.workers = list(range(len(coordinator.get_worker_ids()) - workers, len(coordinator.get_worker_ids())))
        self.batch_size = batch_size
        self.sizes = {batch_size}
        self.alive: set[int] = set()
        self.failed: BaseException | None = None
        self.released = 0  # rows of this run
        self.delivered = 0  # of this run
        self.last: collections.Counter[str] = collections.Counter()


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.coordinator = iw.GlobalCoordinator()
        self.sources: list[Source] = []
        self.running = False
        self.started: list[Source] = []

    @initialize(workers=st.integers(1, 3), batch_size=st.integers(1, 6))
    def register_first(self, workers: int, batch_size: int) -> None:
        self.sources.append(Source(self.coordinator, 0, workers, batch_size))
        self.start()

    @precondition(lambda self: len(self.sources) < 3)
    @rule(workers=st.integers(1, 3), batch_size=st.integers(1, 6))
    def register(self, workers: int, batch_size: int) -> None:
        self.sources.append(Source(self.coordinator, len(self.sources), workers, batch_size))
        with pytest.raises(iw.ConfigError):
            register(self.coordinator, Gate(), name="source_0")

    @rule()
    def start(self) -> None:
        self.coordinator.start()
        for source in self.sources:
            if not self.running or source not in self.started:
                source.alive, source.failed = set(source.workers), None
                source.released = source.delivered = 0
                source.witness.gap(source.workers)
                source.gate.await_calls(len(source.alive))
        self.started, self.running = list(self.sources), True

    def _pick(self, data: st.DataObject) -> Source | None:
        ready = [source for source in self.started if source.alive and source.failed is None] if self.running else []
        return data.draw(st.sampled_from(ready)) if ready else None

    @rule(data=st.data(), rows=st.integers(1, 20))
    def release(self, data: st.DataObject, rows: int) -> None:
        source = self._pick(data)
        if source is not None:
            source.gate.release(rows, data.draw(st.sampled_from(sorted(source.alive))))
            source.gate.await_calls(len(source.alive))
            source.released += rows

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        source = self._pick(data)
        if source is not None:
            worker = data.draw(st.sampled_from(sorted(source.alive)))
            source.gate.end(worker)
            source.alive.discard(worker)
            source.gate.await_calls(len(source.alive))

    @rule(data=st.data())
    def raise_in(self, data: st.DataObject) -> None:
        source = self._pick(data)
        if source is not None:
            source.failed = OSError("disk gone")
            before = sum(source.handle.stats().fetch_errors.values())
            source.gate.raise_in(source.failed, data.draw(st.sampled_from(sorted(source.alive))))
            await_true(lambda: sum(source.handle.stats().fetch_errors.values()) > before, "the failure is recorded")

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 5))
    def consume(self, data: st.DataObject, count: int) -> None:
        source = data.draw(st.sampled_from(self.started))
        ended = source.failed is not None or not source.alive
        for _ in range(count):
            left = source.released - source.delivered
            try:
                batch = source.handle.next_batch(HANG_SECONDS if ended or left >= max(source.sizes) else 0)
            except iw.WaitTimeout:
                assert not ended
                assert left < max(source.sizes), "enough rows, and no batch"
            except iw.EndOfData:
                assert source.failed is None
                assert not source.alive
                assert left < max(source.sizes), "a complete batch was not delivered"
            except iw.FetchFailed as error:
                assert error.__cause__ is source.failed  # noqa: PT017
                assert left < max(source.sizes)
            else:
                assert batch.valid_rows in source.sizes
                source.witness.see(batch, batch.valid_rows)
                source.delivered += batch.valid_rows
                assert source.delivered <= source.released

    @precondition(lambda self: self.running)
    @rule(data=st.data(), batch_size=st.integers(1, 6))
    def resize_batch(self, data: st.DataObject, batch_size: int) -> None:
        source = data.draw(st.sampled_from(self.started))
        self.coordinator.reset_data_input("", source.handle.name, "numpy", batch_size)
        source.batch_size = batch_size
        source.sizes.add(batch_size)

    @rule()
    def stop(self) -> None:
        for source in self.sources:
            source.gate.open()
        assert self.coordinator.stop(HANG_SECONDS), self.coordinator.last_stop
        for source in self.sources:
            source.gate.shut()
        if self.running:
            report = self.coordinator.last_stop
            failed = {source.handle.name for source in self.started if source.failed is not None}
            assert set(report.failures) == failed, report
        for source in self.started:
            stats = source.handle.stats()
            assert stats.rows_in_flight == 0, stats.ledger
            assert (stats.queue_depth, stats.queue_bytes, stats.device_queue_depth) == (0, 0, 0)
            source.sizes = {source.batch_size}
            with pytest.raises(iw.QueueClosed):
                source.handle.next_batch()
        self.running = False

    @invariant()
    def the_ledger_adds_up_and_no_counter_falls(self) -> None:
        for source in self.sources:
            stats = source.handle.stats()
            assert stats.rows_in_flight >= 0
            assert stats.rows_fetched <= source.gate.released_rows
            assert stats.rows_delivered == source.witness.rows
            now: dict[str, Any] = {"fetched": stats.rows_fetched, "delivered": stats.rows_delivered,
                                   "batches": stats.batches_delivered, **stats.rows_dropped}  # fmt: skip
            assert all(now[key] >= source.last[key] for key in now), (now, source.last)
            source.last.update({key: now[key] - source.last[key] for key in now})

    def teardown(self) -> None:
        self.stop()
        for source in self.sources:
            assert source.handle.stats().rows_fetched == source.gate.released_rows


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30)
