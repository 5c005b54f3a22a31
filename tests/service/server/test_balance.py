"""Connections spread evenly over workers: who gets which, and that none is lost on its way."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import uvloop

from service.api.app import create_app
from service.server.balance import FEW_REQUESTS, MANY_BRIEF, MESSAGE, TAKEN, Balance, Table
from service.server.draining import build_server
from service.settings import Settings
from tests.service.processes import until, workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
REQUEST = b"GET /livez HTTP/1.1\r\nhost: test\r\nx-request-id: %s\r\n\r\n"
LAST = b"GET /livez HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


def connect(stack, address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    connection = stack.enter_context(socket.socket(family))
    connection.settimeout(60)
    connection.connect(address)
    return connection


def answer(connection):
    """The status of the answer, which comes in one piece."""
    return int(connection.recv(65536).split(b" ", 2)[1])


# Real workers


def port(service):
    return service.logged("starting")[0]["port"]


def table(service):
    return Table(service.folder / "connections", 2)


def settled(service, count):
    """That many connections are counted, and none is on its way."""
    numbers = table(service)
    until(lambda: sum(numbers.present) == 2 + count and (numbers.sent == numbers.taken).all())


def one_by_one(stack, service, count, host="127.0.0.1"):
    """Lasting connections, each counted before the next is made."""
    before, made = sum(table(service).present) - 2, []
    for i in range(count):
        made.append(connect(stack, (host, port(service))))
        settled(service, before + i + 1)
    return made


def shares(service, connections, name):
    """How many of these connections each worker serves, as their answers' log lines say."""
    for connection in connections:
        connection.sendall(REQUEST % name.encode())
    assert {answer(connection) for connection in connections} == {200}
    return Counter(until(lambda: len(who := service.who_answered(name)) == len(connections) and who))


def test_lasting_connections_are_spread_evenly(ppca_root):
    """The kernel alone does so with probability 3/8 for four of them."""
    with workers(ppca_root) as service, ExitStack() as stack:
        for i in range(10):
            assert shares(service, one_by_one(stack, service, 4), f"even-{i}") == {0: 2, 1: 2}


def test_many_connections_at_once_are_all_answered_and_almost_even(ppca_root):
    """Both workers look at the same numbers at the same time. The kernel's share of one has a variance of 64."""
    with workers(ppca_root) as service, ExitStack() as stack:
        made = [connect(stack, ("127.0.0.1", port(service))) for _ in range(256)]
        assert abs(shares(service, made, "many")[0] - 128) <= 4


def test_the_connections_of_a_dead_worker_are_forgotten_and_its_successor_gets_the_next(ppca_root):
    with workers(ppca_root) as service, ExitStack() as stack:
        assert shares(service, one_by_one(stack, service, 8), "before") == {0: 4, 1: 4}
        os.kill(service.pids[0], signal.SIGKILL)
        service.wait_for("worker serves again")
        assert shares(service, one_by_one(stack, service, 4), "after") == {0: 4}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_headers_have_their_deadline_wherever_a_connection_went_and_the_log_names_the_client(ppca_root, host):
    with workers(ppca_root, "--host", host, "--header-timeout", "2") as service, ExitStack() as stack:
        made = one_by_one(stack, service, 8, host)
        for connection in made:
            connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert {answer(connection) for connection in made} == {408}
        until(lambda: len(service.logged("connection refused")) == 8)
        refused = service.logged("connection refused")
        assert Counter(line["worker"] for line in refused) == {0: 4, 1: 4}
        assert {tuple(line["client"]) for line in refused} == {each.getsockname()[:2] for each in made}


# One real worker, number 0 of 2, and a test that does what number 1 does


class Pair:
    """Worker 0's server and the other's place: its row of the table and its listening socket."""

    def __init__(self, server, address, folder):
        self.server, self.address = server, address
        self.path = str(folder / "worker-0.socket")
        self.table = Table(folder / "connections", 2)
        self.place = folder / "worker-1.socket"

    def serves(self, stack, backlog=8):
        """Number 1 appears, without connections."""
        listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.settimeout(60)
        listening.bind(str(self.place))
        listening.listen(backlog)
        self.table.present[1] = 1
        return listening

    def stays(self, stack):
        """A lasting connection of worker 0."""
        made = connect(stack, self.address)
        made.sendall(REQUEST % b"first")
        assert answer(made) == 200
        return made

    def send(self, stack, number, given):
        """Hand worker 0 a connection, with a request in it; the client's end and the way to worker 0."""
        client = connect(stack, given.getsockname())
        kept, _ = given.accept()
        stack.enter_context(kept)
        end = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        end.settimeout(60)
        end.connect(self.path)
        client.sendall(LAST)
        self.table.sent[0, 1] = number
        socket.send_fds(end, [MESSAGE.pack(1, number)], [kept.fileno()])
        return client, end


@contextmanager
def pair(repository, folder, loop="uvloop", **settings):
    chosen, ready = Settings(repository=repository, port=0, workers=2, **settings), threading.Event()
    server = build_server(create_app(chosen), chosen, ready.set, balance=Balance(folder, 0, 2))
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()

    errors = []

    def run():
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: errors.append(context))
            runner.run(server.serve([listening]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        yield Pair(server, address, folder)
    finally:
        server.should_exit = True
        thread.join()
    assert not errors


@pytest.fixture(params=LOOPS)
def two(request, ppca_root, tmp_path):
    with pair(ppca_root, tmp_path, request.param) as two:
        yield two


def receive(end):
    """What the other is sent: the connection's number and its socket, unread."""
    data, descriptors, _, _ = socket.recv_fds(end, MESSAGE.size, 1)
    sender, number = MESSAGE.unpack(data)
    assert sender == 0
    made = socket.socket(fileno=descriptors[0])
    made.settimeout(60)
    return number, made


def test_what_came_with_a_connection_goes_with_it_and_closing_here_does_not_end_it(two):
    with ExitStack() as stack:
        listening = two.serves(stack)
        two.stays(stack)
        client = connect(stack, two.address)
        client.sendall(LAST)
        end = stack.enter_context(listening.accept()[0])
        number, received = receive(end)
        with received:
            two.table.taken[1, 0] = number
            end.send(TAKEN)
            assert received.recv(65536) == LAST
            received.sendall(b"HTTP/1.1 204 X\r\n\r\n")
            assert answer(client) == 204
            until(lambda: two.table.present[0] == 2)
        assert client.recv(1) == b""  # no descriptor of it is left open


def test_what_the_other_had_not_taken_when_it_ended_is_served_here(two):
    with ExitStack() as stack:
        listening = two.serves(stack)
        two.stays(stack)
        clients = [connect(stack, two.address) for _ in range(3)]
        with listening.accept()[0] as end:
            first, received = receive(end)
            received.close()
            two.table.taken[1, 0] = first
            second, received = receive(end)  # between them one stays: here 2, there 2
            received.close()
            assert (first, second) == (1, 2)
        listening.close()
        for client in clients:
            client.sendall(LAST)
        ends = sorted(bool(_all(client)) for client in clients)
        assert ends == [False, True, True]  # the one that was taken ended with its taker
        until(lambda: two.table.present[0] == 2)
        assert two.table.sent[1, 0] == two.table.taken[1, 0] == 1
        assert two.table.present[1] == 0


def _all(client):
    received = b""
    try:
        while chunk := client.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def test_nothing_is_handed_to_who_does_not_serve(two):
    with ExitStack() as stack:
        made = [two.stays(stack) for _ in range(4)]
        assert two.table.present[0] == 5
        two.table.present[1] = 1  # as a killed worker leaves it
        made.append(two.stays(stack))
        assert list(two.table.present) == [6, 0]
        assert not two.table.sent.any()


def test_what_the_other_has_no_room_for_stays(two):
    with ExitStack() as stack:
        listening = two.serves(stack, backlog=0)
        full = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        full.connect(listening.getsockname())
        for _ in range(4):
            two.stays(stack)
        assert two.table.present[0] == 5
        assert not two.table.sent.any()


@pytest.mark.parametrize(
    ("seconds", "requests", "are_brief"),
    [(1000.0, 0, True), (1000.0, FEW_REQUESTS - 2, True), (1000.0, FEW_REQUESTS - 1, False), (0.0, 0, False)],
)
def test_where_connections_end_as_soon_as_they_begin_they_stay(two, monkeypatch, seconds, requests, are_brief):
    monkeypatch.setattr("service.server.balance.BRIEF_SECONDS", seconds)
    with ExitStack() as stack:
        for _ in range(MANY_BRIEF):
            with ExitStack() as brief:
                made = two.stays(brief)
                for _ in range(requests):  # and one, by which it is known to stay
                    made.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
                    assert made.recv(65536).startswith(b"HTTP/1.1 200")
            until(lambda: two.table.present[0] == 1)
        listening = two.serves(stack)
        two.stays(stack)
        connect(stack, two.address)
        until(lambda: two.table.present[0] == 3 or two.table.sent[1, 0] == 1)
        if not are_brief:
            receive(stack.enter_context(listening.accept()[0]))[1].close()
        assert two.table.sent[1, 0] == (not are_brief)


def test_what_is_on_its_way_here_counts(two):
    with ExitStack() as stack:
        listening = two.serves(stack)
        two.table.sent[0, 1] = 1
        connect(stack, two.address)
        number, received = receive(stack.enter_context(listening.accept()[0]))
        received.close()
        assert number == 1


def test_what_was_taken_counts_before_it_begins(tmp_path):
    given, client = socket.socketpair()
    balance, numbers = Balance(tmp_path, 0, 2), Table(tmp_path / "connections", 2)

    async def taken():
        balance.open(set(), type("Served", (asyncio.Protocol,), {}))
        balance._adopt(given)
        at_once = numbers.present[0]
        client.close()
        await asyncio.gather(*balance._tasks)
        balance.close()
        return at_once

    assert asyncio.run(taken()) == 2


def test_a_connection_handed_here_is_served_and_ends_though_its_sender_keeps_it(two):
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as given:
        client, end = two.send(stack, 7, given)
        assert _all(client).startswith(b"HTTP/1.1 200")
        assert end.recv(1) == TAKEN
        assert two.table.taken[0, 1] == 7
        until(lambda: two.table.present[0] == 1)


def test_a_connection_whose_sender_has_ended_is_served(two):
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as given:
        client, end = two.send(stack, 1, given)
        end.close()
        assert _all(client).startswith(b"HTTP/1.1 200")


def test_a_message_without_its_connection_ends_the_line_and_is_not_taken(two):
    """As where no descriptor is left: its sender serves it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(60)
        end.connect(two.path)
        end.send(MESSAGE.pack(1, 1))
        assert end.recv(1) == b""
        assert two.table.taken[0, 1] == 0


def test_a_draining_worker_is_handed_nothing_but_serves_what_is_on_its_way(ppca_root, tmp_path):
    with pair(ppca_root, tmp_path, drain_seconds=1000) as two, ExitStack() as stack:
        two.server.drain()
        until(lambda: two.table.present[0] == 0)
        two.stays(stack)
        assert two.table.present[0] == 0
        with socket.create_server(("127.0.0.1", 0)) as given:
            client, _ = two.send(stack, 1, given)
            assert _all(client).startswith(b"HTTP/1.1 200")
        two.server._stop_at = 0.0


def test_one_that_stops_leaves_what_it_has_not_taken_to_its_sender(ppca_root, tmp_path):
    with pair(ppca_root, tmp_path) as two:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.connect(two.path)
        until(lambda: two.server._balance._ends)
    with end:
        assert end.recv(1) == b""
    assert not (tmp_path / "worker-0.socket").exists()
    assert two.table.present[0] == 0


def test_where_there_is_no_folder_connections_stay(tmp_path):
    balance = Balance(tmp_path / "gone", 0, 2)

    async def is_handed_over():
        balance.open(set(), None)
        return balance.hand_over(None)

    assert not asyncio.run(is_handed_over())
    balance.leave()
    balance.close()


def test_the_table_counts_what_is_on_its_way(tmp_path):
    mine, others = Table(tmp_path / "table", 3), Table(tmp_path / "table", 3)
    assert mine.fewest() == 0
    assert mine.emptiest()[1] > 2**60  # nobody serves
    others.present[:] = [6, 0, 4]
    assert mine.fewest() == 3
    assert mine.emptiest() == (2, 3)
    others.sent[2, 0], others.sent[2, 1], others.taken[2, 0] = 9, 1, 7
    assert mine.coming(2) == 3
    assert mine.emptiest() == (0, 5)
