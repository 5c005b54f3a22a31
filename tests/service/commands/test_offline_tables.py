"""vaeserve score on files of vectors: the service's own scores, and refusals in one line."""

from __future__ import annotations

import csv
import io

import pytest
from typer.testing import CliRunner

from service.commands.cli import app
from tests.service import linear_bundles as linear
from tests.service.http import npy, serving
from tests.service.tabular import as_csv, post, rows_of


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_vaeserve_score_reads_tables(linear_root, tmp_path, suffix):
    rows = rows_of("table", 70)
    good, bad = tmp_path / f"good.{suffix}", tmp_path / "bad.csv"
    good.write_bytes(npy(rows) if suffix == "npy" else as_csv(rows, linear.FEATURES).encode())
    bad.write_text("1,2,3,4\n1,2,3\n")
    arguments = ["score", str(tmp_path), "--model", "table", "--repository", str(linear_root)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3
    assert "bad.csv: row 1 has 3 values" in " ".join(done.stderr.split())
    assert "70 scored, 1 skipped" in done.stderr
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    with serving(linear_root, default_model="table") as client:
        results = post(client, "table", "score", rows).json()["results"]
    assert [row["row"] for row in table] == [str(index) for index in range(70)]
    assert [row["score"] for row in table] == [str(result["score"]) for result in results]
    assert [row["p_value"] for row in table] == [str(result["p_value"]) for result in results]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("pca", ["--estimator", "elbo"], "no likelihood"),
        ("table", ["--estimator", "mse"], "estimator: Input should be"),
    ],
)
def test_vaeserve_score_refuses_in_one_line(linear_root, tmp_path, name, arguments, words):
    (tmp_path / "rows.csv").write_text(as_csv(rows_of(name)))
    done = CliRunner().invoke(
        app, ["score", str(tmp_path), "--model", name, "--repository", str(linear_root), *arguments]
    )
    assert done.exit_code == 1
    assert words in done.stderr


@pytest.mark.parametrize(("fault", "words"), [("a bad row", "row 1 has 3 values"), ("unreadable", "Errno")])
def test_vaeserve_calibrate_names_the_table_that_cannot_be_read(linear_root, tmp_path, fault, words):
    (tmp_path / "good.csv").write_text(as_csv(rows_of("table")))
    bad = tmp_path / "table.csv"
    if fault == "unreadable":
        bad.symlink_to("/proc/self/mem")
    else:
        bad.write_text("1,2,3,4\n1,2,3\n")
    arguments = ["calibrate", "table", str(tmp_path), "--repository", str(linear_root), "--to", str(tmp_path / "to")]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"vaeserve: {bad}: " in done.stderr
    assert words in done.stderr


def test_vaeserve_score_says_which_files_it_looks_for(linear_root, tmp_path):
    done = CliRunner().invoke(app, ["score", str(tmp_path), "--model", "pca", "--repository", str(linear_root)])
    assert done.exit_code == 1
    assert "no CSV or npy file found there" in done.stderr
