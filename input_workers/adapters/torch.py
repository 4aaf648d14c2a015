"""A PyTorch data set goes in; what `torch.utils.data.DataLoader` makes of it comes out, read by threads or processes.

Imports PyTorch: loaded when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from input_workers.adapters.torch_epoch import Epoch, Position, tensor_of, text_of
from input_workers.adapters.torch_padding import PaddingCollate
from input_workers.adapters.torch_team import LoaderTeam
from input_workers.adapters.torch_worker import BatchFetch, let_threads_have_worker_info
from input_workers.errors import ConfigError, StateMismatch
from input_workers.fetchers import Processes, Threads, chosen_fetchers
from input_workers.sources.padding import checked_pads

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
        pad_ragged: for entries of items that have unequal length, by key or by place: `{"tokens": 128}` fills them up with
            zeros along their first axis, to that length, and a longer one is an error; `(128, -1)` fills with another
            value; "longest" in place of a length: to the longest of the batch. Behind the other entries comes one for each
            of these, with the lengths that they had: `tokens_length`, or one more place.

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
        pad_ragged: Mapping[Any, Any] | None = None,
    ) -> None:
        chosen = chosen_fetchers(fetchers)
        pads = checked_pads("loader", pad_ragged)
        if pads:
            if collate_fn is not None or (batch_size is None and batch_sampler is None):
                raise ConfigError("loader: pad_ragged with a collate_fn, or without batches; wanted one or the other")
            collate_fn = PaddingCollate(pads, default_collate)
        super().__init__(
            dataset, batch_size, shuffle, sampler, batch_sampler, num_workers, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, None, generator, prefetch_factor=prefetch_factor, persistent_workers=persistent_workers,
        )  # fmt: skip
        self._fetchers = chosen
        self._is_iterable = isinstance(dataset, IterableDataset)
        self._kept: LoaderTeam | None = None  # workers that are kept from epoch to epoch
        self._position = Position()
        self._resume: Position | None = None
        if isinstance(self._fetchers, Threads) and num_workers:
            let_threads_have_worker_info()

    def __iter__(self) -> Epoch:
        """Begin an epoch; where persistent workers are kept, the one before is over."""
        resume, self._resume = self._resume, None
        if self._kept is not None:
            self._kept.discard()
        epoch = Epoch(self, resume)
        self._position = epoch.position
        return epoch

    def check_worker_number_rationality(self) -> None:
        """More workers than cores is no mistake: threads may wait for files, or run without the interpreter lock."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch is. Plain data, if the states of the data set and of the sampler are."""
        position = self._resume or self._position
        if position.is_over and self._resume is None:
            position = Position(random=self._random())
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
        self._resume = Position(**{name: state[name] for name in Position().plain()})

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
            text_of(each.get_state()) if isinstance(each, torch.Generator) else each.state_dict()
            for each in self._sources_of_chance()
        ]
        return [text_of(torch.get_rng_state()), *states]

    def _set_random(self, states: list[Any]) -> None:
        for each, state in zip(self._sources_of_chance(), states[1:], strict=True):
            if isinstance(each, torch.Generator):
                each.set_state(tensor_of(state))
            else:
                each.load_state_dict(state)


loader = Loader
