"""What this process may use: CPUs by affinity and the cgroup's quota, memory by the cgroup's limit, not the host's."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup's quota (v2 or v1), at least 1.

    ONNX Runtime and os.cpu_count() see the host's cores, and a pool of that size is throttled inside a container.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(cgroup)
    return max(1, affinity if quota is None else min(affinity, math.floor(quota)))


def cgroup_quota(cgroup: Path) -> float | None:
    """CPUs granted by the cgroup mounted there, or None without a limit. v2: cpu.max; v1: cpu/cpu.cfs_*_us."""
    modern = _read_words(cgroup / "cpu.max")
    if len(modern) == 2:
        return None if modern[0] == "max" else int(modern[0]) / int(modern[1])
    quota, period = _read_words(cgroup / "cpu/cpu.cfs_quota_us"), _read_words(cgroup / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes this process and its children may hold: the smaller of the machine's and the cgroup's limit (v2 or v1)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = _read_words(cgroup / "memory.max") or _read_words(cgroup / "memory/memory.limit_in_bytes")
    return min(machine, int(words[0])) if words and words[0] != "max" else machine


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself, or its architecture where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
