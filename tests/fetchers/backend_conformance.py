"""What every backend of fetchers promises, seen through the public API. A backend's tests subclass `BackendConformance`."""

from __future__ import annotations

import itertools
import logging
import os
import random
import select
import socket
import threading
import time
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from gates import HANG_SECONDS, register
from self_certifying import CertifiedFetch, Witness, make_chunk

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


class ThreadCounter:
    """Counts the calls of `add`."""

    def __init__(self, start: int = 0) -> None:
        self.value = start
        self._lock = threading.Lock()

    def add(self) -> int:
        with self._lock:
            self.value += 1
            return self.value - 1


class NeedsArguments(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("two arguments")


class TextRaises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class HoldsALock(Exception):
    def __init__(self) -> None:
        super().__init__("unpicklable")
        self.lock = threading.Lock()


ERRORS: dict[str, tuple[BaseException, str]] = {
    "an ordinary error": (ValueError("bad file 7"), "ValueError: bad file 7"),
    "an error without text": (KeyError(), "KeyError"),
    "a class that needs arguments": (NeedsArguments(1, 2), "NeedsArguments: two arguments"),
    "a text that raises": (TextRaises(), "TextRaises: <its __str__ raised RuntimeError>"),
    "an error that cannot be pickled": (HoldsALock(), "HoldsALock: unpicklable"),
    "ten megabytes of text": (OSError("x" * 10_000_000), "OSError: xxx"),
    "a group": (ExceptionGroup("several", [ValueError("one"), OSError("two")]), "ExceptionGroup: several"),
    "out of memory": (MemoryError("no more"), "MemoryError: no more"),
    "StopIteration": (StopIteration(3), "StopIteration: 3"),
    "SystemExit": (SystemExit(3), "SystemExit: 3"),
    "KeyboardInterrupt": (KeyboardInterrupt("in a fetcher"), "KeyboardInterrupt: in a fetcher"),
    "GeneratorExit": (GeneratorExit("closed"), "GeneratorExit: closed"),
    "our own timeout": (iw.WaitTimeout("of another source"), "WaitTimeout: of another source"),
    "our own end": (iw.QueueClosed("of another source"), "QueueClosed: of another source"),
}


class Scatter:
    """Lets calls go in a random order, wherever they run: each connects here and waits for an answer.

    Nobody is let go before as many wait as can; a short silence says that no more will come.
    """

    _numbers = itertools.count()

    def __init__(self, seed: int, together: int) -> None:
        self.address = f"\0input-workers-tests-{os.getpid()}-{next(self._numbers)}"
        self.order: list[int] = []  # the requests, as they were let go
        self._random = random.Random(seed)
        self._together = together
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._thread.join(HANG_SECONDS)
        for each in (self._listener, self._ended):
            each.close()

    def _run(self) -> None:
        waiting: list[socket.socket] = []
        while True:
            ready, _, _ = select.select([self._listener, self._ended], [], [], 0.01 if waiting else None)
            if self._ended in ready:
                break
            if ready:
                waiting.append(self._listener.accept()[0])
            if waiting and (not ready or len(waiting) >= self._together):
                with waiting.pop(self._random.randrange(len(waiting))) as call:
                    self.order.append(int.from_bytes(call.recv(8), "little"))
                    call.sendall(b"!")
        for call in waiting:
            call.close()


class Scattered:
    """A source with random numbers of its requests, whose calls come back in the order that a Scatter gives."""

    def __init__(self, rows: int, address: str) -> None:
        self.rows, self.address = rows, address

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        with socket.socket(socket.AF_UNIX) as call:
            call.connect(self.address)
            call.sendall(request.index.to_bytes(8, "little"))
            call.recv(1)
        return [rows.copy(), request.rng.normal(size=(len(rows), 3))]


def make_error(what: str) -> BaseException:
    """Return the error of this name; raised in here, so that its traceback can be looked for."""
    raise ERRORS[what][0]


def error_text(error: BaseException) -> str:
    return "" if isinstance(error, TextRaises) else str(error)


class BackendConformance:
    """Subclass it with the backend's `fetchers`, and with fewer `counts` where many are dear.

    What a test shares with the fetchers comes from the methods below.
    """

    fetchers: ClassVar[Any]
    keeps_classes = True  # an exception comes out as the very object that was raised
    exits_are_deaths = False  # sys.exit() ends the fetcher
    ends_by_itself = True  # a fetcher is not cut short when another has failed
    shares_workers = True  # state of the function is that of all fetchers

    def counter(self, start: int = 0) -> Any:
        """Return what counts in the test and in every fetcher: `add()` returns the number before; `value`."""
        return ThreadCounter(start)

    def barrier(self, parties: int) -> Any:
        """Return what lets so many fetchers `wait(timeout_s)` for each other."""
        return threading.Barrier(parties)

    def made_of(self, fetch: CertifiedFetch, source: Any) -> int:
        """Return how many rows the function has returned."""
        return sum(fetch.made.values())

    counts: ClassVar[tuple[int, ...]] = (1, 2, 7, 64)

    def register(self, coordinator: iw.GlobalCoordinator, fetch: Any, batch_size: int = 4, **more: Any) -> Any:
        return register(coordinator, fetch, batch_size, fetchers=self.fetchers, **more)

    @pytest.mark.parametrize("workers", [1, 3, 8])
    def test_every_row_arrives_exactly_once_and_in_its_workers_order(
        self, coordinator: iw.GlobalCoordinator, workers: int
    ) -> None:
        fetch = CertifiedFetch(lambda worker, call: 1 + (worker * 7 + call * 5) % 23 if call < 60 else None, end_of_data)
        source = self.register(coordinator, fetch, 16, num_workers=workers, last_batch="keep")
        coordinator.start()
        witness = Witness()
        for batch in source:
            witness.see(batch)
        witness.assert_complete()
        wanted = sum(1 + (worker * 7 + call * 5) % 23 for worker in coordinator.get_worker_ids() for call in range(60))
        assert witness.rows == wanted == source.stats().rows_delivered == self.made_of(fetch, source)

    def test_the_stream_ends_when_the_last_worker_ends_however_unlike_their_lengths(
        self, coordinator: iw.GlobalCoordinator
    ) -> None:
        workers = 4
        fetch = CertifiedFetch(lambda worker, call: 3 if call < worker * worker * 20 else None, end_of_data)
        source = self.register(coordinator, fetch, 8, num_workers=workers, last_batch="keep")
        coordinator.start()
        witness = Witness()
        for batch in source:
            witness.see(batch)
        witness.assert_complete()
        assert witness.rows == 3 * 20 * sum(worker * worker for worker in coordinator.get_worker_ids())
        for _ in range(3):
            with pytest.raises(iw.EndOfData):
                source.next_batch()
            assert list(source) == []

    @pytest.mark.parametrize("what", ERRORS)
    @pytest.mark.parametrize("workers", [1, 4])
    def test_an_error_is_raised_where_batches_are_read_after_what_came_before_it(
        self, coordinator: iw.GlobalCoordinator, what: str, workers: int
    ) -> None:
        error, text = ERRORS[what]
        if self.exits_are_deaths and isinstance(error, SystemExit):
            return  # it ends the fetcher, which is another one's test
        failures = self.counter()

        def fail() -> Any:
            if failures.add() == 0:
                raise make_error(what)
            raise iw.EndOfData

        fetch = CertifiedFetch(lambda worker, call: 5 if call < 3 else None, fail)
        source = self.register(coordinator, fetch, 5, num_workers=workers)
        coordinator.start()
        witness = Witness()
        seen = []
        for _ in range(3):
            with pytest.raises(iw.FetchFailed) as caught:  # noqa: PT012
                while True:
                    witness.see(source.next_batch(), 5)
            seen.append(caught.value)
        assert 15 <= witness.rows <= 15 * workers
        assert len(set(map(id, seen))) == 3, "each raise is a new exception"
        if self.keeps_classes:
            assert all(type(each.__cause__) is type(error) for each in seen)
        else:
            assert all(type(each.__cause__).__name__ == type(error).__name__ for each in seen)
            assert all("raised in worker process" in each.__cause__.__notes__[-1] for each in seen)
            assert all("make_error" in each.__cause__.__notes__[-1] for each in seen if len(str(error_text(error))) < 1000)
        assert len({id(each.__cause__) for each in seen}) == 1, "with the same cause"
        assert text in str(seen[0])
        assert str(seen[0]).startswith("source 'train', worker ")
        assert len(str(seen[0])) < 70_000
        assert "source: 'train'" in seen[0].__notes__
        assert sum(source.stats().fetch_errors.values()) == 1

    def test_when_all_fail_at_once_one_is_the_cause_and_the_others_are_attached(
        self, coordinator: iw.GlobalCoordinator
    ) -> None:
        workers = 4
        together = self.barrier(workers)

        def fetch(worker_id: int, batch_size: int) -> Any:
            together.wait(HANG_SECONDS)
            raise ValueError(f"worker {worker_id} of four")

        source = self.register(coordinator, fetch, num_workers=workers)
        coordinator.start()
        with pytest.raises(iw.FetchFailed) as caught:
            source.next_batch()
        assert coordinator.stop()
        with pytest.raises(iw.QueueClosed) as closed:
            source.next_batch()
        final = closed.value.__cause__
        assert isinstance(final, iw.FetchFailed)
        texts = [str(final), *(note for note in final.__notes__ if note.startswith("later: "))]
        told = [any(f"worker {worker} of four" in text for text in texts) for worker in coordinator.get_worker_ids()]
        assert sum(told) == source.stats().fetch_errors["ValueError"] == len(texts)
        assert sum(told) == workers or not self.ends_by_itself
        assert str(caught.value) == str(final)

    @pytest.mark.parametrize("empty", ["None", "zero rows"])
    def test_no_data_now_costs_little_and_says_little(
        self, coordinator: iw.GlobalCoordinator, caplog: pytest.LogCaptureFixture, empty: str
    ) -> None:
        calls = self.counter()

        def fetch(worker_id: int, batch_size: int) -> Any:
            calls.add()
            return None if empty == "None" else make_chunk(worker_id, 0, 0)

        source = self.register(coordinator, fetch, num_workers=2)
        with caplog.at_level(logging.DEBUG, "input_workers"):
            coordinator.start()
            cpu = time.process_time()
            with pytest.raises(iw.WaitTimeout, match=r"train: no batch within 1 s"):
                source.next_batch(1.0)
            cpu = time.process_time() - cpu
        assert cpu < 5 * 0.05, f"{cpu:.2f} s of a core within a second of nothing"
        assert 4 < calls.value < 100, "asked again, with longer and longer pauses"
        assert len(caplog.records) <= 5

    def test_data_that_come_after_a_pause_are_fetched(self, coordinator: iw.GlobalCoordinator) -> None:
        fetch = CertifiedFetch(lambda worker, call: 4 if call < 20 else None, end_of_data)
        turns = self.counter(1)

        def now_and_then(worker_id: int, batch_size: int) -> Any:
            return None if turns.add() % 3 else fetch(worker_id, batch_size)

        source = self.register(coordinator, now_and_then, 4)
        coordinator.start()
        witness = Witness()
        for batch in source:
            witness.see(batch, 4)
        assert witness.rows == 80

    def test_what_was_fetched_when_one_worker_fails_is_delivered_and_the_rest_is_accounted_for(
        self, coordinator: iw.GlobalCoordinator
    ) -> None:
        def fail() -> Any:
            raise OSError("the last of them")

        fetch = CertifiedFetch(lambda worker, call: 3 if call < 10 else None, fail)
        source = self.register(coordinator, fetch, 4, num_workers=3)
        coordinator.start()
        witness = Witness()
        with pytest.raises(iw.FetchFailed):  # noqa: PT012
            while True:
                witness.see(source.next_batch(), 4)
        assert coordinator.stop()
        stats = source.stats()
        assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values())
        assert stats.rows_delivered == witness.rows
        if self.shares_workers:
            assert stats.rows_fetched == self.made_of(fetch, source)
        assert "OSError: the last of them" in coordinator.last_stop.failures["train"]

    @pytest.mark.parametrize("seed", [0, 1, 20_000])
    @pytest.mark.parametrize("epoch_end", ["run_on", "break"])
    def test_ordered_streams_are_the_same_bits_however_many_fetch_and_in_whatever_order_they_finish(
        self, seed: int, epoch_end: str
    ) -> None:
        streams: list[list[tuple[int, bytes, bytes]]] = []
        orders: list[list[int]] = []
        for workers in self.counts:
            coordinator = iw.GlobalCoordinator()
            with Scatter(seed, min(workers, 4)) as scatter:
                stream = iw.Stream(Scattered(150, scatter.address), True, seed, 2, rows_per_request=7, epoch_end=epoch_end)
                source = self.register(
                    coordinator, stream, 8, num_workers=workers, ordered=True, last_batch="keep", max_buffered_batches=5
                )
                with coordinator:
                    batches = [batch for _ in range(3) for batch in source]
                orders.append(scatter.order)
            assert coordinator.last_stop.failures == {}
            assert source.stats().rows_delivered == 300
            streams.append([(batch.epoch, batch.data.tobytes(), batch.label.tobytes()) for batch in batches])
        assert all(each == streams[0] for each in streams)
        assert orders[0] == sorted(orders[0])
        assert all(order != sorted(order) for order in orders[1:]), "nothing was out of order, so nothing was shown"
        assert {row for _, data, _ in streams[0] for row in np.frombuffer(data, np.int64).tolist()} == set(range(150))

    @pytest.mark.parametrize("at", [0, 5, 21])
    def test_ordered_a_failure_stands_at_its_request(self, coordinator: iw.GlobalCoordinator, at: int) -> None:
        with Scatter(at, 3) as scatter:
            source = self.register(
                coordinator, iw.Stream(FailsAt(150, scatter.address, at), rows_per_request=7), 7, num_workers=4, ordered=True
            )
            coordinator.start()
            rows: list[int] = []
            with pytest.raises(iw.FetchFailed, match=rf"request {at}: ValueError: at {at}"):  # noqa: PT012
                while True:
                    rows += source.next_batch().data.tolist()
            assert rows == [*range(7 * at)]
            assert coordinator.stop()


class FailsAt(Scattered):
    """Fails in one request, and in all that follow."""

    def __init__(self, rows: int, address: str, at: int) -> None:
        super().__init__(rows, address)
        self.at = at

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        arrays = super().fetch(rows, request)
        if request.index >= self.at:
            raise ValueError(f"at {request.index}")
        return arrays
