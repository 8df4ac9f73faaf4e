"""What a federation goes by before and after its rounds: its rules, the schema that all sites agree to, and how unlike their figures are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyfit.errors import DataError, InputError, StateError
from anyfit.report.records import low_is_worse
from anyfit.schema import Column, Schema
from anyfit.values import canonical

__all__ = ["Rules", "agreed", "changed_rules", "fairness", "is_fitted", "number_of"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a federation runs, beside the plan of its local work."""

    rounds: int
    sample: float | int | None = None
    quorum: float | int | None = None
    deadline_s: float | None = None
    seconds: float | None = None
    compress: str | None = None
    compress_down: str | None = None
    batch_statistics: str = "refuse"
    keep_optimizer: bool = False
    validation: float | None = None  # fractions of each site's rows
    test: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds (={self.rounds}) must be at least 1")
        for name in ("sample", "quorum"):
            number_of(getattr(self, name), 1, name)
        for name in ("validation", "test"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float) and 0.0 < value < 1.0):
                raise InputError(f"{name} (={value!r}) must be a fraction of each site's rows between 0.0 and 1.0")
        for name in ("deadline_s", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} (={value}) must be above 0")
        if self.batch_statistics not in ("refuse", "aggregate", "local"):
            raise InputError(f"batch_statistics (={self.batch_statistics!r}) must be refuse, aggregate or local")
        if self.compress_down not in (None, "bf16", "fp16"):
            raise InputError(f"compress_down (={self.compress_down!r}) must be bf16 or fp16; weights cannot be sent in part")


def number_of(value: float | int | None, sites: int, name: str) -> int:
    """A number of sites, or a share of them (1.0 is all, 1 is one)."""
    if value is None:
        return sites
    if isinstance(value, bool) or not (0.0 < value <= 1.0 if isinstance(value, float) else value >= 1):
        raise InputError(f"{name} (={value!r}) must be a whole number of sites from 1, or a share above 0.0 and at most 1.0")
    return min(sites, value) if isinstance(value, int) else max(1, round(value * sites))


def changed_rules(where: str, before: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a resume changes of its rules; refused where its sites would hold other rows or exchange other tensors."""
    if canonical(before["strategy"]) != canonical(record["strategy"]):
        raise StateError(f"{where} has the strategy {before['strategy']}, not {record['strategy']}; start a new run")
    dealt = [{name: told.get("partition", {}).get(name) for name in ("how", "seed", "sha256")} for told in (before, record)]
    for what, was, now in (("partition", *dealt), ("source", before.get("source"), record.get("source"))):
        if canonical(was) != canonical(now):
            raise StateError(
                f"{where} has another {what} ({was} then, {now} now), so its sites would hold other rows; resume with the same, or start a new run"
            )
    for name in ("validation", "test", "batch_statistics"):
        was, now = before["rules"].get(name), record["rules"][name]
        if was != now:
            raise StateError(
                f"{name} (={now}) was {was} in {where}; so a resume would not go on with the same rows and tensors; start a new run"
            )
    told = [{**each["rules"], "limits": each.get("limits"), "faults": each.get("faults")} for each in (before, record)]
    names = sorted(set(told[1]) - {"rounds", "quorum", "deadline_s"})
    return {name: [told[0].get(name), told[1][name]] for name in names if told[0].get(name) != told[1][name]}


def fairness(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How unlike the sites' figures are: mean over sites, lowest, highest, deviation, and who is worst off."""
    result: dict[str, dict[str, Any]] = {}
    names = {name for told in sites.values() for name, value in told.items() if isinstance(value, float)}
    for name in sorted(names):
        found = {site: float(told[name]) for site, told in sites.items() if isinstance(told.get(name), float)}
        if len(found) < 2:
            continue
        mean = sum(found.values()) / len(found)
        worst = (min if low_is_worse(name) else max)(found, key=lambda site: found[site])
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found.values()) / len(found))
        result[name] = {
            "mean": mean,
            "lowest": min(found.values()),
            "highest": max(found.values()),
            "deviation": deviation,
            "worst_site": worst,
        }
    return result


def is_fitted(schema: Schema) -> bool:
    """Whether preprocessing is in it already."""
    return any(column.mean is not None or column.categories is not None for column in schema.columns)


def agreed(told: Mapping[str, Mapping[str, Any]]) -> Schema:
    """Names and types of the first site, to which all must agree; for tensors, the widest range of labels.

    A column that is missing in all rows of a site has no type of its own there, and takes that of the others.
    """
    names = sorted(told)
    absent = {name: set(told[name].get("absent", ())) for name in names}
    schemas = {name: Schema.from_json(told[name]["schema"]) for name in names}
    first = names[0]
    base = schemas[first]
    for column in base.columns:  # all missing at the first: the first site that knows
        if column.name in absent[first]:
            knows = next((name for name in names if column.name not in absent[name]), None)
            if knows is not None and any(other.name == column.name for other in schemas[knows].columns):
                base = base.replace([schemas[knows][column.name]])
    ours = {column.name: (column.type, column.shape) for column in base.columns}
    for name in names[1:]:
        other = schemas[name]
        theirs = {column.name: (column.type, column.shape) for column in other.columns}
        loose = any(told[site].get("loose") for site in (first, name))
        odd = sorted(
            key
            for key in set(ours) | set(theirs)
            if not (key in absent[name] and key in ours) and not _alike(ours.get(key), theirs.get(key), loose)
        )
        if odd or base.target != other.target:
            raise DataError(
                f"site {name!r} has another schema than {first!r}: column {odd[0] if odd else 'target'!r} is "
                f"{theirs.get(odd[0]) if odd else other.target} there and {ours.get(odd[0]) if odd else base.target} here; make them agree (types=...)"
            )
        base = base.replace(_wider(column, other[column.name]) for column in base.columns)
    return base


def _alike(a: tuple[str, tuple[int, ...]] | None, b: tuple[str, tuple[int, ...]] | None, loose: bool) -> bool:
    """Whether two columns are of one kind. Of a Dataset one sample was looked at, and others may be longer (`loose`)."""
    return a == b or (loose and a is not None and b is not None and (a[0], len(a[1])) == (b[0], len(b[1])))


def _wider(a: Column, b: Column) -> Column:
    return b if len(b.categories or ()) > len(a.categories or ()) else a
