"""Messages between a worker process and its parent: small pickled frames, and once the descriptor of an arena.

To the worker, in lists:

- (REQUEST, extent, state, index, epoch, rows, batch_size, key): a Stream's request.
- (CALL, extent, state, batch_size): a call of a plain function.
- (GRANT, extent): the answer to a NEED.
- (SPECS, specs): of the source, once they are known.
- (TRACE, until): tell the times of parts one by one.

An extent is (offset, nbytes, is_cold), where the arrays of the answer may be written, or None. A state is what is left of an
attempt that another process has begun (`recovery.AttemptState`), or None.

From the worker:

- (READY, seconds): it has begun.
- (CHUNK, layout, report): arrays in the extent of the call.
- (INLINE, arrays, report): small ones.
- (OTHER, pickled or None, kinds, is_sequence, report): no chunk.
- (ERROR, ..., report): see `raised`.
- (END, report): the function has no more data.
- (ATTEMPT, attempt report): the call has failed, and calls are made in its place (`recovery.AttemptReport`).
- (NEED, nbytes): grant an extent that large.

A report is what the worker's calls did since the answer before, see `metrics.fetcher_recorder.Told`.

Every request and call is answered by one of CHUNK, INLINE, OTHER, ERROR and END, in their order; what belongs to an attempt is
reported before. With its answer, a call's extent is the parent's again. Before the answer the worker may send NEED, which
gives the call's extent back, and waits for one GRANT: a larger extent, or None if there is no room for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import struct
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, TypeAlias

from input_workers.errors import describe

__all__ = [
    "ATTEMPT", "CALL", "CHUNK", "END", "ERROR", "GRANT", "INLINE", "NEED", "OTHER", "READY", "REQUEST", "SPECS", "TRACE",
    "BadFrame", "Frame", "Link", "dumps", "raised", "rebuilt", "receive_descriptors",
]  # fmt: skip

GRANT, REQUEST, CALL, SPECS, TRACE, READY, CHUNK, INLINE, OTHER, NEED, ERROR, END, ATTEMPT = range(13)

Frame: TypeAlias = tuple[Any, ...]

# What is pickled into a frame instead of going through shared memory: copying it twice is cheaper than the bookkeeping.
INLINE_BELOW_NBYTES = 8192 + 1


_HEADER = struct.Struct("!Q")  # the bytes of the frame that follows
_RECEIVE_BYTES = 256 * 1024

# No worker sends a frame this large. Text that was written to the pipe by mistake, read as a header, announces far more.
MAX_FRAME_NBYTES = 1 << 30


class BadFrame(Exception):
    """What came through the pipe is not a frame."""


class Link:
    """One end of the pipe between a worker and its parent. One thread sends, one receives."""

    __slots__ = ("_buffer", "socket")

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)  # whatever socket.setdefaulttimeout says
        self.socket = end
        self._buffer = bytearray()

    def limit_send(self, seconds: float) -> None:
        """Let `send` raise OSError when the other end has not read for so long."""
        seconds = min(max(seconds, 0.001), 1e6)
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, frame: Any) -> None:
        """Send a frame. Raises OSError if the other end is gone."""
        content = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        self.socket.sendall(_HEADER.pack(len(content)) + content)

    def send_descriptor(self, descriptor: int) -> None:
        """Send a descriptor, which the other end receives between two frames. Raises OSError if the other end is gone."""
        reduction.sendfds(self.socket, [descriptor])

    def receive(self) -> Any:
        """Wait for the next frame. Raises EOFError or OSError if the other end is gone."""
        (size,) = _HEADER.unpack(self._exactly(_HEADER.size))
        return pickle.loads(self._exactly(size))  # noqa: S301  from our own parent

    def _exactly(self, size: int) -> bytes:
        """Wait for so many bytes, and no more: a descriptor may follow, and comes with a byte of its own."""
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                raise EOFError
            data = data + more if data else more
        return data

    def receive_now(self) -> list[Frame]:
        """Return the frames that have come, without waiting: the other end may have stopped in the middle of one.

        Raises:
            EOFError, OSError: the other end is gone, and nothing is left.
            BadFrame: something that is not a frame has come.
        """
        try:
            data = self.socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        buffer = self._buffer
        buffer += data
        frames, at = [], 0
        while len(buffer) - at >= _HEADER.size:
            (size,) = _HEADER.unpack_from(buffer, at)
            if size > MAX_FRAME_NBYTES:
                raise BadFrame(f"a frame of {size} bytes")
            end = at + _HEADER.size + size
            if len(buffer) < end:
                break
            frames.append(_frame_of(buffer[at + _HEADER.size : end]))
            at = end
        del buffer[:at]
        return frames

    def receive_descriptor(self) -> int:
        """Return the next descriptor. Raises OSError if there is none left."""
        return receive_descriptors(self.socket, 1)[0]

    def is_gone(self) -> bool:
        """Whether the other end has closed."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shut_down(self) -> None:
        """End both directions: whoever reads, here or there, sees the end. Safe in any thread."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was first
            pass

    def close(self) -> None:
        """Close this end, which no thread may be using."""
        self.socket.close()


def _frame_of(content: bytes | bytearray) -> Frame:
    """Return the frame that a worker has pickled. Raises BadFrame."""
    try:
        frame = pickle.loads(content)  # noqa: S301  from our own worker
    except Exception as error:  # garbage may raise anything, also EOFError, which has another meaning here
        raise BadFrame(describe(error)) from error
    if type(frame) is not tuple or not frame or type(frame[0]) is not int or frame[0] not in _FROM_WORKER:
        raise BadFrame(f"{type(frame).__name__} {frame!r:.100}")
    return frame


_FROM_WORKER = frozenset((READY, CHUNK, INLINE, OTHER, NEED, ERROR, END, ATTEMPT))


def receive_descriptors(end: socket.socket, count: int) -> list[int]:
    """Return descriptors that were sent, closed on exec. Raises OSError: there is none left; EOFError: the end is closed."""
    try:
        descriptors: list[int] = reduction.recvfds(end, count)
    except RuntimeError as error:  # what came was thrown away
        raise OSError(errno.EMFILE, "no descriptor left for one that was sent (RLIMIT_NOFILE)") from error
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors


def dumps(value: Any) -> bytes:
    """Return the value as cloudpickle has it: with what cannot be imported in the other process."""
    import cloudpickle

    return bytes(cloudpickle.dumps(value))


def raised(error: BaseException, dumps: Callable[[Any], bytes] = dumps) -> Frame:
    """Return the frame of an exception: pickled if it is small and can be pickled, and as text in any case.

    The frame must fit into the buffer of the pipe: the parent may be sending a large request meanwhile, and reads nothing.
    """
    # The stack begins in our own loop, and ends in the user's code, which is the part of interest.
    text = "".join(traceback.format_exception(error))
    short = describe(error)[:MAX_ERROR_TEXT_CHARS]
    return ERROR, type(error).__name__, short, text[-MAX_TRACEBACK_CHARS:], _pickled(error, dumps), isinstance(error, Exception)


# A pipe's buffer holds 208 KB, and a character may take four bytes.
MAX_PICKLED_ERROR_NBYTES = 64 * 1024
MAX_TRACEBACK_CHARS = 16 * 1024
MAX_ERROR_TEXT_CHARS = 8 * 1024


def _pickled(error: BaseException, dumps: Callable[[Any], bytes]) -> bytes | None:
    """Return an exception as bytes; None: it is too large, or cannot be made anew from them.

    Pickle makes an exception anew by calling its class with its `args`. If that has another `__init__`, it may fail, or put a
    prefix before the text a second time. Such an exception is sent as its parts, and made without its `__init__`.
    """
    fallback: bytes | None = None
    for form in (error, (type(error), error.args, error.__dict__)):
        with contextlib.suppress(Exception):  # foreign code may raise anything
            pickled = dumps(form)
            if len(pickled) <= MAX_PICKLED_ERROR_NBYTES:
                if describe(_unpickled(pickled)) == describe(error):
                    return pickled
                fallback = fallback or pickled  # its text may be different each time, such as an address
    return fallback


def _unpickled(pickled: bytes) -> BaseException:
    """Return the exception that `_pickled` has sent."""
    value: Any = pickle.loads(pickled)  # noqa: S301  from our own worker
    if type(value) is tuple:
        kind, args, state = value
        value = kind.__new__(kind, *args)
        value.__dict__.update(state)
    return value  # type: ignore[no-any-return]


def rebuilt(frame: Frame, who: str) -> BaseException:
    """Return the exception of an ERROR frame, or a stand-in of the same name, with the worker's traceback as a note."""
    _, name, text, trace, pickled, is_exception = frame
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = _unpickled(pickled)
        except Exception:
            error = None
    if not isinstance(error, BaseException):
        base = Exception if is_exception else BaseException
        error = type(name, (base,), {"__module__": __name__})(text.removeprefix(f"{name}: "))
    error.add_note(f"raised in {who}:\n{trace}")
    return error
