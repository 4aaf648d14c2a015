"""Fifty workers are killed; tests/chaos kills a thousand."""

from __future__ import annotations

import pytest
from scenarios.kill_campaign import kill_a_plain_function, kill_while_it_runs

import input_workers as iw


@pytest.mark.parametrize("ordered", [False, True])
def test_a_stream_loses_and_repeats_nothing_while_its_workers_are_killed(
    coordinator: iw.GlobalCoordinator, ordered: bool
) -> None:
    kill_while_it_runs(coordinator, 25, 1, ordered)


def test_a_plain_function_goes_on_while_its_workers_are_killed(coordinator: iw.GlobalCoordinator) -> None:
    kill_a_plain_function(coordinator, 25, 2)
