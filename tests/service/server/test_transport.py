"""What is written in one iteration of the event loop leaves in one piece, and nothing is lost or held back for ever."""

import asyncio
import socket
import time
from contextlib import contextmanager

import numpy as np
import pytest

from service.api.middleware import Bodies
from service.server.transport import GATHERED_BYTES, GatheringTransport
from tests.service.http import APPS, serving


class Recorded:
    """A transport that keeps what it is told."""

    def __init__(self):
        self.told, self.unread = [], 0

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.told.append("abort")

    def write(self, data):
        self.told.append(data)

    def writelines(self, parts):
        self.told.append(b"".join(parts))

    def close(self):
        self.told.append("close")

    def write_eof(self):
        self.told.append("eof")

    def is_closing(self):
        return "close" in self.told


def gathered(*calls):
    """What a transport was told after these calls on the gathering one, and after the iteration."""

    async def body():
        recorded = Recorded()
        transport = GatheringTransport(recorded, asyncio.get_running_loop(), Bodies(0, 0), 1e9)
        for name, *given in calls:
            getattr(transport, name)(*given)
        during = list(recorded.told)
        await asyncio.sleep(0)
        return during, recorded.told

    return asyncio.run(body())


def test_writes_of_one_iteration_leave_together_at_its_end():
    assert gathered(("write", b"head"), ("write", b"body")) == ([], [b"headbody"])


@pytest.mark.parametrize(("call", "told"), [("close", "close"), ("write_eof", "eof")])
def test_what_was_written_goes_before_the_end(call, told):
    during, after = gathered(("write", b"head"), ("write", b"body"), (call,))
    assert during == after == [b"headbody", told]


def test_much_is_not_held_back():
    """A stream that is written without a pause must feel how fast its reader is."""
    large = bytes(GATHERED_BYTES)
    during, after = gathered(("write", large), ("write", b"x"), ("write", b"y"))
    assert during == [large + b"x"]
    assert after == [large + b"x", b"y"]


def test_all_else_is_the_transport_s():
    async def body():
        recorded = Recorded()
        transport = GatheringTransport(recorded, asyncio.get_running_loop(), Bodies(0, 0), 1e9)
        assert not transport.is_closing()
        transport.close()
        return transport.is_closing()

    assert asyncio.run(body())


def test_an_answer_of_the_service_is_one_write(ppca_root, monkeypatch):
    told = []
    kept = GatheringTransport.flush
    monkeypatch.setattr(GatheringTransport, "flush", lambda self: told.append(list(self._parts)) or kept(self))
    with serving(ppca_root) as client:
        body = np.zeros((2, 1, 8, 8), np.uint8).tobytes()
        octets = {"content-type": "application/octet-stream"}
        answer = client.post("/v1/encode", content=iter([body]), headers=octets)  # by ASGI, which writes head and body
    assert answer.status_code == 200
    whole = [b"".join(parts) for parts in told if parts]
    assert len(whole) == 1
    assert whole[0].endswith(answer.content)


def test_nothing_is_written_to_a_connection_that_has_ended():
    async def body():
        recorded = Recorded()
        transport = GatheringTransport(recorded, asyncio.get_running_loop(), Bodies(0, 0), 1e9)
        transport.write(b"answer")
        recorded.close()  # by the loop
        await asyncio.sleep(0)
        return recorded.told

    assert asyncio.run(body()) == ["close"]


class Slow:
    """A transport whose peer reads so many bytes between two looks, until all is read."""

    def __init__(self, held, *read, end="hold"):
        self.bodies, self.recorded, self.counts = Bodies(0, 0), Recorded(), []
        self.transport = GatheringTransport(self.recorded, self, self.bodies, 7.0)
        self.write(held)
        getattr(self.transport, end)()
        for count in read:
            self.counts.append(self.bodies.held)
            self.read(count)
        self.counts.append(self.bodies.held)

    later = None

    def read(self, count):
        """So many bytes, and the time is over."""
        later, self.later = self.later, None
        self.recorded.unread -= count
        later()

    def write(self, count):
        self.transport.write_whole(bytes(count))
        self.recorded.unread += count

    def call_later(self, seconds, call, *given):
        assert (seconds, self.later) == (7.0, None)
        self.later = lambda: call(*given)
        return self

    def cancel(self):
        self.later = None


@pytest.mark.parametrize("end", ["hold", "close"])
def test_an_answer_of_which_nothing_is_read_is_given_up(end):
    slow = Slow(1000, 0, end=end)
    assert slow.recorded.told[-1] == "abort"
    assert slow.later is None


@pytest.mark.parametrize("end", ["hold", "close"])
def test_one_of_which_a_little_is_read_is_not(end):
    slow = Slow(1000, 1, 1, 998, end=end)
    assert "abort" not in slow.recorded.told
    assert slow.later is None


def test_what_is_held_counts_among_the_bodies_until_it_is_read():
    slow = Slow(1000, 100, 200, end="hold")
    assert slow.counts == [1000, 900, 700]
    slow.transport.release()
    assert slow.bodies.held == 0
    assert slow.later is None
    assert Slow(1000, 100, end="close").counts == [0, 0]


def test_what_is_written_meanwhile_is_not_taken_for_what_was_not_read():
    slow = Slow(1000, 500)
    slow.write(700)
    slow.read(100)  # 1100 are held, more than when it was looked at; but a hundred have gone
    assert slow.bodies.held == 1100
    slow.read(0)
    assert slow.recorded.told[-1] == "abort"


def test_the_time_of_an_answer_does_not_begin_with_the_one_before():
    slow = Slow(1000)
    slow.recorded.unread = 0
    slow.transport.release()
    assert slow.later is None
    slow.write(10)
    slow.transport.hold()
    slow.read(1)
    assert slow.recorded.told[-1] != "abort"


def test_what_little_is_held_when_it_is_closed_is_looked_after():
    slow = Slow(1000, end="close")
    slow.recorded.unread = 10
    slow.transport.release()
    slow.read(1)
    assert slow.recorded.told[-1] == "close"
    slow.read(0)
    assert slow.recorded.told[-1] == "abort"
    slow.transport.end()
    assert slow.later is None


@contextmanager
def asking_for_much(client):
    """A connection whose answer, which takes more than the kernel holds, is being sent: (connection, bodies held)."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((client.base_url.host, client.base_url.port))
        rows = np.zeros((2000, 1, 8, 8), np.uint8).tobytes()
        head = f"POST /v1/encode?samples=200 HTTP/1.1\r\nhost: x\r\ncontent-length: {len(rows)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/octet-stream\r\n\r\n" + rows)
        bodies = APPS[client].state.direct.bodies
        while bodies.held <= len(rows):
            assert client.get("/livez").status_code == 200
        assert bodies.held > 2**20
        yield connection, bodies


def nothing_is_held(client, bodies):
    """At some time soon."""
    deadline = time.monotonic() + 20
    while bodies.held and time.monotonic() < deadline:
        assert client.get("/livez").status_code == 200
    return not bodies.held


def test_a_client_that_reads_nothing_is_given_up(ppca_root):
    with (
        serving(ppca_root, send_timeout=0.3, max_batch=2000) as client,
        asking_for_much(client) as (connection, held),
    ):
        assert nothing_is_held(client, held)
        received = sum(map(len, iter(lambda: connection.recv(65536), b"")))
        assert 0 < received < 2**23  # the beginning, which the kernel had taken


def test_what_is_read_late_is_not_held_any_more(ppca_root):
    with serving(ppca_root, send_timeout=1e6, max_batch=2000) as client, asking_for_much(client) as (connection, held):
        stream = connection.makefile("rb")
        while not (line := stream.readline()).startswith(b"content-length"):
            pass
        while stream.readline() != b"\r\n":
            pass
        assert len(stream.read(int(line.split()[1]))) > 2**23
        assert nothing_is_held(client, held)
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert stream.readline().startswith(b"HTTP/1.1 200")
        stream.close()


def test_nothing_is_held_for_a_client_that_has_left(ppca_root):
    with serving(ppca_root, send_timeout=1e6, max_batch=2000) as client, asking_for_much(client) as (connection, held):
        connection.close()
        assert nothing_is_held(client, held)
