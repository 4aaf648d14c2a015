"""A configuration goes in; a Keras model is trained from two sources, and where rows and time went comes out."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import input_workers as iw
from input_workers.config import Config
from input_workers.errors import ConfigError, StateMismatch
from input_workers.jobs.checkpoint import INPUT, Checkpoint, Checkpoints, job_of
from input_workers.jobs.streams import add_source, batches_in, open_folders

__all__ = ["SHOW_SECONDS", "Result", "load_trainer", "open_images", "train"]

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


def train(
    config: Config, console: Console, *, resume: bool = False, on_batch: Callable[[int, Any], object] | None = None
) -> Result:
    """Run the job; what it prints goes to the console.

    Args:
        config: of the job.
        console: where to print.
        resume: go on where the latest checkpoint was made, as if nothing had been: with `train.ordered` the same batches
            in the same order follow, else the same rows in each epoch.
        on_batch: called with the number of each training step, from 1, and its batch, before the step.

    Raises:
        ConfigError: a folder does not fit, or something is not installed.
        StateMismatch: the checkpoint is of another job, or was changed.
        InputWorkersError: a source broke; an image that cannot be read is named.
    """
    folders = open_images(config, console)
    with contextlib.ExitStack() as stack:
        checkpoints, begin = None, Checkpoint()
        if resume or config.checkpoint is not None:
            checkpoints = stack.enter_context(Checkpoints(config, job_of(config, folders)))
            begin = checkpoints.begin(resume)
        if resume and begin.folder is None and checkpoints is not None:
            console.print(f"no checkpoint in {checkpoints.folder}: beginning at the beginning")
        elif begin.folder is not None:
            console.print(f"resuming in epoch {begin.epoch + 1} after step {begin.step:,}, from {begin.folder}")
        trainer = load_trainer(config, folders, console)
        steps = batches_in(config, "train", len(folders["train"]))
        coordinator = iw.GlobalCoordinator()
        for name, folder in folders.items():
            add_source(coordinator, (config.train if name == "train" else config.test).feed, config, name, folder)
        if begin.folder is not None:
            trainer.load(begin.folder)
            _load_input(coordinator, begin.folder / INPUT)
        server = iw.serve_metrics(config.metrics.port, config.metrics.host, coordinator)
        stack.callback(server.close)
        console.print(f"metrics: {server.url}/metrics")
        stack.enter_context(coordinator)
        started = time.monotonic()
        job = _Job(config, console, coordinator, trainer, checkpoints, steps, on_batch)
        accuracy = job.run(begin)
        seconds = time.monotonic() - started
    result = Result(accuracy, seconds, coordinator.stats())
    _report(console, config, result)
    return result


def open_images(config: Config, console: Console) -> dict[str, Any]:
    """Return the image folders by name, and say what is in them. Raises ConfigError, also where a package is missing."""
    for package in DEMO_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this job needs {package}: pip install input-workers[demo]")
    folders = open_folders(config)
    for name, folder in folders.items():
        console.print(f"{name}: {len(folder):,} images of {len(folder.class_names)} classes in {folder.path}")
    return folders


def load_trainer(config: Config, folders: dict[str, Any], console: Console) -> Any:
    """Return the Trainer of a configuration, untrained. Raises ConfigError if Keras refuses its model."""
    console.print("loading TensorFlow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only: its greetings would hide ours
    from input_workers.jobs.model import Trainer

    steps = batches_in(config, "train", len(folders["train"])) * config.train.epochs
    return Trainer(config.model, len(folders["train"].class_names), steps, config.seed)


def _load_input(coordinator: iw.GlobalCoordinator, path: Path) -> None:
    try:
        coordinator.load_state(path)
    except StateMismatch as error:
        raise StateMismatch(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Job:
    """A training whose sources have been started."""

    config: Config
    console: Console
    coordinator: iw.GlobalCoordinator
    trainer: Any
    checkpoints: Checkpoints | None
    steps: int  # of an epoch
    on_batch: Callable[[int, Any], object] | None

    def run(self, begin: Checkpoint) -> float:
        """Train, evaluating after every epoch; return the last test accuracy."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
        )
        epochs, accuracy, step = self.config.train.epochs, 0.0, begin.step
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("training", total=self.steps * epochs, completed=step, numbers="")
            for epoch in range(begin.epoch, epochs):
                progress.update(bar, description=f"epoch {epoch + 1}/{epochs}")
                if epoch > begin.epoch or not begin.trained:
                    step = self._train_epoch(epoch, step, progress, bar)
                numbers = self._numbers()
                self.trainer.forget()
                for image, label in self.coordinator["test"]:
                    self.trainer.evaluate(image, label)
                _, accuracy = self.trainer.reached()
                self.trainer.forget()
                self.console.print(f"epoch {epoch + 1:2}/{epochs}: {numbers}, test accuracy {accuracy:.1%}")
        return accuracy

    def _train_epoch(self, epoch: int, step: int, progress: Progress, bar: Any) -> int:
        """Train what is left of an epoch; return the number of the last step."""
        shown = 0.0
        for batch in self.coordinator["train"]:
            step += 1
            if self.on_batch is not None:
                self.on_batch(step, batch)
            self.trainer.train(*batch)
            self._save(Checkpoint(None, step, epoch))
            progress.advance(bar)
            if time.monotonic() - shown >= SHOW_SECONDS:
                progress.update(bar, numbers=self._numbers())
                shown = time.monotonic()
        self._save(Checkpoint(None, step, epoch, trained=True))
        return step

    def _save(self, at: Checkpoint) -> None:
        """Save a checkpoint, if one is due. Between two batches the input has delivered what the model has learnt."""
        if self.checkpoints is None or not self.checkpoints.due(at.step, at.epoch, at.trained):
            return

        def write(folder: Path) -> None:
            self.trainer.save(folder)
            self.coordinator.save_state(folder / INPUT)

        self.checkpoints.save(at, write)

    def _numbers(self) -> str:
        loss, accuracy = self.trainer.reached()
        stats = self.coordinator["train"].stats()
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
        fetchers = source.workers if source.workers != "auto" else round(stats.windows["run"].fetchers_alive)
        fetchers = max(1, fetchers)
        fetching, copying, waiting = (
            f"{seconds / max(result.seconds, 1e-9):.1%}"
            for seconds in (stats.fetcher_busy_seconds / fetchers, stats.enqueuer_busy_seconds, stats.consumer_wait_seconds)
        )
        console.print(
            f"  {name}: fetching {fetching}{f' (mean of {fetchers} fetchers)' if fetchers > 1 else ''}, "
            f"copying {copying}, waiting for input {waiting}"
        )
        console.print(f"    {stats.verdict_text}", soft_wrap=True, markup=False)
