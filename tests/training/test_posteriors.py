"""Posteriors: densities against autograd's Jacobians and closed forms, order, orthogonality, training, export."""

import math
from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.func import jacrev, vmap

from service.bundle.manifest import Manifest
from tests.training.shared import encoded
from training.config import ModelConfig, ObjectiveConfig, PosteriorConfig, load_config
from training.distributions import reflect
from training.errors import ConfigError
from training.export.graphs import export_graph, likelihood, signature
from training.fitting.objectives import check_objective, objective
from training.models.posteriors import MAX_DIAGONAL, PosteriorHead, build_posterior
from training.models.vae import VAE
from training.nn.masked import AutoregressiveNetwork, MaskedLinear

FEATURES = 5
EVALUABLE = ["diagonal_gaussian", "householder"]
FLOWS = ["planar", "sylvester", "iaf"]
FAMILIES = EVALUABLE + FLOWS


def options(family, **changes):
    return PosteriorConfig(family=family, **{"vectors": 3, "steps": 3, "rank": 2, "hidden": 10, **changes})


def build(family, latent_dim=3, spread=0.4, **changes):
    """A posterior whose weights are ``spread`` away from where training starts, so that every part matters."""
    torch.manual_seed(1)
    posterior = build_posterior(options(family, **changes), FEATURES, latent_dim)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return posterior.eval()


def log_normal(noise):
    return torch.distributions.Normal(0.0, 1.0).log_prob(noise.double()).sum(-1)


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_q_is_the_noises_density_over_autograds_jacobian(family, latent_dim):
    posterior = build(family, latent_dim)
    q = posterior(torch.randn(1, FEATURES))
    noise = 1.5 * torch.randn(20, latent_dim)
    jacobian = vmap(jacrev(lambda e: q.rsample(e[None, None]).z[0, 0]))(noise)
    expected = log_normal(noise) - torch.linalg.slogdet(jacobian.double()).logabsdet
    z, log_q_z = q.rsample(noise[None])
    assert (z.dtype, log_q_z.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(log_q_z[0], expected, atol=2e-5, rtol=1e-5)
    if latent_dim > 1 and family != "diagonal_gaussian":
        off_diagonal = jacobian[:, ~torch.eye(latent_dim, dtype=torch.bool)]
        assert off_diagonal.abs().mean() > 0.01, "the flow mixes dimensions, or this test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_q_integrates_to_one_in_two_dimensions(family):
    """E_q[φ(z)/q(z)] = ∫ φ = 1 for any density φ inside q's range: a narrow Gaussian amid the draws."""
    posterior = build(family, 2)
    z, log_q_z = posterior(torch.randn(1, FEATURES)).rsample(torch.randn(1, 300_000, 2))
    centre, spread = z[0].double().mean(0), 0.6 * z[0].double().std(0)
    narrow = log_normal((z[0].double() - centre) / spread) - torch.log(spread).sum()
    ratio = torch.exp(narrow - log_q_z[0])
    error = ratio.std().item() / math.sqrt(len(ratio))
    assert error < 0.01
    assert ratio.mean().item() == pytest.approx(1, abs=4 * error)


@pytest.mark.parametrize("family", EVALUABLE)
@torch.no_grad()
def test_a_known_density_is_that_of_the_draws_and_integrates_to_one_on_a_grid(family):
    posterior = build(family, 2, vectors=4)  # an odd number would be its own inverse in 2-D
    name = "base_scale" if family == "householder" else "scale"
    q = replace(posterior(torch.randn(2, FEATURES)), **{name: torch.tensor([[0.4, 1.2], [1.5, 0.6]])})  # fits the grid
    z, log_q_z = q.rsample(torch.randn(2, 50, 2))
    torch.testing.assert_close(q.log_prob(z), log_q_z, atol=2e-5, rtol=1e-5)
    loc, scale = q.loc, q.scale
    line = torch.linspace(-8, 8, 401)
    steps = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, -1, 2) * scale.unsqueeze(1)
    density = torch.exp(q.log_prob(loc.unsqueeze(1) + steps))
    torch.testing.assert_close(
        density.sum(1) * 0.04**2 * scale.double().prod(-1), torch.ones(2).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_called_evaluable_has_a_density_at_any_z(family):
    posterior = build(family)
    assert posterior.evaluable == (family in EVALUABLE)
    assert posterior.family == family
    if family in FLOWS:
        q = posterior(torch.randn(1, FEATURES))
        with pytest.raises(NotImplementedError, match="its own draws only"):
            q.log_prob(torch.zeros(1, 1, 3))
        with pytest.raises(NotImplementedError, match="its own draws only"):
            q.stop_gradient()


@torch.no_grad()
def test_householders_moments_are_those_of_its_draws():
    q = build("householder", 4)(torch.randn(2, FEATURES))
    loc, scale = q.loc, q.scale
    z, _ = q.rsample(torch.eye(4).expand(2, -1, -1))
    factor = (z - loc.unsqueeze(1)).double()  # rows: the image of each axis
    torch.testing.assert_close(
        scale.double() ** 2, torch.diagonal(factor.mT @ factor, dim1=1, dim2=2), atol=1e-6, rtol=1e-5
    )
    assert (factor.mT @ factor)[0, 0, 1:].abs().max() > 1e-3, "full covariance"
    torch.testing.assert_close(q.rsample(torch.zeros(2, 1, 4)).z.squeeze(1), loc)


@pytest.mark.parametrize("family", FLOWS)
@torch.no_grad()
def test_a_flows_loc_is_the_image_of_its_bases_mean(family):
    posterior = build(family)
    features = torch.randn(2, FEATURES)
    q = posterior(features)
    torch.testing.assert_close(q.rsample(torch.zeros(2, 1, 3)).z.squeeze(1), q.loc)
    torch.testing.assert_close(q.scale, posterior.base(features).scale)
    assert posterior.moments == "base"


@torch.no_grad()
def test_householders_and_sylvesters_q_are_orthogonal():
    vectors = build("householder", 6, vectors=5)(torch.randn(4, FEATURES)).vectors
    q = reflect(torch.eye(6).expand(4, -1, -1), vectors)
    torch.testing.assert_close(q @ q.mT, torch.eye(6).expand(4, -1, -1), atol=1e-6, rtol=0)
    assert (q[0] - torch.eye(6)).abs().max() > 0.1
    frames = build("sylvester", 6, rank=4)(torch.randn(4, FEATURES)).transform.frames
    assert frames.shape == (4, 3, 6, 4)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(4).expand(4, 3, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_an_autoregressive_network_sees_what_comes_before_and_all_of_it(reverse, training):
    torch.manual_seed(0)
    network = AutoregressiveNetwork(5, 24, reverse)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    network.train(training)
    context = torch.randn(1, 24)
    for output in (0, 1):
        jacobian = jacrev(lambda z, i=output: network(z[None, None], context)[i][0, 0])(torch.randn(5))
        before = torch.ones(5, 5).triu(1) if reverse else torch.ones(5, 5).tril(-1)
        torch.testing.assert_close((jacobian != 0).float(), before, msg=str(jacobian))
        seen = jacrev(lambda c, i=output: network(torch.zeros(1, 1, 5), c[None])[i][0, 0])(context[0])
        assert (seen != 0).any(1).all(), "the context reaches every element, the first in order too"


@torch.no_grad()
def test_an_iaf_step_is_the_papers_gate():
    """z ← σ(s) ⊙ z + (1 − σ(s)) ⊙ m (Kingma et al. 2016, Algorithm 1), s beyond the bias that opens the gates."""
    posterior = build("iaf", 4, steps=1)
    q = posterior(torch.randn(2, FEATURES))
    z_0 = torch.randn(2, 3, 4)
    m, s = posterior.steps[0](z_0, q.transform.context[:, 0])
    gate = torch.sigmoid(s + 2)
    torch.testing.assert_close(q.transform.call_and_ladj(z_0)[0], gate * z_0 + (1 - gate) * m)
    assert (m.abs() > 0.1).any()


def test_iaf_reverses_the_order_from_step_to_step():
    posterior = build("iaf", 4, steps=2)
    reach = []
    contexts = posterior(torch.randn(1, FEATURES)).transform.context.unbind(1)
    for step, context in zip(posterior.steps, contexts, strict=True):
        reach.append(jacrev(lambda z, f=step, c=context: f(z[None, None], c)[0][0, 0])(torch.randn(4)))
    assert not reach[0].triu().any()
    assert not reach[1].tril().any()
    assert reach[0].any()
    assert reach[1].any()


def test_a_masked_weight_gets_no_gradient_and_folds_to_the_same_function():
    torch.manual_seed(0)
    layer = MaskedLinear(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(4, 3)
    trained = layer(x)
    trained.square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask != 0)
    torch.testing.assert_close(layer.eval()(x), trained)
    assert torch.equal(layer.weight != 0, layer.mask != 0)
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.mask.zero_()
    torch.testing.assert_close(layer(x), trained, msg="in eval mode the mask is in the weight, not in the graph")


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_a_diagonal_gaussian(family):
    posterior = build(family, 4, spread=0.0, steps=2)
    features = torch.randn(1, FEATURES)
    q = posterior(features)
    jacobian = jacrev(lambda e: q.rsample(e[None, None]).z[0, 0])(torch.randn(4))
    drawn_together = 1 / (1 + math.exp(-2)) ** 2 if family == "iaf" else 1.0
    base = posterior if family == "diagonal_gaussian" else posterior.base
    expected = torch.diag(base(features).scale[0]) * drawn_together
    torch.testing.assert_close(jacobian.abs(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_far_out_give_finite_densities_and_gradients(family):
    posterior = build(family, steps=4).train()
    features = (100 * torch.randn(16, FEATURES)).requires_grad_()
    z, log_q_z = posterior(features).rsample(3 * torch.randn(16, 8, 3))
    (z.square().mean() + log_q_z.mean()).backward()
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_q_z).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in posterior.parameters())


@pytest.mark.parametrize("family", ["planar", "sylvester"])
@torch.no_grad()
def test_a_step_on_the_verge_of_losing_a_dimension_stays_finite(family):
    posterior = build(family, spread=0.0)
    for parameter in posterior.parameters():
        parameter.zero_()
    if family == "planar":  # wᵀu = −3000: all that is along w would go
        posterior.direction.bias.fill_(1.0)
        posterior.shift.bias.fill_(-1000.0)
    else:  # r_mm = 1, r̃_mm = −1 at tanh′ = 1
        posterior.vectors.bias.copy_(torch.eye(3).repeat(3, 1).flatten())
        posterior.rest.bias.unflatten(0, (3, 3, 2))[:, 0] = 100.0
        posterior.rest.bias.unflatten(0, (3, 3, 2))[:, 1] = -100.0
    q = posterior(torch.zeros(1, FEATURES))
    if family == "sylvester":
        assert q.transform.diagonal.abs().max() <= MAX_DIAGONAL**2 + 1e-6
    _, log_q_z = q.rsample(torch.zeros(1, 1, 3))
    assert 3 * log_normal(torch.zeros(1)) < log_q_z.item() < 50


def tensors_of(q):
    """The tensors that q and its parts hold."""
    for field in fields(q):
        value = getattr(q, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_autocast_leaves_maps_and_determinants_in_float32(family):
    posterior = build(family, 6, rank=4)
    q, noise = posterior(torch.randn(2, FEATURES)), torch.randn(2, 7, 6)
    z, log_q_z = q.rsample(noise)
    with torch.autocast("cpu", torch.bfloat16):
        found = list(tensors_of(posterior(torch.randn(2, FEATURES))))
        rounded, rounded_log_q_z = q.rsample(noise)
    assert len(found) == {"diagonal_gaussian": 2, "householder": 3, "planar": 6, "sylvester": 7, "iaf": 3}[family]
    assert all(value.dtype == torch.float32 for value in found)
    assert (rounded.dtype, rounded_log_q_z.dtype) == (torch.float32, torch.float64)
    rough = family == "iaf"  # its networks are rounded, and log q with them: the Jacobian is of the rounded map
    torch.testing.assert_close(rounded, z, atol=0.2 if rough else 1e-6, rtol=0)
    torch.testing.assert_close(rounded_log_q_z, log_q_z, atol=0.2 if rough else 1e-6, rtol=0)


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(Wz, ½²I) in two latent dimensions that the posterior correlates."""

    def __init__(self):
        self.w = torch.tensor([[1.0, 0.8], [0.7, 0.9], [0.5, 0.6]]).double()
        self.x = torch.tensor([0.9, -0.4, 0.6]).double()
        precision = torch.eye(2).double() + 4 * self.w.T @ self.w
        evidence = torch.distributions.MultivariateNormal(
            torch.zeros(3).double(), self.w @ self.w.T + 0.25 * torch.eye(3).double()
        )
        self.log_p_x = evidence.log_prob(self.x).item()
        gap = torch.log(torch.diagonal(precision)).sum() - torch.logdet(precision)  # of the best diagonal Gaussian
        self.best_diagonal = self.log_p_x - 0.5 * gap.item()

    def log_joint(self, z):
        observed = torch.distributions.Normal(z.double() @ self.w.T, 0.5).log_prob(self.x).sum(-1)
        return observed + log_normal(z)


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_stay_below_log_p_x_of_a_linear_gaussian_model_and_come_near_it(family):
    """A log-determinant that is off moves the ELBO past log p(x), or the mean of the weights away from p(x)."""
    model = LinearGaussian()
    torch.manual_seed(0)
    posterior = build_posterior(options(family, hidden=16), FEATURES, 2)
    features = torch.ones(1, FEATURES)
    optimiser = torch.optim.Adam(posterior.parameters(), 0.02)
    for _ in range(300):
        z, log_q_z = posterior(features).rsample(torch.randn(1, 64, 2))
        optimiser.zero_grad()
        (log_q_z - model.log_joint(z)).mean().backward()
        optimiser.step()
    with torch.no_grad():
        z, log_q_z = posterior.eval()(features).rsample(torch.randn(1, 128_000, 2))
    log_w = (model.log_joint(z) - log_q_z)[0]
    elbo, error = log_w.mean().item(), log_w.std().item() / math.sqrt(len(log_w))
    iwae = torch.logsumexp(log_w.unflatten(0, (-1, 16)), 1) - math.log(16)
    assert elbo < model.log_p_x + 4 * error
    assert elbo - 4 * error < iwae.mean().item() < model.log_p_x + 4 * iwae.std().item() / math.sqrt(len(iwae))
    weights = torch.exp(log_w - model.log_p_x)
    assert weights.mean().item() == pytest.approx(1, abs=4 * weights.std().item() / math.sqrt(len(weights)))
    if family == "diagonal_gaussian":
        assert elbo == pytest.approx(model.best_diagonal, abs=0.02)
    else:
        assert elbo > model.best_diagonal + 0.5 * (model.log_p_x - model.best_diagonal)
    if family == "householder":
        assert elbo == pytest.approx(model.log_p_x, abs=0.01), "the true posterior is a Gaussian of full covariance"


def vae(family, **changes):
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"latent_dim": 3, "network": {"hidden": [12]}, "posterior": options(family, **changes).model_dump()}
    )
    return VAE((1, 3, 4), config)


@pytest.mark.parametrize(
    ("family", "kind"), [(family, "elbo") for family in FAMILIES] + [("householder", "dreg"), ("iaf", "iwae")]
)
def test_a_vae_with_any_posterior_learns(family, kind):
    model, config = vae(family).train(), ObjectiveConfig(kind=kind, samples=2)
    prototypes = (torch.rand(4, 1, 3, 4) > 0.5).float()
    x = prototypes[torch.randint(4, (64,))]
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    history = []
    for step in range(60):
        torch.manual_seed(step)
        dither = torch.rand_like(x)
        bound = objective(model(x, torch.randn(64, 2, model.noise_dim), dither, kind == "dreg"), config, 1.0)
        optimiser.zero_grad()
        (-bound).backward()
        if step == 30:
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        optimiser.step()
        history.append(bound.item())
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 1


@cache
@torch.no_grad()
def exported(family):
    """A VAE and its encoder graph."""
    model = vae(family, steps=2, vectors=2, hidden=7)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    draft = Manifest.model_construct(signature=signature(model), likelihood=likelihood(model))
    return model, export_graph(model, draft, "encoder")


@pytest.mark.parametrize(
    "family", ["iaf", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:] if name != "iaf")]
)
@torch.no_grad()
def test_the_exported_encoder_gives_torchs_numbers(family):
    model, graph = exported(family)
    x, noise, dither = torch.rand(4, 1, 3, 4), torch.randn(4, 5, model.noise_dim), torch.rand(4, 1, 3, 4)
    expected = encoded(model, x, noise, dither)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy(), "noise": noise.numpy(), "dither": dither.numpy()})
    assert tuple(output.name for output in session.get_outputs()) == expected._fields
    for name, ours, theirs in zip(expected._fields, expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=2e-6, err_msg=name)
        assert str(ours.dtype).endswith(str(theirs.dtype)), name


def test_masks_are_folded_into_the_exported_weights():
    model, graph = exported("iaf")
    held = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(graph).graph.initializer]
    square = [array for array in held if array.shape == (7, 7)]
    assert len(square) == len(model.posterior.steps), "a weight each, and no mask beside it"
    for step, array in zip(model.posterior.steps, square, strict=True):
        assert sorted(array.ravel()) == sorted((step.second.weight * step.second.mask).detach().numpy().ravel())


def test_combinations_without_a_meaning_are_refused_in_words():
    for family in FLOWS:
        config = load_config(overrides=["objective.kind=dreg", f"model.posterior.family={family}"])
        with pytest.raises(ConfigError, match=rf"^objective\.kind 'dreg' .*'householder'.* got '{family}'$"):
            check_objective(config)
    for family in FAMILIES[1:]:
        with pytest.raises(ConfigError, match=rf"^model: Value error, prior\.family 'vamp' .*got '{family}'$"):
            load_config(overrides=["model.prior.family=vamp", f"model.posterior.family={family}"])
    check_objective(load_config(overrides=["objective.kind=dreg", "model.posterior.family=householder"]))


def test_sylvesters_rank_is_no_more_than_the_latents():
    posterior = build("sylvester", 3, rank=8)
    assert isinstance(posterior, PosteriorHead)
    assert posterior(torch.randn(1, FEATURES)).transform.frames.shape[-1] == 3
