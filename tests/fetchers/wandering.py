"""num_workers="auto" that decides as a test says, or by chance, and often: everything is the real thing but the decision."""

from __future__ import annotations

import random

import pytest
from gates import await_true

from input_workers.coordinator import auto
from input_workers.metrics.worker_count import WorkerCount

__all__ = ["Script", "wander"]

# Often enough that nothing takes long, and seldom enough that other threads get to run.
OFTEN_SECONDS = 0.002


class Script:
    """Lets every "auto" want `want` workers.

    Attributes:
        want: how many; 0: as many as there may be.
        asked: (workers, the most there may be, why) of each decision.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, want: int) -> None:
        self.want = want
        self.asked: list[tuple[int, int, str]] = [(0, 0, "")]

        def wanted(count: WorkerCount, now: object, workers: int, ready: bool, most: int, most_by: str, *_: object) -> int:
            self.asked.append((workers, most, most_by))
            return min(self.want or most, most)

        monkeypatch.setattr(auto, "DECISION_SECONDS", OFTEN_SECONDS)
        monkeypatch.setattr(WorkerCount, "next", wanted)

    def have(self, want: int, what: str) -> None:
        """Want so many, and wait until so many are there; those that are asked to rest do not count."""
        asked = len(self.asked)
        self.want = want
        await_true(lambda: len(self.asked) > asked + 1 and self.asked[-1][0] == want, what)


def wander(monkeypatch: pytest.MonkeyPatch, most: int, seed: int, seconds: float = OFTEN_SECONDS) -> list[int]:
    """Let every "auto" want any number from 1 to `most`; return the list into which they go."""
    rng = random.Random(seed)
    wanted: list[int] = []

    def by_chance(count: WorkerCount, now: object, workers: int, *_: object) -> int:
        wanted.append(rng.randint(1, most))
        return wanted[-1]

    monkeypatch.setattr(auto, "DECISION_SECONDS", seconds)
    monkeypatch.setattr(WorkerCount, "next", by_chance)
    return wanted
