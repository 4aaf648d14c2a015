"""The shares of a window go in; who is the bottleneck comes out, as a word and as a sentence that says what to do. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from input_workers.metrics.snapshot import WindowStats

__all__ = ["COMPUTES_SHARE", "HELD", "TRAINER_BOUND_SHARE", "VERDICTS", "Setting", "Verdict", "judge", "workers_wanted"]

VERDICTS = ("trainer", "fetch", "enqueue", "feed", "starting", "stopped")

# A trainer that waits less than this share of its time is not held up by its input.
TRAINER_BOUND_SHARE = 0.05
# Copies to a device that are late this often hold the trainer up on the device, where it is not seen waiting.
NOT_READY_SHARE = 0.1
# Fetchers that take turns at the interpreter lock use about one core. Measured: 0.76 to 0.99, with 1 to 4 that only compute.
ONE_CORE = (0.7, 1.15)
BUSY_FETCHERS, BUSY_SHARE = 1.5, 0.6
LATE_SHARE = 0.15
# Fetchers that compute need a core each; those that mostly wait do not.
COMPUTES_SHARE = 0.5
# More workers than this many times those there are: the number says little.
MOST_TIMES = 8


# What keeps num_workers="auto" from more workers, and what to do about it.
HELD = {
    "max_workers": "raise max_workers (now {workers}) or make fetch faster",
    "bytes": "more than {workers} workers may hold more than max_buffered_bytes: raise it, or return smaller chunks",
    "cores": "{workers} workers have all the cores that this process may use: make fetch faster, or use more cores",
    "gain": "more than {workers} workers do not fetch more: what they read from is at its limit",
    "start": "more than {workers} workers could not be started: the log says why",
    "end": "no workers are added, as the first have no more data: make fetch faster",
}


class Verdict(NamedTuple):
    """Who is the bottleneck."""

    word: str  # of VERDICTS
    text: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a source a window does not say."""

    state: Literal["starting", "running", "stopped"] = "running"
    fetchers: Literal["thread", "process", "inline"] = "thread"  # inline: num_workers=0
    workers: int = 1
    devices: int = 1
    cores: float = 1.0  # that this process may use
    held_by: str | None = None  # num_workers="auto": what keeps it from more, of HELD; "": nothing. None: the number is fixed
    slowest_part: str = ""  # of the fetch function, as `timed` named it


def judge(window: WindowStats, setting: Setting) -> Verdict:
    """Return the verdict on a window of a source."""
    if setting.state == "starting":
        stages = f"fetchers are busy {_percent(window.fetchers.busy)}, the enqueuer {_percent(window.enqueuer.busy)}"
        return Verdict("starting", f"no batch yet after {window.seconds:.1f} s; {stages}")
    if setting.state == "stopped":
        if not window.batches:
            return Verdict("stopped", "stopped; too few batches to say who waited")
        word, text = _running(window, setting)
        return Verdict("stopped", f"stopped; while it ran ({window.seconds:.1f} s, {word}): {text}")
    return _running(window, setting)


def _running(window: WindowStats, setting: Setting) -> Verdict:
    waits = f"trainer waits {_percent(window.trainer_wait)} of its time"
    enqueuer, fetchers = window.enqueuer, window.fetchers
    if window.batches_not_ready > NOT_READY_SHARE * max(window.batches, 1):
        return Verdict(
            "feed",
            f"{window.batches_not_ready} of {window.batches} batches were not on the device when the trainer got them: raise "
            "device_queue_depth, or send fewer bytes",
        )
    if window.trainer_wait < TRAINER_BOUND_SHARE:
        return Verdict("trainer", f"input is ahead: {waits}, and fetchers are blocked {_percent(fetchers.blocked)} of theirs")
    turns = _takes_turns(window, setting)
    if enqueuer.blocked > 0.5 and not turns:
        return Verdict(
            "trainer",
            f"{waits}, though a device has no room {_percent(enqueuer.blocked)} of the time: input is ahead, but trainers take "
            "batches in bursts or unevenly; raise device_queue_depth, or make the slowest of several devices faster",
        )
    if not turns and enqueuer.busy > _fetch_use(window, setting):
        if window.feed > enqueuer.busy / 2:
            return Verdict(
                "feed",
                f"{waits}; the feed takes {_percent(window.feed)} to send batches: send fewer bytes, such as uint8 instead of "
                "float32, or use another feed",
            )
        return Verdict(
            "enqueue",
            f"{waits}; the enqueuer is busy {_percent(enqueuer.busy)}, while fetchers are blocked "
            f"{_percent(fetchers.blocked)}: return larger chunks, of a whole batch where you can",
        )
    return Verdict("fetch", f"{waits}; {_remedy(window, setting, turns)}{_slowest(setting)}")


def _fetch_use(window: WindowStats, setting: Setting) -> float:
    """Return how much of what the fetchers could do was wanted of them."""
    if setting.fetchers == "inline":  # what the trainer waits for is fetching, or filling and sending
        return window.trainer_wait - window.enqueuer.busy
    return 1.0 - window.fetchers.blocked


def _takes_turns(window: WindowStats, setting: Setting) -> bool:
    """Whether the fetchers are threads of which one runs at a time."""
    low, high = ONE_CORE
    busy, cores = window.fetchers.busy, window.fetcher_cores
    if setting.fetchers != "thread" or setting.cores <= 1:
        return False
    # A trainer that waits while its device has no room: whoever would hand the batch over does not get to run.
    if setting.devices == 1 and window.trainer_wait + window.enqueuer.blocked > 1.0 + LATE_SHARE:
        return low / 2 <= cores <= high
    return busy >= BUSY_SHARE and busy * window.fetchers_alive >= BUSY_FETCHERS and low <= cores <= high


def _remedy(window: WindowStats, setting: Setting, turns: bool) -> str:
    busy, alive = window.fetchers.busy, max(window.fetchers_alive, 1e-9)
    if setting.fetchers == "inline":
        return "fetch runs in the trainer's own thread: use num_workers=1 or more"
    if turns:
        return (
            f"fetchers ({alive:.0f}, busy {_percent(busy)}) use {window.fetcher_cores:.1f} cores together: fetch holds the "
            "GIL: use fetchers='process'"
        )
    if window.fetchers.starved > busy:
        return f"fetchers have no data {_percent(window.fetchers.starved)} of their time: what they read from is slow"
    says = f"fetchers are busy {_percent(busy)}: "
    cores_each = window.fetcher_cores / (alive * busy) if busy else 0.0
    if cores_each > COMPUTES_SHARE and (alive + 0.5) * cores_each > setting.cores:
        return f"{says}they use {window.fetcher_cores:.1f} of {setting.cores:g} cores: make fetch faster, or use more cores"
    if setting.held_by is not None:
        held = HELD.get(setting.held_by, "workers are being added (now {workers})")
        return says + held.format(workers=setting.workers)
    wanted = workers_wanted(window, setting.workers)
    if wanted is None:
        return f"{says}add workers (now {setting.workers}; more than {MOST_TIMES} times as many would do) or make fetch faster"
    return f"{says}add workers ({setting.workers} -> {wanted} would do) or make fetch faster"


def workers_wanted(window: WindowStats, workers: int) -> int | None:
    """Return how many workers would keep a trainer from waiting; None: far more than there are.

    Without waiting the trainer would take its rows in the time that it did not wait: 1 / (1 - wait) times the rate. A worker
    that is always busy fetches what it now does, divided by its share of busy time.
    """
    at_work = 1.0 - window.trainer_wait
    wanted = workers * max(window.fetchers.busy, 1e-3) / at_work if at_work > 0.0 else math.inf
    if wanted > workers * MOST_TIMES:
        return None
    return max(workers + 1, math.ceil(wanted - 0.05))  # a twentieth of a worker is within the error


def _slowest(setting: Setting) -> str:
    return f"; slowest part: {setting.slowest_part}" if setting.slowest_part else ""


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
