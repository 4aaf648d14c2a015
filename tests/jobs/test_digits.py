"""The digits: real files, the same for everybody, whole or not there."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

import input_workers as iw
from input_workers.jobs.digits import digits_folder, write_digits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_files_are_scikit_learns_digits_split_once():
    folder = write_digits()
    pictures = load_digits()
    seen = []
    for part, rows in (("train", 1437), ("test", 360)):
        files = sorted((folder / part).glob("*/*.png"))
        assert len(files) == rows
        assert len({file.parent for file in files}) == 10
        for file in files[::10]:
            row = int(file.stem)
            assert file.parent.name == str(pictures.target[row])
            expected = np.round(pictures.images[row] * 255 / 16)
            assert (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) == expected).all()
        seen += [int(file.stem) for file in files]
    assert sorted(seen) == list(range(1797))


def test_an_image_folder_reads_them():
    digits = iw.sources.ImageFolder(write_digits() / "test", image_size=(8, 8))
    assert len(digits) == 360
    assert list(digits.class_names) == list("0123456789")


def test_they_are_written_once(cache):
    folder = write_digits()
    before = folder.stat().st_ino
    assert write_digits() == folder == cache / "input_workers" / "digits"
    assert folder.stat().st_ino == before


def test_processes_that_write_at_once_end_with_one_whole_copy_and_nothing_else(cache):
    code = "from input_workers.jobs.digits import write_digits; print(write_digits())"
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {writer.communicate(timeout=60)[0].strip() for writer in writers} == {str(digits_folder())}
    assert os.listdir(cache / "input_workers") == ["digits"]
    assert len(list(digits_folder().glob("*/*/*.png"))) == 1797


def test_a_write_that_fails_leaves_nothing_behind_and_may_be_repeated(cache, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(iw.ConfigError, match=r"cannot be written .* No space left on device; wanted .* XDG_CACHE_HOME"):
            write_digits()
    assert os.listdir(cache / "input_workers") == []
    assert write_digits().is_dir()


def test_a_cache_folder_that_cannot_be_written_to_is_an_error(cache):
    (cache / "input_workers").write_text("a file where the folder should be")
    with pytest.raises(iw.ConfigError, match="set XDG_CACHE_HOME"):
        write_digits()


@pytest.mark.parametrize("cache_home", ["", "relative/path"])
def test_without_a_usable_xdg_cache_home_it_is_in_the_home_folder(cache_home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert digits_folder() == tmp_path / "home" / ".cache" / "input_workers" / "digits"


@pytest.mark.parametrize("package", ["sklearn", "cv2"])
def test_a_missing_package_is_an_error_that_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom input_workers.jobs.digits import write_digits\nwrite_digits()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install input-workers[demo]" in result.stderr.splitlines()[-1]
    assert package in result.stderr.splitlines()[-1]
