from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import DETECTORS, ScoreDefinition
from service.errors import BundleGraphError, InvalidInput, UnsupportedVerb
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.scores.detectors import stretched
from service.scores.evaluation import ForwardPasses, ScoreEvaluator
from service.scores.forward_pass import ForwardPass
from tests.ppca_bundle import images
from tests.service.fitted_bundles import FAMILIES, fit, npz, rewrite

X = images(7, seed=5)
BATCHES = (1, 2, 7, 8, 33)


def definition(estimator: str = "elbo", k: int = 4, seed: int = 0) -> ScoreDefinition:
    return ScoreDefinition(estimator=estimator, k=k, seed=seed)


class Forward:
    """A model's forward pass that counts: k samples of the seed's random numbers."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[int, int, bool]] = Counter()

    def __call__(self, x: np.ndarray, k: int, seed: int, places: bool) -> ForwardPass:
        self.calls[k, seed, np.array_equal(x, stretched(X))] += 1
        terms = np.random.RandomState(seed).standard_normal((3, k, len(x))).transpose(0, 2, 1)
        nothing = np.zeros((len(x), 1))
        return ForwardPass(x, x, nothing, nothing, *terms, x, x)


# Passes.


def test_a_seed_s_pass_is_made_once_with_the_most_samples():
    forward, wanted = Forward(), [definition(k=2), definition("iwae", k=9), definition("rate", k=5)]
    passes = ForwardPasses(forward, X, [*wanted, definition(k=3, seed=1)], maps=False)
    for each in [*wanted, *wanted, definition(k=3, seed=1)]:
        assert passes.of(each).log_w.shape == (7, each.k)
    assert forward.calls == {(9, 0, False): 1, (3, 1, False): 1}
    assert np.array_equal(passes.of(wanted[0]).log_w, passes.of(wanted[1]).log_w[:, :2])


def test_stretched_images_have_a_pass_of_their_own_and_of_their_own_samples():
    forward, wanted = Forward(), [definition(k=2), definition("iwae", k=9), definition("debiased", k=2)]
    passes = ForwardPasses(forward, X, wanted, maps=False)
    assert np.array_equal(passes.of(wanted[2], stretch=True).x, stretched(X))
    assert np.array_equal(passes.of(wanted[1]).x, X)
    passes.of(wanted[2], stretch=True)
    assert forward.calls == {(2, 0, True): 1, (9, 0, False): 1}


def test_with_a_map_a_pass_is_of_the_definition_s_own_samples():
    forward, wanted = Forward(), [definition(k=2), definition("iwae", k=9)]
    passes = ForwardPasses(forward, X, wanted, maps=True)
    passes.of(wanted[0])
    assert forward.calls == {(2, 0, False): 1}


# Estimates of samples.


@pytest.mark.parametrize("estimator", ["elbo", "iwae", "reconstruction", "rate"])
def test_scores_of_samples_are_what_they_say(estimator):
    forward = Forward()
    measured = forward(X, 5, 3, False)
    each = definition(estimator, k=5, seed=3)
    estimates = ScoreEvaluator(ForwardPasses(forward, X, [each], maps=False), {}, {})
    log_w = measured.log_p_x_given_z + measured.log_p_z - measured.log_q_z
    wanted = {
        "elbo": -log_w.mean(axis=1),
        "iwae": -np.log(np.exp(log_w).mean(axis=1)),
        "reconstruction": -measured.log_p_x_given_z.mean(axis=1),
        "rate": (measured.log_q_z - measured.log_p_z).mean(axis=1),
    }
    assert estimates.score(each) == pytest.approx(wanted[estimator])
    error = estimates.standard_error(each)
    if estimator == "rate":
        assert error == pytest.approx((measured.log_q_z - measured.log_p_z).std(axis=1, ddof=1) / np.sqrt(5))
    assert np.isfinite(error).all()


@pytest.mark.parametrize("estimator", ["elbo", "iwae", "reconstruction", "rate"])
def test_nan_names_the_row(estimator):
    def broken(x, k, seed, places):
        measured = Forward()(x, k, seed, places)
        for part in (measured.log_p_x_given_z, measured.log_p_z):
            part[4] = np.nan
        return measured

    each = definition(estimator)
    with pytest.raises(BundleGraphError, match=f"{estimator} is NaN for row 4"):
        ScoreEvaluator(ForwardPasses(broken, X, [each], maps=False), {}, {}).score(each)


# Fitted scores through the model.


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory) -> tuple[str, Model]:
    """Each family's bundle with fitted scores, loaded."""
    root, family = tmp_path_factory.mktemp("served"), FAMILIES[request.param]
    path = fit(family.write(root / "plain"), root, family.inliers(60, 1), family.inliers(40, 2))
    return request.param, Model.load(open_bundle(path), Runtime("cpu"))


def scores_of(model: Model, x: np.ndarray) -> dict[str, np.ndarray]:
    return model.score(x, also=model.manifest.scores).also


def test_every_score_of_a_family_answers_finitely(served):
    name, model = served
    own = {each.estimator for each in model.manifest.scores.values()}
    scores = scores_of(model, FAMILIES[name].inliers(12, 9))
    assert set(FAMILIES[name].scores) <= set(scores)
    assert all(np.isfinite(each).all() and each.dtype == np.float64 for each in scores.values()), own
    for each in scores.values():
        assert len(set(each)) > 1 or name == "bijection"


def test_n_rows_together_score_as_n_alone(served):
    """Bitwise, for every score."""
    name, model = served
    x = FAMILIES[name].inliers(max(BATCHES), 9)
    alone = [scores_of(model, x[i : i + 1]) for i in range(len(x))]
    for size in BATCHES:
        together = scores_of(model, x[:size])
        for score, values in together.items():
            assert np.array_equal(values, np.concatenate([row[score] for row in alone[:size]])), score


def test_a_score_is_the_same_whatever_else_is_asked(served):
    """Bitwise: more samples in the shared pass, or a map, do not change the first ones."""
    name, model = served
    x = FAMILIES[name].inliers(5, 9)
    together = scores_of(model, x)
    longer = next(iter(model.manifest.scores.values())).model_copy(update={"k": 40})
    beside = model.score(x, longer, also=model.manifest.scores).also
    for score, each in model.manifest.scores.items():
        alone = model.score(x, each).score
        assert np.array_equal(alone, together[score]), score
        assert np.array_equal(alone, beside[score]), score
        if "score.map" not in model.refused:
            assert np.array_equal(alone, model.score(x, each, maps=True).score), score


def test_far_rows_score_higher(served):
    name, model = served
    inliers = FAMILIES[name].inliers(20, 9)
    noise = np.random.RandomState(0).random_sample(inliers.shape).astype(np.float32)
    outliers = noise if name == "pictures" else inliers * 30 + 1
    combined = model.manifest.scores["combined"]
    assert np.median(model.score(outliers, combined).score) > model.score(inliers, combined).score.max()


def test_the_ends_of_float32_never_yield_nan(served):
    name, model = served
    x = FAMILIES[name].inliers(4, 9)
    if name == "pictures":
        x = np.stack([np.zeros_like(x[0]), np.ones_like(x[0])])
    else:
        x = np.stack([np.full_like(x[0], value) for value in (0, 1e-38, 1e15, -1e15, 1e30)])
    for score, values in scores_of(model, x).items():
        assert not np.isnan(values).any(), score


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("score", ["statistics", "combined"])
def test_fitted_numbers_that_yield_infinity_of_finite_ones_are_named(tmp_path, score):
    """A row beyond what the graphs can say is infinitely far; a bundle whose own numbers overflow is refused."""
    family = FAMILIES["table"]
    plain = fit(family.write(tmp_path / "plain"), tmp_path, family.inliers(60, 1), family.inliers(40, 2))
    bundle = open_bundle(plain)
    arrays = bundle.arrays(DETECTORS)
    arrays["statistics/whitening"] = arrays["statistics/whitening"] * 1e200
    broken = Model.load(open_bundle(rewrite(bundle, tmp_path / "broken", {}, {DETECTORS: npz(arrays)})), Runtime("cpu"))
    x = family.inliers(3, 9)
    with pytest.raises(BundleGraphError, match="statistics: the fitted numbers yield inf for row 0"):
        broken.score(x, broken.manifest.scores[score])
    sound = Model.load(bundle, Runtime("cpu"))
    far = np.full_like(x[:1], 1e30)
    assert sound.score(far, sound.manifest.scores["combined"]).score == np.inf


@pytest.mark.parametrize("change", [{"k": 3}, {"seed": 77}])
def test_a_fitted_score_with_another_k_or_seed_is_refused_in_words(served, change):
    name, model = served
    x = FAMILIES[name].inliers(1, 9)
    for score in ("typicality", "path", "latent", "statistics", "combined"):
        if score in model.manifest.scores:
            other = model.manifest.scores[score].model_copy(update=change)
            with pytest.raises(InvalidInput, match=r"fitted with the k and the seed of its definition"):
                model.score(x, other)
            with pytest.raises(InvalidInput, match=r"fitted with"):
                model.score(x, also={"more": other})


def test_each_pass_is_made_once(served, monkeypatch):
    """All scores of a bundle: one pass a seed, and one more where images are stretched."""
    name, model = served
    made: list[tuple[int, int]] = []
    forward_pass = model._scorer.forward_pass

    def counted(x, k, seed, mean, places):
        made.append((k, seed))
        return forward_pass(x, k, seed, mean, places)

    monkeypatch.setattr(model._scorer, "forward_pass", counted)
    model.score(FAMILIES[name].inliers(5, 9), also=model.manifest.scores)
    seeds = {each.seed for each in model.manifest.scores.values()}
    assert len(made) == len(seeds) + (name == "pictures")
    made.clear()
    model.score(FAMILIES[name].inliers(5, 9), model.manifest.scores["combined"])
    assert len(made) == 1


def test_what_a_family_has_not_is_refused(served):
    name, model = served
    x = FAMILIES[name].inliers(1, 9)
    refused = {
        "pca": ("elbo", "iwae", "rate"),
        "bijection": ("rate", "reconstruction"),
    }.get(name, ())
    for estimator in refused:
        with pytest.raises(UnsupportedVerb):
            model.score(x, definition(estimator))


def test_a_combination_is_of_the_scores_it_names(served):
    """The sum of −log of each part's tail probability, from the parts' own scores."""
    name, model = served
    x = FAMILIES[name].inliers(6, 9)
    scores = scores_of(model, x)
    combined = model.detectors["combined"]
    definition = model.manifest.scores["combined"]
    parts = [scores[part] for part in definition.of]
    assert np.array_equal(combined.score(parts), scores["combined"])
    alone = [tail.surprisal(part) for tail, part in zip(combined.tails, parts, strict=True)]
    np.testing.assert_allclose(np.sum(alone, axis=0), scores["combined"])
    assert (scores["combined"] >= 0).all()
