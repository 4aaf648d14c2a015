"""One epoch of a loader: what the sampler gives goes to the workers ahead of the trainer, batches come back in its order.

Imports PyTorch: loaded when a loader is made.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import math
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from input_workers.adapters.torch_team import Inline, LoaderTeam
from input_workers.adapters.torch_worker import Order
from input_workers.errors import QueueClosed

if TYPE_CHECKING:
    from input_workers.adapters.torch import Loader

__all__ = ["Epoch", "Position", "tensor_of", "text_of"]


@dataclasses.dataclass(slots=True)
class Position:
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


class Epoch:
    """What a `for` over a Loader iterates. One thread at a time."""

    def __init__(self, loader: Loader, resume: Position | None) -> None:
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
                self.position = Position(random=loader._random(), by_worker=[0] * lanes, states=[None] * lanes, is_over=False)
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

    def _begin(self, resume: Position | None) -> None:
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
            self._team: LoaderTeam | Inline = kept
        else:
            self._team = self._new_team(position.seed)
        self._team.rounds = position.round + 1
        if loader.persistent_workers and isinstance(self._team, LoaderTeam):
            loader._kept = self._team

    def _new_team(self, seed: int) -> LoaderTeam | Inline:
        loader = self._loader
        if loader._kept is not None:
            loader._kept.stop()
        fetch = loader._fetch(seed)
        if not loader.num_workers:
            return Inline(fetch)
        return LoaderTeam(fetch, loader._fetchers, loader.prefetch_factor or 1, loader.timeout or math.inf)

    def __iter__(self) -> Epoch:
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
        if not self._loader.persistent_workers:
            team.stop()
        position.is_over = True
        raise StopIteration

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
    torch.set_rng_state(tensor_of(state))
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


def text_of(state: Any) -> str:
    """Return the state of a generator as text."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def tensor_of(text: str) -> Any:
    """Return the state of a generator from its text."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
