"""What a training would gain from free data, of trainings whose gain is known, and as its user asks for it."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from jobs.small_training import CONFIG, write_config, write_images

import input_workers as iw
from input_workers.bench.headspace import Bounds, Headspace, measure
from input_workers.cli import main

ROWS = 4  # of a batch
LIMIT_SECONDS = 120
NOISE = 0.2  # of shares, on a machine that does other things too
BOUNDS = Bounds(rounds=5, steps=10)
NEVER = threading.Event()


class Slow:
    """Rows that know their number, whose requests take so long each."""

    def __init__(self, seconds, rows=100_000):
        self._seconds = seconds
        self._rows = rows

    def __len__(self):
        return self._rows

    def fetch(self, rows, request):
        NEVER.wait(self._seconds)
        return [rows.copy()]


class Training:
    """A step of a known duration, which notes what it was given."""

    def __init__(self, fetch_seconds, step_seconds, workers=1, **stream):
        self.coordinator = iw.GlobalCoordinator()
        rows = stream.pop("rows", 100_000)
        stream = iw.Stream(Slow(fetch_seconds, rows), shuffle=False, epochs=1000, rows_per_request=ROWS, **stream)
        iw.init_data_input_workers("numpy", ["row"], stream, ROWS, workers, coordinator=self.coordinator)
        self.steps = []  # (first row, whether fetchers were there)
        self._seconds = step_seconds

    def step(self, row):
        self.steps.append((int(row[0]), any(thread.name.startswith("fetcher-") for thread in threading.enumerate())))
        NEVER.wait(self._seconds)

    def measure(self, bounds=BOUNDS, step=None):
        source = self.coordinator["train"]
        return measure(source, self.coordinator, step or self.step, lambda: None, ROWS, bounds)


@pytest.mark.parametrize(
    ("fetch", "step", "workers", "times"),
    [(0.06, 0.02, 1, 3.0), (0.12, 0.03, 2, 2.0), (0.01, 0.03, 1, 1.0), (0.03, 0.03, 0, 2.0)],
)
def test_both_ways_find_what_is_known(fetch, step, workers, times):
    found = Training(fetch, step, workers).measure()
    lost = 1 - 1 / times
    assert found.trainer_wait == pytest.approx(lost, abs=NOISE), found
    assert 1 - 1 / found.times == pytest.approx(lost, abs=NOISE), found
    assert abs(found.beyond_waits) < NOISE, found


def test_sides_alternate_and_no_fetcher_runs_beside_free_data():
    training = Training(0.0, 0.0)
    training.measure(Bounds(rounds=2, steps=50))
    first, _ = training.steps[0]
    sides = []
    for row, beside_fetchers in training.steps[8:]:  # after those that warm up
        sides += [beside_fetchers] if not sides or sides[-1] != beside_fetchers else []
        assert beside_fetchers or row == first
    assert sides == [True, False, True, False]
    assert sum(not beside_fetchers for _, beside_fetchers in training.steps[8:]) == 2 * 50


def test_real_input_goes_on_where_it_was_and_over_the_end_of_an_epoch():
    training = Training(0.0, 0.0, rows=40, epoch_end="break")
    training.measure(Bounds(rounds=3, steps=20))
    real = [row for row, beside_fetchers in training.steps if beside_fetchers]
    assert len(real) >= 60
    assert real == [(real[0] + ROWS * number) % 40 for number in range(len(real))]


@pytest.mark.parametrize("at", [3, 12, 60])  # warming up, in a round with real input, in one with free data
def test_ctrl_c_in_a_step_leaves_nothing_running(at):
    training = Training(0.0, 0.0)

    def step(row):
        training.step(row)
        if len(training.steps) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.measure(Bounds(rounds=2, steps=40), step)
    assert not [thread.name for thread in threading.enumerate() if "train" in thread.name]


def test_a_source_that_breaks_ends_it():
    training = Training(0.0, 0.0)
    iw.init_data_input_workers(
        "numpy", ["row"], lambda worker_id, batch_size: 1 / 0, ROWS, 1, "bad", coordinator=training.coordinator
    )
    with pytest.raises(iw.FetchFailed):
        measure(training.coordinator["bad"], training.coordinator, training.step, lambda: None, ROWS, BOUNDS)


def found(real, free, wait):
    return Headspace(tuple(real), tuple(free), wait, "verdict")


@pytest.mark.parametrize(
    ("real", "free", "wait", "is_nonsense"),
    [(100, 100, 0.0, False), (100, 95, 0.0, False), (100, 80, 0.0, True), (100, 100, 0.5, True), (100, 200, 0.5, False)],
)
def test_what_cannot_be_true_is_said_to_be_nonsense(real, free, wait, is_nonsense):
    each = found([real], [free], wait)
    assert (each.nonsense is not None) == is_nonsense == ("not to be trusted" in str(each))
    assert (json.loads(each.as_json())["nonsense"] is not None) == is_nonsense


def test_the_report_says_how_much_and_why():
    lines = str(found([812, 700, 900], [1153, 1000, 1260], 0.29)).splitlines()
    assert lines == [
        "training would be 1.42 times as fast if data were free: 812 -> 1,153 images/s (median of 3 rounds, which say 1.40 to "
        "1.43)",
        "the trainer waits 29% of its time; without these waits it would be 1.41 times as fast",
        "verdict",
    ]


def test_time_that_is_lost_without_waiting_is_named():
    assert "33% more are lost while it does not wait" in str(found([100], [150], 0.0))
    assert "more are lost" not in str(found([100], [150], 1 / 3))


@pytest.mark.parametrize("line", ["", "a --steps 0", "a --seconds 0", "a --seconds inf", "a --rounds x", "a --rounds 0"])
def test_a_wrong_command_line_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "headspace", *line.split()])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: input-workers bench headspace")


# A real training


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    pytest.importorskip("tensorflow")
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "change",
    [
        ("workers = 3", "workers = 0"),
        ("ordered = true", 'fetchers = "process"'),
        ('"small_cnn"\nimage_size = [8, 8]', '"MobileNetV2"\nimage_size = [32, 32]'),
    ],
    ids=["inline", "processes", "MobileNetV2"],
)
def test_it_measures_what_train_trains_and_writes_nothing(tmp_path, images, capsys, change):
    path = write_config(tmp_path, images)
    assert change[0] in CONFIG
    path.write_text(
        CONFIG.replace(*change).replace("[test]", '[train.on_error]\nskip = true\nquarantine = "bad.jsonl"\n[test]')
    )
    before = sorted(tmp_path.iterdir())
    code = main(["bench", "headspace", str(path), "--rounds", "2", "--steps", "3", "--json"])
    shown = capsys.readouterr()
    numbers = json.loads(shown.out)
    assert code == (numbers["nonsense"] is not None)
    assert len(numbers["real"]["rounds"]) == len(numbers["free"]["rounds"]) == 2
    assert all(rate > 0 for side in ("real", "free") for rate in numbers[side]["rounds"])
    assert 0 <= numbers["trainer_wait"] <= 1
    assert "42 images of 2 classes" in shown.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.tensorflow
def test_nonsense_exits_with_1(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setattr(Headspace, "nonsense", "not today")
    assert main(["bench", "headspace", str(write_config(tmp_path, images)), "--rounds", "1", "--steps", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not to be trusted: not today"


# Keras imports JAX, which swallows a Ctrl-C that comes inside its callback of the garbage collector.
WITHOUT_JAX = "import sys; sys.modules['jax'] = None; from input_workers.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.tensorflow
def test_ctrl_c_ends_it_cleanly(tmp_path, images):
    command = [
        sys.executable,
        "-c",
        WITHOUT_JAX,
        "bench",
        "headspace",
        str(write_config(tmp_path, images)),
        "--rounds",
        "1000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        watchdog = threading.Timer(LIMIT_SECONDS, child.kill)
        watchdog.start()
        while not child.stdout.readline().startswith("measuring"):
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
        watchdog.cancel()
        watchdog.join()
    assert child.returncode == 130, err
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert not out


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", ["digits.toml", "image_folder.toml"])
def test_the_configurations_that_are_here_can_be_measured(name, tmp_path, images, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "images").symlink_to(images)
    path = tmp_path / name
    path.write_text((Path(__file__).parents[2] / "configs" / name).read_text().replace("[224, 224]", "[32, 32]"))
    main(["bench", "headspace", str(path), "--rounds", "1", "--steps", "2"])
    assert "times as fast if data were free" in capsys.readouterr().out
