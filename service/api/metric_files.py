"""The numbers of one worker in files that the worker which answers /metrics reads, as prometheus_client lays them out.

The library would map the files into memory. Where their disk is full (/dev/shm of a container has 64 MB), the kernel
kills a process that writes to such a page. Here numbers are written by calls that fail in words: the worker then goes
on without files, its numbers in memory.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from threading import Lock
from typing import Any

from prometheus_client.mmap_dict import mmap_key

from service.logs import get_logger

_HEADER = struct.Struct("i4x")  # bytes in use
_NUMBER = struct.Struct("dd")  # value, time


class MetricFiles:
    """The files of this process in ``folder``: one for the counters, one for the histograms, one a mode of gauges."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, os.getpid()
        self._lock = Lock()
        self._used: dict[int, int] = {}  # bytes in use, by descriptor
        self._opened: dict[str, int] = {}
        self._failed = False

    def add(self, kind: str, key: str) -> tuple[int, int] | None:
        """Add a number, 0, to the file of a kind of metric, and return where it stands: descriptor and offset."""
        encoded = key.encode()
        padded = encoded + b" " * (8 - (len(encoded) + 4) % 8)
        with self._lock:
            try:
                descriptor = self._file(kind)
                start = self._used[descriptor]
                entry = struct.pack("i", len(encoded)) + padded + _NUMBER.pack(0.0, 0.0)
                self._write(descriptor, entry, start)
                self._write(descriptor, _HEADER.pack(start + len(entry)), 0)  # a reader sees an entry once it is whole
                self._used[descriptor] = start + len(entry)
            except OSError as error:
                self._fail(error)
                return None
        return descriptor, self._used[descriptor] - _NUMBER.size

    def set(self, place: tuple[int, int] | None, value: float, timestamp: float) -> None:
        """Write a number to its place, unless there are no files."""
        if place is None or self._failed:
            return
        try:
            self._write(place[0], _NUMBER.pack(value, timestamp), place[1])
        except OSError as error:
            self._fail(error)

    def _file(self, kind: str) -> int:
        """Return the descriptor of a kind's file, which is made whole or not at all. Raises OSError."""
        if self._failed:
            raise OSError("the files are given up")
        if kind not in self._opened:
            # What a dead worker has counted stays, also where this one has its number.
            suffix = "" if kind.startswith("gauge") else f"_{time.time_ns()}"
            path = self._folder / f"{kind}_{self._process}{suffix}.db"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                self._write(descriptor, _HEADER.pack(_HEADER.size), 0)
            except OSError:
                os.close(descriptor)
                path.unlink()  # whoever reads all files could not read this one
                raise
            self._opened[kind], self._used[descriptor] = descriptor, _HEADER.size
        return self._opened[kind]

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        if os.pwrite(descriptor, data, offset) < len(data):
            raise OSError("the disk is full")

    def _fail(self, error: OSError) -> None:
        """Write no more, and say so once."""
        if not self._failed:
            self._failed = True
            get_logger().error("metrics of this worker are lost", folder=str(self._folder), reason=str(error))


def value_class(files: MetricFiles) -> type:
    """Return the class of a number of prometheus_client, for prometheus_client.values.ValueClass."""

    class FileValue:
        """A number in memory and in its file."""

        def __init__(
            self, kind: str, metric: str, name: str, labels: Any, label_values: Any, text: str, **options: Any
        ) -> None:
            kind = f"{kind}_{options['multiprocess_mode']}" if kind == "gauge" else kind
            self._lock, self._value = Lock(), 0.0
            self._place = files.add(kind, mmap_key(metric, name, labels, label_values, text))

        def inc(self, amount: float) -> None:
            with self._lock:
                self._value += amount
                files.set(self._place, self._value, 0.0)

        def set(self, value: float, timestamp: float | None = None) -> None:
            with self._lock:
                self._value = value
                files.set(self._place, value, timestamp or 0.0)

        def get(self) -> float:
            with self._lock:
                return self._value

        def set_exemplar(self, exemplar: Any) -> None: ...

        def get_exemplar(self) -> None: ...

    return FileValue
