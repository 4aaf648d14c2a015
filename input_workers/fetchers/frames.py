"""What a worker process and its parent send each other: small pickled frames, and the descriptors of blocks.

To the worker go lists of: (GRANT, block, nbytes, is_new, is_needed, gone), a block to put the next chunk in, whose descriptor
follows if it is new, and the numbers of blocks that are no more; (REFUSE, errno, text, is_needed): there is no memory for
one; (REQUEST, index, epoch, rows, batch_size, key), a Stream's; (CALL, batch_size), a plain function's; (SPECS, specs), when
they are known; (TRACE, until): tell the times of parts one by one. From it come: (READY, seconds); (CHUNK, block, layout,
told), in the granted block; (INLINE, arrays, told), where they are small; (OTHER, pickled or None, kinds, is_sequence, told):
no chunk; (NEED, nbytes): grant a block that large; (ERROR, ..., told), see `raised`; (END, told): the function has no more
data. `told` is what the worker's calls did since the answer before, see `metrics.fetcher_recorder.Told`.

Every request and call is answered by one of CHUNK, INLINE, OTHER, ERROR and END, in their order. At most one block is granted
and not used. Once a chunk has come in a block, the parent grants one before it waits for the next answer. NEED takes the
granted block back, also one that is still on its way; the next one to count is the one whose `is_needed` says so.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import struct
import traceback
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Any, TypeAlias

from input_workers.errors import describe

__all__ = [
    "CALL",
    "CHUNK",
    "END",
    "ERROR",
    "GRANT",
    "INLINE",
    "NEED",
    "OTHER",
    "READY",
    "REFUSE",
    "REQUEST",
    "SPECS",
    "TRACE",
    "Frame",
    "Link",
    "raised",
    "rebuilt",
    "receive_descriptors",
]

GRANT, REFUSE, REQUEST, CALL, SPECS, TRACE, READY, CHUNK, INLINE, OTHER, NEED, ERROR, END = range(13)

Frame: TypeAlias = tuple[Any, ...]

# What is pickled into a frame instead of going through a block: copying it twice is cheaper than a block's bookkeeping.
INLINE_BELOW_NBYTES = 8192 + 1


_HEADER = struct.Struct("!Q")  # the bytes of the frame that follows
_RECEIVE_BYTES = 256 * 1024


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

    def send(self, frame: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a frame and descriptors. Raises OSError if the other end is gone."""
        content = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        self.socket.sendall(_HEADER.pack(len(content)) + content)
        for descriptor in descriptors:
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
            end = at + _HEADER.size + size
            if len(buffer) < end:
                break
            frames.append(pickle.loads(buffer[at + _HEADER.size : end]))  # noqa: S301  from our own worker
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
        """Close this end. Nobody may be using it."""
        self.socket.close()


def receive_descriptors(end: socket.socket, count: int) -> list[int]:
    """Return descriptors that were sent, closed on exec. Raises OSError: there is none left; EOFError: nobody sends."""
    try:
        descriptors: list[int] = reduction.recvfds(end, count)
    except RuntimeError as error:  # what came was thrown away
        raise OSError(errno.EMFILE, "no descriptor left for one that was sent (RLIMIT_NOFILE)") from error
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors


def raised(error: BaseException, dumps: Any) -> Frame:
    """Return the frame of an exception: pickled, where that can be done, and as text in any case."""
    try:
        pickled = dumps(error)
        pickle.loads(pickled)  # noqa: S301  many an exception can be pickled and not be made anew
    except Exception:
        pickled = None
    # The stack begins in our own loop: the user's part is what is wanted.
    text = "".join(traceback.format_exception(error))
    return ERROR, type(error).__name__, describe(error), text[-MAX_TRACEBACK_CHARS:], pickled, isinstance(error, Exception)


MAX_TRACEBACK_CHARS = 64 * 1024


def rebuilt(frame: Frame, who: str) -> BaseException:
    """Return the exception of an ERROR frame, or a stand-in of the same name, with the worker's traceback as a note."""
    _, name, text, trace, pickled, is_exception = frame
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)  # noqa: S301
        except Exception:
            error = None
    if not isinstance(error, BaseException):
        base = Exception if is_exception else BaseException
        error = type(name, (base,), {"__module__": __name__})(text.removeprefix(f"{name}: "))
    error.add_note(f"raised in {who}:\n{trace}")
    return error
