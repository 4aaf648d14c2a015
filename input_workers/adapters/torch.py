"""A PyTorch data set goes in; what `torch.utils.data.DataLoader` makes of it comes out, read by threads or processes.

Imports PyTorch: loaded when it is used.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from input_workers.adapters.torch_team import Inline, Team
from input_workers.adapters.torch_worker import BatchFetch, Order, let_threads_have_worker_info
from input_workers.errors import ConfigError, QueueClosed, StateMismatch
from input_workers.fetchers import Processes, Threads

__all__ = ["Loader", "loader"]

FORMAT = 1


class Loader(DataLoader):  # type: ignore[misc]
    """`torch.utils.data.DataLoader` with other workers: threads, or processes that hand batches over in shared memory.

    The parameters are DataLoader's, and so are order, structure, values, dtypes and what is drawn from `generator` and from
    PyTorch's random numbers, and when: the sampler runs in the trainer's thread, `prefetch_factor * num_workers` batches
    ahead. A worker of an IterableDataset has the random numbers that DataLoader would give it; a batch of a data set that
    is indexed has its own, which depend on its number in the epoch and the seed of the epoch, never on the worker.
    (Threads share those of the process.) `torch.utils.data.get_worker_info()` answers in both kinds of workers.

    What differs: an exception of the data set is raised as it is, with its own traceback, and ends the epoch; a batch that
    does not come within `timeout` seconds is a WaitTimeout, after which it may be asked for again; `num_workers` may be any
    number. Threads share the data set, which must allow it; of an IterableDataset each has a shallow copy.

    `state_dict()` and `load_state_dict()` are those of torchdata's StatefulDataLoader: saved between any two batches, the
    next `for` yields exactly the rest of the epoch. The sampler is run again up to there, from its generator's state or
    PyTorch's at the beginning of the epoch; one that draws from elsewhere needs a `state_dict` of its own. An
    IterableDataset, or its iterator, is asked for its `state_dict`; without one, its batches are read again and skipped.

    One thread reads at a time. What a dropped, broken off or failed epoch has started ends by itself.

    Args:
        dataset: has `__getitem__`, or is an IterableDataset. Pickled for processes.
        fetchers: "thread"; "process" or `iw.Processes(...)`: free of the interpreter lock.
        persistent_workers: keep the workers from epoch to epoch.

    Raises:
        ConfigError, ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], object] | None = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        fetchers: str | Threads | Processes = "thread",
    ) -> None:
        known: dict[Any, Threads | Processes] = {"thread": Threads(), "process": Processes()}
        if not isinstance(fetchers, (str, Threads, Processes)) or (isinstance(fetchers, str) and fetchers not in known):
            raise ConfigError(f"fetchers: got {fetchers!r}; wanted 'thread', 'process', iw.Threads() or iw.Processes(...)")
        super().__init__(
            dataset, batch_size, shuffle, sampler, batch_sampler, num_workers, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, None, generator, prefetch_factor=prefetch_factor, persistent_workers=persistent_workers,
        )  # fmt: skip
        self._fetchers = known[fetchers] if isinstance(fetchers, str) else fetchers
        self._is_iterable = isinstance(dataset, IterableDataset)
        self._kept: Team | None = None  # workers that are kept from epoch to epoch
        self._epoch: Callable[[], _Epoch | None] = lambda: None  # of `for`, as long as somebody has it
        self._position = _Position()
        self._resume: _Position | None = None
        if isinstance(self._fetchers, Threads) and num_workers:
            let_threads_have_worker_info()

    def __iter__(self) -> _Epoch:
        """Begin an epoch; where persistent workers are kept, the one before is over."""
        resume, self._resume = self._resume, None
        last = self._epoch()
        if last is not None and self.persistent_workers:
            last.close()
        epoch = _Epoch(self, resume)
        self._epoch, self._position = weakref.ref(epoch), epoch.position
        return epoch

    def check_worker_number_rationality(self) -> None:
        """More workers than cores is no mistake: threads may wait for files, or run without the interpreter lock."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch is. Plain data, if the states of the data set and of the sampler are."""
        position = self._resume or self._position
        if position.is_over and self._resume is None:
            position = _Position(random=self._random())
        return {"format": FORMAT, "workers_of": self.num_workers if self._is_iterable else None, **position.plain()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `for` go on where a state says.

        Raises:
            StateMismatch: it is no state of such a loader: the field, got and wanted.
        """
        workers_of = self.num_workers if self._is_iterable else None
        for field, wanted in (("format", FORMAT), ("workers_of", workers_of)):
            got = state.get(field) if isinstance(state, dict) else None
            if got != wanted:
                raise StateMismatch(f"loader: the state has {field} = {got!r}; wanted {wanted!r}")
        self._resume = _Position(**{name: state[name] for name in _Position().plain()})

    def _order(self) -> Iterator[Any]:
        return iter(self.sampler if self.batch_sampler is None else self.batch_sampler)

    def _fetch(self, seed: int) -> BatchFetch:
        return BatchFetch(
            self.dataset,
            self.collate_fn,
            self.batch_sampler is not None,
            self._is_iterable,
            self.drop_last,
            self.num_workers,
            seed,
            self.worker_init_fn,
            isinstance(self._fetchers, Processes),
        )

    def _sources_of_chance(self) -> list[Any]:
        """Return the generators of the loader and its samplers, each once, and samplers that know their own state."""
        samplers = [self.batch_sampler, getattr(self.batch_sampler, "sampler", None), self.sampler]
        found = [self.generator, *(getattr(each, "generator", None) for each in samplers)]
        found += [each for each in samplers if hasattr(each, "state_dict")]
        return list({id(each): each for each in found if each is not None}.values())

    def _random(self) -> list[Any]:
        states = [
            _text(each.get_state()) if isinstance(each, torch.Generator) else each.state_dict()
            for each in self._sources_of_chance()
        ]
        return [_text(torch.get_rng_state()), *states]

    def _set_random(self, states: list[Any]) -> None:
        for each, state in zip(self._sources_of_chance(), states[1:], strict=True):
            if isinstance(each, torch.Generator):
                each.set_state(_tensor(state))
            else:
                each.load_state_dict(state)


loader = Loader


@dataclasses.dataclass(slots=True)
class _Position:
    """Where an epoch is. `random`: what samplers draw from, as it was at the beginning of the epoch."""

    random: list[Any] = dataclasses.field(default_factory=list)
    seed: int = 0
    round: int = 0  # counts the epochs of its workers
    batches: int = 0  # that the trainer was given
    by_worker: list[int] = dataclasses.field(default_factory=list)  # of an iterated data set
    states: list[Any] = dataclasses.field(default_factory=list)
    ended: list[int] = dataclasses.field(default_factory=list)  # workers that have no more
    turn: int = 0
    is_over: bool = True

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, a copy."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, list) else value for name, value in fields.items()}


class _Epoch:
    """What a `for` over a Loader iterates. One thread at a time."""

    def __init__(self, loader: Loader, resume: _Position | None) -> None:
        self._loader = loader
        self._is_iterable = loader._is_iterable
        workers = loader.num_workers
        lanes = max(1, workers) if self._is_iterable else 1
        if resume is not None and resume.random:
            loader._set_random(resume.random)
        self._given = 0
        self._is_exhausted = False
        with _global_random(resume.random[0] if resume is not None and not resume.is_over else None):
            if resume is None or resume.is_over:
                self.position = _Position(random=loader._random(), by_worker=[0] * lanes, states=[None] * lanes, is_over=False)
                resume = None
            else:
                self.position = resume
            self._begin(resume)
            self._lanes = [lane for lane in range(lanes) if lane not in self.position.ended]
            for _ in range(self.position.batches if not self._is_iterable else 0):
                next(self._indices)
            self._given = self._taken = self.position.batches
            self._first = set(self._lanes)
            if workers:
                for number in range((loader.prefetch_factor or 1) * workers):
                    if self._lanes:
                        self._give(self._lanes[number % len(self._lanes)])

    def _begin(self, resume: _Position | None) -> None:
        """Draw what DataLoader draws, in its order, and have workers."""
        loader, position = self._loader, self.position
        self._indices = loader._order()
        kept = loader._kept
        is_new = kept is None or kept.is_stopped or resume is not None
        if is_new and (resume is None or not position.round):
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())
            if resume is None:
                position.seed = seed
            if loader.num_workers:
                self._indices = loader._order()  # DataLoader, too, begins twice
        if not is_new and kept is not None:
            position.seed, position.round = kept.seed, kept.rounds
            self._team: Team | Inline = kept
        else:
            self._team = self._new_team(position.seed)
        self._team.rounds = position.round + 1
        if loader.persistent_workers and isinstance(self._team, Team):
            loader._kept = self._team

    def _new_team(self, seed: int) -> Team | Inline:
        loader = self._loader
        if loader._kept is not None:
            loader._kept.stop()
        fetch = loader._fetch(seed)
        if not loader.num_workers:
            return Inline(fetch)
        return Team(fetch, loader._fetchers, loader.prefetch_factor or 1, loader.timeout or math.inf)

    def __iter__(self) -> _Epoch:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            WaitTimeout: it did not come within the loader's `timeout`; ask again.
            WorkerDied: a worker process did, too often, or that of an IterableDataset.
            QueueClosed: the epoch has failed before, or another has begun with its workers.
            Exception: what the data set, the sampler, `collate_fn` or `worker_init_fn` raised.
        """
        position, team = self.position, self._team
        if position.is_over:
            raise StopIteration
        if team.is_stopped or team.rounds != position.round + 1:
            raise QueueClosed("loader: this epoch has failed, or another one has begun with its workers")
        while self._lanes:
            at = position.turn % len(self._lanes)
            lane = self._lanes[at]
            if isinstance(team, Inline):
                self._give(lane)
            if not self._is_iterable and self._taken == self._given:
                break
            answer = team.take(lane)
            if answer.is_end:
                del self._lanes[at]
                position.ended.append(lane)
                position.turn = at
                continue
            if not isinstance(team, Inline):
                self._give(lane)
            self._taken += 1
            position.batches += 1
            position.by_worker[lane] += 1
            position.states[lane] = answer.state
            position.turn = at + 1
            if answer.is_last:
                del self._lanes[at]
                position.ended.append(lane)
                position.turn = at
            return _pinned(answer.batch) if self._loader.pin_memory else answer.batch
        self.close()
        position.is_over = True
        raise StopIteration

    def close(self) -> None:
        """No more is wanted of this epoch."""
        if not self._loader.persistent_workers:
            self._team.stop()
        elif isinstance(self._team, Team):
            self._team.discard()

    def _give(self, lane: int) -> None:
        """Have the next batch of this lane read, if there is one."""
        if self._is_exhausted:
            return
        try:
            indices = next(self._indices)
        except StopIteration:
            self._is_exhausted = True
            return
        position = self.position
        order = Order(position.round, self._given, indices)
        if self._is_iterable and lane in self._first:
            self._first.discard(lane)
            order = dataclasses.replace(order, state=position.states[lane], skip=position.by_worker[lane])
        self._given += 1
        self._team.give(lane, pickle.dumps(order, protocol=5))


@contextlib.contextmanager
def _global_random(state: str | None) -> Iterator[None]:
    """Have PyTorch's random numbers be in this state for a while; None: leave them."""
    if state is None:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_tensor(state))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _pinned(batch: Any) -> Any:
    """Return the batch in page-locked memory, as DataLoader does, where there is a device that wants it."""
    if not torch.cuda.is_available():
        return batch
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(batch)


def _text(state: Any) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Any:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
