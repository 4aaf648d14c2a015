"""Where all Streams of a coordinator are, as one state, and back: all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from input_workers.coordinator.reporter import log
from input_workers.coordinator.source_core import SourceCore
from input_workers.errors import StateMismatch
from input_workers.sources.state import FORMAT

__all__ = ["load_all", "state_of_all"]


def state_of_all(cores: Sequence[SourceCore]) -> dict[str, Any]:
    """Return where every Stream is; plain functions have no position."""
    left_out = [core.settings.name for core in cores if core.stream is None]
    if left_out:
        log.info("state_dict: plain functions have no position, so it says nothing of %s", ", ".join(map(repr, left_out)))
    return {"format": FORMAT, "sources": {core.settings.name: core.state(None) for core in cores if core.stream is not None}}


def load_all(cores: Sequence[SourceCore], state: Any) -> None:
    """Let the next start begin where a state, or one of each shard, says. Raises StateMismatch, and nothing has changed."""
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    streams = {core.settings.name: core for core in cores if core.stream is not None}
    by_source: dict[str, list[Any]] = {name: [] for name in streams}
    if not states:
        raise StateMismatch("state: got an empty list; wanted a state, or one of each shard")
    for each in states:
        sources = each.get("sources") if isinstance(each, Mapping) else None
        if not isinstance(each, Mapping) or not isinstance(sources, Mapping):
            raise StateMismatch(f"state: got {each!r:.200}; wanted what state_dict() of a GlobalCoordinator returned")
        if type(each.get("format")) is not int or each["format"] != FORMAT:
            raise StateMismatch(
                f"state: format: got {each.get('format')!r}; wanted {FORMAT}, what this version of input_workers writes"
            )
        if set(sources) != set(streams):
            raise StateMismatch(f"state: sources: got {sorted(map(str, sources))}; wanted {sorted(streams)}")
        for name, of_source in sources.items():
            by_source[name].append(of_source)
    positions = {
        name: core.check_state(by_source[name] if len(states) > 1 else by_source[name][0]) for name, core in streams.items()
    }
    for name, core in streams.items():
        core.load(positions[name])
