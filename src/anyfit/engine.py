"""The engine: one loop for every place, that yields events. A step is compute -> reduce -> commit, and can be retried.

Nothing is yielded inside a context that changes process state (no_grad, autocast): it would leak to the consumer.
"""

from __future__ import annotations

import contextlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anyfit.data import Batches, Share, mix_seed
from anyfit.dropout import ExactDropout
from anyfit.embedding import UsedRows, used_rows
from anyfit.errors import DataError, InputError, Lost, NonFinite, RunError, TaskError
from anyfit.machine import autocast, random_state, seed_all, set_random_state
from anyfit.metrics import Accumulator
from anyfit.private import PrivateGradient, PrivateSteps
from anyfit.schedule import Schedule
from anyfit.state import Position, State
from anyfit.task import Step, Task, evaluating, measure
from anyfit.tree import clone, first_tensor, map_tensors, wide
from anyfit.values import Plan

__all__ = [
    "Alone",
    "Extras",
    "Local",
    "Losses",
    "Stateful",
    "Stepped",
    "Trainer",
    "Workers",
    "evaluate",
    "glance",
    "load_model",
    "load_partial",
    "make_trainer",
    "predict",
    "totals",
    "train",
]

Count = int | Tensor


@runtime_checkable
class Stateful(Protocol):
    """What may stand in `trainer.extras`: an EMA, masks, counters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Local:
    """What stands beside gradients: the sums of a worker's part of a step, or of all of it."""

    count: float
    loss: float  # times count
    logs: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (value times count, count)


class Workers(Protocol):
    """Who computes a step together: `Alone`, or a cluster's group."""

    alone: bool
    rank: int
    phantom: bool  # the batch at hand belongs to another worker: it is computed so that all take part, and counts nothing
    synced: int  # layers whose batch statistics are those of all workers: each takes part in every batch
    shares: Sequence[Share]  # everyone's part of the step at hand
    rows: int  # at most at once, of the step at hand

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take part in the steps of a model, until `detach`."""

    def detach(self, model: nn.Module) -> None:
        """Leave it as it was."""

    def share(self, position: Position, units: int) -> Share | None:
        """The part of a step's units that this worker takes; None for all."""

    def last(self, parameters: Sequence[nn.Parameter]) -> None:
        """The next backward is the last of this step: sums may begin while it runs."""

    def reduce(self, parameters: Sequence[nn.Parameter], local: Local) -> Local:
        """Add gradients and sums over all workers; raises Lost, upon which the same step is tried again."""

    def stepped(self) -> None:
        """The step at hand is done: it will not be tried again."""

    def short_of_memory(self) -> None:
        """So many rows at once were too many; the same step is tried again with fewer."""


class Alone:
    """One process: nothing to share, nothing to wait for."""

    alone, rank, phantom, synced, rows = True, 0, False, 0, 0
    shares: Sequence[Share] = ()

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def detach(self, model: nn.Module) -> None:
        pass

    def share(self, position: Position, units: int) -> Share | None:
        return None

    def last(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def reduce(self, parameters: Sequence[nn.Parameter], local: Local) -> Local:
        return local

    def stepped(self) -> None:
        pass

    def short_of_memory(self) -> None:
        raise RunError("memory is full; pass a smaller batch_size, and accumulate for the rest")


@dataclass(slots=True)
class Stepped:
    """An optimizer step was taken. `loss` and `count` are still on the device."""

    position: Position  # what comes next
    loss: Tensor
    count: Count
    epoch: int  # of the step
    offset: int  # of the step within its epoch
    logs: Mapping[str, Tensor] | None = None
    ends_epoch: bool = False


Correct = Callable[[Sequence[Tensor], float], None]


class Extras(UserDict[str, Stateful]):
    """What a task keeps beside model and optimizers. One that is added after a resume gets its saved state as it comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, Any] = {}  # saved states whose owners have not come yet

    def __setitem__(self, name: str, extra: Stateful) -> None:
        if not isinstance(extra, Stateful):
            raise TaskError(f"extras[{name!r}] (a {type(extra).__name__}) needs state_dict and load_state_dict to be checkpointed")
        super().__setitem__(name, extra)
        if name in self.waiting:
            extra.load_state_dict(self.waiting.pop(name))

    def states(self) -> dict[str, Any]:
        """The states of all, those that wait among them."""
        return {**clone(self.waiting), **{name: clone(extra.state_dict()) for name, extra in self.items()}}

    def load(self, states: Mapping[str, Any]) -> None:
        """Hand out saved states."""
        self.waiting = clone(dict(states))
        for name in set(self) & set(self.waiting):
            self[name].load_state_dict(self.waiting.pop(name))


class Trainer:
    """The live objects of one fit."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizers: dict[str, Optimizer],
        schedules: dict[str, Schedule],
        plan: Plan,
        device: torch.device,
        *,
        workers: Workers | None = None,
        correct: Correct | None = None,
        private: PrivateSteps | None = None,
    ) -> None:
        self.task, self._model, self._optimizers, self.schedules = task, model, optimizers, schedules
        self.plan, self.device, self.workers, self.correct = plan, device, workers or Alone(), correct
        self.position = Position()
        self.total: int | None = None  # steps of the whole training, where they are known
        self.extras = Extras()
        self.steps: list[Step] = []  # what the current optimizer step was made of
        self.nominal = 1.0  # the count that gradients are scaled by before they are divided by the true one
        self.scaler = torch.amp.GradScaler(device.type) if plan.precision == "fp16" else None
        self._parameters = {
            name: [p for group in optimizer.param_groups for p in group["params"]] for name, optimizer in optimizers.items()
        }
        self._trained = list({id(p): p for parameters in self._parameters.values() for p in parameters}.values())
        self._counts: list[Count] = []  # of the batches since the last apply
        self._expects_more = False  # whether the window has several batches
        self._summed = False  # whether gradients are sums over nominal, or still the mean of one batch
        self._guards: list[Any] = []  # hooks at the optimizers
        self._tables: list[UsedRows] = []  # of which only the rows in use are trained
        self._stepping = False
        self._looked = False  # whether a step draws what exact dropout does not cover
        self._committing = False
        self._taken: set[int] = set()  # batches of the window since the last backward
        self._expected = self._real = 0  # batches of the window, and those that are this worker's own
        self._constrained = task.own_method("constrain")
        self._constraint: Callable[[], None] | None = None  # what the task wants done once weights were changed
        self._reduced = 0  # of `steps`, how many are sums over all workers
        self.dropout: ExactDropout | None = None  # while `train` runs, where the plan asks for it
        self.notices: list[str] = []  # what the user should know of the steps
        self.private = None if private is None else self._private(private)

    def _private(self, steps: PrivateSteps) -> PrivateGradient:
        if self.task.own_method("train_step"):
            raise TaskError(
                f"{type(self.task).__name__} has a train_step of its own, which privacy cannot bound; leave train_step out, or fit without"
            )
        if not self.workers.alone:
            raise InputError("private steps are taken by one worker alone; use one process")
        return PrivateGradient(self.task, self._model, self._trained, steps, self.plan)

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """All that the optimizers train, each once."""
        return self._trained

    def _only_from_apply(self, optimizer: Optimizer, *given: Any) -> None:
        if not self._committing:
            raise TaskError(
                f"train_step of {type(self.task).__name__} calls {type(optimizer).__name__}.step() itself, so ranks would go apart; call "
                "trainer.backward(step) and trainer.apply() in its place"
            )

    @property
    def model(self) -> nn.Module:
        """The model, whole: between steps every table of word vectors is put back first."""
        if not self._stepping:
            self._leave()
        return self._model

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name, with the state of every parameter."""
        if not self._stepping:
            self._leave()
        return self._optimizers

    def _begin(self, batches: Batches) -> None:
        """What holds while `train` runs, until `_end`."""
        self.use_rows(batches)
        if self.plan.exact_dropout:
            if self.private is not None:
                raise InputError("exact_dropout (=True) does not go with privacy, which takes rows one by one; leave one of them out")
            self.dropout = ExactDropout(self._model, self.plan.seed)
        if not self.workers.alone:
            for table in self._tables:
                table.enter()
            self.workers.attach(self._model, self._trained)
            self._guards = [optimizer.register_step_pre_hook(self._only_from_apply) for optimizer in self._optimizers.values()]

    def _end(self) -> None:
        self._leave()
        for guard in self._guards:
            guard.remove()
        self._guards = []
        self.workers.detach(self._model)
        if self.dropout is not None:
            self.dropout.leave()
            self.dropout = None

    def _leave(self) -> None:
        for table in self._tables:
            table.leave()

    def use_rows(self, batches: Batches) -> None:
        """Train only those word vectors that the training texts hold, where that is the same."""
        columns = getattr(batches, "columns", None)
        plain = not self.task.own_method("train_step") and self.correct is None
        plain = plain and self.private is None  # which words are in use is private too: all get noise
        if columns is None or not plain or not self.plan.used_rows or self._tables:
            return

        def swap(old: nn.Parameter, new: nn.Parameter) -> None:
            for parameters in (*self._parameters.values(), self._trained):
                parameters[:] = [new if parameter is old else parameter for parameter in parameters]

        self._tables = used_rows(self._model, columns, self._optimizers, swap)

    @property
    def rows_in_use(self) -> list[tuple[int, int]]:
        """(rows in use, all rows) of each table of which only a part is trained."""
        return [(len(table.rows), len(table.places)) for table in self._tables]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The plan's precision as a context."""
        return autocast(self.plan, self.device)

    def backward(self, step: Step) -> None:
        """Add count / nominal x gradient, so that no sum overflows in fp16. A window of one batch skips the multiplication."""
        if not isinstance(step, Step):
            raise TaskError(f"step() of {type(self.task).__name__} returned a {type(step).__name__}; return anyfit.Step(loss, count, ...)")
        self.steps.append(step)
        self._taken.clear()
        if not self.workers.alone and self._takes_part(step):
            return
        if not self._counts:
            self._summed = self._expects_more or not self.workers.alone
        elif not self._summed:  # a second batch after all: what stands is the first one's mean
            self._scale(self._trained, self._share_of(self._counts[0]))
            self._summed = True
        self._counts.append(step.count)
        if self._summed and isinstance(step.count, Tensor) and step.count.device.type == "cpu" and not float(step.count) > 0:
            # nothing counts, so zero is added; the mean over nothing (0/0) must not spoil the other batches
            for parameter in self._trained:
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            return
        loss = step.loss * self._share_of(step.count) if self._summed else step.loss
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        self._differentiate(loss)

    def _differentiate(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        if self.dropout is not None:
            self.dropout.in_backward = True
        try:
            if self.plan.precision == "fp32":
                loss.backward(gradient)  # type: ignore[no-untyped-call]
            else:
                with torch.autocast(self.device.type, enabled=False):
                    loss.backward(gradient)  # type: ignore[no-untyped-call]
        finally:
            if self.dropout is not None:
                self.dropout.in_backward = False

    def _takes_part(self, step: Step) -> bool:
        """Among several workers: a batch that counts nothing here only runs, where others need that; and the last one may begin the sums."""
        place = len(self._counts)
        counts = not self.workers.phantom and float(step.count) > 0
        if counts and place + 1 == self._expected == self._real:
            self.workers.last(self._trained)
        if counts:
            return False
        self.steps.pop()
        self._counts.append(0)
        self._summed = True
        if self.workers.synced:
            outputs = step.outputs if isinstance(step.outputs, Tensor) and step.outputs.requires_grad else None
            if outputs is None and not self.workers.phantom:
                raise TaskError(
                    f"no label of a rank's part counts, and step() of {type(self.task).__name__} gives no outputs through which the batch statistics "
                    "of the others could be followed; return Step(loss, count, outputs)"
                )
            self._differentiate(step.loss * 0) if outputs is None else self._differentiate(outputs, torch.zeros_like(outputs))
        if self.workers.phantom and self._real == 0:
            for parameter in self._trained:
                parameter.grad = None
        return True

    def _share_of(self, count: Count) -> float | Tensor:
        """Count / nominal; whole numbers on a device would divide to float32."""
        return wide(count) / self.nominal if isinstance(count, Tensor) else count / self.nominal

    @staticmethod
    def _scale(parameters: Iterable[nn.Parameter], factor: float | Tensor) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            if isinstance(factor, Tensor):  # a float64 factor would not multiply float32 gradients in place
                factor = factor.to(gradients[0].device, torch.promote_types(gradients[0].dtype, torch.float32))
            torch._foreach_mul_(gradients, factor)

    def apply(self, name: str | None = None) -> None:
        """Reduce -> divide -> unscale -> correct -> clip -> optimizer step, for one optimizer or all; then a new sum begins."""
        if not self._counts and self.workers.alone:
            raise TaskError("apply() was called before backward(); a step needs at least one batch")
        names = list(self._optimizers) if name is None else [name]
        if name is not None and name not in self._optimizers:
            raise TaskError(f"apply(name={name!r}) names no optimizer; there are: {', '.join(self._optimizers)}")
        parameters = self._trained if name is None else self._parameters[name]
        if not self.workers.alone:
            self._scale(parameters, self.nominal / max(self._sum(parameters), 1e-30))
        elif self._summed:
            count: Count = sum(self._counts[1:], start=self._counts[0])
            # where nothing counted (all labels ignored) the gradients are zero and stay zero
            total = wide(count).clamp(min=1e-30) if isinstance(count, Tensor) else max(count, 1e-30)
            self._scale(parameters, self.nominal / total)
        if self._constrained:
            progress = None if self.total is None else min(1.0, (self.position.step + 1) / max(self.total, 1))
            with torch.no_grad():
                self._constraint = self.task.constrain(self._model, progress)
        for optimizer_name in names:
            self._commit(optimizer_name)
        self.hold()
        if self.scaler is not None:
            self.scaler.update()
        if self.plan.precision != "fp32":
            torch.clear_autocast_cache()  # casts of the old weights would serve the next pass of an own inner loop
        for parameter in self._trained:
            parameter.grad = None
        self._counts, self._summed = [], False

    def _sum(self, parameters: Sequence[nn.Parameter]) -> float:
        """Add gradients, counts, losses of all workers; the total count. What was stepped since then is known as one Step."""
        own = self.task.own_method("train_step")
        if own and not self._counts:
            raise TaskError(
                f"train_step of {type(self.task).__name__} called apply() without backward(step); ranks add what trainer.backward() was given, by "
                "its count"
            )
        steps = [(step, float(step.count)) for step in self.steps[self._reduced :]]
        names = sorted({name for step, _ in steps for name in step.logs or {}})
        logs = {name: [(float(step.logs[name]), count) for step, count in steps if step.logs and name in step.logs] for name in names}
        local = Local(
            sum(count for _, count in steps),
            sum(float(step.loss.detach()) * count for step, count in steps),
            {name: (sum(value * count for value, count in given), sum(count for _, count in given)) for name, given in logs.items()},
        )
        total = self.workers.reduce(parameters, local)
        if not total.count:  # as in one process: momentum and decay act on a step in which nothing counts
            for parameter in parameters:
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        mean = torch.tensor(total.loss / total.count if total.count else 0.0, dtype=torch.float64)
        means = {name: torch.tensor(value / count, dtype=torch.float64) for name, (value, count) in total.logs.items()}
        self.steps[self._reduced :] = [Step(mean, torch.tensor(total.count, dtype=torch.float64), logs=means or None)]
        self._reduced += 1
        return total.count

    def _commit(self, name: str) -> None:
        optimizer, parameters = self._optimizers[name], self._parameters[name]
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if self.correct is not None:
            self.correct([p.grad for p in parameters if p.grad is not None], optimizer.param_groups[0]["lr"])
        if self.plan.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.plan.clip)
        for table in self._tables:
            if table.optimizer is optimizer:
                table.stepped()
        self._committing = True
        try:
            if self.scaler is not None:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        finally:
            self._committing = False

    def hold(self) -> None:
        """What the task says must hold for the weights after a step."""
        if self._constraint is not None:
            with torch.no_grad():
                self._constraint()

    def forget(self) -> None:
        """Drop gradients and counts of a step that will be tried again or given up."""
        for parameter in self._trained:
            parameter.grad = None
        self._counts, self._summed, self.steps, self._reduced = [], False, [], 0

    def learning_rate(self) -> float:
        """Of the first group of the first optimizer."""
        return float(next(iter(self._optimizers.values())).param_groups[0]["lr"])

    def snapshot(self, schema: Mapping[str, Any] | None = None, progress: Mapping[str, Any] | None = None) -> State:
        """A copy of all that a resume needs."""
        return State(
            model=clone(dict(self.model.state_dict(keep_vars=False))),
            optimizers={name: clone(optimizer.state_dict()) for name, optimizer in self.optimizers.items()},
            schedules={name: clone(schedule.scheduler.state_dict()) for name, schedule in self.schedules.items()},
            scaler={} if self.scaler is None else self.scaler.state_dict(),
            rng=random_state(self.device),
            extras=self.extras.states(),
            schema=schema,
            progress=progress or {},
            position=self.position,
        )

    def restore(self, state: State) -> None:
        """Go to a snapshot; it stays as it was."""
        self._leave()
        self._tables = []  # other moments may say that other rows are in use
        load_model(self.model, state.model)
        for name, optimizer in self.optimizers.items():
            # load_state_dict keeps the tensors that it is given, and fused kernels want the strides of the parameters
            optimizer.load_state_dict(clone(state.optimizers[name]))
        for name, schedule in self.schedules.items():
            schedule.scheduler.load_state_dict(clone(state.schedules[name]))
            schedule.rebase()  # the optimizer's first rates may not be those that the task built
        if self.scaler is not None and state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))
        self.extras.load(state.extras)
        self.position = state.position
        self.forget()
        set_random_state(state.rng, self.device)


def load_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, names and shapes being equal."""
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = sorted(name for name in set(own) & set(weights) if own[name].shape != weights[name].shape)
    if missing or extra or wrong:
        details = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not in the model: {', '.join(extra)}"] * bool(extra)
        details += [f"{name}: {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in wrong]
        raise InputError(f"weights do not fit the model ({'; '.join(details)}); pass those of the same task, or weights_partial=True")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def load_partial(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy what overlaps, name by name and from the first index of each dimension on; what was left, in words."""
    own, left = model.state_dict(), []
    with torch.no_grad():
        for name, tensor in own.items():
            found = weights.get(name)
            if found is None or found.dim() != tensor.dim():
                left.append(name)
                continue
            overlap = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, found.shape, strict=True))
            tensor[overlap].copy_(found[overlap])
            if found.shape != tensor.shape:
                left.append(f"{name} (copied {'x'.join(str(part.stop) for part in overlap)} of {'x'.join(map(str, tensor.shape))})")
    return [*left, *(f"{name} (not in the model)" for name in sorted(set(weights) - set(own)))]


def make_trainer(task: Task, model: nn.Module, plan: Plan, total_steps: int, device: torch.device, **options: Any) -> Trainer:
    """Model to device and type, then optimizers and schedules as the task builds them."""
    model.to(device=device, dtype=getattr(torch, plan.dtype))
    if plan.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    built = task.build_optimizer(model)
    optimizers = dict(built) if isinstance(built, Mapping) else {"main": built}
    scheduled = task.build_schedule(built, total_steps)
    schedules = dict(scheduled) if isinstance(scheduled, Mapping) else {} if scheduled is None else {"main": scheduled}
    for name, schedule in schedules.items():
        if not isinstance(schedule, Schedule):
            raise TaskError(
                f"build_schedule gave a {type(schedule).__name__} for {name!r}; wrap it: anyfit.Schedule(scheduler, every='step')"
            )
    trainer = Trainer(task, model, optimizers, schedules, plan, device, **options)
    trainer.total = total_steps
    return trainer


def train(trainer: Trainer, batches: Batches, total_steps: int) -> Iterator[Stepped]:
    """Steps from the trainer's position to `total_steps`, one event each. The consumer may stop, evaluate, save between any two."""
    task, schedules = trainer.task, trainer.schedules
    each_step = [schedule for schedule in schedules.values() if schedule.every == "step"]
    each_epoch = [schedule for schedule in schedules.values() if schedule.every == "epoch"]
    trainer.model.train()
    trainer.nominal = float(getattr(batches, "step_size", trainer.plan.batch_size or 1))
    steps_per_epoch = batches.steps_per_epoch if trainer.private is None else trainer.private.steps.steps_per_epoch
    try:
        trainer._begin(batches)
        while trainer.position.step < total_steps:
            here = trainer.position
            loss, count, logs = _step(trainer, task, batches) if trainer.private is None else _private_step(trainer, batches)
            ends = here.offset + 1 == steps_per_epoch
            if loss is None:  # a stream that ended where its epoch ends
                if here.offset == 0:
                    raise RunError("the data gave no batch; check the loader")
                trainer.position = Position(here.step, here.epoch + 1, 0)
                for schedule in each_epoch:
                    schedule.advance()
                continue
            for schedule in each_step:
                schedule.advance()
            if ends:
                for schedule in each_epoch:
                    schedule.advance()
                trainer.position = Position(here.step + 1, here.epoch + 1, 0)
            else:
                trainer.position = Position(here.step + 1, here.epoch, here.offset + 1)
            yield Stepped(trainer.position, loss, count, here.epoch, here.offset, logs, ends)
    finally:  # whoever holds the model itself sees it whole, and as it was
        trainer._end()


@dataclass(slots=True)
class _Window(Sequence[Any]):
    """The batches of a step for a train_step: as one is taken, what depends on its samples is told of it."""

    trainer: Trainer
    batches: Sequence[Any]
    places: Sequence[Tensor]
    numbers: Sequence[int]  # of those that stand here, within the step

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Window(self.trainer, self.batches, self.places, self.numbers[index])
        number, trainer = self.numbers[index], self.trainer
        trainer._taken.add(number)
        mixed = 0 < trainer._real < len(self.batches)
        if len(trainer._taken) > 1 and (mixed or trainer.dropout is not None):
            raise TaskError(
                f"train_step of {type(trainer.task).__name__} takes several batches before trainer.backward(step) of the first; under ranks and with "
                "exact_dropout each counts as it is taken, so take them one by one: for batch in window"
            )
        trainer.workers.phantom = number >= trainer._real
        if trainer.dropout is not None:
            trainer.dropout.at(trainer.position.step, self.places[number])
        return self.batches[number]


def _window(trainer: Trainer, batches: Batches) -> Sequence[Any]:
    """The batches of the step at hand for this worker. Where all must take part, one without samples computes another's."""
    position, workers = trainer.position, trainer.workers
    own = trainer.task.own_method("train_step")
    share = None if workers.alone else workers.share(position, batches.units(position))
    window: Sequence[Any] = batches.window(position, share)
    trainer._real = len(window)
    trainer._expects_more = len(window) > 1
    if workers.alone and trainer.dropout is None:
        return window
    window = list(window)
    places = list(batches.places(position, share)) if trainer.dropout is not None else []
    if not workers.alone:
        least = max(len(batches.places(position, part)) for part in workers.shares) if workers.synced else int(own)
        if least > len(window):
            first = Share(0, 1)
            missing = least - len(window)
            window += list(batches.window(position, first)) * missing
            places += list(batches.places(position, first)) * missing if trainer.dropout is not None else []
        seed_all(mix_seed(trainer.plan.seed, position.step, workers.rank + 1), trainer.device)
        workers.rows = max((first_tensor(batch).shape[0] for batch in window), default=0)
    trainer._expected = 0 if own else len(window)
    trainer._taken.clear()
    return _Window(trainer, window, places, range(len(window)))


def _step(trainer: Trainer, task: Task, batches: Batches) -> tuple[Tensor | None, Count, Mapping[str, Tensor] | None]:
    """One transaction: on Lost, random numbers and buffers go back and the same step is tried again from untouched weights."""
    workers = trainer.workers
    undo = None if workers.alone else _undo(trainer)
    while True:
        window = _window(trainer, batches)
        if not window and workers.alone:
            return None, 0, None
        trainer.steps, trainer._reduced = [], 0
        for table in trainer._tables:
            table.enter()
        trainer._stepping = True
        full = False
        try:
            if trainer.plan.precision == "fp32":
                task.train_step(trainer, window)
            else:
                with trainer.autocast():
                    task.train_step(trainer, window)
        except Lost:
            assert undo is not None
            undo()
            continue
        except IndexError as error:
            raise _explained(error) from error
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            committed = trainer._reduced > 0 and not task.own_method("train_step")  # in the optimizer's own step
            if not _out_of_memory(error) or undo is None or committed:
                raise
            full = True  # the frames of the error hold tensors until it is over
        finally:
            trainer._stepping = False
        if full:
            assert undo is not None
            undo()
            workers.short_of_memory()
            continue
        break
    if trainer.dropout is not None:
        if not trainer._looked and trainer.dropout.drew():
            trainer.notices.append(
                "random numbers are drawn in a step by something that is no dropout layer (a function, an augmentation): exact_dropout does not "
                "cover it, and ranks draw their own"
            )
        trainer._looked = True
        trainer.dropout.done()
    if trainer._counts:
        raise TaskError(f"train_step of {type(task).__name__} ended after backward() without apply(); call trainer.apply()")
    if task.own_method("train_step"):  # which may have changed weights after apply() too
        trainer.hold()
    steps, trainer.steps = trainer.steps, []
    workers.stepped()
    return _joined(steps)


def _out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is full; torch has no class of its own for that on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _private_step(trainer: Trainer, batches: Batches) -> tuple[Tensor | None, Count, Mapping[str, Tensor] | None]:
    """A step whose gradient is clipped row by row and has noise; one without rows is taken too."""
    assert trainer.private is not None
    try:
        loss, count, logs = trainer.private.backward(batches, trainer.position.step)
    except IndexError as error:
        raise _explained(error) from error
    trainer._counts = [1]
    trainer.apply()
    return loss, count, logs


def _undo(trainer: Trainer) -> Callable[[], None]:
    """What takes back a step that was not committed. An own inner loop may have committed a part, so all is kept for it."""
    if trainer.task.own_method("train_step"):
        state = trainer.snapshot()

        def restore() -> None:
            for name in set(trainer.extras) - set(state.extras):
                del trainer.extras[name]
            trainer.restore(state)

        return restore
    # random numbers of ranks begin anew with each step, and with each try of it
    buffers, extras = [clone(b) for b in trainer._model.buffers()], trainer.extras.states()

    def undo() -> None:
        trainer.forget()
        for name in set(trainer.extras) - set(extras):  # made by the step that is taken back
            del trainer.extras[name]
        trainer.extras.load(extras)
        with torch.no_grad():
            for buffer, before in zip(trainer._model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    return undo


def _explained(error: IndexError) -> Exception:
    """Torch's word for a label that the model has no output for, or for a word that it has no vector for, in ours."""
    if "out of range in self" in str(error):
        return DataError(
            f"an id of the batch is outside of the table that the model looks it up in ({error}); give the model as many rows as the "
            "vocabulary has words"
        )
    if "out of bounds" not in str(error):
        return error
    return DataError(
        f"a label does not fit the model's outputs ({error}); labels run from 0 to the number of classes - 1, and -100 is left out"
    )


def _joined(steps: Sequence[Step]) -> tuple[Tensor, Count, Mapping[str, Tensor] | None]:
    """Loss, count and logs of a window."""
    if not steps:
        raise TaskError("train_step called no trainer.backward(); pass it the Step of at least one batch")
    if len(steps) == 1:
        logs = steps[0].logs  # detached: a graph must not live until the log line is due
        return steps[0].loss.detach(), steps[0].count, logs and {name: value.detach() for name, value in logs.items()}
    count: Count = sum((step.count for step in steps[1:]), start=steps[0].count)
    loss = _mean([(step.loss, step.count) for step in steps])
    names = sorted({name for step in steps for name in step.logs or {}})
    logs = {name: _mean([(step.logs[name], step.count) for step in steps if step.logs and name in step.logs]) for name in names}
    return loss, count, logs or None


def _mean(parts: Sequence[tuple[Tensor, Count]]) -> Tensor:
    """The mean of means by their counts, those over nothing left out."""
    values = wide(torch.stack([value.detach() for value, _ in parts]))
    counts = torch.stack([wide(torch.as_tensor(count, device=values.device)) for _, count in parts])
    total = counts.sum()
    return torch.where(counts > 0, values * counts, 0.0).sum() / torch.where(total > 0, total, 1.0)


@dataclass(slots=True)
class Losses:
    """Losses since the last line of the log, left on the device; reading them finds the step that went wrong."""

    events: list[Stepped] = field(default_factory=list)

    def read(self) -> tuple[float, dict[str, float | None]] | None:
        """The mean loss and means of logs since the last call; raises NonFinite with the first bad step. One host sync."""
        events, self.events = self.events, []
        if not events:
            return None
        losses = wide(torch.stack([event.loss for event in events]))
        given = [event.count for event in events]
        if all(isinstance(count, Tensor) for count in given):
            counts = wide(torch.stack(given))  # type: ignore[arg-type]
        else:
            counts = torch.tensor([float(count) for count in given], dtype=losses.dtype, device=losses.device)
        parts = torch.stack((losses, counts)).tolist()
        for event, loss, count in zip(events, *parts, strict=True):
            if not abs(loss) < float("inf") and count > 0:
                raise NonFinite(
                    f"loss (={loss}) is not finite at step {event.position.step} (epoch {event.epoch}, batch {event.offset}); lower the learning "
                    "rate, clip gradients (clip=1.0) or look at that batch. The last checkpoint is untouched."
                )
        total = sum(parts[1])
        mean = sum(loss * count for loss, count in zip(*parts, strict=True) if count > 0) / total if total else 0.0
        names = {name for event in events for name in event.logs or {}}
        logs: dict[str, float | None] = {}
        for name in sorted(names):
            chosen = [
                (event.logs[name], count)
                for event, count in zip(events, parts[1], strict=True)
                if event.logs and name in event.logs and count > 0
            ]
            weight = sum(count for _, count in chosen)
            value = sum(float(value) * count for value, count in chosen) / weight if weight else 0.0
            logs[name] = value if abs(value) < float("inf") else None
        return mean, logs


@contextlib.contextmanager
def _quietly(model: nn.Module, autocast: contextlib.AbstractContextManager[Any] | None) -> Iterator[None]:
    """Without gradients, in evaluation mode, in the given precision."""
    with autocast or contextlib.nullcontext(), torch.no_grad(), evaluating(model):
        try:
            yield
        except IndexError as error:
            raise _explained(error) from error


def evaluate(
    task: Task, model: nn.Module, batches: Batches, autocast: contextlib.AbstractContextManager[Any] | None = None
) -> dict[str, Any]:
    """The task's evaluation: figures by name."""
    with _quietly(model, autocast):
        result = task.evaluate(model, batches)
    if not isinstance(result, dict) or "loss" not in result:
        raise TaskError(f"evaluate of {type(task).__name__} must return a dict with at least 'loss'; it gave {result!r}")
    return {name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for name, value in result.items()}


def glance(task: Task, model: nn.Module, batches: Batches, autocast: contextlib.AbstractContextManager[Any] | None = None) -> Any:
    """The outputs of the first evaluation step."""
    with _quietly(model, autocast):
        return next((task.evaluate_step(model, batch).outputs for batch in batches), None)


def totals(
    task: Task,
    model: nn.Module,
    batches: Batches,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Accumulator:
    """Additive totals of loss and metrics over all batches, or over every `part[1]`-th one, for adding to those of other workers."""
    with _quietly(model, autocast):
        rows = batches if part == (0, 1) else batches.part(*part)
        return measure(task, model, rows, None if batches.schema is None else task.metrics(batches.schema))


def predict(
    task: Task, model: nn.Module, batches: Batches, autocast: contextlib.AbstractContextManager[Any] | None = None
) -> Iterator[Any]:
    """Predictions batch by batch, on the CPU."""
    for batch in batches:
        with _quietly(model, autocast):
            outputs = map_tensors(lambda tensor: tensor.detach().cpu(), task.predict(model, batch))
        yield outputs
