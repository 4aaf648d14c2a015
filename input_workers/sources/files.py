"""Paths of data files go in; what they hold at an offset comes out. Also the parameters that sources over files share."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from input_workers.errors import ConfigError

__all__ = ["DataFile", "Decoder", "OpenFiles", "chosen_decoders", "list_files"]

Decoder: TypeAlias = Callable[[Any], Any]

OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # opening a FIFO must not wait for somebody to write to it
    OPEN_FLAGS |= getattr(os, _flag, 0)


class DataFile(NamedTuple):
    """A file as it was when it was indexed.

    Attributes:
        path: as it was given.
        size: bytes.
        mtime_ns: when it was last written, nanoseconds since 1970.
    """

    path: str
    size: int
    mtime_ns: int

    def check(self, status: os.stat_result) -> None:
        """Raise ValueError if the file is another now: what was learnt of it would not fit."""
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"was changed after it was indexed (from {self.size} to {status.st_size} bytes, or written again); "
                "wanted a file at rest"
            )


def list_files(owner: str, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[DataFile]:
    """Return the files of one path or of several, in the order given. They are regular files, or links to such.

    Raises:
        ConfigError: there is none, one cannot be looked at, is no regular file, or is given twice.
    """
    given: Iterable[Any] = [paths] if isinstance(paths, (str, bytes, os.PathLike)) else paths
    files: list[DataFile] = []
    seen: set[str] = set()
    try:
        names = [os.fsdecode(path) for path in given]
    except TypeError:
        raise ConfigError(f"{owner}: paths: got {paths!r}; wanted a path, or a sequence of them") from None
    for name in names:
        try:
            status = os.stat(name)
            real = os.path.realpath(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{owner}: paths: {name!r} cannot be read: {error}; wanted an existing file") from error
        if not stat.S_ISREG(status.st_mode):
            folder = f" (for a folder: sorted(glob.glob({name + '/*'!r})))" if stat.S_ISDIR(status.st_mode) else ""
            raise ConfigError(f"{owner}: paths: {name!r} is no regular file; wanted files{folder}")
        if real in seen:
            raise ConfigError(f"{owner}: paths: {name!r} is given twice; wanted each file once, or its rows would come twice")
        seen.add(real)
        files.append(DataFile(name, status.st_size, status.st_mtime_ns))
    if not files:
        raise ConfigError(f"{owner}: paths: got none; wanted at least one file")
    return files


def chosen_decoders(
    owner: str, parameter: str, chosen: Sequence[str] | Mapping[str, Decoder | None]
) -> dict[str, Decoder | None]:
    """Return name -> decoder, in the order of the inputs; None: the built-in one.

    Args:
        owner: the source, for errors.
        parameter: its parameter, for errors.
        chosen: names, or a mapping from a name to its decoder or None.

    Raises:
        ConfigError: it is something else, is empty, or has a name twice.
    """
    wanted = "wanted names, as in ['a', 'b'], or names with decoders, as in {'a': None, 'b': decode}"
    if isinstance(chosen, (str, bytes)) or not isinstance(chosen, (Sequence, Mapping)) or not chosen:
        raise ConfigError(f"{owner}: {parameter}: got {chosen!r}; {wanted}")
    decoders = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen)
    if len(decoders) != len(chosen):
        raise ConfigError(f"{owner}: {parameter}: got {list(chosen)}; wanted each name once")
    for name, decoder in decoders.items():
        if not isinstance(name, str) or not name or not (decoder is None or callable(decoder)):
            raise ConfigError(f"{owner}: {parameter}: got {name!r}: {decoder!r}; {wanted}")
    return decoders


class _Handle:
    """A descriptor and how many calls are reading from it."""

    __slots__ = ("descriptor", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 1


class OpenFiles:
    """Reads pieces of many files and keeps the descriptors of those used last.

    Thread-safe; no lock is held while a file is opened or read. At most `max_open` descriptors are open, or one for each
    call that is reading, if those are more. They are closed by `close()`, and when nobody has this object any more.
    Pickled, it takes no descriptors along. Fork-safe: no position is shared; fork while no other thread reads.

    Args:
        files: what may be read, by its index.
        max_open: descriptors kept.
    """

    # Invariant under _lock: `_open` has the handles that may be given out, the last used at its end. A handle that is
    # not in it is closed by its last user; one in it without users may be closed by anybody who takes it out.

    def __init__(self, files: Sequence[DataFile], max_open: int) -> None:
        self._files = files
        self._max_open = max_open
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        # Not at exit: daemon threads may still be reading then, and the system closes everything anyway.
        weakref.finalize(self, _close_all, self._open).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._files, self._max_open)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            OSError: the file cannot be opened or read.
            ValueError: it was changed after it was indexed.
        """
        handle = self._take(file)
        try:
            content = os.pread(handle.descriptor, size, offset)
            while len(content) < size:  # a file system may hand over less at once
                more = os.pread(handle.descriptor, size - len(content), offset + len(content))
                if not more:
                    raise ValueError(f"ends at byte {offset + len(content)}, within this row; wanted a file at rest")
                content += more
            return content
        finally:
            self._give_back(file, handle)

    def close(self) -> None:
        """Close the descriptors; those in use right now when their call is done. A later `read` opens files again."""
        with self._lock:
            idle = [handle for handle in self._open.values() if not handle.users]
            self._open.clear()
        for handle in idle:
            os.close(handle.descriptor)

    def _take(self, file: int) -> _Handle:
        with self._lock:
            known = self._open.get(file)
            if known is not None:
                known.users += 1
                self._open.move_to_end(file)
                return known
        data_file = self._files[file]
        handle = _Handle(os.open(data_file.path, OPEN_FLAGS))
        try:
            data_file.check(os.fstat(handle.descriptor))
        except BaseException:
            os.close(handle.descriptor)
            raise
        closing = []
        with self._lock:
            if file not in self._open:  # else another thread was faster, and this handle serves this call alone
                self._open[file] = handle
                for other, old in list(self._open.items()):
                    if len(self._open) <= self._max_open:
                        break
                    if not old.users:
                        closing.append(self._open.pop(other))
        for old in closing:
            os.close(old.descriptor)
        return handle

    def _give_back(self, file: int, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1
            kept = self._open.get(file) is handle
            if kept and not handle.users and len(self._open) > self._max_open:
                del self._open[file]
                kept = False
            closing = not kept and not handle.users
        if closing:
            os.close(handle.descriptor)


def _close_all(handles: OrderedDict[int, _Handle]) -> None:
    while handles:
        os.close(handles.popitem()[1].descriptor)
