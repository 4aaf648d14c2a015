"""A configuration goes in; its two folders of images, and the sources "train" and "test" that read them, come out."""

from __future__ import annotations

from typing import Any

import input_workers as iw
from input_workers.config import DIGITS, Config, TestSource
from input_workers.errors import ConfigError
from input_workers.jobs.digits import write_digits

__all__ = ["add_source", "batches_in", "last_batch_of", "open_folders", "without_quarantine"]


def open_folders(config: Config) -> dict[str, Any]:
    """Return the image folders of "train" and "test", which fit each other.

    Raises:
        ConfigError: one cannot be read, or does not fit; OpenCV is not installed.
    """
    folders = {"train": _open_folder(config, config.train), "test": _open_folder(config, config.test)}
    train, test = folders["train"], folders["test"]
    if train.class_names != test.class_names:
        only = {
            "train.folder": sorted(set(train.class_names) - set(test.class_names)),
            "test.folder": sorted(set(test.class_names) - set(train.class_names)),
        }
        differing = ", ".join(f"{names} only in {key}" for key, names in only.items() if names)
        raise ConfigError(f"train.folder and test.folder: wanted the same classes in both; got {differing}")
    if len(train) < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size: got {config.train.batch_size}; wanted at most {len(train)}, the number of images in "
            f"{train.path!r}"
        )
    return folders


def _open_folder(config: Config, source: TestSource) -> Any:
    path = str(write_digits() / DIGITS[source.folder]) if source.folder in DIGITS else source.folder
    height, width = config.model.image_size
    return iw.sources.ImageFolder(path, image_size=(height, width))


def last_batch_of(name: str) -> str:
    """Return what becomes of rows that fill no batch: a training step wants whole ones, an evaluation every row."""
    return "drop" if name == "train" else "keep"


def batches_in(config: Config, name: str, rows: int, last_batch: str | None = None) -> int:
    """Return how many batches a folder of so many rows gives in one epoch, if none is skipped."""
    size = (config.train if name == "train" else config.test).batch_size
    return rows // size if (last_batch or last_batch_of(name)) == "drop" else -(-rows // size)


def without_quarantine(config: Config) -> Config:
    """Return a configuration that notes what it skips in no file: that file is the training's."""
    on_error = config.train.on_error.model_copy(update={"quarantine": None})
    return config.model_copy(update={"train": config.train.model_copy(update={"on_error": on_error})})


def add_source(
    coordinator: iw.GlobalCoordinator,
    feed: str,
    config: Config,
    name: str,
    folder: Any,
    *,
    workers: int | None = None,
    last_batch: str | None = None,
) -> None:
    """Register a source of the job.

    Args:
        coordinator: where.
        feed: where the batches go.
        config: says how it reads.
        name: "train" or "test".
        folder: what it reads.
        workers: instead of what the configuration says.
        last_batch: instead of what the job does.
    """
    training = name == "train"
    source = config.train if training else config.test
    stream = iw.Stream(folder, shuffle=training, seed=config.seed, epochs=config.train.epochs, epoch_end="break")
    iw.init_data_input_workers(
        feed,
        ["image", "label"],
        stream,
        source.batch_size,
        source.workers if workers is None else workers,
        name,
        last_batch=last_batch or last_batch_of(name),
        fetchers=source.fetchers,
        ordered=training and config.train.ordered,
        on_error=config.train.on_error.policy() if training else iw.ErrorPolicy(),
        coordinator=coordinator,
    )
