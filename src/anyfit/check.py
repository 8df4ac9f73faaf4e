"""check: does a task fit its data, and is its loss a mean over its count? Found before a long run, not after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyfit import engine, machine
from anyfit.errors import AnyfitError
from anyfit.prepare import built, prepare
from anyfit.task import Step, Task, evaluating, measure
from anyfit.tree import first_tensor, leaves, map_tensors

__all__ = ["check"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of sums in the model's own type; a wrong count is off by far more


def check(task: Task, data: Any, *, target: str | None = None, **plan: Any) -> dict[str, Any]:
    """Look at one batch: shapes, a step, prediction without labels, and whether the step over a batch is the sum over its parts.

    Returns what was seen, with `ok` and a list of `problems`; raises only where the data cannot be read or the model not built.
    """
    with machine.own_random():
        prepared = prepare(task, data, target=target, validation=None, test=None, plan=plan)
        machine.seed_all(prepared.plan.seed)
        batches = prepared.batches("train")
        model = built(task, prepared.schema)
        trainer = engine.make_trainer(task, model, prepared.plan, 1, prepared.device)
        batch = batches.window(trainer.position)[0]
        problems: list[str] = []
        seen: dict[str, Any] = {
            "task": type(task).__name__,
            "rows": batches.rows,
            "steps_per_epoch": batches.steps_per_epoch,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch": _shapes(batch),
        }
        seen["step"] = _try_step(task, model, batch, problems)
        if seen["step"] is not None:
            seen["parts"] = _sums_of_parts(task, model, batch, problems)
            seen["unused"] = _unused(task, model, batch)
            if seen["unused"]:
                problems.append(f"no gradient reaches {', '.join(seen['unused'])}; freeze them or use them")
        seen["prediction"] = _try_predict(task, model, batch, problems)
        seen["metrics"] = _try_metrics(task, model, batch, prepared.schema, problems)
        return {"ok": not problems, "problems": problems, **seen}


def _shapes(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _shapes(value) for key, value in tree.items()}
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if isinstance(tree, tuple | list):
        return [_shapes(value) for value in tree]
    return type(tree).__name__


def _try_step(task: Task, model: nn.Module, batch: Any, problems: list[str]) -> dict[str, Any] | None:
    try:
        step = task.step(model, batch)
    except (AnyfitError, RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:
        problems.append(f"step fails: {type(error).__name__}: {error}")
        return None
    if not isinstance(step, Step):
        problems.append(f"step returns a {type(step).__name__}; return anyfit.Step(loss, count, ...)")
        return None
    if not math.isfinite(float(step.loss.detach())):
        problems.append(f"the first loss is {float(step.loss.detach())}")
    if not step.loss.requires_grad:
        problems.append("the loss has no gradient; is it detached, or is every parameter frozen?")
        return None
    return {"loss": float(step.loss.detach()), "count": float(step.count), "outputs": _shapes(step.outputs)}


def _sums_of_parts(task: Task, model: nn.Module, batch: Any, problems: list[str]) -> dict[str, float] | None:
    """Loss x count of a batch against the sum of that over two uneven parts, without dropout.

    They differ where the count is not the loss's denominator (ignored labels, class weights, shifted tokens) or where a row's
    output depends on its neighbours (batch statistics).
    """
    size = int(first_tensor(batch).shape[0])
    if size < 3:
        return None
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut = max(1, size // 3)
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    result: dict[str, float] = {}
    try:
        for mode in ("evaluation", "training"):
            result[mode] = _difference(task, model, batch, size, cut, training=mode == "training")
    except (AnyfitError, RuntimeError, TypeError) as error:
        problems.append(f"a part of a batch cannot be stepped over: {type(error).__name__}: {error}")
        return None
    finally:
        engine.load_model(model, kept)
    if result["evaluation"] > tolerance:
        problems.append(
            f"loss x count of a batch differs from the sum over its parts by {result['evaluation']:.1e}: the count is not the loss's denominator "
            "(ignored labels, class weights, shifted tokens?); return the true one in Step.count"
        )
    elif result["training"] > tolerance:
        problems.append(
            f"in training, a batch differs from its parts by {result['training']:.1e}: rows depend on their neighbours (batch normalisation, dropout by function?); "
            "shares, accumulation and federation will not give the same weights (GroupNorm or LayerNorm would)"
        )
    return result


def _difference(task: Task, model: nn.Module, batch: Any, size: int, cut: int, *, training: bool) -> float:
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    with evaluating(model):
        if training:
            model.train()
            for module in dropouts:
                module.eval()
        sums = []
        for start, stop in ((0, size), (0, cut), (cut, size)):
            part = _rows(batch, start, stop, size)
            with torch.no_grad():
                step = task.step(model, part)
            sums.append(float(step.loss.double() * step.count))
    whole, first, second = sums
    return abs(whole - first - second) / max(abs(whole), 1e-12)


def _rows(batch: Any, start: int, stop: int, size: int) -> Any:
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.dim() and tensor.shape[0] == size else tensor, batch)


def _unused(task: Task, model: nn.Module, batch: Any) -> list[str]:
    model.zero_grad()
    task.step(model, batch).loss.backward()  # type: ignore[no-untyped-call]
    unused = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    model.zero_grad()
    return unused


def _try_predict(task: Task, model: nn.Module, batch: Any, problems: list[str]) -> Any:
    """Prediction on a batch without its labels."""
    if isinstance(batch, dict):
        batch = {name: value for name, value in batch.items() if name not in ("target", "labels")}
    elif isinstance(batch, tuple) and not hasattr(batch, "_fields") and len(batch) > 1:
        batch = batch[:-1]
    try:
        with evaluating(model), torch.no_grad():
            outputs = task.predict(model, batch)
    except (AnyfitError, RuntimeError, TypeError, KeyError, IndexError) as error:
        problems.append(f"prediction without labels fails: {error}; define predict(self, model, batch)")
        return None
    if not list(leaves(outputs)):
        problems.append(f"predict gives a {type(outputs).__name__} without tensors")
    return _shapes(outputs)


def _try_metrics(task: Task, model: nn.Module, batch: Any, schema: Any, problems: list[str]) -> list[str]:
    try:
        with evaluating(model), torch.no_grad():
            return sorted(set(measure(task, model, [batch], task.metrics(schema)).values()) - {"rows"})
    except (AnyfitError, RuntimeError, TypeError, IndexError, ValueError) as error:
        problems.append(f"metrics fail: {error}")
        return []
