"""A model that makes its own loss, as transformers' models do, as a task."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from anyfit.adapt.huggingface.arguments import theirs
from anyfit.adapt.huggingface.rows import Collate, collated, rows_of
from anyfit.errors import TaskError
from anyfit.metrics import IGNORED, Accumulator
from anyfit.schedule import Factor, Schedule
from anyfit.schema import Schema
from anyfit.task import Step, Task
from anyfit.tree import first_tensor
from anyfit.values import Plan

__all__ = ["Figures", "Parts", "Passed", "TransformersTask", "from_transformers"]

Figures = dict[str, Any]
ComputeMetrics = Callable[[Any], Mapping[str, Any]]

NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as transformers spells it
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
RESERVED = {"event", "step", "epoch", "split", "best", "loss", "rows"}  # what an event says of itself


@dataclass(frozen=True)
class Parts:
    """What a task is made of beside its values."""

    model: nn.Module
    collator: Collate | None = None
    compute_metrics: ComputeMetrics | None = None
    plan: Plan = dataclasses.field(default_factory=Plan)
    keeps_columns: bool = False


class TransformersTask(Task):
    """A model that makes its own loss, as transformers trains it: AdamW without decay on biases and norms, its schedules by name.

    Counts: rows for one label each, labels that are not -100 for tokens, without each row's first where the model shifts them.
    """

    lr: float = 5e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    schedule: str = "constant"
    schedule_options: dict[str, Any] | None = None
    warmup_steps: float = 0.0  # below 1: a share of all steps
    label_names: tuple[str, ...] = ("labels",)
    parts: ClassVar[Parts]

    def plan(self) -> Plan:
        return self.parts.plan

    def build_model(self, schema: Schema) -> nn.Module:
        return copy.deepcopy(self.parts.model)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(decay_groups(model, self.weight_decay), lr=self.lr, betas=self.betas, eps=self.epsilon, fused=True)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | None:
        if self.schedule == "constant":
            return None
        scheduler = theirs(".optimization", "get_scheduler")(
            self.schedule,
            optimizer=optimizer,
            num_warmup_steps=int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(total_steps * self.warmup_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=self.schedule_options,
        )
        if isinstance(scheduler, LambdaLR):  # a function of the step
            return Schedule(Factor(optimizer, scheduler.lr_lambdas[0]))
        return Schedule(scheduler, "evaluation" if isinstance(scheduler, ReduceLROnPlateau) else "step")

    def rows(self, dataset: Any) -> Any:
        """A data set of dicts (one of `datasets`, say) as `anyfit.fit` takes it: token columns are read once where that can be."""
        return rows_of(dataset, self._collator, self._wanted)

    def collate(self, samples: list[Any]) -> Any:
        return collated(samples, self._collator, self._wanted)

    @property
    def _collator(self) -> Collate:
        return self.parts.collator or theirs(".data.data_collator", "default_data_collator")

    @property
    def _wanted(self) -> frozenset[str] | None:
        """The names of a batch that the model takes; None where it is given all."""
        names = parameters_of(self.parts.model)
        return frozenset((*names, *self.label_names)) if names and not self.parts.keeps_columns else None

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        loss = loss_of(outputs)
        return super().loss(outputs, batch) if loss is None else (loss, self.count(batch))

    def count(self, batch: Any) -> int | Tensor:
        """What a mean loss is the mean of."""
        labels = batch.get(self.label_names[0]) if self.label_names else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return first_tensor(batch).shape[0]
        if labels.dim() > 1 and _shifts_labels(self.parts.model):
            labels = labels[..., 1:]
        return (labels != IGNORED).sum()

    def step(self, model: nn.Module, batch: Any) -> Step:
        outputs = self.forward(model, batch)
        loss, count = self.loss(outputs, batch)
        predictions, labels = self._predictions(outputs), self._labels(batch)
        if isinstance(predictions, tuple) and predictions:
            predictions = predictions[0]
        if isinstance(labels, Tensor) and labels.dim() > 1 and isinstance(predictions, Tensor) and _shifts_labels(self.parts.model):
            predictions, labels = predictions[:, :-1], labels[:, 1:]
        return Step(loss, count, predictions, labels)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return self._predictions(self.forward(model, batch))

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Figures:
        if self.parts.compute_metrics is None:
            return super().evaluate(model, batches)
        return self.passed(model, batches).figures

    def measured(self, model: nn.Module, batch: Any) -> tuple[Tensor, int | Tensor, Any]:
        """Loss, count and outputs of a batch with labels."""
        outputs = self.forward(model, batch)
        return *self.loss(outputs, batch), outputs

    def passed(self, model: nn.Module, batches: Iterable[Any], *, keep: bool = False) -> Passed:
        """One pass over batches, whose labels may be absent: the figures, and predictions and labels of all rows where they are wanted."""
        compute_metrics, totals = self.parts.compute_metrics, Accumulator({})
        predictions, labels, rows, labelled = [], [], 0, False
        for batch in batches:
            size, known = first_tensor(batch).shape[0], self._labels(batch)
            if known is None:
                outputs = self.forward(model, batch)
            else:
                labelled = True
                loss, count, outputs = self.measured(model, batch)
                totals.add(loss, count, None, None, None, size)
            rows += size
            if keep or compute_metrics is not None:
                predictions.append(_numpy(self.shown(self._predictions(outputs), known)))
                labels.append(_numpy(known))
        given: Any = {}
        all_predictions, all_labels = _joined(predictions), _joined(labels) if labelled else None
        if compute_metrics is not None and labelled:
            given = compute_metrics(theirs(".trainer_utils", "EvalPrediction")(all_predictions, all_labels))
            if not isinstance(given, Mapping):
                raise TaskError(f"compute_metrics gave a {type(given).__name__}; it must give a dict of figures by name")
            if taken := sorted(RESERVED & set(given)):
                raise TaskError(f"compute_metrics gave a figure named {taken[0]!r}, which is taken; give it another name")
        figures = {str(name): _plain(value) for name, value in given.items()}
        return Passed({"loss": totals.values()["loss"] if labelled else None, **figures, "rows": rows}, all_predictions, all_labels)

    def shown(self, predictions: Any, labels: Any) -> Any:
        """What is kept of a batch's predictions."""
        return predictions

    def _predictions(self, outputs: Any) -> Any:
        """What a model returned beside its loss: one tensor, or a tuple of several."""
        if isinstance(outputs, Mapping):
            ignored = getattr(getattr(self.parts.model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
            parts = tuple(value for name, value in outputs.items() if name not in (*ignored, "loss"))
        elif isinstance(outputs, tuple | list):
            parts = tuple(outputs[1:] if loss_of(outputs) is not None else outputs)
        else:
            return outputs
        return parts[0] if len(parts) == 1 else parts

    def _labels(self, batch: Any) -> Any:
        """The labels of a batch, None where some are absent."""
        found = tuple(batch.get(name) for name in self.label_names)
        if not found or any(labels is None for labels in found):
            return None
        return found[0] if len(found) == 1 else found


class Passed(NamedTuple):
    """What one pass over a data set gave."""

    figures: Figures
    predictions: Any
    labels: Any


def from_transformers(
    model: nn.Module,
    *,
    collator: Collate | None = None,
    compute_metrics: ComputeMetrics | None = None,
    **plan: Any,
) -> TransformersTask:
    """A task that trains a copy of `model`, each time from the weights that it has now.

    `plan`: defaults for fields of `Plan`, and values for those of the task (lr, weight_decay, schedule, warmup_steps, ...).
    """
    names = {field.name for field in dataclasses.fields(TransformersTask)}
    values = {name: plan.pop(name) for name in sorted(names & set(plan))}
    values.setdefault("label_names", label_names(model))
    given = Parts(model, collator, compute_metrics, Plan().updated(**{"dtype": dtype_of(model), **plan}))

    class FromTransformers(TransformersTask):
        parts = given

    return FromTransformers().replaced(**values)


# What a model says of itself


def _inner(model: nn.Module) -> nn.Module:
    """What PEFT and torch.compile wrap."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[no-any-return]


def parameters_of(model: nn.Module) -> list[str]:
    """What forward takes by name."""
    parameters = inspect.signature(_inner(model).forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def label_names(model: nn.Module) -> tuple[str, ...]:
    """The arguments of forward that hold labels, as transformers finds them."""
    return tuple(theirs(".utils", "find_labels")(type(_inner(model))))


def _shifts_labels(model: nn.Module) -> bool:
    """Whether position i predicts label i + 1, so that a row's first label is never a target."""
    inner = _inner(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names = [cls.__name__ for cls in type(inner).__mro__]
    return getattr(inner, "loss_type", None) == "ForCausalLM" or any("ForCausalLM" in name or "LMHeadModel" in name for name in names)


def dtype_of(model: nn.Module) -> str:
    """The plan's word for the one floating type of the parameters."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        words = ", ".join(sorted(str(kind) for kind in kinds))
        raise TaskError(f"the model's parameters are of {words}; load it with dtype=torch.float32 (fp16=True or bf16=True trains it fast)")
    return DTYPES[kinds.pop()] if kinds else "float32"


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not: biases and norms, by type and by name."""
    decays = set(theirs(".trainer_pt_utils", "get_parameter_names")(model, [nn.LayerNorm], NO_DECAY))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [([p for name, p in trained if (name in decays) is kept], weight_decay * kept) for kept in (True, False)]
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in parts if parameters]
    if not groups:
        raise TaskError("the model has no parameter that trains; leave requires_grad on for at least one")
    return groups


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model returned, by its name or as the first of a tuple."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, Tensor) and first.dim() == 0 else None


# All rows as numpy


def _numpy(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return (tree.float() if tree.dtype == torch.bfloat16 else tree).detach().cpu().numpy()
    return tuple(_numpy(value) for value in tree) if isinstance(tree, tuple | list) else tree


def _joined(parts: Sequence[Any]) -> Any:
    """Arrays of batches one after the other; where their second dimension differs, -100 fills them up."""
    if not parts:
        return None
    if isinstance(parts[0], tuple):
        return tuple(_joined(column) for column in zip(*parts, strict=True))
    if parts[0].ndim >= 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        sides = [[(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)] for part in parts]
        parts = [np.pad(part, side, constant_values=IGNORED) for part, side in zip(parts, sides, strict=True)]
    return np.concatenate(parts)


def _plain(value: Any) -> Any:
    """A figure as JSON."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's; of a single number: that number
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
