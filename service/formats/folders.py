"""Find the files of a folder, for training, scoring and calibrating alike, and write their names as UTF-8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from service.formats.containers import PNG_SIGNATURE

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def walk(root: Path) -> Iterator[Path]:
    """Yield the paths of all files below a folder that are not hidden, as ``root``/…, in no order.

    Files and folders whose name begins with a dot are left out, as Jupyter's copies and macOS's metadata; ``root``
    itself may be hidden, or lie in a hidden folder. Links are followed, and each real folder is entered once.
    """
    entered = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def is_image(path: Path) -> bool:
    """True if a file is an image by its suffix, whatever it holds, or by its first bytes: PNG, JPEG or WebP."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path.is_file() or not path.exists()  # a link to nothing cannot be read, which its reader says
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def printable(path: Path | str) -> str:
    r"""Return a file name as text that UTF-8 can hold: bytes of another encoding are written as \xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
