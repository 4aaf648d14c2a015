"""What takes too long for every change: run by `make chaos`. The names of these files keep `make test` from finding them."""

from __future__ import annotations

import os
import threading

import pytest
from fetchers.shared_between import CertifiedRows, rows_seen
from gates import register
from scenarios.kill_campaign import kill_a_plain_function, kill_while_it_runs
from scenarios.process_exits import CASES, check_exit
from scenarios.test_exit_matrix import CASES as THREAD_CASES
from scenarios.test_exit_matrix import check, end_like

import input_workers as iw


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_end_of_a_trainer_is_its_own(case: tuple[str, ...]) -> None:
    check_exit(case)


@pytest.mark.parametrize("case", THREAD_CASES, ids="-".join)
def test_the_end_of_a_trainer_with_threads_is_its_own(case: tuple[str, ...]) -> None:
    check(case, end_like(case))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ordered", [False, True])
def test_kills_of_a_streams_workers(coordinator: iw.GlobalCoordinator, seed: int, ordered: bool) -> None:
    kill_while_it_runs(coordinator, 125, seed, ordered)


def test_kills_of_a_plain_functions_workers(coordinator: iw.GlobalCoordinator) -> None:
    kill_a_plain_function(coordinator, 500, 7)


def test_a_thousand_runs_leave_nothing(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(64, width=300), rows_per_request=8), 8, fetchers="process")
    counts = set()
    for _ in range(1000):
        coordinator.start()
        rows_seen(source.next_batch())
        assert coordinator.stop()
        counts.add((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert len(counts) == 1, counts
