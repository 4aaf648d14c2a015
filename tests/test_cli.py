"""The command line: clear messages, exit codes that scripts can use, no tracebacks."""

import os
import subprocess
import sys

import pytest

from input_workers.cli import main

GOOD = """
[model]
name = "small_cnn"
image_size = [8, 8]
[train]
folder = "digits:train"
[test]
folder = "digits:test"
"""


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return str(path)

    return write


def test_check_says_that_a_good_configuration_is(config, capsys):
    path = config(GOOD)
    assert main(["check", path]) == 0
    assert capsys.readouterr().out == f"{path}: ok\n"


def test_check_names_every_fault_and_exits_with_1(config, capsys):
    assert main(["check", config(GOOD.replace("folder", "foldr"))]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("did you mean 'folder'?") == 2
    assert shown.err.count("is missing") == 2


@pytest.mark.parametrize("command", ["train", "train --resume", "check", "verify-resume --at 1"])
def test_a_missing_configuration_is_an_error_with_exit_code_1(command, tmp_path, capsys):
    assert main([*command.split(), str(tmp_path / "none.toml")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "none.toml: cannot be read: No such file or directory" in shown


@pytest.mark.parametrize("arguments", [["--debug", "check"], ["check", "--debug"]])
def test_debug_shows_the_traceback(arguments, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        main([*arguments, str(tmp_path / "none.toml")])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "train",
        "train a b",
        "bench none",
        "--nonsense",
        "verify-resume a",
        "verify-resume a --at x",
        "check a --resume",
    ],
)
def test_a_wrong_command_line_exits_with_2_and_shows_the_usage(line, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: input-workers")


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("train", "check", "verify-resume", "bench"))


def test_it_is_a_module_to_run_too():
    result = subprocess.run(
        [sys.executable, "-m", "input_workers", "check", os.devnull], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert f"{os.devnull}: model: is missing; wanted a section [model]" in result.stderr
    assert "Traceback" not in result.stderr
