"""Tables to tensors: infer a schema, gather additive statistics, fit preprocessing from their total, convert.

N rows, F continuous columns, K categorical ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from anyfit.data.hashes import pixels_of
from anyfit.errors import DataError
from anyfit.schema import Column, ColumnType, Schema
from anyfit.update import WIDE, Update

__all__ = ["fitted", "infer_schema", "statistics", "tensor_schema", "to_tensors"]

COUNTS = (0,)  # whole numbers need no fraction bits
MOST_TARGET_VALUES = 100  # a whole-number target with at most so many distinct values is taken for classes
MISSING = "missing"  # stands beside the mean's sums; a column's own group keeps the names apart


def infer_schema(table: pa.Table, target: str | None, ignore: Sequence[str] = (), types: Mapping[str, ColumnType] | None = None) -> Schema:
    """Names and semantic types from the table's own types; `types` overrules."""
    columns = []
    for field in table.schema:
        if field.name in ignore:
            continue
        kind = (types or {}).get(field.name) or _infer_type(field.name, table[field.name], field.name == target)
        shape = tuple(field.type.shape) if isinstance(field.type, pa.FixedShapeTensorType) else ()
        columns.append(Column(field.name, kind, shape=shape))
    unknown = sorted(set(types or {}) - set(table.column_names))
    if unknown:
        raise DataError(f"types names {unknown[0]!r}, which is not a column; the columns are: {', '.join(table.column_names)}")
    return Schema(tuple(columns), target)


def _infer_type(name: str, column: pa.ChunkedArray, is_target: bool) -> ColumnType:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise DataError(
            f"column {name!r} holds {kind}, which has no semantic type; leave it out (ignore) or make it an image, text or number"
        )
    if isinstance(kind, pa.FixedShapeTensorType):
        return "image"
    if pa.types.is_integer(kind):
        return "categorical" if is_target and pc.count_distinct(column).as_py() <= MOST_TARGET_VALUES else "continuous"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return "continuous"
    if pa.types.is_boolean(kind) or is_target:
        return "categorical"
    distinct = pc.count_distinct(column).as_py()
    return "text" if distinct > 1000 and distinct > len(column) / 2 else "categorical"


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) float64 with NaN for missing."""
    try:
        numbers = pc.fill_null(column.cast(pa.float64(), safe=False), math.nan).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name!r} is continuous but holds {column.type} that is no number: {error}") from error
    if np.isinf(numbers).any():
        raise DataError(f"column {name!r} holds an infinite number; mark it as missing or drop the row")
    return np.asarray(numbers, dtype=np.float64)


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Categories as text; 1.0 and 1 are one category."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.or_kleene(pc.equal(pc.floor(column), column), pc.is_null(column))).as_py()
        if whole:
            column = column.cast(pa.int64())
    return column.cast(pa.string())


def statistics(table: pa.Table, schema: Schema) -> Update:
    """Sums and counts from which `fitted` makes preprocessing; those of any parts of the rows add up to those of all."""
    total = Update()
    for column in schema.columns:
        if column.name not in table.column_names:
            raise DataError(f"column {column.name!r} is missing; the table has: {', '.join(table.column_names)}")
        values = table[column.name]
        if column.type == "continuous":
            numbers = _numbers(values, column.name)
            known = numbers[~np.isnan(numbers)]
            sums = {"sum": torch.tensor(known.sum()), "squares": torch.tensor((known * known).sum())}
            total = total.joined(Update.of(f"mean:{column.name}", sums, float(len(known)), WIDE))
        elif column.type == "categorical":
            counted = pc.value_counts(_words(values).combine_chunks()).to_pylist()
            sums = {entry["values"]: torch.tensor(entry["counts"]) for entry in counted if entry["values"] is not None}
            total = total.joined(Update.of(f"categories:{column.name}", sums, float(len(values) - values.null_count), COUNTS))
        elif column.type == "image":
            total = total.joined(_image_statistics(pixels_of(values), column.name))
    return total


def _image_statistics(pixels: np.ndarray[Any, Any], name: str) -> Update:
    channels = pixels.shape[1]
    sums = {"sum": torch.zeros(channels, dtype=torch.float64), "squares": torch.zeros(channels, dtype=torch.float64)}
    for block in np.array_split(pixels, max(1, len(pixels) // 4096)):  # bounded memory: float64 is eight times the pixels
        values = torch.from_numpy(block.astype(np.float64))
        sums["sum"] += values.sum((0, 2, 3))
        sums["squares"] += (values * values).sum((0, 2, 3))
    return Update.of(f"mean:{name}", sums, float(pixels.size // channels), WIDE)


def fitted(schema: Schema, total: Update) -> Schema:
    """The schema with means, deviations and categories from the statistics of all training rows."""
    columns = []
    for column in schema.columns:
        if column.type in ("continuous", "image"):
            columns.append(_fit_mean(column, total))
        elif column.type == "categorical":
            columns.append(replace(column, categories=_sorted_categories(total.sums(f"categories:{column.name}"))))
        else:
            columns.append(column)
    return replace(schema, columns=tuple(columns))


def _fit_mean(column: Column, total: Update) -> Column:
    group = f"mean:{column.name}"
    if not total.count(group) > 0:  # all missing: whatever stands there later counts as missing too
        return replace(column, mean=0.0, std=1.0)
    means = total.mean(group)
    variance = (means["squares"] - means["sum"] ** 2).clamp(min=0)
    # what rounding leaves of a constant column's variance is not a spread: float64 keeps it below 1e-14 of the squares, and fixed
    # point below 1e-50
    spread = variance > (1e-14 * means["squares"]).clamp(min=1e-50)
    std = torch.where(spread, variance.sqrt(), torch.ones_like(variance))
    if column.type == "image":
        return replace(column, mean=tuple(means["sum"].tolist()), std=tuple(std.tolist()))
    return replace(column, mean=float(means["sum"]), std=float(std))


def _sorted_categories(counts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """In the order of their numbers where all are numbers, else of their text."""

    def number(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    numbers = {word: number(word) for word in counts}
    if all(value is not None for value in numbers.values()):
        return tuple(sorted(counts, key=lambda word: (numbers[word], word)))
    return tuple(sorted(counts))


def to_tensors(table: pa.Table, schema: Schema, *, need_target: bool = True) -> dict[str, Tensor]:
    """`continuous` (N, F) standardised, missing 0; `categorical` (N, K) codes, 0 for missing and unseen; an `image` column
    (N, C, H, W) as its pixels; `target` (N,): class labels, -100 where missing, or float64 values.

    A column that the schema has and the table has not is an error; the target may be absent where `need_target` is False.
    """
    result: dict[str, Tensor] = {}
    absent = [column.name for column in schema.features if column.name not in table.column_names]
    if absent:
        raise DataError(f"column {absent[0]!r} is missing; the table has: {', '.join(table.column_names)}")
    continuous = schema.of_type("continuous")
    if continuous:
        values = torch.empty(table.num_rows, len(continuous), dtype=torch.float64)
        for index, column in enumerate(continuous):
            numbers = torch.from_numpy(np.array(_numbers(table[column.name], column.name)))
            values[:, index] = ((numbers - float(column.mean or 0.0)) / float(column.std or 1.0)).nan_to_num(nan=0.0)  # type: ignore[arg-type]
        result["continuous"] = values
    categorical = schema.of_type("categorical")
    if categorical:
        codes = [_codes(table[column.name], column) + 1 for column in categorical]
        result["categorical"] = torch.from_numpy(np.stack(codes, 1))
    for column in schema.of_type("image"):
        pixels = pixels_of(table[column.name])
        if tuple(pixels.shape[1:]) != column.shape:
            raise DataError(f"images of column {column.name!r} are {tuple(pixels.shape[1:])}, but training had {column.shape}")
        result["image"] = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    if schema.target is not None and (need_target or schema.target in table.column_names):
        result["target"] = _target(table, schema)
    return result


def _codes(column: pa.ChunkedArray, schema: Column) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(N,) index of each value's category, -1 for missing and unseen."""
    found = pc.index_in(_words(column), pa.array(schema.categories or (), pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)


def _target(table: pa.Table, schema: Schema) -> Tensor:
    assert schema.target is not None
    column = schema[schema.target]
    if column.name not in table.column_names:
        raise DataError(f"target (={column.name!r}) is not a column; the table has: {', '.join(table.column_names)}")
    values = table[column.name]
    if column.type == "continuous":
        numbers = _numbers(values, column.name)
        if np.isnan(numbers).any():
            raise DataError(f"target {column.name!r} is missing in {int(np.isnan(numbers).sum())} rows; drop them or fill them")
        return torch.from_numpy(numbers.copy())
    codes = _codes(values, column)
    missing = values.is_null().combine_chunks().to_numpy(zero_copy_only=False)
    unseen = (codes < 0) & ~missing
    if unseen.any():
        value = _words(values)[int(np.nonzero(unseen)[0][0])].as_py()
        raise DataError(
            f"target {column.name!r} holds {value!r}, which training did not have; its classes are: {', '.join(column.categories or ())}"
        )
    return torch.from_numpy(np.where(missing, -100, codes))


def tensor_schema(sample: Any, rows: Any = None) -> Schema:
    """A schema for a source that is tensors already, from one sample; `rows` (all tensors) tells the classes of a whole-number target."""
    items: Mapping[str, Any] = sample if isinstance(sample, Mapping) else _named(sample)
    target = next((name for name in ("target", "labels") if name in items), None)
    columns = []
    for name, value in items.items():
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) if not isinstance(value, str) else None
        shape = tuple(tensor.shape) if tensor is not None else ()
        if name == target and tensor is not None and not tensor.is_floating_point():
            columns.append(Column(name, "categorical", categories=_label_range(rows, name), shape=shape))
        elif tensor is None:
            columns.append(Column(name, "text"))
        else:
            columns.append(Column(name, "image" if len(shape) == 3 else "continuous", shape=shape))
    return Schema(tuple(columns), target)


def _named(sample: Any) -> dict[str, Any]:
    items = list(sample) if isinstance(sample, tuple | list) else [sample]
    if len(items) == 1:
        return {"input": items[0]}
    names = ["input"] if len(items) == 2 else [f"input{index}" for index in range(len(items) - 1)]
    return dict(zip([*names, "target"], items, strict=True))


def _label_range(rows: Any, name: str) -> tuple[str, ...] | None:
    if rows is None:
        return None
    labels = rows[name] if isinstance(rows, Mapping) else rows[-1]
    if labels.dim() != 1:
        return None
    kept = labels[labels != -100]
    if kept.numel() == 0 or int(kept.min()) < 0:
        raise DataError(f"labels must run from 0 up (-100 is left out); the smallest is {int(kept.min()) if kept.numel() else 'missing'}")
    return tuple(str(label) for label in range(int(kept.max()) + 1))
