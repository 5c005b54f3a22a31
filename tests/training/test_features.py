"""From the command line to HTTP: a small classifier, trained here, frozen before PPCA, a VAE and a flow."""

import io
import math
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from typer.testing import CliRunner

from service.bundle.files import open_bundle, write_bundle
from service.errors import BundleFormatError, BundleParityError
from service.inference.device_binding import BoundSession
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.verification import open_verified, verify_bundle
from service.pixels import unit_levels
from tests.service.http import assert_problem, npy, serving
from tests.service.inference.test_device_binding import Bound
from training.cli import app
from training.data.features import FEATURES, FOLDER
from training.errors import BackboneError
from training.export.graphs import _quiet_exporter
from training.export.staging import contents
from training.runs import Run

pytestmark = pytest.mark.integration  # each is of a run from its fit to its bundle

SIDE, INLIERS = 16, 6
QUICK = ["score.k=2", "evaluate.k=2", "run.threads=1"]
SPLITS = ["data.calibration=0.3", "data.validation=0.2", "data.limit=600"]
VAE = ["model.family=vae", "model.latent_dim=4", "model.network.hidden=[24]", "optimiser.epochs=8"]
FLOW = ["model.family=flow", "model.likelihood.family=delta", "model.flow.steps=2", "model.flow.hidden=16",
        "optimiser.epochs=8"]  # fmt: skip
MAPS = ["model.network.channels=[12]", "model.network.hidden=[24]", "model.latent_dim=8", "optimiser.epochs=10"]
CASES = {
    "ppca": ["--backbone-output", "pooled", "--set", "model.latent_dim=8"],
    "vae": ["--backbone-output", "pooled", *(word for text in VAE for word in ("--set", text))],
    "flow": ["--backbone-output", "pooled", *(word for text in FLOW for word in ("--set", text))],
    "map": ["--backbone-output", "map", "--preset", "feature-maps", *(word for t in MAPS for word in ("--set", t))],
}


class Classifier(nn.Module):
    """Grey images [N,1,16,16] -> a map [N,6,4,4], pooled features [N,24] and logits [N,6]."""

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 6, 3, 2, 1))
        self.late = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(24, INLIERS)

    def forward(self, x):
        places = self.early(x)
        pooled = self.late(places).flatten(1)
        return places, pooled, self.head(pooled)


@pytest.fixture(scope="module")
def digits():
    """uint8 [n,16,16] of the classes 0 to 5, which train and calibrate, their labels, and of 6 to 9, which never do."""
    bunch = load_digits()
    pixels = np.kron(np.round(bunch.images * 255 / 16).astype(np.uint8), np.ones((2, 2), np.uint8))
    inlier = bunch.target < INLIERS
    return pixels[inlier], bunch.target[inlier], pixels[~inlier]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, digits):
    """A folder with good images, one subfolder a class, and a classifier of them as classifier.onnx."""
    folder = tmp_path_factory.mktemp("features")
    images, labels, _ = digits
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / "good" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "good" / str(label) / f"{index}.png")
    exported(trained(images, labels), folder / "classifier.onnx")
    return folder


def trained(images, labels, steps=250):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Classifier()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = torch.from_numpy(unit_levels(images))[:, None], torch.from_numpy(labels)
    for step in range(steps):
        rows = torch.from_numpy(np.random.RandomState(step).randint(0, len(x), 64))
        loss = nn.functional.cross_entropy(model(x[rows])[2], y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def exported(model, path):
    with _quiet_exporter():
        torch.onnx.export(model, (torch.zeros(2, 1, SIDE, SIDE),), path, dynamo=True, external_data=False,
                          verbose=False, input_names=["images"], output_names=["map", "pooled", "logits"],
                          dynamic_shapes=({0: torch.export.Dim("batch")},))  # fmt: skip


def vaetrain(*words, cwd):
    before = Path.cwd()
    os.chdir(cwd)
    try:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    finally:
        os.chdir(before)


def fit(workplace, name, words, backbone="classifier.onnx"):
    options = [word for text in (*QUICK, *SPLITS) for word in ("--set", text)]
    data = workplace / "good"
    return vaetrain("fit", "--data", data, "--backbone", backbone, "--name", name, *words, *options, cwd=workplace)


@pytest.fixture(
    scope="module", params=["ppca", "map", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vae", "flow"))]
)
def published(request, workplace):
    """(name, the published bundle's folder)."""
    result = fit(workplace, request.param, CASES[request.param])
    assert result.exit_code == 0, result.output
    return request.param, workplace / "exported" / request.param / "1"


@pytest.fixture(scope="module")
def pooled(workplace):
    """The PPCA of pooled features, whether or not the tests of all cases ran before."""
    path = workplace / "exported/ppca/1"
    if not path.exists():
        result = fit(workplace, "ppca", CASES["ppca"])
        assert result.exit_code == 0, result.output
    return path


def directly(workplace, x, output):
    """Features by ONNX Runtime alone, of the user's own file."""
    return ort.InferenceSession(workplace / "classifier.onnx").run([output], {"images": x})[0]


def test_the_bundle_is_of_the_backbones_features(published, workplace):
    name, path = published
    assert verify_bundle(path).ok, verify_bundle(path).summary()
    manifest = open_bundle(path).manifest
    kind, natural, shape = ("map", (6, 4, 4), (6, 4, 4)) if name == "map" else ("vector", (24,), (1, 1, 24))
    assert (manifest.backbone.kind, manifest.backbone.natural, manifest.signature.shape) == (kind, natural, shape)
    assert manifest.preprocessing.shape == (1, SIDE, SIDE)
    assert manifest.reference.max_abs_error["backbone.features"] < 1e-5
    assert manifest.default_score == "combined"
    assert not {"complexity", "debiased"} & set(manifest.scores)
    assert manifest.calibration.n > 100
    assert manifest.provenance.config["backbone"]["path"] == "classifier.onnx"
    assert "--backbone classifier.onnx" in manifest.provenance.training["fit_command"]
    card = (path / "README.md").read_text()
    assert "a frozen network" in card
    assert "reconstructions" not in card
    assert str(workplace) not in card + (path / "manifest.json").read_text()


def test_scores_are_the_models_on_features_computed_by_onnxruntime_directly(published, workplace, digits):
    name, path = published
    model = Model.load(open_bundle(path), Runtime("cpu"))
    x = unit_levels(digits[0][:12])[:, None]
    features = directly(workplace, x, "map" if name == "map" else "pooled").reshape(12, *model.manifest.signature.shape)
    np.testing.assert_allclose(model.features(x), features, rtol=1e-4, atol=1e-5)
    for definition in ("elbo", "combined"):
        score = model.manifest.scores[definition]
        served, behind = model.score(x, score).score, model.without_backbone().score(features, score).score
        np.testing.assert_allclose(served, behind, rtol=1e-3, atol=1e-3)
    loc = model.without_backbone().encode(features).loc
    np.testing.assert_allclose(model.encode(x).loc, loc, rtol=1e-3, atol=1e-3)
    if name == "ppca":
        run = Run.open(workplace / "runs/ppca")
        target = run.model.likelihood.target(torch.from_numpy(features), None)
        wanted = run.model.log_marginal(target).detach().numpy()
        np.testing.assert_allclose(-model.score(x, model.manifest.scores["elbo"]).score, wanted, rtol=1e-4, atol=1e-3)


def test_rows_together_are_rows_alone_bitwise(published, digits):
    model = Model.load(open_bundle(published[1]), Runtime("cpu"))
    x = unit_levels(digits[0][:11])[:, None]
    alone = np.concatenate([model.score(row[None]).score for row in x])
    np.testing.assert_array_equal(model.score(x).score, alone)


def test_a_bound_model_runs_its_backbone_bound_too(published, digits):
    plain, bound = (Model.load(open_bundle(published[1]), kind("cpu")) for kind in (Runtime, Bound))
    x = unit_levels(digits[0][:11])[:, None]
    assert bound.features(x).tobytes() == plain.features(x).tobytes()
    assert bound._backbone._rows._run_session.__func__ is BoundSession.run


def test_classes_that_were_never_seen_score_higher(published, digits):
    """The flow sees 24 numbers under 8 epochs: what counts is that every family's score points the right way."""
    model = Model.load(open_bundle(published[1]), Runtime("cpu"))
    inliers, outliers = (unit_levels(images[:150])[:, None] for images in (digits[0], digits[2]))
    scores = np.concatenate([model.score(inliers).score, model.score(outliers).score])
    assert roc_auc_score(np.repeat([0, 1], 150), scores) > 0.55


def test_what_the_service_answers_and_what_it_refuses(published, workplace, digits):
    name, _ = published
    x = unit_levels(digits[0][:3])[:, None]
    with serving(workplace / "exported", default_model=name) as client:
        url = f"/v1/models/{name}"
        scored = client.post(f"{url}/score", content=npy(x), headers={"content-type": "application/x-npy"})
        assert scored.status_code == 200, scored.text
        model = Model.load(open_bundle(workplace / "exported" / name / "1"), Runtime("cpu"))
        np.testing.assert_array_equal([row["score"] for row in scored.json()["results"]], model.score(x).score)
        assert all(0 < row["p_value"] <= 1 and row["bits_per_dim"] is None for row in scored.json()["results"])
        encoded = client.post(f"{url}/encode", content=npy(x), headers={"content-type": "application/x-npy"})
        assert np.shape(encoded.json()["loc"]) == (3, model.manifest.signature.latent_dim)
        png = io.BytesIO()
        Image.fromarray(digits[2][0]).resize((40, 40)).convert("RGB").save(png, "PNG")
        assert client.post(f"{url}/score", content=png.getvalue(), headers={"content-type": "image/png"}).is_success
        latents = {"latents": encoded.json()["loc"]}
        for verb, body in (("decode", latents), ("interpolate", {"latents": latents["latents"][:2]}), ("sample", {})):
            problem = assert_problem(client.post(f"{url}/{verb}", json=body), 409)
            assert "frozen backbone's features" in problem["error"]
        assert_problem(client.get(f"{url}/sample"), 409)
        images = client.post(f"{url}/reconstruct", content=npy(x), headers={"content-type": "application/x-npy"})
        assert "frozen backbone's features" in assert_problem(images, 409)["error"]
        maps = client.post(f"{url}/score", params={"map": True}, content=npy(x),
                           headers={"content-type": "application/x-npy", "accept": "application/json"})  # fmt: skip
        if name == "map":
            assert np.shape(maps.json()["results"][0]["map"]) == (4, 4)
        else:
            assert "no places" in assert_problem(maps, 409)["error"]
        assert "decode" in client.get(url).json()["refused"]


def test_features_are_computed_once_and_the_stages_go_on_without_the_users_file(pooled, workplace, tmp_path):
    run = workplace / "runs/ppca"
    features = run / FOLDER / FEATURES
    before = features.stat().st_mtime_ns
    shutil.move(workplace / "classifier.onnx", tmp_path / "kept.onnx")
    try:
        for stage in ("export", "calibrate", "report"):
            assert vaetrain(stage, run, cwd=workplace).exit_code == 0
        refused = fit(workplace, "ppca", CASES["ppca"])
        assert refused.exit_code == 2
        assert "classifier.onnx: cannot be read" in refused.output
    finally:
        shutil.move(tmp_path / "kept.onnx", workplace / "classifier.onnx")
    assert features.stat().st_mtime_ns == before


def test_a_presets_dimension_adapts_to_the_features(workplace):
    """The preset's 32 would be more than the pooled features have."""
    words = ["--backbone-output", "pooled", "--set", "backbone.mean=0.5", "--fit-only"]
    done = fit(workplace, "adapted", words)
    assert done.exit_code == 0, done.stderr
    run = Run.open(workplace / "runs" / "adapted")
    assert run.config.model.latent_dim <= 12
    assert run.config.backbone.mean == [0.5]
    features = run.folder / FOLDER / FEATURES
    before = features.read_bytes()
    refused = fit(workplace, "adapted", [*words[:2], "--fit-only"])
    assert "made with another configuration (backbone.mean" in refused.output
    assert features.read_bytes() == before


def test_a_run_does_not_go_on_with_another_backbone(pooled, workplace, digits):
    exported(trained(digits[0], digits[1], steps=3), workplace / "other.onnx")
    result = fit(workplace, "ppca", CASES["ppca"], "other.onnx")
    assert result.exit_code == 2
    assert "made with another configuration (backbone.sha256" in result.output
    elsewhere = fit(workplace, "ppca", ["--backbone-output", "logits", *CASES["ppca"][2:]])
    assert "backbone.output" in elsewhere.output
    config = Run.open(workplace / "runs/ppca").config
    changed = config.backbone.model_copy(update={"path": str(workplace / "other.onnx")})
    with pytest.raises(BackboneError, match="has changed"):
        _ = Run(workplace / "runs/nowhere", config.model_copy(update={"backbone": changed})).backbone


def test_another_backbone_in_the_bundle_is_found_out(pooled, tmp_path):
    """Hashes hold the files together; where somebody signs anew, parity still tells."""
    manifest, files = contents(open_bundle(pooled))
    graph = onnx.load_model_from_string(files["backbone.onnx"])
    weight = max(graph.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    weight.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weight), weight.name))
    with pytest.raises(BundleParityError, match=r"backbone\.features differs"):
        write_bundle(tmp_path, manifest, files | {"backbone.onnx": graph.SerializeToString()}, verify=open_verified)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": None}, "signature.shape"),
        ({"graphs": "without"}, "one of graphs and described"),
        ({"signature": {"shape": [1, SIDE, SIDE], "latent_dim": 8, "noise_dim": 8}}, "is not backbone's"),
    ],
)
def test_a_manifest_that_contradicts_its_backbone_is_refused(pooled, tmp_path, change, words):
    manifest, files = contents(open_bundle(pooled))
    if change == {"graphs": "without"}:
        change = {"graphs": {role: file for role, file in manifest["graphs"].items() if role != "backbone"}}
    with pytest.raises(BundleFormatError, match=words):
        write_bundle(tmp_path, manifest | change, files)
