"""A source goes in, a tf.data.Dataset comes out; or the other way round, a Dataset as a fetch function."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from input_workers.coordinator.data_input_coordinator import DataInputCoordinator, DeviceInput
from input_workers.errors import ConfigError, EndOfData, SpecMismatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["dataset", "fetch", "own_errors"]


def dataset(source: DataInputCoordinator | DeviceInput, timeout_s: float | None = None) -> Any:
    """Return a `tf.data.Dataset` of the batches of a source that was started.

    An element is the source's namedtuple of tensors; its static shape has the batch size wherever every batch has it
    (`last_batch="drop"` or `"pad"`). Each iteration goes on with the source's next batch, which it takes from whoever else
    reads the source; with `epoch_end="break"` it is an epoch, so `fit` may be given the dataset for several.
    `prefetch` and `fit` take batches ahead of the training step; `state_dict(delivered=n)` tells a state from before.

    A source on the host is what fits best: what is on a GPU would come back for TensorFlow to take over. A tensor holds
    the memory of its batch, so what is prefetched or kept never changes.

    What goes wrong in the source is raised by the iterators of the dataset, and of those made from it by its methods, as
    the exception that `next_batch` raises, the user's own exception its cause. Where TensorFlow itself iterates, as in a
    `tf.function`, in Keras' `fit` or in `tf.distribute`, use `own_errors`.

    Args:
        source: `coordinator["train"]`, or one of its devices.
        timeout_s: how long to wait for the specs, where they were not given; None: the source's own.

    Raises:
        ConfigError: the source has several devices.
        LifecycleError: it was not started, and its specs were not given.
        SpecMismatch: TensorFlow has no such dtype.
        WaitTimeout, EndOfData, SourceFailed: there is no first chunk to learn the specs from.
    """
    device = source if isinstance(source, DeviceInput) else source.device()
    signature = device.batch_specs(timeout_s)
    signature = signature._make(tf.TensorSpec(shape, _dtype(device.name, dtype)) for shape, dtype in signature)
    failures: list[BaseException] = []

    def batches() -> Iterator[Any]:
        failures.clear()  # what went wrong in an earlier iteration, such as a WaitTimeout, is not what goes wrong in this
        try:
            yield from device
        except Exception as error:
            failures[:] = [error]
            raise

    return _with_own_errors(tf.data.Dataset.from_generator(batches, output_signature=signature), failures)


@contextlib.contextmanager
def own_errors(dataset: Any) -> Iterator[None]:
    """Raise what went wrong in the source of `dataset` as it is, where TensorFlow raises an error that only quotes it.

    `with own_errors(batches): model.fit(batches)`. `dataset`: made by `dataset()`, or from such a one by its methods.
    """
    failures = _failures_of(dataset)
    if failures is None:
        raise ConfigError(f"own_errors: got {type(dataset).__qualname__}; wanted what adapters.tf_data.dataset() returned")
    with _own_errors(failures):
        yield


def fetch(dataset: Any, batched: bool = True) -> Callable[[int, int], list[NDArray[Any]]]:
    """Return a fetch function over a `tf.data.Dataset`: the components of an element are the inputs, in `tf.nest`'s order.

    All fetchers share one iterator, so each element is fetched once, and a second fetcher helps only to convert: what the
    dataset does in parallel, it does by itself. The end of the dataset is the end of the source; the next call after that
    begins anew. For threads: a dataset cannot be sent to another process.

    Args:
        dataset: its components are dense tensors of numbers, bools or bytes that fit into a NumPy dtype.
        batched: its elements have the rows along their first axis; False: an element is a row, and as many as a batch
            has are fetched in one call.

    Raises:
        ConfigError: it is no Dataset, or a component is not dense.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise ConfigError(f"tf_data.fetch: got {type(dataset).__qualname__}; wanted a tf.data.Dataset")
    for spec in tf.nest.flatten(dataset.element_spec):
        if not isinstance(spec, tf.TensorSpec) or spec.dtype in (tf.string, tf.variant, tf.resource):
            remedy = "fixed-size values: decode strings, and to_tensor() or padded_batch() for ragged and sparse ones"
            raise ConfigError(f"tf_data.fetch: an element has the component {spec}; wanted dense tensors of {remedy}")
    return _Fetch(dataset, batched)


class _Fetch:
    # Invariant under _lock: `_iterator` is of the pass that was begun last; `_told` are the workers that saw its end.

    def __init__(self, dataset: Any, batched: bool) -> None:
        self._dataset = dataset
        self._batched = batched
        self._lock = threading.Lock()
        self._iterator: Any = None
        self._told: set[int] = set()

    def __call__(self, worker_id: int, batch_size: int) -> list[NDArray[Any]]:
        with self._lock:
            if self._iterator is None or worker_id in self._told:
                self._iterator = iter(self._dataset if self._batched else self._dataset.batch(batch_size))
                self._told.clear()
            iterator = self._iterator
        try:
            element = next(iterator)
        except StopIteration:
            with self._lock:
                if iterator is self._iterator:
                    self._told.add(worker_id)
            raise EndOfData("the tf.data.Dataset has ended") from None
        return [tensor.numpy() for tensor in tf.nest.flatten(element)]


def _with_own_errors(dataset: Any, failures: list[BaseException]) -> Any:
    """Have the iterators of a dataset, and of what is made from it, raise the source's errors; return it.

    TensorFlow has no place to say what an iterator raises, so each of these objects gets a class of its own, which has
    nothing but two or three methods before those of the class that it had.
    """
    if _failures_of(dataset) is not None:
        return dataset
    kind: Any = type(dataset)

    class OwnErrors(kind):  # type: ignore[misc]  # its class is known here only
        __slots__ = ()
        _failures_of_source = failures

        def __iter__(self) -> Any:
            iterator = super().__iter__()
            return _iterator_with_own_errors(iterator, failures) if tf.executing_eagerly() else iterator

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name.startswith("_") or not inspect.ismethod(value):
                return value

            @functools.wraps(value)
            def method(*args: Any, **kwargs: Any) -> Any:
                result = value(*args, **kwargs)
                return _with_own_errors(result, failures) if isinstance(result, tf.data.Dataset) else result

            return method

    dataset.__class__ = OwnErrors
    return dataset


def _iterator_with_own_errors(iterator: Any, failures: list[BaseException]) -> Any:
    kind: Any = type(iterator)

    class OwnErrors(kind):  # type: ignore[misc]  # its class is known here only
        __slots__ = ()

        def __next__(self) -> Any:
            with _own_errors(failures):
                return super().__next__()

        def get_next(self) -> Any:
            with _own_errors(failures):
                return super().get_next()

    iterator.__class__ = OwnErrors
    return iterator


def _failures_of(dataset: Any) -> list[BaseException] | None:
    return getattr(dataset, "_failures_of_source", None)


@contextlib.contextmanager
def _own_errors(failures: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as quoting:
        if not failures:
            raise
        error = failures[0]
        raise error from error.__cause__ or quoting


def _dtype(name: str, dtype: np.dtype[Any]) -> Any:
    try:
        return tf.as_dtype(dtype)
    except TypeError:
        raise SpecMismatch(f"source {name!r}: got dtype {dtype}, which TensorFlow lacks; wanted a number or bool") from None
