"""Batch statistics over all ranks, by count, on any device (torch's own refuses tensors of the CPU).

C channels; n the values of a channel over batch and space. Means and squared deviations of ranks are put together by counts
(Chan, Golub and LeVeque 1979), so that a batch in parts has the statistics of the batch in one piece.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anyfit.errors import TaskError

__all__ = ["Summing", "leave", "synchronise"]


class Summing(Protocol):
    """What the layers need of a group."""

    phantom: bool  # this batch belongs to another rank: it takes part and counts nothing

    def gathered(self, vector: Tensor) -> Tensor:
        """(ranks, numbers) of all ranks' vectors; raises Lost."""


class _Normalise(torch.autograd.Function):
    """The batch in, the batch with mean 0 and variance 1 out, over all ranks."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, eps: float, group: Summing, found: list[Tensor]) -> Tensor:
        dims = [dimension for dimension in range(inputs.dim()) if dimension != 1]
        shape = [1, -1, *[1] * (inputs.dim() - 2)]
        wide = inputs.double() if inputs.device.type != "mps" else inputs.float()
        count = 0.0 if group.phantom else float(inputs.numel() // inputs.shape[1])
        mean = wide.mean(dims)
        squares = (wide - mean.reshape(shape)).square().sum(dims)
        all_parts = group.gathered(torch.cat((mean, squares, mean.new_tensor([count]))))
        counts = all_parts[:, -1:]
        means, squares = all_parts[:, :-1].chunk(2, 1)
        total = counts.sum()
        mean = (torch.where(counts > 0, means, 0.0) * counts).sum(0) / total
        squares = torch.where(counts > 0, squares + counts * (means - mean).square(), 0.0).sum(0)
        variance = squares / total
        scale = (variance + eps).rsqrt()
        normal = ((wide - mean.reshape(shape)) * scale.reshape(shape)).to(inputs.dtype)
        ctx.save_for_backward(normal, scale, total)
        ctx.group = group
        found.extend((mean, variance, total))
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normal, scale, total = ctx.saved_tensors
        dims = [dimension for dimension in range(normal.dim()) if dimension != 1]
        shape = [1, -1, *[1] * (normal.dim() - 2)]
        wide, rows = gradient.to(scale.dtype), normal.to(scale.dtype)
        mine = torch.cat((wide.sum(dims), (wide * rows).sum(dims)))
        if ctx.group.phantom:
            mine = torch.zeros_like(mine)
        sums, products = ctx.group.gathered(mine).sum(0).chunk(2)
        if ctx.group.phantom:
            return torch.zeros_like(gradient), None, None, None
        inner = wide - (sums.reshape(shape) + rows * products.reshape(shape)) / total
        return (inner * scale.reshape(shape)).to(gradient.dtype), None, None, None


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    """What torch's layers do, but for whose rows the statistics are."""
    if not layer.training:
        plain: Tensor = nn.modules.batchnorm._BatchNorm.forward(layer, inputs)
        return plain
    layer._check_input_dim(inputs)
    found: list[Tensor] = []
    outputs: Tensor = _Normalise.apply(inputs, layer.eps, layer.summing, found)  # type: ignore[no-untyped-call]
    shape = [1, -1, *[1] * (inputs.dim() - 2)]
    if layer.affine:
        outputs = outputs * layer.weight.reshape(shape) + layer.bias.reshape(shape)
    if layer.track_running_stats:
        mean, variance, total = found
        layer.num_batches_tracked.add_(1)
        rate = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
        unbiased = variance * (total / (total - 1).clamp(min=1))
        layer.running_mean.mul_(1 - rate).add_(mean.to(layer.running_mean.dtype), alpha=rate)
        layer.running_var.mul_(1 - rate).add_(unbiased.to(layer.running_var.dtype), alpha=rate)
    return outputs


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Shared{kind.__name__}", (kind,), {"forward": _forward})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}


def synchronise(model: nn.Module, group: Summing) -> int:
    """Give the layers with batch statistics those of all ranks; how many there are."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in KINDS:
            raise TaskError(
                f"module {name} (a {type(module).__name__}) keeps batch statistics in a way of its own, which ranks cannot share; use "
                "torch.nn.BatchNorm, or a layer without them (GroupNorm)"
            )
        if type(module) in KINDS:
            layers.append(module)
    for layer in layers:
        layer.__class__ = KINDS[type(layer)]
        layer.summing = group
    return len(layers)


def leave(model: nn.Module) -> None:
    """Make them plain layers again."""
    plain = {shared: kind for kind, shared in KINDS.items()}
    for layer in model.modules():
        if type(layer) in plain:
            layer.__class__ = plain[type(layer)]
            del layer.summing
