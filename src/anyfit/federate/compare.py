"""What a federation is worth: the same task on the pooled rows, and on those of each site alone, for as long as a site trained in it.

Only a simulation can tell, for nobody else has all rows. Every model has the federation's schema, first weights, local work and splits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from anyfit import data, engine, machine
from anyfit.data import Rows
from anyfit.errors import DataError, InputError
from anyfit.federate.rounds import Federation
from anyfit.metrics import figures
from anyfit.prepare import Prepared, built
from anyfit.record import start_from
from anyfit.run import Run
from anyfit.strategy import Strategy
from anyfit.tree import clone, leaves, map_tensors
from anyfit.worker import Worker, local_steps, plan_for

__all__ = ["check_comparable", "compared"]

MOST_ALONE = 20  # sites that train on their own: each of them is a training of its own
HEADLINES = ("accuracy", "auroc", "rmse", "loss")


def check_comparable(strategy: Strategy, seconds: float | None, evaluates: bool) -> None:
    """Refuse what has no counterpart on pooled rows, before anything is trained."""
    if seconds is not None:
        raise InputError(f"compare needs a known amount of local work, which seconds (={seconds}) is not; give epochs or steps")
    if not strategy.trains:
        raise InputError(f"compare trains by gradient steps, which {strategy.name} does not take; leave it out")
    if not evaluates:
        raise InputError("compare needs rows to look at, and training rows of so many or so private sites are not; give test or validation")


def compared(federation: Federation, worker: Worker, done: Run, weights: Any = None) -> dict[str, Any]:
    """Lines of one figure: the federated model, the pooled rows, each site alone (20 of them by the seed where there are more)."""
    return _Comparison(federation, worker, done, weights).lines()


class _Comparison:
    """Models of one schema, looked at on the same rows. Columns: all rows together, and each site's own."""

    def __init__(self, federation: Federation, worker: Worker, done: Run, weights: Any) -> None:
        self.federation, self.worker, self.done, self.weights = federation, worker, done, weights
        self.task, self.plan, self.schema, self.device = federation.task, federation.plan, federation.schema, federation.device
        self.central = federation.test is not None
        self.split = next((name for name in ("test", "validation") if name in done.splits), "train")
        told = done.splits[self.split]
        self.metric = next((name for name in HEADLINES if isinstance(told.get(name), float)), "loss")
        self.names = sorted(federation.rows) if self.central else list(done.result["sites"])
        draw = random.Random(self.plan.seed)
        self.alone = self.names if len(self.names) <= MOST_ALONE else sorted(draw.sample(self.names, MOST_ALONE))

    def lines(self) -> dict[str, Any]:
        sites = {} if self.central else self.done.result["sites"]
        federated = {self._all: self.done.splits[self.split].get(self.metric)}
        federated |= {name: sites[name].get(self.metric) for name in self.alone if name in sites}
        rows = {name: self.worker.site(name).parts for name in self.names}
        pooled = {
            split: _joined([parts[split] for parts in rows.values() if split in parts])
            for split in ("train", "validation")
            if any(split in parts for parts in rows.values())
        }
        self.federation.emit(
            {"event": "notice", "text": f"for comparison, training on the pooled rows and at {len(self.alone)} sites alone"}
        )
        found = [{"what": "federated", **federated}, {"what": "pooled rows", **self._figures(self._trained(pooled))}]
        single = [{"what": f"alone: {name}", **self._figures(self._trained(rows[name]))} for name in self.alone]
        mean: dict[str, Any] = {"what": "alone, mean of sites"}
        for column in found[1]:
            values = [value for line in single if isinstance(value := line.get(column), float)]
            mean |= {column: sum(values) / len(values)} if values else {}
        return {"comparison": [*found, *single, mean], "compared": {"figure": self.metric, "split": self.split}}

    @property
    def _all(self) -> str:
        return self.split if self.central else "all"

    def _prepared(self, rows: Mapping[str, Rows], size: int | None) -> Prepared:
        """As at a site: one with fewer rows than a batch trains on all of them at once."""
        plan = plan_for(self.plan, size)
        return Prepared(self.task, plan, self.device, self.schema, dict(rows), {}, self.task.collate)

    def _trained(self, rows: Mapping[str, Rows]) -> nn.Module:
        """A model from the federation's first weights; the best by its own validation rows where the federation keeps a best."""
        prepared = self._prepared(rows, data.num_rows(rows["train"]))
        batches = prepared.batches("train")
        machine.seed_all(self.plan.seed, self.device)
        model = built(self.task, self.schema)
        if self.weights is not None:
            start_from(model, self.weights, False)
        rounds = int(self.done.result["rounds"])
        each = local_steps({"epochs": self.plan.epochs, "steps": self.plan.steps}, batches.steps_per_epoch)
        trainer = engine.make_trainer(self.task, model, prepared.plan, rounds * each, self.device)
        best: tuple[float, dict[str, Tensor]] | None = None
        for round in range(1, rounds + 1):
            for _ in engine.train(trainer, batches, round * each):
                pass
            if self.plan.keeps_best and "validation" in rows:
                loss = engine.evaluate(self.task, model, prepared.batches("validation"), trainer.autocast())["loss"]
                if best is None or loss < best[0]:
                    best = loss, clone(dict(model.state_dict()))
        if best is not None:
            engine.load_model(model, best[1])
        return model

    def _figures(self, model: nn.Module) -> dict[str, float | None]:
        """The headline figure on all rows, from sums, and on each site's."""
        autocast = machine.autocast(self.plan, self.device)
        if self.federation.test is not None:
            return {self._all: engine.evaluate(self.task, model, self.federation.test, autocast).get(self.metric)}
        metrics = self.task.metrics(self.schema)
        total: dict[str, dict[str, Tensor]] = {}
        found: dict[str, float | None] = {}
        for name in self.names:
            site = self.worker.site(name)
            if self.split not in site.parts:
                continue
            batches = self._prepared(site.parts, site.rows).batches(self.split)
            sums = engine.totals(self.task, model, batches, machine.autocast(self.plan, self.device)).sums()
            for metric, parts in sums.items():
                known = total.setdefault(metric, {})
                for key, value in parts.items():
                    known[key] = known[key] + value if key in known else value
            if name in self.alone:
                found[name] = figures(sums, metrics).get(self.metric)
        return {self._all: figures(total, metrics).get(self.metric), **found}


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all sites, one after the other."""
    if all(isinstance(part, pa.Table) for part in parts):
        try:
            return pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"compare cannot pool the rows of all sites: a column is of another type at one of them ({error})") from error
    if all(isinstance(part, tuple | Mapping) for part in parts):
        columns = iter([torch.cat(column) for column in zip(*map(leaves, parts), strict=True)])
        return map_tensors(lambda _: next(columns), parts[0])
    if all(hasattr(part, "__getitem__") and hasattr(part, "__len__") for part in parts):
        return ConcatDataset(parts)
    raise DataError(f"compare cannot pool rows that come as {type(parts[0]).__name__}; give tables, tensors or data sets")
