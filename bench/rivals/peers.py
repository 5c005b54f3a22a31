"""The servers that are compared with: what runs them, how they are asked, and with which settings."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from bench.rivals.environments import FOLDER, installed_version, interpreter
from bench.rivals.wires import Wire, inference_binary, inference_json, plain_json, side_by_side
from bench.servers import Command, free_port

SERVERS = Path(__file__).parent / "servers"
INFER = "/v2/models/encoder/infer"


@dataclass(frozen=True)
class Peer:
    """A server. ``environment``: which of bench.rivals.environments, None for the one that runs this. ``arguments`` of
    its Python, ``variables`` of the environment; ``{port}``, ``{workers}`` and ``{free}`` (another port) are filled in.
    ``wires`` are asked for in turn; ``settings`` tells a reader what was run.
    """

    name: str
    environment: str | None
    arguments: tuple[str, ...]
    ready_path: str
    wires: tuple[Wire, ...]
    settings: str
    variables: tuple[tuple[str, str], ...] = ()

    def command(self, encoder: Path, workers: int) -> Command:
        """What serves that graph by so many workers."""
        own = {"BENCH_ENCODER": str(encoder.resolve()), "BENCH_WORKERS": str(workers), "BENCH_PORT": "{port}"}
        found = {"PYTHONPATH": str(SERVERS), "OMP_NUM_THREADS": "1", **own, **dict(self.variables)}
        python = sys.executable if self.environment is None else str(interpreter(self.environment))
        filled = {name: _fill(value, workers) for name, value in found.items()}
        return Command(
            tuple(_fill(part, workers) for part in self.arguments),
            self.ready_path,
            python,
            SERVERS,
            tuple(filled.items()),
        )

    @property
    def version(self) -> str | None:
        """What is installed; None: nothing."""
        return version("fastapi") if self.environment is None else installed_version(self.environment)


def _fill(text: str, workers: int) -> str:
    return text.replace("{workers}", str(workers)).replace("{free}", str(free_port()))


NAIVE = Peer(
    "naive FastAPI",
    None,
    ("-m", "uvicorn", "naive:app", "--workers", "{workers}", "--port", "{port}"),
    "/openapi.json",
    (plain_json("/encode"),),
    "uvicorn --workers, onnxruntime's default session in each",
)
PEERS = (
    NAIVE,
    replace(
        NAIVE,
        name="naive FastAPI, one thread",
        settings="uvicorn --workers, a session of one thread in each",
        variables=(("BENCH_THREADS", "1"),),
    ),
    Peer(
        "LitServe",
        "litserve",
        ("lit.py",),
        "/health",
        (plain_json("/encode"),),
        "workers_per_device, as many API servers; max_batch_size 64, batch_timeout 1 ms",
    ),
    Peer(
        "BentoML",
        "bentoml",
        ("-m", "bentoml", "serve", "bento:Encode", "--host", "127.0.0.1", "--port", "{port}"),
        "/readyz",
        (side_by_side("/encode"),),
        "workers; batchable, max_batch_size 64, max_latency_ms 1000",
        (("BENTOML_DO_NOT_TRACK", "True"),),
    ),
    Peer(
        "MLServer",
        "mlserver",
        ("-c", "from mlserver.cli import main; main()", "start", "mlserver_model"),
        "/v2/models/encoder/ready",
        (inference_json(INFER),),
        "parallel_workers; max_batch_size 64, max_batch_time 1 ms; debug off",
        (
            ("MLSERVER_HOST", "127.0.0.1"),
            ("MLSERVER_HTTP_PORT", "{port}"),
            ("MLSERVER_GRPC_PORT", "{free}"),
            ("MLSERVER_METRICS_PORT", "{free}"),
            ("MLSERVER_PARALLEL_WORKERS", "{workers}"),
            ("MLSERVER_DEBUG", "false"),
        ),
    ),
    Peer(
        "pytriton",
        "pytriton",
        ("triton.py",),
        "/v2/models/encoder/ready",
        (inference_json(INFER), inference_binary(INFER)),
        "an inference callable a worker; dynamic batching, max_batch_size 64, no queue delay",
        # Triton's Python backend must find the libpython of this very interpreter, not another 3.x.
        (
            ("LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR") or ""),
            ("PYTRITON_HOME", str(FOLDER / "pytriton" / "workspaces")),
        ),
    ),
)
