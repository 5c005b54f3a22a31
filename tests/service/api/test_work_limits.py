"""What a request may cost is bounded before it is paid: errors of its fields, and the time of its samples."""

from __future__ import annotations

import json

import pytest

from service.api.inputs import MAX_FAULTS, read_parameters
from service.api.schemas import EncodeParameters
from service.errors import InvalidInput
from service.formats.media_types import JSON
from tests.service.http import assert_problem
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
