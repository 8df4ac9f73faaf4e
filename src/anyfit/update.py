"""Update: what a worker returns. Named groups of sums with one count each, and an associative, commutative `+`.

A micro-batch, a GPU and a site each return sums and a count; adding them and dividing once is gradient accumulation, data
parallel training and federated averaging. Sums add in int64 fixed point, so that the order of arrival never changes a bit
of the total (and a mask modulo 2^64 can hide them); floats that were never added stay floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anyfit.errors import InputError, NonFinite
from anyfit.values import digest

__all__ = ["COUNTS", "FINE", "GRADIENTS", "WIDE", "Group", "Layout", "Order", "Reply", "Total", "Update", "largest_of"]

# The powers of two that one int64 limb counts in. One limb of 2^-40 serves weights (range 8 million, resolution 1e-12).
# Seven serve sums of raw data, whose scale nobody knows: range 2^128, resolution 2^-198, and 19 bits in each limb for carries
# (500,000 addends).
FINE = (-40,)
GRADIENTS = (4, -40)  # which have the scale of the loss, and that may be one of prices: range 2^66
WIDE = (66, 22, -22, -66, -110, -154, -198)
COUNTS = (0,)  # whole numbers need no fraction bits
LARGEST = 2**62  # of a limb: two of them add without wrapping
EXACT = 2**53  # below it, whole numbers add exactly in float64
CPU = torch.device("cpu")
TICKS = 2**40  # counts, which may be sums of sample weights, are whole numbers of 1 / TICKS


def _encode(values: Tensor, exponents: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, float]:
    """(*shape) floats times `scale` -> (limbs, *shape) whole numbers, exact but for the last limb, which rounds; and what none of them exceeds.

    They are float64 still: so small that a few additions are exact, and converting costs more than adding.
    """
    rest = values.detach().to(CPU, torch.float64, copy=True)
    largest = 0.0
    if rest.numel():
        low, high = rest.aminmax()  # a NaN comes through
        largest = max(-low.item(), high.item()) * abs(scale)
    if not largest < 2.0 ** (exponents[0] + 62):
        problem = "is not finite" if not largest < float("inf") else f"reaches {largest:.3g}, which fixed point cannot hold"
        raise NonFinite(f"a sum in an update {problem}; clip the update or lower the learning rate")
    limbs = []
    if len(exponents) > 1 and scale != 1:
        rest *= scale
    for exponent in exponents[:-1]:
        limb = torch.trunc(rest * 2.0**-exponent)
        rest -= limb * 2.0**exponent
        limbs.append(limb)
    limbs.append(rest.mul_(2.0 ** -exponents[-1] * (scale if len(exponents) == 1 else 1)).round_())
    gap = exponents[0] - exponents[1] if len(exponents) > 1 else 0
    return torch.stack(limbs) if len(limbs) > 1 else limbs[0][None], max(largest * 2.0 ** -exponents[0], 2.0**gap) + 1


def _decode(limbs: Tensor, exponents: tuple[int, ...]) -> Tensor:
    parts = (limb.to(torch.float64) * 2.0**exponent for limb, exponent in zip(limbs, exponents, strict=True))
    return torch.stack(tuple(parts)).sum(0)


@dataclass(frozen=True, slots=True)
class Group:
    """Sums that share one denominator. `fixed` tells whether they are limbs of fixed point already; if not, they are what stands here
    times `scale` (means, where that is the count).
    """

    sums: Mapping[str, Tensor]
    count: float | Fraction
    exponents: tuple[int, ...] = FINE
    fixed: bool = False
    scale: float = 1.0

    def encoded(self) -> Group:
        """The same sums in fixed point."""
        if self.fixed:
            return self
        if not math.isfinite(self.count):
            raise NonFinite(f"the count (={self.count}) of an update is not finite; look at the sample weights")
        count = Fraction(round(self.count * TICKS), TICKS)  # sums of sample weights must not depend on order either
        return Group(
            {name: _encode(value, self.exponents, self.scale)[0].to(torch.int64) for name, value in self.sums.items()},
            count,
            self.exponents,
            True,
        )

    def decoded(self) -> dict[str, Tensor]:
        """The sums as float64."""
        if not self.fixed:
            return {name: value.detach().to("cpu", torch.float64) * self.scale for name, value in self.sums.items()}
        return {name: _decode(value, self.exponents) for name, value in self.sums.items()}

    def __add__(self, other: Group) -> Group:
        if self.exponents != other.exponents:
            raise InputError("two updates count one group in different units; use the same exponents on every site")
        left, right = self.encoded(), other.encoded()
        sums = dict(left.sums)
        for name, value in right.sums.items():
            if name in sums and sums[name].shape != value.shape:
                shapes = f"{tuple(sums[name].shape[1:])} and {tuple(value.shape[1:])}"
                raise InputError(f"{name} has the shapes {shapes} in two updates; all workers must run the same task")
            sums[name] = sums[name] + value if name in sums else value
            if sums[name].numel() and int(sums[name].abs().max()) >= LARGEST:
                raise NonFinite(f"the total of {name} passes what fixed point can hold; clip the updates or lower the learning rate")
        return Group(sums, left.count + right.count, self.exponents, True)


@dataclass(frozen=True, slots=True)
class Update:
    """Named groups of sums. `+` is associative and commutative to the bit; a name or group that is missing counts as zero."""

    groups: Mapping[str, Group] = field(default_factory=dict)

    @classmethod
    def of(cls, group: str, sums: Mapping[str, Tensor], count: float, exponents: tuple[int, ...] = FINE, scale: float = 1.0) -> Update:
        """An update of one group; its sums are those given times `scale`."""
        return cls({group: Group(dict(sums), count, exponents, scale=scale)})

    def __add__(self, other: Update) -> Update:
        groups = dict(self.groups)
        for name, group in other.groups.items():
            groups[name] = groups[name] + group if name in groups else group
        return Update(groups)

    def joined(self, other: Update) -> Update:
        """The groups of both side by side; a group in both is refused, for `+` is what adds."""
        twice = sorted(set(self.groups) & set(other.groups))
        if twice:
            raise InputError(f"group (={twice[0]!r}) stands in both updates; add them with + instead")
        return Update({**self.groups, **other.groups})

    def __contains__(self, group: str) -> bool:
        return group in self.groups

    def count(self, group: str) -> float:
        """The denominator of a group; zero where it is missing."""
        return float(self.groups[group].count) if group in self.groups else 0.0

    def sums(self, group: str) -> dict[str, Tensor]:
        """The totals of a group as float64."""
        return self.groups[group].decoded() if group in self.groups else {}

    def mean(self, group: str, divisor: float | None = None) -> dict[str, Tensor]:
        """Totals divided by their count, or by a public `divisor`."""
        denominator = self.count(group) if divisor is None else divisor
        if not denominator > 0:
            raise InputError(f"group {group!r} has the count {denominator:g}, so it has no mean; at least one worker must contribute")
        return {name: value / denominator for name, value in self.sums(group).items()}

    def size_bytes(self) -> int:
        """Bytes of the tensors as they stand."""
        return sum(value.numel() * value.element_size() for group in self.groups.values() for value in group.sums.values())


class Total:
    """Adds updates as they arrive, in place: the memory of one update, and the bits that `+` gives, in whatever order."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._ticks: dict[str, int] = {}
        self._exponents: dict[str, tuple[int, ...]] = {}
        self._bounds: dict[tuple[str, str], float] = {}  # no limb of a sum exceeds it, so that most additions need no look at them

    def add(self, update: Update) -> None:
        """Add one; what does not fit the others is refused and changes nothing."""
        parts = [(name, *self._part(name, group)) for name, group in update.groups.items()]
        for name, ticks, sums in parts:
            have = self._sums.setdefault(name, {})
            self._exponents[name] = update.groups[name].exponents
            self._ticks[name] = self._ticks.get(name, 0) + ticks
            for key, (value, bound) in sums.items():
                self._bounds[name, key] = bound
                exact = bound < EXACT and not (key in have and have[key].dtype == torch.int64)
                part = value if exact else value.to(torch.int64)
                if key not in have:
                    have[key] = part
                elif have[key].dtype == part.dtype:
                    have[key].add_(part)
                else:
                    have[key] = have[key].to(torch.int64).add_(part)

    def _part(self, name: str, group: Group) -> tuple[int, dict[str, tuple[Tensor, float]]]:
        """A group as ticks and limbs, each with the bound that its sum will have."""
        if self._exponents.get(name, group.exponents) != group.exponents:
            raise InputError("two updates count one group in different units; use the same exponents on every site")
        if not math.isfinite(group.count):
            raise NonFinite(f"the count (={group.count}) of an update is not finite; look at the sample weights")
        have, sums = self._sums.get(name, {}), {}
        for key, given in group.sums.items():
            value, bound = (given.clone(), largest_of(given)) if group.fixed else _encode(given, group.exponents, group.scale)
            if key in have:
                if have[key].shape != value.shape:
                    shapes = f"{tuple(have[key].shape[1:])} and {tuple(value.shape[1:])}"
                    raise InputError(f"{key} has the shapes {shapes} in two updates; all workers must run the same task")
                bound += self._bounds[name, key]
                if bound >= LARGEST:
                    bound = largest_of(have[key].to(torch.int64) + value.to(torch.int64))
                    if bound >= LARGEST:
                        raise NonFinite(f"the total of {key} passes what fixed point can hold; clip the updates or lower the learning rate")
            sums[key] = (value, bound)
        return round(group.count * TICKS), sums

    def update(self) -> Update:
        """The sum so far."""
        groups = {}
        for name, sums in self._sums.items():
            limbs = {key: value.to(torch.int64) for key, value in sums.items()}
            groups[name] = Group(limbs, Fraction(self._ticks[name], TICKS), self._exponents[name], True)
        return Update(groups)


def largest_of(limbs: Tensor) -> float:
    """What no limb exceeds."""
    return float(limbs.abs().max()) if limbs.numel() else 0.0


@dataclass(frozen=True)
class Layout:
    """The names and shapes of what sites exchange, side by side in one vector (P,): strategies do arithmetic on that alone."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Layout:
        """Of live tensors; the vector has the widest of their types."""
        dtype = torch.float32
        for tensor in named.values():
            dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
        return cls({name: tuple(tensor.shape) for name, tensor in named.items()}, dtype)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """(P,) copy of tensors in this order."""
        parts = [tensor.detach().reshape(-1) for tensor in tensors]
        if any(part.dtype != self.dtype for part in parts):
            parts = [part.to(self.dtype) for part in parts]
        return torch.cat(parts)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a vector in their shapes, without a copy."""
        return [part.view(shape) for part, shape in zip(torch.split(flat, self.sizes), self.shapes.values(), strict=True)]

    def hash(self) -> str:
        """SHA-256 of names, shapes and type."""
        return digest([[name, list(shape)] for name, shape in self.shapes.items()] + [str(self.dtype)])


@dataclass(frozen=True, slots=True)
class Order:
    """What goes to a site. `values` is JSON (the plan of local work, options of the strategy); `tensors` the weights."""

    kind: str  # describe | prepare | join | train | evaluate
    round: int
    version: int
    seed: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back from a site: an update and values (JSON), or the reason why there is none. `size` in bytes, as it travels; `cause`
    is known in the same process only.
    """

    site: str
    update: Update | None = None
    error: str | None = None
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    cause: Exception | None = None
