"""How many processor cores this process may use: by its affinity, and by the quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["usable_cores"]


def usable_cores(groups: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float:
    """Return the cores, perhaps a fraction: those of the affinity, or fewer where a control group has a smaller quota.

    The files are read at each call: a quota may be changed while a process runs. What is not there limits nothing.

    Args:
        groups: where the control groups are mounted, version 1 or 2.
        membership: says in which this process is.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for line in _read(membership).splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            for folder in _upwards([groups, f"{groups}/unified"], path):
                cores = min(cores, _share(*([*_read(f"{folder}/cpu.max").split(), "", ""])[:2]))
        elif "cpu" in controllers.split(","):
            for folder in _upwards([f"{groups}/{controllers}", f"{groups}/cpu"], path):
                quota, period = _read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us")
                cores = min(cores, _share(quota.strip(), period.strip()))
    return cores


def _upwards(mounts: list[str], path: str) -> Iterator[str]:
    """Return the folders of a group and of all that it is in. In a container some of the path may not be there."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    for mount in mounts:
        for depth in range(len(names), -1, -1):
            yield "/".join([mount, *names[:depth]])


def _share(quota: str, period: str) -> float:
    """Return a quota in cores; "max", a negative one and one that cannot be read are none."""
    if not (quota.isdecimal() and period.isdecimal()) or not int(quota) or not int(period):
        return float("inf")
    return int(quota) / int(period)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
