"""The one tree of errors: what enters is an exception, what leaves says what, where, got, wanted and the remedy.

InputWorkersError
|-- ConfigError (ValueError)       a parameter or a configuration is wrong; nothing was started
|-- SpecMismatch (ValueError)      a chunk is not what the source promised
|-- LifecycleError (RuntimeError)  a call that this state does not allow
|-- QueueClosed                    you stopped the source
|-- EndOfData                      it finished; a fetch function raises it to say so
|-- SourceFailed                   it broke; the cause is the first failure
|   |-- FetchFailed                the fetch function raised, or returned a wrong chunk
|   |-- WorkerDied                 a worker process or actor is gone
|   `-- FetchTimeout               a call took longer than fetch_timeout_s
|-- FeedFailed                     a batch could not be put on the device
|-- WaitTimeout (TimeoutError)     no batch in time; nothing is lost, ask again
|-- StateMismatch (ValueError)     a saved state does not fit this source
|-- PlanDoesNotFit                 no plan of passes fits the device's memory
`-- BadRows                        raised by a source to name the rows that cannot be read
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BadRows",
    "ConfigError",
    "EndOfData",
    "Failure",
    "FeedFailed",
    "FetchFailed",
    "FetchTimeout",
    "InputWorkersError",
    "LifecycleError",
    "PlanDoesNotFit",
    "QueueClosed",
    "SourceFailed",
    "SpecMismatch",
    "StateMismatch",
    "WaitTimeout",
    "WorkerDied",
    "describe",
]

# A message of a foreign exception is cut here: it travels through logs and reports.
MAX_TEXT_CHARS = 64 * 1024


class InputWorkersError(Exception):
    """Base of every error that this package raises.

    Attributes:
        cause: of the failure of a source, the first one, such as the user's own exception: what `__cause__` is, unless
            somebody has raised the error anew `from None`, as Keras does.
    """

    cause: BaseException | None = None


class ConfigError(InputWorkersError, ValueError):
    """A parameter or a configuration is wrong. Nothing was started."""


class SpecMismatch(InputWorkersError, ValueError):
    """A chunk's number of arrays, dtype or shape is not what the source promised. It is never cast."""


class LifecycleError(InputWorkersError, RuntimeError):
    """A call that the object's state does not allow, such as reading before the first start."""


class QueueClosed(InputWorkersError):
    """The source was stopped by its user. Not an error of the source, and not its end of data."""


class EndOfData(InputWorkersError):
    """Raised by a fetch function: this worker has no more data. Raised by `next_batch`: nobody has."""


class SourceFailed(InputWorkersError):
    """A source broke. `__cause__` is the first failure with its own traceback."""


class FetchFailed(SourceFailed):
    """The fetch function raised, or returned something that is not a chunk of this source."""


class WorkerDied(SourceFailed):
    """A worker ended without saying so."""


class FetchTimeout(SourceFailed):
    """A call of the fetch function took longer than `fetch_timeout_s`."""


class FeedFailed(InputWorkersError):
    """A batch could not be put on its device. The batch is counted as `device_error`."""


class WaitTimeout(InputWorkersError, TimeoutError):
    """No batch came in time. The stream is as it was: ask again."""


class StateMismatch(InputWorkersError, ValueError):
    """A saved state does not belong to this source as it is now configured."""


class PlanDoesNotFit(InputWorkersError):
    """No split of the stages into passes fits the device's memory."""


class BadRows(InputWorkersError):
    """Raised by a source, from its own error, to name the rows of a request that cannot be read.

    Attributes:
        rows: the row numbers, as they stood in the request.
    """

    def __init__(self, rows: Sequence[int], message: str = "") -> None:
        self.rows = tuple(int(row) for row in rows)
        super().__init__(message or f"rows {list(self.rows)} cannot be read")

    def __reduce__(self) -> tuple[type[BadRows], tuple[tuple[int, ...], str]]:
        return type(self), (self.rows, str(self))  # from a worker process it comes pickled


def describe(error: BaseException) -> str:
    """Return "TypeName: text" of any exception, however odd: a `__str__` that raises, ten megabytes of text."""
    name = type(error).__qualname__
    try:
        text = str(error)
    except Exception as inner:  # a broken __str__ must not hide the failure that it belongs to
        text = f"<its __str__ raised {type(inner).__qualname__}>"
    if len(text) > MAX_TEXT_CHARS:
        text = f"{text[:MAX_TEXT_CHARS]}... ({len(text)} characters)"
    return f"{name}: {text}" if text else name


class Failure:
    """The first failure of a source, from which every raise makes a new exception with the same cause.

    Raising one exception object in several threads would mix their tracebacks; hence a recipe, not an exception.
    """

    __slots__ = ("cause", "kind", "message", "notes")

    def __init__(
        self, kind: type[InputWorkersError], message: str, cause: BaseException | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.kind = kind
        self.message = message
        self.cause = cause
        self.notes = list(notes)  # later failures are attached here

    def exception(self) -> InputWorkersError:
        """Return a new exception of this failure, its `__cause__` set, its notes added."""
        error = self.kind(self.message)
        error.__cause__ = error.cause = self.cause
        for note in self.notes:
            error.add_note(note)
        return error
