"""External loggers and put_metric: values of the interval, and a logger that misbehaves disturbs nobody."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from gates import HANG_SECONDS, register
from self_certifying import CertifiedFetch, Witness

import input_workers as iw
from input_workers.coordinator import reporter


def end_of_data() -> Any:
    raise iw.EndOfData


def endless() -> CertifiedFetch:
    return CertifiedFetch(lambda worker, call: 4, end_of_data)


class Logger:
    def __init__(self, action: Any = None) -> None:
        self.calls: list[dict[str, float]] = []
        self.logged = threading.Semaphore(0)
        self._action = action

    def log(self, metrics: dict[str, float]) -> None:
        self.calls.append(dict(metrics))
        self.logged.release()
        if self._action is not None:
            self._action(metrics)


KEYS = {"inputs_per_sec", "queue_size", "time_elapsed"} | {
    f"{what}_time{count}" for what in ("fetcher", "enqueue") for count in ("", "_count")
}


def test_a_logger_gets_the_values_of_its_interval_at_stop(coordinator: iw.GlobalCoordinator) -> None:
    logger = Logger()
    source = register(coordinator, endless(), external_loggers=[logger], num_workers=2)
    sums = dict.fromkeys(("fetcher_time_count", "enqueue_time_count"), 0.0)
    for _ in range(3):
        coordinator.start()
        for _ in range(10):
            source.next_batch()
        coordinator.stop()
    assert len(logger.calls) == 3
    for metrics in logger.calls:
        assert set(metrics) == KEYS
        assert metrics["inputs_per_sec"] > 0
        assert metrics["time_elapsed"] > 0
        assert metrics["enqueue_time_count"] >= 10
        for key in sums:
            sums[key] += metrics[key]
    stats = source.stats()
    assert sums["enqueue_time_count"] == stats.devices["train"].send.count
    assert sums["fetcher_time_count"] == stats.fetch.count


def test_a_logger_is_called_every_interval(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_SECONDS", 0.01)
    logger = Logger()
    register(coordinator, endless(), external_loggers=[logger])
    coordinator.start()
    for _ in range(5):
        assert logger.logged.acquire(timeout=HANG_SECONDS)


def test_sums_of_put_metric_are_of_the_interval(coordinator: iw.GlobalCoordinator) -> None:
    logger = Logger()
    source = register(coordinator, endless(), external_loggers=[logger])
    source.put_metric("before the start", 1)
    for values in ([1.5, 2.5], [4.0]):
        coordinator.start()
        for value in values:
            source.put_metric("decode_time", value)
            source.put_metric("files", value, count=False)
        coordinator.stop()
    assert [call.get("decode_time") for call in logger.calls] == [4.0, 4.0]
    assert [call.get("decode_time_count") for call in logger.calls] == [2, 1]
    assert [call.get("files") for call in logger.calls] == [4.0, 4.0]
    assert not any("files_count" in call for call in logger.calls)


def test_a_source_that_is_stopped_and_started_alone_has_one_report_for_each_interval(
    coordinator: iw.GlobalCoordinator,
) -> None:
    logger = Logger()
    source = register(coordinator, endless(), external_loggers=[logger])
    other = register(coordinator, endless(), name="other")
    coordinator.start()
    for _ in range(3):
        source.put_metric("marks", 1)
        source.stop()
        coordinator.start()
    other.next_batch()
    coordinator.stop()
    assert sum(call.get("marks", 0) for call in logger.calls) == 3


@pytest.mark.parametrize("error", [ValueError("full"), SystemExit(3), KeyboardInterrupt()])
def test_a_logger_that_raises_is_noted_and_called_again_and_the_other_one_too(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_SECONDS", 0.01)

    def fail(metrics: Any) -> None:
        raise error

    loggers = [Logger(fail), Logger()]
    source = register(coordinator, endless(), external_loggers=loggers)
    coordinator.start()
    for logger in loggers * 3:
        assert logger.logged.acquire(timeout=HANG_SECONDS / 5)
    witness = Witness()
    for _ in range(50):
        witness.see(source.next_batch(), 4)
    assert coordinator.stop()
    assert "the external logger 'Logger' raised" in caplog.text


def test_a_logger_that_hangs_holds_up_neither_batches_nor_other_loggers_and_is_named_at_stop(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_SECONDS", 0.01)
    go_on = threading.Event()
    hanging, sound = Logger(lambda metrics: go_on.wait(HANG_SECONDS)), Logger()
    source = register(coordinator, endless(), external_loggers=[hanging, sound])
    coordinator.start()
    assert hanging.logged.acquire(timeout=HANG_SECONDS)
    for _ in range(5):
        assert sound.logged.acquire(timeout=HANG_SECONDS)
    witness = Witness()
    for _ in range(200):
        witness.see(source.next_batch(), 4)
    assert coordinator.stop(0.2) is False
    assert [each.name for each in coordinator.last_stop.stuck] == ["logger-train"]
    go_on.set()


def test_a_logger_may_keep_and_change_what_it_gets(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_SECONDS", 0.01)
    changing, reading = Logger(lambda metrics: metrics.clear()), Logger()
    register(coordinator, endless(), external_loggers=[changing, reading])
    coordinator.start()
    for _ in range(4):
        assert changing.logged.acquire(timeout=HANG_SECONDS)
        assert reading.logged.acquire(timeout=HANG_SECONDS)
    assert all(set(call) >= KEYS for call in reading.calls + changing.calls)


class Odd(float):
    """A number whose conversion lets every other thread run."""

    def __float__(self) -> float:
        threading.Event().wait(0.0001)
        return 1.0


def test_metrics_put_by_many_threads_while_loggers_read_are_all_counted(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_SECONDS", 0.001)
    logger = Logger()
    source = register(coordinator, endless(), external_loggers=[logger])
    coordinator.start()
    assert logger.logged.acquire(timeout=HANG_SECONDS), "the logger's first call"

    def put(thread: int) -> None:
        for number in range(200):
            source.put_metric("shared", Odd(1))
            source.put_metric(f"key_{thread}_{number}", 1)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    coordinator.stop()
    assert sum(call.get("shared", 0) for call in logger.calls) == 800
    assert sum(call.get("shared_count", 0) for call in logger.calls) == 800
