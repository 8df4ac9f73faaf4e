"""The methods of a LightningModule as those of a task, and what the module meets instead of Lightning's Trainer."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anyfit.adapt.lightning.optimizers import configured, spelled
from anyfit.errors import InputError, TaskError
from anyfit.schedule import Schedule
from anyfit.schema import Schema
from anyfit.task import Step, Task
from anyfit.tree import first_tensor, wide
from anyfit.values import Plan, canonical

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anyfit.engine import Trainer

__all__ = ["LightningTask", "Notes", "from_lightning"]

STAGES, MOMENTS = ("validation", "test", "predict"), ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "teardown")
# What Lightning would call and anyfit does not. Hooks that Lightning 2 refuses stand here too.
REFUSED = (
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_validation_model_zero_grad"),
    *(f"on_{stage}_{moment}" for stage in STAGES for moment in (*MOMENTS, "model_eval", "model_train")),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "backward", "optimizer_step"),
    *("optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping", "clip_gradients"),
    *("configure_callbacks", "configure_model", "configure_sharded_model", "on_save_checkpoint", "on_load_checkpoint"),
    *(*TRANSFERS, "log", "log_dict"),
    *(f"{stage}_{end}" for stage in ("training", "validation", "test") for end in ("step_end", "epoch_end")),
)
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
THEIRS = ("lightning.pytorch.core.", "lightning.fabric.", "pytorch_lightning.core.", "lightning_fabric.", "torch.")
LOSSES = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "test_loss", "test/loss", "loss")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def from_lightning(module: nn.Module, *, monitor: str | None = None, **plan: Any) -> LightningTask:
    """A task that trains a copy of `module`, each time from the weights that it has now.

    `monitor` names the logged value that is the loss of an evaluation (lower is better); without it that is what `validation_step`
    returns or, where it returns none, what it logs as its loss. `plan`: the task's defaults; the model keeps its own floating type.
    What the task does with each method: see `LightningTask`.
    """
    cls = type(module)
    if not isinstance(module, nn.Module):
        raise TaskError(f"module (a {cls.__name__}) must be a LightningModule that is made already; give an object of a torch.nn.Module")
    for name in ("training_step", "configure_optimizers"):
        if not _defined(module, name):
            raise TaskError(f"{cls.__name__} defines no {name}, which from_lightning needs; define it, or write an anyfit.Task")
    if not getattr(module, "automatic_optimization", True):
        raise TaskError(
            f"{cls.__name__} sets automatic_optimization = False; anyfit takes the optimizer steps here. Write an anyfit.Task with a "
            "train_step of its own for several optimizers or passes"
        )
    _refuse_hooks(module, REFUSED, "from_lightning")
    arities = {name: _arity(module, name) for name in STEPS if _defined(module, name)}
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    defaults = Plan().updated(**{"dtype": DTYPES.get(kind, "float32"), **plan})
    # a class of its own, so that errors and records name the module, and a resume with other code of it is refused; `<locals>` says
    # that no name finds it again
    space = {
        "__module__": __package__,
        "__qualname__": f"{from_lightning.__qualname__}.<locals>.{cls.__name__}#{_code(cls)[:12]}",
        "__doc__": f"The LightningModule {cls.__module__}:{cls.__qualname__} as a task.",
        "_module": _copied(module),
        "_defaults": defaults,
        "_monitor": monitor,
        "_arities": arities,
    }
    return cast("type[LightningTask]", type(cls.__name__, (LightningTask,), space))(hparams=_hparams(module))


class LightningTask(Task):
    """What `from_lightning` makes.

    - `training_step(batch, batch_idx)` gives the loss of a batch; its count is the number of rows, so `accumulate` divides once by all
      rows where Lightning would take the mean of the batches' means.
    - Evaluation uses `validation_step` for every split, test rows too; only where it is not defined, `test_step`.
    - Prediction uses `predict_step` (its `batch_idx` is always 0), else `forward` with the inputs of the batch, without its target.
    - `configure_optimizers` may give one optimizer with schedulers in any of the documented forms. `self.log` and `self.log_dict` go to
      the run's log: means over rows, or over `batch_size`; torchmetrics objects are computed over a whole evaluation.
    - `prepare_data` and `setup("fit")` are called on each model that is built. The module's own loaders, or those of a data module, are
      used through `anyfit.fit(task, **task.sources())` alone.
    - `current_epoch` and `global_step` are those of the training that goes on in this process, and 0 before it.

    The task lives in no file: `anyfit.open_run`, `evaluate` and `predict` of a run folder need it as `task=`, the command line cannot
    name it, and neither a cluster nor sites in other processes can be sent it. Attributes of the module that are neither parameters nor
    buffers are not in a checkpoint.
    """

    hparams: dict[str, Any] = field(default_factory=dict)  # what the module saved of its hyperparameters: a record, not a knob
    _module: ClassVar[nn.Module]
    _defaults: ClassVar[Plan] = Plan()
    _monitor: ClassVar[str | None] = None
    _arities: ClassVar[Mapping[str, int]] = {}

    def plan(self) -> Plan:
        return self._defaults

    def build_model(self, schema: Schema) -> nn.Module:
        if self.hparams != _hparams(self._module):
            raise TaskError("hparams of a LightningModule are only recorded; make it anew with other values, then from_lightning(module)")
        model: Any = _attached(_copied(self._module))
        _prepare(model, "fit")
        return cast(nn.Module, model)

    def sources(self, data_module: Any = None) -> dict[str, Any]:
        """The loaders of the module, or of a LightningDataModule, as the arguments data, validation and test of `anyfit.fit`."""
        if data_module is None:
            owner: Any = self.build_model(Schema(()))
        else:
            owner = data_module
            _refuse_hooks(owner, (*TRANSFERS, "state_dict", "load_state_dict"), "sources")
            _prepare(owner, "fit")
        if _defined(owner, "test_dataloader"):
            _prepare(owner, "test")
        found: dict[str, Any] = {}
        for name, method in (("data", "train_dataloader"), ("validation", "val_dataloader"), ("test", "test_dataloader")):
            if not _defined(owner, method):
                continue
            loader = getattr(owner, method)()
            if isinstance(loader, list | tuple | Mapping):
                if len(loader) != 1:
                    raise TaskError(
                        f"{method} of {type(owner).__name__} gives {len(loader)} loaders; give one, and evaluate on the others with "
                        "anyfit.evaluate(run, loader)"
                    )
                loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
            found[name] = loader
        if "data" not in found:
            raise TaskError(f"{type(owner).__name__} defines no train_dataloader; pass the data to anyfit.fit itself")
        return found

    def step(self, model: nn.Module, batch: Any) -> Step:
        loss, logged = self._call(model, "training_step", batch)
        if loss is None:
            raise TaskError(
                f"training_step of {type(self).__name__} returned None; anyfit skips no batch, so return a loss (times 0 to learn nothing)"
            )
        logs: dict[str, Tensor] = {}
        for name, entry in logged.items():
            value = entry.value
            if not isinstance(value, Tensor):  # a metric: what its call gave for this batch
                value = _number(name, getattr(entry.value, "_forward_cache", None))
                entry.value.reset()  # states for an epoch's end that does not come would pile up
            logs[name] = value.to(loss.device)
        return Step(loss, _rows_of(batch), logs=logs or None)

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        name = next((name for name in ("validation_step", "test_step") if name in self._arities), None)
        if name is None:
            raise TaskError(
                f"{type(self).__name__} defines neither validation_step nor test_step, so it cannot be evaluated; define one, or leave out "
                "validation, test, best and patience"
            )
        loss, logged = self._call(model, name, batch)
        notes, count, logs = _notes_of(model), _rows_of(batch), dict[str, Tensor]()
        for key, entry in logged.items():
            if isinstance(entry.value, Tensor):
                logs[key] = entry.value
                notes.add(key, entry.value, entry.size or count)
            else:
                notes.metrics[key] = entry.value
        if loss is None or self._monitor is not None:
            chosen = self._monitored(name, logs)
            loss, count = logs[chosen], logged[chosen].size or count
        named = {key: value for key, value in logs.items() if key not in ("loss", "rows")}  # which every evaluation has of its own
        return Step(loss, count, logs=named or None)

    def _monitored(self, method: str, logs: Mapping[str, Tensor]) -> str:
        """The log that is the loss of an evaluation."""
        if self._monitor is not None:
            if self._monitor not in logs:
                raise TaskError(f"monitor (={self._monitor!r}) is no number that {method} logs; it logs: {', '.join(logs) or 'none'}")
            return self._monitor
        named = [name for name in logs if "loss" in name.lower()]
        found = next((name for name in LOSSES if name in logs), named[0] if len(named) == 1 else None)
        if found is None:
            raise TaskError(
                f"{method} of {type(self).__name__} returns no loss and logs {', '.join(logs) or 'nothing'}; return the loss, or say which log "
                "it is: from_lightning(module, monitor=...)"
            )
        return found

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        notes = _notes_of(model)
        notes.batch, notes.sums, notes.metrics = 0, {}, {}
        result = super().evaluate(model, batches)
        notes.figures = {**result, **notes.finish(), "loss": result["loss"], "rows": result["rows"]}
        return dict(notes.figures)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        if "predict_step" not in self._arities:
            return super().predict(model, batch)
        return model.predict_step(*(batch, 0)[: self._arities["predict_step"]])  # type: ignore[operator]

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        given: Any = model.configure_optimizers()  # type: ignore[operator]
        optimizer, schedules = configured(given, type(self).__name__, _notes_of(model))
        optimizer._anyfit_schedules = schedules  # type: ignore[attr-defined]  # build_schedule is given nothing but the optimizer
        return optimizer

    def build_schedule(self, optimizer: Any, total_steps: int) -> dict[str, Schedule]:
        return dict(optimizer._anyfit_schedules)

    def train_step(self, trainer: Trainer, window: Iterable[Any]) -> Step | None:
        notes, here = _notes_of(trainer.model), trainer.position
        notes.epoch, notes.step, notes.batch = here.epoch, here.step, here.offset * trainer.plan.accumulate
        step = super().train_step(trainer, window)
        notes.step += 1
        return step

    def _call(self, model: nn.Module, method: str, batch: Any) -> tuple[Tensor | None, dict[str, _Logged]]:
        """The loss that a step returned, and what it logged."""
        notes, logged = _notes_of(model), dict[str, _Logged]()
        notes.logged = logged
        try:
            returned = getattr(model, method)(*(batch, notes.batch)[: self._arities[method]])
        finally:
            notes.logged = None
        notes.batch += 1
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(()), logged
        if method == "training_step" and returned is not None:  # others may return anything
            what = f"a dict with {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else spelled(returned)
            raise TaskError(f"{method} of {type(self).__name__} returned {what}; return the loss as one number, or a dict with 'loss'")
        return None, logged


# What a module meets instead of Lightning's Trainer


class _Logged(NamedTuple):
    value: Any  # a tensor of one number, or a torchmetrics object
    size: int | None  # the batch_size that `self.log` was given


@dataclass(slots=True)
class Notes:
    """Where a model's training stands, and what its steps log."""

    epoch: int = 0
    step: int = 0
    batch: int = 0
    logged: dict[str, _Logged] | None = None  # by the step that runs now
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # value x size and sizes over one evaluation
    metrics: dict[str, Any] = field(default_factory=dict)  # torchmetrics objects that this evaluation logs
    figures: dict[str, Any] = field(default_factory=dict)  # of the last evaluation

    def add(self, name: str, value: Tensor, size: int) -> None:
        """One batch's log to the sums of the evaluation."""
        total, sizes = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + wide(value) * size, sizes + size)

    def finish(self) -> dict[str, Any]:
        """Figures of the evaluation by name."""
        result: dict[str, Any] = {name: float(total) / sizes if sizes else None for name, (total, sizes) in self.sums.items()}
        for name, metric in self.metrics.items():
            value = metric.compute()
            result[name] = value.tolist() if isinstance(value, Tensor) else value
            metric.reset()
        # a figure that is NaN is one that cannot be told, as with anyfit's own metrics
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()}


class _Attached:
    """What a copied module's class gets in front: logs that are kept, and a Trainer's answers where there are any."""

    @property
    def current_epoch(self) -> int:
        return _notes_of(self).epoch

    @property
    def global_step(self) -> int:
        return _notes_of(self).step

    @property
    def trainer(self) -> _NoTrainer:
        return _NoTrainer(type(self).__name__, _notes_of(self))

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: Any = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        **options: Any,
    ) -> None:
        logged = _notes_of(self).logged
        if logged is None:
            raise TaskError(f"self.log({name!r}) was called outside training_step, validation_step and test_step; log it in one of them")
        if reduce_fx not in ("mean", torch.mean):
            raise TaskError(f"self.log({name!r}, reduce_fx={reduce_fx!r}) is not supported; logs are means, so leave reduce_fx out")
        if not (on_step is False and on_epoch is False):
            logged[name] = _Logged(value if _is_metric(value) else _number(name, value), options.get("batch_size"))

    def log_dict(self, dictionary: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        # a torchmetrics collection renames its members, and copies their states unless told not to
        items: Any = dictionary.items(keep_base=False, copy_state=False) if _is_metric(dictionary) else dictionary.items()  # type: ignore[call-arg]
        for name, value in items:
            self.log(name, value, *arguments, **options)


class _NoTrainer:
    """What `self.trainer` gives: the few answers that hold here; anything else is an error that names it."""

    is_global_zero, sanity_checking, world_size, global_rank, local_rank, logger = True, False, 1, 0, 0, None

    def __init__(self, owner: str, notes: Notes) -> None:
        self._owner, self.current_epoch, self.global_step = owner, notes.epoch, notes.step

    def __getattr__(self, name: str) -> Any:
        raise TaskError(
            f"{self._owner} reads self.trainer.{name}, but anyfit trains it without a Lightning Trainer; give the module what it needs as an "
            "argument of its own, such as total_steps"
        )


def _attached(model: nn.Module) -> nn.Module:
    """The model with the logs and answers of `_Attached`, and so each LightningModule within it."""
    notes = Notes()
    for part in model.modules():
        if part is model or any(base.__name__ == "LightningModule" for base in type(part).__mro__):
            cls, space = type(part), dict[str, Any]()
            if not hasattr(part, "device"):  # Lightning's own classes have it
                space["device"] = property(lambda self: next(self.parameters()).device)
            if not _defined(part, "print"):  # Lightning's asks the Trainer whether this is the first process
                space["print"] = staticmethod(print)
            part._anyfit_notes = notes  # type: ignore[assignment]
            # by class, since a property of an object cannot be replaced; the user's own module stays as it is
            part.__class__ = types.new_class(cls.__name__, (_Attached, cls), exec_body=lambda body, space=space: body.update(space))  # type: ignore[misc]
    return model


def _notes_of(model: Any) -> Notes:
    notes = vars(model).get("_anyfit_notes")
    if not isinstance(notes, Notes):
        raise TaskError(f"model (a {type(model).__name__}) was not built by this task; call build_model first")
    return notes


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise TaskError(
            f"{type(module).__name__} cannot be copied ({error}); each fit starts from a copy, so keep what cannot be copied out of it"
        ) from error


def _own_classes(cls: type) -> list[type]:
    """The user's classes of a module, without those of Lightning and torch."""
    ours = (object, _Attached)
    return [base for base in cls.__mro__ if base not in ours and not f"{base.__module__}.".startswith(THEIRS)]


def _code(cls: type) -> str:
    """SHA-256 of the source of a module's classes; of their bytecode where there is no source (an interactive session)."""
    hasher = hashlib.sha256()
    for base in _own_classes(cls):
        try:
            hasher.update(inspect.getsource(base).encode())
        except (OSError, TypeError):
            for name, member in sorted(vars(base).items()):
                if inspect.isfunction(member):
                    hasher.update(f"{name} {member.__code__.co_code.hex()} {member.__code__.co_names}".encode())
    return hasher.hexdigest()


def _hparams(module: nn.Module) -> dict[str, Any]:
    """Hyperparameters that the module saved, those that are JSON."""
    saved: Any = getattr(module, "hparams", {})
    found: dict[str, Any] = {}
    for name, value in dict(saved).items() if isinstance(saved, Mapping) else ():
        try:
            canonical({name: value})
        except InputError:
            continue
        found[str(name)] = value
    return found


def _prepare(owner: Any, stage: str) -> None:
    """The hooks before a stage: the data once, then the objects."""
    if stage == "fit" and _defined(owner, "prepare_data"):
        owner.prepare_data()
    if _defined(owner, "setup"):
        owner.setup(stage=stage)


def _defined(owner: Any, name: str) -> bool:
    """Whether the user defines a method, rather than Lightning for all modules."""
    return name in vars(owner) or any(name in vars(base) for base in _own_classes(type(owner)))


def _refuse_hooks(owner: Any, names: tuple[str, ...], caller: str) -> None:
    found = [name for name in names if _defined(owner, name)]
    if found:
        raise TaskError(
            f"{type(owner).__name__} overrides {', '.join(found)}, which {caller} cannot honour; leave {'it' if len(found) == 1 else 'them'} "
            "out, or write an anyfit.Task (on_event of anyfit.fit gets every event)"
        )


def _arity(module: nn.Module, name: str) -> int:
    """How many of (batch, batch_idx) a step takes."""
    parameters = list(inspect.signature(getattr(module, name)).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    odd = [p.name for p in positional[2:] if p.default is p.empty]
    odd += [p.name for p in parameters if p.name == "dataloader_iter" or (p.kind is p.KEYWORD_ONLY and p.default is p.empty)]
    if odd:
        raise TaskError(f"{name} of {type(module).__name__} wants {', '.join(odd)}; it is given a batch and its index, nothing else")
    return 2 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else min(2, len(positional))


def _rows_of(batch: Any) -> int:
    tensor = first_tensor(batch)
    return tensor.shape[0] if tensor.dim() else 1


def _is_metric(value: Any) -> bool:
    return not isinstance(value, Tensor) and all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


def _number(name: str, value: Any) -> Tensor:
    """A logged value as a detached tensor of one number."""
    if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TaskError(f"self.log({name!r}) got {spelled(value)}; log one number, or a metric that was called on this batch")
    tensor = torch.as_tensor(value).detach().reshape(())
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)
