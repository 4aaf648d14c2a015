"""Whether a run of a source makes progress: its queues and its signal go in, a word and a reason come out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from input_workers.coordinator.run import Run

__all__ = ["Condition", "condition_of"]


@dataclass(frozen=True, slots=True)
class Condition:
    """How a source fares.

    Attributes:
        state: new: never started. running. finished: its data have ended. stopped: by its user. failed: it broke, which it
            stays until it is started again, also when it is stopped. stalled: a trainer waits, and nothing comes.
        reason: why it failed or is stalled; "" otherwise.
    """

    state: Literal["new", "running", "finished", "stopped", "failed", "stalled"]
    reason: str = ""

    @property
    def is_healthy(self) -> bool:
        """Whether nobody needs to look at it."""
        return self.state not in ("failed", "stalled")


def condition_of(run: Run, stalled_after_s: float) -> Condition:
    """Return how a run fares; see `DataInputCoordinator.condition`. Takes no lock."""
    failure = run.signal.failure
    if failure is not None:
        return Condition("failed", failure.message)
    if run.signal.stopping:
        return Condition("stopped")
    queues = {name: device.queue for name, device in run.devices.items()}
    if all(queue.ended for queue in queues.values()):
        return Condition("finished")
    now = time.monotonic()
    for name, queue in queues.items():
        waited = now - queue.asked_in_vain_since
        if waited >= stalled_after_s and not queue.ended:
            return Condition("stalled", f"{name}: a trainer asked for a batch {waited:.0f} s ago, and none has come since")
    return Condition("running")
