"""An assembly against a model: any sequence of steps, each one known, because fetchers are held and let go one by one."""

from __future__ import annotations

import collections
import queue

from flow.assembly_driver import Driver, Placing, spin_until
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from self_certifying import ROW, WORKER, Witness, check_batch

from input_workers.flow.batches import OpenBatch


class HeldCopies:
    """Holds the copies of some workers' rows at the target until they are let go."""

    def __init__(self) -> None:
        self.held: dict[int, queue.SimpleQueue[None]] = {}

    def __call__(self, key: object, value: object) -> None:
        gate = self.held.get(int(value[0, WORKER]))  # type: ignore[index]
        if gate is not None:
            gate.get(timeout=20)
            gate.put(None)


class ModelBatch:
    def __init__(self, rows: int) -> None:
        self.rows, self.filled, self.is_closed = rows, 0, False
        self.writers: set[int] = set()  # whose copies are held back


class Machine(RuleBasedStateMachine):
    """The model: batches that are laid out, a line of fetchers, and the rows in the order in which they were reserved."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = HeldCopies()
        self.witness = Witness()
        self.placings: dict[int, Placing] = {}
        self.calls: collections.Counter[int] = collections.Counter()
        self.batches: collections.deque[ModelBatch] = collections.deque()
        self.line: list[list[int]] = []  # [worker, rows that are not reserved]
        self.order: collections.deque[tuple[int, int]] = collections.deque()
        self.copying: set[int] = set()  # held back in their first copy
        self.rows = dict.fromkeys(("placed", "taken", "aborted", "unplaced"), 0)
        self.closed = False

    @initialize(batch_size=st.integers(1, 5), max_batches=st.integers(1, 4))
    def make(self, batch_size: int, max_batches: int) -> None:
        self.driver = Driver(batch_size, max_batches=max_batches, on_copy=self.copies)

    # ---- the model

    def _reserve(self) -> None:
        """Let those in line have the room that there is; one that has more rows goes to the end of the line."""
        while self.line and not self.closed:
            worker, left = self.line[0]
            before = left
            placing = self.placings[worker]
            for batch in self.batches:
                count = min(left, batch.rows - batch.filled)
                if count and not batch.is_closed:
                    first = placing.rows - left
                    self.order.extend((worker, row) for row in range(first, first + count))
                    batch.filled += count
                    left -= count
                    if worker in self.copies.held:
                        batch.writers.add(worker)
                        self.copying.add(worker)
            if left == before:
                return
            del self.line[0]
            if left:
                self.line.append([worker, left])
                return

    def _await_model(self) -> None:
        """Wait until the fetchers have come as far as the model says."""
        self._reserve()
        waiting = {worker for worker, _ in self.line}
        ended = {worker for worker in self.placings if worker not in waiting | self.copying}
        for worker in sorted(ended):
            answer = self.placings.pop(worker).await_end()
            self.rows["unplaced"] += answer.rows if answer is not None else 0
        held = sum(batch.filled for batch in self.batches)
        threads = [placing.thread for placing in self.placings.values()]
        spin_until(lambda: self.driver.assembly.charged[0] == held, threads)
        # Rows are reserved for one in line before it wakes up and copies.
        copied = lambda: all(  # noqa: E731
            real.copied == real.filled
            for real, model in zip(self.driver.window.batches(), self.batches, strict=True)
            if not model.writers
        )
        spin_until(copied, threads)
        for worker in waiting - self.copying:
            self.placings[worker].await_blocked()  # what it got has been copied
        assert all(thread.is_alive() for thread in threads), "one did not wait"

    # ---- the fetchers

    @precondition(lambda self: len(self.placings) < 4)
    @rule(data=st.data(), rows=st.integers(1, 12), is_held=st.booleans())
    def place(self, data: st.DataObject, rows: int, is_held: bool) -> None:
        worker = data.draw(st.sampled_from([each for each in range(4) if each not in self.placings]))
        if is_held and not self.closed:
            self.copies.held[worker] = queue.SimpleQueue()
        waits = self.driver.assembly.has_waiters
        placing = self.placings[worker] = Placing(self.driver, worker, rows, self.calls[worker])
        self.calls[worker] += 1
        self.rows["placed"] += rows
        if not self.closed:
            self.line.append([worker, rows])
            room = sum(batch.rows - batch.filled for batch in self.batches if not batch.is_closed)
            if waits or not room:  # the next to come must find it in line
                placing.await_blocked()
        self._await_model()

    @precondition(lambda self: self.copies.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.copies.held)))
        self.copies.held.pop(worker).put(None)
        self.copying.discard(worker)
        for batch in self.batches:
            batch.writers.discard(worker)
        self._await_model()

    # ---- the enqueuer

    @rule()
    def lay_out(self) -> None:
        rows = self.driver.batch_size
        if self.driver.assembly.wants_batch(rows, 0):
            assert not self.closed
            assert self.driver.assembly.lay_out(self.driver.make_batch(), 0)
            self.batches.append(ModelBatch(rows))
            assert len(self.batches) == 1 or sum(batch.rows for batch in self.batches) <= self.driver.max_rows
        self._await_model()

    @rule()
    def take(self) -> None:
        item = self.driver.take()
        first = self.batches[0] if self.batches else None
        is_full = first is not None and (first.filled == first.rows or first.is_closed)
        if first is None or not is_full or first.writers:
            assert item is None
            return
        assert isinstance(item, OpenBatch)
        self.batches.popleft()
        assert (item.rows, item.filled) == (first.rows, first.filled)
        seen = [(row[WORKER], row[ROW]) for row in self.witness.see(self.driver.taken[-1], first.filled).tolist()]
        assert seen == [self.order.popleft() for _ in range(first.filled)]
        self.rows["taken"] += first.filled
        self._await_model()

    @rule(batch_size=st.integers(1, 5))
    def lay_out_anew(self, batch_size: int) -> None:
        discarded = self.driver.assembly.discard_empty()
        empty = [batch for batch in self.batches if not batch.filled]
        assert discarded == len(empty)
        self.batches = collections.deque(batch for batch in self.batches if batch.filled)
        self.driver.batch_size = batch_size

    @rule()
    def watch_and_take(self) -> None:
        """What the enqueuer does before it sleeps: if there is something to take, it need not."""
        self.driver.assembly.watch()
        self.take()

    # ---- the ends

    @precondition(lambda self: self.rows["placed"] > 20)
    @rule()
    def close(self) -> None:
        self.driver.assembly.close()
        self._close()
        self._await_model()

    @precondition(lambda self: self.rows["placed"] > 20)
    @rule()
    def abort(self) -> None:
        aborted = self.driver.assembly.abort()
        assert aborted == sum(batch.filled for batch in self.batches)
        self.rows["aborted"] += aborted
        self._close()
        self.batches.clear()
        self.order.clear()
        self._await_model()

    def _close(self) -> None:
        self.closed = True
        self.line.clear()
        self.batches = collections.deque(batch for batch in self.batches if batch.filled)
        for batch in self.batches:
            batch.is_closed = batch.filled < batch.rows or batch.is_closed

    @invariant()
    def nothing_is_in_two_places(self) -> None:
        if hasattr(self, "driver"):
            assert len(self.order) == sum(batch.filled for batch in self.batches) == self.driver.assembly.charged[0]
            assert self.driver.assembly.closed == self.closed
            assert self.driver.assembly.drained == (self.closed and not self.batches)

    def teardown(self) -> None:
        for gate in self.copies.held.values():
            gate.put(None)
        self.rows["aborted"] += self.driver.assembly.abort()
        for placing in self.placings.values():
            answer = placing.await_end()
            self.rows["unplaced"] += answer.rows if answer is not None else 0
        assert self.rows["placed"] == self.rows["taken"] + self.rows["aborted"] + self.rows["unplaced"]
        assert sum(len(check_batch(batch)) for batch in self.driver.taken) == self.rows["taken"]


TestMachine = Machine.TestCase
# What hangs takes seconds to be noticed, so sequences are not made shorter.
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, phases=[Phase.generate])
