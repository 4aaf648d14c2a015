"""What every backend of fetchers promises, seen through the public API. A backend's tests subclass `BackendConformance`."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, ClassVar

import pytest
from gates import HANG_SECONDS, register
from self_certifying import CertifiedFetch, Witness, make_chunk

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


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


class BackendConformance:
    """Subclass it with the backend's `fetchers`."""

    fetchers: ClassVar[Any]

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
        assert witness.rows == sum(fetch.made.values()) == source.stats().rows_delivered
        assert len(fetch.made) == workers

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

        def fail() -> Any:
            if first.acquire(blocking=False):
                raise error
            raise iw.EndOfData

        first = threading.Semaphore(1)
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
        assert all(type(each.__cause__) is type(error) for each in seen)
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
        together = threading.Barrier(workers)

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
        assert all(any(f"worker {worker} of four" in text for text in texts) for worker in coordinator.get_worker_ids())
        assert str(caught.value) == str(final)
        assert source.stats().fetch_errors == {"ValueError": workers}

    @pytest.mark.parametrize("empty", ["None", "zero rows"])
    def test_no_data_now_costs_little_and_says_little(
        self, coordinator: iw.GlobalCoordinator, caplog: pytest.LogCaptureFixture, empty: str
    ) -> None:
        calls = [0]

        def fetch(worker_id: int, batch_size: int) -> Any:
            calls[0] += 1
            return None if empty == "None" else make_chunk(worker_id, 0, 0)

        source = self.register(coordinator, fetch, num_workers=2)
        with caplog.at_level(logging.DEBUG, "input_workers"):
            coordinator.start()
            cpu = time.process_time()
            with pytest.raises(iw.WaitTimeout, match=r"train: no batch within 1 s"):
                source.next_batch(1.0)
            cpu = time.process_time() - cpu
        assert cpu < 5 * 0.05, f"{cpu:.2f} s of a core within a second of nothing"
        assert 4 < calls[0] < 100, "asked again, with longer and longer pauses"
        assert len(caplog.records) <= 5

    def test_data_that_come_after_a_pause_are_fetched(self, coordinator: iw.GlobalCoordinator) -> None:
        fetch = CertifiedFetch(lambda worker, call: 4 if call < 20 else None, end_of_data)
        turns = [0]

        def now_and_then(worker_id: int, batch_size: int) -> Any:
            turns[0] += 1
            return None if turns[0] % 3 else fetch(worker_id, batch_size)

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
        assert stats.rows_fetched == sum(fetch.made.values())
        assert "OSError: the last of them" in coordinator.last_stop.failures["train"]
