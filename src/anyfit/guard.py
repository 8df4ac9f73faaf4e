"""What stands between a site and everyone else: all that leaves passes here, in a simulation as at a real pod.

An update is let out only with the groups, names, shapes and types that the strategy declared, finite, within the limits that the
site set; under site-level privacy it is clipped and noise is added before anything else is done with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyfit.codec import Codec
from anyfit.errors import InputError, Refused
from anyfit.private import clipped, noise_like, seeded
from anyfit.update import COUNTS, FINE, GRADIENTS, WIDE, Group, Order, Update

if TYPE_CHECKING:
    from anyfit.privacy import SitePrivacy

__all__ = ["BELOW", "BUFFERS", "LOSS", "WEIGHTS", "Guard", "Limits", "Shapes"]

WEIGHTS, LOSS = "weights", "loss"
BUFFERS = "buffers"  # batch statistics and others that are averaged, whatever a strategy does with weights
BELOW = "below"  # how many sites' updates were below the clip, with noise: what adaptive clipping goes by

MOST_NUMBERS = 1 << 20  # of one sum whose shape nobody declared: a figure or a statistic, whose size does not grow with the rows

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # group -> name -> shape


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site lets out. `rows`: the fewest training rows behind an update (a site with fewer rows to evaluate on keeps their
    figures to itself); `cells`: the fewest rows behind one count of its statistics (smaller ones are left out); `norm`: of the mean
    change of its weights; `bytes`: of a reply.
    """

    rows: int = 1
    cells: int = 1
    norm: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "cells", "norm", "bytes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} (={value}) of the limits must be above 0")


class Guard:
    """The limits of a site, applied. It knows the site's true number of rows and never takes the code's word for it."""

    def __init__(self, limits: Limits | None = None, codec: Codec | None = None, privacy: SitePrivacy | None = None) -> None:
        self.limits, self.codec, self.privacy = limits or Limits(), codec, privacy
        if privacy is not None and self.limits.norm is not None:
            raise InputError(f"norm (={self.limits.norm}) of the limits and the clip of the privacy exclude each other; give one of them")

    def release(
        self,
        order: Order,
        update: Update,
        *,
        rows: int,
        shapes: Shapes | None,
        seed: int,
        memory: Any,
        metrics: Collection[str] = (),
        most: float | None = None,
    ) -> tuple[Update, int]:
        """The update as it may leave, and its size in bytes. `shapes`: what may be in it, or None, where a schema and the names of
        `metrics` say so; `seed`: the site's own, never the order's; `most`: what its rows can count for (None: one each).
        """
        if rows < self.limits.rows:
            if order.kind == "evaluate":
                return Update(), 0
            raise Refused(f"{rows} rows are fewer than this site lets an update stand for ({self.limits.rows})")
        _check_form(update)
        if shapes is not None:
            _check_shapes(update, shapes)
        elif order.kind == "evaluate":
            _check_names(update, {f"metric:{name}" for name in metrics}, "no metric that the task names")
        else:
            _check_names(update, _explained(update, order.values["schema"]), "no column of the schema explains")
        for name, group in update.groups.items():
            _check_numbers(name, group, None if order.kind == "prepare" else rows if most is None else most)
        if order.kind == "prepare" and self.limits.cells > 1:
            update = self._without_small_cells(update)
        size = update.size_bytes()
        if order.kind == "train" and (self.limits.norm is not None or self.privacy is not None or self.codec is not None):
            update, size = self._weights(order, update, seed, memory)
        if self.limits.bytes is not None and size > self.limits.bytes:
            raise Refused(f"the reply has {size:,} bytes, more than this site lets out ({self.limits.bytes:,})")
        return update, size

    def _without_small_cells(self, update: Update) -> Update:
        least, groups = self.limits.cells, {}
        for name, group in update.groups.items():
            sums = group.decoded()
            if group.exponents == COUNTS:
                kept = {key: value for key, value in group.sums.items() if not bool(((sums[key] > 0) & (sums[key] < least)).any())}
                groups[name] = replace(group, sums=kept, count=sum(float(sums[key].sum()) for key in kept))
            elif group.count >= least or not group.sums:  # a mean of a few rows tells what they hold
                few = "missing" in sums and 0 < float(sums["missing"]) < least
                groups[name] = replace(group, sums={key: value for key, value in group.sums.items() if not (few and key == "missing")})
        return Update(groups)

    def _weights(self, order: Order, update: Update, seed: int, memory: Any) -> tuple[Update, int]:
        """Norm, clip, noise and codec of the change of weights; and the size of all that travels."""
        group = update.groups[WEIGHTS]
        if set(group.sums) != {WEIGHTS}:
            raise Refused(
                f"limits on the norm, privacy and compression are for a change of weights, but {', '.join(sorted(group.sums))} would leave"
            )
        count = float(group.count)
        if group.scale != count and not count > 0:
            raise Refused("the update has a count of 0, so its change of weights has no mean")
        mean = group.sums[WEIGHTS] if group.scale == count else group.sums[WEIGHTS] * (group.scale / count)
        if self.limits.norm is not None and (norm := float(torch.linalg.vector_norm(mean.double()))) > self.limits.norm:
            raise Refused(f"the change of weights has the norm {norm:.4g}, more than this site lets out ({self.limits.norm:g})")
        groups = dict(update.groups)
        if self.privacy is not None:
            mean, groups = self._private(order, mean, seed)
            count = 1.0
        groups[WEIGHTS] = Group({WEIGHTS: mean}, count, group.exponents, scale=count)
        size = Update(groups).size_bytes()
        if self.codec is not None:
            whole = mean.numel() * mean.element_size()
            mean, encoded = self._encoded(order, mean, seed, memory)
            groups[WEIGHTS] = Group({WEIGHTS: mean}, count, group.exponents, scale=count)
            size += encoded - whole
        return Update(groups), size

    def _private(self, order: Order, mean: Tensor, seed: int) -> tuple[Tensor, dict[str, Group]]:
        """Clipped to the round's norm, with this site's share of the noise; nothing else of the update leaves.

        The noise is a function of the secret and of what it hides: an order that is sent again gives the same answer, and no two
        updates ever get the same noise, whose difference would show them.
        """
        assert self.privacy is not None
        clip, sites = float(order.values["clip"]), float(order.values["noise_sites"])
        noise, bits = float(order.values["noise"]) * clip / math.sqrt(sites), float(order.values["bits_noise"]) / math.sqrt(sites)
        within, norm = clipped(mean.double().cpu(), clip)
        hidden = hashlib.sha256(f"{clip} {noise} {bits} {norm}".encode())
        hidden.update(within.contiguous().numpy().data)
        generator = seeded(seed, order.round, order.version, int.from_bytes(hidden.digest()))
        private = (within + noise_like(within, noise, generator)).to(mean)
        groups = {}
        if self.privacy.quantile is not None:
            bit = torch.tensor(0.5 if norm <= clip else -0.5, dtype=torch.float64)
            groups[BELOW] = Group({BELOW: bit + noise_like(bit, bits, generator)}, 1.0)
        return private, groups

    def _encoded(self, order: Order, mean: Tensor, seed: int, memory: Any) -> tuple[Tensor, int]:
        """What arrives after the codec, and the size of what travels."""
        assert self.codec is not None
        whole = mean if not self.codec.forgets or "left" not in memory else mean + memory["left"].to(mean)
        parts = self.codec.encode(whole, torch.Generator().manual_seed(_mixed(seed, order)))
        arrives = self.codec.decode(parts, mean.numel(), mean.dtype)
        if not bool(torch.isfinite(arrives).all()):
            raise Refused(f"the change of weights is too large for {self.codec.kind}; lower the learning rate, or compress with bf16")
        if self.codec.forgets and self.privacy is None:  # what was clipped away must not come back later
            memory["left"] = (whole - arrives).cpu()
        return arrives, sum(part.numel() * part.element_size() for part in parts.values())


def _mixed(seed: int, order: Order) -> int:
    """For the rounding of a codec, which hides nothing."""
    return (seed ^ (order.round * 0x9E3779B97F4A7C15) ^ order.version) & ((1 << 63) - 1)


def _check_form(update: Update) -> None:
    """Tensors of real numbers in groups, in units that can be added."""
    if not isinstance(update, Update):
        raise Refused(f"a {type(update).__name__} would leave in place of an update")
    for name, group in update.groups.items():
        if group.exponents not in (FINE, GRADIENTS, WIDE, COUNTS):
            raise Refused(f"{name!r} counts in units that nobody agreed to (exponents={group.exponents})")
        for key, value in group.sums.items():
            if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
                raise Refused(f"{key!r} in {name!r} is no dense tensor of real numbers")


def _check_shapes(update: Update, shapes: Shapes) -> None:
    for name, group in update.groups.items():
        if name not in shapes:
            raise Refused(f"the update holds {name!r}, which the strategy did not declare; it declared: {', '.join(shapes)}")
        for key, value in group.sums.items():
            if key not in shapes[name]:
                raise Refused(f"the update holds {key!r} in {name!r}, which was not declared; there are: {', '.join(shapes[name])}")
            if tuple(value.shape) != tuple(shapes[name][key]):
                raise Refused(f"{key!r} in {name!r} has the shape {tuple(value.shape)}, but {tuple(shapes[name][key])} was agreed")
            if value.dtype not in (torch.float32, torch.float64):
                raise Refused(f"{key!r} in {name!r} is of type {value.dtype}, but float32 or float64 was agreed")
    for name, keys in shapes.items():
        if name not in update and name not in (LOSS, BUFFERS):
            raise Refused(f"the update lacks {name!r}, which was agreed")
        if name in update and (lacking := sorted(set(keys) - set(update.groups[name].sums))):
            raise Refused(f"the update lacks {lacking[0]!r} in {name!r}, which was agreed")


def _explained(update: Update, schema: Mapping[str, Any]) -> set[str]:
    """Those groups of statistics, named KIND:COLUMN, whose column is there to be learnt from; "text" is all text columns together."""
    columns = {column["name"] for column in schema["columns"] if column["type"] != "identifier"} | {schema.get("weight")}
    columns |= {"text" for column in schema["columns"] if column["type"] == "text"}
    return {name for name in update.groups if name == "rows" or (":" in name and name.partition(":")[2] in columns)}


def _check_names(update: Update, known: Collection[str], problem: str) -> None:
    """Of groups whose shapes nobody could declare: figures and statistics."""
    for name, group in update.groups.items():
        if name not in known:
            raise Refused(f"{name!r} would leave, which {problem}")
        for key, value in group.sums.items():
            if value.numel() > MOST_NUMBERS * (len(group.exponents) if group.fixed else 1):
                raise Refused(f"{key!r} in {name!r} holds {value.numel():,} numbers, more than one sum may ({MOST_NUMBERS:,})")


def _check_numbers(name: str, group: Group, rows: float | None) -> None:
    if not math.isfinite(group.scale):
        raise Refused(f"{name} is scaled by {group.scale}, which is no number")
    if not math.isfinite(group.count) or group.count < 0:
        raise Refused(f"{name} has the count {group.count}, which is no number of rows")
    if rows is not None and group.count > rows:
        raise Refused(f"{name} claims {float(group.count):g} rows, but this site has {rows:g}")
    for key, value in group.sums.items():
        if (
            value.is_floating_point()
            and not math.isfinite(float(torch.linalg.vector_norm(value)))
            and not bool(torch.isfinite(value).all())
        ):
            raise Refused(f"{key} of {name} is not finite (NaN or infinite); lower the learning rate")
