"""What a source was asked to be: the arguments of `init_data_input_workers`, checked once, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from input_workers.checks import check_whole
from input_workers.contracts import ArraySpec, DeviceFeed, FetchFunction, batch_type
from input_workers.cores import usable_cores
from input_workers.errors import ConfigError
from input_workers.feeds import Feed, feed_maker
from input_workers.fetchers import MAX_WORKERS, Processes, Threads, chosen_fetchers
from input_workers.flow.batches import LastBatch
from input_workers.policy import ErrorPolicy
from input_workers.sources.stream import Stream

__all__ = ["DeviceSettings", "SourceSettings", "check_workers"]


def _seconds(name: str, value: object, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ConfigError(f"{name}: got {value!r}; wanted seconds, at least {least:g} (inf: without an end)")
    return float(value)


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Where a source delivers: what each call of `init_data_input_workers` adds."""

    name_scope: str
    feed: Feed
    make_feed: Callable[[], DeviceFeed]
    batch_size: int

    @classmethod
    def checked(cls, name_scope: str, feed: Feed, batch_size: int, batch_axes: Sequence[int]) -> DeviceSettings:
        """Return the settings of a device, of a source with these batch axes. Raises ConfigError."""
        if not isinstance(name_scope, str) or "/" in name_scope:
            raise ConfigError(f"name_scope: got {name_scope!r}; wanted a name without a slash, such as 'gpu_0'")
        rows = check_whole("batch_size", batch_size, 1)
        return cls(name_scope, feed, feed_maker(feed, rows, batch_axes), rows)


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What holds for all devices of a source. A second call for the same source must agree, but for the workers."""

    name: str
    input_names: tuple[str, ...]
    fetch_fun: FetchFunction | Stream
    max_buffered_batches: int
    init_fun: Callable[[Any, Any], object] | None
    external_loggers: tuple[Any, ...]
    rebatch: bool
    batch_axes: tuple[int, ...]
    last_batch: LastBatch
    timeout_s: float
    fetch_timeout_s: float | None
    fetchers: Threads | Processes
    max_buffered_bytes: int | None
    device_queue_depth: int
    specs: tuple[ArraySpec, ...] | None
    ordered: bool
    on_error: ErrorPolicy
    num_workers: Literal["auto"] | None  # None: each device adds a number of its own

    @classmethod
    def checked(
        cls,
        *,
        name: str,
        input_names: Sequence[str],
        fetch_fun: FetchFunction | Stream,
        max_buffered_batches: int,
        init_fun: Callable[[Any, Any], object] | None,
        external_loggers: Sequence[Any],
        fetchers: object,
        rebatch: bool,
        batch_axes: int | Sequence[int],
        last_batch: str,
        ordered: bool,
        timeout_s: float,
        fetch_timeout_s: float | None,
        on_error: ErrorPolicy,
        max_buffered_bytes: int | None,
        device_queue_depth: int,
        specs: Sequence[ArraySpec] | None,
        num_workers: int | Literal["auto"],
    ) -> SourceSettings:
        """Return the settings of a source. Raises ConfigError for the first thing that is wrong."""
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(f"input_source_name: got {name!r}; wanted a name without a slash, such as 'train'")
        batch_type(name, input_names)
        names = tuple(input_names)
        if not callable(fetch_fun) and not isinstance(fetch_fun, Stream):
            raise ConfigError(f"fetch_fun: got {type(fetch_fun).__qualname__}; wanted f(worker_id, batch_size) or a Stream")
        if init_fun is not None and not callable(init_fun):
            raise ConfigError(f"init_fun: got {init_fun!r}; wanted f(data_coordinator, global_coordinator)")
        for logger in external_loggers:
            if not callable(getattr(logger, "log", None)):
                raise ConfigError(f"external_loggers: {type(logger).__qualname__} has no method log(metrics)")
        chosen = chosen_fetchers(fetchers)
        if num_workers == 0:
            given = "fetch_timeout_s" if fetch_timeout_s is not None else chosen.option_for_workers
            if given is not None:
                raise ConfigError(
                    f"{given} cannot be kept with num_workers=0, where the trainer's own thread makes the calls; leave it out, "
                    "or use num_workers=1"
                )
        if last_batch not in get_args(LastBatch):
            raise ConfigError(f"last_batch: got {last_batch!r}; wanted one of {', '.join(get_args(LastBatch))}")
        if not rebatch and last_batch != "drop":
            raise ConfigError(f"last_batch={last_batch!r} with rebatch=False: chunks are delivered as they come; leave it out")
        if ordered and not isinstance(fetch_fun, Stream):
            raise ConfigError("ordered=True: a plain function has no order; wanted a Stream as fetch_fun")
        if not isinstance(on_error, ErrorPolicy):
            raise ConfigError(f"on_error: got {on_error!r}; wanted an ErrorPolicy")
        return cls(
            name=name,
            input_names=names,
            fetch_fun=fetch_fun,
            max_buffered_batches=check_whole("max_buffered_batches", max_buffered_batches, 1),
            init_fun=init_fun,
            external_loggers=tuple(external_loggers),
            rebatch=bool(rebatch),
            batch_axes=_axes(batch_axes, names),
            last_batch=last_batch,  # type: ignore[arg-type]  # checked above
            timeout_s=_seconds("timeout_s", timeout_s),
            fetch_timeout_s=None if fetch_timeout_s is None else _seconds("fetch_timeout_s", fetch_timeout_s, 0.001),
            fetchers=chosen,
            max_buffered_bytes=None if max_buffered_bytes is None else check_whole("max_buffered_bytes", max_buffered_bytes, 1),
            device_queue_depth=check_whole("device_queue_depth", device_queue_depth, 1),
            specs=_specs(specs, names, bool(rebatch)),
            ordered=bool(ordered),
            on_error=on_error,
            num_workers="auto" if num_workers == "auto" else None,
        )

    @property
    def first_workers(self) -> int:
        """How many workers "auto" begins with: two, but not more than there are cores, in case that the function computes."""
        few = min(FIRST_WORKERS, math.ceil(usable_cores()))
        return max(self.fetchers.min_workers, min(few, self.fetchers.max_workers))

    def difference(self, other: SourceSettings) -> str | None:
        """Return the name of the first setting that differs; the same function or logger means the same object."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not theirs and (field.name in ("fetch_fun", "init_fun") or mine != theirs):
                return field.name
        return None


FIRST_WORKERS = 2


def check_workers(num_workers: object) -> int | Literal["auto"]:
    """Return the number of workers, or "auto". Raises ConfigError."""
    if isinstance(num_workers, str):
        if num_workers != "auto":
            raise ConfigError(f"num_workers: got {num_workers!r}; wanted 'auto', or a whole number from 0 to {MAX_WORKERS}")
        return "auto"
    return check_whole("num_workers", num_workers, 0, MAX_WORKERS)


def _axes(batch_axes: int | Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    if isinstance(batch_axes, Sequence):
        axes = tuple(check_whole("batch_axes", axis, 0) for axis in batch_axes)
    else:
        axes = (check_whole("batch_axes", batch_axes, 0),) * len(names)
    if len(axes) != len(names):
        raise ConfigError(f"batch_axes: got {len(axes)} axes; wanted one for all, or one for each of {list(names)}")
    return axes


def _specs(specs: Sequence[ArraySpec] | None, names: Sequence[str], rebatch: bool) -> tuple[ArraySpec, ...] | None:
    if specs is None:
        return None
    if not all(isinstance(spec, ArraySpec) for spec in specs) or len(specs) != len(names):
        raise ConfigError(f"specs: got {specs!r}; wanted an ArraySpec for each of {list(names)}")
    for name, spec in zip(names, specs, strict=True):
        if rebatch and not spec.is_fixed:
            raise ConfigError(
                f"specs: input {name!r}: got shape {spec.shape}: chunks of unequal shapes cannot be cut into batches; wanted "
                "rebatch=False, which delivers them as they come, or rows of one length, as pad_ragged= of a source makes them"
            )
    return tuple(specs)
