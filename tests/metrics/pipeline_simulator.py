"""A simulated pipeline of known rates, with the counters that the service would have read at any moment.

A simulation by events: fetchers that fetch a chunk, reserve rows of the batches that are laid out, and copy it there; the
enqueuer, which lays out batches and sends each complete one through its feed; a bounded device queue; the trainer. Nothing
runs and no clock is read, so which stage is the bottleneck is known beforehand. The number of fetchers, and the pipeline,
may be changed between two calls of `run_until`.
"""

from __future__ import annotations

import collections
import heapq
import math
import random
from dataclasses import dataclass

from input_workers.metrics.windows import Counters

MARGIN = 1.15  # the slowest stage is slower than any other by this much, or nobody could say who it is
BATCH = 32


@dataclass(frozen=True)
class Pipeline:
    """Seconds are means. `turns`: fetchers compute while they hold the interpreter lock. `cpu`: the share of a call that is
    computed; copying computes all the time. `at_most`: this many calls at once go at their full speed; more share that (cores,
    or a disk)."""

    fetchers: int = 2
    fetch_s: float = 0.01
    rows: int = BATCH
    copy_s: float = 0.0001  # of a batch's worth of rows, by the fetcher
    send_s: float = 0.0001  # what the enqueuer does for a batch, without the feed
    feed_s: float = 0.0001
    train_s: float = 0.001
    jitter: float = 0.2  # durations lie within this share of their mean
    depth: int = 4
    buffered: int = 16  # batches
    turns: bool = False
    cpu: float = 0.05
    at_most: float = math.inf

    @property
    def rates(self) -> dict[str, float]:
        """Batches a second of each stage, alone."""
        chunks = self.fetchers / (self.fetch_s + self.copy_s * self.rows / BATCH)
        return {
            "fetch": (min(chunks, 1.0 / self.fetch_s) if self.turns else chunks) * self.rows / BATCH,
            "feed" if self.feed_s > self.send_s else "enqueue": 1.0 / (self.send_s + self.feed_s),
            "trainer": 1.0 / self.train_s,
        }

    @property
    def copying_part(self) -> float:
        """What part of its time a fetcher that never waits would copy for."""
        copying = self.copy_s * self.rows / BATCH
        return copying / (self.fetch_s + copying)

    @property
    def bottleneck(self) -> str:
        return min(self.rates, key=lambda stage: self.rates[stage])

    @property
    def is_clear(self) -> bool:
        slowest, second, _ = sorted(self.rates.values())
        return second > MARGIN * slowest


def random_pipeline(seed: int) -> Pipeline:
    """Return a pipeline of which one stage is clearly the slowest."""
    rng = random.Random(seed)

    def about(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    while True:
        fetchers, rows = rng.choice([1, 2, 3, 4, 6, 8, 12]), rng.choice([1, 5, 16, 32, 33, 100])
        batch_s, sending_s, part = about(0.002, 0.2), about(0.002, 0.2), rng.choice([0.1, 0.2, 0.8, 0.9])
        turns = fetchers > 1 and rng.random() < 0.2
        copying = rng.choice([0.01, 0.1]) if turns else rng.choice([0.01, 0.1, 0.5, 0.9])
        at_once = 1 if turns else fetchers
        pipeline = Pipeline(
            fetchers=fetchers,
            fetch_s=batch_s * (1 - copying) * rows / BATCH * at_once,
            copy_s=batch_s * copying * at_once,
            rows=rows,
            send_s=sending_s * (1 - part),
            feed_s=sending_s * part,
            train_s=about(0.002, 0.2),
            jitter=rng.choice([0.0, 0.1, 0.5]),
            depth=rng.choice([2, 4, 8]),
            buffered=rng.choice([4, 16, 64]),
            turns=turns,
        )
        if pipeline.is_clear:
            return pipeline


class _Actor:
    """In one state at a time; how long it was in each is summed."""

    def __init__(self, state: str) -> None:
        self.state, self.since = state, 0.0
        self.seconds: collections.Counter[str] = collections.Counter()

    def go(self, state: str, now: float) -> None:
        self.seconds[self.state] += now - self.since
        self.state, self.since = state, now

    def in_state(self, state: str, now: float) -> float:
        return self.seconds[state] + (now - self.since if self.state == state else 0.0)


@dataclass
class _Chunk:
    """Rows that a fetcher has fetched. `reserved` have a place in the batches, `copied` are there."""

    reserved: int = 0
    copied: int = 0
    begin: int = 0  # of the rows that are being copied, among all that were ever reserved


class Simulator:
    """Runs a pipeline; `read` may be called between two calls of `run_until`."""

    def __init__(self, pipeline: Pipeline, seed: int = 0) -> None:
        self.pipeline = pipeline
        self.now = 0.0
        self._depth_seconds = 0.0
        self._rng = random.Random(seed)
        self._fetchers = [_Actor("busy") for _ in range(pipeline.fetchers)]
        self._enqueuer, self._trainer = _Actor("starved"), _Actor("wait")
        self._fetched = self._on_device = self._batches = self._calls = 0
        # Since the beginning: rows that were reserved; batches that were laid out, and taken to be sent.
        self._reserved = self._laid_out = self._taken = 0
        self._chunks: dict[int, _Chunk] = {}  # by fetcher, what it copies or waits with
        self._line: list[int] = []  # fetchers that wait for room, first come, first served
        self._leaving: set[int] = set()
        self.fresh: set[int] = set()  # added fetchers that have not come back from a call yet
        self._computing = dict.fromkeys(range(pipeline.fetchers), (0.0, 0.0, 1.0))  # seconds of ended calls, of this one
        # that it takes, and since when
        self._events: list[tuple[float, int, str, int]] = []
        self._number = 0
        for index in range(pipeline.fetchers):
            self._call(index)

    def resize(self, fetchers: int) -> None:
        """Have this many fetchers; those that leave end their call and copy its chunk first."""
        there = [index for index, each in enumerate(self._fetchers) if each.state != "gone" and index not in self._leaving]
        self._leaving |= set(there[fetchers:])
        for index in range(len(self._fetchers), len(self._fetchers) + fetchers - len(there)):
            self._fetchers.append(_Actor("gone"))
            self._computing[index] = (0.0, 0.0, 1.0)
            self.fresh.add(index)
            self._call(index)

    def _after(self, mean: float, what: str, who: int = 0) -> float:
        seconds = mean * self._rng.uniform(1 - self.pipeline.jitter, 1 + self.pipeline.jitter)
        self._number += 1
        heapq.heappush(self._events, (self.now + seconds, self._number, what, who))
        return seconds

    def _call(self, index: int) -> None:
        pipeline = self.pipeline
        self._fetchers[index].go("busy", self.now)
        shares = pipeline.turns or pipeline.at_most < math.inf
        busy = sum(each.state == "busy" for each in self._fetchers) if shares else 0
        slower = busy if pipeline.turns else max(1.0, busy / pipeline.at_most)
        seconds = self._after(pipeline.fetch_s * slower, "fetched", index)
        self._computing[index] = (
            self._computing[index][0],
            seconds * (1 / busy if pipeline.turns else pipeline.cpu / slower),
            seconds,
        )

    def run_until(self, moment: float) -> None:
        while self._events and self._events[0][0] <= moment:
            at, _, what, who = heapq.heappop(self._events)
            self._go_on(at)
            if what == "fetched":
                self._fetched += self.pipeline.rows
                self._calls += 1
                self.fresh.discard(who)
                ended, computed, seconds = self._computing[who]
                self._computing[who] = (ended + computed, 0.0, seconds)
                self._chunks[who] = _Chunk()
                self._wait_for_room(who)
            elif what == "copied":
                self._copied(who)
            elif what == "prepared":
                self._enqueuer.go("blocked", self.now)
            elif what == "sent":
                self._on_device += 1
                self._enqueuer.go("starved", self.now)
            else:
                self._trainer.go("wait", self.now)
            self._settle()
        self._go_on(moment)

    def _go_on(self, now: float) -> None:
        self._depth_seconds += self._on_device * (now - self.now)
        self.now = now

    def _wait_for_room(self, index: int) -> None:
        self._fetchers[index].go("blocked", self.now)
        self._line.append(index)

    def _copied(self, index: int) -> None:
        chunk = self._chunks[index]
        chunk.copied = chunk.reserved
        if chunk.copied < self.pipeline.rows:
            # It kept its place in the line meanwhile.
            self._fetchers[index].go("blocked", self.now)
            self._line.insert(0, index)
            return
        del self._chunks[index]
        if index in self._leaving:
            self._leaving.discard(index)
            self._fetchers[index].go("gone", self.now)
        else:
            self._call(index)

    def _reserve(self) -> bool:
        """Let the first in the line reserve the rows that there is room for, and copy them; False: there is no room."""
        room = self._laid_out * BATCH - self._reserved
        # A chunk of which a part is being copied, and the rest has no room yet, is still the first in the line.
        is_held = any(each.copied < each.reserved < self.pipeline.rows for each in self._chunks.values())
        if not self._line or not room or is_held:
            return False
        index = self._line.pop(0)
        chunk = self._chunks[index]
        rows = min(room, self.pipeline.rows - chunk.reserved)
        chunk.begin = self._reserved
        chunk.reserved += rows
        self._reserved += rows
        self._fetchers[index].go("copy", self.now)
        self._after(self.pipeline.copy_s * rows / BATCH, "copied", index)
        return True

    def _lay_out(self) -> bool:
        """Lay out what the assembly lacks: two empty batches behind the one that is being filled."""
        before = self._laid_out
        most = -(-self._reserved // BATCH) + 2 + (self._reserved % BATCH == 0)
        self._laid_out = max(before, min(most, self._taken + self.pipeline.buffered))
        return self._laid_out > before

    def _complete(self) -> int:
        """Return how many batches, of all that ever were, have all their rows."""
        copying = [chunk.begin for chunk in self._chunks.values() if chunk.copied < chunk.reserved]
        return min([self._reserved, *copying]) // BATCH

    def _settle(self) -> None:
        """Let all do what has become possible."""
        pipeline, moved = self.pipeline, True
        while moved:
            moved = self._reserve()
            # The enqueuer lays out batches when it has nothing to send, or no room for it.
            if self._enqueuer.state in ("starved", "blocked"):
                moved = self._lay_out() or moved
            if self._enqueuer.state == "starved" and self._complete() > self._taken:
                self._taken += 1
                self._enqueuer.go("send", self.now)
                self._after(pipeline.send_s, "prepared")
                moved = True
            if self._enqueuer.state == "blocked" and self._on_device < pipeline.depth:
                self._enqueuer.go("feed", self.now)
                self._after(pipeline.feed_s, "sent")
            if self._trainer.state == "wait" and self._on_device:
                self._on_device -= 1
                self._batches += 1
                self._trainer.go("train", self.now)
                self._after(pipeline.train_s, "trained")
                moved = True

    def read(self) -> Counters:
        now, enqueuer = self.now, self._enqueuer
        copying = sum(fetcher.in_state("copy", now) for fetcher in self._fetchers)
        busy = sum(fetcher.in_state("busy", now) for fetcher in self._fetchers) + copying
        feed = enqueuer.in_state("feed", now)
        blocked = sum(fetcher.in_state("blocked", now) for fetcher in self._fetchers)
        computed = copying
        for fetcher, (ended, this, seconds) in zip(self._fetchers, self._computing.values(), strict=True):
            computed += ended + this * (now - fetcher.since) / seconds
        return Counters(
            at=now,
            trainer_wait=self._trainer.in_state("wait", now),
            fetchers=busy + blocked,
            fetch_busy=busy,
            fetch_blocked=blocked,
            fetch_cpu=computed,
            enqueue_busy=enqueuer.in_state("send", now) + feed,
            enqueue_starved=enqueuer.in_state("starved", now),
            enqueue_blocked=enqueuer.in_state("blocked", now),
            feed=feed,
            rows_fetched=self._fetched,
            rows_delivered=self._batches * BATCH,
            batches=self._batches,
            depth_seconds=self._depth_seconds,
            calls=self._calls,
            copying=copying,
        )
