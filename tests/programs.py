"""Programs that tests drive and pip does not install: where one is missing the test is skipped, but never under CI."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["needed"]


def needed(name: str) -> str:
    """Return the path of a program. Skips the test that has none; under CI (the variable is set) it fails."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed; `make test` installs it where it runs as root and there is apt-get"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path
