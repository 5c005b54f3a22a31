"""Requests are remembered by method, path and query, and how to read them by headers and length: within bounds, and
never so that an answer differs."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest

from service.api.context import Call
from service.api.endpoint import MAX_KEY_CHARACTERS, MAX_READERS, MAX_RESOLVED
from service.inference.jobs import RequestReader
from tests.ppca_bundle import LATENT_DIM
from tests.service import tabular
from tests.service.http import APPS, assert_problem, npy, serving
from tests.service.requests import (
    JSON,
    LEVELS,
    NPY,
    OCTETS,
    PNG,
    ROW,
    answers,
    connected,
    exchanged,
    metric,
    png,
    post,
    raw,
    sample,
    turn,
)

pytestmark = pytest.mark.usefixtures("all_are_short")


@pytest.fixture(scope="module")
def server(ppca_root):
    with serving(ppca_root) as client:
        yield client


def forget(client):
    APPS[client].state.remembered.clear()


def said(pair):
    """An answer's status and body without what is every request's own."""
    head, body = pair
    return head[9:12], re.sub(rb'"request_id":"[^"]*"', b"", body)


def for_the_first_time(client, *requests):
    """What is answered to each request where none is remembered."""
    pairs = []
    for request in requests:
        forget(client)
        pairs += exchanged(client, request)
    return [said(pair) for pair in pairs]


@pytest.mark.parametrize("accept", [NPY, JSON])
@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score", "score?also=all"])
def test_a_repeated_request_is_answered_as_the_first(client, repeated, verb, accept):
    bodies = [ROW, bytes(range(len(ROW))), ROW[::-1]]
    requests = [raw(body, verb, accept=accept) for body in bodies]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert repeated == bodies[1:]
    assert len({body for _, body in pairs}) == 3
    assert pairs == for_the_first_time(client, *requests)
    assert repeated == bodies[1:]


def test_a_repeated_request_has_the_same_headers_and_an_id_of_its_own(client, repeated):
    pairs = exchanged(client, raw(), raw(), raw(bytes(range(len(ROW)))))
    assert len(repeated) == 2
    alike = {re.sub(rb"(?<=x-request-id: )\w+|date: [^\r]*", b"", head) for head, _ in pairs}
    assert len(alike) == 1
    assert len({re.search(rb"x-request-id: (\w+)", head)[1] for head, _ in pairs}) == 3


def test_what_is_remembered_serves_all_connections(client, repeated, resolved):
    for _ in range(2):
        assert exchanged(client, raw())[0][0].startswith(b"HTTP/1.1 200")
    assert (resolved, repeated) == ([False, True], [ROW])


@pytest.mark.parametrize("cut", [1, 30, -len(ROW), -1])
def test_a_repeated_request_may_come_in_pieces(client, repeated, cut):
    (first,) = exchanged(client, raw())
    with connected(client) as (connection, stream):
        for _ in range(2):
            connection.sendall(raw()[:cut])
            turn(client)
            connection.sendall(raw()[cut:])
            assert answers(stream, 1)[0][1] == first[1]
    assert repeated == [ROW] * 2


def test_repeated_requests_at_once_are_answered_in_their_order(client, repeated):
    other = bytes(range(len(ROW)))
    first, second = exchanged(client, raw(), raw(other))
    with connected(client, raw() + raw(other) + raw()) as (connection, stream):
        assert [body for _, body in answers(stream, 3)] == [first[1], second[1], first[1]]
        connection.sendall(raw(other))
        assert answers(stream, 1)[0][1] == second[1]
    assert repeated == [other, ROW, other, ROW, other]


def test_a_file_is_refused_behind_pixels_of_its_length(client, repeated):
    picture = png(LEVELS[0])
    file = picture + bytes(-len(picture) % len(ROW))
    pixels = raw(bytes(len(file)), accept=JSON)
    pairs = [said(pair) for pair in exchanged(client, pixels, raw(file, accept=JSON), pixels)]
    assert [status for status, _ in pairs] == [b"200", b"415", b"200"]
    assert b"the body is a PNG image: send it as image/png" in pairs[1][1]
    assert repeated == [bytes(len(file))]


def test_a_wrong_body_is_refused_in_the_same_words_behind_a_good_one(client, repeated):
    good, bad = raw(accept=JSON), raw(bytes(7), accept=JSON)
    pairs = [said(pair) for pair in exchanged(client, good, bad, bad, good)]
    assert [status for status, _ in pairs] == [b"200", b"422", b"422", b"200"]
    assert pairs[1] == pairs[2]
    assert b"a multiple of" in pairs[1][1]
    assert repeated == [ROW]


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_repeated_rows_of_a_table_or_a_signal_are_read_by_the_reader_of_the_first(linear_root, repeated, verb):
    with serving(linear_root) as client:
        for name in ("table", "mixture"):
            rows = [tabular.rows_of(name, 6)[start : start + 3] for start in (0, 3, 0)]
            texts = [said_of(tabular.post(client, name, verb, part)) for part in rows]
            assert repeated == [npy(part) for part in rows[1:]]
            assert texts[0] == texts[2] != texts[1]
            repeated.clear()
            wrong = tabular.post(client, name, verb, rows[0] * np.nan)
            assert "row 0" in assert_problem(wrong, 422)["detail"]
            assert repeated == []


def said_of(response):
    assert response.status_code == 200, response.text
    return response.text


def test_repeated_latents_are_decoded_as_the_first(client, repeated):
    """Of as many bytes: other latents, fewer of more bytes each, some that are no numbers, no array at all."""
    random = np.random.RandomState(0)
    rows = [random.standard_normal((4, LATENT_DIM)).astype(np.float32) for _ in range(3)]
    rows += [random.standard_normal((2, LATENT_DIM)), rows[0], rows[1], np.full_like(rows[0], np.nan)]
    bodies = [*map(npy, rows), b"x" * len(npy(rows[0]))]
    assert len({*map(len, bodies)}) == 1
    requests = [raw(body, "decode", **{"content-type": NPY}) for body in bodies]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert [status for status, _ in pairs] == [b"200"] * 6 + [b"422"] * 2
    assert repeated == [bodies[1], bodies[2], bodies[5]]  # of the shape of the one before
    assert pairs == for_the_first_time(client, *requests)


@pytest.mark.parametrize("accept", [NPY, JSON, PNG])
def test_repeated_samples_are_drawn_as_the_first(client, repeated, accept):
    queries = ["n=3&seed=1", "n=3&seed=2", "n=3&seed=1", "n=3&seed=1&temperature=0.5", "n=3&seed=2", "n=3&seed=1"]
    drawn = [sample(client, query, accept).content for query in queries]
    assert repeated == [b""] * 3
    assert len({*drawn}) == 3
    for query, content in zip(queries, drawn, strict=True):
        forget(client)
        assert sample(client, query, accept).content == content


GREY = [np.full((8, 8), value, np.uint8) for value in (0, 3, 77)]


@pytest.mark.parametrize("level", [0, 9])
@pytest.mark.parametrize("accept", [NPY, JSON])
def test_pictures_of_the_models_size_are_repeated_whatever_their_length(client, repeated, accept, level):
    bodies = [png(grey, level) for grey in (*GREY, LEVELS[0])]
    requests = [raw(body, accept=accept, **{"content-type": PNG}) for body in bodies]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert repeated == bodies[1:]
    assert pairs == for_the_first_time(client, *requests)


def test_what_the_headers_do_not_say_is_looked_at_in_each_body(client, repeated):
    """Of a body as long another may be no array, one of other rows, or hold numbers that are no pixels."""
    rows = [
        np.full((2, 8, 8), 0.5, np.float32),
        np.full((2, 1, 8, 8), 0.5, np.float32),
        np.full((2, 8, 8), 2.0, np.float32),
    ]
    good, alike, bad = map(npy, rows)
    assert len(good) == len(alike) == len(bad)
    bodies = [good, good, alike, bad, good[:-300] + bytes(300), b"x" * len(good), good]
    requests = [raw(body, accept=JSON, **{"content-type": NPY}) for body in bodies]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert pairs == for_the_first_time(client, *requests)
    assert {status for status, _ in pairs} == {b"200", b"422"}
    assert b"pixels as float32 from 0 to 1" in pairs[3][1]
    assert [body in (good, alike) or body == bodies[4] for body in repeated] == [True] * len(repeated)
    assert repeated[:2] == [good, alike]


def test_what_would_be_resized_is_no_repeated_request(client, repeated):
    natural, large = npy(np.full((2, 8, 8), 0.5, np.float32)), npy(np.full((2, 16, 16), 7, np.uint8))
    assert len(large) == len(natural)
    requests = [raw(body, **{"content-type": NPY}) for body in (natural, natural, large, natural)]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert repeated == [natural, natural]
    assert pairs == for_the_first_time(client, *requests)


def test_how_many_rows_an_array_has_is_looked_at_in_each_body(ppca_root, repeated):
    """Arrays of as many bytes: two rows of float32, and eight of uint8, which are more than may be answered."""
    two, eight = npy(np.full((2, 8, 8), 0.5, np.float32)), npy(np.zeros((8, 8, 8), np.uint8))
    assert len(two) == len(eight)
    with serving(ppca_root, max_numbers_out=60) as client:
        pairs = exchanged(client, *(raw(body, **{"content-type": NPY}) for body in (two, two, eight)))
    assert [head[9:12] for head, _ in pairs] == [b"200", b"200", b"422"]
    assert repeated == [two]


def test_a_picture_that_only_looks_like_the_one_before_is_read_as_any_other(client, repeated):
    """Damaged, of another size, or not of the plain kind: of as many bytes as the first."""
    # Stored, not compressed: a line takes a byte more than its pixels, and 8·9 = 4·18.
    first, wide = (png(np.arange(h * w, dtype=np.uint8).reshape(h, w), 0) for h, w in ((8, 8), (4, 17)))
    assert len(first) == len(wide)
    bodies = [first, wide, first[:-20] + bytes(20), first]
    requests = [raw(body, accept=JSON, **{"content-type": PNG}) for body in bodies]
    pairs = [said(pair) for pair in exchanged(client, *requests)]
    assert [status for status, _ in pairs] == [b"200", b"200", b"422", b"200"]
    assert pairs[0] == pairs[3] != pairs[1]
    assert pairs == for_the_first_time(client, *requests)
    assert repeated == [first]


def test_a_picture_beyond_a_limit_is_refused_whatever_came_before(ppca_root):
    """Of as many bytes as one that is within it, stored as it is: 8·9 = 24·3."""
    small, large = (png(np.zeros((h, w), np.uint8), 0) for h, w in ((24, 2), (8, 8)))
    assert len(small) == len(large)
    with serving(ppca_root, max_image_pixels=50) as client:
        for body, status in ((large, 413), (small, 200), (small, 200), (large, 413)):
            assert post(client, "encode", "", PNG, body).status_code == status
    few, many = png(GREY[0], 9), png(LEVELS[0], 0)
    with serving(ppca_root, max_image_bytes=len(few)) as client:
        for body, status in ((few, 200), (many, 413), (few, 200), (many, 413)):
            assert post(client, "encode", "", PNG, body).status_code == status


def test_repeated_rows_are_counted_as_others(ppca_root, repeated):
    with serving(ppca_root) as client:
        exchanged(client, *[raw(verb="score")] * 3)
        assert len(repeated) == 2
        assert metric(client, 'vaeserve_images_scored_total{model="ppca"}') == 3
        assert metric(client, 'vaeserve_batch_size_sum{verb="score"}') == 3
        assert metric(client, 'vaeserve_p_value_count{model="ppca"}') == 3
        assert client.get("/v1/models/ppca/drift").json()["seen"] == 3


def test_repeated_requests_are_refused_as_others_are(client, repeated, monkeypatch):
    assert post(client, "encode", "", OCTETS, ROW).status_code == 200
    with monkeypatch.context() as full:
        full.setattr(APPS[client].state.context.pool, "capacity", 0)
        assert "try again later" in assert_problem(post(client, "encode", "", OCTETS, ROW), 429)["detail"]
    assert post(client, "encode", "", OCTETS, ROW).status_code == 200
    assert repeated == [ROW] * 2


def kept_by(function):
    """What a closure or a partial function keeps."""
    closure = getattr(function, "__closure__", None) or ()
    return [*getattr(function, "args", ()), *(cell.cell_contents for cell in closure)]


def test_nothing_of_a_body_is_kept_with_what_is_remembered(client, repeated):
    for verb in ("encode", "reconstruct", "score"):
        for content_type, body in ((OCTETS, ROW), (NPY, npy(LEVELS)), (PNG, png(LEVELS[0]))):
            exchanged(client, *[raw(body, verb, **{"content-type": content_type})] * 2)
    latents = raw(npy(np.zeros((3, LATENT_DIM), np.float32)), "decode", **{"content-type": NPY})
    exchanged(client, latents, latents)
    for _ in range(2):
        sample(client, "n=3")
    assert len(repeated) == 11
    gc.collect()
    context = APPS[client].state.context  # other tests' may have been left with requests under way
    assert [each for each in gc.get_objects() if type(each) is Call and each.context is context and each.body] == []
    readers = [each for each in gc.get_objects() if type(each) is RequestReader]
    assert len(readers) >= 11
    for reader in readers:
        kept = [*kept_by(reader.run), *kept_by(reader.read), *kept_by(reader.answer)]
        assert not any(isinstance(value, np.ndarray | bytes) for value in kept)


def test_requests_are_remembered_within_bounds(client, resolved):
    endpoints = APPS[client].state.remembered
    for seed in range(MAX_RESOLVED + 5):
        assert post(client, "encode", f"seed={seed}", OCTETS, ROW).status_code == 200
    assert len(endpoints) == MAX_RESOLVED
    assert post(client, "encode", f"seed={MAX_RESOLVED}", OCTETS, ROW).status_code == 200
    assert post(client, "encode", "seed=0", OCTETS, ROW).status_code == 200
    assert resolved[-2:] == [True, False]  # the oldest are forgotten
    assert len(endpoints) == MAX_RESOLVED


def test_what_is_long_is_not_remembered(client, resolved, repeated):
    accept = "application/json" + ", text/html" * (MAX_KEY_CHARACTERS // len(", text/html"))
    for _ in range(2):
        assert post(client, "encode", "", OCTETS, ROW, accept).status_code == 200
        assert post(client, "encode", "seed=1" + "&" * MAX_KEY_CHARACTERS, OCTETS, ROW).status_code == 200
    assert resolved == [False, False, True, False]
    assert repeated == []


def test_readers_are_remembered_within_bounds(client, repeated):
    for length in range(1, MAX_READERS + 3):
        assert post(client, "encode", "", OCTETS, ROW * length).status_code == 200
    for quality in range(MAX_READERS):
        assert post(client, "encode", "", OCTETS, ROW, f"{JSON};q=0.{quality + 10}").status_code == 200
    (endpoint,) = APPS[client].state.remembered.values()
    assert len(endpoint._readers) == MAX_READERS
    assert repeated == []
    for _ in range(2):
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200
    assert repeated == [ROW]  # the first had been forgotten
    assert MAX_RESOLVED * MAX_READERS * 2 * MAX_KEY_CHARACTERS < 2**25


def test_nothing_is_remembered_of_what_is_refused(client, resolved):
    for _ in range(2):
        assert_problem(post(client, "encode", "samples=-1", OCTETS, ROW), 422)
        assert_problem(post(client, "encode", "", OCTETS, ROW, at="/v1/models/nobody"), 404)
        assert_problem(client.get("/v1/models/ppca/encode"), 405)
    assert not APPS[client].state.remembered
    assert resolved == [False] * 6


def test_methods_paths_and_queries_are_told_apart(client, resolved):
    """GET and POST of one path, and queries that differ in spelling alone."""
    drawn = [sample(client, "n=1"), client.post("/v1/models/ppca/sample?n=1", headers={"accept": NPY})]
    assert drawn[0].content == drawn[1].content
    for at in ("/v1", "/v1/models/ppca", "/v1/models/ppca/versions/1"):
        assert post(client, "encode", "seed=1", OCTETS, ROW, at=at).status_code == 200
    for query in ("seed=2", "seed=%32", "seed=1"):
        assert post(client, "encode", query, OCTETS, ROW).status_code == 200
    assert resolved == [False] * 7 + [True]
