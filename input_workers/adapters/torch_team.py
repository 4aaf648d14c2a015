"""The workers of a loader: orders go in, answers come out, in the order of the orders."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
from typing import Any

import numpy as np

from input_workers.adapters.torch_worker import Answer, BatchFetch, _Worker
from input_workers.contracts import ArraySpec
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import init_data_input_workers
from input_workers.errors import FetchFailed, InputWorkersError, WaitTimeout
from input_workers.fetchers import Processes, Threads
from input_workers.sources.fed import FedStream

__all__ = ["Inline", "Team"]

BYTES = ArraySpec((None,), np.uint8)


class Team:
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
        self.is_stopped = False
        self._fetch = fetch
        if fetch.is_iterable and isinstance(fetchers, Processes):
            fetchers = dataclasses.replace(fetchers, restarts=0)  # another process would begin from the first item again
        if isinstance(fetchers, Processes):  # with PyTorch, which takes seconds
            fetchers = dataclasses.replace(fetchers, preload=(*fetchers.preload, "input_workers.adapters.torch_worker"))
        lanes = fetch.workers if fetch.is_iterable else 1
        ahead = max(1, prefetch * fetch.workers // lanes)
        coordinator = GlobalCoordinator()
        self._coordinator: GlobalCoordinator | None = coordinator
        self._streams: list[FedStream] = []
        self._numbers: list[collections.deque[int]] = []
        for lane in range(lanes):
            stream = FedStream(fetch)
            init_data_input_workers(
                "numpy",
                ["head", "body"] if fetch.in_process else ["number"],
                stream,
                1,
                fetch.workers // lanes,
                f"loader_{lane}",
                ahead,
                fetchers=fetchers,
                rebatch=False,
                ordered=True,
                timeout_s=timeout_s,
                device_queue_depth=ahead,
                specs=[BYTES, BYTES] if fetch.in_process else [ArraySpec((), np.int64)],
                coordinator=coordinator,
            )
            self._streams.append(stream)
            self._numbers.append(collections.deque())
        self._sources = list(coordinator)
        coordinator.start()

    def give(self, lane: int, order: bytes) -> None:
        """Have this order carried out."""
        self._numbers[lane].append(self._streams[lane].give(order))

    def take(self, lane: int) -> Answer:
        """Return the answer to the lane's oldest order.

        Raises:
            WaitTimeout: it did not come in time; ask again.
            Exception: what the user's code raised; the team is stopped.
        """
        try:
            batch = self._sources[lane].next_batch()
        except WaitTimeout:
            raise
        except FetchFailed as failed:
            failure = failed
        except InputWorkersError:
            self.stop()
            raise
        else:
            number = self._numbers[lane].popleft()
            self._streams[lane].forget(number)
            if self._fetch.in_process:
                from input_workers.adapters.torch_wire import unpack  # which needs cloudpickle

                answer: Answer = unpack(batch)
                return answer
            return self._fetch.answers.pop((lane, number))
        self.stop()
        try:
            raise _of_the_user(failure)
        finally:
            del failure  # or this frame and the exception would hold each other, and with them the trainer's frames

    def discard(self) -> None:
        """Take what was ordered and is not wanted any more. Raises WaitTimeout: it did not come in time."""
        for lane, numbers in enumerate(self._numbers):
            while numbers and not self.is_stopped:
                try:
                    self.take(lane)
                except WaitTimeout:
                    raise
                except Exception:  # of a batch that nobody wants: the team is stopped, and another begins
                    break

    def stop(self) -> None:
        """End the workers. Idempotent."""
        self.is_stopped = True
        coordinator, self._coordinator, self._sources = self._coordinator, None, []
        if coordinator is not None:  # let go of: it knows the failure, whose traceback knows this
            coordinator.stop()


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


def _of_the_user(failed: FetchFailed) -> BaseException:
    """Return the exception of the user's code, with its own traceback, and a note of where it was raised."""
    cause = failed.__cause__
    if not isinstance(cause, Exception) or isinstance(cause, StopIteration):  # which would end a `for` in silence
        return failed
    # The run keeps the exception, and its traceback the run; the trainer's frames, added to it by raising, would stay, too.
    try:
        error = copy.copy(cause).with_traceback(cause.__traceback__)
        error.__dict__.update(cause.__dict__, __notes__=[*getattr(cause, "__notes__", ())])
    except Exception:  # its class has an __init__ of its own
        error = cause
    error.__cause__ = cause.__cause__
    error.add_note(f"raised by {str(failed).partition(': ')[0]}")
    return error
