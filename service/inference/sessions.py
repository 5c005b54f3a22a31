"""ONNX Runtime sessions: their provider, their threads, and no silent fallback from one device to another."""

from __future__ import annotations

import onnxruntime as ort

from service.errors import BundleGraphError, DeviceUnavailable
from service.inference.row_threads import RowThreads
from service.resources import available_cpus

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("cpu", "cuda", "auto")

# TF32 keeps 10 bits of mantissa, too few for parity with the trainer. The convolution algorithm is not chosen by
# timing, which would let a score differ from one start of the server to the next.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}

# A serialised ONNX model y = Identity(x), to try a provider: one that is installed may fail to start without a driver.
IDENTITY = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a017812"
    "0a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)


class Runtime:
    """Starts sessions on one device.

    Args:
        device: "cpu", "cuda", or "auto", which is cuda if its provider loads and cpu otherwise.
        threads: size of each session's pool, ``available_cpus()`` by default.
        row_threads: how many threads a large run is divided over if its session has one thread, by default ``threads``.

    The attributes ``provider``, ``threads`` and ``row_threads`` tell what was chosen.

    Raises:
        DeviceUnavailable: there is no such device or number of threads, or "cuda" has no provider that loads.

    >>> Runtime("cpu", threads=2).provider
    'CPUExecutionProvider'
    """

    def __init__(self, device: str = "cpu", threads: int | None = None, row_threads: int | None = None) -> None:
        if device not in DEVICES:
            raise DeviceUnavailable(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
        if threads is not None and threads < 1:
            raise DeviceUnavailable(f"threads is {threads}, expected at least 1")
        ort.disable_telemetry_events()
        self.threads = threads if threads is not None else available_cpus()
        self.row_threads = RowThreads(row_threads or self.threads)
        self.provider = CPU if device == "cpu" else CUDA
        if self.provider == CUDA:
            self._start_cuda(required=device == "cuda")

    @property
    def memory(self) -> str | None:
        """ONNX Runtime's name of the device in whose memory sessions compute; None if that is the host's memory."""
        return "cuda" if self.provider == CUDA else None

    def session(self, model: bytes, threads: int | None = None) -> ort.InferenceSession:
        """Start a session of a serialised ONNX model on this runtime's provider, by default with its ``threads``.

        Raises:
            BundleGraphError: ONNX Runtime refuses the model.
            DeviceUnavailable: the provider fails to start.
        """
        options, providers = self._options(threads or self.threads), providers_of(self.provider)
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:
            # ONNX Runtime's exceptions have no common base of their own but Exception.
            raise BundleGraphError(f"ONNX Runtime refuses the graph: {_first_line(error)}") from error
        active = session.get_providers()[0]
        if active != self.provider:
            raise DeviceUnavailable(
                f"{self.provider} was asked for, but ONNX Runtime fell back to {active}: {_gpu_instruction()}"
            )
        session.disable_fallback()
        session._model_bytes = b""  # it keeps them only to fall back, and they are as large as the weights
        return session

    def _start_cuda(self, required: bool) -> None:
        """Start a session on CUDA once; if that fails, raise if ``required``, else choose the CPU."""
        try:
            if CUDA not in ort.get_available_providers():
                raise DeviceUnavailable(f"{CUDA} is not in this installation of ONNX Runtime: {_gpu_instruction()}")
            ort.preload_dlls()  # finds the CUDA and cuDNN wheels that the gpu extra brings
            self.session(IDENTITY)
        except DeviceUnavailable:
            if required:
                raise
            self.provider = CPU

    def _options(self, threads: int) -> ort.SessionOptions:
        """Make the options of a session with so many threads."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning pool burns the quota of a container between requests and slows its neighbours.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # The arena grows to the size of one run, which service.inference.batch_invariance bounds.
        options.enable_cpu_mem_arena = True
        return options


def providers_of(provider: str) -> list[str | tuple[str, dict[str, str]]]:
    """List the providers of a session: ``provider`` with its options, and the CPU for operators that it lacks."""
    return [(CUDA, CUDA_OPTIONS), CPU] if provider == CUDA else [CPU]


def _gpu_instruction() -> str:
    providers = ", ".join(ort.get_available_providers())
    return (
        "install the gpu extra instead of the cpu one (pip uninstall onnxruntime, then pip install 'vaeserve[gpu]') "
        f"and check the NVIDIA driver, or ask for device cpu. Providers here: {providers}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
