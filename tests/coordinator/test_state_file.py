"""The file of a state: whole or refused, whatever was cut, flipped, killed, full or in the way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, register

import input_workers as iw
from input_workers.coordinator import state_file
from input_workers.coordinator.state_file import load_file, save_file

OLD, NEW = {"sources": {"train": 1}}, {"sources": {"train": [2] * 100}}


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def a_source(coordinator: iw.GlobalCoordinator) -> Any:
    numbers = np.arange(20)
    return register(coordinator, iw.Stream(iw.sources.Arrays(numbers, numbers), True, 3, rows_per_request=3), 4)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, bytes]:
    """A real file, of a source in the middle."""
    path = tmp_path / "state.json"
    coordinator = iw.GlobalCoordinator()
    source = a_source(coordinator)
    with coordinator:
        for _ in range(3):
            source.next_batch()
        coordinator.save_state(path)
    return path, path.read_bytes()


def test_a_file_comes_back_as_it_was_saved(saved: tuple[Path, bytes], coordinator: iw.GlobalCoordinator) -> None:
    path, content = saved
    source = a_source(coordinator)
    coordinator.load_state(path)
    coordinator.save_state(path.with_name("again"))
    assert path.with_name("again").read_bytes() == content, "save, load, save"
    assert source.state_dict()["done"] == {"0": [[0, 12]]}
    assert content.startswith(b'{"sha256": "')
    assert content.endswith(b"}\n")
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)
    for same in (str(path), os.fsencode(path)):
        assert load_file(same) == load_file(path)  # type: ignore[arg-type]
        save_file(same, NEW)  # type: ignore[arg-type]
        assert load_file(path) == NEW
        path.write_bytes(content)
    assert files_in(path.parent) == ["again", "state.json"]


def test_a_file_cut_at_any_byte_or_with_any_bit_flipped_is_refused(
    saved: tuple[Path, bytes], coordinator: iw.GlobalCoordinator
) -> None:
    path, content = saved
    source = a_source(coordinator)
    coordinator.load_state(path)
    before = source.state_dict()
    assert 300 < len(content) < 1000
    broken = [content[:stop] for stop in range(len(content))]
    broken += [
        content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]
        for at in range(len(content)) for change in (1, 2, 4, 8, 16, 32, 64, 128, 255)
    ]  # fmt: skip
    broken += [content + more for more in (b"\n", b" ", b"x", content)]
    assert len(broken) > 3000
    for each in broken:
        path.write_bytes(each)
        with pytest.raises(iw.StateMismatch, match="wanted a file that save_state"):
            coordinator.load_state(path)
    assert source.state_dict() == before, "nothing was applied"
    path.write_bytes(content)
    coordinator.load_state([path])


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000, b"9" * 5000, b"null", b"[]", b"{}", b'{"sha256": "", "state": 1}', b'{"sha256": 1, "state": {}}',
        b"\xff\xfe{}",
        b'{"sha256": "x", "state": {}, "more": 1}', pickle.dumps(OLD), b"\x00" * 500, b"NaN",
    ],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(iw.StateMismatch, match=r"other: its? .*; wanted a file that save_state\(\) wrote"):
        load_file(path)


def test_a_checksum_that_fits_a_text_written_otherwise_is_refused(saved: tuple[Path, bytes]) -> None:
    path, content = saved
    path.write_text(json.dumps(json.loads(content), indent=1))
    with pytest.raises(iw.StateMismatch, match="its checksum is wrong"):
        load_file(path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path, coordinator: iw.GlobalCoordinator) -> None:
    with pytest.raises(FileNotFoundError):
        coordinator.load_state(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        coordinator.save_state(tmp_path / "no folder" / "state")
    with pytest.raises(IsADirectoryError):
        coordinator.load_state(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        coordinator.save_state(tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("where", "had"), [("fsync", True), ("fsync", False), ("replace", True), ("replace", False), ("fchmod", True)]
)
def test_an_error_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, had: bool
) -> None:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    path = tmp_path / "state"
    if had:
        save_file(path, OLD)
    with monkeypatch.context() as patched:
        patched.setattr(state_file.os, where, fail)
        with pytest.raises(type(error)):
            save_file(path, NEW)
    assert files_in(tmp_path) == (["state"] if had else [])
    if had:
        assert load_file(path) == OLD
    save_file(path, NEW)
    assert load_file(path) == NEW


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_file(path, OLD)
    with pytest.raises(TypeError):
        save_file(path, {"x": np.int64(3)})
    assert load_file(path) == OLD
    assert files_in(tmp_path) == ["state"]


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_any_new_file_and_an_old_one_keeps_its_own(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "state"
    with umask(mask):
        save_file(path, OLD)
        assert mode_of(path) == mode
        path.chmod(0o640)
        save_file(path, NEW)
        assert mode_of(path) == 0o640
        path.chmod(0o444)  # the folder decides who may replace it
        save_file(path, OLD)
        assert mode_of(path) == 0o444


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "disk" / "state")
    for state in (OLD, NEW):  # at first there is nothing behind it
        save_file(link, state)
        assert link.is_symlink()
        assert load_file(tmp_path / "disk" / "state") == load_file(link) == state
    assert files_in(tmp_path) == ["disk", "latest"]
    assert files_in(tmp_path / "disk") == ["state"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            save_file(path, OLD)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert files_in(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, ".state", "a b\n"])
def test_any_name_that_a_file_can_have_is_a_name(tmp_path: Path, name: str) -> None:
    save_file(tmp_path / name, OLD)
    save_file(tmp_path / name, NEW)
    assert load_file(tmp_path / name) == NEW
    assert files_in(tmp_path) == [name]


def test_a_path_may_begin_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file("state", OLD)
    assert load_file(tmp_path / "state") == OLD


def test_several_threads_save_and_every_moment_shows_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    states = [{"who": who, "rows": list(range(who * 500))} for who in range(1, 5)]
    save_file(path, states[0])
    together = threading.Barrier(len(states) + 1)

    def save(state: dict[str, Any]) -> None:
        together.wait()
        for _ in range(25):
            save_file(path, state)

    threads = [threading.Thread(target=save, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    together.wait()
    while any(thread.is_alive() for thread in threads):
        assert load_file(path) in states
    for thread in threads:
        thread.join()
    assert load_file(path) in states
    assert files_in(tmp_path) == ["state"]


def run_child(text: str, *arguments: str) -> str:
    """Run a script; return what it printed."""
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text), *arguments],
        capture_output=True, text=True, timeout=HANG_SECONDS,
        check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_savers_that_are_killed_leave_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    # One process imports, two at a time are forked from it: they save for ever, say what they are about to do, and are
    # killed when they have said so often enough. Afterwards and meanwhile the file is whole.
    printed = run_child(
        """
        import os, signal, sys
        from input_workers.coordinator import state_file

        path, kills = sys.argv[1], 0

        def saver(who, pipe):
            def told(name):
                original = getattr(os, name)
                def tell(*arguments, **more):
                    os.write(pipe, b".")
                    result = original(*arguments, **more)
                    os.write(pipe, b".")
                    return result
                return tell
            for name in ("fsync", "replace", "fchmod"):
                setattr(os, name, told(name))
            for number in range(10**9):
                state_file.save_file(path, {"who": who, "number": number, "rows": [number] * 5000})

        state_file.save_file(path, {"who": 0, "number": 0, "rows": [0] * 5000})
        for after in range(40):
            children = []
            for who in (1, 2):
                ours, theirs = os.pipe()
                child = os.fork()
                if not child:
                    try:
                        saver(who, theirs)
                    finally:
                        os._exit(1)
                os.close(theirs)
                children.append((child, ours))
            for child, ours in children:
                for _ in range(1 + after):
                    assert os.read(ours, 1) == b"."
                state = state_file.load_file(path)
                os.kill(child, signal.SIGKILL)
                assert os.waitpid(child, 0)[1] == signal.SIGKILL
                os.close(ours)
                kills += 1
                state = state_file.load_file(path)
                assert set(state["rows"]) == {state["number"]} and len(state["rows"]) == 5000
        state_file.save_file(path, {"who": 3})
        print(kills, state_file.load_file(path))
        """,
        str(tmp_path / "state"),
    )
    assert printed == "80 {'who': 3}\n"
    left = [name for name in files_in(tmp_path) if name != "state"]
    assert all(name.startswith(".state.") for name in left), "what a killed process leaves is hidden and named after the file"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    save_file(tmp_path / "state", OLD)
    printed = run_child(
        """
        import resource, signal, sys
        from input_workers.coordinator.state_file import load_file, save_file

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for most in (0, 1, 100, 4096, 50_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                save_file(sys.argv[1], {"rows": list(range(20_000))})
            except OSError as error:
                print(error.errno)
        """,
        str(tmp_path / "state"),
    )
    assert printed.split() == [str(errno.EFBIG)] * 5
    assert load_file(tmp_path / "state") == OLD
    assert files_in(tmp_path) == ["state"]


def test_a_folder_that_may_not_be_written_to_is_an_error_and_one_that_may_not_be_read_is_none(tmp_path: Path) -> None:
    printed = run_child(
        """
        import os, sys, tempfile
        from input_workers.coordinator.state_file import load_file, save_file

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state")
            save_file(path, {"x": 1})
            if not os.geteuid():  # root may do everything
                os.chown(folder, 65534, 65534)
                os.chown(path, 65534, 65534)
                os.seteuid(65534)
            os.chmod(folder, 0o555)
            try:
                save_file(path, {"x": 2})
            except PermissionError:
                print("refused", load_file(path), os.listdir(folder))
            os.chmod(folder, 0o333)
            save_file(path, {"x": 3})
            print(load_file(path))
            os.chmod(folder, 0o700)
            print(os.listdir(folder))
            if not os.getuid():
                os.seteuid(0)
        """
    )
    assert printed == "refused {'x': 1} ['state']\n{'x': 3}\n['state']\n"
