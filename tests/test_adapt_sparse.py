# ruff: noqa: B905, PTH118, RET504, SIM113 - the documentation's code stands here as it is
"""Trainers of Sparse: its documentation's code with one changed import, what is mended, and a trainer where a fit is asked for."""

from __future__ import annotations

import copy
import math
from os import path
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, device, nn, save
from torch import cuda as torchcuda
from torch import float as floatp
from torch.optim import Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset, default_collate

import anyfit
from anyfit.adapt import sparse
from anyfit.adapt.sparse import Observed, Trainer, copy_weights, from_sparse, prune_net, quantize_net, sparsity
from anyfit.errors import DataError, InputError, NonFinite, RunError, TaskError
from anyfit.program import QuantizedNetwork
from anyfit.shrink.prune import prune
from anyfit.tasks.shrunk import Pruned, prunable

PARAMETERS = {"learning_rate": 0.01, "learning_step": 4, "learning_gamma": 0.5, "prune_threshold": 0.8, "batch_size": 32}


def digits() -> tuple[Tensor, Tensor]:
    found, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images, dtype=torch.float32)[order, None] / 16, torch.tensor(found.target)[order]


@pytest.fixture(scope="module")
def datasets() -> tuple[TensorDataset, ...]:
    images, labels = digits()
    return tuple(TensorDataset(images[part], labels[part]) for part in (slice(0, 1100), slice(1100, 1400), slice(1400, None)))


@pytest.fixture(scope="module")
def few(datasets: Any) -> tuple[Any, ...]:
    return tuple(torch.utils.data.Subset(rows, range(min(400, len(rows)))) for rows in datasets)


def network(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        nn.Linear(4 * width, 10),
    )


def trained(trainer: Any, epochs: int = 6, net: nn.Module | None = None, **parameters: Any) -> nn.Module:
    torch.manual_seed(1)
    trainer.load_dataloaders(32, default_collate)
    return trainer.train(net or network(), {**PARAMETERS, **parameters}, "net", epochs, False, None)


# ------------------------------------------------------------------ the routine


@pytest.fixture(scope="module")
def pruned(datasets: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, nn.Module]:
    trainer = Trainer(pruning=True, datasets=datasets, models_path=tmp_path_factory.mktemp("models"))
    return trainer, trained(trainer)


def test_the_routine_learns_prunes_to_what_was_asked_and_saves_without_pickle(pruned: Any) -> None:
    trainer, net = pruned
    accuracy, same = trainer.evaluate(net, quant_mode=False)
    assert same is net and accuracy > 0.93
    weights = sum(weight.numel() for weight in prunable(net).values())
    zeros = sum(int((weight == 0).sum()) for weight in prunable(net).values())
    assert zeros == round(0.8 * weights)
    assert [file.name for file in trainer.models_path.iterdir()] == ["net.safetensors"]
    saved = load_file(trainer.models_path / "net.safetensors")
    assert saved.keys() == net.state_dict().keys() and all(torch.equal(saved[name], tensor) for name, tensor in net.state_dict().items())


def test_full_sparsity_is_reached_before_the_end_and_kept(few: Any) -> None:
    trainer = Trainer(pruning=True, datasets=few)
    trained(trainer, epochs=8)
    shares = [line["sparsity"] for line in trainer.history]
    assert shares == sorted(shares) and shares[0] < 0.2
    assert shares[5:] == pytest.approx([0.8] * 3, abs=1e-3), "three quarters of the way"
    assert shares[2] == pytest.approx(0.01 + 0.79 * 0.5, abs=0.02), "linear, from 1 %"


class Early(Trainer):
    """Accuracies that fall, so that the best of all is the first epoch."""

    def _accuracy(self, model: nn.Module, batches: Any) -> float:
        self.figure = getattr(self, "figure", 1.0) - 0.1
        return self.figure


def test_the_best_weights_are_sought_only_where_the_target_is_reached(few: Any) -> None:
    trainer = Early(pruning=True, datasets=few)
    net = trained(trainer, epochs=4)
    assert trainer.history[0]["accuracy"] > trainer.history[2]["accuracy"] and trainer.history[0]["sparsity"] < 0.5
    assert sparsity(net) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
def test_pruning_to_nine_tenths_keeps_accuracy_where_the_original_ramp_falls(datasets: Any) -> None:
    class Ramp(Trainer):
        """The control: to full sparsity in the last batch, without masks, and so without recovery."""

        def train_loop(self, model: Any, optimizer: Any, scheduler: Any, name: str, epochs: int, threshold: float) -> Any:
            steps, count = epochs * len(self.dataloader["train"]), 0
            for _ in range(epochs):
                for inputs, labels in self.dataloader["train"]:
                    optimizer.zero_grad()
                    self.criterion(model(inputs), labels).backward()
                    optimizer.step()
                    sparse.prune_to(list(prunable(model).values()), 0.01 + (threshold - 0.01) / steps * count)
                    count += 1
            return model

    accuracies = {}
    for kind, pruning in ((Trainer, False), (Trainer, True), (Ramp, True)):
        trainer = kind(pruning=pruning, datasets=datasets)
        accuracies[kind, pruning], _ = trainer.evaluate(trained(trainer, 24, network(32), prune_threshold=0.9, learning_step=9), False)
    assert accuracies[Trainer, True] > accuracies[Trainer, False] - 0.01
    assert accuracies[Ramp, True] < 0.9


def test_no_row_is_left_out_of_a_figure(datasets: Any) -> None:
    train, val, test = datasets
    trainer = Trainer(datasets=(torch.utils.data.Subset(train, range(97)), val, torch.utils.data.Subset(test, range(3))))
    trainer.load_dataloaders(32, None)
    seen = {name: sum(len(labels) for _, labels in loader) for name, loader in trainer.dataloader.items()}
    assert seen == {"train": 96, "val": 300, "test": 3}, "one row alone has no batch statistics; all else counts"
    assert all(loader.num_workers == 0 for loader in trainer.dataloaders.values())
    net = network()
    accuracy, _ = trainer.evaluate(net, False)
    images, labels = test[:3]
    assert accuracy == float((net.eval()(images).argmax(1) == labels).float().mean())


def test_the_rate_falls(few: Any) -> None:
    rates = []

    class Seen(Trainer):
        def train_loop(self, model: Any, optimizer: Any, scheduler: Any, name: str, epochs: int, threshold: float) -> Any:
            net = super().train_loop(model, optimizer, scheduler, name, epochs, threshold)
            rates.append(optimizer.param_groups[0]["lr"])
            return net

    trained(Seen(datasets=few), epochs=4, learning_step=2)
    assert rates == [pytest.approx(0.01 * 0.5**2)]


# ------------------------------------------------------------------ weights


def test_pruned_weights_stay_zero_whatever_the_optimizer_does() -> None:
    torch.manual_seed(0)
    net = network()
    optimizer = Adam(net.parameters(), lr=0.1)
    images, labels = digits()
    for _ in range(3):  # moments that go on moving weights without a gradient
        nn.functional.cross_entropy(net(images[:64]), labels[:64]).backward()
        optimizer.step()
    assert prune_net(net, 0.6) is net
    zeros = {name: weight == 0 for name, weight in prunable(net).items()}
    total = sum(zero.numel() for zero in zeros.values())
    assert sum(int(zero.sum()) for zero in zeros.values()) == round(0.6 * total)
    copied = copy.deepcopy(net)
    for each in (net, copied):
        optimizer = optimizer if each is net else Adam(each.parameters(), lr=0.1)
        for _ in range(4):
            nn.functional.cross_entropy(each(images[:64]), labels[:64]).backward()
            optimizer.step()
        state = each.state_dict()
        assert all(not state[name][zero].any() for name, zero in zeros.items())
        assert state.keys() == network().state_dict().keys()
        assert sparsity(prune_net(each, 0.3)) == pytest.approx(0.6, abs=1e-3), "a smaller share gives nothing back"
    assert sparsity(prune_net(net, 0.7)) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("amount", [1.0, -0.1, 90.0])
def test_a_share_that_leaves_nothing_is_refused(amount: float, datasets: Any) -> None:
    with pytest.raises(InputError, match=rf"amount \(={amount}\) must be from 0 to below 1"):
        prune_net(network(), amount)
    with pytest.raises(InputError, match=rf"prune_threshold \(={amount}\) must be from 0.01 to below 1"):
        trained(Trainer(pruning=True, datasets=datasets), prune_threshold=amount)


def test_what_overlaps_is_copied() -> None:
    torch.manual_seed(0)
    old, new = nn.Linear(5, 4), nn.Linear(3, 6)
    before = new.weight.detach().clone()
    assert copy_weights(old.state_dict(), new) is new
    assert (
        torch.equal(new.weight[:4], old.weight[:, :3]) and torch.equal(new.weight[4:], before[4:]) and torch.equal(new.bias[:4], old.bias)
    )


def test_a_morphed_network_starts_from_its_parent(datasets: Any) -> None:
    trainer = Trainer(datasets=datasets)
    parent = trained(trainer, epochs=4)
    wider = network()
    wider[9] = nn.Linear(64, 10)
    child = trainer.train(wider, {**PARAMETERS, "learning_rate": 1e-6}, "child", 1, True, parent.state_dict())
    assert trainer.evaluate(child, False)[0] == pytest.approx(trainer.evaluate(parent, False)[0], abs=0.02)
    with pytest.raises(InputError, match=r"old_net \(=None\) must be weights"):
        trainer.train(wider, PARAMETERS, "child", 1, True, None)


# ------------------------------------------------------------------ int8


def test_quant_mode_calibrates_on_training_rows_and_gives_the_int8_network(pruned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, net = pruned
    seen: list[int] = []
    forward = Observed.forward
    monkeypatch.setattr(Observed, "forward", lambda self, inputs: (seen.append(len(inputs)), forward(self, inputs))[1])
    accuracy, quantized = trainer.evaluate(net, quant_mode=True)
    assert isinstance(quantized, QuantizedNetwork) and sum(seen) == 1100 and accuracy > 0.9
    before, after = trainer.evaluate(net, False)[0], trainer.evaluate(quantized, False)[0]
    assert after > before - 0.02
    weights = [operation.constants["weight"] for operation in quantized.program().operations if "weight" in operation.constants]
    assert len(weights) == 3 and all(weight.dtype == "int8" for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) >= 0.8 * sum(weight.size for weight in weights) - 1, "zeros stay zeros"
    seen.clear()
    monkeypatch.setattr(sparse, "CALIBRATION", 3)
    trainer.evaluate(net, True)
    assert seen == [32, 32, 32]


# ------------------------------------------------------------------ "Changing the class": the documentation's code


class Whole:
    """The mandatory parts as the documentation has them, with nothing of ours but copy_weights and prune_net."""

    def __init__(
        self,
        pruning=False,
        ddtype=floatp,
        datasets=None,
        models_path=None,
        cuda="cuda:0",
    ):
        self.datasets = datasets
        self.dtype = ddtype
        # TODO: choose GPU with less memory
        self.devicy = device(cuda if torchcuda.is_available() else "cpu")
        self.datasizes = {i: len(sett) for i, sett in zip(["train", "val", "test"], self.datasets)}
        self.pruning = pruning
        self.models_path = models_path
        self.dataloader = None
        self.criterion = nn.CrossEntropyLoss()

    def load_dataloaders(self, batch_size, collate_fn):
        """Defines data loaders as a call to be able to define
        collates from outside
        """
        self.dataloader = {
            i: DataLoader(
                sett,
                batch_size=batch_size,
                shuffle=True,
                num_workers=4,
                drop_last=True,
                collate_fn=collate_fn,
            )
            for i, sett in zip(["train", "val", "test"], self.datasets)
        }

    def train(self, net, parameters, name, epochs, reload, old_net):
        # Initialize network
        if reload:
            net = copy_weights(old_net, net)
        net.to(dtype=self.dtype, device=self.devicy)  # pyre-ignore [28]
        # Define loss and optimizer
        optimizer = Adam(net.parameters(), lr=parameters.get("learning_rate"))
        # TODO: change to reduce on plateau, is for cifar change 1000
        exp_lr_scheduler = lr_scheduler.StepLR(
            optimizer,
            step_size=parameters.get("learning_step") * 1000,
            gamma=parameters.get("learning_gamma"),
        )

        # Train Network
        net = self.train_loop(
            net,
            optimizer,
            exp_lr_scheduler,
            name,
            epochs,
            parameters.get("prune_threshold"),
        )
        return net

    def train_loop(self, model, optimizer, scheduler, name, epochs, threshold):
        steps = epochs * len(self.dataloader["train"])
        init_threshold = 0.01
        thres_step = (threshold - init_threshold) / steps
        cnt = 0
        for _ in range(epochs):
            for phase in ["train", "val"]:
                model.train(phase == "train")
                for batch in self.dataloader[phase]:
                    inputs, labels = batch[0].to(dtype=self.dtype, device=self.devicy), batch[1].to(self.devicy)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        loss = self.criterion(model(inputs), labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                            scheduler.step()
                    if phase == "train" and self.pruning:
                        model = prune_net(model, init_threshold + thres_step * cnt)
                        cnt += 1
        save(model.state_dict(), path.join(self.models_path, str(name) + ".pth"))
        return model

    def evaluate(self, net, quant_mode):
        net.to("cpu")
        net.eval()
        if quant_mode:
            data_loader = self.dataloader["train"]
        else:
            data_loader = self.dataloader["test"]
        correct, total, cnt = 0, 0, 0
        for batch in data_loader:
            inputs, labels = batch[0].to("cpu"), batch[1].to("cpu")
            outputs = net(inputs)
            correct += (outputs.argmax(1) == labels).sum().item()
            total += labels.size(0)
            cnt += 1
            if quant_mode and cnt > 2000:
                break
        return correct / total, net


class TheirLoaders(Trainer):
    load_dataloaders = Whole.load_dataloaders


class TheirTrain(Trainer):
    train = Whole.train


class TheirLoop(Trainer):
    train_loop = Whole.train_loop


class TheirEvaluate(Trainer):
    evaluate = Whole.evaluate


THEIRS = [Whole, TheirLoaders, TheirTrain, TheirLoop, TheirEvaluate]
four_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # of their loaders, on fewer cores


@four_workers
@pytest.mark.parametrize("kind", THEIRS, ids=lambda kind: kind.__name__)
def test_code_of_the_documentation_runs_with_one_changed_import(kind: Any, few: Any, tmp_path: Path) -> None:
    trainer = kind(pruning=True, datasets=few, models_path=tmp_path)
    assert trainer.datasizes == {"train": 400, "val": 300, "test": 397}
    net = trained(trainer, epochs=2)
    accuracy, same = trainer.evaluate(net, False)
    assert same is net and 0.15 < accuracy < 1
    steps = 2 * len(trainer.dataloader["train"])  # their ramp ends one step before its end
    reached = 0.8 if trainer.train_loop.__func__ is Trainer.train_loop else 0.01 + 0.79 * (steps - 1) / steps
    assert sparsity(net) == pytest.approx(reached, abs=1e-3)
    assert [file.stem for file in tmp_path.iterdir()] == ["net"]
    int8, quantized = quantize_net(trainer, net)
    assert isinstance(quantized, QuantizedNetwork) and int8 == pytest.approx(accuracy, abs=0.1)


# ------------------------------------------------------------------ in place of a fit


class Digits(anyfit.Task):
    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        return network()


class Moved(Digits):
    """A task with an augmentation."""

    def augment(self, batch: Any, uniform: Any) -> Any:
        TOLD.append(tuple(uniform(2).shape))
        return {**batch, "image": batch["image"] + 0.0}


TOLD: list[tuple[int, ...]] = []


def rows(count: int = 600) -> dict[str, Tensor]:
    images, labels = digits()
    return {"image": images[:count], "target": labels[:count]}


def test_a_trainer_fits_a_task() -> None:
    images, labels = digits()
    fit = from_sparse(Trainer, PARAMETERS)
    run = fit(Digits(), rows(1200), test={"image": images[1200:], "target": labels[1200:]}, epochs=4, seed=3)
    assert run.stopped == "finished" and run.splits["test"]["accuracy"] > 0.9 and "validation" in run.splits
    assert run.result["trainer"]["evaluate"] == pytest.approx(run.splits["test"]["accuracy"])
    assert run.state.model.keys() == network().state_dict().keys() and run.state.schema == run.record["schema"]
    assert (
        run.state.position == (4 * 34, 4, 0)
        and run.result["epochs"] == len(run.history) == 4
        and run.record["trainer"]["class"] == "Trainer"
    )
    assert anyfit.evaluate(run, {"image": images[1200:], "target": labels[1200:]})["accuracy"] == run.splits["test"]["accuracy"]
    again = fit(Digits(), rows(1200), epochs=4, seed=3)
    assert all(torch.equal(run.state.model[name], tensor) for name, tensor in again.state.model.items()), "a seed is a result"


class Theirs(Whole):
    """Their class with loaders of no processes."""

    load_dataloaders = Trainer.load_dataloaders


@pytest.mark.parametrize("kind", [Trainer, Theirs], ids=lambda kind: kind.__name__)
def test_a_task_that_prunes_does_so_in_any_loop(kind: Any) -> None:
    first = from_sparse(kind, PARAMETERS)(Digits(), rows(), epochs=3)
    task = Pruned(task=Digits(), amount=0.7)
    run = from_sparse(kind, PARAMETERS)(task, rows(), weights=first.state, epochs=4)
    assert sparsity(run.model) == pytest.approx(0.7, abs=1e-3)
    assert run.result["weights"]["left"] == []
    for given in (first, dict(first.state.model)):
        run = from_sparse(kind, {**PARAMETERS, "learning_rate": 0.0})(Digits(), rows(), weights=given, epochs=1)
        assert all(
            torch.equal(run.state.model[name], weight)
            for name, weight in first.state.model.items()
            if "running" not in name and "num_" not in name
        )


def test_shrink_takes_a_trainer_in_place_of_a_fit() -> None:
    fit = from_sparse(Trainer, PARAMETERS)
    run = fit(Digits(), rows(), epochs=2)
    task, state = prune(Digits(), run, rows(), 0.6, fit=fit, epochs=4)
    model = task.build_model(anyfit.Schema.from_json(state.schema))
    model.load_state_dict(state.model)
    assert sparsity(model) == pytest.approx(0.6, abs=1e-3)


class Copying(Trainer):
    def train(self, net: Any, *rest: Any) -> Any:
        return super().train(copy.deepcopy(net), *rest)


class Forgetful(Trainer):
    def train(self, net: Any, *rest: Any) -> Any:
        super().train(net, *rest)
        return net.model


class Wild(Trainer):
    def train(self, net: Any, *rest: Any) -> Any:
        next(net.parameters()).data.fill_(math.nan)
        return net


def test_a_trainer_that_breaks_the_contract_is_told() -> None:
    assert from_sparse(Copying, PARAMETERS)(Digits(), rows(), epochs=4).splits["validation"]["accuracy"] > 0.3
    with pytest.raises(
        RunError, match=r"train took 0 steps with the weights that it was given, of \d+ .*, so what Pruned asks for is not reached"
    ):
        from_sparse(Copying, PARAMETERS)(Pruned(task=Digits(), amount=0.5), rows(), epochs=1)
    with pytest.raises(TaskError, match="train of Forgetful gave a Sequential; it must return the network that it was given"):
        from_sparse(Forgetful, PARAMETERS)(Digits(), rows(), epochs=1)
    with pytest.raises(NonFinite, match="train of Wild gave weights that are not finite"):
        from_sparse(Wild, PARAMETERS)(Digits(), rows(), epochs=1)


@pytest.mark.parametrize("name", ["run", "resume", "nproc", "cluster", "privacy", "clip", "accumulate"])
def test_what_a_loop_of_its_own_cannot_give_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} \(='given'\) cannot be: a Sparse Trainer runs its own loop"):
        from_sparse(Trainer, PARAMETERS)(Digits(), rows(), epochs=1, **{name: "given"})


def test_what_is_no_trainer_and_rows_that_do_not_fit_are_refused(datasets: Any) -> None:
    with pytest.raises(TaskError, match=r"must be a class with load_dataloaders.*give the class, not an object of it"):
        from_sparse(Trainer(datasets=datasets), PARAMETERS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"learning_rate \(=None\) of parameters must be a number"):
        from_sparse(Trainer, {})(Digits(), rows(), epochs=1)
    images, labels = digits()
    with pytest.raises(DataError, match="a Sparse Trainer learns classes"):
        from_sparse(Trainer, PARAMETERS)(Digits(), {"image": images, "target": labels.float()}, epochs=1)
    with pytest.raises(InputError, match=r"datasets \(=None\) must be those of train, val and test"):
        Trainer().load_dataloaders(8, None)
    with pytest.raises(InputError, match=r"dataloader \(=None\) is not there yet"):
        Trainer(datasets=datasets).train(network(), PARAMETERS, "net", 1, False, None)
    with pytest.raises(DataError, match="the network saw no batch"):
        Observed(network()).network()


def test_the_augmentation_of_the_task_is_done_in_training_alone() -> None:
    TOLD.clear()
    run = from_sparse(Trainer, PARAMETERS)(Moved(), rows(200), epochs=1)
    assert sum(rows for rows, _ in TOLD) == run.record["data"]["train"]["rows"] and set(TOLD[:-1]) == {(32, 2)}
