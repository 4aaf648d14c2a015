"""What an ErrorPolicy may be, how long it waits, how much it lets pass, and the account that is kept of it."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from gates import HANG_SECONDS

import input_workers as iw
from input_workers.policy import Quarantine, QuarantinedRows

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "minus a retry": ({"retries": -1}, "retries: got -1"),
    "half a retry": ({"retries": 1.5}, "retries: got 1.5"),
    "a truth as retries": ({"retries": True}, "retries: got True"),
    "a negative wait": ({"backoff_s": -0.1}, "backoff_s: got -0.1"),
    "a wait without an end": ({"backoff_s": math.inf}, "backoff_s: got inf"),
    "no number of seconds": ({"backoff_s": math.nan}, "backoff_s: got nan"),
    "a text as a wait": ({"backoff_s": "1"}, "backoff_s: got '1'"),
    "a truth as a wait": ({"max_backoff_s": True}, "max_backoff_s: got True"),
    "a longest wait without an end": ({"max_backoff_s": math.inf}, "max_backoff_s: got inf"),
    "a number as skip": ({"skip": 1}, "skip: got 1"),
    "a negative count": ({"skip": True, "max_errors": -1}, "max_errors: got -1"),
    "a share above one": ({"skip": True, "max_errors": 1.5}, "max_errors: got 1.5"),
    "a negative share": ({"skip": True, "max_errors": -0.5}, "max_errors: got -0.5"),
    "no share": ({"skip": True, "max_errors": math.nan}, "max_errors: got nan"),
    "a truth as a count": ({"skip": True, "max_errors": True}, "max_errors: got True"),
    "a number as a file": ({"skip": True, "quarantine": 3}, "quarantine: got 3"),
    "a count without skip": ({"max_errors": 3}, "max_errors says what may be skipped; wanted skip=True"),
    "a file without skip": ({"retries": 3, "quarantine": "q"}, "quarantine says what may be skipped; wanted skip=True"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_named_with_what_was_got(what: str) -> None:
    more, text = WRONG[what]
    with pytest.raises(iw.ConfigError, match=text):
        iw.ErrorPolicy(**more)


@pytest.mark.parametrize("most", [None, 0, 1, 10**9, 0.0, 0.01, 1.0])
def test_counts_shares_and_none_are_limits(most: float | None) -> None:
    assert iw.ErrorPolicy(skip=True, max_errors=most).max_errors == most


@pytest.mark.parametrize(("backoff", "longest"), [(0.1, 10.0), (0.0, 1.0), (3.0, 2.0), (1e300, 5.0)])
def test_waits_double_up_to_the_longest_and_are_spread_over_its_upper_half(backoff: float, longest: float) -> None:
    policy = iw.ErrorPolicy(retries=1, backoff_s=backoff, max_backoff_s=longest)
    for tries in (1, 2, 3, 10, 5000):
        whole = min(longest, backoff * 2.0 ** min(tries - 1, 60))
        waits = [policy.wait_seconds(tries) for _ in range(200)]
        assert all(whole / 2 <= wait <= whole for wait in waits)
        assert not whole or max(waits) - min(waits) > whole / 4, "not spread"


def entry(number: int = 0) -> QuarantinedRows:
    return QuarantinedRows(0, number, 0, (number,), (f"file {number}\udcff\n",), "ValueError: bad\n")


def quarantine(tried: tuple[int, int] = (0, 0), **more: Any) -> Quarantine:
    return Quarantine("train", iw.ErrorPolicy(skip=True, **more), lambda: tried)


def skips(account: Quarantine, count: int) -> bool:
    """Whether so many more may be skipped."""
    error = ValueError("bad")
    try:
        account.skip(entry(), count, error)
    except iw.FetchFailed as failed:
        return failed.__cause__ is not error
    return True


@pytest.mark.parametrize("most", [0, 1, 7])
def test_exactly_as_many_as_the_count_says_are_skipped(most: int) -> None:
    account = quarantine(max_errors=most)
    assert [skips(account, 1) for _ in range(most + 2)] == [True] * most + [False] * 2
    with pytest.raises(iw.FetchFailed, match=rf"'train': {most + 1} failed, more than may be skipped \(max_errors: {most}\)"):
        account.skip(entry(), 1, ValueError())
    together = quarantine(max_errors=most)
    assert not skips(together, most + 1), "some at once"
    assert most == 0 or skips(together, most), "what was refused is not counted"
    assert len(account.latest) == most


@pytest.mark.parametrize(
    ("tried", "calls", "before", "passes"),
    [
        (10, 99, 9, True),  # on probation
        (10, 100, 9, False),
        (999, 100, 9, True),  # the tenth of a thousand is exactly a hundredth
        (998, 100, 9, False),
        (10_000, 5000, 99, True),
        (10_000, 5000, 101, False),
    ],
)
def test_a_share_is_of_the_rows_tried_and_judged_after_a_hundred_calls(
    tried: int, calls: int, before: int, passes: bool
) -> None:
    numbers = [(0, 0)]
    account = Quarantine("train", iw.ErrorPolicy(skip=True, max_errors=0.01), lambda: numbers[0])
    assert all(skips(account, 1) for _ in range(before))
    numbers[0] = tried, calls
    assert skips(account, 1) is passes


def test_what_is_kept_in_memory_is_the_latest_thousand(caplog: pytest.LogCaptureFixture) -> None:
    account = quarantine()
    with caplog.at_level(logging.DEBUG, "input_workers"):
        for number in range(5000):
            account.skip(entry(number), 1, ValueError())
    assert [each.rows for each in account.latest] == [(number,) for number in range(4000, 5000)]
    assert len(caplog.records) <= 2, "an error storm does not flood the log"
    assert "skipped 1 so far" in caplog.text


def test_lines_of_many_fetchers_do_not_mix(tmp_path: Path) -> None:
    account = quarantine(quarantine=tmp_path / "bad.jsonl")
    account.open()
    together = threading.Barrier(8)

    def skip(first: int) -> None:
        together.wait(HANG_SECONDS)
        for number in range(first, first + 50):
            account.skip(entry(number), 1, ValueError())

    threads = [threading.Thread(target=skip, args=(first,)) for first in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(line["request"] for line in lines) == list(range(400))
    assert lines[0].keys() == {"source", "worker_id", "request", "epoch", "rows", "files", "error"}
    assert all(line["files"] == [f"file {line['request']}\udcff\n"] for line in lines)
    assert all((line["source"], line["error"]) == ("train", "ValueError: bad\n") for line in lines)


@pytest.mark.parametrize("path", ["/nowhere/at/all.jsonl", "/", "with\0nothing", ""])
def test_a_file_that_cannot_be_written_is_found_out_at_the_start(path: str) -> None:
    with pytest.raises(iw.ConfigError, match=r"quarantine: .*; wanted a file that can be written"):
        quarantine(quarantine=path).open()


def test_a_full_disk_is_said_in_the_log_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    account = quarantine(quarantine="/dev/full")
    account.open()
    with caplog.at_level(logging.ERROR, "input_workers"):
        for number in range(1000):
            account.skip(entry(number), 1, ValueError())
    assert len(account.latest) == 1000
    assert 1 <= len(caplog.records) <= 2, "an error storm does not flood the log"
    assert "No space left on device" in caplog.text
