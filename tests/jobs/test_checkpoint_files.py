"""The files of checkpoints: whole or not there; what does not fit the configuration is said. No model is trained."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from jobs.small_training import CONFIG, EPOCHS, saved_in, write_config, write_images

import input_workers as iw
from input_workers.cli import main
from input_workers.config import load_config
from input_workers.jobs.checkpoint import INPUT, Checkpoint, Checkpoints, job_of
from input_workers.jobs.streams import add_source, open_folders


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def config(tmp_path, images):
    return write_config(tmp_path, images)


@pytest.fixture
def saved(config):
    """A configuration with checkpoints, whose model is none."""
    loaded = load_config(config)
    folders = open_folders(loaded)
    coordinator = iw.GlobalCoordinator()
    for name, folder in folders.items():
        add_source(coordinator, "numpy", loaded, name, folder)

    def write(folder):
        coordinator.save_state(folder / INPUT)
        for name in ("model.keras", "training.npz"):
            (folder / name).write_text("not looked into before it is known to be right")

    with Checkpoints(loaded, job_of(loaded, folders)) as checkpoints:
        for step in (27, 30):
            checkpoints.save(Checkpoint(None, step, 2), write)
    return config


def failing(capsys, *arguments):
    assert main(["train", *map(str, arguments)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    return shown


def test_resume_needs_a_section_that_says_from_where(config, capsys):
    config.write_text(CONFIG.partition("[checkpoint]")[0])
    shown = failing(capsys, config, "--resume")
    assert "checkpoint: is missing; wanted a section [checkpoint] with the folder to resume from" in shown


def test_a_training_that_does_not_resume_does_not_touch_what_another_has_saved(saved, capsys):
    before = saved_in(saved)
    shown = failing(capsys, saved)
    assert "checkpoints' holds a training up to step 30; wanted --resume to go on with it, or another folder" in shown
    assert saved_in(saved) == before


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("seed = 3", "seed = 4", "seed: got 3; wanted 4"),
        ("small_cnn", "MobileNetV2", "model.name: got 'small_cnn'; wanted 'MobileNetV2'"),
        ("[8, 8]", "[8, 9]", "model.image_size: got [8, 8]; wanted [8, 9]"),
        ("[train]", "learning_rate = 0.1\n[train]", "model.learning_rate: got 0.001; wanted 0.1"),
        ("batch_size = 4\nworkers", "batch_size = 5\nworkers", "train.batch_size: got 4; wanted 5"),
        ("epochs = 3", "epochs = 4", "train.epochs: got 3; wanted 4"),
        ("images/train", "images/test", "train.images: got 42; wanted 10"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_field_and_the_file(saved, capsys, old, new, fault):
    assert old in CONFIG
    saved.write_text(CONFIG.replace(old, new, 1))
    shown = failing(capsys, saved, "--resume")
    assert f"checkpoints/step-{30:010}/checkpoint.json: {fault}" in shown
    assert "resume with the one that the checkpoint was made with, or begin anew in another checkpoint.folder" in shown


def test_other_images_of_the_same_number_are_refused(saved, images, capsys):
    (saved.parent / "images").unlink()
    shutil.copytree(images, saved.parent / "images")
    (saved.parent / "images" / "train" / "a" / "3.png").rename(saved.parent / "images" / "train" / "a" / "3b.png")
    assert "checkpoint.json: train.sha256 of the names of the images: got '" in failing(capsys, saved, "--resume")


@pytest.mark.parametrize("name", ["checkpoint.json", "input.json", "model.keras", "training.npz"])
def test_a_file_that_was_changed_or_is_missing_is_named(saved, capsys, name):
    file = saved.parent / "checkpoints" / f"step-{30:010}" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shown = failing(capsys, saved, "--resume")
    assert f"{file}: " in shown
    assert "checksum is wrong" in shown or "no JSON" in shown
    file.unlink()
    shown = failing(capsys, saved, "--resume")
    assert f"{file}: cannot be read: No such file" in shown
    assert "remove this folder to go on from the checkpoint before it" in shown


def test_two_trainings_do_not_write_to_one_folder(config, capsys):
    loaded = load_config(config)
    with Checkpoints(loaded, {}):
        assert "another training writes to" in failing(capsys, config, "--resume")
    with Checkpoints(loaded, {}) as again:
        assert again.begin(resume=False) == Checkpoint()


def test_what_a_killed_training_left_unfinished_is_removed_and_what_is_not_ours_stays(config):
    folder = config.parent / "checkpoints"
    for name in (".new-abc", ".old-step-0000000001", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.keras").write_text("half")
    with Checkpoints(load_config(config), {}) as checkpoints:
        assert saved_in(config) == ["notes"]
        assert checkpoints.begin(resume=True) == Checkpoint()


def test_a_folder_that_cannot_be_written_to_is_said_before_the_training(config, capsys, monkeypatch):
    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied", str(where["dir"]))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert "checkpoint.folder: [Errno 13] Permission denied" in failing(capsys, config)


@pytest.mark.parametrize("fail_at", range(1, 9))
def test_a_save_that_fails_anywhere_leaves_whole_checkpoints_and_nothing_else(config, monkeypatch, fail_at):
    calls = 0

    def failing_at(original):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments)

        return call

    def write(folder):
        for name in ("input.json", "model.keras"):
            (folder / name).write_text("whole")

    final = config.parent / "checkpoints" / f"step-{6:010}"
    with Checkpoints(load_config(config), {"seed": 3}) as checkpoints:
        checkpoints.save(Checkpoint(None, 3, 0), write)
        before = saved_in(config)
        monkeypatch.setattr(os, "fsync", failing_at(os.fsync))
        monkeypatch.setattr(Path, "rename", failing_at(Path.rename))
        monkeypatch.setattr(Path, "write_text", failing_at(Path.write_text))
        with pytest.raises(iw.ConfigError, match=r"step 6 cannot be saved to .*No space left.*what was saved before is intact"):
            checkpoints.save(Checkpoint(None, 6, 0), write)
        # The last call makes the new name outlive a crash of the machine: there it is already, whole.
        assert saved_in(config) == (before if fail_at < 8 else [*before, final.name])
        checkpoints.save(Checkpoint(None, 6, 0), write)
        assert calls == (fail_at + 8 if fail_at < 8 else 8), "every call that can fail was made to"
        assert checkpoints.begin(resume=True) == Checkpoint(final, 6, 0)


def test_the_latest_are_kept_and_a_step_is_saved_once(config):
    config.write_text(CONFIG + "keep = 2\n")
    written = []
    with Checkpoints(load_config(config), {}) as checkpoints:
        for step in (3, 999_999_999_9, 6, 6, 10_000_000_000):
            checkpoints.save(Checkpoint(None, step, 0), lambda folder, step=step: written.append(step))
        assert written == [3, 9_999_999_999, 6, 10_000_000_000]
        assert checkpoints.begin(resume=True).step == 10_000_000_000
    assert saved_in(config) == ["step-10000000000", "step-9999999999"]


@pytest.mark.parametrize(
    ("settings", "steps", "ends"),
    [("", [], [0, 1, 2]), ("every_batches = 4", [4, 8], [0, 1, 2]), ("every_epochs = 2", [], [1, 2])],
)
def test_one_is_due_every_so_many_batches_and_epochs_and_at_the_end(config, settings, steps, ends):
    config.write_text(CONFIG.replace("every_batches = 3", settings))
    checkpoints = Checkpoints(load_config(config), {})
    assert [step for step in range(1, 11) if checkpoints.due(step, 0, False)] == steps
    assert [epoch for epoch in range(EPOCHS) if checkpoints.due(10 * epoch + 10, epoch, True)] == ends
