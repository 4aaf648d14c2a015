"""A training and its source go in; how much faster it would be if data were free comes out, found in two independent ways.

Rounds alternate: with real input, and with the first batch again and again, while no fetcher runs. The second way is the
source's own attribution: a trainer that waits a share w of its time would be 1 / (1 - w) times as fast.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

import input_workers as iw
from input_workers.bench.measure import Stopwatch, compare, median_ratio
from input_workers.config import Config
from input_workers.jobs.streams import add_source, batches_in, without_quarantine
from input_workers.jobs.train import SHOW_SECONDS, load_trainer, open_images

__all__ = ["Bounds", "Headspace", "headspace", "measure"]

ENDLESS_EPOCHS = 10**9
WARM_UP_STEPS = 8  # at least: TensorFlow traces at the first one and tunes in the next
# By how much the two ways may differ, as shares of the training's time.
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is measured: in each round and on each side, so many seconds or, where it is given, so many steps."""

    rounds: int = 5
    seconds: float = 2.0
    steps: int | None = None

    def reached(self, steps: int, seconds: float) -> bool:
        """Whether a side of a round is over. It has a step at least."""
        return steps >= self.steps if self.steps is not None else steps > 0 and seconds >= self.seconds


@dataclass(frozen=True, slots=True)
class Headspace:
    """What was measured.

    Attributes:
        real: images/s of each round with real input.
        free: images/s of each round with a batch that costs nothing.
        trainer_wait: share of its time that the trainer waited, by the source's counters: the median of the rounds of `real`.
        verdict_text: what the source said in the last of them.
    """

    real: tuple[float, ...]
    free: tuple[float, ...]
    trainer_wait: float
    verdict_text: str

    @property
    def times(self) -> float:
        """How many times as fast it would be, as measured: the median of the rounds."""
        return median_ratio({"free": list(self.free), "real": list(self.real)}, "free", "real")

    @property
    def times_by_waits(self) -> float:
        """The same by the trainer's waits alone."""
        return 1.0 / max(1.0 - self.trainer_wait, 1e-9)

    @property
    def beyond_waits(self) -> float:
        """Share of the training's time that is lost with real input, beyond what the trainer waits."""
        return 1.0 - 1.0 / self.times - self.trainer_wait

    @property
    def nonsense(self) -> str | None:
        """Why these numbers cannot be true, or None."""
        if self.beyond_waits >= -TOLERANCE:
            return None
        return (
            f"the trainer waits {self.trainer_wait:.0%} of its time, so free data should make it {self.times_by_waits:.2f} "
            f"times as fast, but {self.times:.2f} were measured: wanted a quieter machine, or more --seconds"
        )

    def __str__(self) -> str:
        rounds = sorted(free / real for free, real in zip(self.free, self.real, strict=True))
        lines = [
            f"training would be {self.times:.2f} times as fast if data were free: {statistics.median(self.real):,.0f} -> "
            f"{statistics.median(self.free):,.0f} images/s (median of {len(rounds)} rounds, which say {rounds[0]:.2f} to "
            f"{rounds[-1]:.2f})",
            f"the trainer waits {self.trainer_wait:.0%} of its time; without these waits it would be "
            f"{self.times_by_waits:.2f} times as fast",
        ]
        if self.beyond_waits > TOLERANCE:
            lines.append(
                f"{self.beyond_waits:.0%} more are lost while it does not wait: its steps are slower beside fetchers, which "
                "use the same processors"
            )
        lines.append(self.verdict_text)
        if self.nonsense is not None:
            lines.append(f"not to be trusted: {self.nonsense}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return all of it as JSON."""
        sides = {
            side: {"images_per_second": statistics.median(rates), "rounds": rates}
            for side, rates in (("real", self.real), ("free", self.free))
        }
        return json.dumps({
            "times": self.times,
            "times_by_waits": self.times_by_waits,
            "trainer_wait": self.trainer_wait,
            "beyond_waits": self.beyond_waits,
            **sides,
            "verdict_text": self.verdict_text,
            "nonsense": self.nonsense,
        })  # fmt: skip


def headspace(config: Config, console: Console, bounds: Bounds) -> Headspace:
    """Measure the training of a configuration. Neither checkpoints nor what was skipped are written.

    Raises:
        ConfigError, InputWorkersError: as `train` does.
    """
    folders = open_images(config, console)
    trainer = load_trainer(config, folders, console)
    train = config.train.model_copy(update={"epochs": ENDLESS_EPOCHS})
    coordinator = iw.GlobalCoordinator()
    alone = without_quarantine(config.model_copy(update={"train": train}))
    add_source(coordinator, train.feed, alone, "train", folders["train"])
    steps = batches_in(config, "train", len(folders["train"]))
    console.print(f"measuring {bounds.rounds} rounds; an epoch has {steps:,} steps")
    return measure(coordinator["train"], coordinator, trainer.train, trainer.reached, config.train.batch_size, bounds)


def measure(
    source: iw.DataInputCoordinator,
    coordinator: iw.GlobalCoordinator,
    step: Callable[..., object],
    finish: Callable[[], object],
    batch_size: int,
    bounds: Bounds,
) -> Headspace:
    """Train with real input and with a batch that costs nothing, in turn.

    Between the rounds the source is stopped, so no fetcher takes processor time from free data; it goes on where it was.

    Args:
        source: of batches of `batch_size` rows, from an endless Stream; an epoch may end with a break.
        coordinator: of this source alone; not started, and stopped when this returns or raises.
        step: trains one batch, given its arrays.
        finish: waits until all steps were made.
        batch_size: rows of a batch.
        bounds: how much.
    """
    waits: list[float] = []
    said = ""
    with coordinator:
        first = _following(source)
    for _ in range(WARM_UP_STEPS):
        step(*first)
    finish()

    def real() -> float:
        nonlocal said
        with coordinator:
            _settle(source, step, finish, bounds)
            before = source.stats().consumer_wait_seconds
            rate, seconds = _rate(lambda: _following(source), step, finish, bounds)
            stats = source.stats()
            waits.append((stats.consumer_wait_seconds - before) / seconds)
            said = stats.verdict_text
            if not coordinator.stop():
                raise RuntimeError(f"benchmark: stop() was not clean: {coordinator.last_stop}")
        source.load_state_dict(source.state_dict())
        return rate * batch_size

    def free() -> float:
        return _rate(lambda: first, step, finish, bounds)[0] * batch_size

    rates = compare({"real": real, "free": free}, bounds.rounds)
    return Headspace(tuple(rates["real"]), tuple(rates["free"]), statistics.median(waits), said)


def _following(source: iw.DataInputCoordinator) -> Any:
    try:
        return source.next_batch()
    except iw.EndOfData:  # of an epoch
        return source.next_batch()


def _settle(source: iw.DataInputCoordinator, step: Callable[..., object], finish: Callable[[], object], bounds: Bounds) -> None:
    """Train until it is as it will be: the buffers are full, or the trainer waits. For as long as is measured, at most."""
    started, steps = time.perf_counter(), 0
    blocked = source.stats().fetcher_blocked_seconds
    while True:
        waited = source.stats().consumer_wait_seconds
        step(*_following(source))
        steps += 1
        stats = source.stats()
        settled = stats.fetcher_blocked_seconds > blocked or stats.consumer_wait_seconds > waited
        if steps >= WARM_UP_STEPS and (settled or bounds.reached(steps, time.perf_counter() - started)):
            break
    finish()


def _rate(
    following: Callable[[], Any], step: Callable[..., object], finish: Callable[[], object], bounds: Bounds
) -> tuple[float, float]:
    """Return (steps a second, seconds)."""
    steps = 0
    watch = Stopwatch()
    with watch.running():
        started = shown = time.perf_counter()
        while not bounds.reached(steps, time.perf_counter() - started):
            step(*following())
            steps += 1
            if time.perf_counter() - shown >= SHOW_SECONDS:  # as a training does
                finish()
                shown = time.perf_counter()
        finish()
    return steps / watch.seconds, watch.seconds
