"""What every verb of shrink starts from: a task with its trained model, and rows to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyfit import data as rooms
from anyfit import engine, machine
from anyfit.errors import DataError, InputError, StateError
from anyfit.fit import fit as fit_here
from anyfit.prepare import Prepared, built, opened
from anyfit.program import entries_of
from anyfit.record import weights_file
from anyfit.run import Run
from anyfit.schema import Schema
from anyfit.state import Position, State
from anyfit.task import Task
from anyfit.tree import clone, map_tensors
from anyfit.values import Plan

__all__ = ["FitShaped", "Opened", "check_options", "first_row", "open_model", "over_sites", "state_of"]

TARGETS = ("target", "labels", "weight")


FitShaped = Callable[..., Run]  # what fits a task: `fit`, `federate` with its options filled in, an adapter's


def over_sites(fit: FitShaped) -> bool:
    """Whether a fit is a federation: its data are sites, whose rows nobody else sees."""
    return "strategy" in inspect.signature(fit).parameters


def check_options(options: Mapping[str, Any], fit: FitShaped) -> None:
    """Refuse what anyfit's own fits would not know, also where nothing is trained."""
    if fit is not fit_here and not over_sites(fit):
        return
    known = {*inspect.signature(fit).parameters, *Plan.__dataclass_fields__}
    odd = sorted(set(options) - known)
    if odd:
        raise InputError(f"{odd[0]} (={options[odd[0]]!r}) is neither an option of training nor a field of the plan; is it spelled so?")


@dataclass(frozen=True)
class Opened:
    """A task's model with its weights, in evaluation mode on the CPU, and the schema that it was built by."""

    task: Task
    model: nn.Module
    schema: Schema
    position: Position

    def row(self, data: Any = None, **source: Any) -> Any:
        """A batch of one row without its target: the first of `data`, or zeros as the schema has them."""
        return self.task.example_row(self.schema) if data is None else first_row(next(self.batches(data, 1, **source)))

    def batches(self, data: Any, count: int, target: str | None = None, seed: int = 0) -> Iterator[Any]:
        """About `count` training rows in a seeded order, in batches as the model takes them."""
        read = opened(data, target).read()
        rows = read["train"]
        held = rooms.num_rows(rows)
        plan = Plan(batch_size=max(1, min(count, 256, count if held is None else held)), seed=seed, device="cpu")
        prepared = Prepared(self.task, plan, torch.device("cpu"), self.schema, {}, {}, self.task.collate)
        found = rooms.make_batches(
            rows,
            plan.updated(bucket=False),
            prepared.collate,
            device=prepared.device,
            shuffle=True,
            augment=None,
            schema=self.schema,
            build=lambda table: self.task.build_dataset(table, "train", self.schema),
        )
        seen, position = 0, Position()
        total = found.steps_per_epoch
        while seen < count and (total is None or position.step < total):
            window = found.window(position, None)
            if not window:
                break
            for batch in window:
                seen += len(next(iter(entries_of(batch).values())))
                yield batch
            position = Position(position.step + 1, 0, position.offset + 1)
        if not seen:
            raise DataError("data has no rows; give some of those that the task was trained on")


def open_model(task: Task, state: Any) -> Opened:
    """`state`: a State, a Run, or the path of a run or checkpoint."""
    if isinstance(state, str | Path):
        state = State.load(weights_file(Path(state)))
    if isinstance(state, Run):
        state = State(model=dict(state.model.state_dict()), schema=state.state.schema, position=state.state.position)
    if not isinstance(state, State):
        raise InputError(f"state (a {type(state).__name__}) must be a State, a Run, or the path of a run")
    if not state.model:
        raise InputError("state holds no weights; give that of a trained run: task, state = open_run(folder)")
    odd = next((name for name, tensor in state.model.items() if not bool(torch.isfinite(tensor).all())), None)
    if odd is not None:
        raise StateError(f"state has weights that are not finite ({odd}); give one from before they became so")
    schema = Schema.from_json(state.schema or {"columns": [], "target": None})
    with machine.own_random():
        model = built(task, schema)
    dtype = next((tensor.dtype for tensor in state.model.values() if tensor.is_floating_point()), torch.float32)
    model = model.to(dtype=dtype)
    engine.load_model(model, state.model)
    return Opened(task, model.eval(), schema, state.position)


def state_of(model: nn.Module, origin: Opened | Run) -> State:
    """A state of its own: no tensor is shared with the model. The schema is that which its origin was trained with."""
    if isinstance(origin, Run):
        schema, position = origin.state.schema, origin.state.position
    else:
        schema, position = origin.schema.to_json() if origin.schema.columns else None, origin.position
    return State(model=clone(dict(model.state_dict())), schema=schema, position=position)


def first_row(batch: Any) -> Any:
    """The first row of a batch without its target and weight."""
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name not in TARGETS}
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        batch = tuple(batch[:-1])
    return map_tensors(lambda tensor: tensor[:1].clone(), batch)
