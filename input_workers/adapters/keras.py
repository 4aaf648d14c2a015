"""A Keras PyDataset goes in; what `fit`, `evaluate` and `predict` take comes out, its batches made by our workers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from input_workers.adapters.structure import Structure
from input_workers.checks import check_whole
from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import init_data_input_workers
from input_workers.coordinator.keras_epochs import KerasBatches
from input_workers.errors import ConfigError, EndOfData, SpecMismatch, WaitTimeout
from input_workers.fetchers import Processes, Threads
from input_workers.sources.stream import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ParallelDataset", "parallel"]

# Keras looks at so many batches to see which sides of them vary.
SAMPLE_ITEMS = 2


def parallel(
    py_dataset: Any,
    workers: int = 8,
    fetchers: str | Threads | Processes = "process",
    *,
    shuffle: bool = False,
    seed: int = 0,
    ordered: bool = True,
    max_buffered_batches: int = 16,
    fetch_timeout_s: float | None = None,
) -> ParallelDataset:
    """Return an existing `keras.utils.PyDataset` (or `Sequence`) as Keras takes it, with `__getitem__` run by our workers.

    `model.fit(adapters.keras.parallel(train, workers=8), epochs=20)`. Each epoch every batch comes once. Its workers live
    as long as the epoch, so that they have the dataset as `on_epoch_end` leaves it: that is called once an epoch, in the
    trainer's process, and `on_epoch_begin` likewise. What an epoch that was broken off leaves running ends when Keras lets
    go of it, at the next epoch, at `close()`, and at the end of a `with` or of the program.

    In processes the dataset is sent by cloudpickle; its large arrays should be `iw.sources.SharedArrays`, or files. The
    random numbers of `random` and `numpy.random` depend on the seed, the epoch and the index alone, whoever makes the batch.

    Args:
        py_dataset: has `__getitem__(index)` and `__len__()`; a batch may be nested, and is of arrays. The first two are made
            here once, to see their structure, as Keras does.
        workers: how many.
        fetchers: "process", "thread", or with options.
        shuffle: read the indices in another order in each epoch, which `seed` decides. (Keras' own `shuffle` does not reach
            what is passed to it.)
        seed: of the order, and of random numbers in processes.
        ordered: deliver in the order of the indices; False: as they are ready.
        max_buffered_batches: how many finished batches may wait.
        fetch_timeout_s: a batch that takes longer is a FetchTimeout.

    Raises:
        ConfigError: it has no length or no batch; a parameter is wrong.
        SpecMismatch: a batch holds something that is no array.
    """
    if not hasattr(py_dataset, "__getitem__") or not hasattr(py_dataset, "__len__"):
        raise ConfigError(
            f"keras.parallel: got {type(py_dataset).__qualname__}; wanted a keras.utils.PyDataset with __getitem__ and __len__"
        )
    check_whole("keras.parallel: workers", workers, 0)
    if fetchers == "process":
        fetchers = Processes(preload=("keras",))
    return ParallelDataset(
        _Items(py_dataset),
        seed,
        shuffle,
        {
            "num_workers": workers,
            "fetchers": fetchers,
            "ordered": ordered,
            "max_buffered_batches": max_buffered_batches,
            "fetch_timeout_s": fetch_timeout_s,
        },
    )


class _Items:
    """The dataset as a source: a row is one of its batches. Sent to workers.

    Attributes:
        structure: of every batch.
        specs: an array of a batch each; sides are None where they may vary.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if not len(self):
            raise ConfigError(f"keras.parallel: {type(dataset).__qualname__} has no batch; wanted at least one")
        first, *more = [dataset[index] for index in range(min(SAMPLE_ITEMS, len(self)))]
        self.structure = Structure(first, "batch 0")
        arrays = self.structure.flatten(first, "batch 0")
        others = [self.structure.flatten(each, "batch 1") for each in more]
        for name, array in zip(self.structure.names, arrays, strict=True):
            if not array.ndim:
                raise SpecMismatch(f"keras.parallel: batch 0: {name!r} is a single number; wanted rows along the first axis")
        self.specs = [ArraySpec((None,) * array.ndim, array.dtype) for array in arrays]
        self.shapes = [
            (None, *(side if all(other[at].shape[axis] == side for other in others) else None
                     for axis, side in enumerate(array.shape[1:], 1)))
            for at, array in enumerate(arrays)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Return one batch of the dataset, as one row."""
        index = int(rows[0])
        return [array[np.newaxis] for array in self.structure.flatten(self.dataset[index], f"batch {index}")]


class ParallelDataset(KerasBatches):
    """What `parallel` returns, for Keras. For one `fit` at a time."""

    def __init__(self, items: _Items, seed: int, shuffle: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        self._options = options
        self._epoch_number = 0
        self._reading: _Progress | None = None  # of the epoch that was begun last
        self._epochs: weakref.WeakSet[_Epoch] = weakref.WeakSet()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def begin(self) -> _Epoch:
        """Return an iterator over an epoch. Its workers start with the first batch, and end with the last."""
        epoch = _Epoch(self._start)
        self._epochs.add(epoch)
        return epoch

    def signature(self, spec: Callable[[Sequence[int | None], np.dtype[Any]], Any]) -> Any:
        """Return a batch of what `spec(shape, dtype)` makes."""
        items = self._items
        leaves = [spec(shape, each.dtype) for shape, each in zip(items.shapes, items.specs, strict=True)]
        return items.structure.unflatten(leaves)

    def on_epoch_begin(self) -> None:
        """Keras begins to read an epoch."""
        super().on_epoch_begin()
        getattr(self._items.dataset, "on_epoch_begin", _nothing)()

    def on_epoch_end(self) -> None:
        """Keras has read an epoch; or has looked at its beginning, which does not count."""
        super().on_epoch_end()
        reading = self._reading
        if reading is not None and (reading.taken > SAMPLE_ITEMS or reading.taken == reading.steps):
            self._reading = None
            self._epoch_number += 1
            getattr(self._items.dataset, "on_epoch_end", _nothing)()

    def close(self) -> None:
        """End the workers of an epoch that was broken off. The next epoch has its own."""
        for epoch in list(self._epochs):
            epoch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _start(self) -> tuple[GlobalCoordinator, Callable[[Sequence[Any]], Any], _Progress]:
        """Start the workers of an epoch."""
        self.close()  # of one that nobody reads any more
        items = self._items
        seed = int(np.random.SeedSequence((self._seed, self._epoch_number)).generate_state(1)[0])
        stream = Stream(items, shuffle=self._shuffle, seed=seed, rows_per_request=1)
        coordinator = init_data_input_workers(
            "numpy",
            items.structure.names,
            stream,
            1,
            input_source_name=type(items.dataset).__name__,
            rebatch=False,
            specs=items.specs,
            coordinator=GlobalCoordinator(),
            **self._options,
        )
        coordinator.start()
        self._reading = _Progress(len(items))
        return coordinator, items.structure.unflatten, self._reading


class _Progress:
    """How much of an epoch was read. It does not hold the workers."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.taken = 0


class _Epoch:
    """An iterator over one epoch. It holds the workers, which end when it does, or is dropped."""

    def __init__(self, start: Callable[[], tuple[GlobalCoordinator, Callable[[Sequence[Any]], Any], _Progress]]) -> None:
        self._start = start
        self._coordinator: GlobalCoordinator | None = None
        self._source: Any = None
        self._closed = False

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        if self._coordinator is None:
            self._coordinator, self._unflatten, self._progress = self._start()
            (self._source,) = self._coordinator
        try:
            batch = self._source.next_batch()
        except EndOfData:
            self.close()
            raise StopIteration from None
        except WaitTimeout:
            raise
        except BaseException:
            self.close()
            raise
        self._progress.taken += 1
        if self._progress.taken == self._progress.steps:
            self.close()
        return self._unflatten([array[0] for array in batch])

    def close(self) -> None:
        """End the workers. Idempotent."""
        if self._coordinator is not None:
            self._closed = True
            self._coordinator.stop()


def _nothing() -> None:
    pass
