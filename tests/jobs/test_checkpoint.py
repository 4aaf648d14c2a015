"""A training killed at any moment goes on as if nothing had been."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from jobs.small_training import CONFIG, EPOCHS, STEPS, saved_in, write_config, write_images

from input_workers.config import load_config
from input_workers.jobs.streams import open_folders

h5py = pytest.importorskip("h5py")
if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("needs TensorFlow", allow_module_level=True)
pytestmark = pytest.mark.tensorflow

KILLS = 20
LIMIT_SECONDS = 120


class Trainings:
    """Runs trainings in processes of their own, one at a time."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("checkpoint_child.py"))]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self):
        self._child.stdin.close()
        self._child.wait(LIMIT_SECONDS)
        self._child.stdout.close()

    def life(self, config, *, resume=True, kill_after=None, delay=0.0, die_in=None):
        """Run a training to its end, or until it was killed some seconds after so many lines; return (steps, status)."""
        order = {"config": str(config), "log": f"{config}.log", "resume": resume, "die_in": die_in}
        self._say(json.dumps(order))
        pid, steps, count = int(self._answer()[1]), [], 0
        watchdog = threading.Timer(LIMIT_SECONDS, os.kill, (pid, signal.SIGKILL))
        watchdog.start()
        try:
            while True:
                if count == kill_after:
                    time.sleep(delay)  # the moment is what is tested
                    os.kill(pid, signal.SIGKILL)
                what, number, *checksum = self._answer()
                if what == "end":
                    return steps, int(number)
                steps.append((int(number), *checksum))
                count += 1
        finally:
            watchdog.cancel()
            watchdog.join()
            self._say("reap")  # until now its id is its own
            self._answer()

    def _say(self, line):
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def _answer(self):
        line = self._child.stdout.readline().split()
        assert line, "the child ended"
        return line


@pytest.fixture(scope="module")
def trainings():
    trainings = Trainings()
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def uninterrupted(trainings, images, tmp_path_factory):
    """Return (its configuration's path, the batches of its steps)."""
    config = write_config(tmp_path_factory.mktemp("uninterrupted"), images)
    steps, status = trainings.life(config, resume=False)
    assert status == 0, log_of(config)
    assert [number for number, _ in steps] == list(range(1, STEPS * EPOCHS + 1))
    assert len(set(steps)) == len(steps)
    return config, dict(steps)


@pytest.fixture
def config(tmp_path, images):
    return write_config(tmp_path, images)


@pytest.fixture
def saved(config, uninterrupted):
    """A configuration with the checkpoints of a training that has ended."""
    shutil.copytree(uninterrupted[0].parent / "checkpoints", config.parent / "checkpoints")
    return config


def log_of(config):
    return Path(f"{config}.log").read_text()


def epochs_of(config):
    """Return what was printed of each epoch, the last time: loss, accuracy and test accuracy."""
    found = re.findall(r"epoch +(\d+)/\d+: (loss [\d.]+, accuracy [\d.]+%).*(test accuracy [\d.]+%)", log_of(config))
    return {int(epoch): numbers for epoch, *numbers in found}


def variables_of(checkpoint):
    """Return every number of a checkpoint's model and optimizer, as bytes by name."""
    found = {}
    with zipfile.ZipFile(checkpoint / "model.keras") as file, h5py.File(io.BytesIO(file.read("model.weights.h5"))) as weights:
        weights.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    with np.load(checkpoint / "training.npz", allow_pickle=False) as arrays:
        found.update({name: array.tobytes() for name, array in arrays.items()})
    return found


class Chain:
    """The lives of one training, whose batches must be those of the uninterrupted one."""

    def __init__(self, trainings, config, uninterrupted):
        self._trainings, self.config, self._whole = trainings, config, uninterrupted
        self.reached = 0
        self.deaths = 0

    def live(self, **how):
        """Run until it was killed or has ended; return whether it has ended."""
        before = saved_in(self.config)
        steps, status = self._trainings.life(self.config, **how)
        assert status in (0, signal.SIGKILL), log_of(self.config)
        latest = max((int(name.removeprefix("step-")) for name in before if name.startswith("step-")), default=0)
        if steps:
            assert steps[0][0] == latest + 1, "it goes on where the checkpoint was made"
        for number, checksum in steps:
            assert checksum == self._whole[1][number], f"step {number} had another batch"
        assert [number for number, _ in steps] == list(range(latest + 1, latest + 1 + len(steps)))
        self.reached = max([self.reached, *(number for number, _ in steps)])
        for name in saved_in(self.config):
            if name.startswith("step-"):
                assert sorted(path.name for path in (self.config.parent / "checkpoints" / name).iterdir()) == [
                    "checkpoint.json", "input.json", "model.keras", "training.npz",
                ]  # fmt: skip
        self.deaths += status == signal.SIGKILL
        return status == 0

    def compare(self):
        """Compare what the training has become."""
        assert self.reached == STEPS * EPOCHS
        folder, whole = self.config.parent / "checkpoints", self._whole[0].parent / "checkpoints"
        assert saved_in(self.config) == saved_in(self._whole[0]) == [f"step-{step:010}" for step in (24, 27, 30)]
        assert epochs_of(self.config) == epochs_of(self._whole[0])
        for name in saved_in(self.config):
            got, wanted = variables_of(folder / name), variables_of(whole / name)
            assert got.keys() == wanted.keys()
            assert [key for key in got if got[key] != wanted[key]] == []
            assert (folder / name / "input.json").read_bytes() == (whole / name / "input.json").read_bytes()


def test_a_training_killed_at_random_moments_is_the_training_uninterrupted(trainings, images, uninterrupted, tmp_path):
    rng = random.Random(5)
    deaths = chains = 0
    while deaths < KILLS:
        (tmp_path / str(chains)).mkdir()
        chain = Chain(trainings, write_config(tmp_path / str(chains), images), uninterrupted)
        chains += 1
        ended = False
        while not ended:
            delay = rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)])
            alive = deaths + chain.deaths >= KILLS
            ended = chain.live(kill_after=None if alive else rng.choice([0, *range(1, 10)]), delay=delay)
        chain.compare()
        deaths += chain.deaths


def test_a_training_killed_in_an_evaluation_or_anywhere_in_a_checkpoint_goes_on(trainings, config, uninterrupted):
    chain = Chain(trainings, config, uninterrupted)
    places = [
        ("saving the model", 1), ("saving the input", 2), ("syncing", 3), ("renaming", 1), ("after renaming", 1),
        ("evaluating", 2), ("removing", 2), ("evaluating", 4),
    ]  # fmt: skip
    for place in places:
        assert not chain.live(die_in=place), place
    assert chain.live()
    assert chain.deaths == len(places)
    chain.compare()


def test_an_ended_training_resumed_is_evaluated_again_and_nothing_else(trainings, saved, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in (saved.parent / "checkpoints").rglob("*")}
    assert trainings.life(saved) == ([], 0)
    assert epochs_of(saved)[EPOCHS] == epochs_of(uninterrupted[0])[EPOCHS]
    assert {path: path.stat().st_mtime_ns for path in (saved.parent / "checkpoints").rglob("*")} == before


def test_workers_folders_and_the_evaluations_batch_size_may_change(trainings, saved, uninterrupted, images):
    for step in (27, 30):
        shutil.rmtree(saved.parent / "checkpoints" / f"step-{step:010}")
    (saved.parent / "moved").symlink_to(images)
    text = CONFIG.replace("images/", "moved/").replace("workers = 3", "workers = 1").replace('test"\nbatch_size = 4', 'test"')
    saved.write_text(text)
    steps, status = trainings.life(saved)
    assert status == 0, log_of(saved)
    assert dict(steps) == {step: uninterrupted[1][step] for step in range(25, 31)}
    assert "resuming in epoch 3 after step 24, from" in log_of(saved)
    got, wanted = (variables_of(path.parent / "checkpoints" / f"step-{30:010}") for path in (saved, uninterrupted[0]))
    assert got == wanted


def test_resume_without_a_checkpoint_begins_at_the_beginning_and_says_so(trainings, config, uninterrupted):
    steps, status = trainings.life(config, kill_after=2)
    assert status == signal.SIGKILL
    assert steps[0] == (1, uninterrupted[1][1])
    assert f"no checkpoint in {config.parent / 'checkpoints'}: beginning at the beginning" in log_of(config)


def test_nothing_is_saved_without_the_section(trainings, config, uninterrupted):
    config.write_text(CONFIG.partition("[checkpoint]")[0])
    steps, status = trainings.life(config, resume=False)
    assert (dict(steps), status) == (uninterrupted[1], 0)
    assert sorted(path.name for path in config.parent.iterdir()) == ["images", "job.toml", "job.toml.log"]
    assert len(open_folders(load_config(config))["train"]) == 42
