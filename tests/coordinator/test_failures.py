"""What goes wrong on a device or in an argument: which error, how often, and where the rows went."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gates import Gate, await_true, register
from self_certifying import CertifiedFetch, Witness

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


class Feed:
    """A host feed that raises where it is told to, and notes what was called."""

    chunk_alignment: int | None = None

    def __init__(self, **errors: tuple[int, BaseException]) -> None:
        self.errors = errors
        self.calls: list[str] = []

    def _call(self, what: str) -> None:
        self.calls.append(what)
        at, error = self.errors.get(what, (0, None))
        if error is not None and self.calls.count(what) == at:
            raise error

    def open(self, specs: Any, batch_size: int) -> None:
        self._call("open")

    def send(self, slot: Any) -> Any:
        self._call("send")
        return slot.arrays

    def receive(self, ticket: Any) -> Any:
        self._call("receive")
        return ticket

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize(("where", "text"), [("open", "could not be opened"), ("send", "could not be sent"),
                                             ("receive", "was sent but not received")])  # fmt: skip
def test_a_feed_that_raises_fails_the_source_after_the_batches_that_were_sent(
    coordinator: iw.GlobalCoordinator, where: str, text: str
) -> None:
    feed = Feed(**{where: (1 if where == "open" else 3, MemoryError("device is full"))})
    source = register(coordinator, CertifiedFetch(lambda w, call: 6 if call < 20 else None, end_of_data), 4, feed=feed)
    coordinator.start()
    witness = Witness()
    seen = []
    for _ in range(3):
        with pytest.raises(iw.FeedFailed, match=text) as caught:  # noqa: PT012
            while True:
                witness.see(source.next_batch(), 4)
                if where == "receive":
                    witness.gap([0])
        seen.append(caught.value)
    assert len({id(error) for error in seen}) == 3
    assert all(isinstance(error.__cause__, MemoryError) for error in seen)
    assert coordinator.stop()
    stats = source.stats()
    assert stats.rows_dropped["device_error"] == (0 if where == "open" else 4)
    assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values())
    assert stats.rows_delivered == witness.rows
    assert feed.calls.count("close") == (0 if where == "open" else 1)


def test_a_feed_without_memory_for_slots_fails_the_source_with_sizes(coordinator: iw.GlobalCoordinator) -> None:
    class Full(Feed):
        def slot_memory(self, nbytes: int) -> Any:
            raise MemoryError("nothing left to lock")

    source = register(coordinator, CertifiedFetch(lambda w, c: 6, end_of_data), 4, feed=Full())
    other = register(coordinator, CertifiedFetch(lambda w, c: 6, end_of_data), 4, "other")
    coordinator.start()
    nbytes = sum(spec.row_nbytes for spec in source.specs()) * 4
    with pytest.raises(iw.FeedFailed, match=rf"no memory for a slot of 4 rows, {nbytes:,} bytes") as caught:
        source.next_batch()
    assert isinstance(caught.value.__cause__, MemoryError)
    assert len(other.next_batch().data) == 4


def test_a_feed_that_cannot_be_closed_is_named_in_the_report(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda w, c: 4, end_of_data), feed=Feed(close=(1, OSError("busy"))))
    coordinator.start()
    source.next_batch()
    assert coordinator.stop()
    assert "could not be closed: OSError('busy')" in coordinator.last_stop.failures["train"]


def test_a_feed_is_opened_once_a_run_and_closed_after_it(coordinator: iw.GlobalCoordinator) -> None:
    feed = Feed()
    source = register(coordinator, CertifiedFetch(lambda w, c: 4, end_of_data), feed=feed)
    for _ in range(3):
        coordinator.start()
        source.next_batch()
        assert coordinator.stop()
    assert [call for call in feed.calls if call in ("open", "close")] == ["open", "close"] * 3


def test_a_timeout_leaves_everything_as_it_was(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    source = register(coordinator, gate, 4)
    coordinator.start()
    witness = Witness()
    for rows in (1, 3, 5, 3, 4):
        with pytest.raises(iw.WaitTimeout):
            source.next_batch(0)
        with pytest.raises(iw.WaitTimeout):
            source.next_batch(0.01)
        gate.release(rows)
        gate.await_calls()
        while witness.rows + 4 <= gate.released_rows:
            witness.see(source.next_batch(), 4)
    assert witness.rows == 16
    gate.open()


def test_a_for_loop_survives_a_timeout(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    source = register(coordinator, gate, 4, timeout_s=0.01)
    coordinator.start()
    with pytest.raises(iw.WaitTimeout):
        next(iter(source))
    gate.release(4)
    gate.await_calls()
    await_true(lambda: source.stats().device_queue_depth == 1, "the batch is there")
    assert next(iter(source)).valid_rows == 4
    gate.open()


@pytest.mark.parametrize("bad", [-1, -0.001, math.nan])
def test_a_wait_of_less_than_nothing_is_refused(coordinator: iw.GlobalCoordinator, bad: float) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    coordinator.start()
    with pytest.raises(iw.ConfigError, match="timeout_s"):
        source.next_batch(bad)


STREAM = iw.Stream(iw.sources.Arrays(np.arange(4), np.arange(4)))
NOT_BUILT: dict[str, dict[str, Any]] = {
    "ray": {"fetchers": "ray"},
}


@pytest.mark.parametrize("what", NOT_BUILT)
def test_what_is_not_built_yet_says_so_and_is_never_ignored(coordinator: iw.GlobalCoordinator, what: str) -> None:
    more = {"fetch": Gate(), **NOT_BUILT[what]}
    with pytest.raises(iw.ConfigError, match="not built yet"):
        register(coordinator, **more)
    assert len(coordinator) == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no names": ({"input_names": []}, "input_names"),
    "one string of names": ({"input_names": "data"}, "input_names"),
    "a name twice": ({"input_names": ["data", "data"]}, "each name once"),
    "a keyword": ({"input_names": ["data", "class"]}, "'class' is no usable name"),
    "an underscore": ({"input_names": ["data", "_x"]}, "'_x' is no usable name"),
    "an attribute of batches": ({"input_names": ["data", "epoch"]}, "'epoch' is an attribute"),
    "no function": ({"fetch": 3}, "fetch_fun: got int"),
    "no rows in a batch": ({"batch_size": 0}, "batch_size: got 0"),
    "half a row": ({"batch_size": 2.5}, "batch_size: got 2.5"),
    "a truth as number": ({"batch_size": True}, "batch_size: got True"),
    "minus a worker": ({"num_workers": -1}, "num_workers: got -1"),
    "a slash in the name": ({"name": "a/b"}, "input_source_name"),
    "no name": ({"name": ""}, "input_source_name"),
    "a slash in the scope": ({"name_scope": "a/b"}, "name_scope"),
    "an unknown feed": ({"feed": "numpi"}, "feed 'numpi' is unknown"),
    "no feed": ({"feed": None}, "feed: got NoneType"),
    "unknown fetchers": ({"fetchers": "threads"}, "fetchers: got 'threads'"),
    "too many axes": ({"batch_axes": [0, 1, 0]}, "batch_axes: got 3 axes"),
    "a negative axis": ({"batch_axes": -1}, "batch_axes: got -1"),
    "an unknown last batch": ({"last_batch": "short"}, "last_batch: got 'short'"),
    "a short last chunk": ({"rebatch": False, "last_batch": "keep"}, "rebatch=False"),
    "an order of a function": ({"ordered": True}, "ordered=True: a plain function has no order"),
    "no timeout": ({"timeout_s": None}, "timeout_s: got None"),
    "no time for a call": ({"fetch_timeout_s": 0}, "fetch_timeout_s: got 0"),
    "no bytes": ({"max_buffered_bytes": 0}, "max_buffered_bytes: got 0"),
    "no batches": ({"max_buffered_batches": 0}, "max_buffered_batches: got 0"),
    "no depth": ({"device_queue_depth": 0}, "device_queue_depth: got 0"),
    "a logger that cannot log": ({"external_loggers": [print]}, "has no method log"),
    "specs for one input": ({"specs": [iw.ArraySpec((), "f4")]}, "specs: got"),
    "an init function that is none": ({"init_fun": 3}, "init_fun: got 3"),
    "a policy that is none": ({"on_error": "skip"}, "on_error: got 'skip'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named_with_what_was_got_and_registers_nothing(
    coordinator: iw.GlobalCoordinator, what: str
) -> None:
    more, text = WRONG[what]
    with pytest.raises(iw.ConfigError, match=text) as caught:
        register(coordinator, **{"fetch": Gate(), **more})
    assert isinstance(caught.value, ValueError)
    assert (len(coordinator), coordinator.get_worker_ids()) == (0, [])


def test_a_batch_axis_that_the_rows_do_not_have_is_an_error(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4, end_of_data)
    with pytest.raises(iw.ConfigError, match="batch axis 2 does not exist"):
        register(coordinator, fetch, batch_axes=2, specs=[iw.ArraySpec((3,), "i8")] * 2)
    source = register(coordinator, fetch, batch_axes=2)
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match=r"wanted rows along axis 2"):
        source.next_batch()
