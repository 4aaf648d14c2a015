"""What a training has reached goes into a folder, whole or not at all, and comes back: model, optimizer and input of one step.

FOLDER/step-0000000120/model.keras       the model, as Keras saves it; anything may load it
                       training.npz      optimizer, random seeds, loss and accuracy of the epoch so far
                       input.json        where both sources are
                       checkpoint.json   step, epoch, of which configuration, and the checksums of the others
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from input_workers.config import Config
from input_workers.coordinator.state_file import load_file, save_file, sync_folder
from input_workers.errors import ConfigError, StateMismatch

__all__ = ["INPUT", "Checkpoint", "Checkpoints", "job_of"]

INPUT, ABOUT = "input.json", "checkpoint.json"
NAME = re.compile(r"step-(\d{10,})")
UNFINISHED, OUTDATED = ".new-", ".old-"  # what a killed training leaves behind is removed by the next
MAX_VALUE_CHARS = 200
REMEDY = "remove this folder to go on from the checkpoint before it"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of a training.

    Attributes:
        folder: with its files; None: the beginning, of which there are none.
        step: training steps made, each with one batch.
        epoch: the one that is not finished, from 0.
        trained: its training is done, and its evaluation is next.
    """

    folder: Path | None = None
    step: int = 0
    epoch: int = 0
    trained: bool = False


def job_of(config: Config, folders: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same when a training goes on: all that its batches and its steps depend on."""
    return {
        "seed": config.seed,
        "model": config.model.model_dump(),
        "train": {"batch_size": config.train.batch_size, "epochs": config.train.epochs, **_files(folders["train"])},
        "test": _files(folders["test"]),
        "classes": list(folders["train"].class_names),
    }


def _files(folder: Any) -> dict[str, Any]:
    names = "\0".join(folder.files).encode("utf-8", "surrogateescape")
    return {"images": len(folder), "sha256 of the names of the images": hashlib.sha256(names).hexdigest()}


class Checkpoints:
    """The checkpoints of one training. A context manager: inside, no other process writes to the folder. For one thread.

    Whoever looks into the folder, at any moment and after any crash, sees whole checkpoints only: each is written under
    another name, synced and renamed.

    Args:
        config: where, how often, and how many are kept.
        job: see `job_of`.

    Raises:
        ConfigError: there is no section [checkpoint].
    """

    def __init__(self, config: Config, job: dict[str, Any]) -> None:
        if config.checkpoint is None:
            raise ConfigError("checkpoint: is missing; wanted a section [checkpoint] with the folder to resume from")
        self._config = config.checkpoint
        self._epochs = config.train.epochs
        self._job = job
        self.folder = Path(config.checkpoint.folder)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
                for left in self.folder.iterdir():
                    if left.name.startswith((UNFINISHED, OUTDATED)):
                        shutil.rmtree(left, ignore_errors=True)
                os.rmdir(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))  # said now, not after the first epoch
            except BaseException:
                self.__exit__(None, None, None)
                raise
        except BlockingIOError:
            raise ConfigError(
                f"checkpoint.folder: another training writes to {str(self.folder)!r}; wanted a folder for each training"
            ) from None
        except OSError as error:
            raise ConfigError(f"checkpoint.folder: {error}; wanted a folder that can be written to") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, resume: bool) -> Checkpoint:
        """Return where to begin: at the latest checkpoint, or, if there is none, at the beginning.

        Raises:
            ConfigError: it is not to resume, but there are checkpoints, which it would mix with its own.
            StateMismatch: the latest is of another job, or was changed; the file is named.
        """
        saved = self._saved()
        if not saved:
            return Checkpoint()
        if not resume:
            raise ConfigError(
                f"checkpoint.folder: {str(self.folder)!r} holds a training up to step {_step(saved[-1])}; wanted --resume to "
                "go on with it, or another folder to begin anew"
            )
        return self._read(saved[-1])

    def due(self, step: int, epoch: int, trained: bool) -> bool:
        """Whether a checkpoint is to be saved here; `trained`: at the end of the epoch."""
        if trained:
            return (epoch + 1) % self._config.every_epochs == 0 or epoch + 1 == self._epochs
        return self._config.every_batches is not None and step % self._config.every_batches == 0

    def save(self, at: Checkpoint, write: Callable[[Path], object]) -> None:
        """Save a checkpoint, and remove those that are too many. Nothing, if that step is saved already.

        Args:
            at: where the training is.
            write: puts the files, among them INPUT, into the folder that it is given.

        Raises:
            ConfigError: it cannot be written; those saved before are intact.
        """
        final = self.folder / f"step-{at.step:010}"
        if final.exists():  # of the same step: the end of an epoch changes neither model nor input
            return
        try:
            unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
            try:
                write(unfinished)
                sums = {file.name: _sync(file) for file in sorted(unfinished.iterdir())}
                about = {"step": at.step, "epoch": at.epoch, "trained": at.trained, "job": self._job, "sha256": sums}
                save_file(unfinished / ABOUT, about)
                unfinished.chmod(0o755)
                unfinished.rename(final)
                sync_folder(self.folder)  # or the new name might not outlive a crash of the machine
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            for old in self._saved()[: -self._config.keep]:
                shutil.rmtree(old.rename(self.folder / f"{OUTDATED}{old.name}"), ignore_errors=True)
        except OSError as error:
            raise ConfigError(
                f"checkpoint.folder: step {at.step} cannot be saved to {str(self.folder)!r}: {error}; what was saved before is "
                "intact: wanted room for one more, then --resume"
            ) from error

    def _saved(self) -> list[Path]:
        """Return the checkpoints, the latest last."""
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)), key=_step)

    def _read(self, folder: Path) -> Checkpoint:
        path = folder / ABOUT
        try:
            about = load_file(path)
            for name, wanted in about["sha256"].items():
                path = folder / name
                if _digest(path) != wanted:
                    raise StateMismatch(f"{path}: its checksum is wrong; {REMEDY}")
            step, epoch, trained = about["step"], about["epoch"], about["trained"]
        except OSError as error:
            raise StateMismatch(f"{path}: cannot be read: {error.strerror}; {REMEDY}") from error
        except KeyError as error:
            raise StateMismatch(f"{path}: has no {error}; {REMEDY}") from error
        _compare(f"{folder / ABOUT}: ", about.get("job"), self._job)
        return Checkpoint(folder, step, epoch, trained)


def _compare(path: str, got: Any, wanted: Any) -> None:
    """Raise StateMismatch for the first value that differs, named by its path."""
    if isinstance(got, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in got if key not in wanted)]:
            dot = "" if path.endswith(" ") else "."
            _compare(f"{path}{dot}{key}", got.get(key), wanted.get(key))
    elif got != wanted:
        raise StateMismatch(
            f"{path}: got {got!r:.{MAX_VALUE_CHARS}}; wanted {wanted!r:.{MAX_VALUE_CHARS}}, as in the configuration: resume "
            "with the one that the checkpoint was made with, or begin anew in another checkpoint.folder"
        )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sync(path: Path) -> str:
    """Put a file on the disk; return its checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
