from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import resources
from service.resources import available_cpus, available_memory, cgroup_quota, fitting_workers


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("contents", "quota"),
    [
        ({"cpu_dot_max": "150000 100000\n"}, 1.5),
        ({"cpu_dot_max": "max 100000\n"}, None),
        ({"cpu__cpu_dot_cfs_quota_us": "300000\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}, 3.0),
        ({"cpu__cpu_dot_cfs_quota_us": "-1\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_both_cgroup_versions_is_read(tmp_path, contents, quota):
    assert cgroup_quota(files(tmp_path, **contents)) == quota


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("100000 100000", 1), ("99900000 100000", None)])
def test_threads_are_the_smaller_of_affinity_and_quota_and_at_least_one(tmp_path, quota, cpus):
    affinity = len(os.sched_getaffinity(0))
    assert available_cpus(files(tmp_path, cpu_dot_max=quota)) == (affinity if cpus is None else cpus)


def test_affinity_counts_not_the_host_s_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from service.resources import available_cpus; print(available_cpus())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "1\n"


@pytest.mark.parametrize(
    ("contents", "limit"),
    [
        ({"memory_dot_max": "1048576\n"}, 2**20),
        ({"memory_dot_max": "max\n"}, None),
        ({"memory__memory_dot_limit_in_bytes": "2097152\n"}, 2**21),
        ({"memory__memory_dot_limit_in_bytes": "9223372036854771712\n"}, None),
        ({}, None),
    ],
)
def test_memory_is_the_smaller_of_the_machine_s_and_the_limit_of_both_cgroup_versions(tmp_path, contents, limit):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(files(tmp_path, **contents)) == (machine if limit is None else limit)


@pytest.mark.parametrize(
    ("threads", "megabytes", "memory", "workers"),
    [
        (1, 0, 2**40, 8),  # the CPUs allowed
        (3, 0, 2**40, 2),
        (16, 0, 2**40, 1),
        (1, 0, 2**29, 3),  # three quarters of half a GiB, of 100 MiB each
        (1, 100, 2**31, 3),  # a worker of 500 MiB
        (1, 0, 2**20, 1),
    ],
)
def test_as_many_workers_as_cpus_and_memory_allow(monkeypatch, threads, megabytes, memory, workers):
    monkeypatch.setattr(resources, "available_cpus", lambda: 8)
    monkeypatch.setattr(resources, "available_memory", lambda: memory)
    assert fitting_workers(threads, megabytes * 2**20) == workers


def test_threads_are_counted_that_python_does_not_know_of():
    code = (
        "import os, threading; from service.resources import threads_of_process as count;"
        "threads = [threading.Thread(target=os.getpid) for _ in range(3)];"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; print(count());"
        "end = threading.Event(); threading.Thread(target=end.wait).start(); print(count(0.0)); end.set()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["1", "2"]
