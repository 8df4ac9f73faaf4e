"""LightningModules as tasks. Most are plain modules with Lightning's methods: the adapter knows nothing else of them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import anyfit
from anyfit.adapt import lightning as adapter
from anyfit.adapt.lightning import from_lightning
from anyfit.adapt.lightning.task import REFUSED
from anyfit.data import mix_seed
from anyfit.errors import InputError, StateError, TaskError
from anyfit.schema import Schema


def points(rows: int = 120, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows by seed, all labelled by one rule."""
    rule = torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=dtype)
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, (x @ rule).argmax(1)


class Net(nn.Module):
    """What a LightningModule has, without Lightning."""

    def __init__(self, lr: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        self.log("train_acc", (logits.argmax(1) == y).double().mean(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log_dict({"val_loss": cross_entropy(logits, y), "val_acc": (logits.argmax(1) == y).double().mean()}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def made(**methods: Any) -> nn.Module:
    """A Net with some methods of its own."""
    return type("Made", (Net,), methods)()


def optimized(configure: Callable[[Any], Any]) -> nn.Module:
    return made(configure_optimizers=configure)


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ training


def test_the_losses_are_those_of_a_loop_by_hand() -> None:
    x, y = points(dtype=torch.float64)
    net = Net().double()
    run = anyfit.fit(from_lightning(net), (x, y), epochs=2, batch_size=50, seed=3, log_every=1)

    by_hand = Net().double()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    losses = []
    for epoch in range(2):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix_seed(3, epoch)))
        for rows in order.split(50):
            loss = cross_entropy(by_hand(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    told = [line["loss"] for line in run.history if line["event"] == "step"]
    assert told == pytest.approx(losses, rel=1e-12, abs=0)
    trained = run.model.state_dict()
    assert run.state.model["layers.0.weight"].dtype == torch.float64  # the module's own type
    assert all(torch.allclose(trained[name], value, rtol=0, atol=1e-13) for name, value in by_hand.state_dict().items())


def test_training_lowers_the_loss_and_tells_what_the_module_logs() -> None:
    run = anyfit.fit(from_lightning(Net(), epochs=15, batch_size=20), points(), validation=points(60, 1), log_every=6)
    steps = [line for line in run.history if line["event"] == "step"]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["logs"]["train_acc"] > 0.8
    assert len([line for line in run.history if line["event"] == "evaluate"]) == 15
    figures = run.splits["validation"]
    assert figures["loss"] == figures["val_loss"] and figures["val_acc"] > 0.8 and figures["rows"] == 60


def test_a_loader_trains_as_its_data_set_does() -> None:
    x, y = points()
    loader = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True)
    one = anyfit.fit(from_lightning(Net()), loader, validation=DataLoader(TensorDataset(x, y), batch_size=50), epochs=2)
    two = anyfit.fit(from_lightning(Net()), (x, y), epochs=2, batch_size=24)
    assert equal(one.state.model, two.state.model)
    assert one.splits["validation"]["rows"] == 120


def test_each_fit_starts_from_the_modules_weights_at_adaptation() -> None:
    net = Net(dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    task = from_lightning(net)
    first = anyfit.fit(task, points(), epochs=2, seed=5)
    assert equal(net.state_dict(), before)  # the module itself is left alone
    with torch.no_grad():
        net.layers[0].weight.zero_()
    assert equal(anyfit.fit(task, points(), epochs=2, seed=5).state.model, first.state.model)


def test_accumulation_over_uneven_batches_is_one_large_batch() -> None:
    x, y = points(50, dtype=torch.float64)
    small = anyfit.fit(from_lightning(Net().double()), (x, y), epochs=3, batch_size=16, accumulate=4)
    whole = anyfit.fit(from_lightning(Net().double()), (x, y), epochs=3, batch_size=50)
    for name, value in whole.state.model.items():
        assert torch.allclose(small.state.model[name], value, rtol=0, atol=1e-13)


def test_resume_is_exact(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def schedule(self: Any) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        decay = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}
        return [optimizer], [decay, {"scheduler": plateau, "monitor": "val_acc"}]

    task = from_lightning(made(configure_optimizers=schedule, __init__=lambda self: Net.__init__(self, dropout=0.4)))
    options: dict[str, Any] = {"epochs": 4, "batch_size": 50, "validation": 0.2, "log_every": 2, "checkpoint_every_s": 0.0}
    whole = anyfit.fit(task, points(), run=tmp_path / "whole", **options)
    for stop in (1, 2, 5):
        seen = 0

        def interrupt(event: dict[str, Any], stop: int = stop) -> None:
            nonlocal seen
            seen += event["event"] == "checkpoint"
            if seen == stop:
                raise Stop

        with pytest.raises(Stop):
            anyfit.fit(task, points(), run=tmp_path / str(stop), on_event=interrupt, **options)
        again = anyfit.fit(task, points(), run=tmp_path / str(stop), resume=True, **options)
        assert equal(again.state.model, whole.state.model) and again.history == whole.history


def test_a_run_folder_is_opened_with_the_task_and_refuses_other_code(tmp_path: Path) -> None:
    task, (x, y) = from_lightning(Net()), points()
    run = anyfit.fit(task, (x, y), run=tmp_path / "r", epochs=1)
    assert torch.equal(anyfit.predict(tmp_path / "r", (x,), task=task), anyfit.predict(run, (x, y)))
    with pytest.raises(
        StateError, match=r"lives in no file \(anyfit.adapt.lightning:from_lightning.<locals>.Net#\w{12}\); pass it as task="
    ):
        anyfit.predict(tmp_path / "r", (x,))
    with pytest.raises(StateError, match="start a new run, or pass weights="):
        anyfit.fit(from_lightning(made()), (x, y), run=tmp_path / "r", resume=True, epochs=2)


# ------------------------------------------------------------------ what the methods may be


def test_a_step_may_return_a_dict_and_take_the_batch_alone() -> None:
    def training_step(self: Any, batch: Any) -> Any:
        return {"loss": cross_entropy(self(batch[0]), batch[1])[None], "more": 1}

    run = anyfit.fit(from_lightning(made(training_step=training_step)), points(), epochs=2)
    plain = anyfit.fit(from_lightning(Net()), points(), epochs=2)
    assert equal(run.state.model, plain.state.model)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"training_step of Made returned None; anyfit skips no batch"),
        ({"logits": 1}, r"training_step of Made returned a dict with logits; return the loss as one number"),
        (torch.zeros(3), r"training_step of Made returned a tensor of shape \(3,\); return the loss"),
        (0.5, r"training_step of Made returned a float; return the loss"),
    ],
)
def test_a_step_without_a_loss_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        anyfit.fit(from_lightning(made(training_step=lambda self, batch, batch_idx: returned)), points(), epochs=1)


def test_the_loss_of_an_evaluation_is_returned_or_logged_or_monitored() -> None:
    def evaluated(step: Callable[..., Any], **options: Any) -> dict[str, Any]:
        task = from_lightning(made(validation_step=step), **options)
        return anyfit.fit(task, points(), validation=points(60, 1), epochs=1).splits["validation"]

    def returns(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log_dict({"other": 3, "loss": 7, "rows": 8})
        return {"loss": cross_entropy(self(batch[0]), batch[1])}

    def logs(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("dev/celoss", cross_entropy(self(batch[0]), batch[1]), on_epoch=True)

    def two(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("a_loss", torch.tensor(1.0))
        self.log("b_loss", torch.tensor(2.0))

    def none(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("hidden", 1.0, on_step=False, on_epoch=False)

    assert evaluated(returns)["loss"] == evaluated(logs)["loss"] > 0
    assert evaluated(returns)["other"] == 3 and evaluated(returns)["rows"] == 60
    assert evaluated(two, monitor="b_loss")["loss"] == 2
    assert evaluated(returns, monitor="other")["loss"] == 3
    with pytest.raises(TaskError, match="validation_step of Made returns no loss and logs a_loss, b_loss; return the loss, or say which"):
        evaluated(two)
    with pytest.raises(TaskError, match="returns no loss and logs nothing"):
        evaluated(none)
    with pytest.raises(TaskError, match=r"monitor \(='val_f1'\) is no number that validation_step logs; it logs: other"):
        evaluated(returns, monitor="val_f1")


def test_figures_are_means_over_rows_or_over_the_given_size() -> None:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.log("index", batch_idx)
        self.log("sized", float(batch_idx), batch_size=1)
        if batch_idx == 0:
            self.log("sometimes", 5.0)
        return batch[0].sum() * 0 + len(batch[0])

    task = from_lightning(made(validation_step=validation_step))
    x, y = points(60)
    loader = DataLoader(TensorDataset(x, y), batch_size=40)  # 40 and 20 rows
    for _ in range(2):
        run = anyfit.fit(task, points(), validation=loader, epochs=2)
        figures = run.splits["validation"]
        assert figures["index"] == pytest.approx(20 / 60) and figures["sized"] == 0.5 and figures["sometimes"] == 5
        assert figures["loss"] == pytest.approx((40 * 40 + 20 * 20) / 60)


def test_a_test_step_serves_where_there_is_no_validation_step() -> None:
    class Untested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Linear(4, 3)
            self.lr = 0.1

        forward, training_step, configure_optimizers = Net.forward, Net.training_step, Net.configure_optimizers

    class Tested(Untested):
        test_step = Net.validation_step

    assert anyfit.fit(from_lightning(Tested()), points(), test=0.25, epochs=1).splits["test"]["val_acc"] > 0
    with pytest.raises(TaskError, match="Untested defines neither validation_step nor test_step, so it cannot be evaluated"):
        anyfit.fit(from_lightning(Untested()), points(), test=0.25, epochs=1)


def test_prediction_is_predict_step_or_forward_without_the_target() -> None:
    x, y = points()
    run = anyfit.fit(from_lightning(Net()), (x, y), epochs=1)
    logits = anyfit.predict(run, (x, y))
    assert torch.equal(logits, run.model.eval()(x).detach())
    labels = from_lightning(made(predict_step=lambda self, batch, batch_idx, dataloader_idx=0: self(batch[0]).argmax(1)))
    assert torch.equal(anyfit.predict(anyfit.fit(labels, (x, y), epochs=1), (x,)), logits.argmax(1))


def test_the_module_reads_epoch_step_index_and_device() -> None:
    seen: list[tuple[int, int, int]] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        seen.append((self.current_epoch, self.global_step, batch_idx))
        assert self.trainer.is_global_zero and self.trainer.current_epoch == self.current_epoch
        return cross_entropy(self(batch[0].to(self.device)), batch[1])

    def validation_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        seen.append((self.current_epoch, self.global_step, -1))
        return torch.tensor(1.0)

    task = from_lightning(made(training_step=training_step, validation_step=validation_step))
    anyfit.fit(task, points(40), validation=points(5), epochs=2, batch_size=10, accumulate=2)
    epoch = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 1, 3), (0, 2, -1)]
    assert seen[:10] == [*epoch, *((1, step + 2, index) for _, step, index in epoch)]


def test_what_needs_a_trainer_is_an_error_that_names_it() -> None:
    def configure(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)

    with pytest.raises(TaskError, match=r"Made reads self.trainer.estimated_stepping_batches, but anyfit trains it without a Lightning"):
        anyfit.fit(from_lightning(optimized(configure)), points(), epochs=1)
    with pytest.raises(TaskError, match=r"self.log\('x'\) was called outside training_step"):
        anyfit.fit(from_lightning(made(setup=lambda self, stage: self.log("x", 1))), points(), epochs=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda self: self.log("v", torch.ones(2)), r"self.log\('v'\) got a tensor of shape \(2,\); log one number"),
        (lambda self: self.log("v", "high"), r"self.log\('v'\) got a str"),
        (lambda self: self.log("v", 1.0, reduce_fx="sum"), r"self.log\('v', reduce_fx='sum'\) is not supported; logs are means"),
    ],
)
def test_odd_logs_are_refused(call: Callable[[Any], None], message: str) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        call(self)
        return Net.training_step(self, batch, batch_idx)

    with pytest.raises(TaskError, match=message):
        anyfit.fit(from_lightning(made(training_step=training_step)), points(), epochs=1)


def test_prepare_data_and_setup_are_called_and_loaders_are_found() -> None:
    called: list[str] = []

    def setup(self: Any, stage: str) -> None:
        called.append(stage)
        self.rows = TensorDataset(*points(40 if stage == "fit" else 20))

    loader = lambda self: DataLoader(self.rows, batch_size=10)  # noqa: E731
    net = made(
        setup=setup,
        prepare_data=lambda self: called.append("data"),
        train_dataloader=loader,
        val_dataloader=lambda self: [loader(self)],
        test_dataloader=loader,
    )
    task = from_lightning(net)
    sources = task.sources()
    assert called == ["data", "fit", "test"] and list(sources) == ["data", "validation", "test"]
    run = anyfit.fit(task, **task.sources(), epochs=1)
    assert run.result["steps"] == 2 and run.splits["validation"]["rows"] == 20

    class Data:
        def __init__(self, count: int = 1) -> None:
            self.count = count

        def train_dataloader(self) -> Any:
            return [DataLoader(TensorDataset(*points(30)), batch_size=10)] * self.count

    assert list(task.sources(Data())) == ["data"]
    with pytest.raises(TaskError, match="train_dataloader of Data gives 2 loaders; give one"):
        task.sources(Data(2))
    with pytest.raises(TaskError, match=r"Net defines no train_dataloader; pass the data to anyfit.fit itself"):
        from_lightning(Net()).sources()
    Data.transfer_batch_to_device = lambda self: None
    with pytest.raises(TaskError, match="Data overrides transfer_batch_to_device, which sources cannot honour"):
        task.sources(Data())


# ------------------------------------------------------------------ optimizers


def rates(configure: Callable[[Any], Any], **options: Any) -> list[float]:
    run = anyfit.fit(from_lightning(optimized(configure)), points(40), epochs=3, batch_size=20, log_every=1, **options)
    return [line["lr"] for line in run.history if line["event"] == "step"]


def sgd(self: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(self.parameters(), lr=1.0)


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


FORMS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "one": (lambda o: o, None),
    "list": (lambda o: [o], None),
    "two lists": (lambda o: ([o], [halved(o)]), "epoch"),
    "two lists, with a config": (lambda o: ([o], [{"scheduler": halved(o), "interval": "step", "name": "rate"}]), "step"),
    "list and one scheduler": (lambda o: ([o], halved(o)), "epoch"),
    "dict": (lambda o: {"optimizer": o}, None),
    "dict with a scheduler": (lambda o: {"optimizer": o, "lr_scheduler": halved(o)}, "epoch"),
    "dict with a config": (
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": halved(o), "interval": "step", "frequency": 1, "strict": True}},
        "step",
    ),
    "a tuple of one dict": (lambda o: ({"optimizer": o, "lr_scheduler": {"scheduler": halved(o), "interval": "epoch"}},), "epoch"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_optimizer_and_scheduler(form: str) -> None:
    give, every = FORMS[form]
    # the line of a step is written after the schedule moved on
    expected = {None: [1] * 6, "step": [1 / 2 ** (n + 1) for n in range(6)], "epoch": [1, 0.5, 0.5, 0.25, 0.25, 0.125]}[every]
    assert rates(lambda self: give(sgd(self))) == expected


def test_several_schedulers_of_one_optimizer() -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        return [optimizer], [{"scheduler": halved(optimizer), "interval": "step"}, halved(optimizer)]

    assert rates(configure) == [2.0**-n for n in (1, 3, 4, 6, 7, 9)]


def plateau(monitor: str | None = "val_score", **config: Any) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = sgd(self)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
        if config:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor, **config}}
        return {"optimizer": optimizer, "lr_scheduler": scheduler, **({"monitor": monitor} if monitor else {})}

    return configure


def test_a_plateau_watches_its_own_figure_after_each_evaluation() -> None:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.log("val_score", float(self.current_epoch == 1))
        return torch.tensor(1.0)

    def moved(configure: Any) -> list[float]:
        task = from_lightning(made(configure_optimizers=configure, validation_step=validation_step))
        run = anyfit.fit(task, points(40), validation=points(8), epochs=4, batch_size=40, log_every=1)
        return [line["lr"] for line in run.history if line["event"] == "step"]

    assert moved(plateau()) == moved(plateau(interval="epoch")) == [1, 1, 1, 0.5]
    assert moved(plateau("missing", strict=False)) == [1] * 4
    with pytest.raises(TaskError, match=r"monitor \(='missing'\) of the scheduler is no figure of the evaluation; there are: loss"):
        moved(plateau("missing"))


class OwnScheduler:
    optimizer = None


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda self: None, "gives a NoneType; return a torch optimizer"),
    "several": (lambda self: [sgd(self), sgd(self)], "gives 2 optimizers; automatic optimization takes one, in Lightning 2 too"),
    "several, with schedulers": (lambda self: ([sgd(self), sgd(self)], []), "gives 2 optimizers"),
    "several dicts": (lambda self: ({"optimizer": sgd(self)}, {"optimizer": sgd(self)}), "gives 2 optimizers"),
    "closure": (lambda self: torch.optim.LBFGS(self.parameters()), "gives LBFGS, whose step needs a closure"),
    "key": (lambda self: {"optimizer": sgd(self), "frequency": 2}, "gives a dict with the key 'frequency'; its keys are"),
    "no optimizer": (lambda self: {"lr_scheduler": None}, "gives a dict with no key 'optimizer'"),
    "frequency": (
        lambda self: ([o := sgd(self)], [{"scheduler": halved(o), "frequency": 3}]),
        r"frequency \(=3\) of the scheduler in .* must be 1; anyfit steps it after every epoch",
    ),
    "interval": (lambda self: ([o := sgd(self)], [{"scheduler": halved(o), "interval": "hour"}]), r"interval \(='hour'\) of the scheduler"),
    "scheduler key": (lambda self: ([o := sgd(self)], [{"scheduler": halved(o), "intervall": "step"}]), "with the key 'intervall'"),
    "other optimizer": (lambda self: ([sgd(self)], [halved(sgd(self))]), "gives a ExponentialLR of another optimizer"),
    "no scheduler": (lambda self: ([sgd(self)], [OwnScheduler()]), "gives a OwnScheduler as scheduler; it needs step, state_dict"),
    "no monitor": (plateau(None), "gives a ReduceLROnPlateau without monitor; name the figure that it watches"),
    "plateau by step": (plateau(interval="step"), r"interval \(='step'\) of the ReduceLROnPlateau"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_optimizers_are_refused(case: str) -> None:
    configure, message = BAD[case]
    with pytest.raises(TaskError, match=message):
        anyfit.fit(from_lightning(optimized(configure)), points(), epochs=1)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("hook", REFUSED)
def test_each_hook_that_cannot_be_honoured_is_refused_by_name(hook: str) -> None:
    with pytest.raises(TaskError, match=rf"Made overrides {hook}, which from_lightning cannot honour; leave it out"):
        from_lightning(made(**{hook: lambda self, *arguments: None}))


def test_all_hooks_stand_in_one_error() -> None:
    net = made(on_train_start=lambda self: None, backward=lambda self, loss: None)
    net.optimizer_step = lambda *arguments: None  # on the object
    with pytest.raises(TaskError, match=r"Made overrides on_train_start, backward, optimizer_step, which .* leave them out"):
        from_lightning(net)


def test_manual_optimization_is_refused() -> None:
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(TaskError, match="Net sets automatic_optimization = False; anyfit takes the optimizer steps here"):
        from_lightning(net)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            lambda self, batch, batch_idx, optimizer_idx: None,
            "training_step of Made wants optimizer_idx; it is given a batch and its index",
        ),
        (lambda self, dataloader_iter: None, "training_step of Made wants dataloader_iter"),
        (lambda self, batch, *, stage: None, "training_step of Made wants stage"),
    ],
)
def test_steps_that_want_more_are_refused(step: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        from_lightning(made(training_step=step))


def test_what_is_no_lightning_module_is_refused() -> None:
    with pytest.raises(TaskError, match=r"module \(a type\) must be a LightningModule that is made already"):
        from_lightning(Net)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="Linear defines no training_step, which from_lightning needs"):
        from_lightning(nn.Linear(2, 2))
    with pytest.raises(InputError, match="epoch is no field of the plan"):
        from_lightning(Net(), epoch=3)
    net = Net()
    net.kept = net.layers[0].weight * 2  # a tensor with a history
    with pytest.raises(TaskError, match=r"Net cannot be copied .*; each fit starts from a copy"):
        from_lightning(net)
    with pytest.raises(TaskError, match=r"model \(a Net\) was not built by this task"):
        from_lightning(Net()).step(Net(), points())
    with pytest.raises(TaskError, match="hparams of a LightningModule are only recorded"):
        from_lightning(Net()).replaced(hparams={"lr": 3}).build_model(Schema(()))


# ------------------------------------------------------------------ the real one


def test_the_adapter_does_not_import_lightning() -> None:
    nodes = [node for path in Path(adapter.__file__).parent.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert "torch" in roots and not roots & {"lightning", "pytorch_lightning", "torchmetrics"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of Lightning's imports
def test_a_real_lightning_module_with_metrics_and_a_child(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    class Body(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.log("size", float(x.abs().mean()))
            return self.layers(x)

    class Real(lightning.LightningModule):
        def __init__(self, lr: float = 0.05, widths: tuple[int, ...] = (16,)) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(1)
            self.body, self.head = Body(), nn.Linear(widths[0], 3)
            self.accuracy = MulticlassAccuracy(3)
            self.scores = MetricCollection({"f1": MulticlassF1Score(3), "acc": MulticlassAccuracy(3, average="micro")}, prefix="val_")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            self.accuracy(logits, y)
            self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
            return cross_entropy(logits, y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            logits = self(x)
            self.print(end="")
            self.scores.update(logits, y)
            self.log_dict(self.scores, prog_bar=True)
            self.log("val_loss", cross_entropy(logits, y), batch_size=len(x))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_f1"}}

    task = from_lightning(Real(), epochs=8, batch_size=20)
    validation = points(70, 1)
    run = anyfit.fit(task, points(), validation=validation, run=tmp_path / "r", log_every=3)
    steps = [line for line in run.history if line["event"] == "step"]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and set(steps[0]["logs"]) == {"size", "train_acc"}
    figures = run.splits["validation"]
    right = (anyfit.predict(run, validation).argmax(1) == validation[1]).float().mean()
    assert figures["val_acc"] == pytest.approx(float(right)) and figures["val_f1"] > 0.8  # over all rows, not a mean of batches
    assert run.record["task"]["values"] == {"hparams": {"lr": 0.05, "widths": [16]}}
    assert run.model.accuracy.tp.sum() == 0  # nothing piles up
    again = anyfit.fit(from_lightning(Real(), epochs=10, batch_size=20), points(), validation=validation, run=tmp_path / "r", resume=True)
    whole = anyfit.fit(from_lightning(Real(), epochs=10, batch_size=20), points(), validation=validation, log_every=3)
    assert equal(again.state.model, whole.state.model)

    class Hooked(Real):
        def on_train_epoch_end(self) -> None:
            pass

    with pytest.raises(TaskError, match="Hooked overrides on_train_epoch_end, which from_lightning cannot honour"):
        from_lightning(Hooked())
    with pytest.raises(TaskError, match="Body defines no training_step"):
        from_lightning(Body())  # Lightning's own placeholder is none
    data = lightning.LightningDataModule.from_datasets(TensorDataset(*points(40)), batch_size=10)
    assert list(task.sources(data)) == ["data"]
