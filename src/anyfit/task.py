"""Task: what is learnt, written once. A subclass gives a model; everything else has a default that can be replaced.

B is the batch. A batch is a tensor, tuple, dict or dataclass of tensors; its target is `target` or `labels`, or the last item.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import textwrap
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, Self, dataclass_transform

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from anyfit import data
from anyfit.errors import DataError, TaskError
from anyfit.metrics import IGNORED, Accumulator, Metric
from anyfit.schedule import Schedule
from anyfit.schema import Schema
from anyfit.tree import first_tensor
from anyfit.update import Update
from anyfit.values import File, Plan, coerce

if TYPE_CHECKING:
    import pyarrow as pa

    from anyfit.engine import Trainer

__all__ = ["Step", "Task", "adamw", "measure", "task_code", "task_values"]

TARGETS = ("target", "labels")
WEIGHT = "weight"  # of each row of a batch: its loss is a weighted mean, its count the sum of weights


@dataclass(frozen=True, slots=True)
class Step:
    """What one batch gave. `loss` is a mean and `count` ITS denominator (rows, unmasked tokens, sum of weights)."""

    loss: Tensor
    count: int | Tensor
    outputs: Any = None
    targets: Any = None
    logs: Mapping[str, Tensor] | None = None  # further means over count


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Task:
    """Subclasses become frozen keyword-only dataclasses by themselves; fields are JSON values, `File` or another task."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(frozen=True, kw_only=True)(cls)
        clash = sorted({field.name for field in dataclasses.fields(cls)} & set(Plan.__dataclass_fields__))  # type: ignore[arg-type]
        if clash:
            raise TaskError(f"field {clash[0]!r} of {cls.__name__} is a field of the plan too; give its default in plan() instead")

    def plan(self) -> Plan:
        """How long and how to train, unless the caller says otherwise."""
        return Plan()

    def statistics(self, table: pa.Table, schema: Schema) -> Update:
        """Additive sums over training rows, from which `prepare` fits preprocessing."""
        return data.statistics(table, schema)

    def prepare(self, schema: Schema, statistics: Update) -> Schema:
        """The schema with means, deviations, categories, vocabularies."""
        return data.fitted(schema, statistics, rare=getattr(self, "rare", 1), balance=getattr(self, "balance", False))

    def build_model(self, schema: Schema) -> nn.Module:
        """The network, freshly initialised."""
        raise TaskError(f"{type(self).__name__} has no model; define build_model(self, schema)")

    def build_dataset(self, table: pa.Table, split: str, schema: Schema) -> Any:
        """A dict or tuple of tensors (the fast path), or a torch Dataset. `split`: train, validation, test or predict."""
        texts = schema.of_type("text")
        if texts:
            raise DataError(
                f"column {texts[0].name!r} is text, which {type(self).__name__} does not read; leave it out (ignore), use a text task, or "
                "define build_dataset(self, table, split, schema)"
            )
        return data.to_tensors(table, schema, need_target=split != "predict", balanced=split == "train")

    def collate(self, samples: list[Any]) -> Any:
        """Samples of a Dataset -> a batch; pads with 0 (labels: -100) where lengths differ."""
        return _collate(samples)

    def augment(self, batch: Any, uniform: data.Uniform) -> Any:
        """Change a training batch; `uniform(*shape)` gives (B, *shape) numbers that depend on each sample's position alone."""
        return batch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """What the model returns for a batch; labels may be absent."""
        return _call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        """A mean and its count: the model's own loss if it returned one, else that of the target's type."""
        loss, predicted = _interpret(outputs)
        target, weight = _target_of(batch), _weight_of(batch)
        if loss is not None:
            if weight is not None:
                raise TaskError(
                    f"{type(self).__name__} got rows with weights, but the model makes its own loss, which cannot heed them; "
                    "leave the weights out, or define loss(self, outputs, batch)"
                )
            return loss, first_tensor(batch).shape[0] if target is None else _count(target)
        if target is None or not isinstance(predicted, Tensor):
            raise TaskError(
                f"{type(self).__name__} got a batch without target or labels and a model that returns no loss; name the target "
                "'target' or 'labels', put it last in a tuple, or define loss(self, outputs, batch)"
            )
        return _default_loss(predicted, target) if weight is None else _weighted_loss(predicted, target, weight)

    def step(self, model: nn.Module, batch: Any) -> Step:
        """One training batch: forward and loss."""
        outputs = self.forward(model, batch)
        loss, count = self.loss(outputs, batch)
        return Step(loss, count, _interpret(outputs)[1], _target_of(batch))

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        """One evaluation batch; `step` unless replaced."""
        return self.step(model, batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        """The whole evaluation, replaceable (on this machine only): figures by name, `loss` among them."""
        schema = getattr(batches, "schema", None)
        return measure(self, model, batches, None if schema is None else self.metrics(schema)).values()

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """Predictions for a batch: what `forward` returned beside its loss."""
        loss, predicted = _interpret(self.forward(model, batch))
        if predicted is None:
            raise TaskError(
                f"the model of {type(self).__name__} returns {'only its loss' if loss is not None else 'nothing'}, so there is nothing to "
                "predict with; define predict(self, model, batch)"
            )
        return predicted

    def build_optimizer(self, model: nn.Module) -> Optimizer | dict[str, Optimizer]:
        """AdamW over the parameters that train; its rate is the task's field `lr` where there is one."""
        return adamw(model, lr=getattr(self, "lr", 1e-3))

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | dict[str, Schedule] | None:
        """How the learning rate moves; None keeps it."""
        return None

    def metrics(self, schema: Schema) -> Mapping[str, Metric | Callable[..., Any]] | None:
        """Metrics by name; None takes what the target's type asks for. A plain function gets all outputs and targets."""
        return None

    def train_step(self, trainer: Trainer, window: Iterable[Any]) -> Step | None:
        """The inner loop: the batches of one optimizer step. Replace it for several optimizers or passes."""
        step = None
        for batch in window:
            step = self.step(trainer.model, batch)
            trainer.backward(step)
        trainer.apply()
        return step

    def constrain(self, model: nn.Module, progress: float | None) -> Callable[[], None] | None:
        """What must hold for the weights after every step, such as zeros that stay: called before each step (of a federation: also before
        each round's result is taken over), it gives what is done after it. `progress`: how much of the training will be done then, from
        0 to 1; None at a site, whose server decides.
        """
        return None

    def settles(self) -> float:
        """The progress from which on weights are a result: what comes before is never the best, and no patience counts it."""
        return 0.0

    def shared(self, name: str, tensor: Tensor) -> bool:
        """Whether a site exchanges this parameter or buffer: by default the parameters that train."""
        return tensor.requires_grad

    def example_row(self, schema: Schema) -> Any:
        """One row of zeros without its target, in a batch of 1: what a model is traced with where no data is at hand."""
        return data.example(schema)

    def own_method(self, method: str) -> bool:
        """Whether this task replaces a method; a task that wraps another answers for both."""
        return getattr(type(self), method) is not getattr(Task, method)

    def classes(self) -> Sequence[type]:
        """Further classes that this task is made of: a change of their code is a change of the task."""
        return ()

    def replaced(self, **values: Any) -> Self:
        """The task with some fields replaced, checked against their annotations; text becomes what the annotation says."""
        known = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise TaskError(f"{unknown[0]} is no field of {type(self).__name__}; it has: {', '.join(sorted(known)) or 'none'}")
        hints = _hints(type(self))
        checked = {name: coerce(name, value, hints[name]) for name, value in values.items()}
        return dataclasses.replace(self, **checked) if checked else self  # type: ignore[type-var]


dataclass(frozen=True, kw_only=True)(Task)


def _hints(cls: type[Task]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:  # an annotation under TYPE_CHECKING: that field is not checked
        return {field.name: Any for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _place(task: Task) -> str:
    return f"{type(task).__module__}:{type(task).__qualname__}"


def task_values(task: Task, place: Callable[[Task], str | None] = _place) -> dict[str, Any]:
    """The fields as strict JSON; `File` and other tasks as objects that say so, with `place` telling where a task is found."""

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, Task):
            return {"task": place(value) or _place(value), "values": task_values(value, place)}
        if isinstance(value, File):
            return {"path": value.path, "sha256": value.sha256}
        if isinstance(value, list | tuple):
            return [convert(name, item) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: convert(name, item) for key, item in value.items()}
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise TaskError(
            f"field {name} (={value!r}) of {type(task).__name__} must be a JSON value, a File or a task; build other objects in its methods"
        )

    return {field.name: convert(field.name, getattr(task, field.name)) for field in dataclasses.fields(task)}  # type: ignore[arg-type]


def task_code(task: Task) -> str:
    """SHA-256 of the source of a task's classes; of their bytecode where there is no source (an interactive session)."""
    hasher = hashlib.sha256()
    for base in [base for cls in (type(task), *task.classes()) for base in cls.__mro__]:
        if base in (Task, object):
            continue
        try:
            hasher.update(textwrap.dedent(inspect.getsource(base)).encode())
        except (OSError, TypeError):
            for name, member in sorted(vars(base).items()):
                code = getattr(member, "__code__", None)
                if code is not None and not name.startswith("__"):
                    hasher.update(f"{name} {_spelled(code)}".encode())
    return hasher.hexdigest()


def _spelled(code: CodeType) -> str:
    """A function's bytecode with the names and constants it uses, functions within it included."""
    constants = [
        _spelled(constant)
        if inspect.iscode(constant)
        else repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """Fused AdamW over the parameters that train."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TaskError("the model has no parameter that trains; leave requires_grad on for at least one, or define build_optimizer")
    return torch.optim.AdamW(
        parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=all(p.is_floating_point() for p in parameters)
    )


def measure(task: Task, model: nn.Module, batches: Iterable[Any], metrics: Mapping[str, Any] | None = None) -> Accumulator:
    """Totals of loss and metrics over `batches`, without gradients and in evaluation mode."""
    totals = Accumulator(metrics)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            step = task.evaluate_step(model, batch)
            totals.add(step.loss, step.count, step.outputs, step.targets, step.logs, first_tensor(batch).shape[0])
    return totals


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module gets back the mode that it had (a frozen part may stay in evaluation for good)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# The default step: how a batch meets a model


@dataclass(frozen=True, slots=True)
class _Inputs:
    names: tuple[str, ...]  # of the parameters that can be given, in order
    required: int
    any_name: bool


_inputs: weakref.WeakKeyDictionary[nn.Module, _Inputs] = weakref.WeakKeyDictionary()


def _inputs_of(model: nn.Module) -> _Inputs:
    found = _inputs.get(model)
    if found is None:
        inner = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
        parameters = list(inspect.signature(inner.forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in named)
        found = _Inputs(tuple(p.name for p in named), required, any(p.kind is p.VAR_KEYWORD for p in parameters))
        _inputs[model] = found
    return found


def _as_mapping(batch: Any) -> Mapping[str, Any] | None:
    """A batch with names as a mapping; None for a tensor, list or plain tuple."""
    kind = type(batch)
    if kind is tuple or kind is list or kind is Tensor:  # the common kinds come first: this runs at every step
        return None
    if kind is dict or isinstance(batch, Mapping):
        return batch  # type: ignore[no-any-return]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _target_of(batch: Any) -> Any:
    named = _as_mapping(batch)
    if named is not None:
        for name in TARGETS:
            if name in named:
                return named[name]
        return None
    return batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def _weight_of(batch: Any) -> Tensor | None:
    named = _as_mapping(batch)
    return None if named is None else named.get(WEIGHT)


def _call(model: nn.Module, batch: Any) -> Any:
    inputs, named = _inputs_of(model), _as_mapping(batch)
    if named is None:
        items = list(batch) if isinstance(batch, tuple | list) else [batch]
        target = items.pop() if len(items) > 1 else None
        wanted = next((name for name in TARGETS if name in inputs.names), None)
        if wanted is not None and target is not None:
            return model(*items, **{wanted: target})
        return model(*items)
    if inputs.any_name:
        return model(**{name: value for name, value in named.items() if name != WEIGHT or name in inputs.names})
    known = {name: value for name, value in named.items() if name in inputs.names}
    if any(name not in TARGETS for name in known):
        return model(**known)
    # names that the model does not know (a plain net's `input`): the features in their order
    features = [value for name, value in named.items() if name not in TARGETS and name != WEIGHT]
    if len(features) < inputs.required - len(known):
        raise TaskError(
            f"the model's forward wants {', '.join(inputs.names)}, but the batch has {', '.join(map(str, named))}; define forward(self, model, batch)"
        )
    return model(*features[: len(inputs.names) - len(known)], **known)


def _interpret(outputs: Any) -> tuple[Tensor | None, Any]:
    """What a model returned -> its loss, if any, and its predictions."""
    if isinstance(outputs, Tensor):
        return (outputs, None) if outputs.dim() == 0 else (None, outputs)
    if isinstance(outputs, Mapping) or hasattr(outputs, "logits") or hasattr(outputs, "loss"):
        if isinstance(outputs, Mapping):
            return outputs.get("loss"), outputs.get("logits")
        return getattr(outputs, "loss", None), getattr(outputs, "logits", None)
    if isinstance(outputs, tuple | list) and outputs:
        first = outputs[0]
        if isinstance(first, Tensor) and first.dim() == 0:
            return first, outputs[1] if len(outputs) > 1 else None
        return None, first
    return None, outputs


def _count(target: Any) -> int | Tensor:
    if not isinstance(target, Tensor):
        return int(first_tensor(target).shape[0])
    if target.is_floating_point():
        return target.numel() if target.dim() else 1
    return (target != IGNORED).sum()


def _default_loss(outputs: Tensor, target: Tensor) -> tuple[Tensor, int | Tensor]:
    """Squared error for floats, cross entropy for labels (binary where outputs have the target's shape). Losses are made in float32 or wider."""
    outputs = outputs if outputs.dtype not in (torch.float16, torch.bfloat16) else outputs.float()
    if target.is_floating_point():
        if outputs.numel() != target.numel():
            raise TaskError(
                f"outputs {tuple(outputs.shape)} and target {tuple(target.shape)} differ in size; make the model give one number for each"
            )
        return nn.functional.mse_loss(outputs.reshape(target.shape), target.to(outputs.dtype)), target.numel()
    count = (target != IGNORED).sum()
    if outputs.numel() == target.numel():
        kept = (target != IGNORED).to(outputs.dtype)
        each = nn.functional.binary_cross_entropy_with_logits(
            outputs.reshape(target.shape), target.to(outputs.dtype), weight=kept, reduction="sum"
        )
        return each / count.clamp(min=1), count
    if target.dim() == 1 and target.device.type == "cpu":  # one call; where nothing counts it is 0/0, which the engine sees on a CPU
        return nn.functional.cross_entropy(outputs, target, ignore_index=IGNORED), count
    total = nn.functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), target.reshape(-1), ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1), count


def _weighted_loss(outputs: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The default loss as a mean weighted by row; `weight` (B,), the count is the sum of the weights of what counts."""
    outputs = outputs if outputs.dtype not in (torch.float16, torch.bfloat16) else outputs.float()
    if target.is_floating_point():
        each = (outputs.reshape(target.shape) - target.to(outputs.dtype)).square()
        kept = torch.ones_like(each)
    elif outputs.numel() == target.numel():
        kept = (target != IGNORED).to(outputs.dtype)
        each = nn.functional.binary_cross_entropy_with_logits(
            outputs.reshape(target.shape), target.to(outputs.dtype), weight=kept, reduction="none"
        )
    else:
        flat = nn.functional.cross_entropy(
            outputs.reshape(-1, outputs.shape[-1]), target.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        each, kept = flat.reshape(target.shape), (target != IGNORED).to(outputs.dtype)
    weights = kept * weight.to(outputs.dtype).reshape(-1, *[1] * (target.dim() - 1))
    count = weights.sum()
    return (each * weights).sum() / torch.where(count > 0, count, 1.0), count


def _collate(samples: list[Any], name: str = "", *, top: bool = True) -> Any:
    """Torch's default collate, nested, that pads sequences of different lengths; `name` tells labels from inputs."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: _collate([sample[key] for sample in samples], str(key), top=False) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(
            *(_collate(list(parts), field, top=False) for field, parts in zip(first._fields, zip(*samples, strict=True), strict=True))
        )
    if isinstance(first, tuple) or (isinstance(first, list) and not all(isinstance(item, int | float) for item in first)):
        names = [""] * (len(first) - 1) + [TARGETS[0] if top and len(first) > 1 else ""]
        return tuple(_collate(list(parts), field, top=False) for field, parts in zip(names, zip(*samples, strict=True), strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = {
            field.name: _collate([getattr(sample, field.name) for sample in samples], field.name, top=False)
            for field in dataclasses.fields(first)
        }
        return dataclasses.replace(first, **fields)
    if isinstance(first, list | np.ndarray):
        filled = next((sample for sample in samples if len(sample)), first)
        kind = torch.as_tensor(filled).dtype  # an empty list says nothing of its numbers
        samples = [torch.as_tensor(sample, dtype=kind if not len(sample) else None) for sample in samples]
        first = samples[0]
    if isinstance(first, Tensor) and first.dim() > 0 and len({tuple(sample.shape) for sample in samples}) > 1:
        padding = IGNORED if name in TARGETS else 0
        return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=padding)
    return default_collate(samples)
