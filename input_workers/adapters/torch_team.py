"""The workers of a loader: orders go in, answers come out, in the order of the orders."""

from __future__ import annotations

import collections
import dataclasses
import pickle
from typing import Any

from input_workers.adapters.team import Team, of_the_user
from input_workers.adapters.torch_worker import Answer, BatchFetch, _Worker
from input_workers.errors import FetchFailed, WaitTimeout
from input_workers.fetchers import Processes, Threads

__all__ = ["Inline", "LoaderTeam"]


class LoaderTeam(Team):
    """Threads or processes, from one epoch on. One source; of an iterated data set one for each worker, read in turn.

    Args:
        fetch: what they do.
        fetchers: what they are.
        prefetch: batches ahead, for each.
        timeout_s: how long a batch is waited for.
    """

    def __init__(self, fetch: BatchFetch, fetchers: Threads | Processes, prefetch: int, timeout_s: float) -> None:
        self.seed = fetch.seed
        self.rounds = 0
        if fetch.is_iterable and isinstance(fetchers, Processes):
            fetchers = dataclasses.replace(fetchers, restarts=0)  # another process would begin from the first item again
        if isinstance(fetchers, Processes):  # with PyTorch, which takes seconds
            fetchers = dataclasses.replace(fetchers, preload=(*fetchers.preload, "input_workers.adapters.torch_worker"))
        lanes = fetch.workers if fetch.is_iterable else 1
        super().__init__(
            fetch,
            fetchers,
            fetch.workers // lanes,
            max(1, prefetch * fetch.workers // lanes),
            [f"loader_{lane}" for lane in range(lanes)],
            ordered=True,
            timeout_s=timeout_s,
            wire="input_workers.adapters.torch_wire",
        )

    def take(self, lane: int) -> Answer:
        """Return the answer to the lane's oldest order.

        Raises:
            WaitTimeout: it did not come in time; ask again.
            Exception: what the user's code raised; the team is stopped.
        """
        try:
            answer: Answer = super().take(lane)
        except FetchFailed as failed:
            failure = failed
        else:
            return answer
        try:
            raise of_the_user(failure)
        finally:
            del failure  # or this frame and the exception would hold each other, and with them the trainer's frames

    def discard(self) -> None:
        """Take what was ordered and is not wanted any more. Raises WaitTimeout: it did not come in time."""
        for lane in range(len(self.waiting)):
            while self.waiting[lane] and not self.is_stopped:
                try:
                    self.take(lane)
                except WaitTimeout:
                    raise
                except Exception:  # of a batch that nobody wants: the team is stopped, and another begins
                    break


class Inline:
    """No workers: the trainer does it."""

    is_stopped = False

    def __init__(self, fetch: BatchFetch) -> None:
        self.seed = fetch.seed
        self.rounds = 0
        self._worker = _Worker(fetch, None)
        self._orders: collections.deque[Any] = collections.deque()

    def give(self, lane: int, order: bytes) -> None:
        """Have this order carried out, when its answer is taken."""
        self._orders.append(pickle.loads(order))  # noqa: S301  our own

    def take(self, lane: int) -> Answer:
        """Return the answer to the order. Raises what the user's code raises."""
        return self._worker.answer(self._orders.popleft())

    def stop(self) -> None:
        """Nothing was started."""
