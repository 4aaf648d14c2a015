"""A trainer with worker processes may end however it likes; a sample of the matrix that tests/chaos runs as a whole."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from scenarios.process_exits import SAMPLE, check_exit


@pytest.fixture(scope="module")
def ends() -> dict[tuple[str, ...], Future[None]]:
    with ThreadPoolExecutor(2) as pool:
        return {case: pool.submit(check_exit, case) for case in SAMPLE}


@pytest.mark.parametrize("case", SAMPLE, ids="-".join)
def test_the_end_of_a_trainer_is_its_own(ends: dict[tuple[str, ...], Future[None]], case: tuple[str, ...]) -> None:
    ends[case].result()
