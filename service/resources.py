"""CPUs and memory that this process may use, by its affinity and its cgroup's limits, not the host's."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
YOUNG_OBJECTS = 5_000  # between collections of the youngest; by default 700

MEMORY_SHARE = 0.75  # of the memory allowed that workers may take: request bodies and the largest batches come on top
PROCESS_BYTES = 100 * 2**20  # of a worker without bundles
BYTES_PER_GRAPH_BYTE = 4  # that a worker holds: weights, packed weights, intermediate arrays


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Count the CPUs this process may use: the smaller of its affinity and its cgroup's quota (v2 or v1), at least 1.

    ONNX Runtime and os.cpu_count() see the host's CPUs, and a pool of so many threads is throttled inside a container.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(cgroup)
    return max(1, affinity if quota is None else min(affinity, math.floor(quota)))


def cgroup_quota(cgroup: Path) -> float | None:
    """Read how many CPUs the cgroup mounted there grants (v2: cpu.max; v1: cpu/cpu.cfs_*_us); None without a limit."""
    modern = _read_words(cgroup / "cpu.max")
    if len(modern) == 2:
        return None if modern[0] == "max" else int(modern[0]) / int(modern[1])
    quota, period = _read_words(cgroup / "cpu/cpu.cfs_quota_us"), _read_words(cgroup / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def available_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes this process and its children may hold: the machine's, or fewer by the cgroup's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = _read_words(cgroup / "memory.max") or _read_words(cgroup / "memory/memory.limit_in_bytes")
    return min(machine, int(words[0])) if words and words[0] != "max" else machine


def fitting_workers(threads: int, graph_bytes: int) -> int:
    """Return how many processes of so many threads the allowed CPUs and memory are enough for, at least 1.

    Each process holds bundles whose graphs have ``graph_bytes`` bytes as files.
    """
    by_memory = int(MEMORY_SHARE * available_memory()) // (PROCESS_BYTES + BYTES_PER_GRAPH_BYTE * graph_bytes)
    return max(1, min(available_cpus() // threads, by_memory))


def threads_of_process(max_seconds: float = 1.0) -> int:
    """Return how many threads the kernel counts in this process; joined ones may take ``max_seconds`` to leave it."""
    deadline = time.monotonic() + max_seconds
    while (count := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return count


def freeze_gc() -> None:
    """Exclude all present objects from garbage collections, and have fewer collections.

    These objects live as long as the process, and a collection of all of them takes 50 ms with two models, in which no
    request is answered. Requests in progress hold more objects than the interpreter expects between two collections.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
