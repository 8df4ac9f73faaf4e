"""Differentially private steps (Abadi et al. 2016): drawn units, gradients clipped one by one, noise, a public divisor.

U units (rows, or the rows of one value of a column), R drawn rows. A row's gradient must depend on that row alone, else one unit could
move those of others past the clip; so rows are never padded to each other, and never augmented together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyfit.data.batches import Batches, Indexed, TensorBatches
from anyfit.data.ragged import Ragged, RaggedBatches
from anyfit.errors import DataError, InputError, NonFinite, TaskError
from anyfit.machine import random_state, set_random_state
from anyfit.privacy import Accountant, ExamplePrivacy
from anyfit.tree import leaves, map_tensors, wide
from anyfit.values import Plan

if TYPE_CHECKING:
    from anyfit.task import Step, Task

__all__ = ["PrivateGradient", "PrivateSteps", "Spending", "clipped", "noise_like", "sampling_rate", "seeded", "units_of"]

CHUNK_BYTES = 64 << 20  # of gradients held row by row at once
CHUNK_ROWS = 256
UNITS, NOISE = 0, 1  # what a step's random numbers are for


def seeded(seed: int, *parts: int) -> np.random.Generator:
    """Random numbers of a secret seed (128 bits) and public parts (the step, what for), on the CPU everywhere.

    Not torch's generator: on a CPU that keeps 32 bits of a seed, few enough to try them all and subtract the noise.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *parts))))


def noise_like(flat: Tensor, std: float, generator: np.random.Generator) -> Tensor:
    """Gaussian noise in the shape of a tensor."""
    dtype = np.float64 if flat.dtype == torch.float64 else np.float32
    draws = torch.from_numpy(generator.standard_normal(flat.numel(), dtype=dtype))
    return (draws * std).reshape(flat.shape).to(flat.device, flat.dtype)


def clipped(flat: Tensor, clip: float) -> tuple[Tensor, float]:
    """The tensor within the L2 norm `clip`, and the norm that it had."""
    norm = float(torch.linalg.vector_norm(wide(flat)))
    if not math.isfinite(norm):
        raise NonFinite(f"the norm (={norm}) of an update is not finite; lower the learning rate")
    return flat * min(1.0, clip / max(norm, 1e-300)), norm


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateSteps:
    """What makes steps private. `sampling_rate` is the chance of each unit to be in a step, `units` (rows,) the number of each row's unit
    (None: each row is one), `seed` a secret.
    """

    clip: float
    noise_multiplier: float
    sampling_rate: float
    seed: int = field(repr=False)
    units: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf or not 0 <= self.noise_multiplier < math.inf:
            raise InputError(f"clip (={self.clip}) must be above 0 and noise_multiplier (={self.noise_multiplier}) 0 or more")
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"sampling_rate (={self.sampling_rate}) must be above 0 and at most 1")
        if self.seed < 0:
            raise InputError("the seed of private steps must not be negative; take secrets.randbits(128)")

    @property
    def steps_per_epoch(self) -> int:
        """As many as draw each unit once on average."""
        return max(1, round(1 / self.sampling_rate))

    def drawn(self, step: int, units: int) -> Tensor:
        """(U,) the units of a step: each one is in it by a coin of its own."""
        coins = seeded(self.seed, step, UNITS).random(units)
        return torch.from_numpy(np.nonzero(coins < self.sampling_rate)[0])


def sampling_rate(batch_size: int | None, units: int) -> float:
    """The chance of each of `units` to be in a step, so that `batch_size` are expected; None takes all."""
    if batch_size is not None and batch_size > units:
        raise InputError(
            f"batch_size (={batch_size}) is larger than the {units} units that privacy protects; pass a smaller one, or None for all"
        )
    return 1.0 if batch_size is None else batch_size / units


def units_of(rows: Any, column: str) -> Tensor:
    """(rows,) the number of each row's unit: rows with one value of `column` are one."""
    if not isinstance(rows, pa.Table):
        raise DataError(f"unit (={column!r}) of the privacy needs a table that is held in memory; a {type(rows).__name__} has no columns")
    if column not in rows.column_names:
        raise DataError(f"unit (={column!r}) of the privacy is not a column; the columns are: {', '.join(rows.column_names)}")
    if rows[column].null_count:
        raise DataError(f"column {column!r} has {rows[column].null_count} rows without a value, so nobody knows whose they are; fill them")
    codes = rows[column].combine_chunks().dictionary_encode().indices
    return torch.from_numpy(codes.to_numpy(zero_copy_only=False).astype(np.int64))


class Spending:
    """The privacy of one fit: what was asked for, what each step does, and what steps have cost."""

    def __init__(self, asked: ExamplePrivacy, steps: PrivateSteps, units: int) -> None:
        self.asked, self.steps, self.units = asked, steps, units
        self._accountant, self._key = Accountant(asked.delta), (steps.sampling_rate, steps.noise_multiplier)
        # the most steps that the budget pays for; None without one
        self.allowed = None if asked.epsilon is None else self._accountant.allowed(asked.epsilon, *self._key)
        if self.allowed == 0:
            raise InputError(
                f"epsilon (={asked.epsilon}) does not pay for one step with noise_multiplier (={steps.noise_multiplier:g}); "
                "leave noise_multiplier None to have it calibrated, or give a larger budget"
            )

    def epsilon(self, steps: int) -> float | None:
        """Spent by so many steps; None where it is infinite."""
        spent = self._accountant.epsilon(steps, *self._key)
        return spent if math.isfinite(spent) else None

    def to_json(self) -> dict[str, Any]:
        """For the record; without the seed."""
        sampling_rate, noise_multiplier = self._key
        return {**self.asked.to_json(), "noise_multiplier": noise_multiplier, "sampling_rate": sampling_rate, "units": self.units}


class _StepOf(nn.Module):
    """A task's step as a module, so that `functional_call` reaches the model's parameters."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Step:
        return self.task.step(self.model, batch)


@dataclass(slots=True)
class _Rows:
    """Of some rows: gradients (R, *shape) by parameter, losses (R,), counts (R,), logs (R,) by name."""

    gradients: Sequence[Tensor]
    losses: Tensor
    counts: Tensor
    logs: Mapping[str, Tensor]


class PrivateGradient:
    """The gradient of one private step. `notices` holds what a user should know of how it is made."""

    def __init__(self, task: Task, model: nn.Module, trained: Sequence[nn.Parameter], steps: PrivateSteps, plan: Plan) -> None:
        self.steps, self.notices = steps, list[str]()
        self._call, self._model = _StepOf(task, model), model
        model.train()  # a frozen part may stay in evaluation
        _refuse(model, plan)
        names = {id(parameter): name for name, parameter in self._call.named_parameters()}
        self._trained = [parameter for parameter in trained if parameter.requires_grad]
        self._names = [names[id(parameter)] for parameter in self._trained if id(parameter) in names]
        if len(self._names) < len(self._trained):
            raise TaskError("an optimizer holds parameters that are not the model's; privacy covers those of the model only")
        row_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self._trained)
        self._chunk = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))
        self._vmaps: bool | None = None  # not known before the first rows; a row alone goes without, whatever was found
        self._said = False
        all_names = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        self._padding = [  # vectors that stand for nothing have no gradient, whatever the rows are, so they need no noise
            (module.weight, module.padding_idx)
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and sum(p is module.weight for p in all_names) == 1
        ]
        if steps.units is not None:
            self._order = steps.units.argsort(stable=True)
            self._sizes = torch.bincount(steps.units)
            self._ends = self._sizes.cumsum(0)

    def backward(self, batches: Batches, step: int) -> tuple[Tensor, int | Tensor, Mapping[str, Tensor] | None]:
        """Leave the private gradient of a step in `.grad`; returns loss, count and logs of its rows, which are not private."""
        if not isinstance(batches, Indexed) or not hasattr(batches, "batch_of"):
            raise DataError(
                f"privacy needs rows that can be drawn one by one; {type(batches).__name__} cannot: give a table that fits into memory, "
                "tensors or a torch Dataset"
            )
        _refuse_norms(self._model)
        assert batches.rows is not None
        if self.steps.units is not None and len(self.steps.units) != batches.rows:
            raise TaskError(f"units (={len(self.steps.units)} rows) do not fit the {batches.rows} rows that the task makes of the table")
        units = batches.rows if self.steps.units is None else len(self._sizes)
        totals = [torch.zeros_like(parameter) for parameter in self._trained]
        buffers = self._buffers()
        seen = [rows for pack in self._packs(self.steps.drawn(step, units)) for rows in self._pack(batches, step, totals, *pack)]
        for name, was in buffers.items():
            if self._buffers().get(name) != was:
                raise TaskError(f"buffer {name} of the model changes as it trains, and privacy covers parameters only; leave it out")
        generator, std = seeded(self.steps.seed, step, NOISE), self.steps.clip * self.steps.noise_multiplier
        for parameter, total in zip(self._trained, totals, strict=True):
            parameter.grad = (total + noise_like(total, std, generator)) / (self.steps.sampling_rate * units)
        for weight, row in self._padding:
            if weight.grad is not None:
                weight.grad[row] = 0.0
        return _told(seen, totals[0].device)

    def _buffers(self) -> dict[str, tuple[int, int]]:
        """What changes when a buffer does."""
        return {name: (id(buffer), buffer._version) for name, buffer in self._model.named_buffers()}

    def _packs(self, drawn: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(rows, the unit of each within the pack) of a few units at a time; None where each row is a unit."""
        if self.steps.units is None:
            yield from ((rows, None) for rows in torch.split(drawn, self._chunk) if len(rows))
            return
        pack: list[Tensor] = []
        drawn = drawn[self._sizes[drawn] > 0]
        for place, unit in enumerate(drawn.tolist()):
            end = int(self._ends[unit])
            pack.append(self._order[end - int(self._sizes[unit]) : end])
            if sum(map(len, pack)) >= self._chunk or place + 1 == len(drawn):
                owners = torch.repeat_interleave(torch.arange(len(pack)), torch.tensor([len(rows) for rows in pack]))
                yield torch.cat(pack), owners
                pack = []

    def _pack(self, batches: Indexed, step: int, totals: list[Tensor], rows: Tensor, owners: Tensor | None) -> list[_Rows]:
        """Add the clipped gradients of a pack's units to the totals."""
        seen: list[_Rows] = []
        sums = [] if owners is None else [total.new_zeros(int(owners[-1]) + 1, *total.shape) for total in totals]
        for batch, places in self._alike(batches, step, rows):
            found = self._rows(batch, len(places))
            if owners is None:
                self._add(totals, found.gradients)
            else:
                finite = _norms(found.gradients).isfinite()
                owner = owners[places].to(finite.device)[finite]
                for total, gradient in zip(sums, found.gradients, strict=True):
                    total.index_add_(0, owner, gradient[finite])
            found.gradients = ()
            seen.append(found)
        if owners is not None:
            sizes = torch.bincount(owners).to(totals[0].device, totals[0].dtype)
            self._add(totals, [total / sizes.reshape(-1, *[1] * (total.dim() - 1)) for total in sums])
        return seen

    def _add(self, totals: list[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add gradients (n, *shape), each clipped; one that is not finite (no label counts, an overflow) adds nothing."""
        norms = _norms(gradients)
        finite = norms.isfinite()
        whole = bool(finite.all())
        scale = (self.steps.clip / norms[finite].clamp(min=1e-30)).clamp(max=1.0)
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(torch.tensordot(scale.to(total.dtype), gradient if whole else gradient[finite], 1))

    def _alike(self, batches: Indexed, step: int, rows: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """(batch, its places in `rows`) of rows that have one shape; those that cannot be joined come alone."""
        whole = batches._augment is None and isinstance(batches, TensorBatches | RaggedBatches)
        if whole and isinstance(batches, RaggedBatches):
            lengths = torch.stack([column.lengths[rows] for column in batches.columns.values() if isinstance(column, Ragged)])
            groups = lengths.unique(dim=1, return_inverse=True)[1]  # type: ignore[no-untyped-call]
            parts = [torch.nonzero(groups == group)[:, 0] for group in range(int(groups.max()) + 1)]
        else:
            parts = [torch.arange(len(rows))]
        if whole:
            for part in parts:
                for places in torch.split(part, self._chunk):
                    yield batches.batch_of(rows[places]), places  # type: ignore[attr-defined]
            return
        joined: dict[Any, list[tuple[Any, int]]] = {}
        for place, row in enumerate(rows.tolist()):
            batch = batches._augmented(batches.batch_of(rows[place : place + 1]), step, row)  # type: ignore[attr-defined]
            shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves(batch))
            alone = not _joins(batch)
            joined.setdefault((place if alone else -1, shapes), []).append((batch, place))
        for found in joined.values():
            for start in range(0, len(found), self._chunk):
                some = found[start : start + self._chunk]
                columns = [torch.cat(column) for column in zip(*(list(leaves(batch)) for batch, _ in some), strict=True)]
                yield _refilled(some[0][0], columns), torch.tensor([place for _, place in some])

    def _rows(self, batch: Any, count: int) -> _Rows:
        """Gradients of the rows of one batch, all at once where that can be done."""
        if "weight" in batch if isinstance(batch, Mapping) else hasattr(batch, "weight"):
            raise TaskError("rows have sample weights, which a clipped gradient cannot heed; leave them out (weight, balance) with privacy")
        if self._vmaps is not False and count > 1 and _joins(batch, count):
            random = random_state(self._trained[0].device)
            try:
                found = self._at_once(batch)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError, UserWarning) as error:
                set_random_state(random, self._trained[0].device)
                self._vmaps = self._vmaps or False
                if not self._said:
                    reason = "".join(str(error).strip().splitlines()[:1])[:120]
                    self.notices.append(f"gradients are taken row by row, to the same numbers but slower: vmap cannot ({reason})")
                self._said = True
            else:
                self._vmaps = True
                return found
        return self._one_by_one(batch, count)

    def _at_once(self, batch: Any) -> _Rows:
        def loss_of(parameters: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
            one = _refilled(batch, [tensor.unsqueeze(0) for tensor in tensors])
            step = functional_call(self._call, parameters, (one,))
            count = torch.as_tensor(step.count, device=step.loss.device).to(step.loss.dtype)
            return step.loss, (step.loss.detach(), count, {name: value.detach() for name, value in (step.logs or {}).items()})

        parameters = {name: parameter.detach() for name, parameter in zip(self._names, self._trained, strict=True)}
        each = vmap(grad(loss_of, has_aux=True), in_dims=(None, 0), randomness="different")
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the kernels of attention that are fused take no rows apart
            warnings.filterwarnings("error", "There is a performance drop")  # vmap would loop inside, and slower than we do
            gradients, (losses, counts, logs) = each(parameters, tuple(leaves(batch)))
        return _Rows([gradients[name] for name in self._names], losses, counts, logs)

    def _one_by_one(self, batch: Any, count: int) -> _Rows:
        gradients: list[Sequence[Tensor]] = []
        steps: list[Step] = []
        for row in range(count):
            one = batch if count == 1 else _refilled(batch, [tensor[row : row + 1] for tensor in leaves(batch)])
            step = self._call(one)
            found = torch.autograd.grad(step.loss, self._trained, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, self._trained, strict=True)])
            steps.append(step)
        device = steps[0].loss.device
        counts = torch.stack([torch.as_tensor(step.count, device=device).to(step.loss.dtype) for step in steps])
        names = {name for step in steps for name in step.logs or {}}
        logs = {name: torch.stack([(step.logs or {})[name].detach() for step in steps]) for name in names}
        return _Rows(
            [torch.stack(column) for column in zip(*gradients, strict=True)],
            torch.stack([step.loss.detach() for step in steps]),
            counts,
            logs,
        )


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """(n,) over all parameters."""
    squares = [wide(gradient.flatten(1).square().sum(1)) if gradient.dim() > 1 else wide(gradient.square()) for gradient in gradients]
    return torch.stack(squares).sum(0).sqrt()


def _refilled(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """The same structure with other tensors."""
    rest = iter(tensors)
    return map_tensors(lambda _: next(rest), batch)


def _joins(batch: Any, count: int = 1) -> bool:
    """Whether a batch is tensors only, each with a place for each row."""
    if isinstance(batch, Tensor):
        return batch.dim() > 0 and batch.shape[0] == count
    if isinstance(batch, Mapping):
        return all(_joins(value, count) for value in batch.values())
    if isinstance(batch, list | tuple):
        return all(_joins(value, count) for value in batch)
    fields = getattr(batch, "__dataclass_fields__", None)
    return fields is not None and all(_joins(getattr(batch, name), count) for name in fields)


def _told(seen: Sequence[_Rows], device: torch.device) -> tuple[Tensor, int | Tensor, Mapping[str, Tensor] | None]:
    """Loss, count and logs of all rows."""
    if not seen:
        return torch.zeros((), device=device), 0, None
    counts = wide(torch.cat([rows.counts for rows in seen]))
    total = counts.sum()

    def mean(parts: Sequence[Tensor]) -> Tensor:
        return torch.where(counts > 0, wide(torch.cat(list(parts))) * counts, 0.0).sum() / torch.where(total > 0, total, 1.0)

    names = sorted(set.intersection(*(set(rows.logs) for rows in seen)))
    return mean([rows.losses for rows in seen]), total, {name: mean([rows.logs[name] for rows in seen]) for name in names} or None


def _refuse(model: nn.Module, plan: Plan) -> None:
    """What per-row gradients cannot do."""
    asked = {"accumulate": plan.accumulate > 1, "precision": plan.precision != "fp32", "dtype": plan.dtype == "bfloat16"}
    asked |= {"bucket": plan.bucket, "clip": plan.clip is not None}
    ways = {
        "accumulate": "rows are taken in chunks anyhow, so raise batch_size",
        "precision": "use precision='fp32'",
        "dtype": "use float32 or float64",
        "bucket": "rows are drawn by chance",
        "clip": "the clip of the privacy bounds each row's gradient",
    }
    for name, refused in asked.items():
        if refused:
            raise InputError(f"{name} (={getattr(plan, name)!r}) does not go with privacy: {ways[name]}")
    _refuse_norms(model)


def _refuse_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise TaskError(
                f"layer {name} ({type(module).__name__}) takes statistics over rows, which privacy cannot bound; use torch.nn.GroupNorm"
            )
