"""The same random requests to the service of an older commit and to this one: are the answers the same, bit by bit?

    python -m bench.replay --base ../older --base-python ../older/.venv-serve-cpu/bin/python --requests 3000 --seed 0

Both serve the shipped bundles and those of the tests (vectors, signals, tiles, colours, two versions of one name) in
one worker, and get the requests of bench.random_requests one after the other in the same order, over a kept connection
each, so that also what /drift says must be the same. Statuses, headers and bodies are compared as bytes. Left out of
the comparison: Date, and the random request id where the caller gave none, also in the body of an error. What the newer
service is meant to answer otherwise stands in INTENDED. Exits with 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.random_bodies import read_models
from bench.random_requests import Request, draw_request
from bench.run import SHIPPED, progress
from bench.servers import add_base, add_service, sides, vae_server

DEFAULT_MODEL = "mnist"
TIMEOUT = 60
EXAMPLES = 3  # printed of each kind of difference
HARMLESS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
UNCOMPARED = frozenset({"date", "x-request-id"})
CLOSED = 0
"""Status of a request whose connection was closed without an answer."""


@dataclass(frozen=True)
class Answer:
    """What came back: headers in lower case, sorted."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def header(self, name: str) -> str:
        """Its value, "" if there is none."""
        return dict(self.headers).get(name, "")


class Client:
    """One kept connection to a service."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)

    def ask(self, request: Request) -> Answer:
        """The answer, asked for once more where a connection that had been kept turned out to be closed."""
        is_new = self._connection.sock is None
        try:
            return self._ask(request)
        except (ConnectionError, http.client.HTTPException):
            self._connection.close()
            return Answer(CLOSED) if is_new else self.ask(request)

    def _ask(self, request: Request) -> Answer:
        connection = self._connection
        connection.putrequest(request.method, request.path, skip_accept_encoding=True)
        for name, value in request.headers:
            connection.putheader(name, value.encode("latin-1"))
        if request.is_chunked:
            connection.putheader("transfer-encoding", "chunked")
            half = len(request.body) // 2
            pieces = [piece for piece in (request.body[:half], request.body[half:]) if piece]
            connection.endheaders(pieces, encode_chunked=True)
        else:
            if request.body or request.method in ("POST", "PUT", "PATCH"):
                connection.putheader("content-length", str(len(request.body)))
            connection.endheaders(request.body or None)
        response = connection.getresponse()
        body = response.read()
        return Answer(response.status, tuple(sorted((n.lower(), v) for n, v in response.getheaders())), body)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


@dataclass(frozen=True)
class Difference:
    """One request that was answered differently; ``kinds``: in what."""

    request: Request
    old: Answer
    new: Answer
    kinds: tuple[str, ...]

    def shown(self) -> Iterator[str]:
        """In lines."""
        yield str(self.request)
        for name, answer in (("old", self.old), ("new", self.new)):
            kind, size = answer.header("content-type"), len(answer.body)
            yield f"    {name}: {answer.status} {kind}, {size} bytes: {answer.body[:200]!r}"
        for name in sorted({name for name, _ in self.old.headers + self.new.headers}):
            old, new = self.old.header(name), self.new.header(name)
            if old != new and name not in UNCOMPARED and name != "content-length":
                yield f"    {name}: {old!r} → {new!r}"


def differences(request: Request, old: Answer, new: Answer) -> tuple[str, ...]:
    """In what two answers to a request differ; nothing if they are the same but for what is not compared."""
    kinds = []
    if old.status != new.status:
        kinds.append(f"status {old.status or 'closed'} → {new.status or 'closed'}")
    if old.header("content-type") != new.header("content-type"):
        kinds.append("media type")
    if masked(old) != masked(new):
        kinds.append("body")
    kinds += [f"header {name}" for name in _other_headers(request, old, new)]
    return tuple(kinds)


def _other_headers(request: Request, old: Answer, new: Answer) -> list[str]:
    left_out = {*UNCOMPARED, "content-type", "content-length"}  # the last is the body's, or HEAD's
    if HARMLESS_ID.fullmatch(dict(request.headers).get("x-request-id", "")):
        left_out.remove("x-request-id")
    found = [{pair for pair in answer.headers if pair[0] not in left_out} for answer in (old, new)]
    return sorted({name for name, _ in found[0] ^ found[1]})


def masked(answer: Answer) -> bytes:
    """The body, an error's without its request id."""
    if answer.header("content-type") != "application/problem+json":
        return answer.body
    return answer.body.replace(answer.header("x-request-id").encode() or b"\0", b"")


@dataclass(frozen=True)
class Intended:
    """A difference that is meant: which it is, and whether an answered request shows that one and nothing else."""

    reason: str
    explains: Callable[[Request, Answer, Answer], bool]


def _drift_names_its_worker(request: Request, old: Answer, new: Answer) -> bool:
    """Drift is watched by each worker for itself, and the answer says by which; level and all else stay."""
    if request.kind[0] != "drift" or (old.status, new.status) != (200, 200):
        return False
    before, after = (json.loads(answer.body) for answer in (old, new))
    return bool({name: value for name, value in after.items() if name != "worker"} == before)


def _tells_of_the_other_fault(_: Request, old: Answer, new: Answer) -> bool:
    """Of two faults the query's is found before a Content-Encoding, and Accept's before JSON that does not parse.

    Which of them was told depended on the way that a request took; now there is one.
    """
    return (old.status, new.status) in {(415, 422), (422, 406)}


INTENDED = (
    Intended("the answer of drift also names the worker that gave it", _drift_names_its_worker),
    Intended("of a request's two faults the other one is told", _tells_of_the_other_fault),
)


@dataclass
class Outcome:
    """Of a whole replay: what differed, what differed as it is meant to, and how often each status came."""

    differing: list[Difference] = field(default_factory=list)
    intended: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request, old: Answer, new: Answer) -> None:
        """Take in one request's answers."""
        self.statuses[new.status] += 1
        self.kinds[request.kind[0]] += 1
        kinds = differences(request, old, new)
        if not kinds:
            return
        reason = next((each.reason for each in INTENDED if each.explains(request, old, new)), None)
        if reason is None:
            self.differing.append(Difference(request, old, new, kinds))
        else:
            self.intended[reason] += 1

    def shown(self) -> Iterator[str]:
        """In lines: counts, then the differences by kind, the most frequent first."""
        yield f"{sum(self.kinds.values())} requests: " + ", ".join(
            f"{n} {name}" for name, n in self.kinds.most_common()
        )
        yield "answered with " + ", ".join(f"{status} ({n})" for status, n in sorted(self.statuses.items()))
        for reason, n in self.intended.items():
            yield f"{n} differ as intended: {reason}"
        groups: dict[tuple[str, ...], list[Difference]] = {}
        for each in self.differing:
            groups.setdefault((each.request.kind[0], *each.kinds), []).append(each)
        for (verb, *kinds), members in sorted(groups.items(), key=lambda group: -len(group[1])):
            yield f"\n{len(members)} × {verb}: {', '.join(kinds)}"
            for each in members[:EXAMPLES]:
                yield from each.shown()
        yield f"\n{len(self.differing)} answers differ" if self.differing else "no answer differs"


@contextmanager
def bundles(shipped: Path) -> Iterator[Path]:
    """A folder of the shipped bundles and of those of the tests."""
    from tests.ppca_bundle import write_ppca_bundle
    from tests.service.linear_bundles import write_all
    from tests.tiled_bundle import write_tiled_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in shipped.resolve().iterdir():
            if path.is_dir():
                (folder / path.name).symlink_to(path)
        write_all(folder)
        write_tiled_bundle(folder)
        for version in ("1", "2"):
            write_ppca_bundle(folder, "colour", version, (3, 8, 8), latent_dim=4 + int(version))
        yield folder


def replay(clients: tuple[Client, Client], requests: Iterable[Request]) -> Outcome:
    """Send each request to both at once, one request after the other."""
    outcome = Outcome()
    with ThreadPoolExecutor(2) as pool:
        for request in requests:
            answers = [pool.submit(client.ask, request) for client in clients]
            outcome.add(request, *(answer.result() for answer in answers))
    return outcome


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.partition("\n")[0])
    add_base(parser)
    add_service(parser)
    parser.add_argument("--requests", type=int, default=3000, help="how many (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random in them (0)")
    parser.add_argument("--only", type=int, nargs="+", help="these requests alone, by number")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Ask both, print what differs; the exit code."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # servers are ended, not left behind
    with ExitStack() as stack:
        folder = stack.enter_context(bundles(SHIPPED))
        flags = ("--default-model", DEFAULT_MODEL)
        servers = [stack.enter_context(vae_server(folder, installation=each, flags=flags)) for each in sides(arguments)]
        old, new = (Client(server.host, server.port) for server in servers)
        models = read_models(folder)
        numbers = progress(arguments.only or [*range(arguments.requests)], "requests")
        requests = (draw_request(arguments.seed, number, models, DEFAULT_MODEL) for number in numbers)
        outcome = replay((old, new), requests)
        old.close()
        new.close()
    print("\n".join(outcome.shown()))
    return 1 if outcome.differing else 0


if __name__ == "__main__":
    sys.exit(main())
