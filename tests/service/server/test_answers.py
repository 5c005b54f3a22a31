"""An answer leaves in one write, and one that its client does not read is counted, then given up."""

from __future__ import annotations

import asyncio
import socket
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.api.middleware import BodyBudget
from service.server.limits import AnswerTransport, LimitedProtocol
from service.settings import Settings
from tests.service.http import APPS, serving
from tests.service.requests import (
    BODIES,
    IDLE,
    JSON,
    NPY,
    ROW,
    answers,
    connected,
    post,
    raw,
    received,
    statuses,
    turn,
    under_way,
    until,
)


class Recorded:
    """A transport that keeps what it is told."""

    def __init__(self):
        self.calls, self.unread = [], 0

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.calls.append("abort")

    def writelines(self, parts):
        self.calls.append(b"".join(parts))

    def close(self):
        self.calls.append("close")

    def is_closing(self):
        return "close" in self.calls


def written(*calls):
    """What a transport was told after these calls on the joining one, and after the event loop's iteration."""

    async def body():
        recorded = Recorded()
        transport = AnswerTransport(recorded, BodyBudget(0, 0), 1e9)
        for name, *given in calls:
            getattr(transport, name)(*given)
        at_once = list(recorded.calls)
        await asyncio.sleep(0)
        return at_once, recorded.calls

    return asyncio.run(body())


def test_head_and_body_leave_together_and_at_once():
    """They are written apart."""
    together = [b"headbody"]
    assert written(("write", b"head"), ("write", b"body")) == (together, together)


def test_what_nothing_follows_leaves_with_the_iteration_of_the_event_loop():
    assert written(("write", b"100 Continue")) == ([], [b"100 Continue"])
    more = [("write", b"head"), ("write", b"body"), ("write", b"head"), ("write", b"body"), ("write", b"last")]
    assert written(*more) == ([b"headbody"] * 2, [b"headbody", b"headbody", b"last"])


def test_what_was_written_goes_before_the_end():
    at_once, _ = written(("write", b"head"), ("close",))
    assert at_once == [b"head", "close"]


def test_much_is_not_held_back():
    """A stream that is written without a pause must feel how fast its reader is."""
    at_once, _ = written(*[("write", bytes(2**16))] * 9)
    assert sum(map(len, at_once)) == 8 * 2**16


def test_nothing_is_written_to_a_connection_that_has_ended():
    async def body():
        recorded = Recorded()
        transport = AnswerTransport(recorded, BodyBudget(0, 0), 1e9)
        transport.write(b"answer")
        recorded.close()  # by the event loop
        await asyncio.sleep(0)
        assert transport.is_closing()
        return recorded.calls

    assert asyncio.run(body()) == ["close"]


@pytest.fixture
def writes(monkeypatch):
    """What is handed to the event loop's transport, write by write, on all connections."""
    writes, flush = [], AnswerTransport.flush

    def noted(self):
        if self._parts:
            writes.append(b"".join(self._parts))
        flush(self)

    monkeypatch.setattr(AnswerTransport, "flush", noted)
    return writes


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("accept", [NPY, JSON])
def test_an_answer_of_the_service_is_one_write(ppca_root, writes, name, accept):
    with serving(ppca_root) as client:
        for sent in (BODIES[name][1], BODIES[name][1], iter([BODIES[name][1]])):
            writes.clear()
            answer = post(client, "encode", "", BODIES[name][0], sent, accept)
            assert answer.status_code == 200
            assert len(writes) == 1
            assert writes[0].startswith(b"HTTP/1.1 200")
            assert writes[0].endswith(answer.content)


def test_a_refusal_is_one_write_and_answers_are_not_joined_with_the_next(ppca_root, writes):
    with serving(ppca_root) as client:
        answered = received(client, raw() + raw() + b"\0\r\n\r\n")
    assert statuses(answered) == [b"200", b"200", b"400"]
    assert [statuses(write) for write in writes] == [[b"200"], [b"200"], [b"400"]]
    assert b"".join(writes) == answered


class Slow:
    """A transport whose client reads so many bytes between two looks at it, until all is read."""

    def __init__(self, unread, *reads, end="watch"):
        self.budget, self.recorded, self.counts, self.later = BodyBudget(0, 0), Recorded(), [], None
        self.transport = asyncio.run(self._made())
        self.write(unread)
        getattr(self.transport, end)()
        for count in reads:
            self.counts.append(self.budget.held)
            self.read(count)
        self.counts.append(self.budget.held)

    async def _made(self):
        transport = AnswerTransport(self.recorded, self.budget, 7.0)
        transport._loop = self
        return transport

    def read(self, count):
        """So many bytes, and the time is over."""
        later, self.later = self.later, None
        self.recorded.unread -= count
        later()

    def write(self, count):
        for part in (b"", bytes(count)):
            self.transport.write(part)
        self.recorded.unread += count

    def call_soon(self, call): ...

    def call_later(self, seconds, call, *given):
        assert (seconds, self.later) == (7.0, None)
        self.later = lambda: call(*given)
        return self

    def cancel(self):
        self.later = None


@pytest.mark.parametrize("end", ["watch", "close"])
def test_an_answer_of_which_nothing_is_read_is_given_up(end):
    slow = Slow(1000, 0, end=end)
    assert slow.recorded.calls[-1] == "abort"
    assert slow.later is None
    slow.transport.end()
    assert slow.budget.held == 0


@pytest.mark.parametrize("end", ["watch", "close"])
def test_one_of_which_a_little_is_read_is_not(end):
    slow = Slow(1000, 1, 1, 998, end=end)
    assert "abort" not in slow.recorded.calls
    assert slow.later is None
    assert slow.counts == [1000, 999, 998, 0]


def test_what_is_not_read_counts_until_it_is():
    slow = Slow(1000, 100, 200)
    assert slow.counts == [1000, 900, 700]
    slow.transport.end()
    assert slow.budget.held == 0
    assert slow.later is None


def test_what_is_written_meanwhile_is_not_taken_for_what_was_not_read():
    slow = Slow(1000, 500)
    slow.write(700)
    slow.read(100)  # 1100 are left, more than when it was looked at; but a hundred have gone
    assert slow.budget.held == 1100
    slow.read(0)
    assert slow.recorded.calls[-1] == "abort"


def test_the_time_of_an_answer_does_not_begin_with_the_one_before():
    slow = Slow(1000)
    slow.recorded.unread = 0
    slow.transport.end()
    assert slow.later is None
    slow.write(10)
    slow.transport.watch()
    slow.read(1)
    assert slow.recorded.calls[-1] != "abort"


class Closing(Recorded):
    """As a connection's protocol needs it."""

    def get_extra_info(self, name, default=None):
        return default

    def can_write_eof(self):
        return True


def test_what_little_is_left_of_a_connection_that_closes_is_given_up_too(ppca_root):
    """Its client has read most, and then no more."""

    async def body():
        settings, budget, recorded = Settings(repository=ppca_root, send_timeout=0.01), BodyBudget(0, 0), Closing()
        config = uvicorn.Config(lambda *given: None, lifespan="off", log_config=None)
        protocol = LimitedProtocol(settings, budget, config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(recorded)
        protocol.transport.write(bytes(1000))
        protocol._answers.flush()
        recorded.unread = 1000
        protocol.pause_writing()
        protocol.transport.close()
        recorded.unread = 10
        protocol.resume_writing()
        while "abort" not in recorded.calls:
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        assert budget.held == 0

    asyncio.run(asyncio.wait_for(body(), 20))


@contextmanager
def asking_for_much(client, **headers):
    """A connection whose answer, which takes more than the kernel holds, is being sent, and the stream of it."""
    with socket.socket() as connection, connection.makefile("rb") as stream:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((client.base_url.host, client.base_url.port))
        rows = np.zeros((2000, 1, 8, 8), np.uint8).tobytes()
        connection.sendall(raw(rows, "encode?samples=200", accept=JSON, **headers))
        until(client, lambda: APPS[client].state.budget.held > len(rows) + 2**20)
        yield connection, stream


def test_a_client_that_reads_nothing_is_given_up(ppca_root, monkeypatch):
    lost, connection_lost = [], LimitedProtocol.connection_lost

    def noted(self, error):
        connection_lost(self, error)
        lost.append(self)

    monkeypatch.setattr(LimitedProtocol, "connection_lost", noted)
    with serving(ppca_root, send_timeout=0.3, max_batch=2000) as client, asking_for_much(client) as (connection, _):
        until(client, lambda: lost)
        assert under_way(client) == IDLE
        count = 0
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                count += len(piece)
        assert 0 < count < 2**23  # the beginning, which the kernel had taken


@pytest.mark.parametrize("headers", [{}, {"connection": "close"}])
def test_what_is_read_late_is_not_counted_any_more(ppca_root, headers):
    with (
        serving(ppca_root, send_timeout=1e6, max_batch=2000) as client,
        asking_for_much(client, **headers) as (connection, stream),
    ):
        assert len(answers(stream, 1)[0][1]) > 2**23
        until(client, lambda: APPS[client].state.budget.held == 0)
        if headers:
            assert stream.read() == b""
        else:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
        assert under_way(client) == IDLE


def test_what_is_not_read_fills_the_memory_of_all(ppca_root):
    """As bodies do: who comes then is asked to come again."""
    with (
        serving(ppca_root, send_timeout=1e6, max_batch=2000, max_buffered_bytes=2**20) as client,
        asking_for_much(client) as (_, stream),
    ):
        assert post(client, "encode", "", "application/octet-stream", ROW).status_code == 429
        answers(stream, 1)
        until(client, lambda: APPS[client].state.budget.held == 0)
        assert post(client, "encode", "", "application/octet-stream", ROW).status_code == 200


def test_nothing_is_counted_for_a_client_that_has_left(ppca_root):
    with serving(ppca_root, send_timeout=1e6, max_batch=2000) as client:
        with asking_for_much(client):
            assert APPS[client].state.budget.held > 2**20
        until(client, lambda: under_way(client) == IDLE)
        assert APPS[client].state.budget.held == 0
        assert post(client, "encode", "", "application/octet-stream", ROW).status_code == 200


def test_a_client_that_ends_its_side_gets_what_was_written_before(ppca_root, monkeypatch):
    """The connection is closed above what joins, not by the event loop below it."""
    closed, close = [], AnswerTransport.close

    def noted(self):
        closed.append(self.is_closing())
        close(self)

    monkeypatch.setattr(AnswerTransport, "close", noted)
    with serving(ppca_root) as client, connected(client) as (connection, stream):
        connection.shutdown(socket.SHUT_WR)
        assert stream.read() == b""
        turn(client)
    assert closed[0] is False


def test_no_delay_is_set_on_what_is_accepted(ppca_root, monkeypatch):
    """With Nagle's algorithm the second of two pipelined answers would wait for the acknowledgement of the first."""
    options, made = [], LimitedProtocol.connection_made

    def noted(self, transport):
        made(self, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(LimitedProtocol, "connection_made", noted)
    with serving(ppca_root) as client:
        assert client.get("/livez").status_code == 200
    assert options == [1]
