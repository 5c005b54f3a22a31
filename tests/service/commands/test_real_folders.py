"""``score`` and ``calibrate`` over folders as people have them: links, hidden copies, large photographs, odd names."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from service.commands.cli import app
from service.formats.images import OWN_FILES
from service.settings import Settings
from tests.ppca_bundle import images
from tests.service.fitted import write_fitted
from tests.service.http import serving

X = np.round(images(60, seed=21) * 255).astype(np.uint8)
ODD = os.fsdecode(b"caf\xe9.png")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VAESERVE_{name.upper()}", raising=False)


def put(folder, numbers, names="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(X[number][0]).save(folder / names.format(number))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_links_are_scored_and_hidden_files_are_not(tmp_path, ppca_root):
    root = put(tmp_path / "pictures", range(2))
    (root / "link").symlink_to(put(tmp_path / "elsewhere", range(2, 5)))
    put(root / ".ipynb_checkpoints", range(5, 7), "{}-checkpoint.png")
    (root / "._0.png").write_bytes(b"\0\5\x16\7")
    done = run("score", root, "--repository", ppca_root)
    assert done.exit_code == 0, done.stderr
    names = [os.path.relpath(row["file"], root) for row in csv.DictReader(done.stdout.splitlines())]
    assert names == ["0.png", "1.png", "link/2.png", "link/3.png", "link/4.png"]


def test_a_folder_of_hidden_files_holds_none(tmp_path, ppca_root):
    put(tmp_path / ".git", range(2))
    done = run("score", tmp_path, "--repository", ppca_root)
    assert done.exit_code == 1
    assert "no PNG, JPEG or WebP file found there; hidden files and folders are left out" in done.stderr
    assert run("score", tmp_path / ".git", "--repository", ppca_root).exit_code == 0


def test_a_link_to_nothing_is_named(tmp_path, ppca_root):
    (put(tmp_path, range(2)) / "lost.png").symlink_to(tmp_path / "nowhere")
    done = run("score", tmp_path, "--repository", ppca_root)
    assert done.exit_code == 3
    assert "lost.png" in done.stderr


def test_what_is_calibrated_on_is_what_would_be_trained_on(tmp_path, ppca_path):
    root = tmp_path / "bundles"
    write_fitted(root, ppca_path)
    good = put(tmp_path / "good", range(40))
    (good / "link").symlink_to(put(tmp_path / "elsewhere", range(40, 60)))
    put(good / ".ipynb_checkpoints", range(9), "{}-checkpoint.png")
    done = run("calibrate", "ppca", good, "--fit-share", "0", "--repository", root)
    assert done.exit_code == 0, done.stderr
    assert "60 images calibrate" in done.stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_name_that_is_not_utf_8_loses_nothing(tmp_path, ppca_root, suffix):
    root = put(tmp_path / "pictures", range(3))
    os.rename(root / "1.png", root / ODD)
    out = tmp_path / f"scores.{suffix}"
    done = run(
        "score", root, "--out", out, "--maps", tmp_path / "maps", "--map-kind", "distortion", "--repository", ppca_root
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    if suffix == "csv":
        rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    else:
        rows = parquet.read_table(out).to_pylist()
    assert [os.path.basename(row["file"]) for row in rows] == ["0.png", "2.png", r"caf\xe9.png"]
    assert (tmp_path / "maps" / ODD).is_file()


def test_such_a_name_is_printed_whether_it_is_read_or_not(tmp_path, ppca_root):
    root = put(tmp_path / "pictures", range(1))
    (root / ODD).write_text("not a picture")
    (root / os.fsdecode(b"\xff.png")).write_bytes((root / "0.png").read_bytes())
    done = run("score", root, "--repository", ppca_root)
    assert done.exit_code == 3
    assert r"caf\xe9.png: no image" in done.stderr
    assert r"\xff.png" in done.stdout


def test_such_a_subfolder_is_no_group_in_words(tmp_path, ppca_path):
    root = tmp_path / "bundles"
    write_fitted(root, ppca_path)
    put(tmp_path / "good" / os.fsdecode(b"h\xf6he"), range(30))
    put(tmp_path / "good/b", range(30, 60))
    done = run("calibrate", "ppca", tmp_path / "good", "--groups", "--fit-share", "0", "--repository", root)
    assert done.exit_code == 1, done.exception
    assert "a group's name is 1 to 64 letters, digits" in done.stderr


def test_large_photographs_are_read_by_score_calibrate_and_serve(tmp_path, ppca_root):
    """Of 24 megapixels, which training takes; in 80 kB, since they are of one grey."""
    picture = tmp_path / "large.png"
    Image.new("L", (6000, 4000), 7).save(picture)
    done = run("score", picture, "--repository", ppca_root)
    assert done.exit_code == 0, done.stderr
    with serving(ppca_root) as client:
        answer = client.post("/v1/score", content=picture.read_bytes(), headers={"content-type": "image/png"})
    assert answer.status_code == 200, answer.text
    assert float(next(csv.DictReader(done.stdout.splitlines()))["score"]) == answer.json()["results"][0]["score"]
    assert OWN_FILES.max_pixels >= Settings().max_image_pixels


def test_a_higher_limit_of_the_settings_holds_for_files_too(tmp_path, ppca_root, monkeypatch):
    """And a lower one, which protects the service, does not."""
    picture = put(tmp_path, [0]) / "0.png"
    monkeypatch.setenv("VAESERVE_MAX_IMAGE_PIXELS", "50")
    assert run("score", picture, "--repository", ppca_root).exit_code == 0
    monkeypatch.setattr("service.formats.images.OWN_FILES", type(OWN_FILES)(64, 10))
    monkeypatch.setenv("VAESERVE_MAX_IMAGE_PIXELS", "64")
    assert run("score", picture, "--repository", ppca_root).exit_code == 0
    monkeypatch.setenv("VAESERVE_MAX_IMAGE_PIXELS", "50")
    assert "at most 50 pixels expected" in run("score", picture, "--repository", ppca_root).stderr
