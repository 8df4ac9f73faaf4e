"""Trainers written for Sparse (SpArSeMod): its classes as a fit-shaped function, and a `Trainer` of the same contract to start from.

    from anyfit.adapt.sparse import Trainer, copy_weights, prune_net      # the one changed import

What the contract is: `docs/sparse.md`. Written from its documentation; none of its code is here.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, default_collate

from anyfit import engine, machine
from anyfit.errors import DataError, InputError, NonFinite, RunError, TaskError
from anyfit.prepare import Prepared, built, prepare
from anyfit.program import QuantizedNetwork, equalize, lower, magnitudes, ranges_of, trace
from anyfit.record import record_of, start_from
from anyfit.run import Run
from anyfit.state import Position, State, save_weights
from anyfit.task import TARGETS, WEIGHT, Task, evaluating
from anyfit.tasks.shrunk import prunable, prune_to
from anyfit.tree import clone, first_tensor, leaves, map_tensors

__all__ = ["Observed", "Trainer", "copy_weights", "from_sparse", "prune_net", "quantize_net", "sparsity"]

SPLITS = ("train", "val", "test")
CALIBRATION = 2000  # batches of training rows, at most
FIRST = 0.01  # the share of weights that the first batch takes
RAMP = 0.75  # of the batches; the rest lets what is left recover
LEVELS = 100  # into which the ramp is divided: all weights are sorted that often, not at every batch
ZEROS = "_zeros"  # of a parameter's name: which of its weights were pruned


# ------------------------------------------------------------------ weights


def copy_weights(old_net: Mapping[str, Tensor], net: nn.Module) -> nn.Module:
    """`net` with what overlaps of the weights of another one, name by name; what `--weights-partial` does."""
    engine.load_partial(net, old_net)
    return net


def prune_net(model: nn.Module, amount: float) -> nn.Module:
    """`model` with exactly that share of its weights zero, the smallest of all layers; for good, whatever an optimizer does to them."""
    if not 0 <= amount < 1:
        raise InputError(f"amount (={amount}) must be from 0 to below 1, where no weight would be left; pruning=False switches pruning off")
    hold(model)
    weights = prunable(model)
    prune_to(list(weights.values()), amount)
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_buffer(f"{leaf}{ZEROS}", weight.detach() == 0, persistent=False)
    if hold not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hold)
        model.register_state_dict_pre_hook(hold)  # type: ignore[no-untyped-call]  # as torch has it
    return model


def hold(model: nn.Module, *_: Any) -> None:
    """Make zero again what was pruned: a hook of models, before they compute and before they are saved."""
    if torch.compiler.is_exporting():  # a graph has the weights as they are
        return
    with torch.no_grad():
        for module in model.modules():
            for name, zeros in module._buffers.items():
                if name.endswith(ZEROS) and zeros is not None:
                    module._parameters[name.removesuffix(ZEROS)].masked_fill_(zeros, 0.0)  # type: ignore[union-attr]


def sparsity(model: nn.Module) -> float:
    """The share of weights that is zero, of those that pruning counts."""
    hold(model)
    weights = list(prunable(model).values())
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))


# ------------------------------------------------------------------ the trainer


class Trainer:
    """Sparse's routine: Adam, a rate that falls in steps, pruning while it trains, the best weights by validation.

    Override `load_dataloaders`, `train`, `train_loop` or `evaluate`, or write a class of your own with these methods and attributes.
    `parameters` of `train`: learning_rate, learning_step (epochs between two falls of the rate), learning_gamma, prune_threshold.
    """

    def __init__(
        self,
        pruning: bool = False,
        ddtype: torch.dtype = torch.float32,
        datasets: Sequence[Any] | None = None,
        models_path: str | Path | None = None,
        cuda: str = "cuda:0",
    ) -> None:
        self.datasets = datasets
        self.dtype = ddtype
        self.devicy = torch.device(cuda if torch.cuda.is_available() else "cpu")
        self.datasizes = {} if datasets is None else {name: len(rows) for name, rows in zip(SPLITS, datasets, strict=True)}
        self.pruning = pruning
        self.models_path = models_path
        self.dataloader: Any = None
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.settles = 0.0  # the share of the training before which weights are no result
        self.history: list[dict[str, Any]] = []  # of each epoch

    def load_dataloaders(self, batch_size: int, collate_fn: Any = None) -> None:
        """Make `self.dataloader`, by train, val and test. Only training rows are shuffled, and no row is left out of any figure."""
        if self.datasets is None:
            raise InputError("datasets (=None) must be those of train, val and test; give datasets=(train, val, test)")
        self.dataloader = {}
        for name, rows in zip(SPLITS, self.datasets, strict=True):
            training = name == "train"
            # one row alone has no statistics for a batch normalisation; the order differs in each epoch, so another one is left out each time
            alone = training and len(rows) > batch_size and len(rows) % batch_size == 1
            self.dataloader[name] = DataLoader(rows, batch_size, shuffle=training, drop_last=alone, collate_fn=collate_fn)

    def train(
        self,
        net: nn.Module,
        parameters: Mapping[str, Any],
        name: str,
        epochs: int,
        reload: bool,
        old_net: Mapping[str, Tensor] | None,
    ) -> nn.Module:
        """The network, trained. `reload`: from what overlaps of the weights `old_net`."""
        if reload:
            if old_net is None:
                raise InputError("old_net (=None) must be weights where reload is asked for; give the state_dict of a network")
            net = copy_weights(old_net, net)
        net.to(dtype=self.dtype, device=self.devicy)
        optimizer = Adam(net.parameters(), lr=_parameter(parameters, "learning_rate"))
        step, gamma = _parameter(parameters, "learning_step"), _parameter(parameters, "learning_gamma")
        scheduler = StepLR(optimizer, max(1, round(step * len(self._loader("train")))), gamma)
        threshold = _parameter(parameters, "prune_threshold") if self.pruning else 0.0
        return self.train_loop(net, optimizer, scheduler, name, epochs, threshold)

    def train_loop(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, name: str, epochs: int, threshold: float
    ) -> nn.Module:
        """The epochs. With `self.pruning` the share of zeros rises from 1 % to `threshold` within three quarters of the batches and stays;
        the best weights are sought from then on. They are saved as `models_path`/`name`.safetensors.
        """
        if epochs < 1:
            raise InputError(f"epochs (={epochs}) must be at least 1")
        if self.pruning and not FIRST <= threshold < 1:
            raise InputError(
                f"prune_threshold (={threshold}) must be from {FIRST} to below 1; it is the share of zeros, and pruning=False leaves all weights"
            )
        total, step = epochs * len(self._loader("train")), 0
        ramp = math.ceil(RAMP * total) if self.pruning else 0
        best, kept = -1.0, None
        for epoch in range(epochs):
            model.train()
            losses, rows = 0.0, 0
            for inputs, labels in self._batches("train"):
                optimizer.zero_grad()
                loss = self.criterion(model(inputs), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                if self.pruning:
                    done = math.floor(LEVELS * min(1.0, step / ramp)) / LEVELS
                    prune_net(model, FIRST + (threshold - FIRST) * done)
                losses, rows = losses + loss.item() * len(labels), rows + len(labels)
            if not math.isfinite(losses):
                raise NonFinite(f"the loss of epoch {epoch + 1} is not finite; give a smaller learning_rate")
            accuracy = self._accuracy(model, self._batches("val"))
            self.history.append(
                {"event": "evaluate", "step": step, "loss": losses / rows, "accuracy": accuracy, "sparsity": sparsity(model)}
            )
            if step >= max(ramp, math.floor(self.settles * total)) and accuracy > best:
                best, kept = accuracy, clone(dict(model.state_dict()))
        assert kept is not None  # after the last epoch the ramp is over
        model.load_state_dict(kept)
        if self.pruning and sparsity(model) < threshold - 0.5 / sum(weight.numel() for weight in prunable(model).values()):
            raise RunError(f"{sparsity(model):.2%} of the weights are zero where prune_threshold (={threshold}) was asked for")
        if self.models_path is not None:
            save_weights(Path(self.models_path) / f"{name}.safetensors", model.state_dict())
        return model

    def evaluate(self, net: nn.Module, quant_mode: bool) -> tuple[float, nn.Module]:
        """The accuracy on test rows, and the network; with `quant_mode` that on at most 2,000 batches of training rows, from which int8
        ranges are measured, and the int8 network.
        """
        observed = Observed(net) if quant_mode and not isinstance(net, Observed) else net
        batches = self._batches("train" if quant_mode else "test")
        accuracy = self._accuracy(
            observed, (batch for _, batch in zip(range(CALIBRATION), batches, strict=False)) if quant_mode else batches
        )
        return accuracy, observed.network() if observed is not net and isinstance(observed, Observed) else net

    @property
    def dataloaders(self) -> Any:
        """Another name of `dataloader`, which Sparse's documentation uses too."""
        return self.dataloader

    @dataloaders.setter
    def dataloaders(self, loaders: Any) -> None:
        self.dataloader = loaders

    def _loader(self, name: str) -> Any:
        if self.dataloader is None:
            raise InputError("dataloader (=None) is not there yet; call load_dataloaders(batch_size, collate_fn) first")
        if not len(self.dataloader[name]):
            raise DataError(f"the loader of {name} gives no batch; its rows are fewer than a batch, and drop_last leaves them out")
        return self.dataloader[name]

    def _batches(self, name: str) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels where the network is, floats in its type."""
        for inputs, labels in self._loader(name):
            yield map_tensors(self._moved, inputs), labels.to(self.devicy)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.devicy, dtype=self.dtype if tensor.is_floating_point() else None)

    @staticmethod
    def _accuracy(model: nn.Module, batches: Iterator[tuple[Any, Tensor]]) -> float:
        """Of the rows that were seen; not of those that a loader may have left out."""
        right = rows = 0
        with evaluating(model), torch.no_grad():
            for inputs, labels in batches:
                right += int((model(inputs).argmax(1).to(labels.device) == labels).sum())
                rows += len(labels)
        return right / max(rows, 1)


def _parameter(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} (={value!r}) of parameters must be a number")
    return float(value)


# ------------------------------------------------------------------ int8


class Observed(nn.Module):
    """A copy of a network, on the CPU, that measures ranges of its values while it computes; then `network()` is the int8 one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).cpu().eval()
        self._quantized: QuantizedNetwork | None = None
        self._total: Tensor | None = None

    def forward(self, inputs: Any) -> Any:
        here = map_tensors(lambda tensor: tensor.detach().cpu(), inputs)
        with torch.no_grad():
            if self._quantized is None:
                hold(self.net)
                row = map_tensors(lambda tensor: tensor[:1], here)
                self._quantized = QuantizedNetwork(lower(trace(lambda net, batch: net(batch), self.net, row)))
            part = magnitudes(self._quantized, here)
            self._total = part if self._total is None else self._total + part
            return map_tensors(lambda tensor: tensor.to(first_tensor(inputs).device), self.net(here))

    def train(self, mode: bool = True) -> Observed:
        return super().train(False)  # it is measured as it will be used

    def network(self) -> QuantizedNetwork:
        """The int8 network, with the largest magnitudes that were seen as ranges."""
        if self._quantized is None or self._total is None:
            raise DataError(
                "the network saw no batch, so int8 ranges are not known; evaluate(net, quant_mode=True) must call it on training rows"
            )
        network = copy.deepcopy(self._quantized)
        with torch.no_grad():
            network.ranges.copy_(ranges_of(self._total).to(network.ranges.dtype))
        equalize(network)
        return network.eval()


def quantize_net(trainer: Any, net: nn.Module) -> tuple[float, QuantizedNetwork]:
    """The accuracy in int8 and the int8 network: calibrated by the trainer's `evaluate(net, True)`, then measured by `evaluate(net, False)`."""
    observed = Observed(net)
    trainer.evaluate(observed, True)
    network = observed.network()
    accuracy, _ = trainer.evaluate(network, False)
    return accuracy, network


# ------------------------------------------------------------------ a fit-shaped function


def from_sparse(
    trainer: Callable[..., Any], parameters: Mapping[str, Any], *, pruning: bool = False, collate_fn: Any = None, models_path: Any = None
) -> SparseFit:
    """A function that fits a task as `anyfit.fit` does, by a class with Sparse's methods; for what takes `fit=`.

    `trainer`: the class. `parameters`: what its `train` gets; batch_size among them unless the plan says it. `pruning`: whether it prunes
    by itself; a task that prunes (`Pruned`) does so in any trainer's loop. `models_path`: where the class saves (None: nowhere that stays).
    """
    for method in ("load_dataloaders", "train", "evaluate"):
        if not callable(trainer) or not callable(getattr(trainer, method, None)):
            raise TaskError(
                f"trainer (={trainer!r}) must be a class with {method}, as Sparse's Trainer is; give the class, not an object of it"
            )
    return SparseFit(trainer, dict(parameters), pruning, collate_fn, models_path)


@dataclass(frozen=True)
class SparseFit:
    """What `from_sparse` makes: called with a task and data, it gives a Run."""

    trainer: Callable[..., Any]
    parameters: dict[str, Any]
    pruning: bool
    collate_fn: Any
    models_path: Any

    def __call__(
        self,
        task: Task,
        data: Any,
        /,
        *,
        target: str | None = None,
        validation: Any = None,
        test: Any = None,
        weights: Any = None,
        weights_partial: bool = False,
        **plan: Any,
    ) -> Run:
        """Train `task` on `data` by the class's own loop: its loss, optimizer and schedule, and its choice of the best weights.

        `plan`: epochs, batch_size, seed, device, dtype. Rows have to fit into memory; without test rows the class's `evaluate` gets those of
        validation, and the run has no figures of a test. There is no run folder, no resume and no cluster.
        """
        self._check(plan)
        if "batch_size" in self.parameters:
            plan.setdefault("batch_size", int(self.parameters["batch_size"]))
        with machine.own_random():
            prepared = prepare(task, data, target=target, validation=validation, test=test, plan={"best": True, **plan})
            machine.seed_all(prepared.plan.seed)
            net = _Asked(task, built(task, prepared.schema))
            start = (
                {} if weights is None else start_from(net.model, weights.model if isinstance(weights, State) else weights, weights_partial)
            )
            with tempfile.TemporaryDirectory(prefix="anyfit-") as temporary:
                began = time.monotonic()
                trainer, accuracy, position = self._trained(task, net, prepared, weights is not None, self.models_path or temporary)
        about = {"seconds": time.monotonic() - began, "trainer": {"evaluate": float(accuracy)}, **({"weights": start} if start else {})}
        return self._run(task, net, prepared, list(getattr(trainer, "history", ())), position, about)

    @staticmethod
    def _check(plan: Mapping[str, Any]) -> None:
        known = ("epochs", "steps", "batch_size", "seed", "device", "dtype")
        for name, value in plan.items():
            if name not in known and value not in (None, False):
                raise InputError(
                    f"{name} (={value!r}) cannot be: a Sparse Trainer runs its own loop, in this process and to its end, without run folder, resume or "
                    f"cluster; it takes {', '.join(known)}. Use anyfit.fit for the rest"
                )

    def _trained(self, task: Task, net: _Asked, prepared: Prepared, reload: bool, models_path: Any) -> tuple[Any, float, Position]:
        plan, datasets = prepared.plan, _datasets(net, prepared)
        trainer = self.trainer(
            pruning=self.pruning,
            ddtype=getattr(torch, plan.dtype),
            datasets=datasets,
            models_path=str(models_path),
            cuda=str(prepared.device),
        )
        trainer.settles = task.settles()
        trainer.load_dataloaders(plan.batch_size or len(datasets[0]), self.collate_fn or default_collate)
        batches = len(trainer.dataloader["train"])
        epochs = plan.epochs or max(1, round((plan.steps or 1) / max(1, batches)))
        net.to(device=prepared.device, dtype=getattr(torch, plan.dtype))
        # a class may build its network anew and rely on these
        old = clone(dict(net.state_dict())) if reload else None
        with _constrained(task, net.model, epochs * batches):
            given = trainer.train(net, {**self.parameters, "batch_size": plan.batch_size}, "fit", epochs, reload, old)
        if not isinstance(given, _Asked):
            raise TaskError(f"train of {_name(self.trainer)} gave a {type(given).__name__}; it must return the network that it was given")
        if given is not net:
            engine.load_model(net, given.state_dict())
        hold(net)
        if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values() if tensor.is_floating_point()):
            raise NonFinite(f"train of {_name(self.trainer)} gave weights that are not finite; give a smaller learning_rate")
        net.eval()
        accuracy, _ = trainer.evaluate(net, False)
        return trainer, accuracy, Position(epochs * batches, epochs, 0)

    def _run(
        self, task: Task, net: _Asked, prepared: Prepared, history: list[dict[str, Any]], position: Position, about: Mapping[str, Any]
    ) -> Run:
        net.to(prepared.device)
        splits = {
            split: engine.evaluate(task, net.model, prepared.batches(split)) for split in ("validation", "test") if split in prepared.rows
        }
        record = record_of("fit", task, net.model, prepared.plan, prepared.schema, prepared.device)
        numbers = {name: value for name, value in self.parameters.items() if isinstance(value, str | int | float | None)}
        record |= {"data": prepared.sources, "trainer": {"class": _name(self.trainer), "parameters": numbers}}
        state = State(model=clone(dict(net.model.state_dict())), schema=prepared.schema.to_json(), position=position)
        result = {"stopped": "finished", "steps": position.step, "epochs": position.epoch, "best": None, "splits": splits, **about}
        return Run(task, net.model, state, record, history, result)


def _name(trainer: Any) -> str:
    return str(getattr(trainer, "__qualname__", trainer))


class _Asked(nn.Module):
    """A task's model as Sparse calls a network: with inputs alone, giving logits. In training the task's augmentation comes first."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model, self._task = model, task
        self._names: tuple[str, ...] | None = None  # of the entries of a batch that is a dict

    def taken_apart(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels of a task's batch."""
        if isinstance(batch, Mapping):
            if WEIGHT in batch:
                raise DataError(
                    "rows with weights need anyfit.fit: the criterion of a Sparse Trainer does not heed them; leave the weights out"
                )
            label = next((batch[name] for name in TARGETS if name in batch), None)
            entries = {name: value for name, value in batch.items() if name not in TARGETS}
            self._names = tuple(entries)
            inputs = next(iter(entries.values())) if len(entries) == 1 else entries
        else:
            *items, label = batch if isinstance(batch, tuple | list) and len(batch) > 1 else (batch, None)
            inputs = items[0] if len(items) == 1 else tuple(items)
        if not isinstance(label, Tensor) or label.is_floating_point() or label.dim() != 1:
            raise DataError("a Sparse Trainer learns classes: rows need one whole number each as target; use anyfit.fit for anything else")
        return inputs, label

    def forward(self, inputs: Any) -> Any:
        batch = {self._names[0]: inputs} if self._names is not None and len(self._names) == 1 else inputs
        batch = tuple(batch) if isinstance(batch, list) else batch  # as default_collate gives a tuple back
        if self.training and self._task.own_method("augment"):
            device = first_tensor(batch).device

            def uniform(*shape: int) -> Tensor:
                return torch.rand(len(first_tensor(batch)), *shape, device=device)

            with torch.no_grad():
                batch = self._task.augment(batch, uniform)
        return self._task.predict(self.model, batch)


class _Rows(Dataset[Any]):
    """Rows in memory as pairs of inputs and label."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return map_tensors(lambda tensor: tensor[index], self.inputs), self.labels[index]


def _datasets(net: _Asked, prepared: Prepared) -> tuple[_Rows, _Rows, _Rows]:
    """Of train, val and test."""
    here = replace(prepared, device=torch.device("cpu"))
    found = {split: _rows(net, here, split) for split in ("train", "validation", "test") if split in prepared.rows}
    if "validation" not in found:
        raise DataError("data has no validation rows, by which a Sparse Trainer chooses; give validation=0.1, or a source")
    return found["train"], found["validation"], found.get("test", found["validation"])


def _rows(net: _Asked, prepared: Prepared, split: str) -> _Rows:
    parts = [net.taken_apart(batch) for batch in prepared.batches(split)]
    if not parts:
        raise DataError(f"data has no {split} rows")
    inputs, labels = [inputs for inputs, _ in parts], torch.cat([labels for _, labels in parts])
    flat = [list(leaves(each)) for each in inputs]
    if any(a.shape[1:] != b.shape[1:] for each in flat for a, b in zip(each, flat[0], strict=True)):
        raise DataError("rows of different lengths need anyfit.fit: a Sparse Trainer collates rows by itself; pad them to one length")
    joined = iter([torch.cat(tensors) for tensors in zip(*flat, strict=True)])
    return _Rows(map_tensors(lambda _: next(joined), inputs[0]), labels)


@contextmanager
def _constrained(task: Task, model: nn.Module, total: int) -> Iterator[None]:
    """What must hold for the weights of a task (pruned ones stay zero) in a loop that is not ours: around each step of its optimizer."""
    if not task.own_method("constrain"):
        yield
        return
    ours = {id(parameter) for parameter in model.parameters()}
    steps, restores = 0, list[Callable[[], None] | None]()

    def mine(optimizer: Optimizer) -> bool:
        return any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if mine(optimizer):
            steps += 1
            with torch.no_grad():
                restores.append(task.constrain(model, min(1.0, steps / total)))

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if mine(optimizer) and (restore := restores.pop()) is not None:
            with torch.no_grad():
                restore()

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if steps < task.settles() * total or not steps:
        raise RunError(
            f"train took {steps} steps with the weights that it was given, of {total} (epochs x batches), so what {type(task).__name__} asks for "
            "is not reached; train the network itself, not a copy, and for all epochs"
        )
