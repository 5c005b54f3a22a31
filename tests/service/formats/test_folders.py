"""Folders as people have them: which files count, by name, kind and place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from service.formats.folders import is_image, printable, walk

PICTURE = Image.new("L", (3, 3), 7)


def put(path: Path, form: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, form)
    return path


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in walk(root))


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", "deep/er/b.png", "._a.png", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.png", "x/.y/z.png"):
        put(tmp_path / name)
    assert names(tmp_path) == ["a.png", "deep/er/b.png"]


def test_the_folder_itself_may_be_hidden(tmp_path):
    put(tmp_path / ".cache/.data/good/a.png")
    assert names(tmp_path / ".cache/.data") == ["good/a.png"]


def test_links_are_followed_and_loops_are_not(tmp_path):
    outside = put(tmp_path / "outside/linked/a.png").parent.parent
    root = put(tmp_path / "root/b.png").parent
    (root / "link").symlink_to(outside)
    (root / "c.png").symlink_to(outside / "linked/a.png")
    (outside / "linked/loop").symlink_to(root)
    (root / "self").symlink_to(root)
    assert names(root) == ["b.png", "c.png", "link/linked/a.png"]


def test_a_folder_is_entered_once_though_two_names_lead_there(tmp_path):
    put(tmp_path / "a/x.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert names(tmp_path) == ["a/x.png"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", ["a", "a.jfif", "a.dat", "a.PNG.bak"])
def test_an_image_is_one_whatever_its_name(tmp_path, name, form):
    assert is_image(put(tmp_path / name, form))


def test_other_files_are_none_but_a_bad_image_by_name_is_one(tmp_path):
    (tmp_path / "notes.txt").write_text("RIFF, not a picture")
    (tmp_path / "empty").touch()
    (tmp_path / "bad.JPG").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    images = [path.name for path in sorted(tmp_path.iterdir()) if is_image(path)]
    assert images == ["bad.JPG", "lost.png"]


def test_names_of_any_bytes_can_be_written():
    assert printable(Path("dir/é.png")) == "dir/é.png"
    assert printable(os.fsdecode(b"caf\xe9\xff.png")) == r"caf\xe9\xff.png"
    assert printable(Path(os.fsdecode(b"\x80"))).encode() == rb"\x80"
