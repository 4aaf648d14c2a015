"""`init_data_input_workers`: what a trainer calls. A fetch function goes in, a coordinator to start comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from input_workers.contracts import ArraySpec, FetchFunction
from input_workers.coordinator.data_input_coordinator import DataInputCoordinator
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.settings import DeviceSettings, SourceSettings, check_workers
from input_workers.errors import ConfigError
from input_workers.feeds import Feed
from input_workers.fetchers import Processes, Threads
from input_workers.policy import ErrorPolicy
from input_workers.sources.stream import Stream

__all__ = ["global_coordinator", "init_data_input_workers"]

# The process-wide coordinator, used unless another is named.
global_coordinator = GlobalCoordinator()


def init_data_input_workers(
    feed: Feed,
    input_names: Sequence[str],
    fetch_fun: FetchFunction | Stream,
    batch_size: int,
    num_workers: int | str = 2,
    input_source_name: str = "train",
    max_buffered_batches: int = 16,
    init_fun: Callable[[DataInputCoordinator, GlobalCoordinator], object] | None = None,
    external_loggers: Sequence[Any] = (),
    *,
    fetchers: str | Threads | Processes = "thread",
    rebatch: bool = True,
    batch_axes: int | Sequence[int] = 0,
    last_batch: str = "drop",
    ordered: bool = False,
    timeout_s: float = 600.0,
    fetch_timeout_s: float | None = None,
    on_error: ErrorPolicy = ErrorPolicy(),  # noqa: B008  it is frozen
    max_buffered_bytes: int | None = None,
    device_queue_depth: int = 4,
    name_scope: str = "",
    specs: Sequence[ArraySpec] | None = None,
    coordinator: GlobalCoordinator | None = None,
) -> GlobalCoordinator:
    """Register a source of batches. Nothing runs before `start()` of the coordinator that is returned.

    Args:
        feed: where batches go: "numpy"; "tensorflow", by default its first GPU or the host, "tensorflow:/GPU:0",
            "tensorflow:/CPU:0"; "torch", by default the host (`torch.set_default_device` says otherwise), "torch:cpu",
            "torch:cuda:0"; "jax", by default its default device, "jax:gpu:0", "jax:cpu:0"; a `jax.sharding.Sharding`: each
            of its devices gets its rows; or a DeviceFeed.
        input_names: names of the arrays of a batch: identifiers, each once.
        fetch_fun: `f(worker_id, batch_size)`, called from many threads at once, or a Stream. It returns one array per
            input, with any number of rows, the same in each; None or zero rows: no data now; raises EndOfData: this
            worker is done.
        batch_size: rows of every batch; for the function a hint.
        num_workers: fetchers; 0: fetch in the trainer's own thread, for breakpoints and tests; "auto": as many as the trainer
            needs, within the bounds of `fetchers`. A plain function is then called with the ids of workers that come and go:
            each new id begins its data, and each that was begun is called until it raises EndOfData, perhaps after a rest.
            After the first EndOfData no new id is begun. A function that deals a fixed number of shards by worker id wants
            a fixed number; better, make it a Stream.
        input_source_name: the source's key in the coordinator.
        max_buffered_batches: bound on what waits between fetchers and enqueuer, in batches' worth of rows.
        init_fun: `init_fun(data_coordinator, global_coordinator)`, once, at the first start, before any fetcher starts.
        external_loggers: objects with `log(metrics)`, called every 60 s and at stop with the values of the interval.
        fetchers: "thread" (`iw.Threads()`), or "process" (`iw.Processes(...)`) for functions that hold the interpreter lock;
            `iw.Threads(max_workers=16)` bounds "auto".
        rebatch: False delivers chunks as they come; bounds then count chunks.
        batch_axes: the axis along which the rows lie, one for all inputs or one for each.
        last_batch: what becomes of rows that fill no batch at the end: "drop", "keep" (a shorter one) or "pad" (by
            repeating the last row).
        ordered: deliver a Stream's requests in their order, whatever the fetchers do.
        timeout_s: a trainer that waits longer for a batch gets WaitTimeout, and may ask again.
        fetch_timeout_s: a call that takes longer is a FetchTimeout, with the stack of the stuck thread.
        on_error: what to do when a fetch fails.
        max_buffered_bytes: a second bound on what waits, in bytes. A chunk larger than a bound passes alone.
        device_queue_depth: batches kept on the device ahead of the trainer.
        name_scope: "gpu_0": this call adds a device to the source; its settings must agree, its workers add up.
        specs: what one row of each input looks like; by default learnt from the first chunk. With `rebatch=False` a side may
            be None: of any length, another in each chunk.
        coordinator: another than `iw.global_coordinator`.

    Returns:
        The coordinator; `coordinator[input_source_name]` is the source.

    Raises:
        ConfigError: an argument is wrong, the name is taken, or the feed's framework is not installed.
    """
    if coordinator is not None and not isinstance(coordinator, GlobalCoordinator):
        raise ConfigError(f"coordinator: got {type(coordinator).__qualname__}; wanted a GlobalCoordinator")
    workers = check_workers(num_workers)
    settings = SourceSettings.checked(
        name=input_source_name,
        input_names=input_names,
        fetch_fun=fetch_fun,
        max_buffered_batches=max_buffered_batches,
        init_fun=init_fun,
        external_loggers=external_loggers,
        fetchers=fetchers,
        rebatch=rebatch,
        batch_axes=batch_axes,
        last_batch=last_batch,
        ordered=ordered,
        timeout_s=timeout_s,
        fetch_timeout_s=fetch_timeout_s,
        on_error=on_error,
        max_buffered_bytes=max_buffered_bytes,
        device_queue_depth=device_queue_depth,
        specs=specs,
        num_workers=workers,
    )
    device = DeviceSettings.checked(name_scope, feed, batch_size, settings.batch_axes)
    if isinstance(fetch_fun, Stream):
        fetch_fun.check(last_batch, device.batch_size)
    coordinator = coordinator if coordinator is not None else global_coordinator
    coordinator.add(settings, device, workers)
    return coordinator
