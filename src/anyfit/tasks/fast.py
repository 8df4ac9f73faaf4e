"""Layers that do the same mathematics in less time on a CPU. The plain ones are torch's; tests compare the two.

B rows, T steps, I inputs, H hidden units, C channels, K taps of a filter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConvolvedMaximum", "TanhRNN"]


class _Unrolled(torch.autograd.Function):
    """h_t = tanh(x_t + W h_{t-1}) from h = 0, as one node of the graph: the gradient of W is one product over all steps.

    Inputs x (T, B, H) are summed from both biases already. Torch's own backward adds up a product for every step.
    """

    @staticmethod
    def forward(ctx: Any, inputs_TBH: Tensor, weight_HH: Tensor) -> Tensor:
        steps, rows, hidden = inputs_TBH.shape
        states_TBH = torch.empty(steps, rows, hidden, dtype=inputs_TBH.dtype, device=inputs_TBH.device)
        turned_HH = weight_HH.t().contiguous()
        inputs, states = inputs_TBH.unbind(0), states_TBH.unbind(0)
        torch.tanh(inputs[0], out=states[0])
        for step in range(1, steps):
            torch.addmm(inputs[step], states[step - 1], turned_HH, out=states[step]).tanh_()
        ctx.save_for_backward(states_TBH, weight_HH)
        return states_TBH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        states_TBH, weight_HH = ctx.saved_tensors
        (gradient_TBH,) = gradients
        steps, _, hidden = states_TBH.shape
        slopes_TBH = 1 - states_TBH * states_TBH
        inner_TBH = torch.empty_like(states_TBH)  # gradients of what tanh was taken of
        slopes, inner, outer = slopes_TBH.unbind(0), inner_TBH.unbind(0), gradient_TBH.unbind(0)
        torch.mul(outer[-1], slopes[-1], out=inner[-1])
        for step in range(steps - 2, -1, -1):
            torch.addmm(outer[step], inner[step + 1], weight_HH, out=inner[step]).mul_(slopes[step])
        weight = inner_TBH[1:].reshape(-1, hidden).t() @ states_TBH[:-1].reshape(-1, hidden)
        return inner_TBH, weight


class TanhRNN(nn.RNN):
    """`nn.RNN` of one layer, tanh and one direction, with a faster backward pass on a CPU. Weights and results are those of `nn.RNN`."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)

    def states(self, inputs_BTI: Tensor) -> Tensor:
        """(T, B, H) all hidden states, from zero."""
        if inputs_BTI.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self(inputs_BTI)[0].transpose(0, 1)  # type: ignore[no-any-return]
        into_HI, weight_HH, bias_H, other_H = (weight for weight in self._flat_weights if weight is not None)
        projected_TBH = nn.functional.linear(inputs_BTI.transpose(0, 1), into_HI, bias_H + other_H)
        return _Unrolled.apply(projected_TBH, weight_HH)  # type: ignore[no-untyped-call,no-any-return]


NARROW = 128  # channels times taps up to which one product and shifted sums are faster than a convolution


class ConvolvedMaximum(nn.Conv1d):
    """A convolution along the steps, ReLU and the maximum over all real steps: (B, T, I) -> (B, C).

    Weights are those of `nn.Conv1d`; an odd `size` with padding size // 2, `nn.ReLU` and `nn.AdaptiveMaxPool1d(1)` give the same.
    """

    def __init__(self, width: int, channels: int, size: int) -> None:
        super().__init__(width, channels, size)

    def forward(self, inputs_BTI: Tensor, ended_BT: Tensor | None = None) -> Tensor:
        """`ended_BT`: which steps are padding."""
        assert self.bias is not None
        size, left = self.kernel_size[0], (self.kernel_size[0] - 1) // 2
        if size * self.out_channels <= NARROW and inputs_BTI.device.type == "cpu":
            rows, steps, width = inputs_BTI.shape
            taps = self.weight.permute(1, 2, 0).reshape(width, size * self.out_channels)
            parts_BTKC = nn.functional.pad((inputs_BTI @ taps).view(rows, steps, size, -1), (0, 0, 0, 0, left, size - 1 - left))
            sums_BTC = parts_BTKC[:, :steps, 0]
            for tap in range(1, size):
                sums_BTC = sums_BTC + parts_BTKC[:, tap : tap + steps, tap]
            dim = 1
        else:
            padded_BIT = nn.functional.pad(inputs_BTI.transpose(1, 2), (left, size - 1 - left))
            sums_BTC, dim = nn.functional.conv1d(padded_BIT, self.weight), 2
        if ended_BT is not None:
            sums_BTC = sums_BTC.masked_fill(ended_BT.unsqueeze(3 - dim), -torch.inf)
        return (sums_BTC.max(dim)[0] + self.bias).relu()
