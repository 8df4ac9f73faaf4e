"""Dropout whose masks depend on the sample: not on the batch it came in, the worker that computed it or the generator of torch.

A mask is a hash of (seed, step, the module's number in the model, the number of its call within the batch, the sample's place in the
epoch, the coordinates within the sample), so a step gives the same gradients however it is cut, and however far a batch is padded.
B samples of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from anyfit.data.batches import mix, mix_seed, signed
from anyfit.errors import TaskError

__all__ = ["ExactDropout", "dropped"]

DRAWN = 0x64726F70  # what is drawn for dropout is drawn for nothing else
CHUNK = 1 << 16  # numbers hashed at once on a CPU: so many stay near it
HANDLE = "_exact_dropout"
RATES = ("p", "drop_prob", "dropout_prob", "dropout", "prob", "rate")  # what such classes call their probability
RANDOM = ("dropout", "droppath", "stochasticdepth")  # parts of the names of classes that drop something


class ExactDropout:
    """Makes the dropout layers of a model exact until `leave`; what drops out by other means is listed in `others`."""

    in_backward = False  # set while gradients are computed: a layer that runs then has been counted already

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.others: list[str] = []
        self._seed = seed
        self._modules: list[tuple[str, nn.Module]] = []
        self._step, self._size = 0, -1  # -1: no batch is at hand
        self._calls: list[int] = []
        self._rows: dict[torch.device, Tensor] = {}
        self._before: list[Tensor] = []
        for name, module in model.named_modules():
            kind = EXACT.get(_plain(module))
            if kind is None and not getattr(module, "draws_by_place", False):
                self.others += [name or type(module).__name__] * _drops(module)
                continue
            if kind is not None:
                module.__class__ = kind
            module.__dict__[HANDLE] = (self, len(self._modules))
            self._modules.append((name, module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied layer (an average of weights) keeps its number

    @property
    def names(self) -> list[str]:
        """The layers that are handled and drop something."""
        return [name or type(module).__name__ for name, module in self._modules if getattr(module, "p", 1) > 0]

    def at(self, step: int, places: Tensor) -> None:
        """A batch comes: (B,) the places of its samples in the epoch."""
        self._step, self._size = step, len(places)
        self._calls = [0] * len(self._modules)
        rows = mix(places ^ mix_seed(DRAWN, self._seed, step))
        self._rows = {rows.device: rows}
        self._before = _generators(rows.device)

    def drew(self) -> bool:
        """Whether torch's own generators were drawn from since the batch came: by a function, which no list of modules can tell of."""
        return any(not torch.equal(*pair) for pair in zip(self._before, _generators(next(iter(self._rows))), strict=True))

    def done(self) -> None:
        """No batch is at hand: until the next one layers draw as torch does."""
        self._size = -1

    def leave(self) -> None:
        """Put the classes of the layers back."""
        for _, module in self._modules:
            if module.__dict__.get(HANDLE, (None,))[0] is self:
                del module.__dict__[HANDLE]
                module.__class__ = _plain(module)
        self._modules = []

    def dropped(self, number: int, p: float, shape: Sequence[int], device: torch.device) -> Tensor:
        """Of `shape`, True with probability `p`; the next call of the same module draws anew."""
        name, module = self._modules[number]
        if self.in_backward:
            raise TaskError(
                f"module {name} ({_plain(module).__name__}) runs again in the backward pass (activation checkpointing), where it would draw "
                "another mask; pass exact_dropout=False, or leave checkpointing out"
            )
        if not shape or shape[0] != self._size:
            raise TaskError(
                f"module {name} ({_plain(module).__name__}) got {tuple(shape)}, and the batch has {self._size} samples: exact dropout needs the "
                "samples in the first dimension; pass exact_dropout=False, or bring them there before the layer"
            )
        rows = self._rows.get(device)
        if rows is None:
            rows = self._rows[device] = next(iter(self._rows.values())).to(device)
        key = signed(mix_seed(DRAWN, number, self._calls[number]))
        self._calls[number] += 1
        return _dropped(rows + key, p, shape)


def dropped(module: nn.Module, p: float, shape: Sequence[int], device: torch.device) -> Tensor:
    """Of `shape` (B, ...), True with probability `p`, for layers of one's own: with a class attribute `draws_by_place = True` they are exact."""
    handle = module.__dict__.get(HANDLE)
    if handle is None or handle[0]._size < 0:
        return torch.rand(tuple(shape), device=device) < p
    found: Tensor = handle[0].dropped(handle[1], p, shape, device)
    return found


def _dropped(rows: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    """A number of 32 bits for each coordinate of each row; those below p are True.

    Each axis has a factor of its own, so that a longer row (more padding) begins with the numbers of a shorter one.
    """
    if 0 in shape:
        return torch.zeros(tuple(shape), dtype=torch.bool, device=rows.device)
    threshold = round(p * (1 << 32)) - (1 << 31)
    if threshold >= 1 << 31:
        return torch.ones(tuple(shape), dtype=torch.bool, device=rows.device)
    *inner, width = shape[1:] or (1,)
    pairs = -(-width // 2)  # a hash holds two numbers
    offsets = torch.zeros((), dtype=torch.int64, device=rows.device)
    for axis, size in enumerate([*inner, pairs]):
        offsets = offsets[..., None] + torch.arange(size, device=rows.device) * _factor(len(inner) - axis)
    offsets = offsets.reshape(-1)
    result = torch.empty((len(rows), offsets.numel() * 2), dtype=torch.bool, device=rows.device)
    chunk = max(1, CHUNK // offsets.numel()) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), chunk):
        cells = mix(rows[start : start + chunk, None] + offsets)
        torch.lt(cells.view(torch.int32), threshold, out=result[start : start + chunk])
    return result.reshape(len(rows), *inner, 2 * pairs)[..., :width].reshape(tuple(shape))


@functools.cache
def _factor(axis: int) -> int:
    """An odd word for each axis, counted from the last."""
    return signed(mix_seed(DRAWN, axis) << 1 | 1)


def _forward(self: Any, input: Tensor) -> Tensor:
    handle: tuple[ExactDropout, int] | None = self.__dict__.get(HANDLE)
    if not self.training or self.p == 0:
        return input
    if handle is None or handle[0]._size < 0:
        drawn: Tensor = _plain(self).forward(self, input)
        return drawn
    exact, number = handle
    mask = exact.dropped(number, self.p, _mask_shape(self, exact._modules[number][0], input), input.device)
    scale = 1 / (1 - self.p) if self.p < 1 else 1.0
    scaled = input.mul_(scale) if self.inplace else input * scale
    return scaled.masked_fill_(mask, 0.0)


EXACT: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(kind.__name__, (kind,), {"forward": _forward}) for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
}
PLAIN = {exact: kind for kind, exact in EXACT.items()}
LEAST_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Dropout1d: 3,
    nn.Dropout2d: 2,
    nn.Dropout3d: 5,
}  # below them torch takes the input for one sample


def _mask_shape(module: nn.Module, name: str, input: Tensor) -> tuple[int, ...]:
    """All coordinates, or samples and channels."""
    kind = _plain(module)
    if kind is nn.Dropout:
        return tuple(input.shape)
    if input.dim() < LEAST_DIMENSIONS[kind]:
        raise TaskError(
            f"module {name} ({kind.__name__}) got {tuple(input.shape)}, which is one sample without a batch; give it (samples, channels, ...)"
        )
    return (*input.shape[:2], *[1] * (input.dim() - 2))


def _plain(module: nn.Module) -> type[nn.Module]:
    """Its class as it was."""
    return PLAIN.get(type(module), type(module))


def _drops(module: nn.Module) -> bool:
    """Whether a module that is not handled drops something out."""
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0 and module.num_layers > 1)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if not isinstance(module, nn.modules.dropout._DropoutNd) and not any(part in type(module).__name__.lower() for part in RANDOM):
        return False
    rates = [rate for name in RATES if isinstance(rate := getattr(module, name, None), int | float)]
    return any(rate > 0 for rate in rates) if rates else not any(module.children())  # of a box of layers the layers tell


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
