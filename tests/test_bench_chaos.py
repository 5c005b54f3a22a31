"""The killing of workers: how the end of a request is told, whose fault a loss is, and a short run."""

import asyncio
import os
import socket
from collections import Counter
from contextlib import asynccontextmanager, suppress

import pytest

from bench.callers import Callers, Case, End, Loss, Record, connect, connections_to, read_answer, sockets_of
from bench.chaos import Strike, _answers, _terms, main

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CASE = Case(b"GET / HTTP/1.1\r\n\r\n", b"ok")


async def ended(do, wait_to_send=False):
    """How a request ends whose server does ``do`` with the accepted socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening, await connect(listening.getsockname()) as connection:
        accepted, _ = listening.accept()
        if not wait_to_send:
            connection.send(CASE.request)
        do(accepted)
        accepted.close()
        if wait_to_send:
            connection.send(CASE.request)
        return await read_answer(connection)


def answer(data):
    def do(accepted):
        accepted.recv(100)
        accepted.send(data)

    return do


@pytest.mark.parametrize(
    ("do", "wait_to_send", "end"),
    [
        (answer(OK), False, None),
        (answer(OK[:-1]), False, End.CUT),
        (answer(OK[:9]), False, End.CUT),
        (answer(b""), False, End.DROPPED),
        (lambda accepted: None, False, End.UNREAD),
        (lambda accepted: None, True, End.UNREAD),
    ],
)
def test_what_a_server_has_read_is_known_from_how_it_closes(do, wait_to_send, end):
    found, head, body = asyncio.run(ended(do, wait_to_send))
    assert found is end
    assert (head.startswith(b"HTTP/1.1 200"), body) == ((True, b"ok") if end is None else (False, b""))


@asynccontextmanager
async def serving(*answers):
    """A server that gives each connection these answers, one a request, and then closes it."""

    async def serve(reader, writer):
        with suppress(asyncio.IncompleteReadError):  # a caller that is stopped closes without a request
            for data in answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(data)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()


def test_callers_count_how_their_requests_end():
    async def run():
        other = OK.replace(b"ok", b"no")
        later = OK.replace(b"200 OK", b"503 Later")
        async with serving(OK, OK, other, later, OK[:-1]) as address:
            callers = Callers(address, [CASE], [1.0], 3)
            while callers.record.ends[End.CUT] < 3:
                await asyncio.sleep(0)
            await callers.stop()
        return callers.record

    record = asyncio.run(run())
    assert record.ends[End.RIGHT] >= 6
    assert record.ends[End.WRONG] >= 3
    assert record.ends[End.REFUSED] >= 3
    assert len(record.losses) == record.ends[End.CUT] + record.ends[End.DROPPED] + record.ends[End.UNREAD]
    assert record.examples[0].endswith(b"no")
    assert len(record.right_at) == record.ends[End.RIGHT]


def test_a_caller_that_is_not_let_in_has_finished_once_the_service_is_to_end():
    async def run():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = listening.getsockname()
        callers = Callers(address, [CASE], [1.0], 4)
        while callers.record.refused_connections < 4:
            await asyncio.sleep(0)
        callers.let_go()
        await asyncio.wait_for(callers.wait(), 30)
        return callers.record

    record = asyncio.run(run())
    assert record.refused_connections >= 8  # each caller once before it may go, and once as it goes
    assert not record.ends
    assert not record.losses


def test_an_answer_that_closes_is_followed_by_another_connection():
    async def run():
        async with serving(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as address:
            callers = Callers(address, [CASE], [1.0], 1)
            while callers.record.ends[End.RIGHT] < 5:
                await asyncio.sleep(0)
            await callers.stop()
        return callers.record

    assert not asyncio.run(run()).losses


def test_a_connection_is_found_by_its_port_and_its_process():
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        port = client.getsockname()[1]
        assert connections_to(listening.getsockname()[1]) == {port: 0}  # not accepted
        with listening.accept()[0]:
            inode = connections_to(listening.getsockname()[1])[port]
            assert inode in sockets_of(os.getpid())
    assert sockets_of(2**22) == set()


def test_a_loss_is_a_strikes_only_where_it_held_the_connection():
    killed = Strike(pid=1, is_stop=False, at=10.0, ports={5000})
    assert killed.explains(5000, connected=1.0, lost=10.1)
    assert not killed.explains(5001, connected=1.0, lost=10.1)  # another worker's
    assert not killed.explains(5000, connected=1.0, lost=9.9)  # before it
    assert not killed.explains(5000, connected=11.0, lost=12.0)  # the port of a later connection
    assert killed.explains(5001, connected=10.05, lost=10.1)  # accepted while one looked
    stopped = Strike(pid=1, is_stop=True, at=10.0, ports=set(), back=15.0)
    assert stopped.explains(5001, connected=14.0, lost=15.2)
    assert not stopped.explains(5001, connected=16.0, lost=16.5)


def test_the_longest_silence_counts_from_the_start_and_to_the_end():
    record = Record(right_at=[1.0, 2.0, 5.0])
    assert record.longest_silence(0.0, 6.0) == 3.0
    assert record.longest_silence(0.0, 9.0) == 4.0
    assert Record().longest_silence(1.0, 9.0) == 8.0
    assert record.right_between(1.5, 5.0) == 2


class Seen:
    """Callers that have seen this."""

    def __init__(self, ends, losses=()):
        self.record = Record(Counter(ends), list(losses))


class Probed:
    """Probes that were answered or not, by their start."""

    def __init__(self):
        self.probes = {11.0: True, 12.0: False, 17.0: False}


def failed(checks):
    return [check.name for check in checks if not check.is_met]


def test_what_must_not_be_is_failed():
    strikes = [Strike(1, False, 10.0, {1}), Strike(2, True, 10.0, {1}, back=15.0)]
    good = {End.RIGHT: 5}
    lost = Loss(1, 1.0, 10.1, End.DROPPED)
    checks = list(_answers(Seen(good, [lost]), strikes, 0.5, Probed()))
    assert failed(checks) == []
    assert "1 of 2 new connections" in checks[-1].seen
    assert len(failed(_answers(Seen(good | {End.WRONG: 1}), strikes, 0.5, Probed()))) == 1
    assert len(failed(_answers(Seen(good | {End.REFUSED: 1}), strikes, 0.5, Probed()))) == 1
    assert len(failed(_answers(Seen(good, [Loss(2, 1.0, 10.1, End.CUT)]), strikes, 0.5, Probed()))) == 1
    assert len(failed(_answers(Seen(good), strikes, 1.5, Probed()))) == 1
    assert len(failed(_answers(Seen({}), strikes, 0.5, Probed()))) == 1


def test_a_request_that_was_read_must_be_answered_after_sigterm():
    counts = Counter(RIGHT=9, UNREAD=4, half_answered=4)
    assert failed(_terms(counts, [0], [2.0])) == []
    for name in ("CUT", "DROPPED", "WRONG", "REFUSED", "half_lost", "left"):
        assert len(failed(_terms(counts + Counter({name: 1}), [0], [2.0]))) == 1, name
    assert len(failed(_terms(Counter(half_answered=4), [0], [2.0]))) == 1  # there was no load
    assert len(failed(_terms(counts, [0, 3], [2.0]))) == 1
    assert len(failed(_terms(counts, [None], [2.0]))) == 1  # it had not ended


@pytest.mark.slow
def test_a_service_outlives_its_workers_and_loses_nothing_when_it_ends(ppca_root, capsys):
    short = ["--seconds", "10", "--every", "2.5", "--hang-timeout", "3", "--terms", "1"]
    code = main(["--repository", str(ppca_root), "--connections", "16", *short])
    assert code == 0, capsys.readouterr().out
