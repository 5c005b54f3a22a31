"""Workers are killed and stopped under load, and the service is told to end: is every answer right, and none lost?

    python -m bench.chaos

Two workers under 64 kept connections, which send one request after the other: every verb, small ones and batches, and
now and then one that takes long. Every few seconds a worker is killed (SIGKILL); half way one is stopped (SIGSTOP) and
must be replaced as one that hangs, while the other serves on. Workers are the processes, among those that descend from
the one that was started, that hold the server's end of a connection. What was lost on a connection that the killed one
held, or nobody had accepted yet, is counted apart; anything lost elsewhere is a failure.

Then, several times, the service is told to end (SIGTERM) while all connections are busy, and some have sent half a body
only, whose rest comes after the drain window. Lost are requests whose answer is cut, and those that the server had read
and closed the connection on without a word. Not lost are those that it had not read: the connection was reset, and the
caller may send them again (RFC 9110, 9.2.2). Exits with 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.bodies import FORMATS
from bench.callers import Callers, Case, End, connect, connections_to, read_answer, sockets_of
from bench.load import Target, http_request
from bench.models import synthetic_images
from bench.random_bodies import Model, read_models
from bench.requests import VERBS, ask, cases, request
from bench.run import SHIPPED
from bench.servers import ROOT, Installation, Server, add_service, vae_server

BACK_SECONDS = 2.0  # from the death of a worker until another serves in its place
SILENT_SECONDS = 1.0  # at most without any right answer
PROBE_SECONDS = 0.05  # between connections that ask who serves
PATIENCE = 10.0  # seconds beyond what is allowed after which a measurement is given up
AROUND = 0.1  # seconds around a snapshot in which a connection may have been accepted by whom it does not name
BATCHES = (1, 8)
LONG_K, LONG_SHARE = 30, 0.1
"""Samples of each of 64 images in the request that takes long, a quarter of a second, and its share of the time: there
are always some under way."""
DRAIN_SECONDS = 1
HALF_SENT = 4  # connections whose body is half sent when the service is told to end
WARM_SECONDS = 1.5  # of load before it is told to


@dataclass(frozen=True)
class Check:
    """One thing that must be so, in words, and whether it was."""

    name: str
    seen: str
    is_met: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.is_met else 'FAILED'} {self.name}: {self.seen}"


@dataclass
class Strike:
    """A worker that was killed or stopped: which one, when (s, monotonic), the ports of the callers' connections that
    it held or nobody had accepted, and when another served in its place."""

    pid: int
    is_stop: bool
    at: float
    ports: set[int]
    back: float | None = None

    def explains(self, port: int, connected: float, lost: float) -> bool:
        """Whether it took that connection along. A stopped one also keeps those that come to it while it stands."""
        if lost < self.at:
            return False
        until = (self.back or lost) if self.is_stop else self.at
        held = port in self.ports and connected <= self.at
        return held or self.at - AROUND <= connected <= until + AROUND


@dataclass
class Watch:
    """Who serves: a probe on a new connection, again and again, finds the process that answered it."""

    server: Server
    served: dict[int, float] = field(default_factory=dict)
    """When each worker first answered a probe (s, monotonic)."""
    probes: dict[float, bool] = field(default_factory=dict)
    """Of each by its start: whether it was answered within SILENT_SECONDS."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Until cancelled. A probe that a stopped worker keeps waiting does not keep the others."""
        try:
            while True:
                task = asyncio.create_task(self._probe())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await asyncio.sleep(PROBE_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()

    async def _probe(self) -> None:
        started = time.monotonic()
        self.probes[started] = False
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                with await connect((self.server.host, self.server.port)) as connection:
                    await asyncio.get_running_loop().sock_sendall(connection, http_request("GET", "/readyz", {}))
                    end, head, _ = await read_answer(connection)
                    if end is None and b" 200 " in head[:20]:
                        self.probes[started] = time.monotonic() - started < SILENT_SECONDS
                        self._note(connection.getsockname()[1])

    def _note(self, port: int) -> None:
        inode = connections_to(self.server.port).get(port)
        for pid in self.server.processes():
            if pid not in self.served and inode in sockets_of(pid):
                self.served[pid] = time.monotonic()


def workers(server: Server) -> dict[int, set[int]]:
    """Of each process that holds connections to the service, the ports of their other ends."""
    ends = connections_to(server.port)
    held = {pid: sockets_of(pid) for pid in server.processes()}
    found = {pid: {port for port, inode in ends.items() if inode in inodes} for pid, inodes in held.items()}
    return {pid: ports for pid, ports in found.items() if ports}


def strike(server: Server, signum: signal.Signals) -> Strike:
    """Send the signal to the worker that holds most connections."""
    held = workers(server)
    pid = max(held, key=lambda worker: len(held[worker]))
    ports = held[pid] | {port for port, inode in connections_to(server.port).items() if inode == 0}
    at = time.monotonic()
    os.kill(pid, signum)
    return Strike(pid, signum == signal.SIGSTOP, at, ports)


async def replaced(watch: Watch, made: Strike, seconds: float) -> None:
    """Wait until a process that had not served before the strike serves, at most so long."""
    while made.back is None and time.monotonic() < made.at + seconds:
        await asyncio.sleep(PROBE_SECONDS / 2)
        made.back = min((at for at in watch.served.values() if at > made.at), default=None)


def load_of(models: Sequence[Model], server: Server) -> tuple[list[Case], list[float]]:
    """The requests with their answers, asked for while nothing else is, and how often each is sent, relatively: so that
    all take the same share of the time, the one that takes long LONG_SHARE of it."""
    address = server.host, server.port
    requests = [case.target.request for model in models for verb in VERBS for case in _cases(model, verb, address)]
    pixels = _pixels(models[0], 64)
    long = request(f"/v1/models/{models[0].name}/score?score=elbo&k={LONG_K}", "npy", *FORMATS["octet-stream"](pixels))
    made, seconds = [], []
    for each in [*requests, long]:
        start = time.perf_counter()
        made.append(Case(each, ask(Target(*address, each))))
        seconds.append(time.perf_counter() - start)
    return made, [1 / taken for taken in seconds[:-1]] + [LONG_SHARE * len(requests) / seconds[-1]]


def _cases(model: Model, verb: str, address: tuple[str, int]) -> Iterator[object]:
    for batch in BATCHES:
        if verb != "interpolate" or batch > 1:
            yield from cases(model.name, verb, _pixels(model, batch), model.latent_dim, address)


def _pixels(model: Model, count: int) -> np.ndarray:
    """uint8 [count,C,H,W]."""
    images = synthetic_images(model.shape, count)
    return images[:, None] if model.shape[0] == 1 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


async def struck(server: Server, arguments: argparse.Namespace) -> list[Check]:
    """Kill and stop workers under load."""
    made, weights = load_of(arguments.models, server)
    watch = Watch(server)
    watching = asyncio.create_task(watch.run())
    callers = Callers((server.host, server.port), made, weights, arguments.connections)
    start, strikes = time.monotonic(), list[Strike]()
    end, hang = start + arguments.seconds, arguments.hang_timeout + BACK_SECONDS
    is_stopped = False
    due = start
    while (due := due + arguments.every) < end:
        await asyncio.sleep(max(0, due - time.monotonic()))
        is_due = not is_stopped and time.monotonic() >= start + arguments.seconds / 2 - arguments.every / 2
        is_stopped |= is_due
        callers.keep = is_due
        strikes.append(strike(server, signal.SIGSTOP if is_due else signal.SIGKILL))
        await replaced(watch, strikes[-1], (hang if is_due else BACK_SECONDS) + PATIENCE)
        callers.keep = False
    await asyncio.sleep(max(0, end - time.monotonic()))
    silence = callers.record.longest_silence(start, time.monotonic())
    await callers.stop()
    watching.cancel()
    exit_code = server.exit_code()
    return [*_answers(callers, strikes, silence, watch), *_replacements(strikes, hang), _alive(exit_code)]


def _answers(callers: Callers, strikes: list[Strike], silence: float, watch: Watch) -> Iterator[Check]:
    record = callers.record
    ends = record.ends
    elsewhere = [
        loss for loss in record.losses if not any(each.explains(loss.port, loss.connected, loss.at) for each in strikes)
    ]
    taken = Counter(loss.end.name.lower() for loss in record.losses)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(taken.items())) or "none"
    wrong = "".join(f"\n         {example!r}" for example in record.examples[:3])
    yield Check("answers that came are bitwise right", f"{ends[End.RIGHT]} right, {ends[End.WRONG]} wrong{wrong}",
                not ends[End.WRONG] and ends[End.RIGHT] > 0)  # fmt: skip
    yield Check("nothing is refused", f"{ends[End.REFUSED]} answers of 429 or 503", not ends[End.REFUSED])
    yield Check("nothing is lost but on connections of the struck",
                f"{len(elsewhere)} lost elsewhere; of the struck: {kinds}", not elsewhere)  # fmt: skip
    spans = [(each.at, each.back or each.at) for each in strikes if each.is_stop]
    stopped = sum(record.right_between(*span) for span in spans)
    probes = [good for start, good in watch.probes.items() for since, until in spans if since < start < until]
    seen = (
        f"{silence:.2f} s at most; while a worker was stopped {stopped} right answers on connections that there were, "
    )
    seen += f"and {sum(probes)} of {len(probes)} new connections answered within {SILENT_SECONDS:g} s"
    yield Check(f"never {SILENT_SECONDS:g} s without a right answer", seen, silence <= SILENT_SECONDS)


def _replacements(strikes: list[Strike], hang: float) -> Iterator[Check]:
    for is_stop, name, most in ((False, "killed", BACK_SECONDS), (True, "stopped", hang)):
        times = [None if each.back is None else each.back - each.at for each in strikes if each.is_stop == is_stop]
        seen = ", ".join("never" if seconds is None else f"{seconds:.2f}" for seconds in times)
        is_met = bool(times) and all(seconds is not None and seconds <= most for seconds in times)
        yield Check(f"a {name} worker is replaced within {most:g} s", f"{len(times)} {name}: {seen} s", is_met)


def _alive(exit_code: int | None) -> Check:
    seen = "it runs" if exit_code is None else f"it ended with {exit_code}"
    return Check("the service outlives its workers", seen, exit_code is None)


async def half_sent(server: Server, case: Case, rest_after: float) -> bool:
    """Send a request but for half of its body, which follows ``rest_after`` seconds; whether its answer is right."""
    loop, start = asyncio.get_running_loop(), case.request.index(b"\r\n\r\n") + 4
    half = (start + len(case.request)) // 2
    try:
        with await connect((server.host, server.port)) as connection:
            await loop.sock_sendall(connection, case.request[:half])
            await asyncio.sleep(rest_after)
            await loop.sock_sendall(connection, case.request[half:])
            end, head, body = await read_answer(connection)
    except OSError:
        return False
    return end is None and b" 200 " in head[:20] and body == case.body


async def ended(server: Server, arguments: argparse.Namespace) -> tuple[Counter[str], int | None, float]:
    """Tell the service to end under load: how requests ended since, its exit code, and after how many seconds."""
    made, weights = load_of(arguments.models, server)
    callers = Callers((server.host, server.port), made, weights, arguments.connections)
    await asyncio.sleep(WARM_SECONDS)
    before, pids, start = callers.record.ends.copy(), server.processes(), time.monotonic()
    with_body = max(made[:-1], key=lambda case: len(case.request))
    os.kill(server.pid, signal.SIGTERM)
    callers.let_go()
    await asyncio.sleep(DRAIN_SECONDS / 2)
    halves = [asyncio.create_task(half_sent(server, with_body, DRAIN_SECONDS)) for _ in range(HALF_SENT)]
    await callers.wait()
    answered = sum(await asyncio.gather(*halves))
    exit_code = await asyncio.to_thread(server.exit_code, PATIENCE)
    seconds = time.monotonic() - start
    left = sum(Path(f"/proc/{pid}").exists() for pid in pids)
    counts = Counter({end.name: count for end, count in (callers.record.ends - before).items()})
    return counts + Counter(half_lost=HALF_SENT - answered, half_answered=answered, left=left), exit_code, seconds


def _terms(counts: Counter[str], exit_codes: list[int | None], seconds: list[float]) -> Iterator[Check]:
    lost = counts["CUT"] + counts["DROPPED"]
    seen = f"{counts['RIGHT']} answered since, {counts['CUT']} cut, {counts['DROPPED']} dropped"
    seen += f"; {counts['UNREAD']} not read, their connections reset"
    yield Check("SIGTERM: no request that was read is lost", seen, not lost and counts["RIGHT"] > 0)
    yield Check("SIGTERM: answers are bitwise right", f"{counts['WRONG']} wrong, {counts['REFUSED']} refused",
                not counts["WRONG"] and not counts["REFUSED"])  # fmt: skip
    halves = f"{counts['half_answered']} answered, {counts['half_lost']} lost"
    yield Check("SIGTERM: bodies that were half sent are read and answered", halves, not counts["half_lost"])
    codes = ", ".join(map(str, exit_codes))
    took = f"codes {codes} after {min(seconds):.1f} to {max(seconds):.1f} s, {counts['left']} processes left"
    yield Check("SIGTERM: the service ends with 0", took, all(code == 0 for code in exit_codes) and not counts["left"])


def run(arguments: argparse.Namespace) -> list[Check]:
    """Everything."""
    installation = Installation(arguments.checkout.resolve(), arguments.python)
    flags = ["--hang-timeout", str(arguments.hang_timeout), "--drain-seconds", str(DRAIN_SECONDS)]
    flags += ["--queue", "1000"]  # long requests wait in the pool: a refusal would hide what is looked for

    @contextmanager
    def service() -> Iterator[Server]:
        with vae_server(arguments.repository, arguments.workers, installation=installation, flags=flags) as server:
            yield server

    checks = []
    if arguments.seconds:
        with service() as server:
            checks += asyncio.run(struck(server, arguments))
    counts, exit_codes, seconds = Counter[str](), list[int | None](), list[float]()
    for _ in range(arguments.terms):
        with service() as server:
            found, exit_code, took = asyncio.run(ended(server, arguments))
        counts, exit_codes, seconds = counts + found, [*exit_codes, exit_code], [*seconds, took]
    return checks + (list(_terms(counts, exit_codes, seconds)) if exit_codes else [])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__.partition("\n")[0])
    add_service(parser)
    parser.add_argument("--repository", type=Path, default=ROOT / SHIPPED, help="folder of bundles (exported)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of killing and stopping; 0: none (60)")
    parser.add_argument("--every", type=float, default=5, help="seconds between strikes (5)")
    parser.add_argument("--hang-timeout", type=float, default=5, help="the service's setting (5)")
    parser.add_argument("--terms", type=int, default=5, help="times that the service is told to end (5)")
    arguments = parser.parse_args(argv)
    models = read_models(arguments.repository)
    arguments.models = [model for model in models if model.kind == "image" and not model.is_tiled]
    if not arguments.models:
        parser.error(f"no model of images in {arguments.repository}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Strike, print what was seen; the exit code."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # servers are ended, not left behind
    checks = run(parse(argv))
    for check in checks:
        print(check)
    return 0 if all(check.is_met for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
