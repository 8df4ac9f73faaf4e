"""What a source's columns are: names, semantic types and the plain numbers that preprocessing needs. JSON only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from anyfit.errors import DataError

__all__ = ["Column", "ColumnType", "Schema"]

ColumnType = Literal["continuous", "categorical", "text", "image"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `categories`: values seen in training, sorted. `mean` and `std` after `prepare` (image: one per channel)."""

    name: str
    type: ColumnType
    categories: tuple[str, ...] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()  # of one row's value; image: (C, H, W)

    def __post_init__(self) -> None:
        if self.type not in get_args(ColumnType):
            raise DataError(f"type (={self.type!r}) of column {self.name!r} must be one of {', '.join(get_args(ColumnType))}")


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a source and which of them is the target."""

    columns: tuple[Column, ...]
    target: str | None = None

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"column {twice[0]!r} stands twice; rename one of them")
        if self.target is not None and self.target not in names:
            raise DataError(f"target (={self.target!r}) is not a column; the columns are: {', '.join(names)}")

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise DataError(f"column (={name!r}) is not in the schema; it has: {', '.join(c.name for c in self.columns)}")

    @property
    def features(self) -> tuple[Column, ...]:
        """All columns but the target."""
        return tuple(column for column in self.columns if column.name != self.target)

    def of_type(self, type: ColumnType) -> tuple[Column, ...]:
        """The features of one semantic type."""
        return tuple(column for column in self.features if column.type == type)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The target's categories in the order of their labels; None where it is not categorical."""
        return None if self.target is None or self[self.target].type != "categorical" else self[self.target].categories

    @property
    def num_classes(self) -> int:
        """How many categories the target has."""
        classes = self.classes
        if classes is None:
            raise DataError(f"target (={self.target!r}) is not categorical, so it has no classes; give a categorical target")
        return len(classes)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Codes per categorical feature: its categories and 0, which stands for missing and unseen."""
        return tuple(len(column.categories or ()) + 1 for column in self.of_type("categorical"))

    @property
    def input_size(self) -> int:
        """Flat width of one row's features: a number for each continuous, code or pixel."""
        return sum(math.prod(column.shape) for column in self.features)

    def replace(self, columns: Iterable[Column]) -> Schema:
        """The schema with columns of the same names replaced."""
        new = {column.name: column for column in columns}
        return replace(self, columns=tuple(new.get(column.name, column) for column in self.columns))

    def to_json(self) -> dict[str, Any]:
        """JSON in which what is not known is left out."""
        columns = [
            {key: value for key, value in asdict(column).items() if value is not None and (key, value) != ("shape", ())}
            for column in self.columns
        ]
        return {"columns": columns, "target": self.target}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        try:
            return cls(tuple(Column(**_tuples(column)) for column in value["columns"]), value["target"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"schema is malformed ({error}); it must be what Schema.to_json() wrote") from error


def _tuples(column: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in column.items()}
