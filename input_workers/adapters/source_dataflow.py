"""A source goes in, a tensorpack DataFlow comes out: one epoch for each time it is iterated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from input_workers.coordinator.data_input_coordinator import DataInputCoordinator, DeviceInput
from input_workers.errors import ConfigError, EndOfData
from input_workers.sources.mix import Mix
from input_workers.sources.stream import Stream

__all__ = ["SourceDataFlow"]


class SourceDataFlow:
    """A started source as a DataFlow: data points are its batches, as lists of arrays, or its rows.

        df = SourceDataFlow(coordinator["train"], rows=True)
        for image, label in df: ...                      # or any DataFlow over it, such as BatchData(df, 32)

    Each `iter` reads one epoch where the source is a Stream with `epoch_end="break"`, and else until its data end. It goes on
    where the one before has stopped. One that begins when all data have ended raises EndOfData, lest who repeats a
    DataFlow that is empty never comes back.

    `reset_state` may be called any number of times and does nothing: the coordinator starts and stops its source, and has to
    live as long as this is used. It is no parent for a fork: in one, reading is LifecycleError. So of tensorpack's runners,
    those that fork cannot run over it, and threads need not. Thread-safe: each batch goes to one iterator.

    Args:
        source: `coordinator["train"]`, or one device of it.
        rows: one row at a time; then components are views of their batch, without the batch axis, and padding is left out.
    """

    def __init__(self, source: DataInputCoordinator | DeviceInput, rows: bool = False) -> None:
        if not isinstance(source, (DataInputCoordinator, DeviceInput)):
            raise ConfigError(f"SourceDataFlow: source: got {type(source).__qualname__}; wanted coordinator['train']")
        self._source = source
        self._rows = rows
        self._has_ended = False  # the last thing that came was an end, of an epoch or of all

    def reset_state(self) -> None:
        """Do nothing: no state is here, and the random numbers of a source are the business of its Stream."""

    def __len__(self) -> int:
        """Return how many data points an `iter` has, when nothing is skipped and nothing was resumed.

        `list(df)` and `[*df]` ask for it, too, and raise what it raises; `list(iter(df))` does not ask.

        Raises:
            NotImplementedError: the source is no Stream, without an end, a Mix, or not rebatched (as tensorpack has it).
        """
        settings = self._source._core.settings
        stream = settings.fetch_fun
        in_epochs = isinstance(stream, Stream) and stream.epoch_end == "break"
        if not isinstance(stream, Stream) or isinstance(stream, Mix) or not settings.rebatch:
            raise NotImplementedError(f"source {settings.name!r} has no known length: it is no rebatched Stream")
        epochs = 1 if in_epochs else stream.epochs
        if epochs is None:
            raise NotImplementedError(f"source {settings.name!r} has no end; epoch_end='break' makes each epoch one")
        devices = self._source._core.devices
        if isinstance(self._source, DeviceInput) and len(devices) > 1:
            raise NotImplementedError(f"source {settings.name!r} deals its batches to {len(devices)} devices")
        batch_size = self._source._core.devices[next(iter(devices))].batch_size
        rows = stream.plan(settings.last_batch, settings.batch_axes).regular_rows * epochs
        if settings.last_batch == "drop":
            rows -= rows % batch_size
        return rows if self._rows else -(-rows // batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        """Return an iterator over the data points of the next epoch. It raises what the source's `next_batch` does."""
        return _Epoch(self)

    def _next_batch(self, is_first: bool) -> Any:
        try:
            batch = self._source.next_batch()
        except EndOfData:
            if is_first and self._has_ended:
                raise EndOfData(
                    f"source {self._source.name!r} has no data left for another `iter`; wanted a Stream with epochs=None and "
                    "epoch_end='break', or fewer rounds"
                ) from None
            self._has_ended = True
            raise StopIteration from None
        self._has_ended = False
        return batch

    def _points(self, batch: Any) -> Iterator[list[Any]]:
        if not self._rows:
            return iter([list(batch)])
        settings = self._source._core.settings
        at = [(slice(None),) * axis for axis in settings.batch_axes]
        return ([array[(*axis, row)] for axis, array in zip(at, batch, strict=True)] for row in range(batch.valid_rows))


class _Epoch:
    """One pass. An object, because a generator would be at its end after a WaitTimeout."""

    __slots__ = ("_flow", "_is_done", "_is_first", "_points")

    def __init__(self, flow: SourceDataFlow) -> None:
        self._flow = flow
        self._points: Iterator[list[Any]] = iter(())
        self._is_first = True
        self._is_done = False

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> list[Any]:
        while not self._is_done:
            for point in self._points:
                return point
            try:
                self._points = self._flow._points(self._flow._next_batch(self._is_first))
            except StopIteration:
                self._is_done = True
            self._is_first = False
        raise StopIteration
