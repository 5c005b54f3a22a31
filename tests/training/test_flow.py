"""The flow family: exact densities of images and vectors in raw units, training, and graphs equal to torch."""

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from rich.console import Console
from sklearn.datasets import make_circles, make_moons

from service.bundle.input_rules import ArrayPreprocessing, Preprocessing
from tests.training.shared import encoded
from training.config import FlowConfig, LikelihoodConfig, ModelConfig, ObjectiveConfig, load_config
from training.console import fit_stage
from training.errors import ConfigError
from training.export.graphs import export_graphs
from training.fitting.objectives import objective
from training.models.flow import Flow, squeezings
from training.runs import Launch

SHAPES = [(1, 8, 8), (3, 4, 6), (1, 5, 7), (1, 1, 6), (2, 8, 3)]


def build(shape, values="pixels", **options):
    torch.manual_seed(0)
    likelihood = LikelihoodConfig(family="delta", values=values)
    return Flow(shape, ModelConfig(family="flow", likelihood=likelihood, flow=FlowConfig(**options)))


def disturbed(flow, examples, by=0.05):
    """Weights at which nothing is an identity, activations and units by the examples."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    flow.likelihood.initialise_values(examples.mean(0), examples.std(0))
    flow.initialise(examples.mean(0), examples)
    return flow.eval()


def image_flow(shape):
    return disturbed(build(shape, levels=3, steps=3, hidden=6), torch.rand(64, *shape))


def vector_flow(shape):
    examples = 7 + torch.randn(64, *shape) * torch.arange(1.0, math.prod(shape) + 1).view(shape)
    return disturbed(build(shape, "reals", steps=4, hidden=8), examples, by=0.2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 28, 28), [(2, 2), (2, 2)]),  # 7×7 cannot be squeezed
        ((3, 32, 32), [(2, 2), (2, 2), (2, 2)]),
        ((1, 6, 7), [(2, 1)]),
        ((1, 4, 7), [(2, 1), (2, 1)]),
        ((3, 5, 7), [(1, 1)]),
    ],
)
def test_levels_end_where_both_sides_are_odd(shape, expected):
    assert squeezings(shape, 3) == expected


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_decoder_inverts_the_encoder(shape):
    flow = image_flow(shape)
    x = torch.rand(5, *shape)
    found = encoded(flow, x, torch.randn(5, 2, 0), torch.rand_like(x))
    p = flow.decode_samples(found.z)
    torch.testing.assert_close(p.loc[:, 1], found.target, atol=1e-4, rtol=0)
    assert (flow.likelihood.mean(p)[:, 0] - x).abs().max() <= 0.51 / 255
    assert found.loc.shape == (5, math.prod(shape))
    assert torch.equal(found.z[:, 1], found.loc)
    assert not found.scale.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_density_of_images_is_the_change_of_variables_by_autograd(shape):
    flow = image_flow(shape).double().eval()
    target = torch.rand(2, *shape, dtype=torch.float64)
    for image, found in zip(target, flow.encode(target).log_q_z, strict=True):
        jacobian = torch.func.jacrev(lambda value: flow.encode(value[None]).loc[0])(image)
        torch.testing.assert_close(-found, torch.linalg.slogdet(jacobian.flatten(1))[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 4)])
def test_the_density_of_vectors_and_signals_is_in_their_own_units(shape):
    flow = vector_flow(shape).double()
    x = 7 + 3 * torch.randn(2, *shape, dtype=torch.float64)
    rows = encoded(flow, x, torch.zeros(2, 1, 0, dtype=torch.float64))
    for row, found in zip(x, rows.log_q_z[:, 0], strict=True):
        jacobian = torch.func.jacrev(lambda value: flow.encode(flow.likelihood.target(value[None], None)).loc[0])(
            row
        ).flatten(1)
        torch.testing.assert_close(-found, torch.linalg.slogdet(jacobian)[1], rtol=1e-5, atol=1e-5)
    mean = flow.likelihood.mean(flow.decode(rows.loc))
    torch.testing.assert_close(mean.double(), x.float().double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["elbo", "iwae"])
def test_the_objective_is_the_log_density_even_where_it_exceeds_one(kind):
    flow = image_flow((1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    dither = torch.rand_like(x)
    terms = flow(x, torch.randn(4, 3, 0), dither)
    z, ladj = flow.call_and_ladj(flow.likelihood.target(x, dither))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1) + ladj
    found = objective(terms, ObjectiveConfig(kind=kind), 1.0).double()
    torch.testing.assert_close(found, expected.mean(), rtol=1e-6, atol=1e-5)
    assert expected.mean() < 0
    kl = terms.kl._replace(per_group=terms.kl.per_group - 1000)
    shifted = terms._replace(kl=kl, log_q_z=terms.log_q_z - 1000)
    found = objective(shifted, ObjectiveConfig(kind=kind), 1.0).double()
    torch.testing.assert_close(found, expected.mean() + 1000, rtol=1e-6, atol=1e-5)
    assert terms.log_q_z.shape == terms.log_p_x_given_z.shape == (4, 3)
    assert not terms.log_p_x_given_z.any()


@pytest.mark.parametrize("build_one", [image_flow, vector_flow])
@torch.no_grad()
def test_log_prob_is_the_same_however_many_samples(build_one):
    flow, x = build_one((1, 4, 6)), torch.rand(5, 1, 4, 6)
    one, many = (flow.log_prob(x, samples, torch.Generator().manual_seed(3)) for samples in (1, 4))
    torch.testing.assert_close(one, many)
    dither = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) if flow.likelihood.dither else None
    z, ladj = flow.call_and_ladj(flow.likelihood.target(x, dither))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1) + ladj
    torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("build_one", [image_flow, vector_flow])
def test_the_gradient_reaches_every_parameter(build_one):
    flow = build_one((1, 4, 6)).train()
    terms = flow(torch.rand(8, 1, 4, 6), torch.zeros(8, 1, 0), torch.rand(8, 1, 4, 6))
    objective(terms, ObjectiveConfig(), 1.0).backward()
    still = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@torch.no_grad()
def test_training_examples_start_as_standardised_latents():
    flow = build((1, 8, 8), levels=2, steps=3, hidden=6)
    images = torch.rand(300, 1, 8, 8) ** 3
    flow.initialise(images.mean(0), images)
    z, _ = flow.call_and_ladj(flow.likelihood.target(images, torch.rand_like(images)))
    assert z.mean().abs() < 0.05
    assert z.std() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_a_level_starts_from_the_half_that_the_one_before_it_keeps():
    stack = build((1, 8, 8), levels=2, steps=1, hidden=6).flow
    images = torch.rand(50, 1, 8, 8) ** 3
    stack.initialise(images)
    y, _ = stack.levels[0].call_and_ladj(images)
    squeeze, norm = stack.levels[1].steps[:2]
    first = norm.call_and_ladj(squeeze.call_and_ladj(y[:, : y.shape[1] - stack.shapes[0][0]])[0])[0]
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(first.std((0, 2, 3), correction=0), torch.ones(8), atol=1e-4, rtol=0)


@torch.no_grad()
def test_loaded_weights_give_the_same_latents_and_inverse():
    flow, other = image_flow((1, 4, 6)), build((1, 4, 6), levels=3, steps=3, hidden=6)
    other.load_state_dict(flow.state_dict())
    x = torch.rand(3, 1, 4, 6)
    assert torch.equal(other.eval().encode(x).loc, flow.encode(x).loc)
    torch.testing.assert_close(other.flow.inverse(other.encode(x).loc), x, atol=1e-4, rtol=0)


def checkerboard(count, generator):
    first = generator.uniform(-2, 2, count)
    return np.stack(
        [first, generator.uniform(0, 1, count) - 2 * generator.randint(0, 2, count) + np.floor(first) % 2], 1
    )


TOYS = {
    "moons": lambda count, seed: make_moons(count, noise=0.1, random_state=seed)[0],
    "rings": lambda count, seed: make_circles(count, noise=0.05, factor=0.3, random_state=seed)[0],
    "checkerboard": lambda count, seed: checkerboard(count, np.random.RandomState(seed)),
}


def raw_units(points):
    """Two features in units of their own."""
    return torch.from_numpy(points * [30.0, 0.2] + [500.0, -3.0]).float().view(-1, 1, 1, 2)


def fitted(examples, steps=500):
    flow = build((1, 1, 2), "reals", steps=6, hidden=24)
    flow.likelihood.initialise_values(examples.mean(0), examples.std(0))
    flow.initialise(examples.mean(0), examples)
    optimiser = torch.optim.Adam(flow.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = examples[torch.randint(len(examples), (256,))]
        loss = -objective(flow(batch, batch.new_zeros(len(batch), 1, 0)), ObjectiveConfig(), 1.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return flow.eval()


@torch.no_grad()
def log_density(flow, x):
    terms = flow(x, x.new_zeros(len(x), 1, 0))
    return (terms.log_p_x_given_z + terms.log_p_z - terms.log_q_z)[:, 0].double()


def grid(examples, side=300):
    """Cell centres [side²,1,1,2] over three times the examples' range, and a cell's area."""
    low, high = examples.amin(0).flatten(), examples.amax(0).flatten()
    span = high - low
    axes = [(low[i] - span[i]) + 3 * span[i] * (torch.arange(side) + 0.5) / side for i in (0, 1)]
    return torch.cartesian_prod(*axes).view(-1, 1, 1, 2), float((3 * span / side).prod())


@pytest.mark.integration
@pytest.mark.parametrize("toy", TOYS)
def test_a_trained_density_sums_to_one_and_beats_a_gaussian(toy):
    examples, held_out = (raw_units(TOYS[toy](2000, seed)) for seed in (0, 1))
    flow = fitted(examples)
    points, area = grid(examples)
    assert float(torch.exp(log_density(flow, points)).sum()) * area == pytest.approx(1, abs=0.01)
    flat = examples.double().flatten(1)
    gaussian = torch.distributions.MultivariateNormal(flat.mean(0), torch.cov(flat.T))
    gain = log_density(flow, held_out).mean() - gaussian.log_prob(held_out.double().flatten(1)).mean()
    assert gain > 0.2


RULES = {
    "images": (image_flow, Preprocessing(mode="L", height=5, width=7)),
    "vectors": (vector_flow, ArrayPreprocessing(kind="vector", natural=(5,))),
}


@pytest.mark.parametrize("kind", ["vectors", pytest.param("images", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_graphs_give_torchs_numbers(kind):
    build_one, rule = RULES[kind]
    flow = build_one(rule.shape)
    graphs = {role: ort.InferenceSession(data) for role, data in export_graphs(flow).items()}
    assert set(graphs) == {"encoder", "decoder", "joint", "observation"}
    x, z = torch.rand(3, *rule.shape), torch.randn(4, flow.latent_dim)
    inputs = {"x": x} | ({"dither": torch.rand_like(x)} if flow.likelihood.dither else {})
    rows, p = encoded(flow, noise=x.new_zeros(3, 1, 0), **inputs), flow.decode(z)
    copies = rows.z.repeat(1, 2, 1)
    at_copies = flow.decode_samples(copies)
    joint = flow.joint(rows.target, copies, at_copies)
    cases = {
        "encoder": (inputs, rows),
        "decoder": ({"z": z}, (flow.likelihood.mean(p), *p)),
        "joint": ({"target": rows.target, "z": copies, "loc": at_copies.loc}, joint),
    }
    for role, (fed, expected) in cases.items():
        found = graphs[role].run(None, {name: value.numpy() for name, value in fed.items()})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_what_a_flow_cannot_be_is_named():
    with pytest.raises(ConfigError, match="expected delta, got bernoulli"):
        Flow((1, 4, 4), ModelConfig(family="flow"))
    with pytest.raises(ConfigError, match="at least 2 numbers"):
        build((1, 1, 1))


TINY = ["data.source=digits", "optimiser.batch_size=64", "optimiser.epochs=3", "optimiser.warmup_steps=5"]
TINY += ["optimiser.ema_decay=0.5", "model.flow.steps=2", "model.flow.hidden=8", "run.accelerator=cpu", "run.threads=1"]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """A run of the preset, on the CPU and tiny."""
    config = load_config(request.param, TINY, {"name": "tiny"})
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    return fit_stage(config, folder, Launch(data="digits", overrides=TINY), False, Console(quiet=True))[0]


@pytest.mark.integration
@pytest.mark.parametrize("trained", ["flow", "glow-gpu"], indirect=True)
def test_the_presets_learn(trained):
    bounds = [row["bound"] for row in trained.checkpoint["history"]]
    assert bounds == sorted(bounds)


def test_the_bundle_says_exact_and_a_point(fitted_family):
    served = fitted_family("flow").served
    assert (served.manifest.evidence, served.manifest.posterior.moments) == ("exact", "point")
    assert not served.manifest.likelihood.pixelwise
