from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import onnxruntime as ort
import pytest

from service.errors import BundleGraphError, DeviceUnavailable
from service.inference.sessions import CPU, CUDA, IDENTITY, Runtime
from service.resources import available_cpus

HAS_CUDA = CUDA in ort.get_available_providers()


def test_a_cpu_session_has_the_asked_provider_and_threads():
    runtime = Runtime("cpu", threads=3)
    session = runtime.session(IDENTITY)
    assert (runtime.provider, session.get_providers()) == (CPU, [CPU])
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_the_runtime_reports_to_nobody(tmp_path):
    """Its own builds write to the home directory and start a thread as soon as they are imported."""
    code = "import os; import service.inference.sessions as s; s.Runtime(); print(len(os.listdir('/proc/self/task')))"
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, list(tmp_path.iterdir())) == ("1\n", [])


def test_threads_default_to_the_cpus_available():
    assert Runtime("cpu").threads == available_cpus()


def test_auto_takes_what_is_there():
    assert Runtime("auto").provider in ({CPU, CUDA} if HAS_CUDA else {CPU})


def test_cuda_is_used_or_refused_with_an_instruction_never_replaced():
    if HAS_CUDA and Runtime("auto").provider == CUDA:
        assert Runtime("cuda").session(IDENTITY).get_providers()[0] == CUDA
        return
    with pytest.raises(DeviceUnavailable, match=rf"vaeserve\[gpu\].*Providers here: .*{CPU}"):
        Runtime("cuda")


def test_a_provider_that_fails_to_start_is_noticed(monkeypatch):
    """ONNX Runtime falls back to the CPU by itself: with a warning where the provider is not in the package, with a
    line on stderr where it is and no GPU."""
    runtime = Runtime("cpu")
    runtime.provider = CUDA
    if HAS_CUDA and Runtime("auto").provider == CUDA:
        assert runtime.session(IDENTITY).get_providers()[0] == CUDA
        return
    warned = nullcontext() if HAS_CUDA else pytest.warns(UserWarning, match="not in available provider names")
    with warned, pytest.raises(DeviceUnavailable, match="fell back"):
        runtime.session(IDENTITY)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("tpu",), "expected one of cpu, cuda, auto"), (("cpu", 0), "at least 1")]
)
def test_other_devices_and_thread_counts_are_refused(arguments, message):
    with pytest.raises(DeviceUnavailable, match=message):
        Runtime(*arguments)


@pytest.mark.parametrize("data", [b"", b"no model", IDENTITY[:-3]])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(BundleGraphError, match="ONNX Runtime refuses the graph"):
        Runtime("cpu").session(data)
