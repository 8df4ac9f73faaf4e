"""Layers that do the same mathematics in less time on a CPU. The plain ones are torch's; tests compare the two.

B rows, T steps, I inputs, H hidden units, C channels, K taps of a filter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConvolvedMaximum", "TanhRNN"]


class _Unrolled(torch.autograd.Function):
    """h_t = tanh(U x_t + b + W h_{t-1}) from h = 0, as one node of the graph: the gradient of W is one product over all steps.

    Torch's own backward adds up a product for every step. Everything is done in place of the projected inputs.
    """

    @staticmethod
    def forward(ctx: Any, inputs_BTI: Tensor, into_HI: Tensor, weight_HH: Tensor, bias_H: Tensor) -> Tensor:
        rows, steps, width = inputs_BTI.shape
        flat = inputs_BTI.transpose(0, 1).reshape(-1, width)
        states_TBH = torch.addmm(bias_H, flat, into_HI.t()).view(steps, rows, -1)
        turned_HH, before = weight_HH.t().contiguous(), None
        for state in states_TBH.unbind(0):
            before = state.tanh_() if before is None else state.addmm_(before, turned_HH).tanh_()
        ctx.save_for_backward(flat, into_HI, weight_HH, states_TBH)
        return states_TBH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        flat, into_HI, weight_HH, states_TBH = ctx.saved_tensors
        steps, rows, hidden = states_TBH.shape
        inner_TBH = gradients[0].clone(memory_format=torch.contiguous_format)  # becomes that of what tanh was taken of
        inner, slopes = inner_TBH.unbind(0), (1 - states_TBH * states_TBH).unbind(0)
        later = inner[-1].mul_(slopes[-1])
        for step in range(steps - 2, -1, -1):
            later = inner[step].addmm_(later, weight_HH).mul_(slopes[step])
        each = inner_TBH.view(-1, hidden)
        weight = inner_TBH[1:].reshape(-1, hidden).t() @ states_TBH[:-1].reshape(-1, hidden)
        inputs = (each @ into_HI).view(steps, rows, -1).transpose(0, 1)
        return inputs, each.t() @ flat, weight, each.sum(0)


class TanhRNN(nn.RNN):
    """`nn.RNN` of one layer, tanh and one direction, with a faster backward pass on a CPU. Weights and results are those of `nn.RNN`."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)

    def states(self, inputs_BTI: Tensor) -> Tensor:
        """(T, B, H) all hidden states, from zero."""
        if inputs_BTI.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
            return self(inputs_BTI)[0].transpose(0, 1)  # type: ignore[no-any-return]
        into_HI, weight_HH, bias_H, other_H = (weight for weight in self._flat_weights if weight is not None)
        return _Unrolled.apply(inputs_BTI, into_HI, weight_HH, bias_H + other_H)  # type: ignore[no-untyped-call,no-any-return]


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
        sums, dim = self._sums(inputs_BTI, ended_BT)
        return (sums.max(dim)[0] + self.bias).relu()

    def _sums(self, inputs_BTI: Tensor, ended_BT: Tensor | None) -> tuple[Tensor, int]:
        """The convolution without bias, and the dimension of its steps."""
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
        return sums_BTC, dim

    def looked_up(self, table: nn.Embedding, ids_BT: Tensor, ended_BT: Tensor) -> Tensor:
        """The same for the vectors of `ids_BT`, where few filters meet long texts: the maxima are found without a graph, and only the
        words beneath them are looked up once more with one. Everything else has no gradient.
        """
        assert self.bias is not None
        size, left, steps = self.kernel_size[0], (self.kernel_size[0] - 1) // 2, ids_BT.shape[1]
        if size * self.out_channels * 2 > steps or not torch.is_grad_enabled() or ids_BT.device.type != "cpu":
            return self(table(ids_BT), ended_BT)  # type: ignore[no-any-return]
        with torch.no_grad():
            places_BC = self._places(table(ids_BT), ended_BT)
        steps_BCK = places_BC[:, :, None] + torch.arange(-left, size - left)
        inside_BCK = (steps_BCK >= 0) & (steps_BCK < steps)
        flat_BCK = steps_BCK.clamp_(0, steps - 1) + torch.arange(0, ids_BT.numel(), steps)[:, None, None]
        words_BCKI = table(ids_BT.reshape(-1)[flat_BCK])
        sums_BC = ((words_BCKI * self.weight.transpose(1, 2)).sum(3) * inside_BCK).sum(2)
        out: Tensor = (sums_BC + self.bias).relu()
        return out

    def _places(self, inputs_BTI: Tensor, ended_BT: Tensor) -> Tensor:
        """(B, C) the step of each maximum, everything in place; products like widths of 16."""
        (rows, steps, width), channels, size = inputs_BTI.shape, self.out_channels, self.kernel_size[0]
        taps = self.weight.new_zeros(width, -(-size * channels // 16) * 16)
        taps[:, : size * channels] = self.weight.permute(1, 2, 0).reshape(width, -1)
        parts_BTK = (inputs_BTI.reshape(-1, width) @ taps).view(rows, steps, -1)
        left = (size - 1) // 2
        sums_BTC = parts_BTK[:, :, left * channels : (left + 1) * channels]
        for tap in range(size):
            shift, part_BTC = tap - left, parts_BTK[:, :, tap * channels : (tap + 1) * channels]
            if shift > 0:
                sums_BTC[:, :-shift] += part_BTC[:, shift:]
            elif shift < 0:
                sums_BTC[:, -shift:] += part_BTC[:, :shift]
        return sums_BTC.masked_fill_(ended_BT[:, :, None], -torch.inf).max(1)[1]
