"""The workers of an adapter that iterates by itself: orders go in, answers of any kind come out."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import init_data_input_workers
from input_workers.errors import FetchFailed, InputWorkersError, WaitTimeout
from input_workers.fetchers import Processes, Threads
from input_workers.sources.fed import FedStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Team", "of_the_user"]

WIRE = "input_workers.adapters.wire"


class Team:
    """Threads or processes that carry out orders, each in its turn. Belongs to one thread; what is dropped ends by itself.

    Each lane is a source of its own, and has its own workers.

    Args:
        work: `work(order, request)` returns the answer; called in the workers. Processes are sent a copy.
        fetchers: what they are.
        workers: how many, in each lane.
        ahead: the most orders of a lane that are given and not taken: what is kept for answers.
        names: of the lanes, for errors.
        ordered: answers come in the order of the orders.
        timeout_s: how long an answer is waited for.
        seed: of the requests' random numbers, and in processes of those that are used without asking.
        wire: the module with `dumps`, `pack` and `unpack` for processes. Threads hand over the objects themselves.
    """

    def __init__(
        self,
        work: Callable[[Any, FetchRequest], Any],
        fetchers: Threads | Processes,
        workers: int,
        ahead: int,
        names: Sequence[str],
        *,
        ordered: bool,
        timeout_s: float,
        seed: int = 0,
        wire: str = WIRE,
    ) -> None:
        self.is_stopped = False
        coordinator = GlobalCoordinator()
        self._coordinator: GlobalCoordinator | None = coordinator
        in_process = isinstance(fetchers, Processes)
        self._wire = wire if in_process else None
        self._carriers = [_Carrier(work, self._wire) for _ in names]
        self._streams = [FedStream(carrier, seed) for carrier in self._carriers]
        self.waiting = [0] * len(names)  # orders given and not taken, by lane
        for name, stream in zip(names, self._streams, strict=True):
            init_data_input_workers(
                "numpy",
                ["head", "body"] if in_process else ["number"],
                stream,
                1,
                workers,
                name,
                ahead,
                fetchers=fetchers,
                rebatch=False,
                ordered=ordered,
                timeout_s=timeout_s,
                device_queue_depth=ahead,
                specs=[BYTES, BYTES] if in_process else [ArraySpec((), np.int64)],
                coordinator=coordinator,
            )
        self._sources = list(coordinator)
        coordinator.start()

    def give(self, lane: int, order: Any) -> None:
        """Have this order carried out. Raises what pickle does of what cannot be sent to a process."""
        self._streams[lane].give((order,) if self._wire is None else _wire(self._wire).dumps(order))
        self.waiting[lane] += 1

    def take(self, lane: int) -> Any:
        """Return the answer to the lane's oldest order; where they are not ordered, to any.

        Raises:
            WaitTimeout: it did not come in time; ask again.
            InputWorkersError: FetchFailed, whose cause is what `work` raised, or WorkerDied; the team is stopped.
        """
        try:
            batch = self._sources[lane].next_batch()
        except WaitTimeout:
            raise
        except InputWorkersError:
            self.stop()
            raise
        number, answer = self._carriers[lane].answer_in(batch)
        self._streams[lane].forget(number)
        self.waiting[lane] -= 1
        return answer

    def stop(self) -> None:
        """End the workers. Idempotent."""
        self.is_stopped = True
        coordinator, self._coordinator, self._sources = self._coordinator, None, []
        if coordinator is not None:  # let go of: it knows the failure, whose traceback knows this
            coordinator.stop()


BYTES = ArraySpec((None,), np.uint8)


@dataclasses.dataclass(frozen=True, slots=True)
class _Carrier:
    """Has an order carried out, in a worker. Threads put answers into `answers`; each process has a copy of this."""

    work: Callable[[Any, FetchRequest], Any]
    wire: str | None
    answers: dict[int, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, rows: NDArray[Any], request: FetchRequest) -> Sequence[NDArray[Any]]:
        if self.wire is not None:
            answer = self.work(pickle.loads(rows[0]), request)  # noqa: S301  from the trainer
            packed: Sequence[NDArray[Any]] = _wire(self.wire).pack((request.index, answer))
            return packed
        self.answers[request.index] = self.work(rows[0][0], request)
        return [np.array([request.index])]

    def answer_in(self, batch: Sequence[NDArray[Any]]) -> tuple[int, Any]:
        """Return the number of an order, and its answer."""
        if self.wire is not None:
            return _wire(self.wire).unpack(batch)  # type: ignore[no-any-return]
        number = int(batch[0][0])
        return number, self.answers.pop(number)


def _wire(name: str) -> Any:
    return importlib.import_module(name)  # when it is used: it needs cloudpickle


def of_the_user(failed: FetchFailed) -> BaseException:
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
