"""vaeserve autotune, its file, and what --workers auto makes of it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.cli import app, read_settings
from service.errors import MeasurementFailed
from service.resources import available_cpus
from service.server import auto, tuning
from service.server.autotune import autotune
from service.server.layouts import Layout, Measured, Rate
from service.server.tuned import FILE, Tuned, conditions, usable, write_tuned
from service.server.tuning import Probes, measure_briefly
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.processes import workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

TWO, THREE = Layout(processes=2, threads=1), Layout(processes=3, threads=1)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VAESERVE_{name.upper()}", raising=False)


def cpus(monkeypatch, count, memory=2**40):
    for module in ("server.auto", "server.autotune", "server.tuned", "settings"):
        monkeypatch.setattr(f"service.{module}.available_cpus", lambda: count, raising=False)
        monkeypatch.setattr(f"service.{module}.available_memory", lambda: memory, raising=False)


def measured(layout, cpu=1.0, images_per_second=1.0):
    rate = Rate(images_per_second=images_per_second, latency=1, cpu=cpu)
    return Measured(layout=layout, rates={"ppca score 1": rate}, process_bytes=2**20)


def written(settings, layout=THREE):
    now = conditions(settings)
    return Tuned(
        measured_at="2026-11-21T00:00:00+00:00",
        conditions=now,
        choice=layout,
        why="so",
        shares={str(layout): 1.0},
        measured=[measured(layout)],
    )


@pytest.fixture
def settings(ppca_root, tmp_path):
    return Settings(repository=ppca_root, workers="auto", autotune_file=tmp_path / FILE)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_autotune_measures_with_real_processes_and_serve_takes_its_choice(ppca_root, tmp_path, monkeypatch):
    cpus(monkeypatch, 2)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    file = tmp_path / "choice.json"
    done = run("autotune", "--repository", ppca_root, "--seconds", "0.1", "--output", file)
    assert done.exit_code == 0, done.output
    tuned = Tuned.model_validate_json(file.read_bytes())
    assert [str(each.layout) for each in tuned.measured] == ["1 × 2", "2 × 1"]
    for each in tuned.measured:
        assert list(each.rates) == ["ppca encode 1", "ppca encode 64", "ppca score 1", "ppca score 64"]
        assert each.process_bytes > 50 * 2**20
    assert tuned.conditions.bundles.keys() == {"ppca/1"}
    assert f"{tuned.choice} ← chosen" in done.output
    assert "ppca score, 64 rows" in done.output
    assert tuned.why in done.output
    decided = auto.decide(Settings(repository=ppca_root, workers="auto", autotune_file=file))
    assert (decided.workers, decided.threads) == (tuned.choice.processes, tuned.choice.threads)


def test_a_measurement_beside_others_does_not_talk_out_of_processes(settings, monkeypatch):
    def found(cpu):
        rates = {"1 × 2": 100.0, "2 × 1": 70.0}
        return [
            measured(layout, cpu, rates[str(layout)])
            for layout in (Layout(processes=1, threads=2), Layout(processes=2, threads=1))
        ]

    cpus(monkeypatch, 2)
    monkeypatch.setattr("service.server.autotune.measure_at_length", lambda *_: found(1.0))
    assert autotune(settings, None, 1.0, print).choice == Layout(processes=1, threads=2)
    monkeypatch.setattr("service.server.autotune.measure_at_length", lambda *_: found(0.5))
    tuned = autotune(settings, None, 1.0, print)
    assert tuned.choice == TWO
    assert "others took the CPUs (50% of the time was ours)" in tuned.why


def test_a_place_that_cannot_be_written_is_said_and_only_an_asked_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("service.server.autotune.autotune", lambda settings, *rest: written(settings))
    write_ppca_bundle(tmp_path)
    (tmp_path / FILE).mkdir()  # as little to be written as a read-only folder, also for root
    done = run("autotune", "--repository", tmp_path)
    assert done.exit_code == 0
    assert f"not written: {tmp_path / FILE} cannot be written" in done.output
    done = run("autotune", "--repository", tmp_path, "--output", tmp_path / "absent" / FILE)
    assert done.exit_code == 1
    assert "No such file or directory" in done.output
    (tmp_path / FILE).rmdir()
    assert f"written to {tmp_path / FILE}" in run("autotune", "--repository", tmp_path).output
    assert sorted(each.name for each in tmp_path.iterdir()) == [FILE, "ppca"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--model", "absent"], "no model 'absent' is there: ppca"), (["--repository", "nowhere"], "no bundle under")],
)
def test_nothing_to_measure_is_told(ppca_root, flags, text):
    done = run("autotune", "--repository", ppca_root, *flags)
    assert done.exit_code == 1
    assert text in done.output


def test_a_bundle_that_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    cpus(monkeypatch, 1)
    path, _ = write_ppca_bundle(tmp_path)
    (path / "decoder.onnx").write_bytes(b"no graph")
    done = run("autotune", "--repository", tmp_path)
    assert done.exit_code == 1
    assert "decoder.onnx" in done.output


@pytest.mark.parametrize(
    ("name", "other", "text"),
    [
        ("bundles", {"ppca/1": "00"}, "other bundles (ppca/1)"),
        ("bundles", {}, "other bundles (ppca/1)"),
        ("cpus", 99, "cpus was 99, is "),
        ("cpu_model", "Abacus", "cpu_model was Abacus, is "),
        ("memory", 5, "memory was 5, is "),
        ("device", "cuda", "device was cuda, is cpu"),
        ("concurrency", 9, "concurrency was 9, is 2"),
        ("onnxruntime", "onnxruntime 0.1", "onnxruntime was onnxruntime 0.1, is "),
        ("vaeserve", "0", "vaeserve was 0, is "),
    ],
)
def test_a_choice_made_under_other_conditions_is_not_used_and_says_why(settings, name, other, text):
    now, tuned = conditions(settings), written(settings)
    assert usable(settings.autotune_file, now) is None
    write_tuned(tuned, settings.autotune_file)
    assert usable(settings.autotune_file, now) == THREE
    then = tuned.conditions.model_copy(update={name: other})
    write_tuned(tuned.model_copy(update={"conditions": then}), settings.autotune_file)
    stale = usable(settings.autotune_file, now)
    assert f"{settings.autotune_file} is stale: {text}" in stale
    assert ";" not in stale


def test_no_condition_is_left_out_of_the_test_above():
    assert len(Tuned.model_fields["conditions"].annotation.model_fields) == 8


@pytest.mark.parametrize("content", ["", "{}", "[1", '{"format_version": 2}'])
def test_another_file_is_not_read_as_a_choice(settings, content):
    settings.autotune_file.write_text(content)
    assert "is not what vaeserve autotune writes" in usable(settings.autotune_file, conditions(settings))


def test_the_runtime_s_version_is_the_installed_one(settings):
    import onnxruntime

    assert conditions(settings).onnxruntime.split()[1] == onnxruntime.__version__


class Log:
    def info(self, event, **fields):
        assert event == "workers chosen"
        self.said = fields


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(auto, "get_logger", lambda: log)
    return log


def decided(settings, log):
    made = auto.decide(settings)
    assert (made.workers, made.threads) == (log.said["workers"], log.said["threads"])
    return (made.workers, made.threads), log.said["why"]


@pytest.mark.parametrize(
    ("flags", "count", "memory", "expected", "reason"),
    [
        ([], 1, 2**40, (1, 1), "one CPU"),
        (["--threads", "2"], 8, 2**40, (4, 2), "threads are set"),
        (["--threads", "16"], 8, 2**40, (1, 16), "threads are set"),
        (["--threads", "2"], 8, 400 * 2**20, (2, 2), "400 MiB of memory hold no more than 2"),
        (["--device", "cuda"], 8, 2**40, (8, 1), "only the CPU is measured"),
        (["--device", "cuda"], 8, 400 * 2**20, (2, 4), "400 MiB of memory hold no more than 2"),
        ([], 8, 2**20, (1, 8), "1 MiB of memory hold no more than 1"),
    ],
)
def test_what_needs_no_measurement_is_decided_without(
    ppca_root, monkeypatch, log, flags, count, memory, expected, reason
):
    cpus(monkeypatch, count, memory)
    monkeypatch.setattr(auto, "measure_briefly", None)
    settings = read_settings(["--repository", str(ppca_root), "--workers", "auto", *flags])
    chosen, why = decided(settings, log)
    assert chosen == expected
    assert reason in why


def test_a_fresh_choice_is_taken_and_a_stale_one_measured_anew(settings, monkeypatch, log):
    cpus(monkeypatch, 2)
    monkeypatch.setattr(auto, "measure_briefly", lambda *_: [measured(TWO)])
    write_tuned(written(settings), settings.autotune_file)
    assert decided(settings, log)[0] == (3, 1)
    chosen, why = decided(settings.model_copy(update={"concurrency": 5}), log)
    assert chosen == (2, 1)
    assert "concurrency was 2, is 5" in why
    assert decided(settings.model_copy(update={"threads": 1}), log)[0] == (2, 1)


@pytest.mark.parametrize("error", [MeasurementFailed("it took too long"), OSError("no process"), KeyError("defect")])
def test_a_measurement_that_fails_leaves_the_quota(settings, monkeypatch, log, error):
    def fails(*_):
        raise error

    cpus(monkeypatch, 4)
    monkeypatch.setattr(auto, "measure_briefly", fails)
    chosen, why = decided(settings, log)
    assert chosen == (4, 1)
    assert f"the measurement failed: {error}" in why


def test_a_measurement_that_others_have_starved_is_not_believed(settings, monkeypatch, log):
    cpus(monkeypatch, 4)
    monkeypatch.setattr(auto, "measure_briefly", lambda *_: [measured(Layout(processes=1, threads=4), cpu=0.5)])
    chosen, why = decided(settings, log)
    assert chosen == (4, 1)
    assert "50% of the time was ours" in why


def test_a_brief_measurement_computes_in_real_processes(settings, monkeypatch):
    monkeypatch.setattr(tuning, "BRIEF_SECONDS", 60)
    found = measure_briefly(settings, 8, 8)
    assert [str(each.layout) for each in found] == ["1 × 8", "4 × 2", "8 × 1"]
    assert {name for each in found for name in each.rates} == {"graphs 1", "graphs 8"}


def test_a_brief_measurement_ends_in_time_and_leaves_no_process(settings, monkeypatch):
    started = []
    start = Probes._start
    monkeypatch.setattr(Probes, "_start", lambda self: (start(self), started.append(self)))
    monkeypatch.setattr(tuning, "BRIEF_SECONDS", 0.0)
    with pytest.raises(MeasurementFailed, match="it took too long"):
        measure_briefly(settings, 2, 2)
    assert len(started) == 2
    assert all(child.returncode is not None for child in started[0]._children)


def test_a_probe_that_dies_fails_the_measurement(settings):
    with Probes(1, lambda: time.monotonic() + 60) as probes:
        probes._children[0].kill()
        with pytest.raises(MeasurementFailed):
            probes.prepare(TWO.model_copy(update={"processes": 1}), {"graphs": []})


@pytest.mark.skipif(available_cpus() == 1, reason="one CPU leaves nothing to choose")
def test_serve_takes_the_written_choice_and_loads_no_runtime_for_it(ppca_root, tmp_path):
    root = tmp_path / "exported"
    shutil.copytree(ppca_root, root)
    settings = Settings(repository=root, workers="auto")
    write_tuned(written(settings), root / FILE)
    with workers(root, "--workers", "auto") as service:
        line = service.logged("workers chosen")[0]
        assert (line["workers"], line["threads"], line["by"]) == (3, 1, "autotune")
        assert service.logged("serving")[0]["workers"] == len(service.pids) == 3
        assert service.score(images(2)).status_code == 200
        assert "onnxruntime" not in Path(f"/proc/{service.process.pid}/maps").read_text()


def test_the_file_is_plain_json(settings):
    write_tuned(written(settings), settings.autotune_file)
    document = json.loads(settings.autotune_file.read_text())
    assert document["choice"] == {"processes": 3, "threads": 1}
