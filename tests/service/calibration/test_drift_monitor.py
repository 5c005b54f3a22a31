"""Drift: the monitor on simulated streams, and over real HTTP."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.bundle.files import open_bundle
from service.calibration.conformal import Calibrator
from service.calibration.drift_monitor import Drift, DriftMonitor, MonitorState
from service.calibration.exchangeability import ks_two_sample
from service.errors import InvalidInput, UnsupportedVerb
from service.repository.resolving import monitor_key
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.http import assert_problem, npy, serving

NPY = {"content-type": "application/x-npy"}


def served(calibration: np.ndarray):
    """What the drift tests read of a served model."""
    manifest = SimpleNamespace(name="m", version="1")
    calibrator = Calibrator({"elbo": np.sort(calibration)})
    return SimpleNamespace(manifest=manifest, calibrator=calibrator)


def record(drift: Drift, served, score: str, scores: np.ndarray, group: str | None = None) -> None:
    """As the route does it."""
    drift.record(monitor_key(served, score, group), *served.calibrator.counts(score, scores, group))


def state_of(drift: Drift, served, score: str, group: str | None = None) -> MonitorState:
    return drift.state(monitor_key(served, score, group))


def test_ranks_without_ties_are_those_of_the_p_values():
    random = np.random.RandomState(0)
    model, scores = served(random.standard_normal(99)), random.standard_normal(30)
    drift = Drift(20, 0.01)
    record(drift, model, "elbo", scores)
    state = state_of(drift, model, "elbo")
    np.testing.assert_allclose(state.p_values, model.calibrator.p_values("elbo", scores)[-20:])
    assert (state.n, state.count, len(state.ranks)) == (99, 30, 20)
    assert state.share_up_to(0.3) == np.mean(state.p_values <= 0.3)
    assert sum(state.histogram) == 20


def test_the_histogram_puts_each_p_value_in_its_tenth_up_to_the_upper_edge():
    monitor = DriftMonitor(19, 100)
    ranks = np.arange(20)
    monitor.record(ranks, ranks)
    assert monitor.state().histogram == [2] * 10
    monitor.record(np.array([1]), np.array([1]))  # p = 2/20, which is 0.1
    assert monitor.state().histogram == [3] + [2] * 9


@pytest.mark.parametrize("sizes", [[1] * 57, [57], [7, 50], [20, 20, 17]])
def test_batches_of_any_size_leave_the_window_of_single_rows(sizes):
    ranks = np.random.RandomState(1).randint(0, 51, 57)
    monitor = DriftMonitor(50, 20)
    for part in np.split(ranks, np.cumsum(sizes)[:-1]):
        monitor.record(part, part)
    assert monitor.state().ranks.tolist() == ranks[-20:].tolist()
    assert monitor.state().count == 57


def test_ties_are_broken_such_that_inliers_do_not_alarm():
    """Scores of five values: plain p-values are far from uniform, the monitor's are not."""
    alarms, plain = 0, 0
    for seed in range(100):
        random = np.random.RandomState(seed)
        model, drift = served(random.randint(0, 5, 200).astype(float)), Drift(300, 0.02)
        scores = random.randint(0, 5, 300).astype(float)
        record(drift, model, "elbo", scores)
        alarms += state_of(drift, model, "elbo").judge(0.02).drifting
        at_least = np.rint(model.calibrator.p_values("elbo", scores) * 201).astype(int) - 1
        plain += ks_two_sample(at_least, 200)[1] <= 0.01
    assert alarms <= 8  # 2 expected at most; 9 or more have probability 1e-4
    assert plain >= 90


def test_inliers_alarm_no_more_often_than_the_level_and_a_shift_does():
    level, alarms, found = 0.05, 0, 0
    for seed in range(200):
        random = np.random.RandomState(seed)
        model, drift = served(random.standard_normal(300)), Drift(200, level)
        record(drift, model, "elbo", random.standard_normal(500))
        alarms += state_of(drift, model, "elbo").judge(level).drifting
        record(drift, model, "elbo", random.standard_normal(200) + 0.5)
        found += state_of(drift, model, "elbo").judge(level).drifting
    assert alarms <= 20  # 10 expected at most; 21 or more have probability 1e-3
    assert found >= 190


def test_each_of_several_workers_tests_at_its_share_of_the_level():
    assert (Drift(20, 0.01).level, Drift(20, 0.01).worker) == (0.01, None)
    shared = Drift(20, 0.02, workers=4, worker=3)
    assert (shared.level, shared.worker) == (0.005, 3)
    model = served(np.arange(99.0))
    record(shared, model, "elbo", np.full(3, 1000.0))  # p = 0.006
    state = state_of(shared, model, "elbo")
    assert state.judge(0.02).ks_alarm
    assert not state.judge(shared.level).ks_alarm


def test_nothing_is_found_in_nothing():
    model = served(np.arange(9.0))
    state = state_of(Drift(20, 0.01), model, "elbo")
    assert state.judge(0.01) is None
    assert state.histogram == [0] * 10


def test_scores_that_have_no_rank_leave_no_trace():
    model, drift = served(np.arange(9.0)), Drift(20, 0.01)
    with pytest.raises(InvalidInput):
        record(drift, model, "elbo", np.array([1.0, np.nan]))
    with pytest.raises(UnsupportedVerb):
        record(drift, model, "iwae", np.array([1.0]))
    record(drift, model, "elbo", np.array([np.inf, -np.inf]))
    assert state_of(drift, model, "elbo").ranks.tolist() == [0, 9]
    assert len(list(drift)) == 1


def test_groups_are_watched_apart_under_one_spelling():
    model, drift = served(np.arange(9.0)), Drift(20, 0.01)
    model.calibrator = Calibrator({"elbo": np.arange(9.0), "elbo@été": np.arange(4.0)})
    record(drift, model, "elbo", np.array([3.5]))
    record(drift, model, "elbo", np.array([2.5]), "été")
    record(drift, model, "elbo", np.array([1.5]), "e\u0301te\u0301")
    assert state_of(drift, model, "elbo").ranks.tolist() == [5]
    assert state_of(drift, model, "elbo", "été").ranks.tolist() == [1, 2]
    assert [name.group for name, _ in drift] == ["", "été"]
    with pytest.raises(InvalidInput):
        record(drift, model, "elbo", np.array([1.5]), "hiver")


def test_threads_lose_no_row():
    model, drift = served(np.arange(99.0)), Drift(50, 0.01)

    def record_some():
        for _ in range(200):
            record(drift, model, "elbo", np.array([3.5, 90.5]))
            assert len(state_of(drift, model, "elbo").ranks) <= 50

    threads = [threading.Thread(target=record_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = state_of(drift, model, "elbo")
    assert state.count == 1600
    assert np.bincount(state.ranks, minlength=97)[[8, 95]].sum() == 50


@pytest.fixture
def client(ppca_root):
    with serving(ppca_root, drift_window=64, drift_level=0.01, false_positive_rate=0.1) as client:
        yield client


def test_before_the_first_row_the_answer_says_so(client):
    answer = client.get("/v1/models/ppca/drift").json()
    assert answer["drifting"] is answer["kolmogorov_smirnov"] is answer["martingale"] is answer["shares"] is None
    assert answer["verdict"] == "nothing to compare: no row has been scored by elbo here yet"
    assert (answer["seen"], answer["in_window"], answer["window"], answer["level"]) == (0, 0, 64, 0.01)
    assert answer["worker"] is None
    assert answer["histogram"] == [0] * 10


def test_inliers_are_quiet_and_other_images_alarm(client):
    p = []
    for seed in range(5, 9):
        scored = client.post("/v1/models/ppca/score", content=npy(images(20, seed=seed)), headers=NPY).json()
        p += [row["p_value"] for row in scored["results"]]
    quiet = client.get("/v1/models/ppca/drift").json()
    assert quiet["drifting"] is False
    assert quiet["verdict"] == "no drift seen at level 0.01"
    assert (quiet["seen"], quiet["in_window"], quiet["n"], quiet["score"]) == (80, 64, 199, "elbo")
    assert quiet["shares"]["up_to_5_percent"] == np.mean(np.array(p[-64:]) <= 0.05)
    ranks = np.rint(np.array(p[-64:]) * 200).astype(int) - 1
    assert quiet["kolmogorov_smirnov"]["statistic"] == pytest.approx(ks_two_sample(ranks, 199)[0])

    random = np.random.RandomState(0).randint(0, 256, (64, 1, 8, 8)).astype(np.uint8)
    client.post("/v1/score", content=npy(random), headers=NPY)
    for address in ("/v1", "/v1/models/ppca", "/v1/models/ppca/versions/1"):
        loud = client.get(f"{address}/drift").json()
        assert loud["drifting"] is loud["martingale"]["alarm"] is loud["kolmogorov_smirnov"]["alarm"] is True
        assert "Kolmogorov–Smirnov p-value" in loud["verdict"]
        assert "martingale" in loud["verdict"]
        assert loud["model"]["name"] == "ppca"
        assert loud["shares"]["up_to_1_percent"] == 1
        assert loud["martingale"]["log10_maximum"] >= loud["martingale"]["log10"] > 10


def test_what_a_request_asks_for_does_not_change_what_is_remembered(client):
    """Other rates, maps, scores beside it and refused requests, against the same rows asked plainly."""
    x = npy(images(3, seed=5))

    def ask(expected=200, **query):
        assert client.post("/v1/score", content=x, headers=NPY, params=query).status_code == expected

    ask(false_positive_rate=0.99)
    ask(false_positive_rate=0.006, map=True)
    ask(422, false_positive_rate=1e-7)
    ask(422, score="none")
    ask(score="iwae")
    ask(also="elbo,iwae")  # each once, though elbo is the chosen score as well
    ask(false_discovery_rate=0.5, score="iwae")
    ask(422, group="unknown")
    ask(k=2, seed=77)  # not calibrated: no p-value
    bad = npy(np.full((2, 1, 8, 8), np.nan, np.float32))
    assert_problem(client.post("/v1/score", content=bad, headers=NPY), 422)
    odd = client.get("/v1/drift").json()
    assert (odd["seen"], odd["in_window"]) == (9, 9)
    assert client.get("/v1/drift", params={"score": "iwae"}).json()["seen"] == 9
    values = client.post("/v1/score", content=x, headers=NPY).json()["results"]
    p = np.array([row["p_value"] for row in values])
    assert odd["histogram"] == (3 * np.histogram(p - 1e-9, 10, (0, 1))[0]).tolist()


def test_drift_refuses_in_the_one_shape(client, tmp_path):
    assert_problem(client.get("/v1/models/other/drift"), 404)
    assert_problem(client.get("/v1/models/ppca/versions/9/drift"), 404)
    assert "none" in assert_problem(client.get("/v1/drift", params={"score": "none"}), 422)["detail"]
    assert_problem(client.get("/v1/drift", params={"window": 3}), 422)
    assert "no calibration of group" in assert_problem(client.get("/v1/drift", params={"group": "b"}), 422)["detail"]
    assert_problem(client.post("/v1/drift", content=b""), 405)

    def uncalibrated(manifest, files):
        manifest["calibration"] = None
        del files["calibration.npz"]

    write_ppca_bundle(tmp_path, change=uncalibrated)
    with serving(tmp_path) as bare:
        assert bare.post("/v1/score", content=npy(images(2)), headers=NPY).status_code == 200
        assert "carries no calibration" in assert_problem(bare.get("/v1/drift"), 409)["detail"]
        assert not [line for line in bare.get("/metrics").text.splitlines() if line.startswith("vaeserve_drift")]


def test_metrics_show_what_the_answer_says(client, ppca_path):
    x = npy(images(30, seed=5))
    client.post("/v1/score", content=x, headers=NPY)
    client.post("/v1/score", content=x, headers=NPY, params={"score": "iwae"})
    answer = client.get("/v1/drift").json()
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name.startswith("vaeserve_drift_")]
    version = open_bundle(ppca_path).manifest.version
    values = {
        s.name: s.value
        for s in samples
        if s.labels == {"model": "ppca", "version": version, "score": "elbo", "group": ""}
        and not s.name.endswith("_created")
    }
    assert {s.labels["score"] for s in samples} == {"elbo", "iwae"}
    assert values == {
        "vaeserve_drift_p_values_total": 30,
        "vaeserve_drift_ks_statistic": answer["kolmogorov_smirnov"]["statistic"],
        "vaeserve_drift_ks_p_value": answer["kolmogorov_smirnov"]["p_value"],
        "vaeserve_drift_martingale_log10": answer["martingale"]["log10"],
        "vaeserve_drift_martingale_log10_maximum": answer["martingale"]["log10_maximum"],
        "vaeserve_drift_share_up_to_1_percent": answer["shares"]["up_to_1_percent"],
        "vaeserve_drift_share_up_to_5_percent": answer["shares"]["up_to_5_percent"],
        "vaeserve_drift_alarm": float(answer["drifting"]),
    }


def test_openapi_documents_drift(client):
    document = client.get("/openapi.json").json()
    for prefix in ("/v1", "/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
        operation = document["paths"][f"{prefix}/drift"]["get"]
        assert "score" in {parameter["name"] for parameter in operation["parameters"]}
        assert "of the rows that the answering one has scored" in operation["description"]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/DriftAnswer"}
    fields = document["components"]["schemas"]["DriftAnswer"]["properties"]
    assert {"drifting", "martingale", "kolmogorov_smirnov", "histogram", "shares", "worker"} <= fields.keys()
    assert "over the number of workers" in fields["level"]["description"]


def test_rows_one_by_one_and_many_at_once_give_the_same_state():
    random = np.random.RandomState(4)
    above = random.randint(0, 50, 200)
    at_least = np.minimum(above + random.randint(0, 3, 200), 50)  # some tied
    alone, together, looked_at = (DriftMonitor(50, 60) for _ in range(3))
    together.record(above, at_least)
    for row in range(200):
        for monitor in (alone, looked_at):
            monitor.record(above[row : row + 1], at_least[row : row + 1])
        assert looked_at.state().count == row + 1
    first, *others = (monitor.state() for monitor in (together, alone, looked_at))
    for other in others:
        np.testing.assert_array_equal(other.ranks, first.ranks)
        assert other.log10_value == pytest.approx(first.log10_value, abs=1e-9)
        assert other.log10_maximum >= first.log10_maximum - 1e-9  # looked at after every batch of bets
