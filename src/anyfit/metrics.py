"""Metrics as a page of sums: what a batch adds, and the value of the totals. Any split of the rows gives the same value.

B rows, C classes, K bins. Classification outputs are logits (B, C), or (B,) where the target is 0 or 1; targets of -100 are
left out; (B, T, C) outputs with (B, T) targets count tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from anyfit.errors import InputError
from anyfit.tree import wide

__all__ = [
    "AUROC",
    "F1",
    "MAE",
    "R2",
    "RMSE",
    "Accumulator",
    "Accuracy",
    "CalibrationError",
    "Confusion",
    "LogLoss",
    "Metric",
    "default_metrics",
    "figures",
]

IGNORED = -100  # torch's cross_entropy leaves these targets out, and so does everything here


class Metric(ABC):
    """One metric: `measure` gives what a batch adds, `value` turns totals into the figure."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Sums over one batch, on its device."""

    @abstractmethod
    def value(self, sums: Mapping[str, Tensor]) -> Any:
        """The figure (JSON) from the totals; NaN becomes None."""


def _logits(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> logits (B, C) and targets (B,), without ignored ones."""
    if outputs.shape == targets.shape or (outputs.shape[-1:] == (1,) and outputs.shape[:-1] == targets.shape):
        one = outputs.reshape(-1, 1)  # one logit: class 1 against class 0
        outputs_BC = torch.cat((torch.zeros_like(one), one), 1)
    else:
        outputs_BC = outputs.reshape(-1, outputs.shape[-1])
    targets_B = targets.reshape(-1).long()
    if outputs_BC.shape[0] != targets_B.shape[0]:
        raise InputError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not belong together")
    kept = targets_B != IGNORED
    if targets.dim() != 1 or not bool(kept.all()):
        outputs_BC, targets_B = outputs_BC[kept], targets_B[kept]
    return outputs_BC, targets_B


class Accuracy(Metric):
    """Share of rows whose largest logit is the target."""

    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        logits_BC, targets_B = _logits(outputs, targets)
        correct = (logits_BC.argmax(1) == targets_B).sum()
        return {"correct": correct, "count": correct.new_tensor(targets_B.shape[0])}

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        return _ratio(sums["correct"], sums["count"])


class Confusion(Metric):
    """Counts (C, C): a row for each true class, a column for each predicted one."""

    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        logits_BC, targets_B = _logits(outputs, targets)
        classes = logits_BC.shape[1]
        cells = torch.bincount(targets_B * classes + logits_BC.argmax(1), minlength=classes * classes)
        return {"cells": cells.reshape(classes, classes)}

    def value(self, sums: Mapping[str, Tensor]) -> Any:
        return [[int(cell) for cell in row] for row in sums["cells"].tolist()]


class F1(Confusion):
    """Mean of the classes' F1; of class 1 alone where there are two classes."""

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        cells = sums["cells"].cpu().double()
        hit, predicted, actual = cells.diag(), cells.sum(0), cells.sum(1)
        score = 2 * hit / (predicted + actual).clamp(min=1)
        seen = (predicted + actual) > 0
        if len(score) == 2:
            return float(score[1])
        return float(score[seen].mean()) if bool(seen.any()) else None


class LogLoss(Metric):
    """Mean negative log likelihood in nats."""

    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        logits_BC, targets_B = _logits(outputs, targets)
        total = torch.nn.functional.cross_entropy(logits_BC.float(), targets_B, reduction="sum")
        return {"nats": wide(total), "count": total.new_tensor(targets_B.shape[0])}

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        return _ratio(sums["nats"], sums["count"])


class AUROC(Metric):
    """Area under the ROC curve from K bins; the mean of one-against-rest for more than two classes.

    Bins are of the log odds bent by x / (1 + |x|): a rare class, whose probabilities are small throughout, keeps its ranks.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins

    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        logits_BC, targets_B = _logits(outputs, targets)
        logs_BC = logits_BC.float().log_softmax(1)
        classes = logs_BC.shape[1]
        # log p - log (1 - p); for two classes the other one's log, which is exact where p is near 1
        rest_BC = logs_BC.flip(1) if classes == 2 else torch.log1p(-logs_BC.exp().clamp(max=1 - 1e-7))
        odds_BC = logs_BC - rest_BC
        scores_BC = (odds_BC / (1 + odds_BC.abs()) + 1) / 2
        if classes == 2:
            scores_BC, positives_BC = scores_BC[:, 1:], targets_B[:, None] == 1
        else:
            positives_BC = targets_B[:, None] == torch.arange(classes, device=targets_B.device)
        bin_BC = (scores_BC * self.bins).nan_to_num().long().clamp(max=self.bins - 1)
        columns = scores_BC.shape[1]
        cell_BC = (torch.arange(columns, device=bin_BC.device) * 2 + positives_BC.long()) * self.bins + bin_BC
        return {"bins": torch.bincount(cell_BC.reshape(-1), minlength=columns * 2 * self.bins).reshape(columns, 2, self.bins)}

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        negative, positive = sums["bins"].cpu().double().unbind(1)  # (C, K) each
        below = negative.cumsum(1) - negative
        pairs = (positive * (below + negative / 2)).sum(1)  # rows of one bin count half
        possible = negative.sum(1) * positive.sum(1)
        seen = possible > 0
        return float((pairs[seen] / possible[seen]).mean()) if bool(seen.any()) else None


class CalibrationError(Metric):
    """Expected calibration error over K bins of the largest probability."""

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins

    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        logits_BC, targets_B = _logits(outputs, targets)
        confidence_B, predicted_B = wide(logits_BC).softmax(1).max(1)
        bin_B = (confidence_B * self.bins).nan_to_num().long().clamp(max=self.bins - 1)
        sums = confidence_B.new_zeros(3, self.bins)
        for row, values_B in enumerate((torch.ones_like(confidence_B), confidence_B, (predicted_B == targets_B).to(confidence_B.dtype))):
            sums[row].index_add_(0, bin_B, values_B)
        return {"bins": sums}

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        count, confidence, correct = sums["bins"].cpu().double()
        return _ratio((confidence - correct).abs().sum(), count.sum())


class _Regression(Metric):
    def measure(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        if outputs.numel() != targets.numel():
            raise InputError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not belong together")
        targets_N = wide(targets.reshape(-1))
        error_N = wide(outputs.reshape(-1)) - targets_N
        return {
            "squared": (error_N * error_N).sum(),
            "absolute": error_N.abs().sum(),
            "target": targets_N.sum(),
            "target_squared": (targets_N * targets_N).sum(),
            "count": error_N.new_tensor(error_N.numel()),
        }


class RMSE(_Regression):
    """Root of the mean squared error, in the target's unit."""

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        mean = _ratio(sums["squared"], sums["count"])
        return None if mean is None else math.sqrt(mean)


class MAE(_Regression):
    """Mean absolute error, in the target's unit."""

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        return _ratio(sums["absolute"], sums["count"])


class R2(_Regression):
    """Share of the target's variance that is explained."""

    def value(self, sums: Mapping[str, Tensor]) -> float | None:
        spread = sums["target_squared"] - sums["target"] ** 2 / sums["count"].clamp(min=1)
        return None if not float(spread) > 0 else 1.0 - float(sums["squared"] / spread)


def _ratio(numerator: Tensor, denominator: Tensor) -> float | None:
    return float(numerator) / float(denominator) if float(denominator) > 0 else None


def default_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Metric]:
    """What the target's type asks for: whole numbers are classes, floats are measured."""
    if targets.is_floating_point():
        return {name: DEFAULTS[name] for name in ("rmse", "mae", "r2")}
    names = ["accuracy"]
    classes = 2 if outputs.shape == targets.shape else outputs.shape[-1]
    if outputs.shape == targets.shape and targets.dim() == 2:  # several labels: each is yes or no
        names += ["f1", "auroc"]
    elif targets.dim() == 1 and classes <= 100:
        names += ["f1", "confusion"]
        if classes == 2 or outputs.shape[-1] == 1:
            names.append("auroc")
    return {name: DEFAULTS[name] for name in names}


DEFAULTS: dict[str, Metric] = {
    "accuracy": Accuracy(),
    "f1": F1(),
    "confusion": Confusion(),
    "auroc": AUROC(),
    "rmse": RMSE(),
    "mae": MAE(),
    "r2": R2(),
}


def figures(sums: Mapping[str, Mapping[str, Tensor]], metrics: Mapping[str, Metric | Callable[..., Any]] | None) -> dict[str, Any]:
    """Figures by name from totals that `Accumulator.sums` gave here or at several sites."""
    known = metrics if metrics is not None else DEFAULTS
    loss = sums["loss"]
    result: dict[str, Any] = {"loss": _ratio(loss["total"], loss["count"])}
    for name, metric in known.items():
        if name in sums and isinstance(metric, Metric):
            result[name] = _finite(metric.value(sums[name]))
    return {**result, "rows": int(loss["rows"])}


class Accumulator:
    """Totals of the loss and of each metric over the batches of one evaluation. Nothing is read back before `values`."""

    def __init__(self, metrics: Mapping[str, Metric | Callable[..., Any]] | None) -> None:
        self._metrics = metrics
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._held: list[tuple[Tensor, Tensor]] = []
        self._logs: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._count: Tensor | float = 0.0
        self.rows = 0

    def add(self, loss: Tensor, count: Tensor | int, outputs: Any, targets: Any, logs: Mapping[str, Tensor] | None, rows: int) -> None:
        """One batch. Without outputs or targets only the loss is counted."""
        # a batch in which nothing counts (all targets ignored) has a loss of 0/0, which must not spoil the rest
        weight = wide(count if isinstance(count, Tensor) else loss.new_tensor(count))
        part = torch.where(weight > 0, wide(loss.detach()) * weight, torch.zeros_like(weight))
        self._loss = part if self._loss is None else self._loss + part
        self._count = self._count + weight
        self.rows += rows
        for name, value in (logs or {}).items():
            log = torch.where(weight > 0, wide(value.detach()) * weight, torch.zeros_like(weight))
            self._logs[name] = self._logs[name] + log if name in self._logs else log
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            self._measure(outputs.detach(), targets)

    def _measure(self, outputs: Tensor, targets: Tensor) -> None:
        if self._metrics is None:
            self._metrics = default_metrics(outputs, targets)
        for name, metric in self._metrics.items():
            if not isinstance(metric, Metric):
                continue
            sums, total = metric.measure(outputs, targets), self._sums.setdefault(name, {})
            for key, value in sums.items():
                total[key] = total[key] + value if key in total else value
        if any(not isinstance(metric, Metric) for metric in self._metrics.values()):
            self._held.append((outputs.cpu(), targets.cpu()))

    def sums(self) -> dict[str, dict[str, Tensor]]:
        """Additive totals by metric, the loss among them, for adding to those of other workers."""
        if self._loss is None:
            return {}
        count = torch.as_tensor(self._count)
        return {"loss": {"total": self._loss, "count": count, "rows": torch.tensor(float(self.rows))}, **self._sums}

    def state(self) -> dict[str, Any]:
        """All totals, for `merged`."""
        return {"sums": self.sums(), "logs": self._logs}

    @classmethod
    def merged(cls, metrics: Mapping[str, Metric | Callable[..., Any]] | None, states: Iterable[Mapping[str, Any]]) -> Accumulator:
        """One of the totals of several."""
        merged = cls(metrics)
        merged._metrics = metrics if metrics is not None else DEFAULTS
        for state in states:
            for name, sums in state["sums"].items():
                if name == "loss":
                    merged._loss = sums["total"] if merged._loss is None else merged._loss + sums["total"]
                    merged._count, merged.rows = merged._count + sums["count"], merged.rows + int(sums["rows"])
                    continue
                total = merged._sums.setdefault(name, {})
                for key, value in sums.items():
                    total[key] = total[key] + value if key in total else value
            for name, value in state["logs"].items():
                merged._logs[name] = merged._logs[name] + value if name in merged._logs else value
        return merged

    def values(self) -> dict[str, Any]:
        """Figures by name; one read from the device."""
        if self._loss is None:
            raise InputError("no batch was evaluated; the data is empty")
        result = figures(self.sums(), self._metrics)
        rows = result.pop("rows")
        count = torch.as_tensor(self._count)
        result |= {name: _ratio(total, count) for name, total in self._logs.items()}
        if self._held:
            outputs, targets = (torch.cat(parts) for parts in zip(*self._held, strict=True))
            for name, metric in (self._metrics or {}).items():
                if not isinstance(metric, Metric):
                    result[name] = _finite(metric(outputs, targets))
        return {**result, "rows": rows}


def _finite(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
