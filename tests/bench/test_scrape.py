"""The benchmark of scrapes: slices with and without alternate, the client really reads the page, and nothing is left."""

import pytest

from input_workers.bench import scrape


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(scrape, "SLICE_SECONDS", 0.1)


def test_scrapes_cost_processor_time_of_the_server_and_only_while_there_are_some():
    slices, scrapes = scrape._measure(1, 8)
    assert len(slices[True]) == len(slices[False]) == 8
    assert all(each.rows > 0 and each.seconds >= 0.1 for side in slices.values() for each in side)
    assert scrapes >= 4
    with_scrapes, without = (sum(each.served for each in slices[side]) for side in (True, False))
    assert with_scrapes > without


def test_its_lines_are_about_rows_and_processor_time_with_a_target_for_one_source():
    lines = scrape.scraped((1, 3), pairs=4)
    assert [line.name.split(",")[0] for line in lines] == ["10 scrapes/s of 1 source"] * 3 + ["10 scrapes/s of 3 sources"] * 3
    assert [line.target for line in lines] == [None, 0.995, 0.5, None, None, None]
    assert all(line.value > 0 for line in lines)
    assert "ms a scrape" in lines[2].note


@pytest.mark.parametrize(
    ("client", "message"),
    [("raise SystemExit(1)", "has ended before"), ("import sys; sys.stdin.read(); print(1)", "1 scrapes")],
)
def test_without_scrapes_there_is_no_figure(client, message, monkeypatch):
    monkeypatch.setattr(scrape, "CLIENT", client)
    with pytest.raises(RuntimeError, match=message):
        scrape._measure(1, 8)
