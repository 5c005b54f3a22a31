"""Vectors and signals in every input format over real HTTP: equal answers, refusals in words, hostile bodies."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.hostile import table_payloads
from tests.service import linear_bundles as linear
from tests.service.http import assert_problem, npy, serving
from tests.service.tabular import CSV, JSON, MODELS, NPY, as_csv, post, rows_of

VERBS = {"encode": ["loc", "scale"], "reconstruct": ["rows"], "score": ["results"]}


@pytest.fixture(scope="module")
def client(linear_root):
    with serving(linear_root, default_model="table") as client:
        yield client


def bodies() -> dict[str, tuple[str, str | bytes]]:
    """The table's five rows in every format."""
    rows = rows_of("table")
    names, back = linear.FEATURES, [3, 1, 0, 2]
    objects = [{names[i]: float(row[i]) for i in back} for row in rows]
    return {
        "json lists": (JSON, json.dumps({"rows": rows.tolist()})),
        "json objects in another order": (JSON, json.dumps({"rows": objects})),
        "npy float64": (NPY, npy(rows.astype(np.float64))),
        "npy Fortran order": (NPY, npy(np.asfortranarray(rows))),
        "csv": (CSV, as_csv(rows)),
        "csv with a charset": ("Text/CSV; charset=utf-8", as_csv(rows)),
        "csv with a header": (CSV, as_csv(rows, names)),
        "csv with columns in another order": (CSV, as_csv(rows[:, back], [names[i] for i in back])),
        "csv as spreadsheets write it": (CSV, ("\ufeff" + as_csv(rows, names)).encode()),
        "csv with lone line feeds and blank lines at the end": (CSV, as_csv(rows, names, "\n") + "\n\n"),
        "csv with spaces": (CSV, as_csv(rows, names).replace(",", ", ").replace("mass,  dry", "mass, dry")),
    }


@pytest.mark.parametrize("name", bodies())
@pytest.mark.parametrize("verb", VERBS)
def test_every_format_of_a_table_gives_equal_answers(client, verb, name):
    kind, body = bodies()[name]
    answer = client.post(f"/v1/{verb}", content=body, headers={"content-type": kind})
    assert answer.status_code == 200, answer.text
    assert answer.json() == post(client, "table", verb, rows_of("table")).json()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("table", rows_of("table")[0]),
        ("mixture", rows_of("mixture")[0]),
        ("mixture", rows_of("mixture")[:1]),
        ("whitening", rows_of("whitening")[:1]),
    ],
)
def test_a_single_row_needs_no_axis_of_rows(client, name, array):
    row = rows_of(name)[:1]
    assert post(client, name, "score", array).json() == post(client, name, "score", row).json()
    by_json = client.post(f"/v1/models/{name}/score", json={"rows": array.tolist()})
    assert by_json.json() == post(client, name, "score", row).json()


def test_a_signal_s_line_of_csv_is_channel_after_channel(client):
    rows = rows_of("mixture")
    body = as_csv(rows.reshape(5, -1))
    answer = client.post("/v1/models/mixture/score", content=body, headers={"content-type": CSV})
    assert answer.json() == post(client, "mixture", "score", rows).json()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_rows_together_are_bitwise_the_single_calls(client, name, verb):
    rows = rows_of(name, 9)
    together = post(client, name, verb, rows).json()
    for field in VERBS[verb]:
        assert together[field] == [post(client, name, verb, row[None]).json()[field][0] for row in rows]


@pytest.mark.parametrize("accept", ["image/png", "image/gif", "image/*"])
@pytest.mark.parametrize("verb", ["reconstruct", "interpolate"])
def test_numbers_that_are_no_image_make_no_picture(client, verb, accept):
    problem = assert_problem(post(client, "table", verb, rows_of("table")[:2], accept), 406)
    assert "application/json, application/x-npy" in problem["detail"]


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x", "application/octet-stream", ""])
def test_a_body_of_images_is_415_with_what_is_read(client, kind):
    answer = client.post("/v1/score", content=b"body", headers={"content-type": kind} if kind else {})
    detail = assert_problem(answer, 415)["detail"]
    assert "vectors of 4 numbers ('length', 'mass, dry', 'ratio' and 1 more)" in detail
    assert "text/csv" in detail


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (CSV, "1,2,3,4\n1,nan,3,4", "row 1, 'mass, dry': a finite float32 number expected"),
        (CSV, "1,2,3,4\n1,x,3,4", "row 1, 'mass, dry': 'x', a number expected"),
        (CSV, "1,2,3,4\n\n1,2,3,4", "row 1 has 0 values: 4 expected, separated by commas"),
        (CSV, "1;2;3;4", "the CSV's header: unknown '1;2;3;4'"),
        (CSV, "length,ratio,count\n1,2,3", "the CSV's header: missing 'mass, dry'"),
        (CSV, 'length,ratio,count,"mass, dry",ratio', "the CSV's header holds 'ratio' more than once"),
        (
            CSV,
            "length,width,ratio,count",
            "unknown 'width'; the features are 'length', 'mass, dry', 'ratio' and 1 more",
        ),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3]]}', "row 1 has shape (3,): (4,) expected"),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3,null]]}', "row 1: numbers in nested lists expected"),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3,1e39]]}', "row 1, 'count': a finite float32 number expected"),
        (JSON, '{"rows": [{"length": 1}]}', "row 0: missing 'mass, dry', 'ratio', 'count'"),
        (JSON, '{"images": [[1,2,3,4]]}', '"images" is not read here: expected rows'),
        (NPY, npy(np.zeros((2, 5))), "rows have shape (2, 5): (N, 4) expected, vectors of 4 numbers"),
    ],
)
def test_an_error_names_the_row_and_the_feature(client, kind, body, words):
    answer = client.post("/v1/score", content=body, headers={"content-type": kind})
    assert words in assert_problem(answer, 422)["detail"]


def test_without_names_a_header_or_an_object_is_refused(client):
    for kind, body in ((CSV, "a,b,c,d,e\n1,2,3,4,5"), (JSON, '{"rows": [{"a": 1}]}')):
        answer = client.post("/v1/models/pca/score", content=body, headers={"content-type": kind})
        assert "no names" in assert_problem(answer, 422)["detail"]


PAYLOADS = table_payloads(linear.FEATURES)


@pytest.mark.parametrize("payload", PAYLOADS, ids=[f"{payload.verb}: {payload.name}" for payload in PAYLOADS])
def test_hostile_rows_are_refused(client, payload):
    headers = {"content-type": payload.content_type} if payload.content_type else {}
    response = client.post(f"/v1/models/table/{payload.verb}", content=payload.body, headers=headers)
    assert_problem(response)
    assert response.elapsed.total_seconds() < 1
    assert len(response.text) < 5000


def test_the_limits_of_a_request_hold_for_rows(linear_root):
    rows = rows_of("table", 9)
    with serving(linear_root, default_model="table", max_batch=8, max_numbers_in=20) as client:
        for n, status, setting in ((5, 200, ""), (8, 413, "max_numbers_in"), (9, 422, "max_batch")):
            for kind, body in ((NPY, npy(rows[:n])), (CSV, as_csv(rows[:n]))):
                answer = client.post("/v1/score", content=body, headers={"content-type": kind})
                assert answer.status_code == status
                assert setting in answer.text
        assert "over 8 rows" in answer.text, "a table is read no further than its limit"
