"""Comparison: a row a run, dashes for what a run has not; runs that cannot be compared are refused."""

import csv
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from service.bundle.input_rules import Preprocessing
from tests.training.finished import finished_run
from tests.training.shared import copied
from training import compare as module
from training.cli import app
from training.compare import FIGURE, SHEET, TABLE, compare, parameters, resolve
from training.config import load_config, presets
from training.console import evaluate_stage
from training.errors import ConfigError
from training.models.registry import build_model
from training.reporting.comparison import Row, rate_distortion, sheet, table

SMALL = {"kind": "mlp", "hidden": [8]}


def row(name, **changes):
    values = {
        "name": name,
        "family": "vae",
        "likelihood": "bernoulli, dynamic",
        "exact": False,
        "k": 5000,
        "images": 10_000,
        "log_likelihood": -84.5,
        "standard_error": 0.21,
        "bits_per_dim": 0.15549,
        "bits_standard_error": 0.00039,
        "elbo": -87.25,
        "bound_gap": 2.75,
        "rate": 25.0,
        "distortion": 62.25,
        "parameters": 1_234_567,
        "training_seconds": 125.0,
        "milliseconds": 1.234,
    }
    return Row(**(values | changes))


NOTHING = dict.fromkeys(
    (
        "log_likelihood",
        "standard_error",
        "bits_per_dim",
        "bits_standard_error",
        "elbo",
        "bound_gap",
        "rate",
        "distortion",
    )
)
AUTOENCODER = row("ae", family="autoencoder", likelihood="squared_error", k=1, **NOTHING)
FLOW = row("glow", family="flow", likelihood="delta", exact=True, k=1, bound_gap=None, rate=None, distortion=None)


def cells(text):
    """Rows of the Markdown table, the rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:1] + lines[2:]]


def test_the_table_puts_the_best_first_and_dashes_where_nothing_is():
    rows = [AUTOENCODER, row("worse", log_likelihood=-90.0), row("better"), FLOW]
    header, *body = cells(table(rows, "mnist"))
    assert [line[0] for line in body] == ["better", "glow", "worse", "ae"]
    assert {len(line) for line in body} == {len(header)}
    better = dict(zip(header, body[0], strict=True))
    assert better["log p(x), nats"] == "−84.50 ± 0.21 (k = 5,000)"
    assert better["bits/dim"] == "0.1555 ± 0.0004"
    assert (better["elbo, nats"], better["bound gap, nats"]) == ("−87.25", "2.75")
    assert (better["parameters"], better["training"], better["ms an image"]) == ("1,234,567", "2 min", "1.23")
    assert "(exact)" in dict(zip(header, body[1], strict=True))["log p(x), nats"]
    assert body[3][3:7] == ["–"] * 4
    assert body[3][7:] == ["1,234,567", "2 min", "1.23"]


def test_the_sheet_is_unrounded_and_empty_where_nothing_is():
    first, second = csv.DictReader(io.StringIO(sheet([row("a", elbo=-87.123456789), AUTOENCODER])))
    assert float(first["elbo"]) == -87.123456789
    assert second["log_likelihood"] == ""
    assert second["milliseconds"] == "1.234"


def test_the_figure_has_a_point_for_each_model_with_a_rate_and_lines_of_equal_elbo():
    (ax,) = rate_distortion([row("a"), row("b", rate=20.0, distortion=70.0), AUTOENCODER, FLOW]).axes
    points = np.concatenate([np.asarray(scatter.get_offsets()) for scatter in ax.collections])
    np.testing.assert_allclose(points, [[25, 62.25], [20, 70]])
    assert ax.lines
    for line in ax.lines:
        sums = np.sum(line.get_data(), axis=0)
        np.testing.assert_allclose(sums, sums[0])
    assert len(rate_distortion([row("alone")]).axes[0].collections) == 1


def test_the_figure_has_a_panel_for_each_kind_of_likelihood_and_leaves_bijections_out():
    gaussian = row("ppca", likelihood="gaussian", exact=True, rate=118.0, distortion=-700.0)
    bijection = row("glow", likelihood="delta", exact=True, rate=900.0, distortion=-3000.0)
    binary, density = rate_distortion([row("a"), gaussian, bijection]).axes
    assert "bernoulli" in binary.get_title()
    assert "gaussian" in density.get_title()
    assert len(binary.collections) == len(density.collections) == 1
    assert np.asarray(density.collections[0].get_offsets()).tolist() == [[118.0, -700.0]]
    assert not any(text.get_text() in ("-0", "−0") for ax in (binary, density) for text in ax.texts)


def test_a_preset_becomes_a_run_of_its_own_name_and_a_folder_is_taken_up(tmp_path):
    run, launch = resolve("mnist", ["seed=3"], "fashion-mnist", tmp_path)
    assert (str(run.folder), run.name, launch.preset) == (
        "runs/mnist-fashion-mnist",
        "mnist-fashion-mnist",
        "mnist",
    )
    assert (run.config.seed, run.config.data.source, run.config.data.directory) == (3, "fashion-mnist", tmp_path)
    assert resolve("digits", [], None, None)[0].folder.name == "digits"
    assert resolve("mnist", [], "mnist", None)[0].name == "mnist"
    there = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2})
    assert resolve(str(there.folder), ["seed=3"], None, None) == (there, None)
    with pytest.raises(ConfigError, match=r"neither a run's folder nor a preset: expected one of .*mnist"):
        resolve("nowhere", [], None, None)
    assert "mnist" in presets()


@pytest.mark.parametrize(
    ("family", "likelihood", "count"), [("ppca", "gaussian", 4 * 2 + 4 + 1), ("ica", "delta", 16 + 4)]
)
def test_parameters_of_a_closed_form_are_what_it_was_solved_for(family, likelihood, count):
    """W, μ and σ of PPCA; W and the centre of ICA; nothing that is derived from them."""
    config = load_config(
        None, [f"model.family={family}", f"model.likelihood.family={likelihood}", "model.latent_dim=2"]
    )
    assert parameters(build_model(Preprocessing(mode="L", height=2, width=2), config.model)) == count


def test_runs_of_different_data_are_refused_before_anything_is_computed(tmp_path):
    folders = [
        str(finished_run(tmp_path / name, shape, {"latent_dim": 2}).folder)
        for name, shape in (("a", (1, 3, 4)), ("b", (1, 5, 4)))
        if not (tmp_path / name).mkdir()
    ]
    with pytest.raises(ConfigError, match="different images or splits"):
        compare(folders, [], None, None, tmp_path / "to", Console(file=io.StringIO()))
    assert not (tmp_path / "to").exists()


def test_two_runs_become_a_table_a_sheet_and_a_figure(fitted_family, tmp_path, monkeypatch):
    vae = copied(fitted_family("vae, Householder, continuous Bernoulli").run, tmp_path / "bound")
    autoencoder = copied(fitted_family("autoencoder").run, tmp_path / "none")
    before = evaluate_stage(vae, Console(file=io.StringIO()))
    evaluated = []
    monkeypatch.setattr(
        module, "evaluate_stage", lambda run, console: evaluated.append(run.folder) or evaluate_stage(run, console)
    )
    done = CliRunner().invoke(
        app, ["compare", str(vae.folder), str(autoencoder.folder), "--to", str(tmp_path / "to")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "to" / TABLE)
    assert evaluated == [autoencoder.folder], "what was measured before is not measured again"
    first, second = csv.DictReader(io.StringIO((tmp_path / "to" / SHEET).read_text()))
    assert float(first["log_likelihood"]) == before["log_likelihood"]
    assert int(first["parameters"]) == sum(p.numel() for p in vae.model.parameters())
    assert float(first["training_seconds"]) == vae.checkpoint["state"]["seconds"]
    assert second["log_likelihood"] == second["rate"] == ""
    assert float(first["milliseconds"]) > 0
    assert min(Image.open(io.BytesIO((tmp_path / "to" / FIGURE).read_bytes())).size) > 100
    assert str(tmp_path) not in (tmp_path / "to" / TABLE).read_text()
