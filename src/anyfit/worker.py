"""A site's turn: an order comes in, an update goes out. The rows stay here."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from anyfit import data, engine, machine
from anyfit.data import Source
from anyfit.errors import AnyfitError, DataError
from anyfit.prepare import Prepared, built, infer, statistics
from anyfit.schema import Schema
from anyfit.state import Position
from anyfit.strategy import Strategy, local_steps
from anyfit.task import Task
from anyfit.update import WIDE, Order, Reply, Update
from anyfit.values import Plan

__all__ = ["Worker"]


class Worker:
    """One site: its rows, and one model that each order resets."""

    def __init__(self, site: str, task: Task, source: Source, plan: Plan, strategy: Strategy) -> None:
        self.site, self.task, self.plan, self.strategy = site, task, plan, strategy
        parts = source.read()
        self.rows = parts["train"]
        if data.num_rows(self.rows) == 0:
            raise DataError(f"site {site!r} has no rows")
        self._source, self._memory = source, None
        self._schema: Schema | None = None

    @property
    def num_rows(self) -> int:
        """Rows that this site trains on."""
        return data.num_rows(self.rows) or 0

    @property
    def source_name(self) -> str:
        """Where the rows come from, for records."""
        return self._source.name

    def base_schema(self) -> Schema:
        """Names and types of this site's columns, from its own rows."""
        return infer(self._source, self.rows)

    def answer(self, order: Order) -> Reply:
        """Do what the order says; a failure becomes a reply that says why."""
        begun = time.monotonic()
        try:
            update = {"prepare": self._prepare, "train": self._train, "evaluate": self._evaluate}[order.kind](order)
            return Reply(self.site, update, seconds=time.monotonic() - begun)
        except AnyfitError as error:
            return Reply(self.site, error=str(error), seconds=time.monotonic() - begun)

    def _seed(self, order: Order) -> int:
        """Of this site: sites must neither shuffle nor drop out alike."""
        return data.mix_seed(order.seed, zlib.crc32(self.site.encode()))

    def _prepare(self, order: Order) -> Update:
        """The additive statistics of this site's rows under the schema that all sites agreed on."""
        total = statistics(self.task, self.rows, Schema.from_json(order.values["schema"]))
        return Update.of("rows", {}, float(self.num_rows), WIDE) if total is None else total

    def _set_up(self, order: Order) -> engine.Trainer:
        """The model and its batches, made once; weights come with each order, the optimizer starts anew."""
        schema = Schema.from_json(order.values["schema"])
        if self._schema != schema:
            self._schema = schema
            plan = self.plan.updated(seed=self._seed(order))
            if plan.batch_size is not None and plan.batch_size > self.num_rows:
                plan = plan.updated(batch_size=None)  # a site smaller than a batch trains on all its rows at once
            prepared = Prepared(self.task, plan, machine.pick_device(plan.device), schema, {"train": self.rows}, {}, self.task.collate)
            self.batches = prepared.batches("train")
            machine.seed_all(self.plan.seed)  # what is not exchanged (frozen weights) must be the same everywhere
            self._model = built(self.task, schema)
        total = int(order.values["rounds"]) * local_steps(order, self.batches)
        trainer = engine.make_trainer(self.task, self._model, self.plan, total, machine.pick_device(self.plan.device))
        _set_weights(trainer, order.tensors)
        return trainer

    def _train(self, order: Order) -> Update:
        trainer = self._set_up(order)
        machine.seed_all(data.mix_seed(self._seed(order), order.round))
        done = (order.round - 1) * local_steps(order, self.batches)
        per_epoch = self.batches.steps_per_epoch or 1
        trainer.position = Position(done, done // per_epoch, done % per_epoch)
        for schedule in trainer.schedules.values():  # the rate goes on over the whole federation
            schedule.skip({"step": done, "epoch": done // per_epoch, "evaluation": 0}[schedule.every])
        update, self._memory = self.strategy.local(trainer, order, self.batches, self._memory)
        return update

    def _evaluate(self, order: Order) -> Update:
        trainer = self._set_up(order)
        total = Update()
        for name, sums in engine.totals(self.task, trainer.model, self.batches, trainer.autocast()).sums().items():
            total = total.joined(Update.of(f"metric:{name}", sums, float(self.num_rows), WIDE))
        return total


def _set_weights(trainer: engine.Trainer, tensors: Mapping[str, Tensor]) -> None:
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in named or named[name].shape != tensor.shape:
                raise DataError(
                    f"the order holds {name} {tuple(tensor.shape)}, which this site's model has not; all sites must run the same task"
                )
            named[name].copy_(tensor)
