"""Bijections: inverses, and log-determinants against autograd's Jacobian, in float64."""

import math

import pytest
import torch

from training.nn.bijections import ActNorm, Chain, InvertibleConv, Logit, Squeeze
from training.nn.couplings import AffineCoupling, ChannelCoupling, CheckerboardCoupling, CouplingStack

SHAPE = (4, 3, 2)
BIJECTIONS = {
    "logit": (lambda: Logit(0.05), SHAPE),
    "squeeze": (lambda: Squeeze((2, 2)), (2, 4, 6)),
    "squeeze one side": (lambda: Squeeze((1, 2)), (1, 3, 4)),
    "actnorm": (lambda: ActNorm(4), SHAPE),
    "convolution": (lambda: InvertibleConv(4), SHAPE),
    "coupling": (lambda: ChannelCoupling(4, 5), SHAPE),
    "coupling of an odd number of channels": (lambda: ChannelCoupling(3, 5), (3, 3, 2)),
    "checkerboard": (lambda: CheckerboardCoupling((1, 3, 5), 4, swap=False), (1, 3, 5)),
    "checkerboard, the other colour": (lambda: CheckerboardCoupling((1, 3, 5), 4, swap=True), (1, 3, 5)),
    "chain": (lambda: Chain([Logit(0.1), Squeeze((1, 2)), ActNorm(4), InvertibleConv(4)]), (2, 3, 4)),
}


def disturbed(module, by=0.3):
    """Weights at which nothing is an identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.double()


def log_det(function, x):
    """log |det ∂function(x)/∂x| by autograd, for one x."""
    jacobian = torch.func.jacrev(lambda value: function(value).flatten())(x).flatten(1)
    return torch.linalg.slogdet(jacobian)[1]


@pytest.fixture(params=BIJECTIONS, ids=str)
def bijection(request):
    torch.manual_seed(1)
    build, shape = BIJECTIONS[request.param]
    return disturbed(build()), torch.rand(3, *shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_the_log_determinant_is_that_of_autograds_jacobian(bijection, training):
    module, x = bijection
    module.train(training)
    expected = torch.stack([log_det(lambda value: module.call_and_ladj(value[None])[0], image) for image in x])
    _, ladj = module.call_and_ladj(x)
    assert ladj.dtype == torch.float64
    torch.testing.assert_close(ladj.expand(3), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_inverse_is_the_inverse(bijection, training):
    module, x = bijection
    module.train(training)
    torch.testing.assert_close(module.inverse(module.call_and_ladj(x)[0]), x, rtol=1e-9, atol=1e-9)


def test_the_logit_transform_takes_the_ends_of_the_interval():
    y, _ = Logit(0.05).call_and_ladj(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
    torch.testing.assert_close(y.flatten(), torch.tensor([-math.log(19), 0.0, math.log(19)]))


def test_a_squeeze_gathers_neighbours():
    image = torch.arange(8.0).view(1, 1, 2, 4)
    assert Squeeze((2, 2)).call_and_ladj(image)[0][0, :, 0].T.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_normalisation_starts_from_data_and_keeps_constant_channels_finite():
    torch.manual_seed(0)
    x = torch.randn(50, 3, 4, 4) * torch.tensor([2.0, 0.1, 0.0]).view(3, 1, 1) + 5
    y = ActNorm(3).initialise(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_a_chain_normalises_each_step_on_what_comes_before_it():
    torch.manual_seed(0)
    chain = Chain([Logit(0.05), ActNorm(2), disturbed(ChannelCoupling(2, 4)).float(), ActNorm(2)])
    y = chain.initialise(torch.rand(50, 2, 4, 4))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_eval_mode_takes_the_weights_of_that_moment():
    conv = disturbed(InvertibleConv(3)).eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    before = conv.call_and_ladj(x)[0]
    with torch.no_grad():
        conv.upper.add_(0.5)
    torch.testing.assert_close(conv.call_and_ladj(x)[0], before)
    changed = conv.train().call_and_ladj(x)[0]
    torch.testing.assert_close(conv.eval().call_and_ladj(x)[0], changed)
    assert not torch.allclose(changed, before)


def test_autocast_leaves_the_map_invertible():
    torch.manual_seed(0)
    chain = Chain([InvertibleConv(4), ChannelCoupling(4, 8), InvertibleConv(4)]).eval()
    x = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = chain.call_and_ladj(x)
    torch.testing.assert_close(chain.inverse(y), x, atol=1e-5, rtol=0)


def test_couplings_start_as_the_identity():
    x = torch.randn(2, 4, 3, 3)
    for coupling in (ChannelCoupling(4, 8), CheckerboardCoupling((4, 3, 3), 8, swap=False)):
        y, ladj = coupling.call_and_ladj(x)
        assert torch.equal(y, x)
        assert not ladj.any()


VECTORS = {
    "one coupling": lambda size: AffineCoupling(size, hidden=6, swap=False),
    "the other half": lambda size: AffineCoupling(size, hidden=6, swap=True),
    "a stack": lambda size: CouplingStack(size, steps=5, hidden=6),
}


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", VECTORS)
def test_couplings_of_vectors_are_invertible_with_their_jacobians(kind, size):
    bijection = disturbed(VECTORS[kind](size))
    x = torch.randn(4, size, dtype=torch.float64)
    y, ladj = bijection.call_and_ladj(x)
    back, inverse_ladj = bijection.inverse_and_ladj(y)
    expected = torch.stack([log_det(lambda value: bijection.call_and_ladj(value)[0], row) for row in x])
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)  # scales and shifts are float32
    torch.testing.assert_close(bijection.inverse(y), back, rtol=0, atol=0)
    torch.testing.assert_close(ladj, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-5, atol=1e-6)


def test_every_dimension_of_a_vector_is_moved_and_by_the_others():
    stack = disturbed(CouplingStack(6, steps=6, hidden=8))
    jacobian = torch.func.jacrev(lambda value: stack.call_and_ladj(value)[0])(torch.randn(6, dtype=torch.float64))
    assert (jacobian.abs() > 1e-6).all()


def test_one_number_cannot_be_coupled():
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        CouplingStack(1, 2, 4)
