"""The process that workers are forks of: what they share, what they do not, and what happens without it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from service.__main__ import seems_to_want_workers
from service.server.adoption import Child
from service.server.channel import encode
from service.server.forker import Started
from service.server.interpreters import fresh_interpreter
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.processes import Service, alive, command, environment, open_files, until, workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

N = 40


def descends_from(pid):
    """Processes of which that one is the parent."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_a_worker_in_place_of_a_dead_one_is_a_fork_too_and_loads_nothing(ppca_root):
    with workers(ppca_root) as service:
        nursery, first = service.nursery, service.pids
        os.kill(first[1], signal.SIGKILL)
        assert service.wait_for("worker serves again")["pid"] not in first.values()
        assert service.nursery == nursery
        assert sorted(descends_from(service.process.pid)) == sorted([nursery, *service.pids.values()])
        assert [line.get("worker") for line in service.logged("model loaded")] == [None]
        for pid in service.pids.values():
            assert command_line(pid) == command_line(service.process.pid)
        for _ in range(N):
            assert service.score(images(1)).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "variable", "expected"),
    [
        (["serve", "--workers", "2"], None, True),
        (["serve", "--port", "1", "--workers=auto"], None, True),
        (["serve", "--workers", "2", "--workers", "1"], "4", False),
        (["serve", "--workers", "1"], "4", False),
        (["serve", "--workers"], None, True),
        (["serve"], "4", True),
        (["serve"], None, False),
        (["score", "--workers", "2"], "4", False),
        ([], "4", False),
    ],
)
def test_the_command_line_tells_from_afar_whether_there_will_be_workers(arguments, variable, expected):
    environment = {} if variable is None else {"VAESERVE_WORKERS": variable}
    assert seems_to_want_workers(arguments, environment) == expected


def test_a_nursery_that_is_not_wanted_ends(ppca_root):
    """From afar 01 is not one, and is it when it is read."""
    asked = command(ppca_root, "--workers", "01")
    process = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, env=environment())
    service = Service(process)
    until(lambda: "Uvicorn running" in str(service.lines))
    assert descends_from(process.pid) == []
    service.end(signal.SIGINT)
    process.stderr.close()


@pytest.mark.parametrize(("flags", "code"), [(["--no-such-flag"], 2), (["--port", "many"], 1), (["--help"], 0)])
def test_a_command_that_does_not_serve_leaves_no_nursery(ppca_root, flags, code):
    """Whoever waits for the end of what the processes write waits for all of them."""
    asked = [*command(ppca_root, "--workers", "2"), *flags]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_nursery_is_ended_once():
    """Awaited before, its pid may be another process's by now."""
    line, other = socket.socketpair()
    first = Started(os.posix_spawn("/bin/sleep", ["sleep", "600"], {}), line)
    first.end()
    assert not alive(first.pid)
    ended = Started(os.posix_spawn("/bin/true", ["true"], {}), other)
    os.waitpid(ended.pid, 0)
    ended.end()


def test_workers_with_threads_of_their_own_load_the_bundles_themselves(ppca_root):
    """A fork does not copy the threads of a session."""
    with workers(ppca_root, "--threads", "2") as service:
        assert sorted(line["worker"] for line in service.logged("model loaded")) == [0, 1]
        assert service.score(images(64)).status_code == 200


def test_workers_share_no_descriptor_and_hold_none_of_who_started_the_service(ppca_root):
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    with os.fdopen(writing, "w"), os.fdopen(reading), workers(ppca_root, pass_fds=[reading]) as service:
        foreign, streams = os.readlink(f"/proc/self/fd/{reading}"), {os.readlink(f"/proc/{service.process.pid}/fd/2")}
        processes = [service.process.pid, service.nursery, *service.pids.values()]
        held = [
            {file for file in open_files(pid) if file.startswith(("socket:", "pipe:"))} - streams for pid in processes
        ]
        assert foreign in held[0]
        assert not any(foreign in each for each in held[1:])
        for i, one in enumerate(held):
            for other in held[i + 1 :]:
                assert one & other <= {os.readlink("/proc/self/fd/1")}
        assert {each for each in open_files(service.nursery) if each.endswith(".db")} == set()


def test_each_worker_counts_in_files_of_its_own(ppca_root):
    with workers(ppca_root) as service:
        owners = {int(file.stem.rpartition("_")[2]) for file in service.folder.iterdir() if file.suffix == ".db"}
        assert owners == set(service.pids.values())


def test_without_its_nursery_the_service_goes_on_and_the_next_worker_has_a_new_one(ppca_root):
    with workers(ppca_root) as service:
        nursery, first = service.nursery, service.pids
        os.kill(nursery, signal.SIGKILL)
        ended = service.wait_for("nursery ended")
        assert (ended["pid"], ended["exit_code"]) == (nursery, -signal.SIGKILL)
        assert service.score(images(1)).status_code == 200
        os.kill(first[0], signal.SIGTERM)  # it drains
        assert service.wait_for("worker ended")["exit_code"] in (0, -signal.SIGTERM)  # told though its forker is gone
        assert service.wait_for("worker serves again")["pid"] not in first.values()
        assert not service.logged("worker not started")  # a new nursery is asked, not the dead one
        assert service.nursery != nursery
        assert service.pids[1] == first[1]
        for i in range(N):
            service.score(images(1), f"again {i}")
        assert set(until(lambda: len(who := service.logged("request")) >= N and {line["worker"] for line in who})) == {
            0,
            1,
        }
        new = service.nursery
    assert not alive(new)


def test_a_nursery_that_does_not_answer_is_replaced(ppca_root):
    with workers(ppca_root, "--hang-timeout", "5") as service:
        nursery = service.nursery
        os.kill(nursery, signal.SIGSTOP)
        os.kill(service.pids[0], signal.SIGKILL)
        assert "does not answer" in service.wait_for("worker not started")["reason"]
        service.wait_for("worker serves again")
        assert not alive(nursery)


def test_a_new_nursery_serves_the_bundles_that_were_there_at_the_start(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    with workers(tmp_path) as service:
        os.kill(service.nursery, signal.SIGKILL)
        service.wait_for("nursery ended")
        write_ppca_bundle(tmp_path, version="2")
        os.kill(service.pids[0], signal.SIGKILL)
        service.wait_for("worker serves again")
        assert [line["version"] for line in service.logged("model loaded")] == ["1", "1"]
        os.kill(service.nursery, signal.SIGKILL)
        service.wait_for("nursery ended", 2)
        (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b"\n")
        os.kill(service.pids[0], signal.SIGKILL)
        assert "ppca/1 has changed" in service.wait_for("worker ended", 3)["reason"]
        assert service.score(images(1)).status_code == 200


THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"


def test_where_a_library_keeps_a_thread_workers_are_fresh_interpreters(ppca_root, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THREAD)
    with workers(ppca_root, env={**environment(), "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"}) as service:
        assert "2 threads" in service.wait_for("workers share no memory")["reason"]
        for pid in service.pids.values():
            assert "service.server.worker" in command_line(pid)
        assert sorted(descends_from(service.process.pid)) == sorted([service.nursery, *service.pids.values()])
        os.kill(service.pids[0], signal.SIGKILL)
        service.wait_for("worker serves again")
        assert service.score(images(1)).status_code == 200


@contextmanager
def starting(repository, *flags):
    """A service that need not serve yet."""
    process = subprocess.Popen(
        command(repository, "--workers", "2", *flags), stderr=subprocess.PIPE, text=True, env=environment()
    )
    service = Service(process)
    try:
        yield service
    finally:
        process.kill()
        process.wait()
        service._reader.join(60)
        process.stderr.close()


@pytest.mark.parametrize(("said", "threads"), [("starting", "1"), ("worker started", "1"), ("worker started", "2")])
def test_sigterm_ends_a_service_that_is_still_starting(ppca_root, said, threads):
    """Also while the bundles are being loaded, by the nursery or (with threads) by the workers."""
    with starting(ppca_root, "--threads", threads, "--drain-seconds", "1000") as service:
        service.wait_for(said)
        children = descends_from(service.process.pid)
        assert children
        assert service.end(signal.SIGTERM) == -signal.SIGTERM
        assert not any(alive(pid) for pid in [*children, *service.pids.values()])
        assert said != "starting" or not service.pids  # the nursery was not waited for
        assert not service.logged("serving")
        assert service.words == []


def test_a_nursery_that_is_still_loading_does_not_outlive_a_killed_supervisor(ppca_root):
    with starting(ppca_root) as service:
        service.wait_for("starting")
        nursery = service.nursery
        assert alive(nursery)
        service.process.kill()
        until(lambda: not alive(nursery))
        assert not service.logged("worker started")  # it was loading still


@contextmanager
def nursery_alone(repository, metrics):
    """A nursery as a fresh interpreter with its orders, and this end of the line to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        settings = Settings(repository=repository, workers=2, threads=1, port=1)
        process = subprocess.Popen(
            fresh_interpreter("service.server.nursery", theirs.fileno()), pass_fds=[theirs.fileno()]
        )
        theirs.close()
        orders = {"settings": settings.model_dump(mode="json"), "metrics": str(metrics), "bundles": None}
        ours.send(encode(orders))
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()


def test_a_nursery_without_supervisor_and_workers_leaves_no_folder(ppca_root, tmp_path):
    (tmp_path / "metrics").mkdir()
    with nursery_alone(ppca_root, tmp_path / "metrics") as (process, line):
        told = orjson.loads(line.recv(2**17))
        assert (told["kind"], list(told["bundles"])) == ("prepared", ["ppca/1"])
        line.close()
        assert process.wait(60) == 0
    assert not (tmp_path / "metrics").exists()


def test_a_nursery_says_why_it_cannot_load(tmp_path):
    with nursery_alone(tmp_path, tmp_path / "metrics") as (process, line):
        told = orjson.loads(line.recv(2**17))
        assert told["kind"] == "failed"
        assert "no bundle under" in told["text"]
        assert process.wait(60) == 1


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(7)", 7), ("while True: pass", -signal.SIGKILL)])
def test_a_child_tells_its_exit_code_however_often_it_is_asked(program, code):
    async def ended():
        child = Child(os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ))
        if code < 0:
            child.kill()
        codes = [await child.wait(), await child.wait()]
        child.kill()  # nobody is there
        return codes

    assert asyncio.run(ended()) == [code, code]


ORPHANED = """
import os, sys
from service.server.adoption import adopt_orphans, end_children
adopt_orphans()
reading, writing = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(writing, b"%d\\n" % os.getpid())
        while True: pass
    os._exit(0)
print(os.read(reading, 20).decode(), end="", flush=True)
end_children()
print("ended", flush=True)
sys.stdin.read()
"""


def test_children_that_this_process_was_never_told_of_are_ended_too():
    process = subprocess.Popen([sys.executable, "-c", ORPHANED], stdin=-1, stdout=-1, text=True)
    with process:
        orphan = int(process.stdout.readline())
        try:
            assert process.stdout.readline() == "ended\n"
            assert not alive(orphan)
            assert descends_from(process.pid) == []
        finally:
            process.kill()
            if alive(orphan):
                os.kill(orphan, signal.SIGKILL)
