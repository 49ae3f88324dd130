"""The sparse layer: the dense forward pass, gradients on existing links only, exact zeros after every step."""

import pytest
import torch
from torch import nn

from llm_cht.sparse.linear import SparseLinear


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
