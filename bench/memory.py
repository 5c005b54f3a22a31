"""Memory of processes on Linux: proportional set size, in which a page that n processes share counts 1/n in each."""

from __future__ import annotations

from pathlib import Path


def pss(pid: int) -> int:
    """Bytes, from /proc/PID/smaps_rollup."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def rss(pid: int) -> int:
    """Resident bytes, shared ones in full."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS")


def name(pid: int) -> str:
    """What lists of processes call it."""
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def _field(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
