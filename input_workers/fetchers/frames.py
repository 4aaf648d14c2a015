"""What a worker process and its parent send each other: small pickled frames, and the descriptors of blocks.

To the worker go lists of: (GRANT, block, nbytes, is_new), a block to put the next chunk in, whose descriptor follows if it
is new; (REQUEST, index, epoch, rows, batch_size, key), a Stream's; (CALL, batch_size), a plain function's; (SPECS, specs,
axes), when they are known. From it come: (READY, seconds); (CHUNK, block, layout, seconds), in a granted block; (INLINE,
result, seconds), where that is small, or no chunk; (NEED, nbytes): grant a block that large; (ERROR, ...), see `Raised`;
(END, seconds): the function has no more data. Every request and call is answered by one of CHUNK, INLINE, ERROR and END, in
their order.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
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
    "READY",
    "REQUEST",
    "SPECS",
    "Frame",
    "Link",
    "raised",
    "rebuilt",
]

GRANT, REQUEST, CALL, SPECS, READY, CHUNK, INLINE, NEED, ERROR, END = range(10)

Frame: TypeAlias = tuple[Any, ...]

# What is pickled into a frame instead of going through a block: copying it twice is cheaper than a block's bookkeeping.
INLINE_BELOW_NBYTES = 8192 + 1


class Link:
    """One end of the pipe between a worker and its parent. One thread sends, one receives."""

    __slots__ = ("connection", "socket")

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.connection: Connection[Any, Any] = Connection(os.dup(end.fileno()))  # frames messages; it owns what it is given

    def send(self, frame: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a frame and descriptors. Raises OSError if the other end is gone."""
        self.connection.send_bytes(pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL))
        for descriptor in descriptors:
            reduction.sendfds(self.socket, [descriptor])

    def receive(self) -> Any:
        """Return the next frame. Raises EOFError or OSError if the other end is gone."""
        return pickle.loads(self.connection.recv_bytes())  # noqa: S301  from our own worker

    def receive_descriptor(self) -> int:
        """Return the next descriptor."""
        (descriptor,) = reduction.recvfds(self.socket, 1)
        return int(descriptor)

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
        self.connection.close()
        self.socket.close()


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
