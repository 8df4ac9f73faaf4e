"""Quantization: every operation of a network on int8, by ranges that are measured on rows; and training that goes on in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyfit.errors import InputError, RunError, TaskError
from anyfit.fit import fit as fit_here
from anyfit.program import QuantizedNetwork, describe_row, equalize, magnitudes, ranges_of
from anyfit.shrink.channels import random_batch
from anyfit.shrink.opened import FitShaped, Opened, check_options, first_row, open_model, over_sites, state_of
from anyfit.state import State
from anyfit.strategy import Calibrate
from anyfit.task import Task
from anyfit.tasks.shrunk import Quantized
from anyfit.tree import first_tensor, leaves, map_tensors

__all__ = ["check_columns", "quantize"]

TOLERANCE = 1e-3  # relative: float32 in another order of operations


def quantize(
    task: Task,
    state: Any,
    data: Any,
    *,
    calibration: int = 2000,
    equalized: bool = True,
    power_of_two: bool = False,
    lr: float | None = None,
    inputs: Any = None,
    fit: FitShaped = fit_here,
    target: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Quantized, State]:
    """The task in int8, and its state: symmetric, weights by output channel, batch normalisation folded, bit for bit what `export` writes.

    Ranges are the largest magnitudes on `calibration` rows of `data`; `equalized` brings channels between two layers to one range
    (cross-layer equalization). `power_of_two`: scales by which a device shifts instead of multiplying. With epochs or steps among `options`,
    training goes on in int8 (quantization-aware), at `lr` (None: a tenth of the task's). `fit`: `partial(federate, ...)` with sites as `data`: each site sends a histogram of
    magnitudes, and only those add up. `inputs`: a batch of one row to trace the model with (None: the first of `data`).
    """
    if data is None:
        raise InputError("data is missing: int8 ranges are measured on rows; give some of those that the task was trained on")
    if not isinstance(calibration, int) or calibration < 1:
        raise InputError(f"calibration (={calibration!r}) must be at least 1 row")
    found = open_model(task, state)
    check_columns(found)
    if isinstance(task, Quantized):
        raise TaskError("task is quantized already; give the one within: task.task with its state, or fit this one to train on in int8")
    federated = over_sites(fit)
    trains = any(options.get(name) for name in ("epochs", "steps", "rounds"))
    check_options(options, fit)
    row = first_row(inputs) if inputs is not None else found.row(None if federated else data, **({} if federated else {"target": target}))
    quantized = Quantized(task=task, inputs=describe_row(row), power_of_two=power_of_two, lr=lr)
    network = QuantizedNetwork(quantized.lowered(found.model), power_of_two=power_of_two)
    _check(found, network, row)
    if trains:
        _check_loss(found, row)
    if federated:
        rounds = {
            "run": None,
            "resume": False,
            "compress": None,
            "rounds": 1,
            "strategy": Calibrate(rows=calibration),
            "weights": dict(network.state_dict()),
            "seed": seed,
        }
        given = {name: value for name, value in options.items() if name not in ("rounds", "strategy", "epochs", "steps")}
        run = fit(quantized, data, **{**given, **rounds})
        network.load_state_dict(run.model.state_dict())
    else:
        total: Tensor | None = None
        with torch.no_grad():
            for batch in found.batches(data, calibration, target, seed):
                part = magnitudes(network, batch)
                total = part if total is None else total + part
        assert total is not None
        network.ranges.copy_(ranges_of(total).to(network.ranges.dtype))
    if not network.calibrated:
        raise InputError("all activations were zero on the rows of data, so there are no ranges; give other rows")
    if equalized:
        equalize(network)
        _check(found, network, row)
    result = state_of(network, found)
    if trains:
        more = {} if federated or target is None else {"target": target}
        run = fit(quantized, data, weights=dict(result.model), seed=seed, **more, **options)
        if run.stopped not in ("finished", "patience"):
            raise RunError(
                f"training in int8 stopped ({run.stopped}) before its end; train again, or take the state that was quantized without"
            )
        result = state_of(run.model, run)
    return quantized, result


def check_columns(found: Opened) -> None:
    """Refuse texts by their column."""
    texts = found.schema.of_type("text")
    if texts:
        raise TaskError(
            f"column {texts[0].name!r} is text, which is of any length and read by a tokenizer: neither has an int8 form; quantize a task whose "
            "rows are ids of one length, or export this one to ONNX as floats"
        )


def _check(found: Opened, network: QuantizedNetwork, row: Any) -> None:
    """The layers must compute what the model computes, before anything is rounded."""
    types = iter(tensor.dtype for tensor in leaves(row))
    batch = map_tensors(lambda tensor: tensor.to(next(types)), random_batch(row, rows=3))
    with torch.no_grad():
        expected = found.task.predict(found.model.eval(), batch)
        given = network.float_values(batch)[network.plan.result].reshape(expected.shape)
    apart = float((expected - given).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not apart <= TOLERANCE:
        raise TaskError(
            f"the network as int8 layers differs from the model (by {apart:.2g} of its largest output) before any rounding, so an operation was "
            "understood wrongly; please report it with the model"
        )


def _check_loss(found: Opened, row: Any) -> None:
    """In training, the loss is taken of what the layers compute, which is what `predict` gives: the model's own outputs must be the same."""
    if not found.task.own_method("predict"):
        return
    with torch.no_grad():
        predicted = found.task.predict(found.model, row)
        try:
            outputs = found.task.forward(found.model, row)
        except Exception:  # noqa: BLE001 - a model that wants its target: then the loss is taken of predictions anyway
            return
    given = first_tensor(outputs) if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if given is None or given.shape != predicted.shape or not torch.allclose(given, predicted, rtol=TOLERANCE):
        raise TaskError(
            f"predict of {type(found.task).__name__} gives something else than forward, of which the loss is computed, so the task cannot be trained "
            "in int8; quantize it after training (without epochs), or let the model itself do what predict does"
        )
