"""Tables to tensors: infer a schema, gather additive statistics, fit preprocessing from their total, convert.

N rows, F continuous columns, K categorical ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from anyfit.data.blocks import ALMOST, ODD
from anyfit.data.files import NUMBER
from anyfit.data.hashes import pixels_of
from anyfit.errors import DataError
from anyfit.schema import DATETIME_PARTS, Column, ColumnType, Schema
from anyfit.update import COUNTS, WIDE, Update
from anyfit.values import parse

__all__ = ["describe", "example", "fitted", "infer_schema", "statistics", "tensor_schema", "to_tensors"]

MOST_TARGET_VALUES = 100  # a whole-number target with at most so many distinct values is taken for classes
YEAR_S, WEEK_S, DAY_S = 365.2425 * 86400, 7 * 86400, 86400
NOTHING_KNOWN = 0.0  # as `std`: all training rows lacked it, so whatever stands there later counts as missing too
MOST_SQUARES = 2.0**124  # of one table: sums over all hold less than 2^128
SPELT = r"(?i)^[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf|infinity)$"
EXTREMES = 100  # lowest and highest values that a description keeps


def infer_schema(
    table: pa.Table,
    target: str | Sequence[str] | None,
    ignore: Sequence[str] = (),
    types: Mapping[str, ColumnType] | None = None,
    weight: str | None = None,
) -> Schema:
    """Names and semantic types from the table's own types; `types` overrules."""
    columns = []
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    for field in table.schema:
        if field.name in ignore or field.name == weight:
            continue
        kind = (types or {}).get(field.name) or _infer_type(field, table[field.name], field.name in targets, len(targets) > 1)
        shape = tuple(field.type.shape) if isinstance(field.type, pa.FixedShapeTensorType) else ()
        columns.append(Column(field.name, kind, shape=shape, multiple=kind == "categorical" and _is_list(field.type)))
    unknown = sorted(set(types or {}) - set(table.column_names))
    if unknown:
        raise DataError(f"types names {unknown[0]!r}, which is not a column; the columns are: {', '.join(table.column_names)}")
    listed = next((column.name for column in columns if column.multiple and column.name not in targets), None)
    if listed is not None or (len(targets) > 1 and any(column.multiple for column in columns)):
        raise DataError(f"column {listed or targets[0]!r} holds lists of categories, which only a single target may; leave it out (ignore)")
    kinds = sorted({column.type for column in columns if column.name in targets})
    if len(kinds) > 1:
        raise DataError(f"targets {', '.join(targets)} are {' and '.join(kinds)}; several targets must be of one type: force it with types")
    return Schema(tuple(columns), targets[0] if len(targets) == 1 else targets or None, weight)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _infer_type(field: pa.Field, column: pa.ChunkedArray, is_target: bool, several: bool) -> ColumnType:
    name = field.name
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if _is_list(kind) and (pa.types.is_string(kind.value_type) or pa.types.is_integer(kind.value_type)) and is_target:
        return "categorical"
    if isinstance(kind, pa.FixedShapeTensorType):
        return "image"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "datetime"
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_temporal(kind):
        raise DataError(
            f"column {name!r} holds {kind}, which has no semantic type; leave it out (ignore) or make it an image, text or number"
        )
    if pa.types.is_integer(kind):
        distinct = pc.count_distinct(column).as_py()
        if is_target:
            return "categorical" if distinct <= (2 if several else MOST_TARGET_VALUES) else "continuous"
        return "identifier" if _says_identifier(name) and distinct == len(column) > 1 else "continuous"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return "continuous"
    if pa.types.is_boolean(kind) or is_target:
        return "categorical"
    odd = (field.metadata or {}).get(ODD)
    return _infer_words(name, column.cast(pa.string()), None if odd is None else parse(odd))


def _says_identifier(name: str) -> bool:
    return (
        re.search(r"(^|[_\-. ])(id|uuid|guid|index|key)$", name, re.IGNORECASE) is not None or re.search(r"[a-z]I[dD]$", name) is not None
    )


def _infer_words(name: str, column: pa.ChunkedArray, odd: tuple[str, int] | None) -> ColumnType:
    """Text is mostly distinct and of several words; an identifier is distinct and of one; anything else is a category.

    `odd`: a word among numbers, and its row, in rows that are not of this column.
    """
    known = column.drop_null()
    if len(known) == 0:
        return "categorical"
    distinct = pc.count_distinct(known).as_py()
    if distinct > 50:
        numeric = pc.match_substring_regex(column, NUMBER)
        share = pc.mean(numeric).as_py()
        if odd is None and ALMOST <= share < 1:
            place = pc.index(numeric, False).as_py()
            odd = (column[place].as_py()[:40], place + 1)
        if odd is not None:
            raise DataError(
                f"column {name!r} holds numbers, but {odd[0]!r} in row {odd[1]}; name what stands for a missing value "
                f"(missing), or force its type (types: {name}=categorical or text)"
            )
        if share == 1 and not _says_identifier(name) and not pc.any(pc.match_substring_regex(column, r"^\s*[-+]?0\d")).as_py():
            return "continuous"  # numbers that were written as text; a code has zeros in front
    words = pc.mean(pc.add(pc.count_substring_regex(pc.utf8_trim_whitespace(known), r"\s+"), 1)).as_py()
    if distinct > len(known) / 2 and words >= 3:
        return "text"
    if distinct == len(known) and words == 1 and (distinct > 1000 or (_says_identifier(name) and distinct > 1)):
        return "identifier"
    return "text" if distinct > 1000 and distinct > len(known) / 2 else "categorical"


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) float64 with NaN for missing."""
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        place = pc.index(pc.match_substring_regex(column, SPELT), False).as_py()
        if place >= 0:
            raise DataError(
                f"column {name!r} is continuous but holds {column[place].as_py()[:40]!r} in row {place + 1}, which is no number; name what "
                f"stands for a missing value (missing), or force its type (types: {name}=categorical or text)"
            )
    try:
        numbers = pc.fill_null(column.cast(pa.float64(), safe=False), math.nan).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name!r} is continuous but holds {column.type} that is no number: {error}") from error
    if np.isinf(numbers).any():
        row = int(np.nonzero(np.isinf(numbers))[0][0]) + 1
        raise DataError(f"column {name!r} holds an infinite number in row {row}; mark it as missing or drop the row")
    return np.asarray(numbers, dtype=np.float64)


def _squares(numbers: np.ndarray[Any, Any], name: str) -> float:
    """The sum of squares; refused where sums over all rows could not hold it."""
    with np.errstate(over="ignore"):
        total = float((numbers * numbers).sum())
    if not total < MOST_SQUARES:
        raise DataError(
            f"column {name!r} holds {np.abs(numbers).max():.3g}, which is too large to be standardised; leave the column out (ignore), scale "
            f"it, or force its type (types: {name}=identifier or categorical)"
        )
    return total


def _moments(column: pa.ChunkedArray, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) seconds since 1970 as float64, NaN for missing."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        raise DataError(f"column {name!r} is a datetime but holds {column.type}; write moments as dates, e.g. 2024-05-31T12:00:00")
    try:
        whole = column.cast(pa.timestamp("us", column.type.tz if pa.types.is_timestamp(column.type) else None), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name!r} is a datetime but holds {column.type} that is none: {error}") from error
    return np.asarray(pc.fill_null(whole.cast(pa.int64()).cast(pa.float64(), safe=False), math.nan).to_numpy(), dtype=np.float64) * 1e-6


def _parts_of_moments(seconds: np.ndarray[Any, Any], column: Column) -> np.ndarray[Any, Any]:
    """(N, 7): standardised, then sine and cosine of the place in the year, week and day; missing 0."""
    angles = [seconds * (2 * math.pi / period) for period in (YEAR_S, WEEK_S, DAY_S)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    standardised = (seconds - float(column.mean or 0.0)) / float(column.std or 1.0)  # type: ignore[arg-type]
    return np.asarray(np.nan_to_num(np.stack([standardised, *waves], 1), nan=0.0))


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Categories as text; 1.0 and 1 are one category."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.or_kleene(pc.equal(pc.floor(column), column), pc.is_null(column))).as_py()
        if whole:
            column = column.cast(pa.int64())
    words = column.cast(pa.string())
    return words if pa.types.is_integer(column.type) else _canonical(words)


def _canonical(words: pa.ChunkedArray) -> pa.ChunkedArray:
    """One spelling of whole numbers and of truth: a file's odd cell makes words of a whole column, which must stay what they were."""
    encoded = words.combine_chunks().dictionary_encode()
    spelled = [_spelled(word) for word in encoded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(spelled, pa.string()).take(encoded.indices)])


def _spelled(word: str) -> str:
    if word.lower() in ("true", "false"):
        return word.lower()
    return str(int(word.partition(".")[0])) if re.fullmatch(r"[-+]?[0-9]{1,18}(\.0*)?", word) else word


def statistics(table: pa.Table, schema: Schema) -> Update:
    """Sums and counts from which `fitted` makes preprocessing; those of any parts of the rows add up to those of all."""
    total, present = Update(), set(table.column_names)
    for column in schema.columns:
        if column.name not in present:
            raise DataError(f"column {column.name!r} is missing; the table has: {', '.join(table.column_names)}")
        values = table[column.name]
        if column.type in ("continuous", "datetime"):
            numbers = _moments(values, column.name) if column.type == "datetime" else _numbers(values, column.name)
            known = numbers[~np.isnan(numbers)]
            sums = {
                "sum": torch.tensor(known.sum()),
                "squares": torch.tensor(_squares(known, column.name), dtype=torch.float64),
                "missing": torch.tensor(float(len(numbers) - len(known))),
            }
            total = total.joined(Update.of(f"mean:{column.name}", sums, float(len(known)), WIDE))
        elif column.type == "categorical":
            total = total.joined(_category_statistics(values, column))
        elif column.type == "image":
            total = total.joined(_image_statistics(pixels_of(values), column.name))
    if schema.weight is not None:
        weights = _row_weights(table, schema)
        if weights is None:
            raise DataError(f"weight (={schema.weight!r}) is not a column; the table has: {', '.join(table.column_names)}")
        total = total.joined(Update.of(f"weight:{schema.weight}", {"sum": weights.sum()}, float(len(weights)), WIDE))
    return total


def _category_statistics(values: pa.ChunkedArray, column: Column) -> Update:
    words = _words_of_lists(values) if column.multiple else _words(values)
    counted = pc.value_counts(words.combine_chunks()).to_pylist()
    sums = {entry["values"]: torch.tensor(entry["counts"]) for entry in counted if entry["values"] is not None}
    return Update.of(f"categories:{column.name}", sums, float(len(values) - values.null_count), COUNTS)


def _words_of_lists(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The categories of all rows; one that a row names twice counts once."""
    flat = _words(pc.list_flatten(values))
    pairs = pa.table({"row": pc.list_parent_indices(values.combine_chunks()), "word": flat.combine_chunks()})
    return pairs.group_by(["row", "word"]).aggregate([])["word"]


def _image_statistics(pixels: np.ndarray[Any, Any], name: str) -> Update:
    channels = pixels.shape[1]
    sums = {"sum": torch.zeros(channels, dtype=torch.float64), "squares": torch.zeros(channels, dtype=torch.float64)}
    for block in np.array_split(pixels, max(1, len(pixels) // 4096)):  # bounded memory: float64 is eight times the pixels
        values = torch.from_numpy(block.astype(np.float64))
        sums["sum"] += values.sum((0, 2, 3))
        sums["squares"] += (values * values).sum((0, 2, 3))
    return Update.of(f"mean:{name}", sums, float(pixels.size // channels), WIDE)


def fitted(schema: Schema, total: Update, *, rare: int = 1, balance: bool = False) -> Schema:
    """The schema with means, deviations and categories from the statistics of all training rows.

    A feature's categories of fewer than `rare` rows count as other. `balance` gives each class of the target the same weight in total.
    """
    if balance and (schema.classes is None and not any(schema[name].type == "categorical" for name in schema.targets)):
        raise DataError(f"balance (=True) needs a target of classes, but {schema.target!r} is none")
    if balance and schema.multilabel:
        raise DataError("balance (=True) needs one class for each row, but this target may have several; leave it off")
    group = f"weight:{schema.weight}"
    if schema.weight is not None and total.count(group) > 0 and not float(total.sums(group)["sum"]) > 0:
        raise DataError(f"weight {schema.weight!r} is 0 in all rows; at least one must count")
    columns = []
    for column in schema.columns:
        if column.type in ("continuous", "image", "datetime"):
            columns.append(_fit_mean(column, total))
        elif column.type == "categorical":
            counts = total.sums(f"categories:{column.name}")
            least = 1 if column.name in schema.targets else rare
            found = _sorted_categories({word: count for word, count in counts.items() if float(count) >= least})
            rows = sum(float(counts[word]) for word in found)
            weights = tuple(rows / (len(found) * float(counts[word])) for word in found)
            columns.append(replace(column, categories=found, weights=weights if balance and column.name in schema.targets else None))
        else:
            columns.append(column)
    return replace(schema, columns=tuple(columns))


def _fit_mean(column: Column, total: Update) -> Column:
    group = f"mean:{column.name}"
    if not total.count(group) > 0:
        return replace(column, mean=0.0, std=NOTHING_KNOWN)
    means = total.mean(group)
    variance = (means["squares"] - means["sum"] ** 2).clamp(min=0)
    # what rounding leaves of a constant column's variance is not a spread: float64 keeps it below 1e-14 of the squares, and fixed
    # point below 1e-50
    spread = variance > (1e-14 * means["squares"]).clamp(min=1e-50)
    std = torch.where(spread, variance.sqrt(), torch.ones_like(variance))
    if column.type == "image":
        return replace(column, mean=tuple(means["sum"].tolist()), std=tuple(std.tolist()))
    return replace(column, mean=float(means["sum"]), std=float(std), missing=float(means.get("missing", 0.0)) > 0)


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


def to_tensors(table: pa.Table, schema: Schema, *, need_target: bool = True, balanced: bool = False) -> dict[str, Tensor]:
    """`continuous` (N, F) standardised, missing 0, then moments, then an indicator for each that may be missing; `categorical`
    (N, K) codes, 0 for missing and 1 for any other value; an `image` column (N, C, H, W) as its pixels; `target` (N,) or (N, T):
    class labels, -100 where missing, 0 and 1 for several labels, or float64 values; `weight` (N,) where rows are weighed.

    A column that the schema has and the table has not is an error; the target may be absent where `need_target` is False, and
    the weights of rows too.
    """
    result: dict[str, Tensor] = {}
    present = set(table.column_names)
    absent = [column.name for column in schema.features if column.name not in present]
    if absent:
        raise DataError(f"column {absent[0]!r} is missing; the table has: {', '.join(table.column_names)}")
    if schema.num_continuous:
        result["continuous"] = torch.from_numpy(_continuous(table, schema))
    categorical = schema.of_type("categorical")
    if categorical:
        codes = [_codes(table[column.name], column) + 2 for column in categorical]
        result["categorical"] = torch.from_numpy(np.stack(codes, 1))
    for column in schema.of_type("image"):
        pixels = pixels_of(table[column.name])
        if tuple(pixels.shape[1:]) != column.shape:
            raise DataError(f"images of column {column.name!r} are {tuple(pixels.shape[1:])}, but training had {column.shape}")
        result["image"] = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return {**result, **targets_of(table, schema, need_target=need_target, balanced=balanced)}


def targets_of(table: pa.Table, schema: Schema, *, need_target: bool, balanced: bool) -> dict[str, Tensor]:
    """`target` and `weight` alone, as `to_tensors` gives them."""
    result: dict[str, Tensor] = {}
    if schema.targets and (need_target or all(name in table.column_names for name in schema.targets)):
        result["target"] = _target(table, schema)
    weight = _row_weights(table, schema)
    weights = schema[schema.targets[0]].weights if schema.targets else None
    if balanced and weights is not None and "target" in result:
        each = torch.tensor([*weights, 0.0], dtype=torch.float64)[
            result["target"].clamp(min=-1)
        ]  # -100 picks the last: it counts for nothing
        weight = each if weight is None else weight * each
    if weight is not None:
        result["weight"] = weight
    return result


def _continuous(table: pa.Table, schema: Schema) -> np.ndarray[Any, Any]:
    numbers, moments = schema.of_type("continuous"), schema.of_type("datetime")
    parts, indicators = [], []
    for column in (*numbers, *moments):
        if column.std == NOTHING_KNOWN:
            values = np.full(table.num_rows, math.nan)
            parts.append(np.zeros((table.num_rows, 1 if column.type == "continuous" else DATETIME_PARTS)))
        elif column.type == "continuous":
            values = _numbers(table[column.name], column.name)
            mean, std = float(column.mean or 0.0), float(column.std or 1.0)  # type: ignore[arg-type]
            parts.append(np.nan_to_num((values - mean) / std, nan=0.0)[:, None])
        else:
            values = _moments(table[column.name], column.name)
            parts.append(_parts_of_moments(values, column))
        if column.missing:
            indicators.append(np.isnan(values).astype(np.float64)[:, None])
    return np.concatenate([*parts, *indicators], 1)


def _row_weights(table: pa.Table, schema: Schema) -> Tensor | None:
    if schema.weight is None or schema.weight not in table.column_names:
        return None
    weights = _numbers(table[schema.weight], schema.weight)
    bad = np.nonzero(~(weights >= 0))[0]
    if len(bad):
        raise DataError(f"weight {schema.weight!r} is {weights[bad[0]]} in row {bad[0] + 1}; weights must be numbers from 0 up")
    return torch.from_numpy(weights.copy())


def _codes(column: pa.ChunkedArray, schema: Column) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(N,) index of each value's category, -1 for unseen and -2 for missing."""
    words = _words(column)
    found = pc.fill_null(pc.index_in(words, pa.array(schema.categories or (), pa.string())), -1)
    return np.where(words.is_null().to_numpy(), -2, found.to_numpy()).astype(np.int64)


def _target(table: pa.Table, schema: Schema) -> Tensor:
    for name in schema.targets:
        if name not in table.column_names:
            raise DataError(f"target (={name!r}) is not a column; the table has: {', '.join(table.column_names)}")
    columns = [schema[name] for name in schema.targets]
    if len(columns) == 1:
        return _several_labels(table, columns[0]) if columns[0].multiple else _one_target(table, columns[0])
    if schema.multilabel:
        odd = next((column for column in columns if len(column.categories or ()) > 2), None)
        if odd is not None:
            raise DataError(f"target {odd.name!r} has {len(odd.categories or ())} classes; several targets must each be yes or no")
    return torch.stack([_one_target(table, column) for column in columns], 1)


def _one_target(table: pa.Table, column: Column) -> Tensor:
    values = table[column.name]
    if column.type == "continuous":
        numbers = _numbers(values, column.name)
        if np.isnan(numbers).any():
            raise DataError(f"target {column.name!r} is missing in {int(np.isnan(numbers).sum())} rows; drop them or fill them")
        return torch.from_numpy(numbers.copy())
    if column.type != "categorical":
        raise DataError(f"target {column.name!r} is of type {column.type}, which is neither a number nor a class; force its type (types)")
    codes = _codes(values, column)
    unseen = codes == -1
    if unseen.any():
        value = _words(values)[int(np.nonzero(unseen)[0][0])].as_py()
        raise DataError(
            f"target {column.name!r} holds {value!r}, which training did not have; its classes are: {', '.join(column.categories or ())}"
        )
    return torch.from_numpy(np.where(codes == -2, -100, codes))


def _several_labels(table: pa.Table, column: Column) -> Tensor:
    """(N, C) of 0 and 1; a row without a list is left out (-100), an empty list has no class."""
    values = table[column.name].combine_chunks()
    flat, parents = values.flatten(), pc.list_parent_indices(values).to_numpy()
    codes = _codes(pa.chunked_array([flat]), column)
    if (codes < 0).any():
        word = flat[int(np.nonzero(codes < 0)[0][0])].as_py()
        raise DataError(
            f"target {column.name!r} holds {word!r}, which training did not have; its classes are: {', '.join(column.categories or ())}"
        )
    labels = torch.zeros(len(values), len(column.categories or ()), dtype=torch.int64)
    labels[torch.from_numpy(parents.copy()), torch.from_numpy(codes)] = 1
    labels[torch.from_numpy(np.array(values.is_null()))] = -100
    return labels


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


def example(schema: Schema) -> dict[str, Tensor]:
    """One row of zeros, (1, ...), as `to_tensors` makes it of a table; of a source that is tensors already, as its schema knows it."""
    if any(column.shape and column.type != "image" for column in schema.features):
        return {column.name: torch.zeros(1, *column.shape) for column in schema.features}
    found: dict[str, Tensor] = {}
    if schema.num_continuous:
        found["continuous"] = torch.zeros(1, schema.num_continuous)
    if schema.cardinalities:
        found["categorical"] = torch.zeros(1, len(schema.cardinalities), dtype=torch.long)
    for column in schema.of_type("image"):
        found["image"] = torch.zeros(1, *column.shape, dtype=torch.uint8)
    if not found:
        raise DataError(
            "no row can be made of a schema without numbers, categories or images; define example_row(self, schema), or give inputs"
        )
    return found


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


def describe(table: pa.Table, schema: Schema) -> list[dict[str, Any]]:
    """What stands in each column, for the eyes of who holds the rows: counts, ranges, categories, lengths. JSON."""
    result: list[dict[str, Any]] = []
    for column in schema.columns:
        values = table[column.name]
        about: dict[str, Any] = {"name": column.name, "type": column.type, "rows": len(values), "missing": values.null_count}
        if column.name in schema.targets:
            about["target"] = True
        result.append({**about, **_described(values, column)})
    return result


def _described(values: pa.ChunkedArray, column: Column) -> dict[str, Any]:
    if column.type in ("continuous", "datetime"):
        numbers = _moments(values, column.name) if column.type == "datetime" else _numbers(values, column.name)
        known = np.sort(numbers[~np.isnan(numbers)])
        if not len(known):
            return {"missing": len(numbers)}
        lowest, highest = known[:EXTREMES].tolist(), known[::-1][:EXTREMES].tolist()
        if column.type == "datetime":
            lowest, highest = ([str(np.datetime64(math.floor(value), "s")) for value in part] for part in (lowest, highest))
            return {"missing": len(numbers) - len(known), "lowest": lowest, "highest": highest}
        spread = {"mean": float(known.mean()), "std": float(known.std()), "median": float(np.median(known))}
        return {"missing": len(numbers) - len(known), **spread, "lowest": lowest, "highest": highest}
    if column.type == "categorical":
        sums = _category_statistics(values, column).sums(f"categories:{column.name}")
        counts = {word: int(count) for word, count in sums.items()}
        return {"counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), "distinct": len(counts)}
    if column.type == "image":
        return {"shape": list(column.shape)}
    words = values.cast(pa.string())
    lengths = pc.utf8_length(words)
    about = {"distinct": pc.count_distinct(words).as_py(), "empty": pc.sum(pc.equal(lengths, 0)).as_py() or 0}
    if column.type == "text":
        about |= {"mean_characters": pc.mean(lengths).as_py(), "most_characters": pc.max(lengths).as_py()}
    return about
