"""The batches of one device go in, epoch by epoch; what Keras' `fit`, `evaluate` and `predict` take comes out.

Imports Keras: loaded when `epochs()` is first called.
"""

from __future__ import annotations

import abc
import collections
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from input_workers.errors import ConfigError, EndOfData, InputWorkersError

try:
    # Keras passes such an adapter through as it is; it is the one way to hand over batches that are not computed by index.
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter
    from keras.src.trainers.data_adapters.data_adapter_utils import get_jax_iterator, get_numpy_iterator, get_torch_dataloader
except ImportError as error:
    raise ConfigError("this needs Keras 3: pip install input-workers[keras]") from error

__all__ = ["BatchReader", "KerasBatches", "KerasEpochs"]

# Keras takes so many batches from the first epoch to build a model from, and begins the epoch anew.
MOST_BUILD_BATCHES = 2
# What Keras says when an epoch is over before its last step.
RAN_OUT = "Your input ran out of data"


class BatchReader(Protocol):
    """Where batches come from: a device of a source."""

    def next_batch(self) -> Any:
        """Return the next batch."""

    def batch_specs(self) -> Any:
        """Return a batch's structure with (shape, dtype) of each array."""


class KerasBatches(DataAdapter, abc.ABC):  # type: ignore[misc]  # Keras is not typed
    """Batches as Keras takes them, an epoch at a time. For one `fit` at a time.

    What goes wrong in the source comes out of `fit` as it is, whatever Keras' backend is.
    """

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    @abc.abstractmethod
    def begin(self) -> Iterator[Any]:
        """Return an iterator over the next epoch."""

    @abc.abstractmethod
    def signature(self, spec: Callable[[Sequence[int | None], np.dtype[Any]], Any]) -> Any:
        """Return a batch of what `spec(shape, dtype)` makes."""

    @property
    def batch_size(self) -> int | None:
        """None: Keras does not need to know."""
        return None

    def get_numpy_iterator(self) -> Any:
        """Return an iterator over an epoch, of NumPy arrays."""
        return get_numpy_iterator(_explained(self.begin()))

    def get_jax_iterator(self) -> Any:
        """Return an iterator over an epoch, of what JAX takes: its own arrays as they are, others as NumPy's."""
        return get_jax_iterator(_explained(self.begin()))

    def get_torch_dataloader(self) -> Any:
        """Return an epoch as a DataLoader, of tensors where Keras computes."""
        return get_torch_dataloader(_explained(self.begin()))

    def get_tf_dataset(self) -> Any:
        """Return a `tf.data.Dataset` of which each iteration is an epoch."""
        import tensorflow as tf

        def batches() -> Iterator[Any]:
            try:
                yield from _explained(self.begin())
            except Exception as error:
                # TensorFlow would only quote it. So its epoch ends here, and `on_epoch_end` raises it.
                self._failure = error
                warnings.filterwarnings("ignore", RAN_OUT)

        return tf.data.Dataset.from_generator(batches, output_signature=self.signature(tf.TensorSpec))

    def on_epoch_end(self) -> None:
        """Keras has read an epoch. Raises what ended it, where TensorFlow could not."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            filters: list[Any] = warnings.filters  # type: ignore[assignment]  # it is a list
            filters[:] = [entry for entry in filters if getattr(entry[1], "pattern", "") != RAN_OUT]
            raise failure


class KerasEpochs(KerasBatches):
    """The batches of a device, cut into epochs of so many steps. Each goes on where the one before it ended.

    Args:
        reader: where the batches come from.
        steps: batches of an epoch.
        arrange: makes a batch what Keras expects: `(x, y)`, `(x, y, sample_weight)` or `(x,)`, each an array or a dict or
            tuple of arrays. Called with a batch, and with `TensorSpec`s in its place.
    """

    def __init__(self, reader: BatchReader, steps: int, arrange: Callable[[Any], Any]) -> None:
        super().__init__()
        self._reader = reader
        self._steps = steps
        self._arrange = arrange
        self._epoch: _Epoch | None = None
        self._given_back: collections.deque[Any] = collections.deque()

    @property
    def num_batches(self) -> int:
        """Steps of an epoch."""
        return self._steps

    def __len__(self) -> int:
        return self._steps

    def begin(self) -> _Epoch:
        """Return an iterator over the next epoch. It begins with what was taken only to build the model from it."""
        if self._epoch is not None:
            self._given_back.extendleft(reversed(self._epoch.unused))
        self._epoch = _Epoch(self._next, self._steps)
        return self._epoch

    def signature(self, spec: Callable[[Sequence[int | None], np.dtype[Any]], Any]) -> Any:
        """Return a batch of what `spec(shape, dtype)` makes."""
        specs = self._reader.batch_specs()
        return self._arrange(specs._make(spec(*each) for each in specs))

    def on_epoch_end(self) -> None:
        """Keras has read an epoch, or has built its model from the first batches of one, which are then read again.

        (So are these, should a `fit` have been stopped after them, and another one begin. With its own `steps_per_epoch`,
        `fit` calls this in the midst of an epoch, and goes on with it.)
        """
        if self._epoch is not None:
            self._epoch.is_left = True
        super().on_epoch_end()

    def _next(self, is_first: bool) -> Any:
        if self._given_back:
            return self._given_back.popleft()
        try:
            return self._arrange(self._reader.next_batch())
        except EndOfData:
            if not is_first:
                raise
            # Of a Stream with epoch_end="break": the mark that follows the last step of the epoch before.
            return self._arrange(self._reader.next_batch())


class _Epoch:
    """An iterator over one epoch.

    Attributes:
        is_over: it has ended.
        is_left: Keras has said that it ends here; it may go on all the same, having used what it took.
    """

    def __init__(self, next_batch: Callable[[bool], Any], steps: int) -> None:
        self._next = next_batch
        self._left = self._steps = steps
        self._first: list[Any] | None = []  # its batches so far, as long as these are few
        self.is_over = False
        self.is_left = False

    @property
    def unused(self) -> list[Any]:
        """Its few batches, if Keras has left it after them."""
        return self._first if self._first is not None and self.is_left and not self.is_over else []

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        if self.is_over:
            raise StopIteration
        if self.is_left:
            self._first = None
        try:
            batch = self._next(self._left == self._steps)
        except EndOfData:
            self.is_over = True
            raise StopIteration from None
        self._left -= 1
        self.is_over = not self._left
        if self._first is not None:
            self._first = [*self._first, batch] if len(self._first) < MOST_BUILD_BATCHES else None
        return batch


def _explained(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass batches on. Keras raises what passes through it `from None`, so what the cause was is noted."""
    try:
        yield from batches
    except InputWorkersError as error:
        if error.cause is not None:
            error.add_note("".join(traceback.format_exception(error.cause)))
        raise
