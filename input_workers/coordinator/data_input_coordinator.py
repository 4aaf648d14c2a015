"""The handle of a source: what a trainer iterates. Batches come out."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.checks import check_whole
from input_workers.contracts import ArraySpec
from input_workers.coordinator.condition import Condition, condition_of
from input_workers.coordinator.source_core import SourceCore
from input_workers.coordinator.tracing import Tracing
from input_workers.errors import ConfigError, EndOfData
from input_workers.metrics.snapshot import DeviceStats, SourceStats

if TYPE_CHECKING:
    from input_workers.coordinator.keras_epochs import KerasEpochs

__all__ = ["DataInputCoordinator", "DeviceInput"]


class DeviceInput:
    """One device of a source: iterate it, or ask for `next_batch`. Thread-safe: each batch goes to one caller.

    A batch is a namedtuple of the input names, with `epoch` (of its first row) and `valid_rows` (without padding).
    """

    def __init__(
        self, core: SourceCore, name: str, owner: DataInputCoordinator | None = None, *, as_numpy: bool = False
    ) -> None:
        self._core = core
        self._name = name
        self._owner = owner  # held, because the run ends with the last handle of its source
        self._as_numpy = as_numpy

    @property
    def name(self) -> str:
        """ "gpu_0/train": its key in the coordinator."""
        return self._name

    def next_batch(self, timeout_s: float | None = None) -> Any:
        """Return the next batch, exactly `batch_size` rows unless it is the last of an epoch or stream.

        Args:
            timeout_s: how long to wait, in seconds; None: the source's `timeout_s`; inf: for ever; 0: not at all.

        Raises:
            WaitTimeout: none came in time; nothing is lost, ask again.
            EndOfData: no batch is left, in this epoch (`epoch_end="break"`) or at all.
            SourceFailed, FeedFailed: the source broke; the cause is the first failure. Every later call raises it too.
            QueueClosed: it was stopped.
            LifecycleError: it was never started.
        """
        core = self._core
        if timeout_s is None:
            timeout_s = core.settings.timeout_s
        elif not timeout_s >= 0.0:
            raise ConfigError(f"timeout_s: got {timeout_s!r}; wanted seconds of at least 0 (inf: without an end)")
        run = core.run or core.started_run()
        trace = core.recorder.trace
        if trace is None:
            return run.next_batch(run.devices[self._name], timeout_s, self._as_numpy)
        with trace.whole.trainer().next_batch(self._name):
            return run.next_batch(run.devices[self._name], timeout_s, self._as_numpy)

    def as_numpy(self) -> DeviceInput:
        """Return another handle of this device, which delivers NumPy arrays, whatever the feed. Dtypes stay as they are.

        Both take from the same batches: each goes to one caller. What lies in host memory is not copied where the framework
        allows (NumPy, PyTorch, JAX, and TensorFlow's numbers), and the array holds the memory; that of JAX and TensorFlow
        is read-only. What lies on another device is copied, once it is there.
        """
        return DeviceInput(self._core, self._name, self._owner, as_numpy=True)

    def batch_specs(self, timeout_s: float | None = None) -> Any:
        """Return the source's namedtuple with (shape, dtype) of each array of a batch; None in a shape: any number of rows.

        Raises what `DataInputCoordinator.specs` does.
        """
        core = self._core
        settings = core.settings
        varies = not settings.rebatch or settings.last_batch == "keep"
        rows = None if varies else core.devices[self._name].batch_size
        specs = core.specs(timeout_s)
        return core.make_batch(
            [
                ((*spec.shape[:axis], rows, *spec.shape[axis:]), spec.dtype)
                for spec, axis in zip(specs, settings.batch_axes, strict=True)
            ]
        )

    def epochs(self, steps_per_epoch: int | None = None, arrange: Callable[[Any], Any] = tuple) -> KerasEpochs:
        """Return the batches as Keras 3 takes them, whatever its backend: `model.fit(coordinator["train"].epochs(100))`.

        An epoch goes on where the one before it ended; the source must have been started. With the TensorFlow backend,
        TensorFlow takes some batches ahead, so use `state_dict(delivered=...)` there. For one `fit` at a time.

        Args:
            steps_per_epoch: batches of an epoch; None: as many as an epoch of the Stream has for this device.
            arrange: makes a batch what Keras expects, by default the tuple of its inputs: `lambda batch: ({"left":
                batch.left, "right": batch.right}, batch.label)`. It must only rearrange: it is called for a description
                of a batch, too.

        Raises:
            ConfigError: the number of steps is not known; Keras is not installed.
        """
        from input_workers.coordinator.keras_epochs import KerasEpochs

        steps = self._core.batches_of_epoch if steps_per_epoch is None else steps_per_epoch
        if steps is None:
            raise ConfigError(
                f"source {self._core.settings.name!r}: epochs(): wanted steps_per_epoch, since it is known only for a Stream, "
                "or a Mix that ends, with one device, and not with rebatch=False"
            )
        check_whole("epochs: steps_per_epoch", steps, 1)
        return KerasEpochs(self, steps, arrange)

    def __iter__(self) -> DeviceInput:
        return self

    def __next__(self) -> Any:
        try:
            return self.next_batch()
        except EndOfData:
            raise StopIteration from None

    def stats(self) -> DeviceStats:
        """Return the numbers of this device."""
        return self._core.stats().devices[self._name]

    def stop(self) -> None:
        """Take the device out of the rotation; what was queued for it is `stopped`. The others go on."""
        self._core.started_run().stop_device(self._name)


class DataInputCoordinator:
    """A source: iterate it, where it has one device. Thread-safe: each batch goes to one caller.

    It is an object with `__next__`, never a generator: a `WaitTimeout` in a `for` leaves it as it was.
    """

    def __init__(self, core: SourceCore) -> None:
        self._core = core
        self._only: DeviceInput | None = None  # kept, because `next_batch` is called for each batch
        # When nobody holds this handle any more, its run ends. The finalizer only asks for it.
        weakref.finalize(self, core.request_stop).atexit = False

    @property
    def name(self) -> str:
        """The name of the source."""
        return self._core.settings.name

    def device(self) -> DeviceInput:
        """Return its device. Raises ConfigError, naming them, where it has several."""
        names = list(self._core.devices)
        if len(names) != 1:
            raise ConfigError(f"source {self.name!r} has several devices; wanted one of coordinator[...] for {names}")
        device = DeviceInput(self._core, names[0])
        if self._core.run is not None:  # before the first start, devices may still be added
            self._only = device
        return device

    def next_batch(self, timeout_s: float | None = None) -> Any:
        """Return the next batch of the only device; see `DeviceInput.next_batch`."""
        return (self._only or self.device()).next_batch(timeout_s)

    def epochs(self, steps_per_epoch: int | None = None, arrange: Callable[[Any], Any] = tuple) -> KerasEpochs:
        """Return the batches of the only device as Keras 3 takes them; see `DeviceInput.epochs`."""
        return DeviceInput(self._core, self.device().name, self).epochs(steps_per_epoch, arrange)

    def as_numpy(self) -> DeviceInput:
        """Return an iterator over the same batches as NumPy arrays; see `DeviceInput.as_numpy`.

        It holds this source, so that its run goes on. Raises ConfigError where the source has several devices.
        """
        return DeviceInput(self._core, self.device().name, self, as_numpy=True)

    def __iter__(self) -> DataInputCoordinator:
        self.device()
        return self

    def __next__(self) -> Any:
        try:
            return (self._only or self.device()).next_batch()
        except EndOfData:
            raise StopIteration from None

    def specs(self, timeout_s: float | None = None) -> tuple[ArraySpec, ...]:
        """Return what one row of each input looks like: as given, or as in the first chunk, which is waited for.

        Raises:
            WaitTimeout: no chunk came in time.
            EndOfData, SourceFailed: none will come.
            LifecycleError: the specs were not given and the source was never started.
        """
        return self._core.specs(timeout_s)

    def stats(self) -> SourceStats:
        """Return the numbers of this moment; counts go on over stop and start."""
        return self._core.stats()

    def condition(self, stalled_after_s: float = 60.0) -> Condition:
        """Return whether the source makes progress, and if not, why.

        Args:
            stalled_after_s: it is stalled if a trainer asked for a batch so many seconds ago, got none, and none has come
                since. A trainer that does not ask is not waited for.
        """
        run = self._core.run
        return Condition("new") if run is None else condition_of(run, stalled_after_s)

    def put_metric(self, key: str, value: float, count: bool = True) -> None:
        """Add to a sum that external loggers get, of their interval, as `key`, and how often as `key_count`."""
        self._core.recorder.put_metric(key, value, count)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Stop this source alone; True: everything ended. Every waiting and later read raises QueueClosed."""
        self._core.abort()
        stuck, wrong = self._core.join(time.monotonic() + min(timeout_s, math.inf))
        return not stuck and not wrong

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """Return where the Stream is: what the trainer has received, to the row. Plain data that JSON can hold.

        Valid at any moment between two batches; it changes nothing. Ordered delivery takes a few hundred bytes, unordered
        some 24 more for each request that is not finished. After `stop()`: the last position; before `start()`: where it
        will begin.

        Args:
            delivered: the state after so many batches of this run, for a trainer that takes batches ahead: one of the last
                64. At the end of an epoch with `epoch_end="break"`, it is the state before the `for` has ended.

        Raises:
            StateMismatch: a plain function has no position.
            ConfigError: that number of batches is too long ago, or not reached.
        """
        return self._core.state(delivered)

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Let the next `start()` begin where a state says. Batch size, workers and their kind may have changed.

        Args:
            state: what `state_dict` returned; or a list with that of every shard, saved together, where the number of
                shards has changed: what they had left of the unfinished epochs is dealt anew.

        Raises:
            StateMismatch: something has changed that must not (rows, seed, names, the streams of a Mix): the field, got
                and wanted. The source is as it was.
            LifecycleError: the source is running.
        """
        self._core.load(self._core.check_state(state))

    def trace(self, path: str | os.PathLike[str], seconds: float = 5.0) -> Tracing:
        """Record what every thread of the source does in the next seconds, into a file for https://ui.perfetto.dev.

        It returns at once and ends by itself, so the trainer may call it and go on. The file then shows, side by side: each
        fetcher in its calls, with the parts that `timed` names, copying its rows into batches, with the waits for room
        inside, or without data; the enqueuer waiting for rows or for room on a device, and in the feed's send; the trainer
        waiting, and training from one batch to the next; and how many batches are being filled and are on each device.
        Worker processes have their own rows, and the times of their own clock; their parts begin with the second call after
        the trace did. With `num_workers=0` the calls on the fetcher's row are made by the trainer's thread while it waits.

        While it runs, it takes about a microsecond an event. A trace of 200,000 events (60 MB at most) ends early and says so.
        It also ends, with what there is, when the source does.

        Args:
            path: of the file, in Chrome's Trace Event Format; it appears whole or not at all, when the trace has ended.
            seconds: for how long.

        Returns:
            The trace in the making: `wait()` waits for the file, which the trainer need not do; `request_stop()` ends it now.

        Raises:
            OSError: the file could not be written.
            LifecycleError: the source does not run, or is being traced already.
            ConfigError: the seconds are none.
        """
        return Tracing([self._core], path, seconds)
