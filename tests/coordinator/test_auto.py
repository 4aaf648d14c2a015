"""num_workers="auto": what it means for those who register, fetch and read, and where it stops."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import CertifiedRows, Door, rows_seen
from fetchers.wandering import Script
from gates import HANG_SECONDS, Gate, await_true, register
from self_certifying import Witness, make_chunk

import input_workers as iw
from input_workers.coordinator import auto
from input_workers.fetchers.fork_server import fork_server
from input_workers.metrics.worker_count import WorkerCount


def alive(source: Any) -> int:
    return int(source.stats().fetchers_alive)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_workers": "many"}, "num_workers: got 'many'; wanted 'auto', or a whole number from 0"),
        ({"num_workers": True}, "num_workers: got True"),
        ({"num_workers": None}, "num_workers: got None"),
    ],
)
def test_other_words_than_auto_are_refused(coordinator: iw.GlobalCoordinator, more: dict[str, Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=message):
        register(coordinator, Gate(), **more)


@pytest.mark.parametrize("kind", [iw.Threads, iw.Processes])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_workers": 0}, "min_workers: got 0; wanted a whole number from 1 to 4096"),
        ({"max_workers": 2.0}, "max_workers: got 2.0"),
        ({"max_workers": True}, "max_workers: got True"),
        ({"max_workers": 5000}, "max_workers: got 5000"),
        ({"min_workers": 3, "max_workers": 2}, "min_workers=3 is more than max_workers=2"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(kind: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=f"{kind.__name__}: {message}"):
        kind(**bounds)


@pytest.mark.parametrize(("least", "most", "wanted"), [(1, 1, 1), (1, 128, min(2, len(os.sched_getaffinity(0)))), (5, 9, 5)])
def test_it_begins_with_few_within_the_bounds(coordinator: iw.GlobalCoordinator, least: int, most: int, wanted: int) -> None:
    register(coordinator, Gate(), num_workers="auto", fetchers=iw.Threads(least, most))
    assert coordinator.get_worker_ids() == [*range(wanted)]


def test_all_devices_of_a_source_share_the_number_and_none_has_one_of_its_own(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    register(coordinator, gate, num_workers="auto", fetchers=iw.Threads(3), name_scope="gpu_0")
    register(coordinator, gate, num_workers="auto", fetchers=iw.Threads(3), name_scope="gpu_1")
    assert len(coordinator.get_worker_ids()) == 3
    with pytest.raises(iw.ConfigError, match="another num_workers"):
        register(coordinator, gate, num_workers=2, fetchers=iw.Threads(3), name_scope="gpu_2")


def test_the_number_follows_what_is_wanted(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    script, gate = Script(monkeypatch, 2), Gate()
    source = register(coordinator, gate, num_workers="auto", fetchers=iw.Threads(2))
    coordinator.start()
    gate.await_calls(2)
    script.want = 5
    gate.await_calls(5)
    assert alive(source) == 5
    assert coordinator.get_worker_ids() == [*range(5)]
    script.have(2, "three are asked to rest")
    assert alive(source) == 5, "in the midst of their calls"
    for worker in (2, 3, 4):
        gate.release(4, worker)
    await_true(lambda: alive(source) == 2, "three rest")
    gate.await_calls(2)
    assert coordinator.get_worker_ids() == [*range(5)]
    script.want = 4
    gate.await_calls(4)
    assert len(coordinator.get_worker_ids()) == 5, "those that rested are at work again"
    gate.open(lambda worker_id: (_ for _ in ()).throw(iw.EndOfData()))
    witness = Witness()
    for batch in source:
        witness.see(batch, 4)
    assert witness.rows == 12, "a chunk of each that was asked to rest"


def test_no_new_worker_is_begun_after_one_has_ended_and_whoever_rests_is_called_again_before_the_end(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, gate = Script(monkeypatch, 3), Gate()
    source = register(coordinator, gate, num_workers="auto", fetchers=iw.Threads(3))
    coordinator.start()
    gate.await_calls(3)
    script.have(2, "worker 2 is asked to rest")
    gate.release(4, 2)
    await_true(lambda: alive(source) == 2, "worker 2 rests")
    script.have(1, "worker 1 is asked to rest, too")
    gate.end(0)
    await_true(lambda: alive(source) == 1, "worker 0 has ended")
    gate.end(1)
    gate.await_calls(1)  # worker 2, in whose data there may be more
    gate.release(4, 2)
    gate.await_calls(1)
    script.want = 6
    await_true(lambda: script.asked[-1][1:] == (1, "end"), "no more may be added")
    gate.end(2)
    witness = Witness()
    for batch in source:
        witness.see(batch, 4)
    assert witness.rows == 8
    assert coordinator.get_worker_ids() == [0, 1, 2]


def test_of_a_stream_nobody_is_called_again_at_the_end(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, 4)
    threads: set[str] = set()
    go_on = threading.Event()

    class Rows:
        def __len__(self) -> int:
            return 40

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            threads.add(f"{request.worker_id} in {threading.current_thread().name}")
            go_on.wait(HANG_SECONDS)
            return [rows.copy(), rows.copy()]

    source = register(coordinator, iw.Stream(Rows(), rows_per_request=4), num_workers="auto", fetchers=iw.Threads(4))
    coordinator.start()
    await_true(lambda: len(threads) == 4, "all are in a call")
    script.have(1, "three are asked to rest")
    go_on.set()
    assert sorted(row for batch in source for row in batch.data.tolist()) == [*range(40)]
    assert threads == {f"{worker} in fetcher-train-{worker}" for worker in range(4)}


def test_a_call_that_fails_is_tried_again_before_its_worker_rests(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, 2)
    calls: dict[int, int] = {}
    go_on = threading.Event()

    class Rows:
        def __len__(self) -> int:
            return 40

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            calls[request.worker_id] = calls.get(request.worker_id, 0) + 1
            if not go_on.is_set():
                assert go_on.wait(HANG_SECONDS)
                raise ValueError("the first call of each")
            return [rows.copy(), rows.copy()]

    stream, policy = iw.Stream(Rows(), rows_per_request=4), iw.ErrorPolicy(retries=1, backoff_s=0.001)
    source = register(coordinator, stream, num_workers="auto", fetchers=iw.Threads(2), on_error=policy)
    coordinator.start()
    await_true(lambda: len(calls) == 2, "both are in a call")
    script.have(1, "worker 1 is asked to rest")
    go_on.set()
    assert sorted(row for batch in source for row in batch.data.tolist()) == [*range(40)]
    assert source.stats().fetch_errors == {"ValueError": 2}


def test_a_request_of_a_released_process_that_dies_is_fetched_though_all_others_have_ended(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    script = Script(monkeypatch, 2)

    def before(request: iw.FetchRequest) -> None:
        if request.worker_id == 1:
            door.knock()

    source = register(
        coordinator,
        iw.Stream(CertifiedRows(40, before), rows_per_request=4),
        num_workers="auto",
        fetchers=iw.Processes(min_workers=2),
    )
    coordinator.start()
    pid, _ = door.await_knock()
    script.have(1, "worker 1 is asked to rest")
    await_true(lambda: alive(source) == 1, "worker 0 has found nothing more to do")
    os.kill(pid, signal.SIGKILL)
    seen: list[int] = []
    another, _ = door.await_knock()
    assert another != pid
    door.open()
    for _ in range(8):  # worker 1 may have had two requests
        if alive(source) and source.stats().rows_fetched < 40:
            door._listener.settimeout(1.0)
            try:
                door.await_knock()
            except TimeoutError:
                break
            door.open()
    seen = [row for batch in source for row in rows_seen(batch)]
    assert sorted(seen) == [*range(40)]


def test_more_than_the_bound_on_bytes_allows_are_not_wanted(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, chunk, charged = Script(monkeypatch, 2), 4 * 2 * 7 * 8, []

    def fetch(worker_id: int, batch_size: int) -> Any:
        charged.append(source.stats().queue_bytes)
        return make_chunk(worker_id, 0, 4)

    source = register(
        coordinator,
        fetch,
        num_workers="auto",
        fetchers=iw.Threads(2, 64),
        max_buffered_bytes=10 * chunk,
        max_buffered_batches=99,
    )
    coordinator.start()
    script.want = 0
    await_true(lambda: script.asked[-1][:2] == (9, 9), "all that may be are there")
    assert script.asked[-1][2] == "bytes"
    for _ in range(100):
        source.next_batch()
    assert alive(source) == 9
    assert max(charged) <= 10 * chunk


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_one_that_cannot_be_started_is_said_once_and_the_others_go_on(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    script = Script(monkeypatch, 2)
    rows = iw.Stream(CertifiedRows(10**9), epochs=None, rows_per_request=4)
    fetchers: Any = iw.Threads(2) if kind == "thread" else iw.Processes(min_workers=2)
    source = register(coordinator, rows, num_workers="auto", fetchers=fetchers)
    coordinator.start()
    source.next_batch()
    start, fork = threading.Thread.start, fork_server.fork
    left = [1]

    def failing(thread: threading.Thread) -> None:
        if thread.name.startswith("fetcher-train-") and not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    def failing_fork(*arguments: Any) -> Any:
        if not left[0]:
            raise OSError(11, "Resource temporarily unavailable")
        left[0] -= 1
        return fork(*arguments)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "input_workers"):
        if kind == "thread":
            patch.setattr(threading.Thread, "start", failing)
        else:
            patch.setattr(fork_server, "fork", failing_fork)
        script.want = 6
        await_true(lambda: script.asked[-1] == (3, 3, "start"), "three are there, and no more may be")
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["source 'train'"]
    assert "more than 3 workers cannot be started" in caplog.text
    for _ in range(20):
        rows_seen(source.next_batch())
    assert alive(source) == 3
    script.want = 1
    await_true(lambda: rows_seen(source.next_batch()) != [] and alive(source) == 1, "the others rest")


def test_when_its_thread_cannot_be_started_nothing_is(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    source = register(coordinator, gate, num_workers="auto")
    start, before = threading.Thread.start, threading.active_count()

    def failing(thread: threading.Thread) -> None:
        if thread.name == "auto-train":
            gate.open()
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            coordinator.start()
    assert threading.active_count() == before
    gate.shut()
    coordinator.start()
    gate.await_calls()
    gate.release(4)
    assert source.next_batch().valid_rows == 4
    gate.open()


def test_a_decision_that_breaks_is_the_failure_of_the_source(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError("no numbers")

    monkeypatch.setattr(auto, "DECISION_SECONDS", 0.001)
    monkeypatch.setattr(WorkerCount, "next", broken)
    gate = Gate()
    source = register(coordinator, gate, num_workers="auto")
    coordinator.start()
    with pytest.raises(iw.SourceFailed, match="'train': num_workers='auto' broke: ZeroDivisionError: no numbers"):
        source.next_batch()
    gate.open()


def test_the_next_run_begins_with_as_many_as_were_enough(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, gate = Script(monkeypatch, 6), Gate()
    source = register(coordinator, gate, num_workers="auto")
    coordinator.start()
    gate.await_calls(6)
    script.have(3, "three are asked to rest")
    gate.open()
    assert coordinator.stop(HANG_SECONDS)
    gate.shut()
    monkeypatch.setattr(auto, "DECISION_SECONDS", 1000.0)
    coordinator.start()
    gate.await_calls(3)
    assert alive(source) == 3
    assert len(coordinator.get_worker_ids()) == 6
    gate.open()


def test_a_source_that_waits_gets_more_workers_and_says_so(coordinator: iw.GlobalCoordinator) -> None:
    pause = threading.Event()

    def fetch(worker_id: int, batch_size: int) -> Any:
        pause.wait(0.05)
        return [np.zeros((batch_size, 2)), np.zeros(batch_size)]

    source = register(coordinator, fetch, num_workers="auto", fetchers=iw.Threads(max_workers=5))
    coordinator.start()
    texts: list[str] = []

    def grown() -> bool:
        source.next_batch()
        texts.append(source.stats().verdict_text)
        return alive(source) == 5 and "raise max_workers (now 5)" in texts[-1]

    await_true(grown, "five are there, and more are not allowed")
    assert any("workers are being added (now 2)" in text for text in texts) or len(os.sched_getaffinity(0)) == 1
    assert not any("add workers" in text for text in texts)
