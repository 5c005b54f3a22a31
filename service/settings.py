"""Settings of the service; service/commands/environment.py reads them from flags and environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.resources import available_cpus

MAX_WORKERS = 256


class Settings(BaseModel):
    """Settings of a service, each with its default, its bounds and the description that the documents print."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repository: Path = Field(default=Path("exported"), description="folder of bundles, NAME/VERSION/ each")
    default_model: str = Field(
        default="", description="model that /v1/encode, /v1/score … address; empty: the only one, if one is served"
    )
    skip_broken: bool = Field(default=False, description="log bundles that fail verification instead of not starting")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    root_path: str = Field(
        default="",
        pattern=r"^(/[\w.~-]+)*$",
        description="prefix of all paths behind a proxy, /vae say, whether it strips it or not",
    )
    cors_origins: str = Field(
        default="", description="origins, with commas between, whose pages may read answers; *: any; empty: none (CORS)"
    )
    trusted_proxies: str = Field(
        default="",
        description="addresses and networks, with commas between, whose X-Forwarded-For names the client of a log line",
    )
    metrics: bool = Field(default=True, description="answer /metrics")
    docs: bool = Field(default=True, description="answer /docs and /openapi.json")
    drift: bool = Field(default=True, description="compare recent p-values with uniformity, and answer drift")
    device: Literal["cpu", "cuda", "auto"] = Field(default="cpu", description="execution provider; no silent fallback")
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | Literal["auto"] = Field(
        default=1,
        description="processes behind the port, each with all models; auto: the CPUs allowed, as far as memory reaches",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="onnxruntime threads of a process; 0: the CPUs allowed, over the workers"
    )
    concurrency: int = Field(default=2, ge=1, le=64, description="requests computed at once by a process")
    queue: int = Field(default=64, ge=0, le=100_000, description="requests that may wait in a process; more get 429")

    max_body_bytes: int = Field(default=32 * 2**20, ge=1024, description="bytes of a request body")
    max_buffered_bytes: int = Field(
        default=512 * 2**20, ge=1024, description="bytes of all bodies held by a process; more get 429"
    )
    max_image_bytes: int = Field(default=32 * 2**20, ge=64, description="bytes of one encoded image")
    # 61 megapixels are the most that cameras for photographers make; max_batch_pixels bounds the memory of a request.
    max_image_pixels: int = Field(default=2**26, ge=1, description="width × height of one encoded image")
    max_batch: int = Field(default=1024, ge=1, description="images or latents in one request")
    max_batch_pixels: int = Field(default=2**27, ge=1, description="width × height summed over the encoded images")
    max_numbers_in: int = Field(default=2**26, ge=1, description="images × C·H·W after resizing; 2^26 take 256 MiB")
    max_n: int = Field(default=256, ge=1, description="n of sample")
    max_steps: int = Field(default=256, ge=2, description="steps of interpolate")
    max_samples: int = Field(default=256, ge=0, description="posterior samples an image of encode")
    max_k: int = Field(default=5000, ge=1, description="k of score")
    max_evaluated_pixels: int = Field(
        default=80_000_000, ge=1, description="images × k × C·H·W of one score request; 100 000 samples of 28×28"
    )
    max_request_seconds: float = Field(
        default=5.0,
        gt=0,
        description="seconds that a request may be estimated to compute, by what the model was measured to take",
    )
    # A float32 takes up to 16 bytes of JSON ("-1.2345678e-10,"): an answer stays below some 100 MB.
    max_numbers_out: int = Field(default=6 * 2**20, ge=1, description="numbers in one answer: pixels, latents, maps")
    false_positive_rate: float = Field(default=0.05, gt=0, lt=1, description="rate of score when none is asked")
    drift_window: int = Field(default=1000, ge=20, le=1_000_000, description="recent p-values compared with uniformity")
    drift_level: float = Field(
        default=0.001,
        gt=0,
        lt=1,
        description="level at which the drift tests alarm; each of several workers tests at its share (union bound)",
    )

    max_headers: int = Field(default=100, ge=10, description="header lines of a request; more get 431")
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024, description="bytes of a request's line and headers")
    header_timeout: float = Field(default=10.0, gt=0, description="seconds in which the headers must arrive")
    receive_timeout: float = Field(default=30.0, gt=0, description="seconds in which the body must arrive")
    send_timeout: float = Field(
        default=30.0, gt=0, description="seconds in which some of an answer that waits to be read must be read"
    )
    # Balancers keep theirs for some 60 s: who closes first must not be the one that is sent requests.
    keep_alive_timeout: float = Field(
        default=75.0, gt=0, description="seconds that an idle connection is kept; above the load balancer's own"
    )
    request_timeout: float = Field(default=60.0, gt=0, description="seconds from a complete body to its answer")
    drain_seconds: float = Field(
        default=3.0, ge=0, description="seconds served on after SIGTERM, while /readyz already says 503"
    )
    hang_timeout: float = Field(
        default=30.0,
        ge=0,
        description="seconds a worker's event loop may stand still until it is replaced; 0: for ever",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    log_format: Literal["json", "console"] = Field(default="json", description="shape of a log line")

    @property
    def max_concurrent_batches(self) -> int:
        """How many batches a process should compute at once, each on ``threads`` CPUs, so that all find a CPU."""
        cpus = available_cpus()
        return max(1, cpus // (self.workers * (self.threads or cpus))) if isinstance(self.workers, int) else 1

    @property
    def row_threads(self) -> int:
        """How many threads a process divides a large run over: the CPUs that all processes together compute on."""
        cpus = available_cpus()
        return min(self.workers * (self.threads or cpus), max(cpus, self.threads)) if self.workers != "auto" else cpus

    def for_each_worker(self) -> Settings:
        """Return these settings with ``threads`` set to a worker's share of the CPUs, if it is 0 for several workers.

        ``workers`` must be a number; service.commands.serve has chosen one in place of "auto".
        """
        assert self.workers != "auto"
        threads = max(1, available_cpus() // self.workers) if self.workers > 1 and not self.threads else self.threads
        return self.model_copy(update={"threads": threads})
