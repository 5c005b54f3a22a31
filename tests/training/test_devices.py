"""The number of CPU threads: few by default, for others compute on the machine too."""

import pytest
import torch

from training.config import load_config
from training.fitting.devices import chosen, set_threads


@pytest.fixture
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("overrides", "cpus", "threads"),
    [
        ([], 16, 1),
        (["model.network.kind=conv"], 16, 8),
        (["model.network.kind=conv"], 2, 1),
        (["model.network.kind=conv"], 1, 1),
        (["model.network.kind=conv", "run.devices=4"], 16, 2),
        (["model.network.kind=conv", "run.devices=16"], 16, 1),
        (["model.family=ladder"], 16, 8),
        (["model.family=flow"], 16, 8),
        (["model.family=autoencoder"], 16, 1),
        (["model.family=ppca"], 16, 8),
    ],
)
def test_one_thread_for_small_steps_and_half_of_the_cores_for_large_ones(overrides, cpus, threads):
    assert chosen(load_config(None, overrides), cpus) == threads


def test_run_threads_goes_over_the_variable_and_that_over_the_choice(monkeypatch, restored):
    monkeypatch.setattr("training.fitting.devices.available_cpus", lambda: 8)
    convolutions = "model.network.kind=conv"
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # which torch followed when it was loaded
    set_threads(load_config(None, [convolutions]))
    assert torch.get_num_threads() == 3
    set_threads(load_config(None, [convolutions, "run.threads=2"]))
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    set_threads(load_config(None, [convolutions]))
    assert torch.get_num_threads() == 4
    set_threads(load_config(None, []))
    assert torch.get_num_threads() == 1
