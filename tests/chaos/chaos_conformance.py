"""The conformance suite for spawned workers: `make test` runs it for the fork server's."""

from __future__ import annotations

from fetchers.test_processes import ProcessConformance

import input_workers as iw


class TestSpawn(ProcessConformance):
    fetchers = iw.Processes(start="spawn")
