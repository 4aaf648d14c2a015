"""A state goes into a file whole or not at all, and comes out as it was or as an error: JSON with a checksum, never pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any, TextIO

from input_workers.errors import StateMismatch

__all__ = ["check_writable", "load_file", "replacing", "save_file", "sync_folder"]


def save_file(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the state; at every moment the file is the old one or the new one. Safe in several threads and processes.

    As with any file that is written: a symbolic link is followed, an old file's mode is kept, a new one's is by the umask.

    Raises:
        OSError: it cannot be written; the old file is intact.
    """
    text = json.dumps(state, sort_keys=True)
    with replacing(path) as file:
        file.write(json.dumps({"sha256": _digest(text), "state": state}, sort_keys=True) + "\n")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Write a text file whole or not at all: it is there when the block ends, and is as it was if that raises.

    As with any file that is written: a symbolic link is followed, an old file's mode is kept, a new one's is by the umask.

    Raises:
        OSError: it cannot be written.
    """
    path, temporary, mode = _places(path)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(PermissionError):  # of a folder that may be written to but not read
        sync_folder(os.path.dirname(path))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `replacing` could not begin. The file stays as it is."""
    _, temporary, _ = _places(path)
    with open(temporary, "x", encoding="utf-8"):
        os.unlink(temporary)


def _places(path: str | os.PathLike[str]) -> tuple[str, str, int | None]:
    """Return where the file is, where to write it first, and its mode, if there is one. Raises OSError: it is no file."""
    path = os.path.realpath(os.fsdecode(path))  # else a link would be replaced, not what it names
    folder, name = os.path.split(path)
    mode: int | None = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
    if mode is not None and not stat.S_ISREG(mode):  # nobody wants /dev/null replaced
        raise OSError(errno.EINVAL, "not a regular file", path)
    # Beside the file, because only within a file system is replacing one step. The process and a random number name it.
    return path, os.path.join(folder, f".{name[:MAX_NAME_CHARS]}.{os.getpid()}-{secrets.token_hex(8)}"), mode


# Of the file's name, in its temporary one, which may have 255 bytes.
MAX_NAME_CHARS = 40


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Write the new name to the disk: without, it might not outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state.

    Raises:
        OSError: it cannot be read.
        StateMismatch: it is not what `save_file` wrote.
    """
    with open(path, "rb") as file:
        content = file.read()
    remedy = "wanted a file that save_state() wrote and nobody has changed or cut"
    try:
        whole = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON, or brackets without an end
        raise StateMismatch(f"{os.fspath(path)}: it is no JSON text of {len(content)} bytes ({error}); {remedy}") from error
    if not isinstance(whole, dict) or set(whole) != {"sha256", "state"} or not isinstance(whole["state"], dict):
        raise StateMismatch(f"{os.fspath(path)}: it holds no state; {remedy}")
    wanted = json.dumps(whole, sort_keys=True) + "\n"
    if whole["sha256"] != _digest(json.dumps(whole["state"], sort_keys=True)) or content != wanted.encode("utf-8"):
        raise StateMismatch(f"{os.fspath(path)}: its checksum is wrong; {remedy}")
    return dict(whole["state"])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
