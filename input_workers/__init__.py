"""An input service inside a trainer: one fetch function, called by many workers, becomes exact batches on the device.

Importing this loads NumPy only; frameworks, OpenCV and prometheus_client are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import Any

from input_workers import adapters, feeds, sources
from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.coordinator.data_input_coordinator import DataInputCoordinator
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import global_coordinator, init_data_input_workers
from input_workers.errors import (
    BadRows,
    ConfigError,
    EndOfData,
    FeedFailed,
    FetchFailed,
    FetchTimeout,
    InputWorkersError,
    LifecycleError,
    PlanDoesNotFit,
    QueueClosed,
    SourceFailed,
    SpecMismatch,
    StateMismatch,
    WaitTimeout,
    WorkerDied,
)
from input_workers.fetchers import Processes, Threads
from input_workers.metrics.snapshot import DeviceStats, SourceStats, StageShares, StopReport, WindowStats
from input_workers.metrics.timed import timed
from input_workers.policy import ErrorPolicy
from input_workers.sources.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "ArraySpec",
    "BadRows",
    "ConfigError",
    "DataInputCoordinator",
    "DeviceStats",
    "EndOfData",
    "ErrorPolicy",
    "FeedFailed",
    "FetchFailed",
    "FetchRequest",
    "FetchTimeout",
    "GlobalCoordinator",
    "InputWorkersError",
    "LifecycleError",
    "PlanDoesNotFit",
    "Processes",
    "QueueClosed",
    "SourceFailed",
    "SourceStats",
    "SpecMismatch",
    "StageShares",
    "StateMismatch",
    "StopReport",
    "Stream",
    "Threads",
    "WaitTimeout",
    "WindowStats",
    "WorkerDied",
    "adapters",
    "feeds",
    "global_coordinator",
    "init_data_input_workers",
    "serve_metrics",
    "sources",
    "timed",
]


def __getattr__(name: str) -> Any:
    if name == "serve_metrics":  # needs prometheus_client
        return importlib.import_module("input_workers.metrics.exporter").serve_metrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
