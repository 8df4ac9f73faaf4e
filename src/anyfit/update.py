"""Update: what a worker returns. Named groups of sums with one count each, and an associative, commutative `+`.

A micro-batch, a GPU and a site each return sums and a count; adding them and dividing once is gradient accumulation, data
parallel training and federated averaging. Sums add in int64 fixed point, so that the order of arrival never changes a bit
of the total (and a mask modulo 2^64 can hide them); floats that were never added stay floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from anyfit.errors import InputError, NonFinite

__all__ = ["COUNTS", "FINE", "WIDE", "Group", "Order", "Reply", "Update"]

# The powers of two that one int64 limb counts in. One limb of 2^-40 serves weights (range 8 million, resolution 1e-12).
# Seven serve sums of raw data, whose scale nobody knows: range 2^128, resolution 2^-198, and 19 bits in each limb for carries
# (500,000 addends).
FINE = (-40,)
WIDE = (66, 22, -22, -66, -110, -154, -198)
COUNTS = (0,)  # whole numbers need no fraction bits
LARGEST = 2**62  # of a limb: two of them add without wrapping


def _encode(values: Tensor, exponents: tuple[int, ...]) -> Tensor:
    """(*shape) floats -> (limbs, *shape) int64; exact but for the last limb, which rounds."""
    rest = values.detach().to("cpu", torch.float64)
    largest = float(rest.abs().max()) if rest.numel() else 0.0
    if not largest < 2.0 ** (exponents[0] + 62):  # also catches NaN
        problem = "is not finite" if not largest < float("inf") else f"reaches {largest:.3g}, which fixed point cannot hold"
        raise NonFinite(f"a sum in an update {problem}; clip the update or lower the learning rate")
    limbs = []
    for exponent in exponents[:-1]:
        limb = torch.trunc(rest * 2.0**-exponent)
        rest = rest - limb * 2.0**exponent
        limbs.append(limb)
    limbs.append(torch.round(rest * 2.0 ** -exponents[-1]))
    return torch.stack(limbs).to(torch.int64)


def _decode(limbs: Tensor, exponents: tuple[int, ...]) -> Tensor:
    parts = (limb.to(torch.float64) * 2.0**exponent for limb, exponent in zip(limbs, exponents, strict=True))
    return torch.stack(tuple(parts)).sum(0)


@dataclass(frozen=True, slots=True)
class Group:
    """Sums that share one denominator. `fixed` tells whether they are limbs of fixed point already."""

    sums: Mapping[str, Tensor]
    count: float | Fraction
    exponents: tuple[int, ...] = FINE
    fixed: bool = False

    def encoded(self) -> Group:
        """The same sums in fixed point."""
        if self.fixed:
            return self
        if not math.isfinite(self.count):
            raise NonFinite(f"the count (={self.count}) of an update is not finite; look at the sample weights")
        count = Fraction(round(self.count * 2**20), 2**20)  # sums of sample weights must not depend on order either
        return Group({name: _encode(value, self.exponents) for name, value in self.sums.items()}, count, self.exponents, True)

    def decoded(self) -> dict[str, Tensor]:
        """The sums as float64."""
        if not self.fixed:
            return {name: value.detach().to("cpu", torch.float64) for name, value in self.sums.items()}
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
    def of(cls, group: str, sums: Mapping[str, Tensor], count: float, exponents: tuple[int, ...] = FINE) -> Update:
        """An update of one group."""
        return cls({group: Group(dict(sums), count, exponents)})

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


@dataclass(frozen=True, slots=True)
class Order:
    """What goes to a site. `values` is JSON (the plan of local work, options of the strategy); `tensors` the weights."""

    kind: str  # prepare | train | evaluate
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
    """What comes back from a site: an update or the reason why there is none."""

    site: str
    update: Update | None = None
    error: str | None = None
    seconds: float = 0.0
