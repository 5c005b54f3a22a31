"""Several processes behind one port: what they count and watch, and how they live and die, on the command line."""

from __future__ import annotations

import inspect
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from service.api.app import create_app
from service.commands import serve
from service.errors import ConfigurationError
from service.server.address import bind, claimed_address
from service.server.draining import CLOSE, DrainingServer
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.http import npy
from tests.service.processes import NPY, alive, command, environment, until, workers

if sys.platform == "linux":
    from gunicorn.arbiter import Arbiter
    from gunicorn.errors import HaltServer
    from gunicorn.workers.base import Worker

    from service.server.workers import ORPHAN_SECONDS, Application, PatientArbiter, UvicornWorker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

N = 40  # connections: that all go to one of two workers has probability 2⁻³⁹
TAKEN = "address already in use"


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


def answering(service, request_id):
    """The workers of N requests with that id, once all of them are logged."""
    return set(until(lambda: len(who := service.who_answered(request_id)) == N and who))


def test_counters_are_of_all_workers_and_drift_is_of_the_one_that_answers(service):
    for i in range(N):
        assert service.score(images(2, seed=i), "counted").status_code == 200
    assert answering(service, "counted") == {0, 1}
    until(lambda: counted(service) == (N, 1))
    of_drift = ("vaeserve_drift_p_values_total", "", "ppca", "elbo", "1")
    until(lambda: service.metrics().get(of_drift) == 2 * N)  # each worker tells once a second
    drifts = {}
    for _ in range(10):
        values = service.metrics()
        assert values["vaeserve_requests_total", "POST", "/v1/score", "200"] == N
        assert values["vaeserve_images_scored_total", "ppca"] == 2 * N
        assert values["vaeserve_batch_size_sum", "score"] == 2 * N
        assert values["vaeserve_p_value_count", "ppca"] == 2 * N
        assert (values["vaeserve_workers",], values["vaeserve_worker_starts_total",]) == (2, 2)
        assert [value for key, value in values.items() if key[0] == "vaeserve_model_info"] == [1]
    until(lambda: drifts.update({(drift := service.get("/v1/drift").json())["worker"]: drift}) or len(drifts) == 2)
    mine, other = drifts[0], drifts[1]
    assert mine["seen"] + other["seen"] == 2 * N
    assert mine["level"] == other["level"] == Settings().drift_level / 2
    largest = max(drift["martingale"]["log10"] for drift in drifts.values())
    assert values["vaeserve_drift_martingale_log10", "", "ppca", "elbo", "1"] == largest
    smallest = min(drift["kolmogorov_smirnov"]["p_value"] for drift in drifts.values())
    assert values["vaeserve_drift_ks_p_value", "", "ppca", "elbo", "1"] == smallest


def test_bundles_are_loaded_once_and_every_process_says_what_it_is(service):
    (loaded,) = service.logged("model loaded")
    assert "worker" not in loaded
    assert service.logged("serving")[0]["workers"] == 2
    assert {number: Path(f"/proc/{pid}/comm").read_text() for number, pid in service.pids.items()} == {
        0: "worker 0\n",
        1: "worker 1\n",
    }


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
        assert (ended["worker"], ended["pid"], ended["hung"], ended["wait"]) == (0, killed, False, 0)
        assert service.wait_for("worker serves again")["pid"] == service.pids[0] != killed
        for i in range(N):
            assert service.score(images(1, seed=i), "replaced").json()["model"]["version"] == "1"
        assert answering(service, "replaced") == {0, 1}
        until(lambda: counted(service) == (3 * N, 1))
        values = service.metrics()
        assert (values["vaeserve_workers",], values["vaeserve_worker_starts_total",]) == (2, 3)


def test_a_worker_whose_event_loop_stands_still_is_replaced_while_the_other_serves(ppca_root):
    with workers(ppca_root, "--hang-timeout", "5") as service:
        stopped = service.pids[1]
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: _answers_at_once(service))
        ended = service.wait_for("worker ended")
        assert (ended["worker"], ended["pid"], ended["hung"]) == (1, stopped, True)
        service.wait_for("worker serves again")
        for i in range(N):
            service.score(images(1, seed=i), "again")
        assert answering(service, "again") == {0, 1}


def _answers_at_once(service):
    """Whether a new connection goes to the worker that is awake: the kernel gives some to the one that is not."""
    try:
        return httpx.get(f"{service.client().base_url}/livez", timeout=1).status_code == 200
    except httpx.TimeoutException:
        return False


def test_the_event_loop_ticks_while_all_threads_compute(ppca_root):
    settings = Settings(repository=ppca_root, port=0, concurrency=1, drain_seconds=0)
    app, ticked, computing = create_app(settings), threading.Semaphore(0), threading.Event()
    server = DrainingServer(app, settings, ticked.release)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        ticked.acquire()
        assert len(server.servers) == 1  # which shutdown closes
        app.state.context.pool.start(computing.wait)
        for _ in range(20):
            assert ticked.acquire(timeout=60)
    finally:
        computing.set()
        server.should_exit = True
        thread.join()


def test_a_worker_that_would_serve_other_bundles_does_not_start_and_the_others_go_on(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    with workers(tmp_path) as service:
        (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b"\n")
        os.kill(service.pids[0], signal.SIGKILL)
        assert "ppca/1 has changed" in service.wait_for("worker not started")["reason"]
        assert service.score(images(1)).status_code == 200
        waits = [service.wait_for("worker ended", count)["wait"] for count in (1, 2, 3)]
        assert waits == [0, 0.1, 0.2]
        os.kill(service.pids[1], signal.SIGKILL)
        assert service.process.wait(60) == 3
    assert not service.words


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


@pytest.mark.parametrize("count", ["1", "2"])
def test_sigterm_loses_no_request_on_busy_kept_connections(ppca_root, count):
    """Every answer in the drain window says that its connection closes, so that no request is sent on one that does."""
    x, answers, lost = npy(images(1)), [], []

    def ask_until_told_to_go(client):
        try:
            while (answer := client.post("/v1/score", content=x, headers=NPY)).headers.get("connection") != "close":
                answers.append(answer.status_code)
            answers.append(answer.status_code)
        except httpx.TransportError as error:
            lost.append(error)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    said = "serving" if count == "2" else f"Uvicorn running on http://127.0.0.1:{port} (Press CTRL+C to quit)"
    flags = ("--workers", count, "--port", str(port), "--drain-seconds", "1")
    with workers(ppca_root, *flags, said=said) as service:
        clients = [service.client() for _ in range(8)]
        threads = [threading.Thread(target=ask_until_told_to_go, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) > 50)
        service.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
        assert service.process.wait(60) == 0
    assert (lost, set(answers)) == ([], {200})


def test_sigint_ends_all_at_once_as_it_ends_one_process(ppca_root):
    with workers(ppca_root, "--drain-seconds", "1000") as service:
        folder, pids = service.folder, service.pids
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        assert not [pid for pid in pids.values() if alive(pid)]
        assert not folder.exists()


def test_no_worker_outlives_a_killed_master(ppca_root):
    with workers(ppca_root) as service:
        folder, pids = service.folder, service.pids
        service.process.kill()
        assert until(lambda: not any(alive(pid) for pid in pids.values()), 20)
        assert until(lambda: not folder.exists(), 5)


def test_no_worker_waits_for_requests_in_progress_once_its_master_is_killed(ppca_root):
    """Their bodies are on their way, for as long as receive_timeout allows."""
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 2\r\n\r\n1"
    with workers(ppca_root, "--receive-timeout", "600") as service, ExitStack() as held:
        pids, port = service.pids, service.logged("starting")[0]["port"]
        for _ in range(N):
            held.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head)
        until(lambda: service.metrics()["vaeserve_requests_in_flight",] == N + 1)
        service.process.kill()
        assert until(lambda: not any(alive(pid) for pid in pids.values()), ORPHAN_SECONDS + 15)


def run(repository, *flags, start=("-m", "service")):
    return subprocess.run(
        command(repository, "--log-level", "error", *flags, start=start),
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


def test_a_broken_bundle_ends_workers_that_load_it_themselves(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    (path / "decoder.onnx").write_bytes(b"no graph")
    several = run(tmp_path, "--workers", "2", "--threads", "2")
    assert several.returncode == 3
    assert "decoder.onnx" in several.stderr
    assert "Traceback" not in several.stderr


DEFECT = """
from service.server import workers
def fail(*arguments):
    raise RuntimeError("a defect of ours")
workers.create_app = fail
from service.__main__ import main
main()
"""


def test_an_unexpected_error_at_the_start_of_every_worker_ends_it_with_a_traceback(ppca_root):
    several = run(ppca_root, "--workers", "2", start=("-c", DEFECT))
    assert several.returncode == 3
    assert "RuntimeError: a defect of ours" in several.stderr
    assert "Traceback" in several.stderr


def test_a_folder_without_bundles_ends_it_as_it_ends_one_process(tmp_path):
    alone, several = (run(tmp_path, "--workers", count) for count in ("1", "2"))
    assert (several.returncode, several.stderr) == (alone.returncode, alone.stderr) == (1, alone.stderr)


def test_sessions_of_several_threads_are_loaded_by_every_worker(ppca_root):
    with workers(ppca_root, "--threads", "2") as service:
        assert {line["worker"] for line in service.logged("model loaded")} == {0, 1}
        assert service.score(images(1)).status_code == 200


def test_a_taken_port_ends_it_as_it_ends_one_process(ppca_root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        alone, several = (run(ppca_root, "--workers", count, "--port", port) for count in ("1", "2"))
    assert TAKEN in several.stderr
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
    assert sum(TAKEN in each for each in said) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_an_address_is_claimed_once_and_free_when_its_service_ends(host):
    with claimed_address(host, 0) as port:
        with pytest.raises(ConnectionRefusedError):  # nobody listens
            socket.create_connection(("127.0.0.1", port))
        for each in bind(host, port, shared=True):  # as workers do
            assert each.getsockname()[1] == port
            each.close()
        with pytest.raises(OSError, match="in use"), claimed_address(host, port):
            pass
    with claimed_address(host, port) as again:
        assert again == port


def test_an_address_on_which_another_program_listens_cannot_be_claimed():
    for sharing in (False, True):
        with (
            socket.create_server(("127.0.0.1", 0), reuse_port=sharing) as taken,
            pytest.raises(OSError, match="in use"),
            claimed_address("127.0.0.1", taken.getsockname()[1]),
        ):
            pass


SLOW_START = """
import pathlib, sys, time
loaded = pathlib.Path(sys.argv.pop(1))
from service.repository import model_repository
load = model_repository.load_repository
def wait_and_load(*arguments):
    while not loaded.exists():
        time.sleep(0.01)
    return load(*arguments)
model_repository.load_repository = wait_and_load
from service.__main__ import main
main()
"""


def test_nothing_is_accepted_before_its_worker_is_ready(ppca_root, tmp_path):
    loaded = tmp_path / "loaded"
    start = ("-c", SLOW_START, str(loaded))
    with workers(ppca_root, "--threads", "2", start=start, said="worker started") as service:
        service.wait_for("worker started", 2)
        for _ in range(N):
            with pytest.raises(httpx.ConnectError):
                service.get("/readyz")
        loaded.touch()
        service.wait_for("serving")
        for _ in range(N):
            assert service.get("/readyz").status_code == 200


NO_PROCESS = """
import errno, os, pathlib, sys
refused, fork = pathlib.Path(sys.argv.pop(1)), os.fork
def limited_fork():
    if refused.exists():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = limited_fork
from service.__main__ import main
main()
"""


def test_where_no_process_is_to_be_had_those_that_serve_serve_on(ppca_root, tmp_path):
    refused = tmp_path / "refused"
    with workers(ppca_root, start=("-c", NO_PROCESS, str(refused))) as service:
        refused.touch()
        os.kill(service.pids[0], signal.SIGKILL)
        tries = [service.wait_for("worker not started", count) for count in (1, 2, 3)]
        assert {line["reason"] for line in tries} == {"[Errno 11] Resource temporarily unavailable"}
        assert [line["wait"] for line in tries] == [0.1, 0.2, 0.4]
        assert service.score(images(1)).status_code == 200
        refused.unlink()
        assert service.wait_for("worker serves again")["worker"] == 0


LATE_TO_HEED = """
import signal, sys, time
from service.server import workers
init_process = workers.UvicornWorker.init_process
def wait_for_a_signal(worker):
    while worker.age > 2 and signal.SIGTERM not in signal.sigpending():
        time.sleep(0.01)
    init_process(worker)
workers.UvicornWorker.init_process = wait_for_a_signal
from service.__main__ import main
main()
"""


def test_a_worker_that_is_told_to_stop_as_soon_as_it_is_there_stops(ppca_root):
    with workers(ppca_root, "--drain-seconds", "0", start=("-c", LATE_TO_HEED)) as service:
        os.kill(service.pids[0], signal.SIGKILL)
        service.wait_for("worker ended")
        assert service.end(signal.SIGTERM) == 0  # long before the master's patience ends


FULL = """
import sys
from service.commands import serve
from service.errors import ConfigurationError
serve.os.access = lambda path, mode: False
from service.__main__ import main
main()
"""


def test_a_folder_elsewhere_does_where_shared_memory_cannot_be_written_and_the_working_folder_neither(
    ppca_root, tmp_path
):
    place = {**environment(), "TMPDIR": str(tmp_path)}
    with workers(ppca_root, start=("-c", FULL), env=place, cwd="/proc") as service:
        assert service.folder.parent == tmp_path
        assert service.score(images(1)).status_code == 200
    assert not list(tmp_path.iterdir())


def test_several_workers_need_a_folder_for_files(monkeypatch):
    def refuse(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(serve.tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigurationError, match=r"folder for files.*No usable"), serve._shared_folder():
        pass


def test_a_host_that_is_not_known_ends_it(ppca_root):
    done = run(ppca_root, "--workers", "2", "--host", "no.such.host.invalid")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "cannot listen on no.such.host.invalid, port 0: " in done.stderr


@pytest.fixture
def application(ppca_root, tmp_path):
    return Application(Settings(repository=ppca_root, workers=2, threads=1), tmp_path, {}, repository="loaded")


def test_loaded_bundles_do_not_go_into_a_fork_while_the_master_has_another_thread(application, monkeypatch):
    arbiter, worker, counts = SimpleNamespace(WORKERS={}), SimpleNamespace(), [2, 1]
    monkeypatch.setattr("service.server.workers.threads_of_process", counts.pop)
    application.pre_fork(arbiter, worker)
    assert worker.repository == "loaded"
    application.pre_fork(arbiter, worker)
    assert worker.repository is None
    application.repository = None  # then how many threads there are, which may take a second to tell, is not asked
    application.pre_fork(arbiter, worker)
    assert (worker.repository, counts) == (None, [])


def test_a_worker_has_the_smallest_number_that_no_living_one_has(application, monkeypatch):
    monkeypatch.setattr("service.server.workers.threads_of_process", lambda: 1)
    worker = SimpleNamespace()
    for taken, number in (((), 0), ((0, 1), 2), ((0, 2), 1), ((1,), 0)):
        application.pre_fork(SimpleNamespace(WORKERS={n: SimpleNamespace(number=n) for n in taken}), worker)
        assert worker.number == number


def test_a_worker_that_loads_bundles_says_that_it_lives(application, monkeypatch):
    notified = threading.Semaphore(0)

    def load(settings, digests):
        for _ in range(3):
            assert notified.acquire(timeout=60)
        return "loaded here"

    monkeypatch.setattr("service.server.workers.load_repository", load)
    worker = SimpleNamespace(settings=application.settings, app=application, notify=notified.release)
    assert UvicornWorker._load(worker) == "loaded here"


def test_what_cannot_start_is_tried_again_ever_later_and_at_once_after_it_has_served(monkeypatch):
    now, started = [100.0], []
    monkeypatch.setattr("service.server.workers.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Arbiter, "spawn_worker", lambda self: started.append(now[0]))
    arbiter = object.__new__(PatientArbiter)
    waits = [arbiter.back_off(failed=True) for _ in range(12)]
    assert waits[:4] == [0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == 30
    for now[0] in (100.0, 129.9, 130.0):
        arbiter.spawn_worker()
    assert started == [130.0]
    assert arbiter.back_off(failed=False) == 0
    arbiter.spawn_worker()
    assert started == [130.0, 130.0]


def test_the_second_worker_that_cannot_start_does_not_stop_a_master_that_stops(application, monkeypatch):
    """The workers of one start may fail together, and gunicorn would raise in the midst of its own ending."""
    ended = iter([(7, 3 << 8), (7, 3 << 8), (8, signal.SIGTERM), (0, 0)])
    monkeypatch.setattr("gunicorn.arbiter.os.waitpid", lambda pid, options: next(ended))
    monkeypatch.setattr(Arbiter, "stop", lambda self, graceful: self.reap_workers())
    arbiter = PatientArbiter(application)
    arbiter.WORKERS = {7: SimpleNamespace()}
    with pytest.raises(HaltServer) as halted:
        arbiter.reap_workers()
    assert halted.value.exit_status == 3
    worker = SimpleNamespace(pid=7, number=0, aborted=False, tmp=io.BytesIO())
    arbiter.WORKERS = {7: worker, 8: SimpleNamespace(pid=8, number=1, aborted=False, tmp=io.BytesIO())}
    arbiter.stop()
    assert (arbiter.WORKERS, worker.tmp.closed) == ({}, True)


def test_gunicorn_waits_longer_than_a_worker_may_take_to_end(ppca_root, tmp_path):
    settings = Settings(repository=ppca_root, workers=2, drain_seconds=7, request_timeout=11, hang_timeout=2.5)
    cfg = Application(settings, tmp_path, {}, None).cfg
    assert cfg.graceful_timeout > 7 + 11 + 1
    assert (cfg.timeout, cfg.address, cfg.preload_app) == (3, [], True)
    assert Application(settings.model_copy(update={"hang_timeout": 0}), tmp_path, {}, None).cfg.timeout == 0


def test_what_is_used_of_gunicorn_and_uvicorn_beyond_their_documents_is_there(application):
    """By name: none of it is promised to stay. service/server/workers.py and draining.py build on it."""
    for name in ("spawn_worker", "kill_worker", "stop", "run"):
        assert callable(getattr(Arbiter, name))
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT} == set(PatientArbiter.SIGNALS) < set(Arbiter.SIGNALS)
    assert (Arbiter.WORKERS, Arbiter.WORKER_BOOT_ERROR) == ({}, 3)
    assert list(inspect.signature(Arbiter.kill_worker).parameters) == ["self", "pid", "sig"]
    assert signal.SIGABRT in Worker.SIGNALS
    log = application.cfg.logger_class(application.cfg)
    worker = UvicornWorker(1, os.getppid(), [], application, 1.0, application.cfg, log)
    assert (worker.age, worker.ppid, worker.booted, worker.aborted) == (1, os.getppid(), False, False)
    worker.notify()
    assert worker.tmp.last_update() > 0
    worker.tmp.close()
    for name in ("init_process", "init_signals", "run"):
        assert callable(getattr(Worker, name))
    assert (log.error_log.propagate, log.error_log.handlers) == (True, [])

    server = DrainingServer(create_app(application.settings), application.settings)
    for name in ("handle_exit", "on_tick", "shutdown"):
        assert name in vars(DrainingServer.__base__)
    assert (server.should_exit, server.started, server.server_state.default_headers) == (False, False, [])
    assert CLOSE == (b"connection", b"close")


def test_one_process_knows_nothing_of_gunicorn():
    program = (
        "import sys, service.commands.cli, service.api.app, service.server.draining;"
        "print([name for name in sys.modules if name.partition('.')[0] == 'gunicorn'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("pid", ["master", "worker"])
def test_only_the_master_removes_the_folder(monkeypatch, tmp_path, pid):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(serve.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serve.os, "access", lambda path, mode: False)
    with ExitStack() as held:
        folder = held.enter_context(serve._shared_folder())
        if pid == "worker":
            monkeypatch.setattr(serve.os, "getpid", lambda: -1)
    assert folder.exists() == (pid == "worker")
