"""The ladder against torch.distributions, a Jacobian, a linear-Gaussian case with a known log p(x), and its graphs."""

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from service.bundle.input_rules import Preprocessing
from tests.training.shared import encoded
from training.config import LadderConfig, LikelihoodConfig, ModelConfig, ObjectiveConfig, load_config
from training.errors import ConfigError
from training.evaluation.evaluate import batch_bounds
from training.export.graphs import export_graphs
from training.fitting.objectives import check_objective, elbo, objective
from training.models.ladder import Ladder
from training.models.registry import build_model
from training.nn.ladder_blocks import BOUND, layer_shapes

SMALL = LadderConfig(channels=[4, 6], latents=[1, 2], layers=[1, 2], blocks=1)


def build(shape=(1, 8, 9), ladder=SMALL, spread=0.2, **likelihood):
    """A small ladder in eval mode, its weights disturbed by ``spread`` so that no layer is idle."""
    torch.manual_seed(0)
    model = Ladder(shape, ModelConfig(family="ladder", ladder=ladder, likelihood=LikelihoodConfig(**likelihood)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def inputs(model, n=3, k=2):
    x = torch.rand(n, *model.shape)
    return x, torch.randn(n, k, model.noise_dim), torch.rand_like(x) if model.likelihood.dither else None


def layerwise(model, target, z):
    """p and q of every layer as torch.distributions at given z [N,L], and the layers' z: a way down of its own."""
    parts = [part.double() for part in model.prior.top_down.split(z)]
    features = model.bottom_up(model.likelihood.network_input(target))
    h = model.prior.top_down.constant.expand(len(z), -1, -1, -1)
    p, q = [], []
    for i, (layer, posterior) in enumerate(zip(model.prior.top_down.layers, model.posteriors, strict=True)):
        h = layer.entry(h)
        (loc, scale), extra = layer.prior(h)
        shift, factor = posterior(h, posterior.up(features[model.levels[i]]))
        p.append(Normal(loc.double(), scale.double()))
        q.append(Normal((loc + scale * shift).double(), (scale * factor).double()))
        h = layer.blocks(h + extra + layer.merge(parts[i].float()))
    return p, q, parts


def total(distributions, parts):
    return sum(d.log_prob(part).flatten(1).sum(1) for d, part in zip(distributions, parts, strict=True))


@torch.no_grad()
def test_densities_are_the_sums_of_the_layers_normals_at_the_drawn_z():
    model = build()
    x, noise, dither = inputs(model)
    found, terms = encoded(model, x, noise, dither), model(x, noise, dither)
    for k in range(2):
        p, q, parts = layerwise(model, found.target, found.z[:, k])
        torch.testing.assert_close(found.log_q_z[:, k], total(q, parts), atol=2e-4, rtol=1e-6)
        torch.testing.assert_close(model.prior.log_prob(found.z)[:, k], total(p, parts), atol=2e-4, rtol=1e-6)
    torch.testing.assert_close(terms.z, found.z)
    torch.testing.assert_close(terms.log_q_z.double(), found.log_q_z, atol=2e-4, rtol=1e-6)
    torch.testing.assert_close(terms.log_p_z.double(), model.prior.log_prob(found.z), atol=2e-4, rtol=1e-6)


@torch.no_grad()
def test_the_rate_is_the_layers_analytic_kl_at_the_drawn_parents_averaged():
    model = build()
    x, noise, dither = inputs(model, k=3)
    terms, target = model(x, noise, dither), model.likelihood.target(x, dither)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for k in range(3):
        p, q, _ = layerwise(model, target, terms.z[:, k])
        kls = [kl_divergence(a, b).flatten(1).sum(1) for a, b in zip(q, p, strict=True)]
        expected += torch.stack(kls, 1) / 3
    torch.testing.assert_close(terms.kl.per_group.double(), expected, atol=1e-4, rtol=1e-5)
    assert terms.kl.analytic


@torch.no_grad()
def test_decoding_the_encoders_z_gives_the_parameters_of_forward():
    model = build(family="gaussian", scale="pixel")
    x, noise, dither = inputs(model)
    terms, found = model(x, noise, dither), encoded(model, x, noise, dither)
    joint = model.joint(found.target, found.z, model.decode_samples(found.z))
    torch.testing.assert_close(terms.log_p_x_given_z.double(), joint.log_p_x_given_z, atol=1e-3, rtol=1e-5)
    assert not torch.allclose(terms.log_p_x_given_z[:, 0], terms.log_p_x_given_z[:, 1])


def test_a_prior_draws_density_is_the_noises_over_the_volume():
    model = build()
    noise = torch.randn(2, model.latent_dim)
    z = model.prior.sample(noise)
    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda e: model.prior.sample(e[None])[0], noise[row]).double()
        log_volume = torch.linalg.slogdet(jacobian).logabsdet
        expected = Normal(0.0, 1.0).log_prob(noise[row].double()).sum() - log_volume
        torch.testing.assert_close(model.prior.log_prob(z)[row], expected, atol=1e-3, rtol=1e-5)
        assert torch.triu(jacobian, 1).abs().max() == 0, "a layer's z follows from those above it"


@torch.no_grad()
def test_log_scales_of_prior_and_posterior_are_bounded():
    model = build(spread=1.0)
    for layer in (*model.prior.top_down.layers, *model.posteriors):
        layer.head.bias.copy_(100 * torch.randn_like(layer.head.bias))
    x, _, dither = inputs(model)
    p, q, _ = layerwise(model, model.likelihood.target(x, dither), torch.zeros(3, model.latent_dim))
    priors, factors = ([normal.scale.log() for normal in normals] for normals in (p, q))
    assert max(float(log_scale.abs().max()) for log_scale in priors) <= BOUND + 1e-4
    assert max(float((b - a).abs().max()) for a, b in zip(priors, factors, strict=True)) <= BOUND + 1e-4


@torch.no_grad()
def test_loc_is_the_path_of_zero_noise_and_scale_the_deviations_along_it():
    model = build()
    x, noise, dither = inputs(model)
    found, q = encoded(model, x, noise, dither), model.encode(model.likelihood.target(x, dither))
    torch.testing.assert_close((q.loc, q.scale, *q.rsample(noise)), tuple(found[1:]))
    still = q.rsample(torch.zeros_like(noise))
    torch.testing.assert_close(still.z, found.loc.unsqueeze(1).expand_as(still.z))
    start = 0
    for size in model.prior.top_down.sizes:
        one = torch.zeros_like(noise)
        one[..., start : start + size] = noise[..., start : start + size]
        expected = found.loc.unsqueeze(1) + found.scale.unsqueeze(1) * one
        moved = q.rsample(one).z
        torch.testing.assert_close(moved[..., : start + size], expected[..., : start + size], atol=1e-4, rtol=1e-4)
        start += size
    assert start == model.latent_dim


def linear_gaussian(shape, config):
    """A ladder whose gates stand open and whose prior scales are constant: z and x are jointly Gaussian."""
    model = build(shape, config, spread=0.0, family="gaussian", scale="fixed", fixed_scale=2.0)
    with torch.no_grad():
        for name, parameter in model.prior.named_parameters():
            if name.endswith(("inner.conv.weight", "inner.conv.bias")):
                parameter[len(parameter) // 2 :] = 20.0 if name.endswith("bias") else 0.0
        for layer, posterior in zip(model.prior.top_down.layers, model.posteriors, strict=True):
            channels = layer.sizes[0]
            layer.head.weight[channels : 2 * channels] = 0
            posterior.head.bias.add_(torch.tensor([0.1, -0.1]))
    return model


def test_importance_weights_average_to_the_known_likelihood_of_a_linear_gaussian_ladder():
    model = linear_gaussian((1, 8, 8), LadderConfig(channels=[3, 3], latents=[1, 1], layers=[1, 1]))
    x, dither = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    origin = torch.zeros(model.latent_dim)

    def generate(noise):
        return model.decode(model.prior.sample(noise[None])).loc.flatten()

    weights = torch.autograd.functional.jacobian(generate, origin).double()
    covariance = weights @ weights.T + 4 * torch.eye(64, dtype=torch.float64)
    with torch.no_grad():
        p_x = MultivariateNormal(generate(origin).double(), covariance)
        expected = p_x.log_prob(model.likelihood.target(x, dither).flatten(1).double())
        found = batch_bounds(model, x, dither, k=4000, chunk=4000)
    torch.testing.assert_close(found["iwae"], expected, atol=0.05, rtol=0)
    assert (found["elbo"] < expected - 0.1).all()
    assert torch.linalg.matrix_rank(weights) == model.latent_dim, "every latent matters"


def test_a_gradient_reaches_every_parameter():
    model = build().train()
    terms = model(*inputs(model))
    elbo(terms).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_the_bound_rises_in_a_few_steps():
    model = build(spread=0.0, ladder=SMALL.model_copy(update={"dropout": 0.1})).train()
    x = (torch.linspace(0, 1, 72).reshape(1, 1, 8, 9) * torch.rand(32, 1, 1, 1) > 0.3).float()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    noise = torch.randn(32, 1, model.noise_dim)
    bounds = []
    for _ in range(25):
        bound = elbo(model(x, noise, torch.full_like(x, 0.5)))
        bounds.append(bound.item())
        optimiser.zero_grad()
        (-bound).backward()
        optimiser.step()
    assert bounds[-1] > bounds[0] + 10


@torch.no_grad()
def test_free_bits_are_given_to_each_layer():
    model = build(spread=0.0)
    terms = model(*inputs(model))
    nats = terms.kl.per_group.mean(0)
    free = float(nats.max()) + 1.0
    found = objective(terms, ObjectiveConfig(free_bits=free), beta=0.5)
    torch.testing.assert_close(found, terms.log_p_x_given_z.mean() - 0.5 * 3 * free)
    assert terms.kl.per_group.shape == (3, 3)
    between = float(nats.sort().values[1:].mean())
    expected = terms.log_p_x_given_z.mean() - nats.clamp(min=between).sum()
    torch.testing.assert_close(objective(terms, ObjectiveConfig(free_bits=between), beta=1.0), expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 11, 8), (2, 1, 21)])
@pytest.mark.parametrize("family", ["bernoulli", "discretised_logistic", "gaussian"])
def test_any_image_and_a_signal(shape, family):
    if shape[1] == 1 and family != "gaussian":
        pytest.skip("a family of pixels")
    model = build(shape, family=family, values="reals" if shape[1] == 1 else "pixels")
    x, noise, dither = inputs(model, k=4)
    found = encoded(model, x, noise, dither)
    assert found.z.shape == (3, 4, model.latent_dim)
    assert found.loc.shape == found.scale.shape == (3, model.latent_dim)
    assert model.likelihood.mean(model.decode(model.prior.sample(noise[:, 0]))).shape == (3, *shape)
    assert model.prior.log_prob(found.z).dtype == torch.float64


def test_layers_are_listed_from_the_top():
    found = layer_shapes((1, 28, 28), LadderConfig(channels=[4, 5, 6], latents=[1, 2, 3], layers=[2, 1, 1]))
    assert [(layer.width, layer.latents) for layer in found] == [
        (6, (3, 4, 4)),
        (5, (2, 7, 7)),
        (4, (1, 14, 14)),
        (4, (1, 14, 14)),
    ]


@pytest.mark.parametrize(
    ("shape", "levels", "message"), [((1, 4, 7), 1, "at least 8"), ((1, 1, 5), 1, "1×5"), ((1, 8, 8), 4, "at most 3")]
)
def test_what_cannot_be_halved_is_refused(shape, levels, message):
    config = LadderConfig(channels=[2] * levels, latents=[1] * levels, layers=[1] * levels)
    with pytest.raises(ConfigError, match=message):
        build(shape, config)


@pytest.mark.parametrize("family", ["delta", "squared_error"])
def test_a_ladder_wants_a_likelihood(family):
    with pytest.raises(ConfigError, match=r"bounds log p\(x\), and expects one of bernoulli, .*; got"):
        build(family=family)


def test_dreg_and_uneven_levels_are_refused_in_words():
    with pytest.raises(ConfigError, match="'dreg' is for one stochastic layer"):
        check_objective(load_config(overrides=["model.family=ladder", "objective.kind=dreg"]))
    with pytest.raises(ConfigError, match=r"model\.ladder: .*one entry for each level"):
        load_config(overrides=["model.ladder.channels=[2]"])
    with pytest.raises(ConfigError, match=r"model\.ladder: .*at least 1"):
        load_config(overrides=["model.ladder.layers=[1, 0]"])
    model = build()
    with pytest.raises(ConfigError, match="log q"):
        model(*inputs(model), stop_gradient_q=True)


@torch.no_grad()
def test_weights_are_stored_once_and_load():
    model = build()
    state = model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = build(spread=0.5)
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    z = torch.randn(2, model.latent_dim)
    torch.testing.assert_close(other.prior.log_prob(z), model.prior.log_prob(z))
    torch.testing.assert_close(other.decode(z), model.decode(z))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "discretised_logistic", "logistic_mixture"])
def test_initialise_starts_near_the_training_mean(family):
    model = build((3, 8, 8), spread=0.0, family=family)
    mean = torch.linspace(0.2, 0.8, 192).reshape(3, 8, 8)
    model.head.conv.weight.zero_()
    model.head.conv.bias.zero_()
    model.initialise(mean, mean[None])
    found = model.likelihood.mean(model.decode(torch.zeros(1, model.latent_dim)))[0]
    torch.testing.assert_close(found, mean, atol=0.05, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_graphs_give_torchs_numbers():
    two = LadderConfig(channels=[3, 4], latents=[1, 2], layers=[1, 1], dropout=0.2)
    model = build((3, 9, 8), two, spread=0.1)
    graphs = export_graphs(model)
    assert set(graphs) == {"encoder", "decoder", "joint", "observation", "prior"}
    x, noise, dither = inputs(model, n=5, k=4)
    rows = encoded(model, x, noise, dither)
    p, unflat = model.decode(rows.z.flatten(0, 1)), model.decode_samples(rows.z)
    mean = model.likelihood.mean(p)
    draw = torch.rand_like(mean)
    wanted = {
        "encoder": ({"x": x, "noise": noise} | ({} if dither is None else {"dither": dither}), rows),
        "decoder": ({"z": rows.z.flatten(0, 1)}, (mean, *p)),
        "joint": (
            {"target": rows.target, "z": rows.z, **unflat._asdict()},
            model.joint(rows.target, rows.z, unflat),
        ),
        "observation": ({**p._asdict(), "noise": draw}, (model.likelihood.sample(p, draw),)),
        "prior": ({"noise": noise[:, 0]}, (model.prior.sample(noise[:, 0]),)),
    }
    for role, (feeds, expected) in wanted.items():
        session = ort.InferenceSession(graphs[role])
        found = session.run(None, {name: value.contiguous().numpy() for name, value in feeds.items()})
        for ours, torchs in zip(found, expected, strict=True):
            scale = max(1.0, float(torchs.abs().max()))
            np.testing.assert_allclose(ours, torchs, rtol=1e-4, atol=1e-5 * scale, err_msg=role)


TINY = [
    "data.source=digits",
    "model.ladder.channels=[4, 4]",
    "model.ladder.latents=[1, 1]",
    "model.ladder.layers=[1, 2]",
    "optimiser.batch_size=16",
]


@pytest.mark.parametrize("preset", ["ladder", "ladder-gpu"])
def test_a_presets_step_on_a_cpu(preset):
    config = load_config(preset, [*TINY, "run.accelerator=cpu"])
    model = build_model(Preprocessing(mode="L", height=8, width=8), config.model).train()
    optimiser = torch.optim.AdamW(model.parameters(), config.optimiser.learning_rate)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, noise, dither = inputs(model, n=16, k=config.objective.samples)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16-mixed"):
        terms = model(x, noise, dither)
    loss = -objective(terms, config.objective, beta=1.0)
    loss.backward()
    optimiser.step()
    assert math.isfinite(loss.item())
    assert terms.log_p_x_given_z.dtype == terms.kl.per_group.dtype == torch.float32
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)
