"""The handwritten digits that scikit-learn carries go in, PNG files in a folder for each class come out, once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from input_workers.errors import ConfigError

__all__ = ["digits_folder", "write_digits"]

TEST_ROWS = 360  # of 1,797
SPLIT_SEED = 0
DARKEST = 16  # the pictures hold 0 to 16


def digits_folder() -> Path:
    """Return where the digits are kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # By its specification a relative path there is not to be used.
    root = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    return root / "input_workers" / "digits"


def write_digits() -> Path:
    """Return the folder with `train/<class>/*.png` and `test/<class>/*.png`, 8x8 grey, written at the first call.

    The split is the same everywhere. Whoever sees the folder sees all of it: it is written under another name and then
    renamed. Where two processes write at once, one of the two copies stays.

    Raises:
        ConfigError: scikit-learn or OpenCV is not installed, or the cache folder cannot be written to.
    """
    folder = digits_folder()
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
        try:
            _write(unfinished)
            unfinished.chmod(0o755)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"the digits cannot be written to {str(folder)!r}: {error}; wanted a cache folder that can be written to: set "
            "XDG_CACHE_HOME"
        ) from error
    return folder


def _write(folder: Path) -> None:
    try:
        import cv2
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(f"the digits need {error.name}: pip install input-workers[demo]") from error
    digits = load_digits()
    pictures = np.round(digits.images * (255 / DARKEST)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pictures))
    for part, rows in (("test", order[:TEST_ROWS]), ("train", order[TEST_ROWS:])):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for row in rows.tolist():
            encoded = cv2.imencode(".png", pictures[row])[1]
            (folder / part / str(digits.target[row]) / f"{row:04}.png").write_bytes(encoded.tobytes())
