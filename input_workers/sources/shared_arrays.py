"""Arrays that all processes read in one place: they are copied to shared memory once, and a description of that is pickled."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import ConfigError, LifecycleError
from input_workers.leases import ALIGNMENT_BYTES, Block, map_block
from input_workers.sources.arrays import Arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["SharedArrays"]

# The memory begins with random bytes, which tell it from any other: process ids and descriptors are used again.
MARK_BYTES = 16


class _Description(NamedTuple):
    """All that is pickled: where the memory is, and which array lies where in it."""

    mark: bytes
    path: str  # what other processes open
    owner: int  # the process that made it
    nbytes: int
    layout: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...]  # (shape, dtype, offset)


class SharedArrays:
    """Rows of arrays that have as many rows each, along axis 0, in memory that all processes of this machine share.

    A source for a Stream, like `Arrays`; or `shared.arrays` is used in a fetch function of any kind. A worker process maps
    the memory instead of having a copy: arrays of 4 GB cost 4 GB, however many workers there are. (While it is made there
    are both; what `np.load(..., mmap_mode="r")` returns needs no memory of its own.)

    Pickling it sends a description, of some hundred bytes, that is good as long as this object is there and not closed. A
    process that loads several maps the memory once, and gets the same object each time. There the arrays cannot be
    written to (ValueError); here they can, and all processes see it.

    Safe in threads and processes, also after a fork. It needs Linux or, elsewhere, a folder for temporary files.

    Args:
        arrays: one for each input, of any shape with as many rows along axis 0, and any dtype without Python objects.

    Raises:
        ConfigError: none is given, the numbers of rows differ, one has no rows, or holds Python objects or a mask.
        OSError: there is not so much shared memory.
    """

    def __init__(self, *arrays: ArrayLike) -> None:
        originals = [np.asanyarray(array) for array in arrays]
        for index, array in enumerate(originals):
            if array.dtype.hasobject or isinstance(array, np.ma.MaskedArray):
                what = f"dtype {array.dtype}" if array.dtype.hasobject else "a masked array"
                raise ConfigError(
                    f"SharedArrays: array {index}: got {what}; wanted fixed-size values, such as numbers or dtype 'S16'"
                )
        shapes = [array.shape for array in originals]
        if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1 or not shapes[0][0]:
            raise ConfigError(
                f"SharedArrays: got shapes {shapes}; wanted at least one array, at least one row, and as many rows along "
                "axis 0 in each"
            )
        layout, end = [], ALIGNMENT_BYTES
        for array in originals:
            layout.append((array.shape, array.dtype, end))
            end += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        block = Block(end)
        self._finalizer: weakref.finalize[..., SharedArrays] | None = weakref.finalize(self, block.close)
        mark = os.urandom(MARK_BYTES)
        block.view[:MARK_BYTES] = mark
        path = block.path if block.path is not None else f"/proc/{os.getpid()}/fd/{block.descriptor}"
        self._hold(_Description(mark, path, os.getpid(), end, tuple(layout)), block.view)
        for target, array in zip(self.arrays, originals, strict=True):
            np.copyto(target, array, casting="no")
        with _lock:
            _here[mark] = self

    def _hold(self, description: _Description, view: memoryview) -> None:
        self._description = description
        arrays = tuple(np.ndarray(shape, dtype, view, offset) for shape, dtype, offset in description.layout)
        self._source: Arrays | None = Arrays(*arrays)
        self._arrays: tuple[NDArray[Any], ...] = arrays
        self._rows = len(arrays[0])
        self.specs: list[ArraySpec] = self._source.specs

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The arrays themselves, C-contiguous and 64-byte aligned. Raises LifecycleError after `close`."""
        self._open()
        return self._arrays

    def __len__(self) -> int:
        return self._rows

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Return copies of these rows, in `request.out` where memory is offered. Raises LifecycleError after `close`."""
        return self._open().fetch(rows, request)

    def close(self) -> None:
        """Let go of the memory. Idempotent; done also when the object is collected.

        It is freed when no process maps it any more: arrays that were taken from here, and workers that have mapped it,
        go on. No other worker can map it.
        """
        self._source, self._arrays = None, ()
        finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self) -> Arrays:
        source = self._source
        if source is None:
            raise LifecycleError("SharedArrays: used after close(); wanted to be closed after the last use")
        return source

    def __reduce__(self) -> tuple[Any, ...]:
        self._open()
        return _mapped, (tuple(self._description),)


# Invariant under _lock: those that this process has, by their marks; each mark once.
_lock = threading.Lock()
_here: weakref.WeakValueDictionary[bytes, SharedArrays] = weakref.WeakValueDictionary()


def _forget_in_child() -> None:
    # A fork has its parent's objects, and may write to them; what it is sent, it maps anew, read-only.
    global _lock, _here
    _lock = threading.Lock()
    _here = weakref.WeakValueDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _mapped(fields: tuple[Any, ...]) -> SharedArrays:
    """Return the object of this process for a description. Raises LifecycleError: the memory is not to be had."""
    description = _Description(*fields)
    with _lock:
        known = _here.get(description.mark)
        if known is not None and known._source is not None:
            return known
        shared = SharedArrays.__new__(SharedArrays)
        shared._finalizer = None
        shared._hold(description, _map(description))
        _here[description.mark] = shared
        return shared


def _map(description: _Description) -> memoryview:
    try:
        descriptor = os.open(description.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # it may be anything
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # no fault of the description
            raise
        raise _gone(description, error.strerror or "not to be opened") from error
    try:
        if os.fstat(descriptor).st_size < description.nbytes:
            raise _gone(description, "something else")
        view = map_block(descriptor, description.nbytes, read_only=True)
    except ValueError as error:  # no file that can be mapped
        raise _gone(description, "something else") from error
    finally:
        os.close(descriptor)
    if view[:MARK_BYTES] != description.mark:
        raise _gone(description, "other memory")
    return view


def _gone(description: _Description, got: str) -> LifecycleError:
    return LifecycleError(
        f"SharedArrays: the memory of process {description.owner}, {description.nbytes} bytes at {description.path}: got "
        f"{got}; wanted the arrays that it has there: its process must be on this machine, belong to the same user, and hold "
        "the object, unclosed, until every worker has started; elsewhere, send the arrays themselves"
    )
