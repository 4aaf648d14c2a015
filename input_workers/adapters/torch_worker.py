"""What a worker of a loader does: indices come in, it reads a PyTorch data set and collates, a batch goes out.

Imports PyTorch: loaded when a loader is made.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils import worker as torch_worker

from input_workers.adapters.torch_padding import PaddingCollate
from input_workers.contracts import FetchRequest
from input_workers.fetchers.worker_seeds import seed_by

__all__ = ["Answer", "BatchFetch", "Order"]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What a worker is asked for.

    Attributes:
        round: counts the epochs of these workers; a data set that is iterated is iterated anew in each.
        number: of the batch in its epoch.
        indices: as the sampler gave them.
        state: of an iterated data set, to begin with.
        skip: how many batches of it to leave out first.
    """

    round: int
    number: int
    indices: Any
    state: Any = None
    skip: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A batch, perhaps the last that this worker iterates; or the end. `state`: where the data set is then, if it says so."""

    batch: Any
    is_last: bool = False
    is_end: bool = False
    state: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class BatchFetch:
    """Fetches batches. One object is shared by the workers that are threads; each process has a copy.

    Args:
        dataset: of the user.
        collate_fn: of the user, or PyTorch's.
        auto_collation: indices are a list, as with a batch size or a batch sampler.
        is_iterable: the data set is iterated, not indexed.
        drop_last: of an iterated data set, leave out a last batch that is short.
        workers: how many there are; 0: none, the trainer calls `answer` itself.
        seed: `seed + worker_id` is that of a worker.
        init: called with the worker's id at its beginning.
        in_process: whether workers are processes.
    """

    dataset: Any
    collate_fn: Callable[[Any], Any]
    auto_collation: bool
    is_iterable: bool
    drop_last: bool
    workers: int
    seed: int
    init: Callable[[int], object] | None
    in_process: bool
    _workers: dict[int, _Worker] = dataclasses.field(default_factory=dict)

    def __call__(self, content: bytes, request: FetchRequest) -> Answer:
        """Return the answer to an order, which comes pickled.

        Raises:
            Exception: what data set, `collate_fn` and `init` raise.
        """
        order: Order = pickle.loads(content)  # noqa: S301  from the trainer
        worker = self._workers.get(request.worker_id)
        if worker is None:
            worker = self._workers[request.worker_id] = _Worker(self, request.worker_id)
        if self.in_process:
            with worker.random_numbers(order):
                return worker.answer(order)
        _here.info = worker.info
        return worker.answer(order)

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchFetch, tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:-1])


class _Worker:
    """A worker of a loader, or the trainer in its place (`worker_id` None). Belongs to one thread."""

    def __init__(self, fetch: BatchFetch, worker_id: int | None) -> None:
        self._fetch = fetch
        self._dataset = fetch.dataset
        self._round = -1
        self._iterator: Any = None
        self._has_ended = False
        self._random: Any = None
        self._collate = fetch.collate_fn
        self.info: Any = None
        if worker_id is None:
            return
        if fetch.is_iterable and not fetch.in_process:  # as each process has its own
            self._dataset = copy.copy(fetch.dataset)
        seed = fetch.seed + worker_id
        self.info = torch_worker.WorkerInfo(id=worker_id, num_workers=fetch.workers, seed=seed, dataset=self._dataset)
        if fetch.in_process:
            let_threads_have_worker_info()
            torch.set_num_threads(1)
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed(np.random.SeedSequence([worker_id, fetch.seed & 0xFFFFFFFF, fetch.seed >> 32, 0]).generate_state(4))
            torch_worker._worker_info = self.info  # what PyTorch's own workers set, for threads of the user's
            self._collate = _writing_rows_once(fetch.collate_fn)
        _here.info = self.info
        if fetch.init is not None:
            fetch.init(worker_id)
        if fetch.in_process:
            self._random = _random_states()

    def answer(self, order: Order) -> Answer:
        """Return a batch, or the end."""
        fetch = self._fetch
        if not fetch.is_iterable:
            return Answer(self._collated(self._read(order.indices)))
        if order.round != self._round:
            self._begin(order)
        items = None if self._has_ended else self._next(order.indices)
        if items is None:
            self._has_ended = True
            return Answer(None, is_end=True)
        return Answer(self._collated(items[0]), is_last=self._has_ended, state=self._state())

    def _collated(self, items: Any) -> Any:
        try:
            return self._collate(items)
        except RuntimeError as error:
            if "equal size" in str(error):  # what torch.stack says
                error.add_note("unequal lengths are filled up by pad_ragged= of the loader, or left apart by a collate_fn")
            raise

    def _read(self, indices: Any) -> Any:
        dataset = self._dataset
        if not self._fetch.auto_collation:
            return dataset[indices]
        if getattr(dataset, "__getitems__", None):
            return dataset.__getitems__(indices)
        return [dataset[index] for index in indices]

    def _next(self, indices: Any) -> tuple[Any] | None:
        """Return the next items, or the item, in a tuple; None: there are none."""
        items = []
        for _ in indices if self._fetch.auto_collation else (None,):
            try:
                items.append(next(self._iterator))
            except StopIteration:
                self._has_ended = True
                break
        if not items or (self._has_ended and self._fetch.drop_last):
            return None
        return (items,) if self._fetch.auto_collation else (items[0],)

    def _begin(self, order: Order) -> None:
        self._round, self._has_ended = order.round, False
        state = order.state or {}
        if "dataset" in state:
            self._dataset.load_state_dict(state["dataset"])
        self._iterator = iter(self._dataset)
        if "iterator" in state:
            self._iterator.load_state_dict(state["iterator"])
        if not state:
            for _ in range(order.skip):
                self._next(order.indices)

    def _state(self) -> dict[str, Any] | None:
        parts = {"dataset": self._dataset, "iterator": self._iterator}
        return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")} or None

    @contextlib.contextmanager
    def random_numbers(self, order: Order) -> Iterator[None]:
        """Have the process's random numbers be those of this order while it is carried out.

        Of an iterated data set they are one sequence, as PyTorch has it; else those of the batch, whichever worker reads it.
        """
        fetch = self._fetch
        if not fetch.is_iterable:
            seed_by((fetch.seed, order.round, order.number))
            yield
            return
        _set_random_states(self._random)
        try:
            yield
        finally:
            self._random = _random_states()


def _writing_rows_once(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what does the same for a worker process, but stacks rows where they are to lie, if it is PyTorch's own."""
    from input_workers.adapters.torch_wire import collate_rows

    if isinstance(collate, PaddingCollate):
        return dataclasses.replace(collate, collate=_writing_rows_once(collate.collate))
    return collate_rows if collate is default_collate else collate


def _random_states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(states: tuple[Any, Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


class _Here(threading.local):
    info: Any = None


_here = _Here()


def info_here() -> Any:
    """Return the WorkerInfo of the calling thread; None: it is no worker."""
    return _here.info


def _get_worker_info() -> Any:
    # This becomes the code of PyTorch's own function, and runs among the names of its module.
    import sys

    from input_workers.adapters.torch_worker import info_here

    info = info_here()
    if info is None:
        return _worker_info  # type: ignore[name-defined]  # noqa: F821
    # `default_collate` only asks in order to stack into shared memory of its own, which these workers do not need.
    return None if sys._getframe(1).f_globals.get("__name__") == "torch.utils.data._utils.collate" else info


def let_threads_have_worker_info() -> None:
    """Have `torch.utils.data.get_worker_info()` answer in our workers; everywhere else it is as it was.

    PyTorch keeps the answer in one variable of the process, which threads would share. Programs have imported the function
    by then, so putting another in its place would not reach them; hence its code is replaced.
    """
    torch_worker.get_worker_info.__code__ = _get_worker_info.__code__
