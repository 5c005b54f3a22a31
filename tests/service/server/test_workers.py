"""Several processes behind one port: what they count and watch together, and how they live and die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.errors import WorkerFailed
from service.server.address import bind_shared, claim, refuse_taken
from service.server.channel import connected_pair, encode
from service.server.draining import build_server
from service.server.supervisor import Process, Supervisor
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.http import npy
from tests.service.processes import NPY, alive, command, environment, until, workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

N = 40  # connections: that all go to one of two workers has probability 2⁻³⁹


@pytest.fixture(scope="module")
def service(ppca_root):
    """Read only: no test kills it or counts what another has sent."""
    with workers(ppca_root) as service:
        yield service


def counted(service):
    """Scores answered, and requests in flight: the one that asks. A worker counts only once its answer is sent."""
    values = service.metrics()
    answered = values.get(("vaeserve_requests_total", "POST", "/v1/score", "200"))
    return answered, values["vaeserve_requests_in_flight",]


def test_counters_and_drift_are_of_all_workers_whichever_is_asked(service):
    for i in range(N):
        assert service.score(images(2, seed=i), "counted").status_code == 200
    assert set(until(lambda: len(who := service.who_answered("counted")) == N and who)) == {0, 1}
    until(lambda: counted(service) == (N, 1))
    for _ in range(10):
        values = service.metrics()
        assert values["vaeserve_requests_total", "POST", "/v1/score", "200"] == N
        assert values["vaeserve_images_scored_total", "ppca"] == 2 * N
        assert values["vaeserve_batch_size_sum", "score"] == 2 * N
        assert values["vaeserve_p_value_count", "ppca"] == 2 * N
        assert (values["vaeserve_workers",], values["vaeserve_worker_starts_total",]) == (2, 2)
        assert [value for key, value in values.items() if key[0] == "vaeserve_model_info"] == [1]
        assert values["vaeserve_drift_p_values_total", "", "ppca", "elbo", "1"] == 2 * N
        assert values["vaeserve_unwatched_rows_total",] == 0
        drift = service.get("/v1/models/ppca/drift").json()
        assert (drift["seen"], drift["in_window"], sum(drift["histogram"])) == (2 * N, 2 * N, 2 * N)


def test_whoever_has_read_a_score_finds_it_in_the_next_answer_of_any_worker(service):
    """A row told by one worker is taken in before another's question is answered, however soon that comes."""
    x = npy(images(1))
    with ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in range(8)]
        seen = [client.get("/v1/drift").json()["seen"] for client in clients][-1]
        for i in range(1, N + 1):
            assert clients[0].post("/v1/score", content=x, headers=NPY).status_code == 200
            assert clients[i % 8].get("/v1/drift").json()["seen"] == seen + i


def test_the_ready_line_is_said_once_and_the_supervisor_holds_no_runtime(service):
    assert len(service.logged("serving")) == 1
    assert service.logged("serving")[0]["workers"] == 2
    assert "onnxruntime" not in Path(f"/proc/{service.process.pid}/maps").read_text()
    for pid in service.pids.values():
        assert "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()


def test_a_killed_worker_is_replaced_and_its_counts_stay(tmp_path):
    write_ppca_bundle(tmp_path)
    with workers(tmp_path) as service:
        for i in range(N):
            service.score(images(1, seed=i))
        write_ppca_bundle(tmp_path, version="2")  # later than the start: no worker serves it, the new one neither
        killed = service.pids[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: not alive(killed))
        for i in range(N):
            assert service.score(images(1, seed=i)).status_code == 200
        ended = service.wait_for("worker ended")
        assert (ended["worker"], ended["pid"], ended["exit_code"]) == (0, killed, -signal.SIGKILL)
        assert service.wait_for("worker serves again")["pid"] == service.pids[0] != killed
        for i in range(N):
            assert service.score(images(1, seed=i), "replaced").json()["model"]["version"] == "1"
        assert set(until(lambda: len(who := service.who_answered("replaced")) == N and who)) == {0, 1}
        until(lambda: counted(service) == (3 * N, 1))
        values = service.metrics()
        assert (values["vaeserve_workers",], values["vaeserve_worker_starts_total",]) == (2, 3)
        assert service.get("/v1/drift").json()["seen"] == 3 * N


def test_a_worker_whose_event_loop_stands_still_is_replaced(ppca_root):
    with workers(ppca_root, "--hang-timeout", "5") as service:
        stopped = service.pids[1]
        os.kill(stopped, signal.SIGSTOP)
        ended = service.wait_for("worker ended")
        assert (ended["worker"], ended["pid"], ended["exit_code"]) == (1, stopped, -signal.SIGKILL)
        assert "stood still for 5 s" in ended["reason"]
        service.wait_for("worker serves again")
        for i in range(N):
            service.score(images(1, seed=i), "again")
        assert set(until(lambda: len(who := service.who_answered("again")) == N and who)) == {0, 1}


class Child:
    killed = False

    def kill(self):
        self.killed = True


def watched(ppca_root, tmp_path, hang_timeout):
    """A supervisor, a worker that it watches, and that worker's end of the line."""
    supervisor = Supervisor(Settings(repository=ppca_root, port=1, workers=2, hang_timeout=hang_timeout), tmp_path)
    ours, theirs = connected_pair()
    return supervisor, Process(0, Child(), ours, ready=True), theirs


def test_only_silence_of_a_worker_that_serves_is_a_hang(ppca_root, tmp_path):
    supervisor, process, theirs = watched(ppca_root, tmp_path, 3)
    for _ in range(10):
        theirs.send(encode({"kind": "alive"}))
        supervisor._look_at(process)
    process.ready = False
    for _ in range(10):
        supervisor._look_at(process)
    process.ready = True
    supervisor._stopping.set()
    for _ in range(10):
        supervisor._look_at(process)
    supervisor._stopping.clear()
    for _ in range(2):
        supervisor._look_at(process)
    assert not process.child.killed
    supervisor._look_at(process)
    assert process.child.killed
    assert "stood still for 3 s" in process.failure
    process.line.close()
    theirs.close()


def test_the_event_loop_says_that_it_is_alive_while_all_threads_compute(ppca_root):
    """Each second, however long a computation takes."""
    settings = Settings(repository=ppca_root, port=0, concurrency=1, drain_seconds=0)
    app, told, computing = create_app(settings), threading.Semaphore(0), threading.Event()
    server = build_server(app, settings, on_second=told.release)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        told.acquire()
        pool = app.state.house.pool
        pool.enter()
        pool.start(computing.wait)
        for _ in range(2):
            assert told.acquire(timeout=60)
    finally:
        computing.set()
        server.should_exit = True
        thread.join()


def test_a_worker_that_would_serve_other_bundles_does_not_start_and_the_others_go_on(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    with workers(tmp_path) as service:
        (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b"\n")
        os.kill(service.pids[0], signal.SIGKILL)
        assert "ppca/1 has changed" in service.wait_for("worker ended", 2)["reason"]
        assert service.score(images(1)).status_code == 200
        os.kill(service.pids[1], signal.SIGKILL)
        assert service.process.wait(60) == 1
    assert len(service.words) == 1
    assert "ppca/1 has changed" in service.words[0]


def test_sigterm_drains_all_workers_and_leaves_nothing(ppca_root):
    with workers(ppca_root, "--drain-seconds", "2") as service:
        folder, pids = service.folder, service.pids
        assert folder.is_dir()
        service.process.send_signal(signal.SIGTERM)
        until(lambda: [service.get("/readyz").status_code for _ in range(10)] == [503] * 10, 2)
        assert service.score(images(1)).status_code == 200
        assert service.process.wait(60) == 0
        assert not [pid for pid in pids.values() if alive(pid)]
        assert not folder.exists()
        assert service.pids == pids


@pytest.mark.parametrize(("signals", "code"), [(["SIGINT"], 0), (["SIGTERM", "SIGTERM"], -signal.SIGTERM)])
def test_other_signals_end_it_at_once_as_they_end_one_process(ppca_root, signals, code):
    with workers(ppca_root, "--drain-seconds", "1000") as service:
        folder, pids = service.folder, service.pids
        for name in signals:
            service.process.send_signal(getattr(signal, name))
            if len(signals) > 1:
                until(lambda: service.process.poll() is not None or service.get("/readyz").status_code == 503)
                signals = signals[1:]
        assert service.process.wait(60) == code
        assert not [pid for pid in pids.values() if alive(pid)]
        assert not folder.exists()


def test_no_worker_outlives_a_killed_supervisor(ppca_root):
    with workers(ppca_root) as service:
        folder, pids = service.folder, service.pids
        service.process.kill()
        assert until(lambda: not any(alive(pid) for pid in pids.values()), 20)
        assert until(lambda: not folder.exists(), 5)


def run(repository, *flags):
    return subprocess.run(
        command(repository, "--log-level", "error", *flags),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=120,
    )


def test_a_broken_bundle_ends_it_as_it_ends_one_process(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    (path / "decoder.onnx").write_bytes(b"no graph")
    alone, several = (run(tmp_path, "--workers", count) for count in ("1", "3"))
    assert "decoder.onnx" in alone.stderr
    assert (several.returncode, several.stderr) == (alone.returncode, alone.stderr) == (1, alone.stderr)


def test_a_folder_without_bundles_ends_it_as_it_ends_one_process(tmp_path):
    alone, several = (run(tmp_path, "--workers", count) for count in ("1", "2"))
    assert (several.returncode, several.stderr) == (alone.returncode, alone.stderr) == (1, alone.stderr)


def test_a_taken_port_ends_it_as_it_ends_one_process(ppca_root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        alone, several = (run(ppca_root, "--workers", count, "--port", port) for count in ("1", "2"))
    assert "address already in use" in several.stderr
    assert (several.returncode, several.stderr.count("\n")) == (alone.returncode, 1) == (3, 1)


def test_the_port_of_running_workers_is_not_shared_with_another_service(service, ppca_root):
    port = str(service.logged("serving")[0]["port"])
    for count in ("1", "2"):
        assert run(ppca_root, "--workers", count, "--port", port).returncode == 3


def test_of_services_started_at_once_on_one_port_one_serves(ppca_root):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    flags = command(ppca_root, "--workers", "2", "--port", port)
    started = [subprocess.Popen(flags, stderr=subprocess.PIPE, text=True, env=environment()) for _ in range(3)]
    try:
        until(lambda: sum(each.poll() is not None for each in started) == 2)
        assert sorted(each.poll() for each in started if each.poll() is not None) == [3, 3]
    finally:
        for each in started:
            each.send_signal(signal.SIGINT)
        said = [each.communicate(timeout=60)[1] for each in started]
    assert sum("address already in use" in each for each in said) == 2


def test_an_address_is_claimed_once_and_free_when_its_service_ends():
    first = bind_shared("127.0.0.1", 0)
    second = bind_shared("127.0.0.1", first[0].getsockname()[1])
    locks = claim(first)
    refuse_taken("127.0.0.1", first[0].getsockname()[1])  # nobody listens
    with pytest.raises(OSError, match=r"error while attempting to bind on address .*: address already in use"):
        claim(second)
    for lock in locks:
        lock.close()
    for each in first + claim(second) + second:
        each.close()


def test_nothing_is_accepted_before_its_worker_is_ready(ppca_root):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def first_answer():
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz")
        except httpx.ConnectError:
            return None

    process = subprocess.Popen(
        command(ppca_root, "--workers", "2", "--port", str(port)), stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        assert until(first_answer).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_shared_sockets_have_one_port_and_do_not_listen(host):
    first = bind_shared(host, 0)
    port = first[0].getsockname()[1]
    second = bind_shared(host, port)
    assert {each.getsockname()[1] for each in first + second} == {port}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    first[0].listen()
    with pytest.raises(OSError, match=r"error while attempting to bind on address .*: address already in use"):
        refuse_taken(host, port)
    for each in first + second:
        each.close()
    refuse_taken(host, port)


def test_where_no_process_is_to_be_had_those_that_serve_serve_on(ppca_root, tmp_path, monkeypatch):
    supervisor = Supervisor(Settings(repository=ppca_root, port=1, workers=2), tmp_path)
    waited = []

    async def no_process(number):
        raise BlockingIOError("Resource temporarily unavailable")

    async def pause(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            supervisor._stopping.set()

    monkeypatch.setattr(supervisor, "_start", no_process)
    monkeypatch.setattr(supervisor, "_pause", pause)
    with pytest.raises(WorkerFailed, match="temporarily unavailable"):
        asyncio.run(supervisor._keep(0))
    monkeypatch.setattr(supervisor, "_others_serve", lambda: True)
    asyncio.run(supervisor._keep(0))
    assert waited == [0.1, 0.2, 0.4]
