"""The sparse layer: the dense forward pass, gradients on existing links only, exact zeros after every step."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_cht.sparse.linear import SparseConv1D, SparseLinear


def pair(bias: bool, density: float = 0.3) -> tuple[nn.Linear, SparseLinear]:
    """A dense layer with masked weights, and the sparse layer of the same weights."""
    torch.manual_seed(0)
    dense = nn.Linear(12, 7, bias=bias)
    mask = torch.rand(7, 12) < density
    sparse = SparseLinear.from_linear(nn.Linear(12, 7, bias=bias))
    with torch.no_grad():
        for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
            ours.copy_(theirs)
    sparse.set_mask(mask)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense, sparse


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)])
def test_outputs_and_gradients_equal_the_dense_layer_on_existing_links(bias, shape):
    dense, sparse = pair(bias)
    x = torch.randn(shape)
    if len(shape) == 1:
        x = x.unsqueeze(0)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = dense(x1), sparse(x2)
    assert torch.equal(y1, y2)
    y1.square().sum().backward()
    y2.square().sum().backward()
    assert torch.equal(x1.grad, x2.grad)
    assert torch.equal(dense.weight.grad * sparse.mask, sparse.weight.grad)
    assert dense.weight.grad[~sparse.mask].any()
    if bias:
        assert torch.equal(dense.bias.grad, sparse.bias.grad)


def test_autocast_equals_the_dense_layer_bit_for_bit():
    dense, sparse = pair(True)
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = dense(x), sparse(x)
    assert y2.dtype == torch.bfloat16
    assert torch.equal(y1, y2)
    y1.float().square().sum().backward()
    y2.float().square().sum().backward()
    assert sparse.weight.grad.dtype == torch.float32
    assert torch.equal(dense.weight.grad * sparse.mask, sparse.weight.grad)


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(4, 3).double())
    layer.set_mask(torch.ones(3, 4, dtype=torch.bool))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t), (x,))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_and_moments_stay_exactly_zero_off_the_mask(kind):
    _, sparse = pair(True)
    optimizer = kind(sparse.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(20):
        sparse(torch.randn(8, 12)).square().sum().backward()
        nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    off = ~sparse.mask
    assert (sparse.weight[off] == 0).all()
    assert (sparse.weight[sparse.mask] != 0).all()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (optimizer.state[sparse.weight][moment][off] == 0).all()


def test_it_shares_the_parameters_and_keeps_the_state_dict():
    linear = nn.Linear(3, 2)
    sparse = SparseLinear.from_linear(linear)
    assert sparse.weight is linear.weight
    assert sparse.bias is linear.bias
    assert isinstance(sparse, nn.Linear)
    assert list(sparse.state_dict()) == list(linear.state_dict())
    assert sparse.mask.all()
    assert sparse.to(torch.bfloat16).mask.dtype == torch.bool


def test_activation_checkpointing_gives_the_same_gradient():
    _, sparse = pair(False)
    x = torch.randn(4, 12)
    sparse(x).square().sum().backward()
    direct = sparse.weight.grad.clone()
    sparse.weight.grad = None
    torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(direct, sparse.weight.grad)


@pytest.mark.parametrize("passes", [1, 3])
def test_a_capture_sums_the_gradient_of_the_dense_weight(passes):
    dense, sparse = pair(bias=True)
    sparse.captured = torch.zeros(7, 12)
    for _ in range(passes):
        x = torch.randn(2, 3, 12)
        for layer in (dense, sparse):
            layer(x).square().sum().backward()
    torch.testing.assert_close(sparse.captured, dense.weight.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad * sparse.mask, rtol=1e-6, atol=1e-6)
    assert (sparse.weight.grad[~sparse.mask] == 0).all()


# ---- weights stored as (in, out) ----


def conv_pair(density: float = 0.3) -> tuple[Conv1D, SparseConv1D]:
    """A dense Conv1D with masked weights, and the sparse layer of the same weights."""
    torch.manual_seed(0)
    dense, other = Conv1D(7, 12), Conv1D(7, 12)
    mask = torch.rand(12, 7) < density
    with torch.no_grad():
        dense.weight.normal_()
        dense.bias.normal_()
        other.load_state_dict(dense.state_dict())
        dense.weight.mul_(mask)
    sparse = SparseConv1D.from_conv(other)
    assert sparse.weight is other.weight
    assert sparse.bias is other.bias
    sparse.set_mask(mask)
    return dense, sparse


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conv1d_gives_the_outputs_and_gradients_of_the_dense_one_on_existing_links(shape, dtype):
    dense, sparse = conv_pair()
    x1 = torch.randn(shape, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y1, y2 = dense(x1), sparse(x2)
    assert y2.dtype == dtype
    assert torch.equal(y1, y2)
    y1.float().square().sum().backward()
    y2.float().square().sum().backward()
    assert torch.equal(x1.grad, x2.grad)
    assert torch.equal(dense.bias.grad, sparse.bias.grad)
    assert sparse.weight.grad.dtype == torch.float32
    assert torch.equal(dense.weight.grad * sparse.mask, sparse.weight.grad)
    assert dense.weight.grad[~sparse.mask].any()


def test_gradcheck_of_a_conv1d_in_float64():
    layer = SparseConv1D.from_conv(Conv1D(3, 4).double())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t), (x,))


def test_a_conv1d_has_the_gradients_and_the_capture_of_the_linear_layer_of_the_transposed_weight():
    _, conv = conv_pair()
    linear = SparseLinear.from_linear(nn.Linear(12, 7))
    with torch.no_grad():
        linear.weight.copy_(conv.as_OI(conv.weight))
        linear.bias.copy_(conv.bias)
    linear.set_mask(conv.as_OI(conv.mask))
    for layer in (linear, conv):
        layer.captured = torch.zeros_like(layer.weight)
    x = torch.randn(2, 5, 12)
    for layer in (linear, conv):
        for _ in range(2):
            layer(x).square().sum().backward()
    torch.testing.assert_close(conv.as_OI(conv.weight.grad), linear.weight.grad)
    torch.testing.assert_close(conv.as_OI(conv.captured), linear.captured)
    assert linear.captured[~linear.mask].any()


def test_a_conv1d_turns_matrices_into_networks_and_back():
    _, conv = conv_pair()
    linear = SparseLinear.from_linear(nn.Linear(2, 3))
    network = conv.as_OI(conv.mask)
    assert network.shape == (conv.out_features, conv.in_features) == (7, 12)
    assert all(network[o, i] == conv.mask[i, o] for o in range(7) for i in range(12))
    assert torch.equal(conv.as_stored(network), conv.mask)
    places = conv.mask.view(-1).nonzero().squeeze(1)
    assert set(conv.index_OI(places).tolist()) == set(network.view(-1).nonzero().squeeze(1).tolist())
    assert torch.equal(network.view(-1)[conv.index_OI(torch.arange(84))], conv.mask.view(-1))
    assert linear.index_OI(places) is places
    assert linear.as_OI(linear.mask) is linear.mask is linear.as_stored(linear.mask)
    assert repr(conv) == "SparseConv1D(nf=7, nx=12)"
    assert list(conv.state_dict()) == ["weight", "bias"]
