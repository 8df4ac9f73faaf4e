"""Where a task meets its data: rows by split, a schema fitted on the training rows, batches, a model. What every verb starts from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from anyfit import data, machine
from anyfit.data import Batches, Blocks, Rows, Source, Stream
from anyfit.errors import DataError
from anyfit.load import load_data
from anyfit.schema import Schema
from anyfit.task import Task
from anyfit.tree import map_tensors
from anyfit.update import Update
from anyfit.values import Plan

__all__ = ["Prepared", "built", "infer", "opened", "prepare", "statistics"]

REFERENCE = re.compile(r"\.py:\w+$")  # file.py:function


@dataclass(frozen=True)
class Prepared:
    """A task met its data: what every verb starts from."""

    task: Task
    plan: Plan
    device: torch.device
    schema: Schema
    rows: dict[str, Rows]
    sources: dict[str, dict[str, Any]]
    collate: Callable[[Any], Any]
    shuffle: bool = True
    notices: tuple[str, ...] = ()
    columns: pa.Schema | None = None  # the Arrow types of a stream

    def batches(self, split: str) -> Batches:
        """Batches of a split: windows in a seeded order for train, larger batches in the order of rows for the rest."""
        return self.batches_of(self.rows[split], split)

    def batches_of(self, rows: Rows, split: str) -> Batches:
        """Batches of any rows as one split."""
        task, plan, training = self.task, self.plan, split == "train"
        if not training and plan.batch_size is not None:  # no graph is kept, so four times the rows fit
            tokens = None if plan.max_tokens is None else plan.max_tokens * 4
            plan = plan.updated(batch_size=plan.batch_size * 4, bucket=False, max_tokens=tokens)
        elif not training:
            plan = plan.updated(bucket=False)
        augments = training and task.own_method("augment")
        return data.make_batches(
            rows,
            plan,
            self.collate,
            device=self.device,
            shuffle=training and self.shuffle,
            augment=task.augment if augments else None,
            schema=self.schema,
            build=lambda table: task.build_dataset(table, split, self.schema),
            columns=self.columns,
        )


def prepare(
    task: Task, origin: Any, *, target: str | None, validation: Any, test: Any, plan: Mapping[str, Any], unit: str | None = None
) -> Prepared:
    """Read the data, split it, infer the schema and fit preprocessing on the training rows. `unit`: a column that is no feature."""
    source, shuffle, notices = opened(origin, target), True, []
    validation, test = (opened(given) if _is_source(given) else given for given in (validation, test))
    collate: Callable[[Any], Any] = task.collate
    defaults = task.plan()
    if isinstance(source.origin, DataLoader):
        apart = data.taken_apart(source.origin)
        if apart is None:
            notices.append(
                "this DataLoader has a sampler of its own: it runs as it is, without seek, shares or exact resume within an epoch"
            )
        else:
            dataset, fields, collate, shuffle = apart
            source, defaults = dataclasses.replace(source, origin=dataset), defaults.updated(**fields)
    final = defaults.updated(**plan)
    if final.epochs is None and final.steps is None:
        final = final.updated(epochs=10)
    rows = data.read_splits(source, validation, test, wants_validation=final.keeps_best)
    if unit is not None:
        source = dataclasses.replace(source, ignore=(*source.ignore, unit))
    count = data.num_rows(rows["train"])
    if "batch_size" not in plan and count is not None and final.batch_size is not None and 0 < count < final.batch_size:
        notices.append(f"there are {count} rows to train on, so a batch has {count} in place of {final.batch_size}")
        final = final.updated(batch_size=count)
    device = machine.pick_device(final.device)
    schema = _schema(task, source, rows["train"])
    notices += _taken_for_classes(schema, source, rows["train"])
    columns = rows["train"].first().schema if isinstance(rows["train"], Stream) else None
    if schema.classes is not None and len(schema.classes) < 2:
        raise DataError(f"target {schema.target!r} has one class only ({', '.join(schema.classes)}); there is nothing to tell apart")
    names = {split: Source.of(given).name for split, given in (("validation", validation), ("test", test)) if _is_source(given)}
    sources: dict[str, dict[str, Any]] = {
        split: {"source": names.get(split, source.name), "rows": data.num_rows(part), "sha256": data.fingerprint(part)}
        for split, part in rows.items()
    }
    if isinstance(test, float) and "test" in sources:
        sources["test"]["fraction"] = test
    sources["train"] |= {name: list(given) for name, given in (("missing", source.missing), ("size", source.size)) if given}
    return Prepared(task, final, device, schema, rows, sources, collate, shuffle, tuple(notices), columns)


def opened(given: Any, target: str | None = None) -> Source:
    """What was given as a source; `file.py:function` is called."""
    source = Source.of(given, target)
    if not isinstance(source.origin, str) or not REFERENCE.search(source.origin):
        return source
    found = load_data(source.origin)
    return Source.of(found, target) if isinstance(found, Source) else dataclasses.replace(source, origin=found)


def _taken_for_classes(schema: Schema, source: Source, rows: Rows) -> list[str]:
    """A word on a target of many whole numbers, which may be meant as a number."""
    if not isinstance(rows, pa.Table) or len(schema.targets) != 1 or schema.targets[0] in source.types:
        return []
    name = schema.targets[0]
    if schema.classes is None or len(schema.classes) <= 10 or not pa.types.is_integer(rows.schema.field(name).type):
        return []
    return [f"target {name!r}: {schema.num_classes} whole numbers are taken for classes; for a number, types: {name}=continuous"]


def _is_source(given: Any) -> bool:
    return given is not None and not isinstance(given, int | float)


def _schema(task: Task, source: Source, rows: Rows) -> Schema:
    """Names and types, and preprocessing fitted on these rows where they are a table."""
    schema = infer(source, rows)
    total = statistics(task, rows, schema)
    return schema if total is None else task.prepare(schema, total)


def statistics(task: Task, rows: Rows, schema: Schema) -> Update | None:
    """The task's additive statistics of all rows; None for rows that are no table."""
    total: Update | None = None
    for table in data.in_tables(rows):
        part = task.statistics(table, schema)
        total = part if total is None else total + part
    return total


def infer(source: Source, rows: Rows) -> Schema:
    """Names and types from the rows alone."""
    if isinstance(rows, Blocks | Stream):
        rows = rows.head() if isinstance(rows, Blocks) else rows.first()
    if isinstance(rows, pa.Table):
        target = source.target if source.target is not None else ("target" if "target" in rows.column_names else None)
        ignored = [*source.ignore, *(name for name in (source.group,) if name is not None and name != target)]
        return data.infer_schema(rows, target, ignored, source.types, source.weight)
    if isinstance(rows, tuple | Mapping):
        sample = map_tensors(lambda tensor: tensor[0], rows)
        return data.tensor_schema(sample, rows)
    if isinstance(rows, DataLoader | IterableDataset):
        sample = map_tensors(lambda tensor: tensor[0], next(iter(rows))) if isinstance(rows, DataLoader) else next(iter(rows))
        return data.tensor_schema(sample)
    with machine.own_random():
        return data.tensor_schema(rows[0])


def built(task: Task, schema: Schema) -> nn.Module:
    """The task's model; refused where it is none."""
    model = task.build_model(schema)
    if not isinstance(model, nn.Module):
        raise DataError(f"build_model of {type(task).__name__} gave a {type(model).__name__}; it must give a torch.nn.Module")
    return model
