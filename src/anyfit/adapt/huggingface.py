"""`Trainer` as transformers has it, run by anyfit's engine: code written for it needs one changed import.

What cannot be honoured is refused by name before anything starts. Neither `transformers.Trainer` nor accelerate's loop is used.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_model as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from anyfit import engine, machine
from anyfit.data import make_batches
from anyfit.errors import DataError, InputError, MissingExtra, StateError, TaskError
from anyfit.fit import fit
from anyfit.metrics import IGNORED, Accumulator
from anyfit.run import Run
from anyfit.schedule import Factor, Schedule
from anyfit.schema import Schema
from anyfit.task import Step, Task, evaluating
from anyfit.tree import first_tensor, map_tensors
from anyfit.values import Plan, atomic, parse

__all__ = ["EvalPrediction", "PredictionOutput", "TrainOutput", "Trainer", "TransformersTask", "from_transformers"]

Figures = dict[str, Any]
Collate = Callable[[list[Any]], Any]

log = logging.getLogger(__name__)

# Arguments that the adapter maps to a plan or a task, and checks itself.
MAPPED = {
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16"),
    *("logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "prediction_loss_only"),
    *("save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "seed", "data_seed", "use_cpu"),
    *("dataloader_drop_last", "dataloader_num_workers", "remove_unused_columns", "label_names", "use_cache"),
    *("train_sampling_strategy", "length_column_name", "report_to"),
}
# Arguments that change neither weights nor figures here: where they log to, how they move memory, what several processes would do.
HARMLESS = {
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "debug", "skip_memory_metrics", "tf32"),
    *("run_name", "project", "logging_dir", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
    *("logging_nan_inf_filter", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    # checkpoints are whole, bounded (the last two and the best) and written by anyfit's own clock
    *("save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "overwrite_output_dir"),
    *("eval_accumulation_steps", "eval_use_gather_object", "average_tokens_across_devices", "torch_empty_cache_steps"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    *("dataloader_multiprocessing_context", "accelerator_config", "fsdp_config", "liger_kernel_config"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "torch_compile_backend", "torch_compile_mode"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
}
WAYS = {
    "activation_checkpointing": "call model.activation_checkpointing_enable() yourself",
    "gradient_checkpointing": "call model.gradient_checkpointing_enable() yourself",
    "auto_find_batch_size": "give per_device_train_batch_size and gradient_accumulation_steps",
    "deepspeed": "train without it",
    "fsdp": "train without it",
    "full_determinism": "call torch.use_deterministic_algorithms(True) yourself",
    "label_smoothing_factor": "pass compute_loss_func with the smoothed loss",
    "optim": "take 'adamw_torch_fused', or pass optimizers=(optimizer, None)",
    "push_to_hub": "call model.push_to_hub() after training",
    "torch_compile": "pass a compiled model",
}
# Methods of transformers' class that a subclass may have replaced and that are never called here.
UNUSED_METHODS = (
    *("training_step", "prediction_step", "evaluation_loop", "prediction_loop", "log", "autocast_smart_context_manager"),
    *("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler", "get_decay_parameter_names"),
    *("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "get_batch_samples", "compute_loss_context_manager"),
    *("_get_train_sampler", "_get_eval_sampler", "_inner_training_loop", "_save_checkpoint", "_load_best_model", "_save"),
)
UNUSED_EVENTS = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # as transformers spells it
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
RESERVED = ("event", "step", "epoch", "split", "best", "loss", "rows")  # what an event says of itself


@dataclass(frozen=True)
class EvalPrediction:
    """What `compute_metrics` gets; unpacks to (outputs, labels) as numpy."""

    predictions: Any
    label_ids: Any
    inputs: None = None
    losses: None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.predictions, self.label_ids))

    def __getitem__(self, index: int) -> Any:
        return (self.predictions, self.label_ids)[index]


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` gives."""

    predictions: Any
    label_ids: Any
    metrics: Figures


class TrainOutput(NamedTuple):
    """What `Trainer.train` gives."""

    global_step: int
    training_loss: float
    metrics: Figures


def _theirs(module: str, name: str) -> Any:
    """A name of transformers, imported where it is needed."""
    try:
        return getattr(import_module(f"transformers{module}"), name)
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error


def _word(value: Any) -> Any:
    """An enumeration's value, anything else as it is."""
    return getattr(value, "value", value)


# ------------------------------------------------------------------ a model as a task


@dataclass(frozen=True)
class _Parts:
    """What a task is made of beside its values."""

    model: nn.Module
    collator: Collate | None
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None
    plan: Plan
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
    parts: ClassVar[_Parts]

    def plan(self) -> Plan:
        return self.parts.plan

    def build_model(self, schema: Schema) -> nn.Module:
        return copy.deepcopy(self.parts.model)

    def build_optimizer(self, model: nn.Module) -> Optimizer | dict[str, Optimizer]:
        return torch.optim.AdamW(_groups(model, self.weight_decay), lr=self.lr, betas=self.betas, eps=self.epsilon, fused=True)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | dict[str, Schedule] | None:
        if self.schedule == "constant":
            return None
        warmup = int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(total_steps * self.warmup_steps)
        get_scheduler = _theirs(".optimization", "get_scheduler")

        def made(target: Optimizer) -> Any:
            return get_scheduler(
                self.schedule,
                optimizer=target,
                num_warmup_steps=warmup,
                num_training_steps=total_steps,
                scheduler_specific_kwargs=self.schedule_options,
            )

        # a stand-in first: only its function of the step is needed, and transformers' object would leave its marks on the optimizer
        scheduler = made(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.lr))
        if isinstance(scheduler, LambdaLR):
            return Schedule(Factor(optimizer, scheduler.lr_lambdas[0]))
        scheduler = made(optimizer)
        return Schedule(scheduler, "evaluation" if isinstance(scheduler, ReduceLROnPlateau) else "step")

    def rows(self, dataset: Any) -> Any:
        """A data set of dicts (one of `datasets`, say) as `anyfit.fit` takes it: token columns are read once where that can be."""
        return _rows(dataset, self._collator(), self.wanted)

    def collate(self, samples: list[Any]) -> Any:
        return _collate(samples, self._collator(), self.wanted)

    def _collator(self) -> Collate:
        return self.parts.collator or _theirs(".data.data_collator", "default_data_collator")

    @property
    def wanted(self) -> frozenset[str] | None:
        """The names of a batch that the model takes; None where it takes any."""
        return None if self.parts.keeps_columns else _wanted(self.parts.model, self.label_names)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        loss = _loss_of(outputs)
        if loss is None:
            return super().loss(outputs, batch)
        return loss, self.count(batch)

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
        predictions, labels = _predictions(outputs, self._ignored()), _labels(batch, self.label_names)
        if isinstance(predictions, tuple) and predictions:
            predictions = predictions[0]
        if isinstance(labels, Tensor) and labels.dim() > 1 and isinstance(predictions, Tensor) and _shifts_labels(self.parts.model):
            predictions, labels = predictions[:, :-1], labels[:, 1:]
        return Step(loss, count, predictions, labels)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return _predictions(self.forward(model, batch), self._ignored())

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Figures:
        if self.parts.compute_metrics is None:
            return super().evaluate(model, batches)
        return self.passed(model, batches, keep=True).figures(self.parts.compute_metrics)

    def _ignored(self) -> tuple[str, ...]:
        return (*getattr(getattr(self.parts.model, "config", None), "keys_to_ignore_at_inference", ("past_key_values",)), "loss")

    def measured(self, model: nn.Module, batch: Any) -> tuple[Tensor | None, int | Tensor, Any]:
        """Loss, count and outputs of a batch whose labels may be absent."""
        outputs = self.forward(model, batch)
        if not _is_labelled(batch, self.label_names):
            return None, 0, outputs
        return *self.loss(outputs, batch), outputs

    def passed(self, model: nn.Module, batches: Iterable[Any], *, keep: bool) -> _Passed:
        """One pass over batches: the loss, and with `keep` predictions and labels of all rows as numpy."""
        totals, predictions, labels, rows, labelled = Accumulator({}), [], [], 0, False
        for batch in batches:
            size = int(first_tensor(batch).shape[0])
            loss, count, outputs = self.measured(model, batch)
            rows += size
            if loss is not None:
                labelled = True
                totals.add(loss, count, None, None, None, size)
            if keep:
                known = _labels(batch, self.label_names)
                predictions.append(_numpy(self.shown(_predictions(outputs, self._ignored()), known)))
                labels.append(_numpy(known))
        loss_value = totals.values()["loss"] if labelled else None
        return _Passed(loss_value, rows, _joined(predictions) if keep else None, _joined(labels) if keep and labelled else None)

    def shown(self, predictions: Any, labels: Any) -> Any:
        """What is kept of a batch's predictions."""
        return predictions


@dataclass(frozen=True)
class _Passed:
    """What one pass over a data set gave."""

    loss: float | None
    rows: int
    predictions: Any
    labels: Any

    def figures(self, compute_metrics: Callable[[Any], Mapping[str, Any]] | None) -> Figures:
        """The loss and what `compute_metrics` makes of predictions and labels."""
        found: Figures = {}
        if compute_metrics is not None and self.labels is not None:
            given = compute_metrics(EvalPrediction(self.predictions, self.labels))
            if not isinstance(given, Mapping):
                raise TaskError(f"compute_metrics gave a {type(given).__name__}; it must give a dict of figures by name")
            taken = sorted(set(given) & set(RESERVED))
            if taken:
                raise TaskError(f"compute_metrics gave a figure named {taken[0]!r}, which is taken; give it another name")
            found = {str(name): _plain(value) for name, value in given.items()}
        return {"loss": self.loss, **found, "rows": self.rows}


def from_transformers(
    model: nn.Module,
    *,
    collator: Collate | None = None,
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
    **plan: Any,
) -> TransformersTask:
    """A task that trains a copy of `model`, each time from the weights that it has now.

    `plan`: defaults for fields of `Plan`, and values for those of the task (lr, weight_decay, schedule, warmup_steps, ...).
    """
    names = {field.name for field in dataclasses.fields(TransformersTask)}
    values = {name: plan.pop(name) for name in sorted(names & set(plan))}
    values.setdefault("label_names", _label_names(model))
    given = _Parts(model, collator, compute_metrics, Plan().updated(**{"dtype": _dtype(model), **plan}))

    class FromTransformers(TransformersTask):
        parts = given

    return FromTransformers().replaced(**values)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not: biases and norms, by type and by name."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[id(parameter) in norms or NO_DECAY.search(name.lower()) is not None]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TaskError("the model has no parameter that trains; leave requires_grad on for at least one")
    return groups


def _inner(model: nn.Module) -> nn.Module:
    """What PEFT and torch.compile wrap."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[no-any-return]


def _names(model: nn.Module) -> dict[str, Any]:
    return dict(inspect.signature(_inner(model).forward).parameters)


def _label_names(model: nn.Module) -> tuple[str, ...]:
    """The arguments of forward that hold labels, as transformers finds them."""
    answers = ("start_positions", "end_positions") if "QuestionAnswering" in type(_inner(model)).__name__ else ()
    return tuple(name for name in _names(model) if "label" in name or name in answers)


def _wanted(model: nn.Module, label_names: Sequence[str]) -> frozenset[str] | None:
    names = _names(model)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    return None if takes_any else frozenset(names) | frozenset(label_names)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether position i predicts label i + 1, so that a row's first label is never a target."""
    inner = _inner(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names = [cls.__name__ for cls in type(inner).__mro__]
    return getattr(inner, "loss_type", None) == "ForCausalLM" or any("ForCausalLM" in name or "LMHeadModel" in name for name in names)


def _dtype(model: nn.Module) -> str:
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        words = ", ".join(sorted(str(kind) for kind in kinds))
        raise TaskError(f"the model's parameters are of {words}; load it with dtype=torch.float32 (fp16=True or bf16=True trains it fast)")
    return DTYPES[kinds.pop()] if kinds else "float32"


def _loss_of(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, tuple | list) and outputs:
        return outputs[0] if isinstance(outputs[0], Tensor) and outputs[0].dim() == 0 else None
    return getattr(outputs, "loss", None)


def _predictions(outputs: Any, ignored: Sequence[str]) -> Any:
    """What a model returned beside its loss: one tensor, or a tuple of several."""
    if isinstance(outputs, Mapping):
        parts = tuple(value for name, value in outputs.items() if name not in ignored)
    elif isinstance(outputs, tuple | list):
        parts = tuple(outputs[1:] if _loss_of(outputs) is not None else outputs)
    elif hasattr(outputs, "logits"):
        return outputs.logits
    else:
        return outputs
    return parts[0] if len(parts) == 1 else parts


def _is_labelled(batch: Any, names: Sequence[str]) -> bool:
    return bool(names) and all(batch.get(name) is not None for name in names)


def _labels(batch: Any, names: Sequence[str]) -> Any:
    if not _is_labelled(batch, names):
        return None
    found = tuple(batch[name] for name in names)
    return found[0] if len(found) == 1 else found


def _numpy(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        tree = tree.detach().cpu()
        return (tree.float() if tree.dtype == torch.bfloat16 else tree).numpy()
    if isinstance(tree, Mapping):
        return {name: _numpy(value) for name, value in tree.items()}
    return tuple(_numpy(value) for value in tree) if isinstance(tree, tuple | list) else tree


def _joined(parts: list[Any]) -> Any:
    """Arrays of batches one after the other; where their second dimension differs, -100 fills them up."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    if not isinstance(first, np.ndarray):
        return first
    if first.ndim >= 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        sides = [[(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)] for part in parts]
        parts = [np.pad(part, side, constant_values=IGNORED) for part, side in zip(parts, sides, strict=True)]
    return np.concatenate(parts)


def _plain(value: Any) -> Any:
    """A figure as JSON."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()  # of a single number: that number
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------ rows


def _collate(samples: Any, collator: Collate, wanted: frozenset[str] | None) -> Any:
    """Samples -> a plain dict of what the model takes. What is a batch already stays one."""
    if isinstance(samples, Mapping):
        return samples
    if wanted is not None:
        kept = wanted | {"label", "label_ids"}  # collators rename them
        samples = [{k: v for k, v in sample.items() if k in kept} if isinstance(sample, Mapping) else sample for sample in samples]
    batch = collator(samples)
    if not isinstance(batch, Mapping):
        raise DataError(f"data_collator gave a {type(batch).__name__}; it must give a dict of tensors")
    return {name: value for name, value in batch.items() if wanted is None or name in wanted}


class _Rows(Dataset[Any]):
    """A data set of dicts that fetches whole batches by its collator."""

    order: Callable[[int], Sequence[int]] | None = None
    lengths: Any = None  # (N,) where they are known

    def __init__(self, dataset: Any, collator: Collate, wanted: frozenset[str] | None) -> None:
        self.dataset, self.collator, self.wanted = dataset, collator, wanted
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            samples = list(self.dataset.__getitems__(indices))
        else:
            samples = [self.dataset[index] for index in indices]
        return _collate(samples, self.collator, self.wanted)

    def __getitem__(self, index: int) -> Any:
        return map_tensors(lambda tensor: tensor[0], self.__getitems__([index]))


class _TokenRows(_Rows):
    """Token columns read once into flat arrays, and batches padded from them: what the collator gives, without dicts of lists."""

    def __init__(self, rows: _Rows, table: pa.Table) -> None:
        super().__init__(rows.dataset, rows.collator, rows.wanted)
        self.tokens: dict[str, tuple[np.ndarray[Any, Any], int]] = {}
        self.numbers: dict[str, np.ndarray[Any, Any]] = {}
        tokenizer: Any = rows.collator.tokenizer  # type: ignore[attr-defined]
        self.left = tokenizer.padding_side == "left"
        fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0), "attention_mask": 0}
        widths = None
        for name in table.column_names:
            column = table[name]
            if column.null_count:
                raise _Unfit
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                flat, sizes = _flat(column)
                if name not in fills or fills[name] is None or not (widths is None or np.array_equal(widths, sizes)):
                    raise _Unfit
                widths = sizes
                self.tokens[name] = (flat, fills[name])
            elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                kind = np.int64 if pa.types.is_integer(column.type) else np.float32
                self.numbers["labels" if name in ("label", "label_ids") else name] = column.to_numpy().astype(kind)
            else:
                raise _Unfit
        if widths is None or "input_ids" not in self.tokens or len(widths) == 0:
            raise _Unfit
        self.lengths = self.sizes = widths
        self.starts = np.concatenate(([0], np.cumsum(widths)[:-1]))
        # a collator adds a mask where the data set has none
        self.adds_mask = "attention_mask" not in self.tokens and "attention_mask" in tokenizer.model_input_names

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> Any:
        starts, sizes = self.starts[indices].tolist(), self.sizes[indices].tolist()
        width = max(sizes)
        spans = [(row, width - size if self.left else 0, start, size) for row, (start, size) in enumerate(zip(starts, sizes, strict=True))]
        batch: dict[str, Tensor] = {}
        for name, (flat, fill) in self.tokens.items():
            if self.wanted is None or name in self.wanted:
                padded = np.full((len(spans), width), fill, dtype=np.int64)
                for row, place, start, size in spans:
                    padded[row, place : place + size] = flat[start : start + size]
                batch[name] = torch.from_numpy(padded)
        if self.adds_mask and (self.wanted is None or "attention_mask" in self.wanted):
            mask = np.zeros((len(spans), width), dtype=np.int64)
            for row, place, _, size in spans:
                mask[row, place : place + size] = 1
            batch["attention_mask"] = torch.from_numpy(mask)
        for name, values in self.numbers.items():
            if self.wanted is None or name in self.wanted:
                batch[name] = torch.from_numpy(values[indices])
        return batch


class _Unfit(Exception):
    """These columns are not for the fast path."""


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A column of lists of whole numbers as all its values and the size of each row."""
    if not pa.types.is_integer(column.type.value_type):
        raise _Unfit
    values, sizes = [], []
    for chunk in column.chunks:
        flat = chunk.flatten()
        if flat.null_count:
            raise _Unfit
        values.append(flat.to_numpy())
        sizes.append(np.diff(chunk.offsets.to_numpy()))
    return np.concatenate(values), np.concatenate(sizes)


def _read_once(rows: _Rows) -> _Rows:
    """The same rows read once, where columns and collator are plain; the collator's own batches of a few rows decide."""
    dataset, collator = rows.dataset, rows.collator
    plain = type(collator).__name__ == "DataCollatorWithPadding" and type(collator).__module__.startswith("transformers.")
    if not (plain and hasattr(dataset, "with_format") and getattr(dataset, "format", {}).get("type", "custom") in (None, "torch", "numpy")):
        return rows
    if getattr(collator, "padding", None) not in (True, "longest") or getattr(collator, "pad_to_multiple_of", 1) is not None:
        return rows
    try:
        fast = _TokenRows(rows, dataset.with_format("arrow")[:])
    except _Unfit:
        return rows
    tried = sorted({0, len(fast) - 1, int(np.argmin(fast.sizes)), int(np.argmax(fast.sizes))})
    mine, theirs = fast.__getitems__(tried), rows.__getitems__(tried)
    same = set(mine) == set(theirs) and all(mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name]) for name in mine)
    return fast if same else rows


@dataclass(frozen=True)
class _InOrder:
    """Rows as they stand, in every epoch. (A class, so that it can go to worker processes.)"""

    count: int

    def __call__(self, epoch: int) -> range:
        return range(self.count)


class _Stream(IterableDataset[Any]):
    """Samples that come one by one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


def _rows(dataset: Any, collator: Collate, wanted: frozenset[str] | None) -> Any:
    """A data set as the engine takes it: columns that the model does not know are left out."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return _Stream(dataset)
    columns = getattr(dataset, "column_names", None)
    if wanted is not None and isinstance(columns, list) and hasattr(dataset, "remove_columns"):
        kept = wanted | {"label", "label_ids"}
        if not kept & set(columns):
            raise DataError(
                f"columns (={', '.join(columns)}) hold nothing that the model's forward takes ({', '.join(sorted(wanted))}); "
                "tokenize the data set first, or pass remove_unused_columns=False"
            )
        dataset = dataset.remove_columns([name for name in columns if name not in kept])
    return _read_once(_Rows(dataset, collator, wanted))


# ------------------------------------------------------------------ arguments


def _refused(args: Any, callbacks: Sequence[Any]) -> list[str]:
    """What these arguments ask for and anyfit does not do, each with the way out."""
    found = []
    for field in dataclasses.fields(args):
        value = _word(getattr(args, field.name))
        if field.name in MAPPED or field.name in HARMLESS or value in (None, False, "", [], {}, _word(field.default)):
            continue
        if field.name == "include_num_input_tokens_seen" and value == "no":
            continue
        default = "its default" if field.default is dataclasses.MISSING else repr(_word(field.default))
        found.append(f"{field.name} (={value!r}): {WAYS.get(field.name, f'leave it at {default}')}")
    if _word(args.optim) not in ("adamw_torch", "adamw_torch_fused"):
        found.append(f"optim (={_word(args.optim)!r}): {WAYS['optim']}")
    if args.metric_for_best_model not in (None, "loss", "eval_loss") or args.greater_is_better:
        found.append(
            f"metric_for_best_model (={args.metric_for_best_model!r}, greater_is_better={args.greater_is_better}): the best model is that of "
            "the smallest evaluation loss; leave both out, or write an anyfit.Task whose evaluate() gives that figure as 'loss'"
        )
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        found.append(f"train_sampling_strategy (={args.train_sampling_strategy!r}): take 'random', 'sequential' or 'group_by_length'")
    if _word(args.lr_scheduler_type) == "greedy":
        found.append("lr_scheduler_type (='greedy'): take another, or pass optimizers=(optimizer, scheduler)")
    if args.data_seed not in (None, args.seed):
        found.append(f"data_seed (={args.data_seed}): one seed serves for all; leave it out")
    if getattr(args, "world_size", 1) > 1:
        found.append(f"world_size (={args.world_size}): start one process, not torchrun")
    for callback in callbacks:
        unused = [name for name in UNUSED_EVENTS if _overrides(callback, name)]
        if unused:
            found.append(f"callback {type(callback).__name__}.{unused[0]}: write an anyfit.Task with a train_step of its own")
    return found


def _defining(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _overrides(callback: Any, name: str) -> bool:
    """Whether a callback does something at an event; the class that all inherit does nothing."""
    base = _defining(type(callback), name)
    return base is not None and base.__name__ != "TrainerCallback"


def _is_a(callback: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(callback).__mro__)


@dataclass(frozen=True)
class _Timetable:
    """When things happen, in steps."""

    total: int
    per_epoch: int | None
    batches_per_epoch: int | None
    accumulate: int
    log_every: int | None  # None: not by steps
    log_epochs: bool
    log_first: bool
    evaluate_every: int | None

    @classmethod
    def of(cls, args: Any, rows: int | None) -> _Timetable:
        """What the arguments say for so many rows; None for a stream."""
        size, accumulate = args.train_batch_size, args.gradient_accumulation_steps
        per_epoch = batches = None
        if rows is not None:
            window = min(rows, size * accumulate)
            batches = rows // size if args.dataloader_drop_last else -(-rows // size)
            per_epoch = rows // window if args.dataloader_drop_last else -(-rows // window)
            if args.dataloader_drop_last and per_epoch != max(1, -(-batches // accumulate)):
                raise InputError(
                    f"dataloader_drop_last (=True) with gradient_accumulation_steps (={accumulate}) drops whole steps here; {rows} rows are "
                    f"{batches} batches, which is no multiple: leave one of the two out"
                )
        if args.max_steps > 0:
            total = args.max_steps
        elif per_epoch is None:
            raise InputError(f"max_steps (={args.max_steps}) must be given for a train_dataset without length")
        else:
            total = math.ceil(args.num_train_epochs * per_epoch)
        if total < 1:
            raise InputError(f"num_train_epochs (={args.num_train_epochs}) gives no step; give more, or max_steps")

        def whole(steps: float) -> int:
            return int(steps) if steps >= 1 else max(1, math.ceil(total * steps))

        logging_by, evaluation_by = _word(args.logging_strategy), _word(args.eval_strategy)
        if per_epoch is None and "epoch" in (logging_by, evaluation_by):
            raise InputError("eval_strategy and logging_strategy (='epoch') need a train_dataset with a length; take 'steps'")
        return cls(
            total,
            per_epoch,
            batches,
            accumulate,
            whole(args.logging_steps) if logging_by == "steps" else None,
            logging_by == "epoch",
            logging_by != "no" and args.logging_first_step,
            whole(args.eval_steps) if evaluation_by == "steps" else None,
        )

    def ends_epoch(self, step: int) -> bool:
        return self.per_epoch is not None and step % self.per_epoch == 0

    def logs(self, step: int) -> bool:
        """The last step is logged too, so that losses and evaluations pair up."""
        if self.log_every is None and not self.log_epochs:
            return False
        due = step % self.log_every == 0 if self.log_every else self.ends_epoch(step)
        return due or step == self.total or (self.log_first and step == 1)

    def epoch(self, step: int) -> float:
        """How many epochs `step` steps are, counted in batches."""
        if self.per_epoch is None or self.batches_per_epoch is None:
            return step / self.total
        whole, part = divmod(step, self.per_epoch)
        return whole + min(1.0, part * self.accumulate / max(1, self.batches_per_epoch))

    def wakes(self, *, each_step: bool, each_epoch: bool) -> int:
        """How often the engine has to tell of a step so that everything here gets its turn."""
        needs = [self.log_every] if self.log_every else []
        if self.per_epoch is not None and (each_epoch or self.log_epochs):
            needs.append(self.per_epoch)
        if each_step or self.log_first:
            needs.append(1)
        return math.gcd(*needs) if needs else self.total


# ------------------------------------------------------------------ the trainer


class _TrainerTask(TransformersTask):
    """The task of a `Trainer`: it trains the model itself, and calls what the trainer was given."""

    owner: ClassVar[Trainer]

    def build_model(self, schema: Schema) -> nn.Module:
        return self.owner.model

    def build_optimizer(self, model: nn.Module) -> Optimizer | dict[str, Optimizer]:
        return self.owner._optimizer_for(self, model)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | dict[str, Schedule] | None:
        given = self.owner._given_scheduler
        if given is None:
            built = super().build_schedule(optimizer, total_steps)
        else:
            built = Schedule(given, "evaluation" if isinstance(given, ReduceLROnPlateau) else "step")
        assert built is None or isinstance(built, Schedule)
        self.owner._schedule = built
        self.owner.lr_scheduler = None if built is None else built.scheduler
        return built

    def train_step(self, trainer: engine.Trainer, window: Iterable[Any]) -> Step | None:
        self.owner._before_step(trainer.position.step, trainer.position.offset)
        return super().train_step(trainer, window)

    def step(self, model: nn.Module, batch: Any) -> Step:
        count = self.count(batch)
        return Step(self.owner._loss(model, batch, count, return_outputs=False), count)

    def measured(self, model: nn.Module, batch: Any) -> tuple[Tensor | None, int | Tensor, Any]:
        self.owner._call("on_prediction_step")
        if not _is_labelled(batch, self.label_names):
            return None, 0, model(**batch)
        count = self.count(batch)
        loss, outputs = self.owner._loss(model, batch, count, return_outputs=True)
        return loss, count, outputs

    def shown(self, predictions: Any, labels: Any) -> Any:
        change = self.owner.preprocess_logits_for_metrics
        return predictions if change is None else change(predictions, labels)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Figures:
        return self.owner._figures(self, model, batches)


class Trainer:
    """`transformers.Trainer`, run by anyfit: one object that trains, evaluates, predicts and saves a model.

    The run folder is `args.output_dir` (none with save_strategy='no'): `train(resume_from_checkpoint=True)` goes on exactly where it
    was killed. Checkpoints are the last two and the best, at ends of epochs, at a new best and once a minute. The loss of a window or an
    evaluation is over all its rows (or tokens), not a mean of batch means. Losses that are not finite end a run.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Collate | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise InputError("model and model_init are two ways to give one model; pass one of them")
        self.args = _theirs("", "TrainingArguments")(output_dir="tmp_trainer") if args is None else args
        self.callbacks: list[Any] = []
        self._given_callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or ()]
        if refused := _refused(self.args, self._given_callbacks):
            raise InputError(f"{len(refused)} arguments cannot be honoured here: " + "; ".join(refused))
        if _word(self.args.eval_strategy) != "no" and eval_dataset is None:
            raise InputError(f"eval_strategy (={_word(self.args.eval_strategy)!r}) needs an eval_dataset; pass one, or eval_strategy='no'")
        if _word(self.args.eval_strategy) != "no" and isinstance(eval_dataset, dict) and not hasattr(eval_dataset, "column_names"):
            raise InputError(f"eval_dataset (= {', '.join(eval_dataset)}) must be one data set while training; evaluate() takes several")
        if model_init is not None and optimizers != (None, None):
            raise InputError("optimizers belong to one model and model_init makes new ones; pass model, or optimizer_cls_and_kwargs")
        if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
            raise InputError("optimizers and optimizer_cls_and_kwargs are two ways to give one optimizer; pass one of them")
        self.model_init = model_init
        self.model: nn.Module = self._fresh_model() if model is None else model
        if data_collator is None and hasattr(processing_class, "pad"):
            data_collator = _theirs(".data.data_collator", "DataCollatorWithPadding")(processing_class)
        self.data_collator: Collate = data_collator or _theirs(".data.data_collator", "default_data_collator")
        self.train_dataset, self.eval_dataset, self.processing_class = train_dataset, eval_dataset, processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self._given_scheduler, self._optimizer_class = optimizers[1], optimizer_cls_and_kwargs
        self._given_optimizer = optimizers[0]
        self._schedule: Schedule | None = None
        self._stopper: Any = None  # the callback that the plan's patience stands for
        self._step_size = 1
        self.label_names = list(self.args.label_names or _label_names(self.model))
        inner = _inner(self.model)
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _names(self.model).values())
        self.model_accepts_loss_kwargs = bool(getattr(inner, "accepts_loss_kwargs", takes_any))
        config: Any = getattr(self.model, "config", None)
        if config is not None:
            config.use_cache = self.args.use_cache
        if self.args.report_to:
            log.warning("report_to (=%s) is not written to; the run folder and callbacks tell of the run", self.args.report_to)
        self.run: Run | None = None
        self._last_pass: tuple[Figures, int, float] | None = None  # of an evaluation within `fit`, for its event
        self.is_in_train = False
        self.state = _theirs(".trainer_callback", "TrainerState")()
        self.control = _theirs(".trainer_callback", "TrainerControl")()
        self._times = _Timetable(0, None, None, 1, None, False, False, None)
        for callback in self._given_callbacks:
            self.add_callback(callback)
        self._loader: DataLoader[Any] | None = None
        self._reset()
        self._call("on_init_end")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        replaced = [name for name in UNUSED_METHODS if name in vars(cls)]
        if replaced:
            raise TaskError(
                f"{cls.__name__} replaces {', '.join(replaced)} of Trainer, which anyfit never calls; replace compute_loss, or write an "
                "anyfit.Task (from_transformers gives one to start from)"
            )

    # -------------------------------------------------------------- callbacks

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class of one. The plan itself does what DefaultFlowCallback is for."""
        callback = callback() if isinstance(callback, type) else callback
        if unused := [name for name in UNUSED_EVENTS if _overrides(callback, name)]:
            raise InputError(f"callback {type(callback).__name__} wants {unused[0]}, which has no place here; write an anyfit.Task")
        if not _is_a(callback, "DefaultFlowCallback"):
            self.callbacks.append(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, by itself or by its class, and return it."""
        found = next((one for one in self.callbacks if one is callback or (isinstance(callback, type) and isinstance(one, callback))), None)
        if found is not None:
            self.callbacks.remove(found)
        return found

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, by itself or by its class."""
        self.pop_callback(callback)

    def _call(self, event: str, **more: Any) -> None:
        """One event for all callbacks that want it."""
        for callback in self.callbacks:
            if callback is self._stopper or not _overrides(callback, event):
                continue
            answer = getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=None,
                eval_dataloader=self._loader,
                **more,
            )
            self.control = self.control if answer is None else answer
            self.control.should_save = False  # checkpoints are written without being asked for
            asked = [name for name in ("should_evaluate", "should_log", "should_epoch_stop") if getattr(self.control, name)]
            if asked:
                raise InputError(
                    f"callback {type(callback).__name__} set control.{asked[0]} in {event}, which cannot be honoured; say it with eval_steps, "
                    "logging_steps or control.should_training_stop"
                )

    def is_world_process_zero(self) -> bool:
        """True: one process trains."""
        return True

    def is_local_process_zero(self) -> bool:
        """True: one process trains."""
        return True

    # -------------------------------------------------------------- train

    def train(self, resume_from_checkpoint: bool | str | None = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> TrainOutput:
        """Train the model in place; with load_best_model_at_end it ends with the weights of the smallest evaluation loss.

        `resume_from_checkpoint`: True, or the output_dir of an earlier run.
        """
        if trial is not None or ignore_keys_for_eval is not None:
            raise InputError("trial and ignore_keys_for_eval cannot be honoured; leave them out")
        if self.train_dataset is None:
            raise InputError("train_dataset (=None) must be given to train")
        folder = self._folder(resume_from_checkpoint)
        if self.model_init is not None:
            self.model, self.optimizer, self.lr_scheduler = self._fresh_model(), None, None
        if self.processing_class is not None and hasattr(self.model, "config") and hasattr(self.processing_class, "pad"):
            _theirs(".trainer_utils", "align_special_tokens")(self.model, self.processing_class)
        rows = self._train_rows()
        count = len(rows) if isinstance(rows, _Rows) else None
        self._times = times = _Timetable.of(self.args, count)
        evaluates = _word(self.args.eval_strategy) != "no"
        self._loader = self._batches_of(self.eval_dataset) if evaluates else None
        self._stopper = self._plain_stopper()
        self.state = _theirs(".trainer_callback", "TrainerState")(
            max_steps=times.total,
            num_train_epochs=math.ceil(times.total / times.per_epoch) if times.per_epoch else 1,
            train_batch_size=self.args.train_batch_size,
            logging_steps=times.log_every or self.args.logging_steps,
            eval_steps=times.evaluate_every or self.args.eval_steps,
        )
        self.control.should_training_stop = False
        self._reset()
        started = time.monotonic()
        self.is_in_train = True
        try:
            self.run = fit(
                self._task(),
                rows,
                validation=self._loader,
                run=folder,
                resume=bool(resume_from_checkpoint),
                on_event=self._hear,
                **self._plan(count),
            )
        finally:
            self.is_in_train = False
        return self._finish(self.run, time.monotonic() - started)

    def _finish(self, run: Run, seconds: float) -> TrainOutput:
        """What follows the last step: the summary in the log, and the end of callbacks."""
        if run.stopped == "signal":  # the checkpoint is written; what the script would do next was not asked for
            if run.result["signal"] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + int(run.result["signal"]))
        if self._in_epoch:
            self._end_epoch()
        steps = self.state.global_step - self._first_step
        loss = self._all_losses / max(self._told - self._first_step, 1)
        metrics: Figures = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps * self._step_size / max(seconds, 1e-9), 3),
            "train_steps_per_second": round(steps / max(seconds, 1e-9), 3),
            "train_loss": loss,
        }
        self._log(metrics)
        self._call("on_train_end")
        return TrainOutput(self.state.global_step, loss, metrics)

    def _folder(self, resume: bool | str | None) -> Path | None:
        """The run folder; what is in it already is neither overwritten nor taken up without being asked for."""
        if _word(self.args.save_strategy) == "no":
            if resume:
                raise InputError("resume_from_checkpoint needs checkpoints, which save_strategy (='no') does not keep")
            return None
        folder = Path(self.args.output_dir)
        if isinstance(resume, str) and folder.resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
            raise InputError(
                f"resume_from_checkpoint (={resume!r}) must be True or in output_dir (={str(folder)!r}), where the run goes on"
            )
        exists = (folder / "run.json").exists()
        if resume and not exists:
            raise StateError(f"resume_from_checkpoint (={resume!r}): output_dir (={str(folder)!r}) holds no run; call train() without it")
        if exists and not resume:
            raise InputError(
                f"output_dir (={str(folder)!r}) holds a run already; train(resume_from_checkpoint=True) goes on with it, another "
                "output_dir starts anew, save_strategy='no' keeps nothing"
            )
        return folder

    def _fresh_model(self) -> nn.Module:
        assert self.model_init is not None
        with machine.own_random():
            machine.seed_all(self.args.seed)
            return self.model_init(None) if inspect.signature(self.model_init).parameters else self.model_init()

    def _wanted(self) -> frozenset[str] | None:
        if not self.args.remove_unused_columns:
            return None
        return frozenset(_names(self.model)) | frozenset(self.label_names)

    def _train_rows(self) -> Any:
        args = self.args
        rows = _rows(self.train_dataset, self.data_collator, self._wanted())
        if not isinstance(rows, _Rows):
            return rows
        if args.train_sampling_strategy == "sequential":
            rows.order = _InOrder(len(rows))
        elif args.train_sampling_strategy == "group_by_length":
            columns = getattr(self.train_dataset, "column_names", None) or ()
            if args.length_column_name in columns:
                rows.lengths = [int(length) for length in self.train_dataset[args.length_column_name]]
            elif rows.lengths is None:
                name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
                rows.lengths = [len(self.train_dataset[index][name]) for index in range(len(rows))]
        return rows

    def _batches_of(self, dataset: Any) -> DataLoader[Any]:
        """Batches for evaluation, in the order of rows. The generator is its own: a pass must not move the one that training draws from."""
        wanted = self._wanted()
        return DataLoader(
            _rows(dataset, self.data_collator, wanted),
            batch_size=self.args.eval_batch_size,
            collate_fn=partial(_collate, collator=self.data_collator, wanted=wanted),
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )

    def _plan(self, count: int | None) -> dict[str, Any]:
        args, times = self.args, self._times
        size = args.train_batch_size
        self._step_size = min(count or size * times.accumulate, size * times.accumulate)
        stopper = self._stopper
        return {
            "steps": times.total,
            "batch_size": size if count is None else min(size, count),
            "accumulate": times.accumulate,
            "evaluate_every": times.evaluate_every,
            "best": bool(args.load_best_model_at_end),
            "patience": None if stopper is None else stopper.early_stopping_patience,
            "clip": args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
            "precision": self._precision(),
            "dtype": _dtype(self.model),
            "device": str(args.device),
            "seed": args.seed,
            "bucket": count is not None and args.train_sampling_strategy == "group_by_length",
            "drop_last": bool(args.dataloader_drop_last),
            "workers": args.dataloader_num_workers,
            "log_every": times.wakes(each_step=self._anyone("on_step_end"), each_epoch=self._anyone("on_epoch_end")),
        }

    def _precision(self) -> str:
        return "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"

    def _anyone(self, event: str) -> bool:
        return any(_overrides(callback, event) for callback in self.callbacks)

    def _plain_stopper(self) -> Any:
        """An EarlyStoppingCallback that the plan's patience stands for; one with a threshold counts by itself, as transformers does."""
        if not self.args.load_best_model_at_end:
            return None
        for callback in self.callbacks:
            if type(callback).__name__ == "EarlyStoppingCallback" and not callback.early_stopping_threshold:
                return callback
        return None

    def _task(self) -> _TrainerTask:
        args = self.args
        made = _Parts(self.model, self.data_collator, self.compute_metrics, Plan(), not args.remove_unused_columns)

        class OfTrainer(_TrainerTask):
            parts = made
            owner = self

        return OfTrainer(
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            epsilon=args.adam_epsilon,
            schedule=_word(args.lr_scheduler_type),
            schedule_options=args.lr_scheduler_kwargs or None,
            warmup_steps=args.warmup_steps,
            label_names=tuple(self.label_names),
        )

    def _optimizer_for(self, task: TransformersTask, model: nn.Module) -> Optimizer:
        if self._given_optimizer is not None:
            made = self._given_optimizer
        elif self._optimizer_class is not None:
            kind, options = self._optimizer_class
            made = kind(_groups(model, task.weight_decay), **options)
        else:
            built = TransformersTask.build_optimizer(task, model)
            assert isinstance(built, Optimizer)
            made = built
        self.optimizer = made
        return made

    # -------------------------------------------------------------- loss and figures

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | Tensor | None = None
    ) -> Any:
        """The loss of a batch as a mean over `num_items_in_batch`; replace it in a subclass for a loss of your own."""
        if self.compute_loss_func is not None:
            labels = inputs.pop("labels", None)
            outputs = model(**inputs)
            loss: Tensor | None = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            outputs = model(**inputs)
            loss = _loss_of(outputs)
        if loss is None:
            raise TaskError(
                f"model (a {type(model).__name__}) gave no loss from {', '.join(inputs)}; give its labels a name of its forward "
                f"({', '.join(_names(model))}), or pass compute_loss_func"
            )
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: nn.Module, batch: Any, count: int | Tensor, *, return_outputs: bool) -> Any:
        knows = self.compute_loss_func is not None or self.model_accepts_loss_kwargs
        return self.compute_loss(model, dict(batch), return_outputs=return_outputs, num_items_in_batch=count if knows else None)

    def _figures(self, task: TransformersTask, model: nn.Module, batches: Iterable[Any]) -> Figures:
        """An evaluation within `fit`. The one at its end is of weights whose figures are known, where this process measured them."""
        known = self._best_figures if self.args.load_best_model_at_end else self._figures_at.get(self.state.global_step)
        if self._stopped and known is not None:
            return known
        compute = None if self.args.prediction_loss_only else self.compute_metrics
        begun = time.monotonic()
        passed = task.passed(model, batches, keep=compute is not None)
        found = passed.figures(compute)
        self._last_pass = (found, passed.rows, time.monotonic() - begun)
        return found

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Figures:
        """Loss and metrics of `eval_dataset` (a dict of several: each under its name), under names that start with the prefix."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("eval_dataset (=None) must be given to evaluate")
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        passed, seconds = self._pass(dataset, ignore_keys, keep=self.compute_metrics is not None and not self.args.prediction_loss_only)
        metrics = self._named(passed.figures(self.compute_metrics), passed.rows, seconds, metric_key_prefix)
        self._log(metrics)
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predictions, labels and metrics of `test_dataset` as numpy; its labels may be absent."""
        passed, seconds = self._pass(test_dataset, ignore_keys, keep=True)
        metrics = self._named(passed.figures(self.compute_metrics), passed.rows, seconds, metric_key_prefix)
        self._call("on_predict", metrics=metrics)
        return PredictionOutput(passed.predictions, passed.labels, metrics)

    def _pass(self, dataset: Any, ignore_keys: Any, *, keep: bool) -> tuple[_Passed, float]:
        if ignore_keys is not None:
            raise InputError(f"ignore_keys (={ignore_keys!r}) cannot be honoured; set model.config.keys_to_ignore_at_inference")
        self._loader = self._batches_of(dataset)
        task, device = self._task(), torch.device(str(self.args.device))
        self.model.to(device)
        plan = Plan().updated(dtype=_dtype(self.model), precision=self._precision())
        begun = time.monotonic()
        with machine.own_random(), machine.autocast(plan, device), torch.no_grad(), evaluating(self.model):
            passed = task.passed(self.model, make_batches(self._loader, plan, self.data_collator, device=device), keep=keep)
        return passed, time.monotonic() - begun

    def _named(self, figures: Figures, rows: int, seconds: float, prefix: str) -> Figures:
        """Figures under transformers' names."""
        shown = {name: value for name, value in figures.items() if name != "rows" and not (name == "loss" and value is None)}
        named = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in shown.items()}
        named[f"{prefix}_runtime"] = round(seconds, 4)
        named[f"{prefix}_samples_per_second"] = round(rows / max(seconds, 1e-9), 3)
        named[f"{prefix}_steps_per_second"] = round(-(-rows // self.args.eval_batch_size) / max(seconds, 1e-9), 3)
        return named

    # -------------------------------------------------------------- events

    def _reset(self) -> None:
        """What is counted during one training."""
        self._told = self._first_step = 0  # steps whose loss an event has told
        self._losses: list[tuple[float, int]] = []  # mean losses since the last line of the log, and of how many steps
        self._all_losses = 0.0
        self._in_epoch = self._stopped = False
        self._figures_at: dict[int, Figures] = {}
        self._best_figures: Figures | None = None
        self._last_pass = None

    def _hear(self, event: Mapping[str, Any]) -> str | None:
        """An event of `fit`; the answer "stop" ends the training after it."""
        kind = event["event"]
        if kind == "notice":
            log.warning("%s", event["text"])
        elif kind == "start":
            self._started(event)
        elif kind == "step":
            self._stepped(event)
        elif kind == "evaluate" and event["split"] == "validation":
            self._evaluated(event)
        elif kind == "checkpoint":
            self._call("on_save")
        elif kind == "stop":
            self._stopped = event["reason"] != "signal"
        return "stop" if self.control.should_training_stop else None

    def _started(self, event: Mapping[str, Any]) -> None:
        if event["step"]:
            self._replay(Path(self.args.output_dir) / "metrics.jsonl")
        self._first_step = self._told = self.state.global_step = int(event["step"])
        self._all_losses = 0.0
        self._call("on_train_begin")

    def _replay(self, path: Path) -> None:
        """Log and best of a run that goes on, from its record. Of the callbacks only an early stop has to know."""
        callbacks, self.callbacks = self.callbacks, [one for one in self.callbacks if type(one).__name__ == "EarlyStoppingCallback"]
        try:
            for line in path.read_bytes().splitlines():
                event = parse(line, str(path))
                if event["event"] == "step":
                    self._stepped(event)
                elif event["event"] == "evaluate" and event["split"] == "validation":
                    self._evaluated(event)
        finally:
            self.callbacks = callbacks
        self.control.should_training_stop = self._in_epoch = False

    def _before_step(self, step: int, offset: int) -> None:
        self.state.global_step = step
        if offset == 0 or not self._in_epoch:
            self._in_epoch, self.state.epoch = True, self._times.epoch(step)
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def _stepped(self, event: Mapping[str, Any]) -> None:
        step, times, by_epoch = int(event["step"]), self._times, self._times.log_epochs
        self._losses.append((float(event["loss"]), step - self._told))
        self._all_losses += float(event["loss"]) * (step - self._told)
        self._told = self.state.global_step = step
        self.state.epoch = times.epoch(step)
        self._call("on_step_end")
        ends = self._in_epoch and times.ends_epoch(step)
        if ends and by_epoch:
            self._end_epoch()
        if times.logs(step) and self._losses:
            steps = sum(count for _, count in self._losses)
            loss = sum(value * count for value, count in self._losses) / max(steps, 1)
            self._losses = []
            self._log({"loss": loss, "learning_rate": self._rate(step, float(event["lr"]))})
        if self._in_epoch and ends and not (times.evaluate_every and self._evaluates(step)):
            self._end_epoch()

    def _evaluates(self, step: int) -> bool:
        every = self._times.evaluate_every
        return step == self._times.total or (every is not None and step % every == 0)

    def _end_epoch(self) -> None:
        self._in_epoch = False
        self._call("on_epoch_end")

    def _rate(self, step: int, now: float) -> float:
        """The rate that a step was taken with; an event tells that of the next one."""
        scheduler = None if self._schedule is None else self._schedule.scheduler
        return scheduler.rates[0] * scheduler.factor(step - 1) if isinstance(scheduler, Factor) else now

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        step = self.state.global_step = int(event["step"])
        self.state.epoch = self._times.epoch(step)
        if self._last_pass is None:  # of an earlier process
            figures = {name: value for name, value in event.items() if name not in ("event", "step", "epoch", "split", "best")}
            rows, seconds = int(event.get("rows") or 0), 0.0
        else:
            figures, rows, seconds = self._last_pass
            self._figures_at, self._last_pass = {step: figures}, None
            self._best_figures = figures if event["best"] else self._best_figures
        metrics = self._named(figures, rows, seconds, "eval")
        self._log(metrics)
        self._call("on_evaluate", metrics=metrics)
        if self.args.metric_for_best_model is not None and (self.state.best_metric is None or figures["loss"] < self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = figures["loss"], step
            if self.args.load_best_model_at_end:
                self.state.best_model_checkpoint = str(Path(self.args.output_dir) / "checkpoints" / "best.safetensors")
        if self._in_epoch and self._times.ends_epoch(step):
            self._end_epoch()

    def _log(self, logs: Figures) -> None:
        """A line of the log, under transformers' names."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._call("on_log", logs=logs)

    # -------------------------------------------------------------- save

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model (and tokenizer) to a folder from which `from_pretrained` reads."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(str(folder))
        else:
            with atomic(folder / "model.safetensors") as temporary:
                save_tensors(self.model, str(temporary), metadata={"format": "pt"})
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(folder))
