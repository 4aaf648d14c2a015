"""The cores of this process: its affinity, and quotas of control groups in files as the kernel writes them."""

from __future__ import annotations

import os
import pathlib
import threading

import pytest

from input_workers.cores import usable_cores

ALL = len(os.sched_getaffinity(0))

# Files below the mount, and what /proc/self/cgroup says; the cores that are left, of as many as one likes.
CASES: dict[str, tuple[str, dict[str, str], float | None]] = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}, 0.5),
    "version 2, of a group above": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "20000 100000\n"}, 0.2),
    "version 2, the smallest counts": ("0::/a/b\n", {"a/b/cpu.max": "10000 100000\n", "a/cpu.max": "20000 100000\n"}, 0.1),
    "version 2, in a container": ("0::/\n", {"cpu.max": "75000 100000\n"}, 0.75),
    "version 2, a path of the host": ("0::/docker/x\n", {"cpu.max": "75000 50000\n"}, 1.5),
    "version 2, from a namespace beside": ("0::/../x\n", {"cpu.max": "30000 100000\n"}, 0.3),
    "version 2, no quota": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
    "version 2, more than there are": ("0::/a\n", {"a/cpu.max": "99900000 100000\n"}, None),
    "version 1": (
        "5:cpuset:/a\n4:cpu,cpuacct:/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "40000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        0.4,
    ),
    "version 1, a path of the host": (
        "4:cpu,cpuacct:/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "40000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        0.4,
    ),
    "version 1, no quota": (
        "4:cpu,cpuacct:/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "both": ("4:cpu:/a\n0::/a\n", {"unified/a/cpu.max": "60000 100000\n", "cpu/a/cpu.cfs_quota_us": "-1\n"}, 0.6),
    "a group of another controller": (
        "4:cpuset:/a\n",
        {"cpuset/a/cpu.cfs_quota_us": "1\n", "cpuset/a/cpu.cfs_period_us": "9"},
        None,
    ),
    "nonsense": ("0::/a\nx\n\n4:cpu\n", {"a/cpu.max": "many\n"}, None),
    "zero": ("0::/a\n", {"a/cpu.max": "0 0\n"}, None),
    "nothing": ("", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas_are_read_from_the_files_of_the_kernel(tmp_path: pathlib.Path, case: str) -> None:
    membership, files, cores = CASES[case]
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(membership)
    found = usable_cores(str(tmp_path / "groups"), str(tmp_path / "cgroup"))
    assert found == pytest.approx(ALL if cores is None else min(cores, ALL))


def test_where_there_are_no_control_groups_the_affinity_counts(tmp_path: pathlib.Path) -> None:
    assert usable_cores(str(tmp_path), str(tmp_path / "none")) == ALL
    found: list[float] = []

    def bound() -> None:  # affinity is a thread's
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        found.append(usable_cores(str(tmp_path), str(tmp_path / "none")))

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert found == [1.0]


def test_of_this_very_process_it_is_some() -> None:
    assert 0.0 < usable_cores() <= ALL
