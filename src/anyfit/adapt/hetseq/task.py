"""HetSeq's Task, Dataset, optimizer and scheduler as an anyfit task and the rows that belong to it."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from anyfit import machine
from anyfit.adapt.hetseq.optimizers import build_optimizer, build_schedules, defined
from anyfit.adapt.hetseq.options import json_values, plan_of
from anyfit.errors import DataError, TaskError
from anyfit.load import module_of
from anyfit.schedule import Schedule
from anyfit.schema import Schema
from anyfit.task import Step, Task
from anyfit.tree import first_tensor
from anyfit.values import Plan

__all__ = ["HetSeq", "HetSeqRows", "from_hetseq"]

LOGGED = ("nsentences", "loss", "nll_loss", "ntokens", "sample_size")  # what HetSeq's log tells of every step


class _Theirs(NamedTuple):
    """A HetSeq task and the one namespace that its classes share and may add to."""

    task: Any
    args: argparse.Namespace


class HetSeq(Task):
    """HetSeq's classes as a task: `task`, `optimizer` and `scheduler` are references (file.py:Class, module:Class), `args` its options.

    - `setup_task`, `build_model` and `load_dataset` are called as they stand; `rows(split)` gives a data set as `anyfit.fit` takes it.
    - The model returns its loss, a mean over the rows of a batch, alone or first in a tuple. A `train_step` that the task's class has of
      its own is called, and gives count and logs too; what it hands to `optimizer.backward` is its loss. `reduction="sum"`: losses are
      sums over that count.
    - Without `optimizer` and `scheduler`, the options say which of HetSeq's they are; the plan is that of `plan_of(args)`.
    - `limit` says which of max_epoch and max_update ends the training where the options have both; `from_hetseq` finds out.
    """

    task: str
    args: dict[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    scheduler: str | None = None
    reduction: Literal["mean", "sum"] = "mean"
    limit: Literal["max_epoch", "max_update"] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what a worker process needs of the rest, the rows bring along."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def classes(self) -> tuple[type, ...]:
        named = {"task": self.task, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return tuple(_found(reference, what) for what, reference in named.items() if reference is not None)

    @functools.cached_property
    def _theirs(self) -> _Theirs:
        cls = _found(self.task, "task")
        for name, wants in (("build_model", "args"), ("load_dataset", "split")):
            if not callable(getattr(cls, name, None)):
                raise TaskError(f"task (={self.task!r}) defines no {name}({wants}), which a HetSeq task has; define it")
        if defined(cls, ("get_batch_iterator",), alone=True):
            raise TaskError(
                f"task (={self.task!r}) has a get_batch_iterator of its own, but batches are cut by anyfit, so that ranks can share them; leave it out, "
                "and give the data set ordered_indices(), num_tokens(index) and collater(samples)"
            )
        # a copy: classes add to the namespace, and fields of a task do not change
        args = argparse.Namespace(**copy.deepcopy(self.args))
        return _Theirs(cls.setup_task(args) if hasattr(cls, "setup_task") else cls(args), args)

    @functools.cached_property
    def _train_step(self) -> Callable[..., Any] | None:
        """A train_step of the class's own; that of the base which all HetSeq tasks share is not asked."""
        own = defined(_found(self.task, "task"), ("train_step",), alone=True)
        return self._theirs.task.train_step if own else None

    def plan(self) -> Plan:
        args = {name: value for name, value in self.args.items() if self.limit in (None, name) or name not in ("max_epoch", "max_update")}
        taken = plan_of(args)
        if taken.refused:
            count = f"{len(taken.refused)} options of HetSeq" if len(taken.refused) > 1 else "an option of HetSeq"
            raise TaskError(f"{count} cannot be honoured:\n  " + "\n  ".join(taken.refused))
        return Plan().updated(**taken.plan)

    def rows(self, split: str | None = None) -> HetSeqRows:
        """The data set of a split (None: that of `--train-subset`), loaded once."""
        name = str(self.args.get("train_subset", "train")) if split is None else split
        theirs = self._theirs.task
        if not isinstance(getattr(theirs, "datasets", None), dict):
            raise TaskError(f"task (={self.task!r}) has no dict `datasets`; make it in __init__, and let load_dataset(split) fill it")
        if name not in theirs.datasets:
            try:
                theirs.load_dataset(name)
            except NotImplementedError as error:
                raise TaskError(f"task (={self.task!r}) defines no load_dataset(split); define it, filling self.datasets[split]") from error
            except Exception as error:
                raise DataError(
                    f"split (={name!r}): load_dataset of {self.task} fails: {type(error).__name__}: {error}; give a split that it has, or other options"
                ) from error
        if name not in theirs.datasets:
            filled = ", ".join(map(str, theirs.datasets)) or "nothing"
            raise DataError(f"split (={name!r}): load_dataset of {self.task} filled {filled}; it must set self.datasets[{name!r}]")
        return HetSeqRows(theirs.datasets[name], seed=int(self.args.get("seed") or 0))

    def collate(self, samples: list[Any]) -> Any:
        if not isinstance(samples[0], _Sample):  # rows of another origin
            return super().collate(samples)
        return samples[0].rows.collate([sample.value for sample in samples])

    def build_model(self, schema: Schema) -> nn.Module:
        theirs = self._theirs
        try:
            model: nn.Module = theirs.task.build_model(theirs.args)
        except NotImplementedError as error:
            raise TaskError(f"task (={self.task!r}) defines no build_model(args), which a HetSeq task has; define it") from error
        return model

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, list | tuple) else model(batch)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        first = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
        first = first.get("loss") if isinstance(first, Mapping) else getattr(first, "loss", first)
        if not isinstance(first, Tensor) or first.numel() != 1:
            what = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
            raise TaskError(
                f"the model of {self.task} returned {what}; HetSeq's models return their loss: one number, or a tuple (loss, outputs)"
            )
        count = int(first_tensor(batch).shape[0])
        return first.reshape(()) / (count if self.reduction == "sum" else 1), count

    def step(self, model: nn.Module, batch: Any) -> Step:
        if self._train_step is not None:
            return self._own_step(model, batch)
        step = super().step(model, batch)
        # for metrics, if they belong together: BERT has outputs for words, and a last label for the pair of sentences
        outputs, targets = step.outputs, step.targets
        paired = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.shape in (outputs.shape, outputs.shape[:-1])
        return step if paired else Step(step.loss, step.count)

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        if self._train_step is None:
            return self.step(model, batch)
        with _mode_kept(model):
            return self._own_step(model, batch)

    def _own_step(self, model: nn.Module, batch: Any) -> Step:
        """A train_step that is the task's own: it hands its loss to an optimizer that keeps it for the engine."""
        assert self._train_step is not None
        kept = _Backward(self.task)
        given = self._train_step(batch, model, kept, False)
        if not kept.losses:
            raise TaskError(
                f"train_step of {self.task} did not call optimizer.backward(loss); the engine takes the loss from there, so call it in place of "
                "loss.backward(), or write an anyfit.Task with a train_step of its own"
            )
        loss: Any = sum(kept.losses[1:], start=kept.losses[0])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TaskError(
                f"train_step of {self.task} gave optimizer.backward a {type(loss).__name__} that is not one number; give it the loss"
            )
        if not (isinstance(given, tuple) and len(given) == 3 and isinstance(given[2], Mapping)):
            raise TaskError(f"train_step of {self.task} returned a {type(given).__name__}; return (loss, sample_size, logging_output)")
        _, count, logging = given
        if isinstance(count, bool) or not isinstance(count, int | float | Tensor):
            raise TaskError(f"train_step of {self.task} returned sample_size (={count!r}); it must be what its loss is a mean over")
        if self.reduction == "sum":
            loss = loss / count
        logs = {str(name): _number(value, loss) for name, value in logging.items() if name not in LOGGED and _is_number(value)}
        return Step(loss.reshape(()), torch.tensor(count) if isinstance(count, float) else count, logs=logs or None)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        cls = None if self.optimizer is None else _found(self.optimizer, "optimizer")
        built = build_optimizer(cls, self._theirs.args, model)
        if built is None:
            default = super().build_optimizer(model)
            assert isinstance(default, Optimizer)
            return default
        return built

    def build_schedule(self, optimizer: Any, total_steps: int) -> dict[str, Schedule]:
        cls = None if self.scheduler is None else _found(self.scheduler, "scheduler")
        theirs = self._theirs
        updated = theirs.task.update_step if defined(type(theirs.task), ("update_step",), alone=True) else None
        return build_schedules(cls, theirs.args, optimizer, updated)


def from_hetseq(
    task: type | str,
    args: argparse.Namespace | Mapping[str, Any],
    *,
    optimizer: type | str | None = None,
    scheduler: type | str | None = None,
    split: str | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[HetSeq, HetSeqRows]:
    """A task and its training rows from HetSeq's classes (or references to them) and its options: `anyfit.fit(task, rows)`.

    Other splits: `task.rows("valid")`. See `HetSeq` for what is done with each class, `plan_of` for the options.
    """
    values = json_values(args)
    made = HetSeq(
        task=_reference(task, "task"),
        args=values,
        optimizer=None if optimizer is None else _reference(optimizer, "optimizer"),
        scheduler=None if scheduler is None else _reference(scheduler, "scheduler"),
        reduction=reduction,
    )
    rows = made.rows(split)
    if values.get("max_epoch") and values.get("max_update"):
        ends = plan_of(values, len(rows)).plan
        limit: Any = "max_epoch" if "epochs" in ends else "max_update" if "steps" in ends else None
        loaded, made = made._theirs, made.replaced(limit=limit)
        vars(made)["_theirs"] = loaded  # the data sets are read already
    made.plan()  # refuses what cannot be honoured
    return made, rows


class HetSeqRows(Dataset[Any]):
    """A HetSeq data set in the order of its `ordered_indices`, which training shuffles by the plan's seed; batches are its `collater`'s."""

    def __init__(self, dataset: Any, *, seed: int = 0) -> None:
        name = type(dataset).__name__
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                raise DataError(f"data set (a {name}) defines no {method}, which a HetSeq data set has; define it")
        self.dataset, count = dataset, len(dataset)
        given: Any = np.arange(count)
        if hasattr(dataset, "ordered_indices"):
            with machine.own_random():  # every rank must see one order, as HetSeq takes care of too
                np.random.seed(seed % 2**32)
                given = dataset.ordered_indices()
        listed = np.asarray(given)
        if listed.dtype.kind not in "iu" and listed.size:
            raise DataError(f"ordered_indices of data set (a {name}) gave {listed.dtype} (={given!r:.80}); give whole numbers")
        self.indices = torch.from_numpy(listed.astype(np.int64))
        if self.indices.dim() != 1 or not len(self.indices):
            raise DataError(f"data set (a {name}) has no rows: its length is {count}, and ordered_indices gave {tuple(self.indices.shape)}")
        if int(self.indices.min()) < 0 or int(self.indices.max()) >= count:
            wrong = int(self.indices.max() if int(self.indices.min()) >= 0 else self.indices.min())
            raise DataError(f"ordered_indices of data set (a {name}) gave {wrong}; its {count} samples are 0 to {count - 1}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> _Sample:
        return _Sample(self.dataset[int(self.indices[index])], self)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens of each sample, where the data set tells."""
        if not hasattr(self.dataset, "num_tokens"):
            raise AttributeError("lengths")
        found = [self.dataset.num_tokens(index) for index in self.indices.tolist()]
        wrong = next((place for place, tokens in enumerate(found) if not isinstance(tokens, int | np.integer) or tokens < 0), None)
        if wrong is not None:
            raise DataError(
                f"num_tokens({int(self.indices[wrong])}) of data set (a {type(self.dataset).__name__}) gave {found[wrong]!r}; it must be a whole number"
            )
        return torch.tensor(found, dtype=torch.int64)

    def set_epoch(self, epoch: int) -> None:
        """HetSeq counts epochs from 1."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch + 1)

    def collate(self, samples: list[Any]) -> Any:
        """The data set's own batch; torch's default where it has no collater."""
        batch = getattr(self.dataset, "collater", default_collate)(samples)
        if batch is None:
            raise DataError(f"collater of data set (a {type(self.dataset).__name__}) gave None for {len(samples)} samples; give a batch")
        return batch


class _Sample(Mapping[str, Any]):
    """A sample as the data set gave it, and whose it is; seen from outside, its parts by name."""

    __slots__ = ("rows", "value")

    def __init__(self, value: Any, rows: HetSeqRows) -> None:
        self.value, self.rows = value, rows

    def _named(self) -> dict[str, Any]:
        if isinstance(self.value, Mapping):
            return dict(self.value)
        parts = list(self.value) if isinstance(self.value, list | tuple) else [self.value]
        names = ["input", *(f"input{index}" for index in range(1, len(parts)))]
        if len(parts) > 1:
            names[-1] = "target"
        return dict(zip(names, parts, strict=True))

    def __getitem__(self, name: str) -> Any:
        return self._named()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named())

    def __len__(self) -> int:
        return len(self._named())


class _Backward:
    """What a train_step meets in place of its optimizer."""

    def __init__(self, owner: str) -> None:
        self.owner, self.losses = owner, list[Tensor]()

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def __getattr__(self, name: str) -> Any:
        raise TaskError(
            f"train_step of {self.owner} asks for optimizer.{name}, but the engine divides, clips and steps; call optimizer.backward(loss) alone, "
            "or write an anyfit.Task with a train_step of its own"
        )


@contextlib.contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    """`model.train()` within an evaluation changes nothing."""
    vars(model)["train"] = lambda mode=True: model
    try:
        yield
    finally:
        del vars(model)["train"]


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def _number(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device).detach().reshape(()).to(like.dtype)


# References


def _reference(given: Any, what: str) -> str:
    """How another process finds a class again."""
    if isinstance(given, str):
        return given
    if not isinstance(given, type):
        raise TaskError(f"{what} (a {type(given).__name__}) must be a class, or a reference to one: file.py:Class")
    if "<locals>" in given.__qualname__:
        raise TaskError(
            f"{what} (={given.__qualname__}) is defined within a function, where nothing finds it again; move it to the top of a file"
        )
    file = getattr(sys.modules.get(given.__module__), "__file__", None)
    if file and (given.__module__ == "__main__" or given.__module__.startswith("anyfit_task_")):
        return f"{Path(file).resolve()}:{given.__qualname__}"
    return f"{given.__module__}:{given.__qualname__}"


def _found(reference: str, what: str) -> type:
    """The class of a reference. A file that runs as the main program is not run a second time."""
    place, colon, member = reference.rpartition(":")
    if not colon:
        raise TaskError(f"{what} (={reference!r}) must be file.py:Class or module:Class")
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if place.endswith(".py") and main is not None and Path(main).resolve() == Path(place).resolve():
        module = sys.modules["__main__"]
    else:
        module = module_of(place)
    found: Any = module
    for part in member.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise TaskError(f"{what} (={reference!r}): {place} has no class {member!r}")
    return found
