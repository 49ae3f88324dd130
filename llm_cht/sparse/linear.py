"""``SparseLinear`` and ``SparseConv1D``: linear layers whose weight is exactly 0 off its mask, at no cost forward.

The weight stays an ordinary dense Parameter with its own name; it is zero where the mask is False, so the forward pass
is the dense one. The backward pass masks the weight's gradient, so zero weights with zero moments stay zero under Adam
with weight decay and clipping, and no step has to enforce anything.

GPT-2's layers, transformers' ``Conv1D``, are the same map with the weight stored as (in, out). It stays so, and mask
and captured gradient are stored alike: then a state dict, a checkpoint or a shard of any engine is right as it is, and
a flat position is the same link in all of them. Networks and the rules of topologies are (out, in): ``as_OI`` and
``as_stored`` turn a matrix between the two.

Rejected: ``F.linear(x, w * mask)`` keeps a second dense weight alive per layer until the backward pass and defeats the
partitioning of ZeRO-3; a parametrization renames the weight in the state dict; a gradient hook runs after the dense
gradient was accumulated into ``.grad``; a ``SparseLinear`` in place of a ``Conv1D``, whose weight every way of saving
would have to turn back.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, None, None]


class _Linear(torch.autograd.Function):
    """The dense linear map; in backward the weight's gradient is zeroed off the mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, mask_OI: Tensor, captured_OI: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI, mask_OI)
        ctx.captured = captured_OI
        return F.linear(x, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> _Gradients:
        return _backward(ctx, gradients[0], transposed=False)


class _Conv1D(torch.autograd.Function):
    """The same of a weight (in, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_IO: Tensor, bias: Tensor, mask_IO: Tensor, captured_IO: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_IO, mask_IO)
        ctx.captured = captured_IO
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight_IO)  # as Conv1D has it, to the last bit
        return y.view(*x.shape[:-1], weight_IO.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> _Gradients:
        return _backward(ctx, gradients[0], transposed=True)


def _backward(ctx: Any, grad_y: Tensor, transposed: bool) -> _Gradients:
    x, weight, mask = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ (weight.mT if transposed else weight)
    if ctx.needs_input_grad[1]:
        rows, columns = (x, grad_y) if transposed else (grad_y, x)
        rows, columns = rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1])
        grad_weight = rows.mT @ columns
        if ctx.captured is not None:
            _capture(ctx.captured, grad_weight, rows, columns)
        grad_weight.mul_(mask.view(torch.uint8))  # 4 to 8 times faster than by bool on CPU
    if ctx.needs_input_grad[2]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
    return grad_x, grad_weight, grad_bias, None, None


def _capture(captured: Tensor, grad_weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add the gradient of the dense weight in fp32: rounded to bf16, many would be equal, and chosen at random."""
    if grad_weight.dtype == torch.float32:
        captured.add_(grad_weight)
    else:
        captured.addmm_(rows.mT.float(), columns.float())


class SparseLayer(nn.Module):
    """What sparse layers of both makes share: a dense layer's parameters, names and forward pass, and a mask.

    ``mask``: bool buffer, stored as the weight is, True where a link exists. It is not in the state dict, which
    therefore is a valid dense one; who owns the topology saves the mask.
    """

    transposed: ClassVar[bool]
    """whether weight, mask and captured gradient are stored as (in, out)"""
    product: ClassVar[type[torch.autograd.Function]]
    in_features: int
    out_features: int
    weight: Any  # a Parameter; the two makes declare it differently
    bias: Any
    mask: Tensor
    captured: Tensor | None = None
    """fp32, stored as the weight is; while it is there every backward pass adds the gradient of the dense weight"""

    def _over(self, dense: nn.Module) -> Self:
        """Share the Parameters of ``dense``, every link existing."""
        assert isinstance(dense.weight, nn.Parameter), type(dense.weight)
        self.weight, self.bias = dense.weight, dense.bias
        mask = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        self.register_buffer("mask", mask, persistent=False)
        return self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        y: Tensor = self.product.apply(x, weight, bias, self.mask, self.captured)
        return y

    def as_OI(self, stored: Tensor) -> Tensor:
        """A matrix that is stored as the weight is, as networks are seen: (out, in); the same where it is that."""
        return stored.mT.contiguous() if self.transposed else stored

    def as_stored(self, matrix_OI: Tensor) -> Tensor:
        """A matrix (out, in) as the weight is stored; undoes ``as_OI``."""
        return matrix_OI.mT.contiguous() if self.transposed else matrix_OI

    def index_OI(self, index: Tensor) -> Tensor:
        """Flat positions in a stored matrix as flat positions in the network, int64; random numbers go by these."""
        return index % self.out_features * self.in_features + index // self.out_features if self.transposed else index

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over a mask, stored as the weight is, and zero the weights off it; for a weight that is whole here."""
        assert mask.shape == self.mask.shape, (mask.shape, self.mask.shape)
        self.mask.copy_(mask)
        self.weight.mul_(self.mask)


class SparseLinear(SparseLayer, nn.Linear):
    """``nn.Linear`` with a mask (out, in); gradients on existing links only."""

    transposed = False
    product = _Linear

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """A sparse layer that shares the Parameters of ``linear``, every link existing."""
        return cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")._over(linear)


class SparseConv1D(SparseLayer, Conv1D):
    """transformers' ``Conv1D`` with a mask (in, out); gradients on existing links only."""

    transposed = True
    product = _Conv1D

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(nf, nx)
        self.out_features, self.in_features = nf, nx

    @classmethod
    def from_conv(cls, conv: Conv1D) -> SparseConv1D:
        """A sparse layer that shares the Parameters of ``conv``, every link existing."""
        with torch.device("meta"):
            shell = cls(conv.nf, conv.nx)
        return shell._over(conv)

    def __repr__(self) -> str:
        return f"SparseConv1D(nf={self.nf}, nx={self.nx})"


def sparse_layer(dense: nn.Module) -> SparseLayer:
    """A sparse layer that shares the Parameters of a plain ``nn.Linear`` or ``Conv1D``, every link existing."""
    if isinstance(dense, Conv1D):
        return SparseConv1D.from_conv(dense)
    assert isinstance(dense, nn.Linear), type(dense)
    return SparseLinear.from_linear(dense)


def transposed_layers(model: nn.Module) -> frozenset[str]:
    """Full names of the layers, sparse or not, that store their weight as (in, out)."""
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def num_outputs(module: Any) -> int:
    """Output neurons of a linear layer of any make, sparse or not."""
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)
