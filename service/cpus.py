"""How many CPUs this process may use: affinity and the cgroup's quota, not the host's cores."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
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


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
