"""What a source's columns are: names, semantic types and the plain numbers that preprocessing needs. JSON only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from anyfit.errors import DataError
from anyfit.values import canonical, digest

__all__ = ["DATETIME_PARTS", "Column", "ColumnType", "Schema", "published"]

ColumnType = Literal["continuous", "categorical", "text", "image", "datetime", "identifier"]
DATETIME_PARTS = 7  # the moment, and where it stands in its year, week and day (sine and cosine of each)


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `categories`: values seen in training, sorted. `mean` and `std` after `prepare` (image: one per channel).

    `missing`: training rows lacked it, so an indicator stands beside its number. `multiple`: a row holds a list of categories.
    `weights`: of each class, where classes are balanced. `tokenizer`: what the tokenizers library reads, as JSON text.
    """

    name: str
    type: ColumnType
    categories: tuple[str, ...] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()  # of one row's value; image: (C, H, W)
    missing: bool = False
    multiple: bool = False
    weights: tuple[float, ...] | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(ColumnType):
            raise DataError(f"type (={self.type!r}) of column {self.name!r} must be one of {', '.join(get_args(ColumnType))}")


NOTHING = {field.name: field.default for field in fields(Column)}


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a source: which is the target (several: a tuple), which weighs the rows, and the rest are features."""

    columns: tuple[Column, ...]
    target: str | tuple[str, ...] | None = None
    weight: str | None = None

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise DataError(f"column {twice[0]!r} stands twice; rename one of them")
        for target in self.targets:
            if target not in names:
                raise DataError(f"target (={target!r}) is not a column; the columns are: {', '.join(names)}")

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise DataError(f"column (={name!r}) is not in the schema; it has: {', '.join(c.name for c in self.columns)}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the target columns."""
        return () if self.target is None else (self.target,) if isinstance(self.target, str) else self.target

    @property
    def features(self) -> tuple[Column, ...]:
        """All columns that a model may look at: neither targets nor identifiers."""
        return tuple(column for column in self.columns if column.name not in self.targets and column.type != "identifier")

    def of_type(self, type: ColumnType) -> tuple[Column, ...]:
        """The features of one semantic type."""
        return tuple(column for column in self.features if column.type == type)

    @property
    def multilabel(self) -> bool:
        """Whether a row may have several classes: a target of lists, or several targets of two values each."""
        columns = [self[name] for name in self.targets]
        return any(column.multiple for column in columns) or (len(columns) > 1 and all(column.type == "categorical" for column in columns))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The target's categories in the order of their labels (several targets: their names); None where it is not categorical."""
        columns = [self[name] for name in self.targets]
        if not columns or any(column.type != "categorical" for column in columns):
            return None
        return columns[0].categories if len(columns) == 1 else self.targets

    @property
    def num_classes(self) -> int:
        """How many categories the target has."""
        classes = self.classes
        if classes is None:
            raise DataError(f"target (={self.target!r}) is not categorical, so it has no classes; give a categorical target")
        return len(classes)

    @property
    def num_outputs(self) -> int:
        """What a model gives for a row: a logit for each class, or a number for each target."""
        return len(self.targets) if self.classes is None else self.num_classes

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Codes per categorical feature: 0 for missing, 1 for any other value, then its categories."""
        return tuple(len(column.categories or ()) + 2 for column in self.of_type("categorical"))

    @property
    def num_continuous(self) -> int:
        """Width of the tensor `continuous`: numbers, parts of moments, and an indicator for each of them that may be missing."""
        numbers, moments = self.of_type("continuous"), self.of_type("datetime")
        return len(numbers) + DATETIME_PARTS * len(moments) + sum(column.missing for column in (*numbers, *moments))

    @property
    def input_size(self) -> int:
        """Flat width of one row's features: a number for each continuous, code or pixel."""
        return sum(math.prod(column.shape) for column in self.features)

    def replace(self, columns: Iterable[Column]) -> Schema:
        """The schema with columns of the same names replaced."""
        new = {column.name: column for column in columns}
        return replace(self, columns=tuple(new.get(column.name, column) for column in self.columns))

    def hash(self) -> str:
        """SHA-256 of the JSON form."""
        return digest(self.to_json())

    def differences(self, other: Schema) -> list[str]:
        """What another schema has otherwise, a line each; none where they are equal."""
        ours, theirs = ({column.name: column for column in schema.columns} for schema in (self, other))
        lines = [f"column {name!r} is not in the other" for name in ours if name not in theirs]
        lines += [f"column {name!r} ({theirs[name].type}) is only in the other" for name in theirs if name not in ours]
        for name in ours:
            if name in theirs:
                lines += [f"column {name!r}: {line}" for line in _column_differences(ours[name], theirs[name])]
        for what in ("target", "weight"):
            if getattr(self, what) != getattr(other, what):
                lines.append(f"{what}: {getattr(self, what)} here, {getattr(other, what)} there")
        common = [name for name in theirs if name in ours]
        if [name for name in ours if name in theirs] != common:
            lines.append(f"order: {', '.join(name for name in ours if name in theirs)} here, {', '.join(common)} there")
        return lines

    def to_json(self) -> dict[str, Any]:
        """JSON in which what is not known is left out."""
        columns = [
            {key: value for key, value in asdict(column).items() if key in ("name", "type") or value != NOTHING[key]}
            for column in self.columns
        ]
        weight = {} if self.weight is None else {"weight": self.weight}
        return {"columns": columns, "target": self.target, **weight}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        try:
            target = value["target"]
            target = tuple(target) if isinstance(target, list | tuple) else target
            unknown = sorted(set(value) - {"columns", "target", "weight"})
            if unknown or not isinstance(target, str | tuple | None) or not isinstance(value.get("weight"), str | None):
                raise TypeError(f"unexpected {unknown[0] if unknown else (target, value.get('weight'))!r}")
            return cls(tuple(Column(**_tuples(column)) for column in value["columns"]), target, value.get("weight"))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"schema is malformed ({error}); it must be what Schema.to_json() wrote") from error


def _tuples(column: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in column.items()}


def _column_differences(ours: Column, theirs: Column) -> list[str]:
    lines = []
    for field in fields(Column):
        mine, its = getattr(ours, field.name), getattr(theirs, field.name)
        if mine == its:
            continue
        if field.name == "categories" and mine is not None and its is not None:
            gone, new = [word for word in mine if word not in its], [word for word in its if word not in mine]
            parts = [f"without {_few(gone)}"] * bool(gone) + [f"with {_few(new)}"] * bool(new)
            lines.append(f"the other is {' and '.join(parts) or 'in another order'}")
        elif field.name == "tokenizer":
            lines.append("another tokenizer")
        else:
            lines.append(f"{field.name} {mine} here, {its} there")
    return lines


def _few(words: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, words[:most])) + (f" and {len(words) - most} more" if len(words) > most else "")


def published(description: Sequence[Mapping[str, Any]], minimum: int = 10, allow: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What may be told of a source's columns: names and types, and only what at least `minimum` rows stand behind.

    `description` is what `describe` gave. Categories of fewer rows become one count of others; a range runs between the values
    that at least `minimum` rows lie beyond; texts, identifiers and images say nothing. Columns in `allow` are told whole.
    """
    known = {str(column["name"]) for column in description}
    unknown = sorted(set(allow) - known)
    if unknown:
        raise DataError(f"allow names {unknown[0]!r}, which is not a column; the columns are: {', '.join(sorted(known))}")
    if minimum < 1:
        raise DataError(f"minimum (={minimum}) must be at least 1")
    result = []
    for column in description:
        if column["name"] in allow:
            result.append(dict(column))
            continue
        told = {"name": column["name"], "type": column["type"]}
        if column["rows"] - column["missing"] >= minimum and column["type"] in ("continuous", "datetime", "categorical"):
            told |= _told(column, minimum)
        result.append(told)
    canonical(result)
    return result


def _told(column: Mapping[str, Any], minimum: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if "counts" in column:
        kept = {word: count for word, count in column["counts"].items() if count >= minimum}
        rest = sum(column["counts"].values()) - sum(kept.values())
        told["categories"] = sorted(kept)
        told["others"] = len(kept) < len(column["counts"])
        if rest >= minimum:  # a smaller count would tell how few they are
            told["others_rows"] = rest
    lowest, highest = column.get("lowest"), column.get("highest")
    if lowest and highest and len(lowest) >= minimum and lowest[minimum - 1] <= highest[minimum - 1]:  # else they pass each other
        told["range"] = [_rounded(lowest[minimum - 1]), _rounded(highest[minimum - 1])]
    return told


def _rounded(value: float | str) -> float | str:
    """Two digits of a number, the day of a moment."""
    return value[:10] if isinstance(value, str) else float(f"{value:.2g}")
