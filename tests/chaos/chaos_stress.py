"""Random sources, read in random ways and checked to the bit, for 20 minutes or STRESS_SECONDS."""

from __future__ import annotations

import os
import time

from scenarios.test_stress import run_stress


def test_random_sources_deliver_every_row() -> None:
    seconds = float(os.environ.get("STRESS_SECONDS", "1200"))
    first = int(time.time()) % 1_000_000 * 1000  # other seeds each time; a failure prints its own
    run_stress(seconds, "--seconds", str(seconds), "--seed", str(first))
