"""A fetch function that starts or stops its coordinator while somebody else is stopping that."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, register

import input_workers as iw


@pytest.mark.parametrize("call", ["start", "stop"])
def test_a_fetcher_does_not_wait_for_a_stop_that_waits_for_it(coordinator: iw.GlobalCoordinator, call: str) -> None:
    inside, stopping = threading.Event(), threading.Event()
    outcomes: list[Any] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        inside.set()
        assert stopping.wait(HANG_SECONDS)
        try:
            outcomes.append(getattr(coordinator, call)())
        except iw.LifecycleError as error:
            outcomes.append(error)
        return [np.zeros(4), np.zeros(4)]

    source = register(coordinator, fetch, num_workers=1)
    coordinator.start()
    assert inside.wait(HANG_SECONDS)

    def wait_for_the_stop() -> None:
        with pytest.raises(iw.QueueClosed):  # the first thing that a stop does
            source.next_batch(HANG_SECONDS)
        stopping.set()

    reader = threading.Thread(target=wait_for_the_stop)
    reader.start()
    started = time.monotonic()
    assert coordinator.stop(HANG_SECONDS)
    assert time.monotonic() - started < HANG_SECONDS / 2, "each waited for the other"
    reader.join()
    if call == "stop":
        assert outcomes == [False]
    else:
        assert isinstance(outcomes[0], iw.LifecycleError)
