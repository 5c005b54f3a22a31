"""What a request may cost is bounded before it is paid: errors of its fields, and the time of its samples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from service.api.inputs import MAX_FAULTS, read_parameters
from service.api.schemas import EncodeParameters
from service.errors import InvalidInput
from service.formats.media_types import JSON, NPY
from service.inference.cost import MIN_SAMPLES, Cost, timed
from tests.service.http import APPS, assert_problem, npy
from tests.service.requests import LEVELS, post


class CountedParameters(EncodeParameters):
    """Parameters that keep how many fields they were asked to validate."""

    @classmethod
    def model_validate(cls, obj, **options):
        counts.append(len(obj))
        return super().model_validate(obj, **options)


counts: list[int] = []


class FakeCall:
    """A call with a JSON body."""

    media_type = JSON
    body = b"{}"

    def __init__(self, document):
        self.document = document


def test_of_many_unknown_names_few_are_validated():
    """pydantic makes an error of each."""
    counts.clear()
    many = {f"k{number}": 1 for number in range(50_000)}
    with pytest.raises(InvalidInput) as refused:
        read_parameters(FakeCall(many | {"seed": -1}), CountedParameters(), "images")
    assert counts == [MAX_FAULTS + 1]
    assert str(refused.value).startswith("seed: Input should be greater than or equal to 0; k0: Extra inputs")
    assert str(refused.value).count(": ") == MAX_FAULTS


def test_of_many_unknown_names_the_first_are_named(client):
    images = LEVELS[:1].tolist()
    few = {"images": images} | {f"k{number}": 1 for number in range(30)}
    answer = assert_problem(post(client, "encode", "", JSON, json.dumps(few).encode(), JSON), 422)
    many = few | {f"l{number}": 1 for number in range(60_000)}
    assert (
        assert_problem(post(client, "encode", "", JSON, json.dumps(many).encode(), JSON), 422)["detail"]
        == (answer["detail"])
    )
    assert answer["detail"] == "; ".join(f"k{number}: Extra inputs are not permitted" for number in range(MAX_FAULTS))


def test_many_names_are_refused_unread(client):
    body = json.dumps({f"k{number}": 1 for number in range(70_000)}).encode()
    for verb in ("encode", "decode", "sample", "interpolate", "score"):
        detail = assert_problem(post(client, verb, "", JSON, body, JSON), 422)["detail"]
        assert detail == "the JSON body has 70000 names in 1 objects: at most 65536 each here"


@pytest.fixture
def model(client):
    """The served model, whose cost is put back afterwards."""
    model = APPS[client].state.context.repository.get().model
    before = model.cost
    yield model
    model.cost = before


def test_a_score_that_would_take_long_is_refused_with_its_seconds(client, model):
    """Bytes tell nothing of it: this body has 273."""
    small = npy(np.zeros((8, 1, 1, 1), np.uint8))
    for query, status in (("k=625", 200), ("k=626", 422), ("estimator=iwae&k=5000", 422), ("k=2&also=all", 200)):
        model.cost = Cost(sample=1e-3)
        assert post(client, "score", query, NPY, small, JSON).status_code == status
    model.cost = Cost(sample=1e-3)
    detail = assert_problem(post(client, "score", "estimator=iwae&k=5000", NPY, small, JSON), 422)["detail"]
    assert detail == (
        "8 images × k=5000 would take some 40 s here, as this model was measured: at most 5 s (setting "
        "max_request_seconds); send fewer rows at once, or ask for fewer samples"
    )


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_rows_that_a_backbone_takes_long_for_are_refused(client, model, verb):
    model.cost = Cost(row=1.0, sample=0.0)
    images = np.zeros((6, 1, 8, 8), np.uint8)
    assert "6 images" in assert_problem(post(client, verb, "", NPY, npy(images), JSON), 422)["detail"]
    assert post(client, verb, "", NPY, npy(images[:5]), JSON).status_code == 200


def test_a_model_is_measured_at_its_start_and_by_larger_runs_since(client, model):
    assert 0 < model.cost.sample < 1
    model.cost = Cost()
    assert model.estimated_seconds(1000, 5000) == 0
    post(client, "score", f"k={MIN_SAMPLES // 2}&seed=7", NPY, npy(np.zeros((1, 1, 8, 8), np.uint8)), JSON)
    assert math.isinf(model.cost.sample)
    post(client, "score", f"k={MIN_SAMPLES // 2}&seed=7", NPY, npy(np.zeros((2, 1, 8, 8), np.uint8)), JSON)
    assert 0 < model.cost.sample < 1
    assert model.estimated_seconds(10, 64) == pytest.approx(640 * model.cost.sample)


def test_the_cheapest_measurement_counts():
    cost = Cost(row=2.0)
    for samples, seconds in ((1000, 3.0), (1000, 1.0), (1000, 2.0), (MIN_SAMPLES - 1, 1e-9)):
        cost.learn(samples, seconds)
    assert cost.estimate(10, 5000) == pytest.approx(20 + 50_000 * 1e-3)


def test_the_first_time_of_a_work_does_not_count_and_the_least_of_the_others_does(monkeypatch):
    now, steps = 0.0, [5.0, 0.006, 0.004, 0.005, 0.006, 1.0]

    def work():
        nonlocal now
        now += steps.pop(0)

    monkeypatch.setattr("service.inference.cost.time.thread_time", lambda: now)
    assert timed(work) == pytest.approx(0.004)
    assert steps == [1.0]
