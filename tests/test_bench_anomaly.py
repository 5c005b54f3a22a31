"""The anomaly benchmark: transformations are what they say, masks are where images differ, detectors see inliers only,
and the command measures, resumes and reports."""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench.anomaly import tiled
from bench.anomaly.defects import DEFECTS, MIN_CHANGE, VISIBLE, NoRoomForDefect, with_defects
from bench.anomaly.figure import dots
from bench.anomaly.measures import auroc, pixel_auroc, rates, resplit
from bench.anomaly.ours import BundleMissing, Ours
from bench.anomaly.report import ROWS, by_pixel, markdown, matches, reduced, unseen
from bench.anomaly.results import Key, Record, Results, read_records
from bench.anomaly.rivals import RIVALS, LinearFloor, NearestNeighboursOnPixels, NotInstalled, PyodVAE, flat
from bench.anomaly.run import Fitted, main, makers_of, measure, parse, run
from bench.anomaly.surfaces import FLAWS, SURFACES, flawed, surfaces
from bench.anomaly.task import Inliers, Outliers, Task
from bench.anomaly.tasks import GROUPS, Part, Source, Suite, load_sources
from bench.anomaly.transforms import TRANSFORMS
from tests.ppca_bundle import images
from tests.service.corruption_bundles import log_odds, write_corruption

ROOT = Path(__file__).resolve().parent.parent
COUNT = 40


def drawing(label: int, random: np.random.RandomState) -> np.ndarray:
    """A bright bar on black, 28×28; its place tells the label."""
    image = np.zeros((28, 28), np.uint8)
    top, left = 3 + label, 5 + random.randint(4)
    image[top : top + 8, left : left + 14] = random.randint(120, 220, (8, 14))
    return image


def source(name: str, seed: int) -> Source:
    random = np.random.RandomState(seed)
    labels = np.arange(COUNT) % 10
    parts = [Part(np.stack([drawing(label, random) for label in labels])[:, None], labels) for _ in range(2)]
    return Source(name, *parts)


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {"mnist": source("mnist", 1), "fashion-mnist": source("fashion-mnist", 2)}


@pytest.fixture(scope="module")
def tasks(sources):
    return {task.name: task for task in Suite(sources)}


@pytest.fixture(scope="module")
def pictures(sources) -> np.ndarray:
    return sources["fashion-mnist"].test.images


def transformed(name: str, x: np.ndarray) -> np.ndarray:
    return TRANSFORMS[name](x, np.random.RandomState(3))


def test_a_quarter_turn_four_times_is_the_image(pictures):
    turned = transformed("rotated", pictures)
    np.testing.assert_array_equal(turned[0, 0, ::-1, 5], pictures[0, 0, 5])
    for _ in range(3):
        turned = transformed("rotated", turned)
    np.testing.assert_array_equal(turned, pictures)


def test_inversion_mirrors_the_levels(pictures):
    np.testing.assert_array_equal(transformed("inverted", pictures).astype(int) + pictures, 255)


def test_blur_spreads_a_point_as_a_gaussian_of_sigma_1_5():
    point = np.zeros((1, 1, 41, 41), np.uint8)
    point[0, 0, 20, 20] = 255
    spread = TRANSFORMS["blurred"](point, np.random.RandomState(0))[0, 0].astype(float)
    assert spread[20, 20] == round(255 / (2 * np.pi * 1.5**2))
    line = np.zeros((1, 1, 41, 41), np.uint8)
    line[0, 0, :, 20] = 255
    row = TRANSFORMS["blurred"](line, np.random.RandomState(0))[0, 0, 20].astype(float)
    assert np.sqrt((row * (np.arange(41) - 20) ** 2).sum() / row.sum()) == pytest.approx(1.5, abs=0.05)


def test_noise_has_the_deviation_that_is_said():
    grey = np.full((20, 1, 28, 28), 128, np.uint8)
    change = (transformed("noisy", grey).astype(float) - grey) / 255
    assert change.std() == pytest.approx(0.2, rel=0.03)
    assert abs(change.mean()) < 0.01


def test_noise_and_constants_forget_the_image(pictures):
    levels = transformed("uniform-noise", pictures)
    assert stats.kstest(levels.ravel() / 255, "uniform").statistic < 0.02
    flat_ones = transformed("constant", pictures)
    assert (flat_ones == flat_ones[:, :, :1, :1]).all()
    assert len(np.unique(flat_ones)) > COUNT / 2


def test_jpeg_shows_blocks_of_eight_pixels(pictures):
    coarse = transformed("jpeg", pictures).astype(int)
    assert coarse.shape == pictures.shape
    assert 2 < np.abs(coarse - pictures).mean() < 40
    steps = np.abs(np.diff(coarse, axis=3)).mean(axis=(0, 1, 2))
    inside = np.delete(steps, [7, 15, 23])
    assert steps[[7, 15, 23]].mean() > np.median(inside)


@pytest.mark.parametrize("kind", DEFECTS)
def test_masks_are_where_the_image_changed_and_can_be_seen(pictures, kind):
    found, masks = with_defects(pictures, kind, 0)
    change = np.abs(found[:, 0].astype(int) - pictures[:, 0])
    np.testing.assert_array_equal(masks, change > 0)
    assert change[masks].min() >= VISIBLE
    for image, mask in zip(change, masks, strict=True):
        assert mask.mean() >= 0.01
        assert mask.mean() < 0.4
        assert image[mask].mean() >= MIN_CHANGE
    assert len(np.unique(masks.sum((1, 2)))) > 5


def test_a_missing_part_is_black_and_was_not(pictures):
    found, masks = with_defects(pictures, "missing-part", 0)
    assert (found[:, 0][masks] < pictures[:, 0][masks]).all()
    assert np.median(found[:, 0][masks]) == 0


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects_are_a_function_of_the_seed(pictures, kind):
    first, again, other = (with_defects(pictures, kind, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    few = with_defects(pictures[:3], kind, 0)[1]
    if kind != "patch":  # the first image's neighbour, whose texture a patch may show, is another
        np.testing.assert_array_equal(few, with_defects(pictures, kind, 0)[1][:3])


def test_a_black_image_has_no_room_for_a_defect():
    with pytest.raises(NoRoomForDefect, match="image 0"):
        with_defects(np.zeros((1, 1, 28, 28), np.uint8), "blob", 0)


def test_every_task_of_the_table_is_there(tasks):
    groups = [task.group for task in tasks.values()]
    assert {group: groups.count(group) for group in GROUPS} == {
        "pairs": 16,
        "parity": 2,
        "one-class": 20,
        "defects": 4,
        "unseen": 2,
        "elsewhere": 0,
    }
    listed = [record(task.name, group=task.group) for task in tasks.values()]
    for row in ROWS:
        assert sum(matches(each, row.pattern) for each in listed) == row.count


@pytest.fixture(scope="module")
def untuned():
    return {task.name: task for task in Suite({}).select(["elsewhere"])}


def test_no_held_out_image_of_the_untuned_sets_is_one_to_fit_on(untuned):
    assert len(untuned) == 2 + 4 + 9
    for task in untuned.values():
        train = {image.tobytes() for image in task.inliers.train}
        plain = {image.tobytes() for image in task.inliers.held_out if image.std() > 8}  # not of an empty sky
        assert plain
        assert len(plain & train) == 0
        assert task.outliers().images.shape[1:] == task.inliers.train.shape[1:]


def test_flaws_of_surfaces_lie_within_their_masks(untuned):
    random = np.random.RandomState(0)
    for kind in SURFACES:
        good = surfaces(kind, 20, 32, random)
        for flaw in FLAWS:
            bad, masks = flawed(good, flaw, random)
            assert (bad[~masks] == good[~masks]).all()
            assert masks.any(axis=(1, 2)).all()
            assert np.abs(bad - good).max(axis=(1, 2)).min() > 0.03
            assert untuned[f"{kind}/{flaw}"].outliers().masks.shape == (250, 32, 32)
            if flaw == "worn":
                np.testing.assert_allclose(
                    [x[m].mean() for x, m in zip(bad, masks, strict=True)],
                    [x[m].mean() for x, m in zip(good, masks, strict=True)],
                )


def test_untuned_sets_are_a_function_of_the_seed(untuned):
    again, other = ({task.name: task for task in Suite({}, seed).select(["woven/*"])} for seed in (0, 1))
    for name in again:
        np.testing.assert_array_equal(untuned[name].outliers().images, again[name].outliers().images)
        assert (untuned[name].outliers().images != other[name].outliers().images).any()


def test_tasks_are_a_function_of_the_seed(sources, tasks):
    again, other = ({task.name: task for task in Suite(sources, seed)} for seed in (0, 1))
    for name in ("mnist/noisy", "mnist/fashion-mnist", "fashion-mnist/scratch"):
        np.testing.assert_array_equal(tasks[name].outliers().images, again[name].outliers().images)
        assert (tasks[name].outliers().images != other[name].outliers().images).any()
    np.testing.assert_array_equal(tasks["mnist/noisy"].inliers.held_out, again["mnist/noisy"].inliers.held_out)


def test_outliers_are_made_of_images_that_are_not_held_out(tasks):
    for name in ("mnist", "fashion-mnist"):
        restored = transformed("inverted", tasks[f"{name}/inverted"].outliers().images)
        held_out = {image.tobytes() for image in tasks[f"{name}/inverted"].inliers.held_out}
        assert len(restored) == len(held_out) == COUNT // 2
        assert not held_out & {image.tobytes() for image in restored}


def test_one_class_is_trained_on_itself_and_tested_on_every_test_image(sources, tasks):
    task = tasks["mnist-3/rest"]
    test, train = sources["mnist"].test, sources["mnist"].train
    np.testing.assert_array_equal(task.inliers.train, train.images[train.labels == 3])
    np.testing.assert_array_equal(task.inliers.held_out, test.images[test.labels == 3])
    np.testing.assert_array_equal(task.outliers().images, test.images[test.labels != 3])
    parity = tasks["mnist-odd/even"]
    assert parity.inliers.classes == (1, 3, 5, 7, 9)
    assert len(parity.outliers().images) == COUNT // 2


def test_a_limit_keeps_so_many_images_of_every_set(sources):
    for task in Suite(sources, limit=3):
        assert max(len(task.inliers.train), len(task.inliers.held_out)) <= 3
        if task.outliers is not None:
            assert len(task.outliers().images) <= 3


def test_tasks_are_selected_by_group_and_by_name(sources):
    suite = Suite(sources)
    assert {task.group for task in suite.select(["parity"])} == {"parity"}
    assert [task.name for task in suite.select(["mnist-[01]/*"])] == ["mnist-0/rest", "mnist-1/rest"]
    with pytest.raises(ValueError, match="no task matches 'nonsense'"):
        suite.select(["nonsense"])


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def data_dir(tmp_path, sources) -> Path:
    for name, found in sources.items():
        for part, prefix in ((found.train, "train"), (found.test, "t10k")):
            write_idx(tmp_path / name / f"{prefix}-images-idx3-ubyte", part.images[:, 0])
            write_idx(tmp_path / name / f"{prefix}-labels-idx1-ubyte", part.labels)
    return tmp_path


def test_sources_are_read_by_the_trainers_own_loader(data_dir, sources):
    found = load_sources(data_dir)
    for name, expected in sources.items():
        np.testing.assert_array_equal(found[name].test.images, expected.test.images)
        np.testing.assert_array_equal(found[name].train.labels, expected.train.labels)


def test_auroc_is_the_chance_that_an_outlier_scores_higher():
    inliers, outliers = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    assert auroc(inliers, outliers) == pytest.approx((1.5 + 3) / 6)
    maps, masks = np.array([[[0.0, 5.0]]]), np.array([[[False, True]]])
    assert pixel_auroc(np.array([[[1.0, 6.0]]]), maps, masks) == pytest.approx(2 / 3)


def test_rates_of_exchangeable_scores_keep_their_word_and_shifted_ones_do_not():
    random = np.random.RandomState(0)
    calibration, scores = np.sort(random.standard_normal(2000)), random.standard_normal(3000)
    for shift, keeps in ((0.0, True), (1.0, False)):
        p_values = (1 + len(calibration) - np.searchsorted(calibration, scores + shift)) / (len(calibration) + 1)
        found = rates(p_values, calibration, scores + shift)
        assert (found.rate <= 0.01 + 2 * found.standard_error) == keeps
        assert (found.ks > 0.01) == keeps
    known, new = resplit(calibration, scores + 1.0, 0)
    assert (len(known), len(new)) == (2000, 3000)
    assert stats.ks_2samp(known, new).pvalue > 0.01


def test_every_rival_that_is_installed_finds_what_is_plainly_different(tasks):
    task = tasks["mnist/inverted"]
    for make in RIVALS.values():
        if make is PyodVAE:
            continue
        detector = make()
        detector.fit(task.inliers, 0)
        assert auroc(detector.score(task.inliers.held_out), detector.score(task.outliers().images)) == 1
        detector.fit(task.inliers, 0)
        np.testing.assert_array_equal(detector.score(task.outliers().images), detector.score(task.outliers().images))


def test_the_linear_floor_is_the_exact_log_density(tasks):
    inliers = tasks["mnist/inverted"].inliers
    floor = LinearFloor()
    floor.fit(inliers, 0)
    model = floor._model
    x = floor._target(inliers.held_out[:4]).flatten(1).double().numpy()
    weight = model.weight.detach().double().numpy()
    covariance = weight @ weight.T + np.diag(model._scales().detach().numpy() ** 2)
    expected = stats.multivariate_normal(model.loc.detach().numpy(), covariance).logpdf(x)
    np.testing.assert_allclose(-floor.score(inliers.held_out[:4]), expected, rtol=1e-6)


def test_neighbours_of_a_training_image_are_itself_first(tasks):
    inliers = tasks["mnist/inverted"].inliers
    neighbours = NearestNeighboursOnPixels()
    neighbours.fit(inliers, 0)
    distances = np.sort(np.linalg.norm(flat(inliers.train) - flat(inliers.train[:1]), axis=1))[:5]
    assert neighbours.score(inliers.train[:1])[0] == pytest.approx(distances.mean(), rel=1e-3)
    assert neighbours.maps(inliers.train[:2]).shape == (2, 28, 28)


def test_a_peer_that_is_not_there_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"requirements\.txt"):
        PyodVAE()
    assert list(makers_of(["ppca", "pyod-vae"], lambda: None)) == ["PPCA"]
    assert "PyOD VAE: not installed" in capsys.readouterr().err


@pytest.fixture
def served(ppca_root) -> Ours:
    """The tests' own bundle in the place of a shipped one."""
    ours = Ours(ppca_root, ppca_root / "none")
    x = np.round(255 * images(60)).astype(np.uint8)
    ours.fit(Inliers("ppca", "ppca", None, x, x), 0)
    return ours


def test_ours_is_the_models_own_default_score(served, model):
    x = np.round(255 * images(7)).astype(np.uint8)
    np.testing.assert_array_equal(served.score(x), model.score(x / np.float32(255)).score)
    assert list(served.scores(x)) == list(model.manifest.scores)
    assert served.maps(x).shape == (7, *x.shape[2:])


def with_spots(x):
    """The images with a chequered 3×3 spot, and the places that it changed."""
    found = x.copy()
    found[:, :, 2:5, 2:5] = 255 * (np.indices((3, 3)).sum(axis=0) % 2)
    return found, (found != x).any(axis=1)


@pytest.mark.parametrize("has_graph", [True, False])
def test_the_corruption_map_is_measured_beside_the_default_one_where_there_is_the_graph(
    has_graph, tmp_path, ppca_root, monkeypatch
):
    root = write_corruption(tmp_path).parents[1] if has_graph else ppca_root
    x = np.round(255 * images(20)).astype(np.uint8)
    inliers = Inliers("ppca", "ppca", None, x[:10], x[:10])
    fitted = Fitted(Ours(root, tmp_path / "none"), inliers, 0)
    calls, mapped = [], Ours.corruption_maps
    monkeypatch.setattr(Ours, "corruption_maps", lambda self, x: calls.append(len(x)) or mapped(self, x))
    bad, masks = with_spots(x[10:])
    task = Task("ppca/spot", "defects", inliers, lambda: Outliers(bad, masks))
    found, again = (fitted.record(task, None) for _ in range(2))
    default = [fitted.detector.model.score(part / np.float32(255), maps=True).map for part in (x[:10], bad)]
    assert found.pixel_auroc == pixel_auroc(*default, masks)
    if not has_graph:
        assert found.corruption_pixel_auroc is None
        return
    wanted = [log_odds(part / np.float32(255)).astype(np.float32) for part in (x[:10], bad)]
    assert found.corruption_pixel_auroc == pytest.approx(pixel_auroc(*wanted, masks), abs=1e-3)
    assert again.corruption_pixel_auroc == found.corruption_pixel_auroc != found.pixel_auroc
    assert calls == [10, 10, 10], "held-out inliers once"


def test_results_of_before_the_corruption_map_are_read_and_have_no_number_in_its_column(tmp_path):
    path = tmp_path / "r.json"
    new = record("a/stain", "vaeserve", pixel_auroc=0.5, corruption_pixel_auroc=0.75)
    Results(path).take([new, record("a/worn", "vaeserve", pixel_auroc=0.25), record("a/stain", pixel_auroc=0.125)])
    content = json.loads(path.read_text())
    for old in content["records"][1:]:
        del old["corruption_pixel_auroc"]
    path.write_text(json.dumps(content))
    lines = by_pixel(read_records(path)).splitlines()
    assert lines[0] == "| task | vaeserve | PPCA | corruption map |"
    assert lines[2:] == ["| a/stain | 0.5000 | 0.1250 | 0.7500 |", "| a/worn | 0.2500 | – | – |"]
    path.write_text(json.dumps({"records": content["records"][1:]}))
    assert "corruption" not in by_pixel(read_records(path))
    results = Results(tmp_path / "all.json")
    results.take(read_records(path))
    results.take([new])
    assert [each.corruption_pixel_auroc for each in results] == [None, None, 0.75]


def test_a_bundle_that_was_never_shipped_is_named(tmp_path):
    x = np.zeros((2, 1, 28, 28), np.uint8)
    with pytest.raises(BundleMissing, match="mnist"):
        Ours(tmp_path, tmp_path).fit(Inliers("mnist", "mnist", None, x, x), 0)


def record(task: str, detector: str = "PPCA", auroc: float | None = 0.5, seed: int = 0, **more) -> Record:
    counts = {"n_train": 9, "n_inliers": 5, "n_outliers": 3, "fit_seconds": 0.0, "score_seconds": 0.0}
    found = {"task": task, "group": "pairs", "detector": detector, "settings": "", "seed": seed, "limit": None}
    return Record(**found | counts | {"auroc": auroc} | more)


def test_results_are_kept_on_disk_and_replaced_by_key(tmp_path):
    results = Results(tmp_path / "r.json")
    results.take([record("mnist/jpeg"), record("mnist/noisy")])
    results.take([record("mnist/jpeg", auroc=0.75)])
    assert [found.auroc for found in Results(tmp_path / "r.json")] == [0.75, 0.5]
    assert Key("mnist/jpeg", "PPCA", 0, None) in results
    assert read_records(tmp_path / "r.json") == list(results)


def test_the_worst_pair_is_the_worst_mean_over_seeds():
    found = [record("a/b", auroc=value, seed=seed) for seed, value in enumerate((0.6, 0.8))]
    found += [record("a/c", auroc=value, seed=seed) for seed, value in enumerate((0.5, 1.0))]
    worst = next(row for row in ROWS if row.over is min)._replace(count=2)
    assert reduced(found, "PPCA", worst) == pytest.approx(0.7)
    assert reduced(found, "PPCA", worst._replace(count=3)) is None
    assert "± 0.3536" in markdown(found)
    assert statistics.stdev([0.5, 1.0]) == pytest.approx(0.3536, abs=1e-4)


def test_rates_beyond_two_standard_errors_are_said_so():
    rate = {"rate": 0.05, "standard_error": 0.002, "ks": 0.0, "n": 5000, "n_calibration": 3000}
    text = unseen([record("mnist/unseen", "vaeserve", None, rates={"served": rate})])
    assert "5.00% ± 0.20% | no | 0.000" in text


def test_what_is_known_is_not_measured_again(sources):
    tasks = Suite(sources).select(["mnist/inverted", "mnist/jpeg"])
    makers = makers_of(["ppca"], lambda: None)
    known = Results()
    known.take(measure(tasks, makers, 0, None, known))
    assert {found.task for found in known} == {"mnist/inverted", "mnist/jpeg"}
    assert list(measure(tasks, makers, 0, None, known)) == []
    assert len(list(measure(tasks, makers, 1, None, known))) == 2


def test_held_out_inliers_are_scored_once(tasks, monkeypatch):
    scored = []
    original = LinearFloor.score
    monkeypatch.setattr(LinearFloor, "score", lambda self, x: scored.append(len(x)) or original(self, x))
    fitted = Fitted(LinearFloor(), tasks["mnist/jpeg"].inliers, 0)
    for name in ("mnist/jpeg", "mnist/noisy"):
        assert fitted.record(tasks[name], None).auroc is not None
    assert scored == [COUNT // 2] * 3


def test_the_figure_has_a_row_for_each_task():
    ax = dots([record("a/b", auroc=1.0), record("a/c", "vaeserve", 0.2)]).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a/b", "a/c"]
    assert {text.get_label() for text in ax.collections} == {"vaeserve", "PPCA"}


def test_the_command_trains_a_class_scores_it_as_served_and_goes_on(data_dir, tmp_path, sources, capsys, monkeypatch):
    small = ["optimiser.epochs=1", "optimiser.batch_size=2", "model.network.hidden=[8]", "model.latent_dim=2"]
    small += ["data.validation=0.2", "data.calibration=0.2", "data.test=0.2", "score.k=2", "objective.warmup_epochs=0"]
    arguments = ["--data-dir", str(data_dir), "--to", str(tmp_path / "out"), "--seeds", "0"]
    arguments += ["--tasks", "mnist-odd/even", "--detectors", "ours", "ppca"]
    for text in small:
        arguments += ["--set", text]
    main(arguments)
    found = {row["detector"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["records"]}
    assert set(found) == {"vaeserve", "PPCA"}
    assert set(found["vaeserve"]["by_score"]) > {"elbo"}
    assert "odd digits in, even out" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/auroc.png").read_bytes().startswith(b"\x89PNG")

    def never(*arguments, **options):
        raise AssertionError("trained, or fitted, again")

    monkeypatch.setattr("bench.anomaly.ours.fit_stage", never)
    results = Results(tmp_path / "out/results.json")
    monkeypatch.setattr(LinearFloor, "fit", never)
    run(parse(arguments), results)
    again = Results(tmp_path / "elsewhere.json")
    run(parse([*arguments[:-2], "--detectors", "ours", *arguments[-2:]]), again)
    assert next(iter(again)).auroc == found["vaeserve"]["auroc"]


def test_a_task_that_is_not_there_is_one_line(data_dir, tmp_path):
    command = [sys.executable, "-m", "bench.anomaly", "--data-dir", data_dir, "--to", tmp_path / "out"]
    done = subprocess.run([*command, "--tasks", "none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no task matches 'none'" in done.stderr
    assert "Traceback" not in done.stderr


def test_whole_surfaces_go_from_files_through_the_stages_to_a_table(tmp_path, monkeypatch, capsys):
    small = {
        "TILE": 16,
        "SIZES": (40, 48),
        "GOOD": 80,
        "HELD_OUT": 6,
        "FLAWED": 4,
        "SURFACES": {"woven": SURFACES["woven"]},
    }
    for name, value in small.items():
        monkeypatch.setattr(tiled, name, value)
    monkeypatch.setitem(tiled.MODELS, "ppca", {"model": {"latent_dim": 8}})
    tiled.main(["--to", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == list(FLAWS)
    assert len(list((tmp_path / "woven-0").iterdir())) == 80
    statistics = [float(line.split(" | ")[5]) for line in lines[2:]]
    assert statistics[0] > 0.9  # a scratch across a sixth of the image
    for line in lines[2:]:
        assert all(0 <= float(cell) <= 1 for cell in line.split(" | ")[3:10])
