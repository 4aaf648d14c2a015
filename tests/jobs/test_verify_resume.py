"""`input-workers verify-resume`: passes where resuming is right, and says what differs where it is not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from jobs.small_training import CONFIG, write_config, write_images

import input_workers as iw
from input_workers.cli import main

UNORDERED = CONFIG.replace("ordered = true", "")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, write_images(tmp_path / "pictures" / "images"))


def verify(capsys, config, *at):
    """Return (exit code, what was printed)."""
    code = main(["verify-resume", str(config), *(f"--at={each}" for each in at)])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_same_rows_come_whatever_the_stops(config, capsys, ordered, workers):
    config.write_text((CONFIG if ordered else UNORDERED).replace("workers = 3", f"workers = {workers}"))
    # Where it is unordered, the rows that fill no batch come too, of which nobody could say which they are.
    rows, batches, order = ("120", 30, " in the same order") if ordered else ("126", 33, "")
    for at in ([7], [30, 1, 10, 10, 11, 29], list(range(1, batches + 1))):
        code, shown = verify(capsys, config, *at)
        stops = ", ".join(map(str, sorted(set(at))))
        assert code == 0, shown
        assert f"train: {rows} rows in {batches} batches of 3 epochs, stopped after {stops}: the same rows{order}\n" in shown
        assert re.search(r"^test: 30 rows in 9 batches of 3 epochs, stopped after [\d, ]+: the same rows$", shown, re.MULTILINE)


def off_by_one(source, by):
    """Return a load_state_dict that takes one row more, or less, for delivered than the state says."""
    original = iw.GlobalCoordinator.load_state_dict

    def load(self, state):
        for spans in state["sources"][source]["done"].values():
            rows = {row for begin, stop in spans for row in range(begin, stop)}
            if by > 0:
                rows.add(next(row for row in range(len(rows) + 1) if row not in rows))
            else:
                rows.remove(max(rows))
            spans[:] = []
            for row in sorted(rows):
                if spans and spans[-1][1] == row:
                    spans[-1][1] += 1
                else:
                    spans.append([row, row + 1])
        original(self, state)

    return load


@pytest.mark.parametrize("source", ["train", "test"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("by", "fault"), [(-1, "1 rows are too many"), (1, "rows are missing")])
def test_a_state_that_is_off_by_one_row_is_found_and_its_picture_named(config, capsys, monkeypatch, source, ordered, by, fault):
    config.write_text(CONFIG if ordered else UNORDERED)
    monkeypatch.setattr(iw.GlobalCoordinator, "load_state_dict", off_by_one(source, by))
    code, shown = verify(capsys, config, 4)
    other = "test" if source == "train" else "train"
    assert code == 1
    assert re.search(rf"^{source}: .*: differs$", shown, re.MULTILINE)
    assert re.search(rf"^{other}: .*: the same rows", shown, re.MULTILINE)
    assert re.search(rf"^  epoch 1: .*{fault}.*: '.*/images/{source}/[ab]/\d+\.png'", shown, re.MULTILINE), shown


def test_another_order_is_found_where_delivery_is_ordered(config, capsys, monkeypatch):
    original = iw.sources.Stream.__init__
    made = 0

    def another_seed(self, *arguments, **more):
        nonlocal made
        made += 1
        original(self, *arguments, **{**more, "seed": int(made > 2)})

    monkeypatch.setattr(iw.Stream, "__init__", another_seed)
    monkeypatch.setattr(iw.Stream, "identity", lambda *_: {})
    config.write_text(CONFIG.replace("batch_size = 4\nworkers", "batch_size = 6\nworkers"))
    code, shown = verify(capsys, config, 7)
    assert code == 1
    assert "  epoch 1: another order from row " in shown
    assert "rows are" not in shown
    made = 0
    config.write_text(config.read_text().replace("ordered = true", ""))
    assert verify(capsys, config, 7)[0] == 0


@pytest.mark.parametrize("at", [0, -1, 31, 10**9])
def test_a_batch_that_is_not_in_the_training_is_an_error(config, capsys, at):
    code, shown = verify(capsys, config, 10, at)
    assert (code, shown) == (1, f"error: --at: got {at}; wanted 1 to 30, the batches of [train] over all its epochs\n")


def test_skipped_rows_are_neither_missing_nor_too_many(config, capsys):
    (config.parent / "images" / "train" / "a" / "3.png").write_bytes(b"no picture")
    config.write_text(CONFIG.replace("[test]", '[train.on_error]\nskip = true\nquarantine = "bad.jsonl"\n[test]'))
    code, shown = verify(capsys, config, 10, 20)
    assert code == 0, shown
    assert "train: 120 rows in 30 batches of 3 epochs, stopped after 10, 20: the same rows in the same order\n" in shown
    assert not (config.parent / "bad.jsonl").exists(), "that file is the training's"


def test_a_picture_that_cannot_be_read_is_named(config, capsys):
    (config.parent / "images" / "train" / "a" / "3.png").write_bytes(b"no picture")
    code, shown = verify(capsys, config, 10)
    assert code == 1
    assert "error: source 'train'" in shown
    assert "a/3.png" in shown


def test_it_does_not_load_tensorflow(config):
    code = (
        "import sys\nfrom input_workers.cli import main\n"
        f"assert main(['verify-resume', {str(config)!r}, '--at', '3', '--at', '5']) == 0\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
