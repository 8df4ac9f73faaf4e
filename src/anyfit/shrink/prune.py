"""Pruning: fewer weights (unstructured) or fewer channels (structured), to exactly the share that was asked for."""

from __future__ import annotations

import copy
from typing import Any, Literal

from anyfit.errors import InputError, RunError, TaskError
from anyfit.fit import fit as fit_here
from anyfit.shrink.channels import cut
from anyfit.shrink.opened import FitShaped, check_options, open_model, over_sites, state_of
from anyfit.state import State
from anyfit.task import Task
from anyfit.tasks.edits import apply_edits
from anyfit.tasks.shrunk import Pruned, Quantized, check_amount, prunable, prune_to

__all__ = ["prune", "sparsity_of"]


def prune(
    task: Task,
    state: Any,
    data: Any = None,
    amount: float = 0.5,
    *,
    structured: bool = False,
    scope: Literal["global", "layer"] | None = None,
    ramp: Literal["cubic", "linear", "once"] = "cubic",
    begin: float = 0.15,
    end: float = 0.75,
    multiple: int = 1,
    inputs: Any = None,
    fit: FitShaped = fit_here,
    **options: Any,
) -> tuple[Task, State]:
    """The pruned task and its state. Structured: a share `amount` of each layer's channels goes (or of all, with scope="global"), those of
    the smallest norm, and with them all that depends on them: the network really is smaller. Else that share of all weights becomes zero
    (or of each layer's, with scope="layer"), along `ramp` between the shares `begin` and `end` of the training.

    `options` go to `fit` (epochs=..., lr by set fields): with epochs or steps the pruned task is trained on `data`; without, it is
    pruned at once. `fit`: what trains, such as `partial(federate, rounds=10)` over the sites that are given as `data`. `inputs`: a batch
    of one row to trace the model with (None: the first of `data`).
    """
    if not isinstance(amount, int | float) or not 0 < amount < 1:
        raise InputError(
            f"amount (={amount!r}) must be above 0 and below 1: the share of {'channels' if structured else 'weights'} that go"
        )
    if isinstance(task, Quantized):
        raise TaskError("task is quantized; prune comes before: give the one within (task.task) with the state that it had")
    found = open_model(task, state)
    trains = any(options.get(name) for name in ("epochs", "steps", "rounds")) or fit is not fit_here
    if trains and data is None:
        raise InputError("data is missing: epochs or steps need rows to train on; leave them out to prune at once")
    check_options(options, fit)
    if structured:
        row = inputs if inputs is not None else found.row(None if over_sites(fit) else data, target=options.get("target"))
        edit = cut(task, found.model, row, amount, scope=scope or "layer", multiple=multiple)
        pruned: Task = Pruned(task=task, kept={name: value for name, value in edit.items() if name != "edit"})
        model = apply_edits(copy.deepcopy(found.model), [edit])
    else:
        pruned = Pruned(task=task, amount=amount, ramp=ramp, begin=begin, end=end, scope=scope or "global")
        model = copy.deepcopy(found.model)
        check_amount(model, amount, scope or "global")
        if not trains:
            prune_to(list(prunable(model).values()), amount, scope or "global")
    result = state_of(model, found)
    if trains:
        run = fit(pruned, data, weights=dict(result.model), **options)
        if run.stopped not in ("finished", "patience"):
            raise RunError(f"training stopped ({run.stopped}) before the pruning was done, so {amount:.0%} is not delivered; train again")
        result = state_of(run.model, run)
        model = run.model
    if not structured:
        _check_delivered(model, amount, scope or "global")
    return pruned, result


def sparsity_of(model: Any) -> float:
    """The share of prunable weights that is zero."""
    tensors = list(prunable(model).values())
    return sum(int((tensor == 0).sum()) for tensor in tensors) / max(1, sum(tensor.numel() for tensor in tensors))


def _check_delivered(model: Any, amount: float, scope: str) -> None:
    """Requested = delivered."""
    tensors = list(prunable(model).values())
    for group in [tensors] if scope == "global" else [[tensor] for tensor in tensors]:
        size, zeros = sum(tensor.numel() for tensor in group), sum(int((tensor == 0).sum()) for tensor in group)
        if zeros < round(amount * size):
            raise RunError(
                f"{zeros} of {size} weights are zero, fewer than amount (={amount}) asks for: something moved them after the pruning; give a "
                "task whose weights only its optimizer changes"
            )
