"""The card of what is no VAE of images: it says what the manifest says, and nothing that only images or bounds have."""

from pathlib import Path

import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import Calibration, Manifest, Provenance
from tests.service.linear_bundles import FEATURES, write_all
from training.reporting.card import card

METRICS = {
    "table": {"log_likelihood": -12.5, "log_likelihood_standard_error": 0.5, "elbo": -12.5, "rate": 3.0, "k": 1},
    "mixture": {"log_likelihood": -7.25, "elbo": -8.0, "k": 500},
    "pca": {"reconstruction_error": 1.5, "k": 1},
    "whitening": {"log_likelihood": -9.0, "k": 1},
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[str, Manifest]:
    root: Path = write_all(tmp_path_factory.mktemp("bundles"))
    return {name: open_bundle(root / name / "1").manifest for name in METRICS}


def written(manifests: dict[str, Manifest], name: str) -> str:
    manifest = manifests[name]
    rows = f"{manifest.preprocessing.kind}s"
    provenance = Provenance(
        data={"name": name, rows: 1234, "splits": {"train": 1000, "test": 234}},
        metrics={"test": {**METRICS[name], "images": 234}},
        training={"steps": 0, "seconds": 2.0},
    )
    return card(manifest.model_copy(update={"provenance": provenance}), {"reconstructions": "figures/r.png"})


@pytest.mark.parametrize("name", METRICS)
def test_rows_are_called_by_their_kind(manifests, name):
    text, kind = written(manifests, name), manifests[name].preprocessing.kind
    assert f"1,234 {kind}s" in text
    assert f"234 {kind}s of the test split" in text
    assert f"Test {kind}s and their reconstructions" in text
    assert "Fingerprint over numbers" in text
    assert "Solved in one go" in text
    for word in ("image", "pixel", "camera", "{", "}"):
        assert word not in text


@pytest.mark.parametrize(
    ("name", "says", "never"),
    [
        (
            "table",
            ["log p(x) is exact", "| log p(x), exact (nats) | -12.500 |", "`mass, dry`"],
            ["IWAE", "Monte-Carlo"],
        ),
        (
            "mixture",
            ["bounded from below", "IWAE-500 bound (nats) | -7.250 |", "(channels × steps)", "Monte-Carlo"],
            ["exact", "N(0, I)"],
        ),
        ("pca", ["no prior", "no likelihood", "| 1.500 |", "z a function of x"], ["log p(x)", "nats", "Likelihood is"]),
        ("whitening", ["log p(x) is exact", "density over the numbers in their own units"], ["IWAE", "in [0, 1]"]),
    ],
)
def test_the_card_says_what_kind_of_model_it_is(manifests, name, says, never):
    text = written(manifests, name)
    for part in says:
        assert part in text
    what = text.partition("## How it was trained")[0] + text.partition("## Limitations")[2]
    for part in never:
        assert part not in what


def test_features_stand_in_their_order(manifests):
    text = written(manifests, "table")
    assert ", ".join(f"`{name}`" for name in FEATURES) in text


def test_every_score_has_its_rates_the_default_first(manifests):
    manifest = manifests["table"]
    extra = manifest.scores[manifest.default_score].model_copy(update={"description": "log q(z|x)", "k": 3, "seed": 9})
    calibration = Calibration(
        split="calibration",
        n=300,
        n_test=100,
        quantiles={},
        realised_false_positive_rate={
            "other": {"0.01": 0.03, "0.1": 0.2},
            manifest.default_score: {"0.01": 0.0, "0.1": 0.08},
        },
    )
    scores = {"other": extra, **manifest.scores}
    text = written({"table": manifest.model_copy(update={"scores": scores, "calibration": calibration})}, "table")
    lines = text.splitlines()
    at = lines.index("| score | what it is | 1.0% | 10.0% |")
    assert lines[at + 2].startswith(f"| **{manifest.default_score}** |")
    assert lines[at + 2].endswith("| 0.00% | 8.00% |")
    assert r"| other | log q(z\|x); k = 3, seed 9 | 3.00% | 20.00% |" in lines
    assert "| chance |  | ± 1.15% | ± 3.46% |" in lines
