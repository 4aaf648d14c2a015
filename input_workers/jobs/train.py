"""A configuration goes in; a Keras model is trained from two sources, and where rows and time went comes out."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import input_workers as iw
from input_workers.config import DIGITS, Config, TestSource
from input_workers.errors import ConfigError
from input_workers.jobs.digits import write_digits

__all__ = ["Result", "train"]

# Loss and accuracy are read, and the bar drawn, at most this often: reading them waits for the step.
SHOW_SECONDS = 0.25
DEMO_PACKAGES = ("tensorflow", "keras", "cv2")


@dataclass(frozen=True, slots=True)
class Result:
    """What a training reached.

    Attributes:
        test_accuracy: of the last epoch, from 0 to 1.
        seconds: of training and evaluating, without loading TensorFlow.
        stats: of both sources, by name, at the end.
    """

    test_accuracy: float
    seconds: float
    stats: dict[str, iw.SourceStats]


def train(config: Config, console: Console) -> Result:
    """Run the job; what it prints goes to the console.

    Raises:
        ConfigError: a folder does not fit, or something is not installed.
        InputWorkersError: a source broke; an image that cannot be read is named.
    """
    for package in DEMO_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this job needs {package}: pip install input-workers[demo]")
    folders = {"train": _open_folder(config, config.train), "test": _open_folder(config, config.test)}
    classes = folders["train"].class_names
    _check_folders(config, folders)
    for name, folder in folders.items():
        console.print(f"{name}: {len(folder):,} images of {len(folder.class_names)} classes in {folder.path}")
    console.print("loading TensorFlow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only: its greetings would hide ours
    from input_workers.jobs.model import Trainer

    steps = len(folders["train"]) // config.train.batch_size
    trainer = Trainer(config.model, len(classes), steps * config.train.epochs, config.seed)
    coordinator = iw.GlobalCoordinator()
    _add_source(coordinator, config, "train", config.train, folders["train"])
    _add_source(coordinator, config, "test", config.test, folders["test"])
    with contextlib.ExitStack() as stack:
        server = iw.serve_metrics(config.metrics.port, config.metrics.host, coordinator)
        stack.callback(server.close)
        console.print(f"metrics: {server.url}/metrics")
        stack.enter_context(coordinator)
        started = time.monotonic()
        accuracy = _train_epochs(config, console, coordinator, trainer, steps)
        seconds = time.monotonic() - started
    result = Result(accuracy, seconds, coordinator.stats())
    _report(console, config, result)
    return result


def _open_folder(config: Config, source: TestSource) -> Any:
    path = str(write_digits() / DIGITS[source.folder]) if source.folder in DIGITS else source.folder
    height, width = config.model.image_size
    return iw.sources.ImageFolder(path, image_size=(height, width))


def _check_folders(config: Config, folders: dict[str, Any]) -> None:
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


def _add_source(coordinator: iw.GlobalCoordinator, config: Config, name: str, source: TestSource, folder: Any) -> None:
    training = name == "train"
    stream = iw.Stream(folder, shuffle=training, seed=config.seed, epochs=config.train.epochs, epoch_end="break")
    iw.init_data_input_workers(
        "tensorflow",
        ["image", "label"],
        stream,
        source.batch_size,
        source.workers,
        name,
        last_batch="drop" if training else "keep",
        coordinator=coordinator,
    )


def _train_epochs(config: Config, console: Console, coordinator: iw.GlobalCoordinator, trainer: Any, steps: int) -> float:
    """Train, evaluating after every epoch; return the last test accuracy."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    epochs, accuracy = config.train.epochs, 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps * epochs, numbers="")
        for epoch in range(1, epochs + 1):
            progress.update(bar, description=f"epoch {epoch}/{epochs}")
            trainer.forget()
            shown = 0.0
            for image, label in coordinator["train"]:
                trainer.train(image, label)
                progress.advance(bar)
                if time.monotonic() - shown >= SHOW_SECONDS:
                    progress.update(bar, numbers=_numbers(trainer, coordinator))
                    shown = time.monotonic()
            numbers = _numbers(trainer, coordinator)
            trainer.forget()
            for image, label in coordinator["test"]:
                trainer.evaluate(image, label)
            _, accuracy = trainer.reached()
            console.print(f"epoch {epoch:2}/{epochs}: {numbers}, test accuracy {accuracy:.1%}")
    return accuracy


def _numbers(trainer: Any, coordinator: iw.GlobalCoordinator) -> str:
    loss, accuracy = trainer.reached()
    stats = coordinator["train"].stats()
    return (
        f"loss {loss:.4f}, accuracy {accuracy:.1%}, {stats.inputs_per_second:,.0f} inputs/sec, "
        f"queue depth {stats.queue_depth:.1f}"
    )


def _report(console: Console, config: Config, result: Result) -> None:
    console.print(f"\ntest accuracy: {result.test_accuracy:.2%} after {config.train.epochs} epochs in {result.seconds:.1f} s")
    for name, stats in result.stats.items():
        console.print(f"{name}: {stats.ledger}")
    console.print(f"where the time went, of {result.seconds:.1f} s:")
    for name, source in (("train", config.train), ("test", config.test)):
        stats = result.stats[name]
        fetchers = max(1, source.workers)
        fetching, copying, waiting = (
            f"{seconds / max(result.seconds, 1e-9):.1%}"
            for seconds in (stats.fetcher_busy_seconds / fetchers, stats.enqueuer_busy_seconds, stats.consumer_wait_seconds)
        )
        console.print(
            f"  {name}: fetching {fetching}{f' (mean of {fetchers} fetchers)' if fetchers > 1 else ''}, "
            f"copying {copying}, waiting for input {waiting}"
        )
