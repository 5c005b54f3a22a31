"""The command line over real files: score, check, models."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from service.commands.cli import app
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.http import npy, serving

X = np.round(images(5, seed=21) * 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VAESERVE_{name.upper()}", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Five images in nested folders, two damaged files, one that is no image by name."""
    root = tmp_path / "pictures"
    (root / "deep/er").mkdir(parents=True)
    (root / "folder.csv").mkdir()
    for i, image in enumerate(X):
        Image.fromarray(image[0]).save(root / ("deep/er" if i % 2 else ".") / f"{i}.png")
    (root / "text.png").write_text("not a picture")
    (root / "cut.PNG").write_bytes((root / "0.png").read_bytes()[:40])
    (root / "notes.txt").write_text("not asked")
    return root


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_score_writes_what_the_service_answers(folder, ppca_root, tmp_path):
    out = tmp_path / "scores.csv"
    done = run("score", folder, "--out", out, "--repository", ppca_root, "--false-positive-rate", "0.1")
    assert done.exit_code == 3
    assert "text.png" in done.stderr
    assert "cut.PNG" in done.stderr
    assert "5 scored, 2 skipped" in done.stderr
    written = {row["file"]: row for row in csv.DictReader(io.StringIO(out.read_text()))}
    assert len(written) == 5
    with serving(ppca_root) as client:
        headers = {"content-type": "application/x-npy"}
        answer = client.post("/v1/score", content=npy(X), headers=headers, params={"false_positive_rate": 0.1})
    for i, result in enumerate(answer.json()["results"]):
        row = written[str(folder / ("deep/er" if i % 2 else ".") / f"{i}.png")]
        assert {name: row[name] for name in result if result[name] is not None} == {
            name: str(value) for name, value in result.items() if value is not None
        }


def test_every_output_format_holds_the_same(folder, ppca_root, tmp_path):
    tables = []
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"scores.{suffix}"
        assert run("score", folder / "deep", "--out", out, "--repository", ppca_root).exit_code == 0
        if suffix == "csv":
            tables.append(
                [
                    (row["file"], float(row["score"]), row["is_anomaly"] == "True")
                    for row in csv.DictReader(io.StringIO(out.read_text()))
                ]
            )
        else:
            found = (
                [json.loads(line) for line in out.read_text().splitlines()]
                if suffix == "jsonl"
                else parquet.read_table(out).to_pylist()
            )
            tables.append([(row["file"], row["score"], row["is_anomaly"]) for row in found])
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("fault", [["--model", "other"], ["--false-positive-rate", "0.0001"]])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(folder, ppca_root, tmp_path, suffix, fault):
    out = tmp_path / "out" / f"scores.{suffix}"
    out.parent.mkdir()
    out.write_text("yesterday's")
    assert run("score", folder, "--out", out, "--repository", ppca_root, *fault).exit_code == 1
    assert {path.name: path.read_text() for path in out.parent.iterdir()} == {out.name: "yesterday's"}
    assert run("score", folder, "--out", out, "--repository", ppca_root).exit_code == 3
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() != b"yesterday's"


def test_score_reads_no_other_bundle(folder, ppca_root, tmp_path):
    shutil.copytree(ppca_root, tmp_path / "models")
    (tmp_path / "models/other/1").mkdir(parents=True)
    (tmp_path / "models/other/1/manifest.json").write_text("damaged")
    done = run("score", folder / "0.png", "--model", "ppca", "--repository", tmp_path / "models")
    assert done.exit_code == 0, done.stderr


def test_score_takes_the_parameters_of_the_route(folder, ppca_root):
    query = {"estimator": "iwae", "k": 3, "seed": 5}
    options = [text for name, value in query.items() for text in (f"--{name}", str(value))]
    done = run("score", folder / "0.png", "--repository", ppca_root, *options)
    with serving(ppca_root) as client:
        content = (folder / "0.png").read_bytes()
        answer = client.post("/v1/score", content=content, headers={"content-type": "image/png"}, params=query)
    row = next(csv.DictReader(io.StringIO(done.stdout)))
    assert (row["score"], row["k"]) == (str(answer.json()["results"][0]["score"]), "3")
    named = run("score", folder / "0.png", "--repository", ppca_root, "--score", "iwae")
    assert next(csv.DictReader(io.StringIO(named.stdout)))["k"] == "16"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_further_scores_are_columns_with_the_answers_of_the_route(folder, ppca_root, tmp_path, suffix):
    out = tmp_path / f"scores.{suffix}"
    done = run("score", folder / "0.png", "--repository", ppca_root, "--also", "iwae", "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "note:" not in done.stderr
    with serving(ppca_root) as client:
        content = (folder / "0.png").read_bytes()
        answer = client.post("/v1/score?also=iwae", content=content, headers={"content-type": "image/png"}).json()
    row = {
        "csv": lambda: next(csv.DictReader(io.StringIO(out.read_text()))),
        "jsonl": lambda: json.loads(out.read_text()),
        "parquet": lambda: parquet.read_table(out).to_pylist()[0],
    }[suffix]()
    expected = answer["results"][0]["also"]["iwae"]
    assert (float(row["iwae_score"]), float(row["iwae_p_value"])) == (expected["score"], expected["p_value"])


def test_a_group_that_is_not_there_is_refused(folder, ppca_root):
    done = run("score", folder / "0.png", "--repository", ppca_root, "--group", "left")
    assert done.exit_code == 1
    assert "no calibration of group 'left'" in done.stderr


def test_why_there_is_no_verdict_is_said_once(folder, ppca_root, monkeypatch):
    monkeypatch.setenv("VAESERVE_FALSE_POSITIVE_RATE", "0.0001")
    done = run("score", *[folder / "0.png"] * 70, "--repository", ppca_root, "--also", "all")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("note: no is_anomaly: a false-positive rate of 0.0001 needs at least 9999") == 1
    assert {row["is_anomaly"] for row in csv.DictReader(io.StringIO(done.stdout))} == {""}


def test_strict_skips_images_of_another_size(folder, ppca_root):
    Image.new("L", (9, 8)).save(folder / "deep/wide.png")
    assert run("score", folder / "deep", "--repository", ppca_root).exit_code == 0
    done = run("score", folder / "deep", "--repository", ppca_root, "--strict")
    assert done.exit_code == 3
    assert "8×8 expected (strict)" in " ".join(done.stderr.split())


def test_score_prints_csv_without_out(folder, ppca_root):
    done = run("score", folder / "0.png", folder / "2.png", "--repository", ppca_root)
    assert done.exit_code == 0
    assert [row["file"] for row in csv.DictReader(io.StringIO(done.stdout))] == [
        str(folder / "0.png"),
        str(folder / "2.png"),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["{folder}", "--out", "a.xlsx"], ".parquet"),
        (["{folder}", "--out", "{folder}/missing/a.csv"], "does not exist"),
        (["{folder}", "--out", "{folder}/folder.csv"], "is a folder"),
        (["{folder}", "--estimator", "mse"], "estimator: Input should be 'elbo', 'iwae', 'reconstruction' or 'rate'"),
        (["{folder}", "--k", "0"], "k: Input should be greater"),
        (["{folder}", "--score", "other"], "'other' is not defined by this bundle: elbo, iwae"),
        (["{folder}", "--model", "other"], "no model 'other'"),
        (["{folder}", "--false-positive-rate", "0.0001"], "9999"),
        (["{folder}/deep/er/../../../empty"], "does not exist"),
    ],
)
def test_score_refuses_in_one_line(folder, ppca_root, arguments, text):
    filled = [argument.replace("{folder}", str(folder)) for argument in arguments]
    done = run("score", *filled, "--repository", ppca_root)
    assert done.exit_code == 1
    assert text in done.stderr
    assert "Traceback" not in done.output


def test_parquet_without_pyarrow_says_what_to_install(folder, ppca_root, tmp_path):
    program = (
        "import sys; sys.modules['pyarrow'] = None; from service.__main__ import main;"
        f"sys.argv = ['vaeserve', 'score', {str(folder)!r}, '--out', {str(tmp_path / 'a.parquet')!r},"
        f" '--repository', {str(ppca_root)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vaeserve[parquet]" in done.stderr


def test_check_says_ok_or_what_is_wrong(ppca_path, tmp_path):
    good = run("check", ppca_path)
    assert good.exit_code == 0
    assert "parity" in good.stdout
    path, _ = write_ppca_bundle(tmp_path)
    (path / "joint.onnx").write_bytes(b"damaged")
    bad = run("check", path)
    assert bad.exit_code == 1
    assert "FAIL" in bad.stdout
    assert "joint.onnx" in bad.stdout
    assert run("check", tmp_path / "nothing").exit_code == 1


def test_models_lists_the_bundles(ppca_root, tmp_path):
    done = run("models", "--repository", ppca_root)
    assert done.exit_code == 0
    assert "ppca" in done.stdout
    assert run("models", "--repository", tmp_path).exit_code == 1


def test_models_names_bundles_whole_on_a_narrow_screen(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-name-of-" + "x" * 50
    write_ppca_bundle(tmp_path, name)
    assert name in run("models", "--repository", tmp_path).stdout


def test_a_misspelt_variable_is_an_error_everywhere(monkeypatch, ppca_root, folder):
    monkeypatch.setenv("VAESERVE_REPOSITRY", "x")
    for arguments in (["score", folder], ["models"], ["serve"]):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "VAESERVE_REPOSITORY" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--seconds", "3"), ("--help",)])
def test_the_command_that_was_removed_says_what_stands_in_its_place(arguments):
    done = run("autotune", *arguments)
    assert done.exit_code == 1
    assert "autotune is no more: vaeserve serve --workers auto" in done.stderr
    assert "autotune" not in run("--help").stdout
