"""Settings: flags before environment before defaults; a typo is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import settings
from service.commands.environment import (
    REMOVED,
    check_environment,
    read_settings,
    settings_with,
    variables_of_kubernetes,
)
from service.errors import ConfigurationError
from service.settings import Settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VAESERVE_{name.upper()}", raising=False)


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch):
    monkeypatch.setenv("VAESERVE_MAX_K", "7")
    monkeypatch.setenv("VAESERVE_PORT", "1234")
    settings = read_settings(["--port", "4321", "--skip-broken"])
    assert (settings.port, settings.max_k, settings.skip_broken) == (4321, 7, True)
    assert settings.queue == Settings.model_fields["queue"].default


def test_an_unknown_variable_is_an_error_that_suggests_the_nearest():
    with pytest.raises(ConfigurationError, match=r"VAESERVE_MAX_BACH.*did you mean VAESERVE_MAX_BATCH"):
        check_environment({"VAESERVE_MAX_BACH": "3", "HOME": "/"})


OF_KUBERNETES = {
    "VAESERVE_SERVICE_HOST": "10.0.0.1",
    "VAESERVE_SERVICE_PORT": "8000",
    "VAESERVE_SERVICE_PORT_HTTP": "8000",
    "VAESERVE_PORT": "tcp://10.0.0.1:8000",
    "VAESERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "VAESERVE_PORT_8000_TCP_PROTO": "tcp",
    "VAESERVE_PORT_8000_TCP_PORT": "8000",
    "VAESERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "VAESERVE_GPU_2_SERVICE_HOST": "fd00::1",
    "VAESERVE_GPU_2_PORT": "udp://[fd00::1]:53",
    "VAESERVE_GPU_2_PORT_53_UDP": "udp://[fd00::1]:53",
}
"""What Kubernetes puts into each container of a namespace with Services named vaeserve and vaeserve-gpu-2."""


def test_what_kubernetes_makes_of_a_service_is_no_setting(monkeypatch):
    for name, value in OF_KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VAESERVE_MAX_K", "7")
    given = {**OF_KUBERNETES, "VAESERVE_MAX_K": "7"}
    assert variables_of_kubernetes(given) == sorted(OF_KUBERNETES)
    assert (read_settings([]).port, read_settings([]).max_k) == (8000, 7)
    assert read_settings(["--port", "81"]).port == 81
    assert settings_with(max_batch=3).model_dump(include={"port", "max_k", "max_batch"}) == {
        "port": 8000,
        "max_k": 7,
        "max_batch": 3,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("VAESERVE_PORT", "tcp"), ("VAESERVE_PORT", "80a"), ("VAESERVE_POTR", "tcp://a:1"), ("VAESERVE_SERVICE", "x")],
)
def test_what_only_looks_like_kubernetes_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError):
        read_settings([])


def test_every_setting_is_a_known_variable():
    check_environment({f"VAESERVE_{name.upper()}": "1" for name in Settings.model_fields})


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--port", "70000"], "port"),
        (["--max-k", "0"], "max_k"),
        (["--header-timeout", "-1"], "header_timeout"),
        (["--workers", "0"], "workers"),
        (["--workers", "many"], "workers"),
    ],
)
def test_a_value_out_of_range_names_its_setting(flags, text):
    with pytest.raises(ConfigurationError, match=rf"{text}[\w.-]*: "):
        read_settings(flags)


def test_an_unknown_flag_ends_the_process(capsys):
    with pytest.raises(SystemExit) as ended:
        read_settings(["--prot", "3"])
    assert ended.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
    assert "(default: 8000)" in text


@pytest.mark.parametrize(
    ("flags", "cpus", "workers", "threads"),
    [
        ([], 8, 1, 0),
        (["--workers", "3"], 8, 3, 2),
        (["--workers", "16"], 8, 16, 1),
        (["--workers", "3", "--threads", "4"], 8, 3, 4),
    ],
)
def test_the_cpus_are_shared_out_among_the_workers(monkeypatch, flags, cpus, workers, threads):
    monkeypatch.setattr("service.settings.available_cpus", lambda: cpus)
    settings = read_settings(flags).for_each_worker()
    assert (settings.workers, settings.threads) == (workers, threads)


@pytest.mark.parametrize(
    ("cpus", "given", "batches"),
    [
        (8, {}, 1),  # a session takes all
        (8, {"threads": 1}, 8),
        (8, {"threads": 3}, 2),
        (8, {"workers": 4}, 1),
        (8, {"workers": 4, "threads": 1}, 2),
        (2, {"workers": 8}, 1),
    ],
)
def test_as_many_batches_at_once_as_find_a_cpu(monkeypatch, cpus, given, batches):
    monkeypatch.setattr(settings, "available_cpus", lambda: cpus)
    assert Settings(**given).for_each_worker().max_concurrent_batches == batches


@pytest.mark.parametrize(
    ("cpus", "given", "threads"),
    [
        (8, {}, 8),
        (8, {"threads": 1}, 1),  # what this one process was given
        (8, {"workers": 8}, 8),
        (8, {"workers": 3}, 6),
        (8, {"workers": 2, "threads": 1}, 2),
        (2, {"workers": 5}, 2),
        (1, {"workers": 4, "threads": 2}, 2),
    ],
)
def test_a_run_is_divided_over_the_cpus_that_all_workers_compute_on(monkeypatch, cpus, given, threads):
    monkeypatch.setattr(settings, "available_cpus", lambda: cpus)
    assert Settings(**given).for_each_worker().row_threads == threads


@pytest.mark.parametrize("setting", REMOVED)
def test_a_removed_setting_stops_the_start_and_says_what_stands_in_its_place(monkeypatch, setting):
    flag, variable = f"--{setting.replace('_', '-')}", f"VAESERVE_{setting.upper()}"
    for flags in ([flag, "x"], [f"{flag}=x"]):
        with pytest.raises(ConfigurationError, match=rf"{flag}.*setting {setting} is no more: .*--workers auto"):
            read_settings(flags)
    assert read_settings(["--repository", setting]).repository == Path(setting)  # it is a value here
    monkeypatch.setenv(variable, "x")
    with pytest.raises(ConfigurationError, match=rf"{variable}.*setting {setting} is no more: .*--workers auto"):
        read_settings([])
