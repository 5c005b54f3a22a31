"""Requests to the verbs that end badly: too late, too many, abandoned, or by a bug of ours; none leaves anything."""

from __future__ import annotations

import gc
import logging
import socket
import weakref

import pytest

from service.errors import InvalidInput
from service.inference.batcher import Batcher
from service.inference.model import Model
from service.server.limits import LimitedProtocol
from tests.service.http import assert_problem, npy, serving
from tests.service.requests import (
    BODIES,
    IDLE,
    JSON,
    LEVELS,
    NPY,
    OCTETS,
    ROW,
    answers,
    connected,
    metric,
    post,
    raw,
    turn,
    under_way,
    until,
)


def test_a_server_that_stops_waits_for_the_body_of_a_request_that_has_begun(ppca_root):
    with serving(ppca_root, receive_timeout=0.2) as client:
        connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
        connection.sendall(raw()[:-10])
        until(client, lambda: under_way(client)[2] == 2)
    with connection, connection.makefile("rb") as stream:
        assert stream.read().startswith(b"HTTP/1.1 408")


def test_a_server_that_stops_waits_for_what_takes_long(ppca_root, all_are_long, stuck, monkeypatch):
    shutdown = LimitedProtocol.shutdown
    monkeypatch.setattr(LimitedProtocol, "shutdown", lambda self: (shutdown(self), stuck.release()))
    with serving(ppca_root) as client:
        connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
        connection.sendall(raw())
        until(client, lambda: stuck.rows)
    with connection, connection.makefile("rb") as stream:
        ((head, _),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in head


def test_a_deadline_that_passes_is_answered_once(ppca_root, all_are_long, stuck, caplog):
    with (
        serving(ppca_root, request_timeout=0.3, concurrency=1) as client,
        connected(client, raw()) as (connection, stream),
    ):
        ((head, body),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 503")
        assert b"no answer within 0.3 s (setting request_timeout)" in body
        assert under_way(client)[1] == 1  # the computation cannot be ended: its slot is taken
        stuck.release()
        until(client, lambda: under_way(client)[1] == 0)
        connection.sendall(raw())
        ((head, _),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert under_way(client) == IDLE
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_what_waits_when_its_client_leaves_is_never_computed(ppca_root, all_are_long, stuck):
    with (
        serving(ppca_root, concurrency=1) as client,
        connected(client, raw()) as (_, first),
        connected(client) as (stays, second),
    ):
        until(client, lambda: stuck.rows)
        with connected(client, raw()):
            until(client, lambda: under_way(client)[1] == 2)
            stays.sendall(raw())
            until(client, lambda: under_way(client)[1] == 3)
        until(client, lambda: left(client) == 1)
        stuck.release()
        assert [head[9:12] for head, _ in answers(first, 1) + answers(second, 1)] == [b"200"] * 2
        until(client, lambda: under_way(client) == IDLE)
        assert stuck.rows == [1, 1]


def left(client):
    """Requests to encode whose client had left."""
    return metric(client, 'vaeserve_requests_total{method="POST",route="/v1/models/{model}/encode",status="400"}')


def test_a_client_that_leaves_while_it_is_computed_for_leaves_nothing_behind(ppca_root, all_are_long, stuck):
    with serving(ppca_root, concurrency=1) as client:
        with connected(client, raw()):
            until(client, lambda: stuck.rows)
        until(client, lambda: left(client) == 1)
        assert under_way(client) == (0, 1, 1.0)  # the computation cannot be ended: its slot is taken
        stuck.release()
        until(client, lambda: under_way(client) == IDLE)
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200


def test_clients_that_hang_up_leave_nothing_behind(ppca_root, all_are_short, resolved):
    with serving(ppca_root) as client:
        for _ in range(5):
            with connected(client, raw()):
                pass
        until(client, lambda: len(resolved) >= 5)
        until(client, lambda: under_way(client) == IDLE)
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200
        assert len(resolved) == 6
        assert under_way(client) == IDLE


@pytest.mark.parametrize("kind", ["all_are_short", "all_are_long"])
@pytest.mark.parametrize(
    ("error", "status"), [(InvalidInput("x, row 0: expected better"), 422), (RuntimeError("a bug"), 500)]
)
def test_a_job_that_fails_is_answered_and_the_next_one_is_not_hurt(
    ppca_root, monkeypatch, request, capsys, kind, error, status
):
    request.getfixturevalue(kind)
    with serving(ppca_root) as client:
        for warm in range(2):  # as a first request, then as a repeated one
            with monkeypatch.context() as broken:
                broken.setattr(Model, "encode", lambda *given: (_ for _ in ()).throw(error))
                answer = post(client, "encode", "", OCTETS, ROW, **{"x-request-id": f"known-{warm}"})
            problem = assert_problem(answer, status)
            assert problem["request_id"] == f"known-{warm}"
            assert ("better" in problem["detail"]) == (status == 422)
            assert_explained(capsys, "RuntimeError: a bug" if status == 500 else None)
            assert post(client, "encode", "", OCTETS, ROW).status_code == 200
            assert under_way(client) == IDLE


def assert_explained(capsys, line):
    """What was logged since the last time holds a traceback that ends with that line; None: no traceback."""
    out, err = capsys.readouterr()
    assert ("Traceback" in out + err) == (line is not None)
    assert line is None or line in out + err


@pytest.mark.parametrize("place", ["service.formats.codecs.encode_npy", "service.api.routes.latents.read_x"])
def test_a_bug_before_or_after_the_job_is_a_500_and_no_broken_request(
    ppca_root, all_are_short, monkeypatch, capsys, place
):
    with serving(ppca_root) as client, connected(client) as (connection, stream):
        for _ in range(2):
            with monkeypatch.context() as broken:
                broken.setattr(place, lambda *given: 1 / 0)
                connection.sendall(raw(**{"content-type": NPY}, body=npy(LEVELS)))
                ((head, body),) = answers(stream, 1)
            assert head.startswith(b"HTTP/1.1 500")
            assert b"which the log explains under this request id" in body
            assert_explained(capsys, "ZeroDivisionError")
            assert under_way(client) == IDLE
            connection.sendall(raw(**{"content-type": JSON}, body=BODIES["json"][1]))
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")


def test_an_idle_connection_keeps_no_body(ppca_root, all_are_short, repeated, monkeypatch):
    rows, run = [], Batcher.run
    monkeypatch.setattr(
        Batcher, "run", lambda self, job, left: rows.append(weakref.ref(job.rows)) or run(self, job, left)
    )
    gc.collect()
    gc.disable()
    try:
        with serving(ppca_root) as client, connected(client) as (connection, stream):
            for _ in range(2):  # the second is read by the reader of the first
                connection.sendall(raw())
                answers(stream, 1)
            turn(client)
            assert repeated == [ROW]
            assert [row() for row in rows] == [None] * 2
    finally:
        gc.enable()


def test_bodies_count_in_the_memory_of_all(ppca_root):
    with serving(ppca_root, max_buffered_bytes=1024) as client:
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200
        for _ in range(2):
            assert_problem(post(client, "encode", "", OCTETS, ROW * 20), 429)
        assert under_way(client) == IDLE
    with serving(ppca_root, max_body_bytes=1024) as client:
        for _ in range(2):
            assert_problem(post(client, "encode", "", OCTETS, ROW * 20), 413)
        assert under_way(client) == IDLE


def test_a_body_counts_until_its_answer_and_no_longer(ppca_root, all_are_long, stuck, repeated):
    with serving(ppca_root, max_buffered_bytes=1024, concurrency=1) as client:
        with connected(client, raw(), raw()) as (_, stream):
            until(client, lambda: under_way(client) == (len(ROW), 1, 2.0))
            stuck.release()
            answers(stream, 2)
        for _ in range(40):
            assert post(client, "encode", "", OCTETS, ROW, NPY).status_code == 200
        assert len(repeated) == 41
        assert under_way(client) == IDLE


def test_a_full_queue_refuses(ppca_root, all_are_long, stuck):
    with serving(ppca_root, concurrency=1, queue=1) as client, connected(client, raw()) as (_, first):
        until(client, lambda: stuck.rows)
        with connected(client, raw()) as (_, second):
            until(client, lambda: under_way(client)[1] == 2)
            for verb in ("encode", "encode", "score"):  # a repeated request, and one that comes for the first time
                refused = post(client, verb, "", OCTETS, ROW)
                assert "try again later" in assert_problem(refused, 429)["detail"]
                assert int(refused.headers["retry-after"]) >= 1
            stuck.release()
            assert [head[9:12] for head, _ in answers(first, 1) + answers(second, 1)] == [b"200"] * 2
