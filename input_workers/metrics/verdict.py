"""The bottleneck of an input source, as a word and as a sentence that says what to do. Pure functions of a window's shares."""

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
# Fetchers, enqueuer and trainer do not all wait at the same time, unless threads that were woken come late. By this share they
# do; measured on two cores: at most 0.1 where two fetchers copy chunks that are smaller than a batch; 0.3 to 0.7 with four of
# them, with batches of one row, or where fetch holds the GIL.
LATE_SHARE = 0.15
# Fetchers that copy for this part of their busy time would do a third more without copying. Measured: 0.1 where
# a call waits for a millisecond, 0.8 and more where it returns slices of an array in memory; little lies between.
COPYING_SHARE = 0.25
# A chunk of more batches than are laid out at once is copied in several steps, while other fetchers wait for their turn.
MOST_BATCHES_PER_CALL = 3.0
# Where threads come late because of the interpreter lock, a call of the fetch function runs for most of the time.
LATE_CALLS = 0.5
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
    rebatch: bool = True
    has_turns: bool = False  # rows are placed in the order of the requests, so a fetcher may be blocked by another's call
    is_stream: bool = False  # the fetch function is a Stream, whose requests lend memory
    keeps_chunks: bool = True  # every feed takes a chunk that is exactly a batch as it is
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
        if _has_late_trainer(window, setting):
            return Verdict(
                "enqueue",
                f"{waits}, though a device has no room {_percent(enqueuer.blocked)} of the time: trainer and enqueuer wait for "
                f"each other at every batch: {_fewer_batches(setting)}",
            )
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
            f"{waits}; the enqueuer is busy {_percent(enqueuer.busy)} with laying out and sending batches, while fetchers are "
            f"blocked {_percent(fetchers.blocked)}: {_fewer_batches(setting)}",
        )
    if not turns and _is_late(window, setting):
        return Verdict(
            "enqueue",
            f"{waits}; fetchers are blocked {_percent(fetchers.blocked)}, and the enqueuer is busy only "
            f"{_percent(enqueuer.busy)}: they wait for each other at every batch: {_fewer_batches(setting)}"
            f"{', or smaller chunks' * (setting.rebatch and window.batches_per_call > MOST_BATCHES_PER_CALL)}",
        )
    return Verdict("fetch", f"{waits}; {_remedy(window, setting, turns)}{_slowest(setting)}")


def _fewer_batches(setting: Setting) -> str:
    """Return how to have fewer batches a second: what the enqueuer does for each takes the same time, whatever its size."""
    larger = "use a larger batch_size" if setting.rebatch else "return larger chunks, each of which is a batch"
    return f"{larger}, or fewer devices" if setting.devices > 1 else larger


def _fetch_use(window: WindowStats, setting: Setting) -> float:
    """Return the share of their time that fetchers were able to use."""
    if setting.fetchers == "inline":  # what the trainer waits for is fetching and copying, or sending
        return window.trainer_wait - window.enqueuer.busy
    return 1.0 - window.fetchers.blocked


def _is_late(window: WindowStats, setting: Setting) -> bool:
    """Whether fetchers wait for empty batches while the enqueuer waits for full ones, and the trainer for any."""
    all_wait = window.trainer_wait + window.enqueuer.starved + window.fetchers.blocked - 2.0
    return all_wait > LATE_SHARE and not setting.has_turns


def _has_late_trainer(window: WindowStats, setting: Setting) -> bool:
    """Whether the trainer waits while its device has no room: the thread that should go on does not get to run at once."""
    return setting.devices == 1 and window.trainer_wait + window.enqueuer.blocked > 1.0 + LATE_SHARE


def _takes_turns(window: WindowStats, setting: Setting) -> bool:
    """Whether the fetchers are threads of which one runs at a time, because the fetch function holds the interpreter lock."""
    if setting.fetchers != "thread" or setting.cores <= 1:
        return False
    low, high = ONE_CORE
    busy, alive = window.fetchers.busy, window.fetchers_alive
    calls = busy - window.copying
    # Copying does not hold the lock, and computes all the time.
    cores_of_calls = window.fetcher_cores - window.copying * alive
    if window.fetcher_cores > high:
        return False
    if _has_late_trainer(window, setting) or _is_late(window, setting):
        return calls > window.copying and calls * alive >= LATE_CALLS and window.fetcher_cores >= low / 2
    return (
        busy >= BUSY_SHARE
        and calls * alive >= BUSY_FETCHERS
        and cores_of_calls >= low / 2
        and window.fetcher_cores >= low
        and window.enqueuer.busy <= _fetch_use(window, setting)
    )


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
    copies = window.copying >= COPYING_SHARE * busy > 0.0
    says = f"fetchers are busy {_percent(busy)}: "
    faster = "make fetch faster"
    if copies:
        faster = _copy_less(window, setting)
        says = f"fetchers are busy {_percent(busy)}, {_percent(window.copying / busy)} of that copying rows into batches: "
    cores_each = window.fetcher_cores / (alive * busy) if busy else 0.0
    if cores_each > COMPUTES_SHARE and (alive + 0.5) * cores_each > setting.cores:
        return f"{says}they use {window.fetcher_cores:.1f} of {setting.cores:g} cores: {faster}, or use more cores"
    if setting.held_by is not None:
        held = HELD.get(setting.held_by, "workers are being added (now {workers})").format(workers=setting.workers)
        return f"{says}{faster}; {held}" if copies else says + held
    if copies and window.copying > busy / 2 and setting.workers >= setting.cores:
        return says + faster  # more workers than cores would copy no more
    wanted = workers_wanted(window, setting.workers)
    more = (
        f"add workers (now {setting.workers}; more than {MOST_TIMES} times as many would do)"
        if wanted is None
        else f"add workers ({setting.workers} -> {wanted} would do)"
    )
    return f"{says}{faster}; or {more}, which copy in parallel" if copies else f"{says}{more} or {faster}"


def _copy_less(window: WindowStats, setting: Setting) -> str:
    """Return how to have less to copy: what is exactly a batch, and belongs to no one else, is sent as it is."""
    is_small = setting.rebatch and window.batches_per_call < 1.0
    if not setting.keeps_chunks:
        return "return more rows a call" if is_small else "return fewer bytes, such as uint8 instead of float32"
    if not setting.rebatch:
        return "write into request.out" if setting.is_stream else "return arrays that fetch does not keep"
    if setting.is_stream and setting.fetchers != "process":
        exact = "fetch exactly one batch a request and write it into request.out"
    else:
        exact = "return exactly one batch a call" + (", in arrays that fetch does not keep" * (setting.fetchers != "process"))
    return f"{exact}, or at least more rows" if is_small else exact


def workers_wanted(window: WindowStats, workers: int) -> int | None:
    """Return how many workers would keep a trainer from waiting; None: more than MOST_TIMES as many.

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
