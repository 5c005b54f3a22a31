"""Objectives against closed forms, numerical integration, and each other's expectations."""

import math

import pytest
import torch

from training.config import ModelConfig, NetworkConfig, ObjectiveConfig
from training.fitting.objectives import dreg, elbo, iwae, objective
from training.fitting.schedule import annealed_beta
from training.models.base import KL
from training.models.vae import VAE


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE((1, 4, 4), ModelConfig(latent_dim=2, network=NetworkConfig(hidden=[16])))


def terms_of(vae, k, n=8, stop_gradient_q=False, seed=0):
    torch.manual_seed(seed)
    x = torch.rand(n, 1, 4, 4)
    return vae(x, torch.randn(n, k, 2), torch.rand_like(x), stop_gradient_q)


def gradient(vae, value):
    vae.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in vae.parameters()])


def test_elbo_is_the_mean_of_the_log_weights_in_expectation(vae):
    terms = terms_of(vae, 20_000, n=2)
    sampled = (terms.log_p_x_given_z + terms.log_p_z - terms.log_q_z).mean()
    assert elbo(terms).item() == pytest.approx(sampled.item(), abs=0.02)


def test_free_bits_cost_nothing_below_the_floor(vae):
    terms = terms_of(vae, 1)
    assert elbo(terms, free_bits=100.0).item() == pytest.approx(terms.log_p_x_given_z.mean().item() - 200, rel=1e-5)


def test_iwae_with_one_sample_is_the_sampled_elbo(vae):
    terms = terms_of(vae, 1)
    assert iwae(terms).item() == pytest.approx(
        (terms.log_p_x_given_z + terms.log_p_z - terms.log_q_z).mean().item(), rel=1e-6
    )


def test_bounds_are_ordered_and_below_the_integral(vae):
    """elbo ≤ iwae-4 ≤ iwae-64 ≤ log p(x), the last by a grid over the two latent dimensions."""
    k = 4096
    terms = terms_of(vae, k, n=4)
    log_w = terms.log_p_x_given_z + terms.log_p_z - terms.log_q_z
    by_size = [torch.logsumexp(log_w.view(4, -1, s), -1).sub(math.log(s)).mean().item() for s in (1, 4, 64)]
    side = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(side, side)
    torch.manual_seed(0)
    x = torch.rand(4, 1, 4, 4)
    torch.randn(4, k, 2)
    target = vae.likelihood.target(x, torch.rand_like(x))
    with torch.no_grad():
        joint = vae.joint(target, grid.unsqueeze(0), vae.decode_samples(grid.unsqueeze(0)))
    exact = torch.logsumexp(joint.log_p_x_given_z + joint.log_p_z, 1) + 2 * math.log(12 / 240)
    assert by_size[0] < by_size[1] < by_size[2] < exact.mean().item() + 1e-3
    assert by_size[2] == pytest.approx(exact.mean().item(), abs=0.05)


def test_dreg_has_the_value_of_iwae(vae):
    assert dreg(terms_of(vae, 5, stop_gradient_q=True)).item() == pytest.approx(iwae(terms_of(vae, 5)).item(), rel=1e-6)


def gradients(vae, loss, detach, beta, runs):
    """Gradients of ``loss`` over ``runs`` draws of the noise, on the same images."""
    torch.manual_seed(1)
    x = torch.rand(16, 1, 4, 4).round()
    draws = (vae(x, torch.randn(16, 8, 2), torch.rand_like(x), detach) for _ in range(runs))
    return torch.stack([gradient(vae, loss(terms, beta)) for terms in draws])


def assert_same_mean(first, second):
    error = ((first.var(0) + second.var(0)) / len(first)).sqrt()
    z_scores = ((first.mean(0) - second.mean(0)) / error.clamp(min=1e-12)).abs()
    assert z_scores.quantile(0.95) < 2.5
    assert z_scores.max() < 5.5


def test_dreg_is_an_unbiased_gradient_of_iwae_with_less_variance(vae):
    """Tucker et al. 2019: equal expectation; the variance of the encoder's gradient is smaller."""
    plain, double = gradients(vae, iwae, False, 1.0, 200), gradients(vae, dreg, True, 1.0, 200)
    assert_same_mean(plain, double)
    encoder = torch.cat(
        [torch.full((p.numel(),), n.startswith(("encoder", "posterior"))) for n, p in vae.named_parameters()]
    )
    assert double.var(0)[encoder].sum() < 0.8 * plain.var(0)[encoder].sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 3.0])
def test_dreg_is_unbiased_under_any_beta(vae, beta):
    with torch.no_grad():  # a posterior far from the prior, whose weights differ enough to tell
        vae.posterior.head.weight.mul_(6)
    assert_same_mean(gradients(vae, iwae, False, beta, 400), gradients(vae, dreg, True, beta, 400))


def test_gradient_reaches_every_parameter(vae):
    for kind in ("elbo", "iwae", "dreg"):
        terms = terms_of(vae, 3, stop_gradient_q=kind == "dreg")
        vae.zero_grad()
        objective(terms, ObjectiveConfig(kind=kind, samples=3), 1.0).backward()
        for name, parameter in vae.named_parameters():
            assert parameter.grad is not None, (kind, name)
            assert parameter.grad.abs().sum() > 0, (kind, name)


def test_beta_rises_linearly_then_stays():
    config = ObjectiveConfig(beta=2.0, warmup_epochs=10)
    assert [annealed_beta(config, epoch) for epoch in (0, 5, 10, 50)] == [0, 1, 2, 2]
    assert annealed_beta(ObjectiveConfig(beta=0.5), 0) == 0.5


def test_beta_rises_in_cycles_then_stays():
    """Two cycles of ten epochs: four of them up to β, six at β."""
    config = ObjectiveConfig(beta=2.0, warmup_epochs=20, annealing="cyclic", cycles=2, ramp=0.4)
    found = [annealed_beta(config, epoch) for epoch in (0, 1, 2, 4, 9.99, 10, 13, 14, 19.99, 20, 21, 100)]
    assert found == pytest.approx([0, 0.5, 1, 2, 2, 0, 1.5, 2, 2, 2, 2, 2])


def test_one_cycle_that_is_all_ramp_is_linear_annealing():
    cyclic = ObjectiveConfig(warmup_epochs=7, annealing="cyclic", cycles=1, ramp=1)
    linear = ObjectiveConfig(warmup_epochs=7)
    for epoch in (0, 0.3, 3.5, 6.9, 7, 8):
        assert annealed_beta(cyclic, epoch) == annealed_beta(linear, epoch)


def test_cycles_without_epochs_are_refused():
    with pytest.raises(ValueError, match="expected more than 0"):
        ObjectiveConfig(annealing="cyclic")


def test_iwae_never_uses_the_analytic_kl(vae):
    """Analytic KL inside the log-mean-exp is no bound: the value must not depend on ``kl`` at all."""
    terms = terms_of(vae, 4)
    changed = terms._replace(kl=KL(terms.kl.per_group + 100, analytic=True))
    assert iwae(changed).item() == iwae(terms).item()
