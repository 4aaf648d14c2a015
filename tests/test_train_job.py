"""The training job, as its user runs it: real files, a real model, and what it prints at the end."""

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from input_workers.cli import main

pytest.importorskip("tensorflow")
import cv2

pytestmark = pytest.mark.tensorflow

DIGITS = Path(__file__).parent.parent / "configs" / "digits.toml"
LIMIT_SECONDS = 240
CONFIG = """
seed = 1
[model]
name = "{model}"
image_size = {size}
learning_rate = 0.002
[train]
folder = "{train}"
batch_size = 32
workers = {workers}
epochs = {epochs}
[test]
folder = "{test}"
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def write(**values):
        defaults = {"model": "small_cnn", "size": [16, 16], "train": "digits:train", "test": "digits:test"}
        path = tmp_path / "job.toml"
        path.write_text(CONFIG.format(**{**defaults, "workers": 2, "epochs": 1, **values}))
        return str(path)

    return write


@pytest.fixture
def images(tmp_path):
    """Folders train and test with 40 small pictures of two classes, dark and light."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, lightness in (("dark", 0), ("light", 150)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(20):
                picture = rng.integers(0, 100, (40, 50, 3), np.uint8) + np.uint8(lightness)
                assert cv2.imwrite(str(tmp_path / part / name / f"{number}.jpg"), picture)
    return tmp_path


def child(*arguments):
    command = [sys.executable, "-m", "input_workers", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_digits_are_learnt_and_every_row_is_accounted_for(config):
    with child("train", str(DIGITS)) as job:
        out, err = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 0, err
    assert "Traceback" not in err
    accuracy, seconds = re.search(r"test accuracy: ([\d.]+)% after 12 epochs in ([\d.]+) s", out).groups()
    assert float(accuracy) >= 97
    assert float(seconds) < 60
    train = "train: 17244 rows fetched = 16896 delivered + 0 in flight + 348 dropped (348 final_partial)"
    test = "test: 4320 rows fetched = 4320 delivered + 0 in flight + 0 dropped"
    assert train in out
    assert test in out
    shares = re.findall(r"(train|test): fetching ([\d.]+)%.*, copying ([\d.]+)%, waiting for input ([\d.]+)%", out)
    assert [share[0] for share in shares] == ["train", "test"]
    assert len(re.findall(r"stopped; while it ran \([\d.]+ s, \w+\): .*(trainer waits|batches were not)", out)) == 2
    assert all(0 <= float(number) <= 100 for share in shares for number in share[1:])
    epochs = re.findall(r"loss [\d.]+, accuracy [\d.]+%, [\d,]+ inputs/sec, queue depth [\d.]+, test accuracy", out)
    assert len(epochs) == 12


def test_worker_processes_read_the_same_rows(config):
    path = Path(config(epochs=2))
    path.write_text(path.read_text().replace("workers = 2", 'workers = 2\nfetchers = "process"'))
    with child("train", str(path)) as job:
        out, err = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 0, err
    assert "Traceback" not in err
    assert "train: 2874 rows fetched = 2816 delivered + 0 in flight + 58 dropped (58 final_partial)" in out
    assert "test: 720 rows fetched = 720 delivered + 0 in flight + 0 dropped" in out


def test_metrics_can_be_read_while_it_trains_and_ctrl_c_ends_it_cleanly(config):
    lines = []
    with child("train", config(epochs=1000)) as job:
        watchdog = threading.Timer(LIMIT_SECONDS, job.kill)
        watchdog.start()
        errors = []
        drain = threading.Thread(target=lambda: errors.append(job.stderr.read()))
        drain.start()
        for line in job.stdout:
            lines.append(line)
            if line.startswith("epoch"):
                break
        url = next(line.split()[1] for line in lines if line.startswith("metrics: "))
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        job.send_signal(signal.SIGINT)
        rest = job.stdout.read()
        drain.join()
        job.wait()
        watchdog.cancel()
        watchdog.join()
    assert job.returncode == 130, rest
    assert errors[0].endswith("interrupted\n")
    assert "Traceback" not in errors[0]
    assert re.search(r'input_workers_rows_delivered_total\{source="train",device="train"\} \d', text)
    assert re.search(r'input_workers_batches_total\{source="test",device="test"\} \d', text)


def test_a_model_of_keras_is_trained_on_a_folder_of_images(config, images, capsys):
    assert main(["train", config(model="MobileNetV2", size=[32, 32], train="train", test="test")]) == 0
    out = capsys.readouterr().out
    assert f"train: 40 images of 2 classes in {images / 'train'}" in out
    assert "test: 40 rows fetched = 40 delivered + 0 in flight + 0 dropped" in out


def test_it_runs_without_fetchers_of_its_own(config, images, capsys):
    assert main(["train", config(train="train", test="test", workers=0)]) == 0
    assert "train: 40 rows fetched = 32 delivered + 0 in flight + 8 dropped (8 final_partial)" in capsys.readouterr().out


def test_as_many_read_as_are_needed(config, images, capsys):
    path = config(train="train", test="test", workers="'auto'")
    assert main(["train", path]) == 0
    out = capsys.readouterr().out
    assert "train: 40 rows fetched = 32 delivered + 0 in flight + 8 dropped (8 final_partial)" in out
    assert "  train: fetching " in out
    assert main(["verify-resume", path, "--at", "1"]) == 0


def test_a_bad_image_is_named_and_ends_the_job_with_1(config, images, capsys):
    bad = images / "train" / "dark" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert main(["train", config(train="train", test="test")]) == 1
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("error: source 'train'")
    assert str(bad) in shown
    assert "Traceback" not in shown


def failing(capsys, path):
    assert main(["train", path]) == 1
    return capsys.readouterr().err


def test_a_missing_folder_is_an_error(config, capsys):
    assert "train.folder: got 'nowhere'; there is no folder" in failing(capsys, config(train="nowhere"))


def test_an_empty_folder_is_an_error(config, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}" in failing(capsys, config(train="empty", test="test"))


def test_other_classes_in_test_than_in_train_are_an_error(config, images, capsys):
    (images / "test" / "dark").rename(images / "test" / "grey")
    shown = failing(capsys, config(train="train", test="test"))
    assert "wanted the same classes in both; got ['dark'] only in train.folder, ['grey'] only in test.folder" in shown


def test_a_batch_larger_than_the_folder_is_an_error(config, images, capsys):
    for file in (images / "train" / "dark").iterdir():
        file.unlink()
    shown = failing(capsys, config(train="train", test="test"))
    assert "train.batch_size: got 32; wanted at most 20, the number of images" in shown


def test_pictures_that_are_too_small_for_the_model_are_an_error(config, images, capsys):
    shown = failing(capsys, config(model="InceptionV3", size=[16, 16], train="train", test="test"))
    assert "model: InceptionV3 for pictures of [16, 16]: " in shown


def test_a_taken_port_is_an_error(config, images, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = config(train="train", test="test")
        Path(path).write_text(f"{Path(path).read_text()}[metrics]\nport = {port}\n")
        assert f"port {port}: [Errno 98] Address already in use" in failing(capsys, path)


def test_on_a_terminal_a_bar_shows_what_is_reached(config, images):
    from io import StringIO

    from rich.console import Console

    from input_workers.config import load_config
    from input_workers.jobs.train import train

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=160, markup=False, highlight=False)
    result = train(load_config(config(train="train", test="test")), console)
    assert 0 <= result.test_accuracy <= 1
    assert re.search(r"epoch 1/1.*1/1.*loss [\d.]+, accuracy [\d.]+%, [\d,]+ inputs/sec, queue depth", screen.getvalue())


@pytest.mark.parametrize("package", ["tensorflow", "cv2"])
def test_a_missing_package_is_an_error_that_says_what_to_install(package, config):
    code = (
        f"import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *more: None if name == {package!r} else find(name, *more)\n"
        f"from input_workers.cli import main; sys.exit(main(['train', {config()!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert result.returncode == 1
    assert f"this job needs {package}: pip install input-workers[demo]" in result.stderr
