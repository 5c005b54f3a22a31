"""The examples say what is so: their estimators agree in expectation, with one another and with quadrature."""

import numpy as np
import pytest
import torch

from examples.score_function import ESTIMATORS, Measured, build, figure, gradient, log_weights, table


@pytest.fixture(scope="module")
def problem():
    """A VAE of one latent dimension, so that an expectation over z is a one-dimensional integral; and two images."""
    torch.manual_seed(0)
    vae = build(latent_dim=1)
    return vae, (torch.rand(2, 1, 8, 8) < 0.5).float()


def exact(vae, target):
    """The gradient of E_q[log w] by Gauss–Hermite quadrature."""
    nodes, weights = (torch.from_numpy(a).float() for a in np.polynomial.hermite_e.hermegauss(40))

    def bound(vae, target, noise):
        q = vae.encode(target)
        return (log_weights(vae, target, q, q.rsample(noise).z) @ (weights / weights.sum()).double()).mean()

    return gradient(vae, bound, target, nodes.reshape(1, 40, 1).expand(2, 40, 1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_the_exact_gradient_as_its_expectation(problem, name):
    """At K = 2, where a baseline that leaves nothing out would halve the gradient."""
    vae, target = problem
    torch.manual_seed(1)
    many = target.repeat(2000, 1, 1, 1)
    draws = torch.stack([gradient(vae, ESTIMATORS[name], many, torch.randn(4000, 2, 1)) for _ in range(40)])
    expected = exact(vae, target)
    along = expected / expected.norm()
    found, error = (draws @ along).mean(), (draws @ along).std() / 40**0.5
    assert abs(found - expected.norm()) < 4 * error
    assert error < 0.15 * expected.norm(), "or the comparison says nothing"


def test_variance_is_in_the_known_order(problem):
    vae, target = problem
    torch.manual_seed(2)
    noise = torch.randn(100, 2, 16, 1)
    spread = {
        name: torch.stack([gradient(vae, estimator, target, draw) for draw in noise]).var(0).sum()
        for name, estimator in ESTIMATORS.items()
    }
    plain, baseline = spread["score function"], spread["score function, leave-one-out"]
    assert 1.5 * spread["reparameterised"] < baseline
    assert 5 * baseline < plain


def test_one_sample_has_no_others_to_leave(problem):
    vae, target = problem
    noise = torch.randn(2, 1, 1)
    plain, alone = (gradient(vae, ESTIMATORS[n], target, noise) for n in list(ESTIMATORS)[1:])
    torch.testing.assert_close(plain, alone)


def test_the_table_relates_variance_times_time_to_the_reparameterised_gradient(tmp_path):
    rows = [Measured(name, k, 0.001 * k, (1 + i) / k) for i, name in enumerate(ESTIMATORS) for k in (1, 2)]
    lines = table(rows).splitlines()
    assert [float(line.split()[-1]) for line in lines[1:]] == [1, 1, 2, 2, 3, 3]
    figure(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
