"""A state goes into a file whole or not at all, and comes out as it was or as an error: JSON with a checksum, never pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from typing import Any

from input_workers.errors import StateMismatch

__all__ = ["load_file", "save_file"]


def save_file(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the state; at every moment the file is the old one or the new one. Safe in several threads and processes.

    Raises:
        OSError: it cannot be written; the old file is intact.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    text = json.dumps(state, sort_keys=True)
    content = json.dumps({"sha256": _digest(text), "state": state}, sort_keys=True) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder_descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_descriptor)  # or the new name might not outlive a crash of the machine
    finally:
        os.close(folder_descriptor)


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
    except ValueError as error:  # no UTF-8, or no JSON
        raise StateMismatch(f"{os.fspath(path)}: it is no JSON text of {len(content)} bytes ({error}); {remedy}") from error
    if not isinstance(whole, dict) or set(whole) != {"sha256", "state"} or not isinstance(whole["state"], dict):
        raise StateMismatch(f"{os.fspath(path)}: it holds no state; {remedy}")
    wanted = json.dumps(whole, sort_keys=True) + "\n"
    if whole["sha256"] != _digest(json.dumps(whole["state"], sort_keys=True)) or content != wanted.encode("utf-8"):
        raise StateMismatch(f"{os.fspath(path)}: its checksum is wrong; {remedy}")
    return dict(whole["state"])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
