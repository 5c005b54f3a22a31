"""Report and card: figures of the right numbers, one page that needs nothing else, nothing of this machine."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import training.reporting.report
from service.bundle.files import open_bundle
from service.bundle.manifest import Manifest
from service.errors import BundleError
from service.inference import noise
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.verification import verify_bundle
from tests.training.finished import finished_run
from tests.training.shared import copied
from training.config import ModelConfig, PriorConfig
from training.console import evaluate_stage
from training.data.batches import to_unit
from training.errors import ExportError
from training.export.graphs import likelihood
from training.export.graphs import posterior as posterior_of
from training.export.provenance import cpu_model, evaluate_command, fit_command, public_config
from training.export.staging import score_definitions
from training.models.vae import VAE
from training.publishing import publish
from training.reporting.card import FIGURES, card, duration
from training.reporting.figures import CELL, FRAME, GAP, latent_scatter, png, score_histogram, tile
from training.reporting.report import caption, draw, information, plane_values, posterior, report, rounded, thresholds
from training.runs import SCORES, Launch


@pytest.fixture(scope="module")
def run(calibrated_run, tmp_path_factory):
    return copied(calibrated_run, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    return report(run)


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    evaluate_stage(run, Quiet(), k=5, images=40)
    return publish(run, tmp_path_factory.mktemp("exported"))


def Quiet():  # noqa: N802  # a console that goes nowhere
    from rich.console import Console

    return Console(file=io.StringIO())


class Sources(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.images, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if tag == "img" and name == "src" and value.startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href", "srcset", "data", "action"):
                self.fetched.append(value)


def test_the_page_holds_every_figure_and_fetches_nothing(run, page):
    text = page.read_text()
    found = Sources()
    found.feed(text)
    assert found.fetched == []
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    files = {path.read_bytes() for path in page.parent.glob("*.png")}
    assert files == set(found.images)
    names = {path.stem for path in page.parent.glob("*.png")}
    expected = {"loss", "reconstructions", "samples", "traversal", "rate", "aggregate"}
    expected |= {f"score-{name}" for name in open_bundle(run.staged).manifest.scores}
    assert names == expected | {"latent"}, "a plane also has its scatter and its manifold, in one picture"
    assert all(min(Image.open(io.BytesIO(data)).size) > 100 for data in files)
    assert str(run.folder.parents[1]) not in text
    assert str(Path(run.config.data.source).parent) not in text


def test_reports_are_repeatable(run, page):
    before = page.read_bytes()
    assert report(run).read_bytes() == before


def test_report_and_publish_name_the_stage_that_is_missing(tmp_path):
    bare = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2})
    with pytest.raises(ExportError, match="vaetrain export"):
        report(bare)
    with pytest.raises(ExportError, match="vaetrain evaluate"):
        publish(bare, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_grids_show_pixels_on_one_scale():
    """A dark grid stays dark: nothing is stretched to the images' own range."""
    images = np.stack([np.full((1, 8, 8), 0.25), np.full((1, 8, 8), 0.5), np.full((1, 8, 8), 1.7)])
    canvas = tile(images, columns=2)
    zoom = CELL // 8
    assert canvas.shape == (2 * 8 * zoom + GAP, 2 * 8 * zoom + GAP, 1)
    assert canvas[0, 0] == 0.25
    assert canvas[0, -1] == 0.5
    assert canvas[-1, 0] == 1.0
    assert canvas[8 * zoom, 0] == canvas[-1, -1] == FRAME, "a white picture is told from what is around it"


@torch.no_grad()
def test_the_report_sees_images_as_the_service_does(run):
    x = to_unit(run.dataset.pixels(run.dataset.splits["test"][:5]))
    target, loc, scale = posterior(run.model, x, seed=3)
    served = Model.load(open_bundle(run.staged), Runtime("cpu")).encode(x.numpy(), seed=3)
    np.testing.assert_allclose(loc, served.loc, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale, served.scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(target, noise.dither(3, run.model.shape) < x.numpy())


def test_images_go_through_the_encoder_in_batches_and_each_once(run):
    sizes = []
    counting = run.model.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    draw(run, open_bundle(run.staged).manifest)
    counting.remove()
    assert len(run.dataset.splits["test"]) == 270
    assert sorted(sizes) == [10, 20, 250], "the ten that are shown, then all"


def described(run):
    """The manifest's parts that the report reads, without a bundle; and scores as calibration would leave them."""
    scores = score_definitions(run.model, run.config.score)
    random = np.random.RandomState(0)
    kinds = [f"{split}.{name}" for split in ("calibration", "test") for name in scores]
    np.savez(run.folder / SCORES, **{kind: np.sort(random.normal(size=200)) for kind in kinds})
    return Manifest.model_construct(
        name="tiny",
        preprocessing=run.dataset.preprocessing,
        evidence=run.model.evidence,
        posterior=posterior_of(run.model),
        likelihood=likelihood(run.model),
        scores=scores,
        default_score=next(iter(scores)),
    )


LATENTS = {"reconstructions", "samples", "traversal", "latent", "loss"}
SMALL = {"kind": "mlp", "hidden": [8]}
FLOW = {"family": "flow", "flow": {"steps": 2, "hidden": 8}, "likelihood": {"family": "delta"}}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("shape", "model", "data", "expected"),
    [
        ((1, 6, 5), FLOW, {}, {"loss", "samples", "score-elbo"}),
        (
            (1, 6, 5),
            {"family": "autoencoder", "latent_dim": 2, "network": SMALL, "likelihood": {"family": "squared_error"}},
            {},
            LATENTS | {"score-reconstruction"},
        ),
        (
            (7,),
            {"latent_dim": 2, "network": SMALL, "likelihood": {"family": "gaussian"}},
            {},
            LATENTS | {"rate", "aggregate", "score-elbo", "score-iwae"},
        ),
        (
            (2, 9),
            {"latent_dim": 2, "network": SMALL, "likelihood": {"family": "gaussian"}, "prior": {"family": "flow"}},
            {"kind": "signal"},
            LATENTS | {"rate", "aggregate", "score-elbo", "score-iwae"},
        ),
        (
            (1, 6, 5),
            {"latent_dim": 3, "network": SMALL, "prior": {"family": "vamp", "components": 4}},
            {},
            LATENTS - {"latent"} | {"rate", "aggregate", "score-elbo", "score-iwae"},
        ),
    ],
    ids=["flow", "autoencoder", "vectors", "signals", "vamp"],
)
def test_each_family_has_the_figures_that_say_something_of_it(tmp_path, shape, model, data, expected):
    dtype = np.uint8 if len(shape) == 3 else np.float32
    run = finished_run(tmp_path, shape, model, dtype=dtype, data=data)
    manifest = described(run)
    if model.get("family") == "autoencoder":
        expected = expected - {"samples"} if run.model.prior.family == "none" else expected
    drawn = draw(run, manifest)
    assert set(drawn) == expected
    for name, figure in drawn.items():
        assert png(figure).startswith(b"\x89PNG")
        assert caption(name, manifest)


def test_samples_of_a_model_without_a_prior_of_its_own_are_told_as_ex_post(tmp_path):
    model = {"family": "autoencoder", "latent_dim": 2, "network": SMALL, "likelihood": {"family": "squared_error"}}
    manifest = described(finished_run(tmp_path, (1, 6, 5), model))
    assert "ex post" in caption("samples", manifest)
    assert "posterior" not in caption("reconstructions", manifest)
    assert "ex post" not in caption("samples", manifest.model_copy(update={"evidence": "bound"}))


def test_the_plane_goes_by_the_priors_quantiles_or_by_the_codes_range():
    loc = np.random.RandomState(0).uniform([-5, 2], [-1, 3], (4000, 2))
    first, second = plane_values(loc, True, 5)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, [-2.3263, -0.6588, 0, 0.6588, 2.3263], atol=1e-3)
    first, second = plane_values(loc, False, 5)
    np.testing.assert_allclose(first, [-4.96, -3.98, -3, -2.02, -1.04], atol=0.05)
    np.testing.assert_allclose(second[[0, -1]], [2.01, 2.99], atol=0.02)


def test_what_a_dimension_tells_is_its_rate_under_a_standard_normal_prior():
    loc, scale = 2 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)), torch.full((5000, 2), 0.5)
    loc[:, 1], scale[:, 1] = 0, 1
    vae = VAE((1, 3, 4), ModelConfig(latent_dim=2))
    found, kind = information(vae, loc, scale)
    assert kind == "rate"
    np.testing.assert_allclose(found, [0.5 * (4 + 0.25 - 1) - np.log(0.5), 0], atol=0.1)
    learned = VAE((1, 3, 4), ModelConfig(latent_dim=2, prior=PriorConfig(family="flow")))
    found, kind = information(learned, 7 * loc + 3, 7 * scale)
    assert kind == "information"
    np.testing.assert_allclose(found, [0.5 * np.log(4.25 / 0.25), 0], atol=0.05), "whatever the units of z"


@pytest.mark.parametrize(
    ("value", "text"),
    [(-84.83217, "-84.83"), (1000.0, "1,000"), (12345.678, "12,345.68"), (0.0123456, "0.0123"), (0.0, "0"), (7, "7")],
)
def test_numbers_have_the_digits_that_they_are_good_for(value, text):
    assert rounded(value) == text


def test_tables_have_headers_and_one_row_a_score(published):
    manifest = open_bundle(published).manifest
    text = training.reporting.report.page(manifest, {})
    for header in ("metric", "value", "score", "asked 1%", "asked 5%", "output", "largest |Δ|"):
        assert re.search(rf"<th[^>]*>{re.escape(header)}</th>", text), header
    tables = re.findall(r"<table>.*?</table>", text)
    assert len(tables) == 3
    assert tables[1].count("<tr>") == 1 + len(manifest.scores)
    numbers = re.findall(r"<td class='number'>([^<]*)</td>", text)
    assert all(len(re.sub(r"\D", "", number)) <= 6 for number in numbers), numbers


def test_the_scatter_shows_where_the_pictures_of_the_plane_are():
    loc, values = np.random.RandomState(0).normal(size=(50, 2)), ([-2.0, -0.5, 0.5, 2.0], [-3.0, -1.0, 1.0, 3.0])
    ax = latent_scatter(loc, None, [], values, every=2).axes[0]
    lines = [line.get_xydata() for line in ax.lines]
    assert [line[0, 0] for line in lines if line[0, 0] == line[1, 0]] == [-2.0, 0.5]
    assert [line[0, 1] for line in lines if line[0, 1] == line[1, 1]] == [-3.0, 1.0]


def test_a_histogram_without_thresholds_can_be_drawn():
    scores = np.random.RandomState(0).normal(size=9)
    assert png(score_histogram(scores, scores + 1, {}, "elbo")).startswith(b"\x89PNG")


def test_thresholds_that_too_few_images_can_answer_are_left_out():
    from service.calibration.conformal import Calibrator

    assert set(thresholds(Calibrator({"elbo": np.arange(50.0)}), "elbo")) == {0.05}


def test_the_published_bundle_verifies_and_is_numbered_on(run, published):
    bundle = open_bundle(published)
    assert verify_bundle(published).ok
    assert (bundle.manifest.name, bundle.manifest.version) == ("tiny", "1")
    assert {f"figures/{key}.png" for key in FIGURES} | {"README.md"} <= set(bundle.manifest.files)
    assert publish(run, published.parents[1]).name == "2"
    assert publish(run, published.parents[1], "7").name == "7"
    with pytest.raises(BundleError, match="never overwritten"):
        publish(run, published.parents[1], "7")


def test_the_card_says_what_the_manifest_says(run, published):
    manifest, text = open_bundle(published).manifest, (published / "README.md").read_text()
    assert manifest.provenance.metrics["test"]["images"] == 40
    assert f"{manifest.provenance.metrics['test']['log_likelihood']:.3f}" in text
    assert "`vaetrain evaluate runs/tiny --k 5 --images 40`" in text
    assert "vaetrain fit --data tiny.npy --set model.latent_dim=3\n" in text
    assert manifest.provenance.data["fingerprint"] in text
    for name, error in manifest.reference.max_abs_error.items():
        assert f"| `{name}` | {error:.2e} |" in text
    for rates in manifest.calibration.realised_false_positive_rate.values():
        assert all(f"{found:.2%}" in text for found in rates.values())
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == len(FIGURES)
    assert all((published / name).is_file() for name in linked)


def test_the_cards_tables_are_whole(published):
    """Every row of a table has as many cells as its header, bars within cells escaped."""
    tables = re.findall(r"(?:^\|.*\n)+", (published / "README.md").read_text(), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(cell.strip() for row in rows for cell in row if row[0].strip() != "chance")


def test_nothing_of_this_machine_is_published(run, published):
    for file in [path for path in published.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        for needle in (
            run.folder.parents[1],
            Path(run.config.data.source).parent,
            Path(__file__).parents[2],
            Path.home(),
        ):
            assert str(needle).encode() not in data, file.name
    assert "directory" not in public_config(run.config)["data"]


def test_a_card_of_an_uncalibrated_manifest_promises_no_p_values(published):
    manifest = open_bundle(published).manifest.model_copy(update={"calibration": None})
    assert "p-value" not in card(manifest, {})


def test_commands_are_told_without_directories(run):
    launch = Launch(
        data="/home/someone/cats",
        preset="/home/someone/my.toml",
        name="cats",
        overrides=["data.directory=/secret", "data.source=/home/someone/dogs", "model.latent_dim=4"],
    )
    assert fit_command(launch) == (
        "vaetrain fit --data cats --preset my.toml --name cats --set data.source=dogs --set model.latent_dim=4"
    )
    assert fit_command(Launch(preset="mnist", data="mnist")) == "vaetrain fit --data mnist --preset mnist"
    assert evaluate_command(run).startswith("vaetrain evaluate runs/tiny --k ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (125, "2 min"), (3599, "1 h 0 min"), (7300, "2 h 2 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_processor_is_named_or_its_architecture(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2GHz\nflags : a\n")
    assert cpu_model(file) == "Example CPU @ 2GHz"
    assert cpu_model(tmp_path / "none")
