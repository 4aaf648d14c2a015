"""The benchmark of num_workers="auto" runs and says what it measured; its figures are for people to read."""

from __future__ import annotations

import math

import pytest

import input_workers as iw
from input_workers.bench import auto


def test_rates_and_times_are_those_of_the_batches() -> None:
    course = auto.Course([*(at / 2 for at in range(10)), *(5 + at / 10 for at in range(51))], [2] * 10)
    assert course.rate(0.0, 5.0) == 2.0
    assert course.rate(6.0, 8.0) == pytest.approx(10.0)
    assert auto.soon(course, 10.0) == 5.0
    assert auto.soon(course, 20.0) == math.inf


@pytest.mark.parametrize("workers", [2, "auto"])
def test_a_course_counts_batches_and_workers(workers: int | str) -> None:
    course = auto.course(auto.computes, workers, 0.001, 1.5, iw.Threads(max_workers=3))
    assert len(course.batches) > 1
    assert course.batches == sorted(course.batches)
    assert all(1 <= alive <= 3 for alive in course.alive)


def test_every_part_says_what_it_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"ROUNDS": 1, "SOON_SECONDS": 1.0, "SECONDS": 3.0, "CALL_SECONDS": 0.1, "BEST": 4}.items():
        monkeypatch.setattr(auto, name, value)
    assert auto.main() in (0, 1)
    said = capsys.readouterr().out
    assert all(f"auto, {what}" in said for what in ("threads that wait", "processes that wait", "threads that compute"))
