"""CPU and GPU side by side: what is said without a GPU, the arithmetic, and the same measurement of two CPU sides."""

from __future__ import annotations

import io
import math
import shutil

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from bench import devices
from bench.compare import Group, Subject
from bench.devices import difference, gpu_name, side_by_side, why_none
from bench.load import Target
from bench.raw import RawModel
from bench.report import WIDTH, print_report
from bench.run import SECTIONS, parse
from bench.stage import Effort
from service.errors import DeviceUnavailable
from service.inference.sessions import CUDA, Runtime

HERE = CUDA in ort.get_available_providers() and Runtime("auto").provider == CUDA
no_gpu = pytest.mark.skipif(HERE, reason="a GPU is here")


def printed(gpu):
    console = Console(width=WIDTH, highlight=False, file=io.StringIO())
    facts = dict.fromkeys(("date", "commit", "cpu", "cores", "python", "onnxruntime"), "-")
    settings = {"workers": 1, "rounds": 1, "seconds": 0.1}
    print_report({"facts": facts, "settings": settings, "took_seconds": 1, "gpu": gpu}, console)
    return console.file.getvalue()


@no_gpu
def test_without_a_gpu_nothing_is_started_and_one_line_says_so(monkeypatch):
    monkeypatch.setattr(devices, "stage", None)  # not called
    gpu = side_by_side({"some": None}, Effort(0, 1, 1), None)
    assert gpu == {"none": why_none("cuda")}
    lines = [line for line in printed(gpu).splitlines() if "GPU" in line]
    assert len(lines) == 1
    assert "GPU: there was none, nothing was measured on one." in lines[0]
    assert CUDA in lines[0]
    assert "vaeserve[gpu]" in lines[0]


def test_the_section_belongs_to_every_run():
    assert "gpu" in SECTIONS
    assert "gpu" in parse([]).sections


@no_gpu
def test_raw_onnxruntime_falls_back_to_no_other_device(model):
    if CUDA not in ort.get_available_providers():
        with pytest.warns(UserWarning, match="not in available provider names"), pytest.raises(DeviceUnavailable):
            RawModel(model.bundle, 1, "cuda")
        return
    with pytest.raises(DeviceUnavailable, match="CPUExecutionProvider"):
        RawModel(model.bundle, 1, "cuda")


def test_the_cpu_is_always_there():
    assert why_none("cpu") is None


def test_both_sides_are_measured_and_printed(ppca_root):
    """Of two services on the CPU: the code that would measure a GPU."""
    steps = []

    def progress(numbers, name):
        steps.append(name)
        return numbers

    gpu = side_by_side({"ppca": ppca_root}, Effort(0, 2, 1), progress, device="cpu")
    assert steps == ["warming up", "measuring"]
    found = [(row["cpu"]["verb"], row["cpu"]["connections"], row["cpu"]["batch"]) for row in gpu["results"]]
    assert found == [(verb, *load) for verb in ("encode", "score") for load in devices.LOADS]
    for row in gpu["results"]:
        assert row["apart"] == 0  # the same bundle by the same provider
        assert {**row["cpu"], **row["gpu"]}.items() >= {"answer": "npy", "request": "octet-stream"}.items()
        assert row["cpu"]["rounds"]["images_per_second"] != row["gpu"]["rounds"]["images_per_second"]
        for side in (row["cpu"], row["gpu"]):
            assert side["requests"] == 2 * 2 * side["connections"]
            assert math.isfinite(side["images_per_second"])
    assert [(each["model"], each["verb"], each["gpu"]["layout"]) for each in gpu["raw"]] == [
        ("ppca", "encode", "1 × 1"), ("ppca", "score", "1 × 1"),
    ]  # fmt: skip
    text = printed(gpu)
    assert "CPU and GPU side by side" in text
    assert text.count("| ppca ") == 6 + 2


def result(verb, *rates):
    rounds = {"images_per_second": list(rates)}
    times = {"p50_ms": 1.25, "p99_ms": 2.5}
    return {"verb": verb, "batch": 64, "connections": 4, "images_per_second": rates[0], **times, "rounds": rounds}


def test_ratios_are_of_the_same_rounds_and_shares_of_the_raw_runtime_of_each_device():
    block = {"layout": "2 × 1", "batch": 128}
    raw = {"cpu": {**block, "images_per_second": 400.0}, "gpu": {**block, "images_per_second": 8000.0}}
    row = {"model": "big", "cpu": result("encode", 200.0, 100.0, 50.0), "gpu": result("encode", 2000.0, 800.0, 50.0)}
    gpu = {"device": "some GPU", "results": [{**row, "apart": 3.2e-6}]}
    text = printed({**gpu, "raw": [{"model": "big", "verb": "encode", **raw, "gpu_over_cpu": 20.0}]})
    lines = [line for line in text.splitlines() if "| big " in line and "| encode " in line]
    service, raw_line = ([cell.strip() for cell in line.split("|")] for line in lines)
    side = ["1.25", "2.50"]
    cells = ["big", "encode", "64", "4", "200", *side, "0.50", "2000", *side, "0.25", "8.00", "3e-06"]
    assert [cell for cell in service if cell] == cells
    assert [cell for cell in raw_line if cell] == ["big", "encode", "400", "2 × 1", "128", "8000", "128", "20.00"]
    assert "(some GPU)" in text


def test_how_far_answers_are_apart_is_relative_to_the_largest_number(monkeypatch):
    def saved(*values):
        stream = io.BytesIO()
        np.save(stream, np.array(values, np.float32))
        return stream.getvalue()

    answers = {"cpu": saved(1.0, -8.0, 2.0), "gpu": saved(1.5, -8.0, 2.25)}
    monkeypatch.setattr(devices, "ask", lambda target: answers[target.host])
    subjects = [Subject({}, Target(host, 1, b""), None) for host in ("cpu", "gpu")]
    assert difference(Group("encode", 3, 1, subjects, None)) == 0.5 / 8


def test_the_gpu_is_named_by_the_drivers_tool_or_not_at_all(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Some GPU, 600.1'\necho 'Some GPU, 600.1'\n")
    tool.chmod(0o700)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    assert gpu_name() == "Some GPU, 600.1; Some GPU, 600.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_name() == "unknown: nvidia-smi names none"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu_name() == "unknown: nvidia-smi is not there"
