"""A configuration goes in; its two sources are read whole, and again with stops, and what differs comes out. No model is made.

Every row is reduced to a checksum of its picture and label, 8 bytes, which are kept for all epochs of both readings.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

import input_workers as iw
from input_workers.config import Config
from input_workers.errors import BadRows, ConfigError
from input_workers.jobs.streams import add_source, batches_in, open_folders, without_quarantine

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["verify_resume"]

CHECKSUM_NBYTES = 8
SHOWN_ROWS = 3  # of each kind and epoch


@dataclass(slots=True)
class _Reading:
    """What came of a source: how many batches, and the checksums of their rows in each epoch."""

    batches: int = 0
    epochs: dict[int, array[int]] = field(default_factory=dict)

    def add(self, batch: Any) -> None:
        """Add a batch."""
        self.batches += 1
        sums = self.epochs.setdefault(batch.epoch, array("Q"))
        sums.extend(_checksum(batch.image[row], batch.label[row]) for row in range(batch.valid_rows))

    @property
    def rows(self) -> int:
        """How many rows came."""
        return sum(map(len, self.epochs.values()))


def verify_resume(config: Config, at: Sequence[int], console: Console) -> bool:
    """Read both sources whole, and again with a stop and a resume at each of these batches; say what differs.

    The second reading is one chain: stopped, its state saved to a file and loaded from there into sources with another
    number of fetchers, and so on to the end. "test", which has another number of batches, is stopped at the same share of
    its own.

    Args:
        config: whose sources.
        at: batches of "train", over all its epochs, after which to stop. Where delivery is not ordered, the rows at the
            end of an epoch that fill no batch come too, as a shorter one.
        console: where to print.

    Returns:
        Whether the same rows came in each epoch; where delivery is ordered, in the same order.

    Raises:
        ConfigError: a batch of `at` is not in the training, or a folder does not fit.
    """
    config = without_quarantine(config)
    folders = open_folders(config)
    total = batches_in(config, "train", len(folders["train"]), _last_batch(config, "train")) * config.train.epochs
    stops = sorted(set(at))
    for each in stops:
        _check_stop(each, total)
    whole = _read_whole(config, folders)
    for each in stops:  # if rows were skipped, fewer came
        _check_stop(each, whole["train"].batches)
    cuts = [{"train": each, "test": each * whole["test"].batches // whole["train"].batches} for each in stops]
    chain = _read_chain(config, folders, cuts)
    same = True
    for name, folder in folders.items():
        faults = _differences(config, name, folder, whole[name], chain[name])
        ordered = _is_ordered(config, name)
        stopped = ", ".join(str(cut[name]) for cut in cuts)
        found = "differs" if faults else f"the same rows{' in the same order' if ordered else ''}"
        console.print(
            f"{name}: {chain[name].rows:,} rows in {chain[name].batches:,} batches of {config.train.epochs} epochs, "
            f"stopped after {stopped}: {found}"
        )
        for fault in faults:
            console.print(f"  {fault}")
        same = same and not faults
    return same


def _check_stop(batch: int, batches: int) -> None:
    if not 1 <= batch <= batches:
        raise ConfigError(f"--at: got {batch}; wanted 1 to {batches}, the batches of [train] over all its epochs")


def _is_ordered(config: Config, name: str) -> bool:
    """Whether the configuration says that a source's order is always the same."""
    return name == "train" and config.train.ordered


def _last_batch(config: Config, name: str) -> str | None:
    """Return what is to become of rows that fill no batch; None: what the job does."""
    # Without an order it is up to chance which rows these are, so one that is lost would not be missed: here they come too.
    return None if _is_ordered(config, name) else "keep"


def _checksum(image: NDArray[Any], label: Any) -> int:
    digest = hashlib.blake2b(image.tobytes(), digest_size=CHECKSUM_NBYTES)
    digest.update(int(label).to_bytes(CHECKSUM_NBYTES, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def _read_whole(config: Config, folders: dict[str, Any]) -> dict[str, _Reading]:
    coordinator = iw.GlobalCoordinator()
    for name, folder in folders.items():
        add_source(coordinator, "numpy", config, name, folder, last_batch=_last_batch(config, name))
    with coordinator:
        return {name: _read(coordinator[name], _Reading(), None) for name in folders}


def _read_chain(config: Config, folders: dict[str, Any], cuts: Sequence[dict[str, int]]) -> dict[str, _Reading]:
    came = {name: _Reading() for name in folders}
    with tempfile.TemporaryDirectory(prefix="input-workers-") as scratch:
        path = Path(scratch) / "state.json"
        for number, cut in enumerate([*cuts, None]):
            coordinator = iw.GlobalCoordinator()
            for name, folder in folders.items():
                workers = (config.train if name == "train" else config.test).workers
                workers = (AUTO_WORKERS if workers == "auto" else workers) + (number + 1) % 2
                last_batch = _last_batch(config, name)
                add_source(coordinator, "numpy", config, name, folder, workers=workers, last_batch=last_batch)
            if number:
                coordinator.load_state(path)
            with coordinator:
                for name in folders:
                    _read(coordinator[name], came[name], None if cut is None else cut[name])
                coordinator.save_state(path)
    return came


# How many read in place of workers = "auto": how many there are is not to change the rows.
AUTO_WORKERS = 2


def _read(source: iw.DataInputCoordinator, came: _Reading, until: int | None) -> _Reading:
    """Read on until there are so many batches, or to the end."""
    ended = 0  # loops without a batch: the end of an epoch, and then the end
    while ended < 2 and (until is None or came.batches < until):
        before = came.batches
        while until is None or came.batches < until:
            try:
                came.add(source.next_batch())
            except iw.EndOfData:
                break
        ended = ended + 1 if came.batches == before else 0
    return came


def _differences(config: Config, name: str, folder: Any, whole: _Reading, chain: _Reading) -> list[str]:
    """Return what differs, a line for each kind and epoch."""
    faults = []
    size = (config.train if name == "train" else config.test).batch_size
    for epoch in sorted({*whole.epochs, *chain.epochs}):
        wanted, got = (reading.epochs.get(epoch, array("Q")) for reading in (whole, chain))
        missing, more = _beyond(wanted, got), _beyond(got, wanted)
        for kind, sums in (("too many", more), ("missing", missing)):
            if sums:
                faults.append(f"epoch {epoch + 1}: {len(sums)} rows are {kind}: {_named(folder, sums)}")
        if _is_ordered(config, name) and wanted != got and not missing and not more:
            at = next(row for row, (one, other) in enumerate(zip(wanted, got, strict=True)) if one != other)
            faults.append(f"epoch {epoch + 1}: another order from row {at} (batch {at // size + 1} of the epoch) on")
    return faults


def _beyond(these: Sequence[int], those: Sequence[int]) -> list[int]:
    """Return which of these are more often here than there, each as often as that."""
    one, counts = np.unique(np.array(these, np.uint64), return_counts=True)
    other, others = np.unique(np.array(those, np.uint64), return_counts=True)
    at = np.searchsorted(other, one)
    there = np.zeros(len(one), np.int64)
    known = at < len(other)
    known[known] = other[at[known]] == one[known]
    there[known] = others[at[known]]
    return [int(each) for each in np.repeat(one, np.maximum(counts - there, 0))]


def _named(folder: Any, sums: Sequence[int]) -> str:
    """Return the files of the first of these rows, which are read once more to find them."""
    wanted = set(sums[:SHOWN_ROWS])
    names = []
    for row in range(len(folder)):
        if not wanted:
            break
        rows = np.array([row])
        try:
            image, label = folder.fetch(rows, iw.FetchRequest(0, 0, rows))
        except BadRows:  # it was skipped
            continue
        checksum = _checksum(image[0], label[0])
        if checksum in wanted:
            wanted.remove(checksum)
            names.append(repr(folder.file_of(row)))
    return ", ".join(names + ["..."] * (len(set(sums)) > SHOWN_ROWS)) or "pictures that no file holds"
