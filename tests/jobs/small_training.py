"""A training so small that it is over in a second, for the tests of checkpoints: its configuration and its pictures."""

from __future__ import annotations

import cv2
import numpy as np

STEPS, EPOCHS = 10, 3
CONFIG = """
seed = 3
[model]
name = "small_cnn"
image_size = [8, 8]
[train]
folder = "images/train"
batch_size = 4
workers = 3
epochs = 3
ordered = true
[test]
folder = "images/test"
batch_size = 4
[checkpoint]
folder = "checkpoints"
every_batches = 3
"""


def write_images(folder):
    rng = np.random.default_rng(0)
    for part, rows in (("train", 21), ("test", 5)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for row in range(rows):
                assert cv2.imwrite(str(folder / part / name / f"{row}.png"), rng.integers(0, 256, (8, 8, 3), np.uint8))
    return folder


def write_config(folder, images):
    (folder / "images").symlink_to(images)
    path = folder / "job.toml"
    path.write_text(CONFIG)
    return path


def saved_in(config):
    folder = config.parent / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
