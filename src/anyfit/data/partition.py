"""Rows dealt to sites, to try a federation where the data lies in one place: one copy of the rows, and each site's row numbers.

iid · dirichlet:ALPHA (Hsu, Qi and Brown 2019) · shards:K (McMahan et al. 2017) · quantity:ALPHA · column:NAME
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from anyfit.data.blocks import Blocks
from anyfit.data.sources import Source, fingerprint, num_rows
from anyfit.data.split import Part, read_splits
from anyfit.data.stream import Stream
from anyfit.data.tables import fitted, infer_schema, statistics, to_tensors
from anyfit.errors import DataError
from anyfit.tree import map_tensors

__all__ = ["Partition", "partition"]

WAYS = "iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME, e.g. dirichlet:0.5"
BINS = 10  # of a target of numbers
MISSING = "missing"
SHOWN_SITES, SHOWN_CLASSES = 100, 30  # of a description: a record is read by people

Whole = np.ndarray[Any, np.dtype[np.int64]]
Classes = tuple[list[str], Whole]  # the names, and for each row the place of its name


class Partition(Mapping[str, Source]):
    """Sites by name, each a source of its rows in their order; a site's rows are gathered when they are asked for, and not kept."""

    def __init__(
        self,
        source: Source,
        rows: Any,
        how: str,
        seed: int,
        names: list[str],
        sites: Whole,
        base: Source,
        classes: Classes | None,
        others: Mapping[str, Any],
    ) -> None:
        self.source, self.how, self.seed, self.names = source, how, seed, names
        self.others = others  # the splits of the source that were not dealt
        self._rows, self._base = rows, base
        if classes is not None:
            self._classes = classes  # in place of the property
        self._places = {name: place for place, name in enumerate(names)}
        self._order = np.argsort(sites, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(sites, minlength=len(names)))])

    def __getitem__(self, name: str) -> Source:
        return replace(self._base, origin=_taken(self._rows, self.indices_of(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __eq__(self, other: object) -> bool:
        """Whether the same rows were dealt in the same way."""
        if not isinstance(other, Partition):
            return NotImplemented
        return (
            (self.how, self.seed, self.names) == (other.how, other.seed, other.names)
            and np.array_equal(self._starts, other._starts)
            and np.array_equal(self._order, other._order)
            and fingerprint(self._rows) == fingerprint(other._rows)
        )

    __hash__ = None  # type: ignore[assignment]  # as of any mapping that compares by its values

    def __repr__(self) -> str:
        return f"Partition({self.how!r}, {len(self):,} sites, {len(self._order):,} rows, seed={self.seed})"

    def ignoring(self, column: str) -> Partition:
        """The same sites, for which `column` is no feature."""
        other = copy.copy(self)
        for name in ("source", "_base"):
            source: Source = getattr(self, name)
            setattr(other, name, replace(source, ignore=tuple(dict.fromkeys((*source.ignore, column)))))
        return other

    @property
    def whole(self) -> Any:
        """All rows, as they were dealt."""
        return self._rows

    def separates(self, column: str) -> bool:
        """Whether rows of one value of a column are all at one site."""
        if not isinstance(self._rows, pa.Table) or column not in self._rows.column_names:
            return True  # there is nothing to separate
        codes = self._rows[column].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        places = np.empty(len(self._order), dtype=np.int64)
        places[self._order] = np.repeat(np.arange(len(self)), np.diff(self._starts))
        return len(np.unique(np.stack([codes, places]), axis=1).T) == len(np.unique(codes))

    def indices_of(self, name: str) -> Whole:
        """(rows of the site,) which rows of the whole are there, ascending."""
        place = self._places[name]
        return np.asarray(self._order[self._starts[place] : self._starts[place + 1]], dtype=np.int64)

    def rows_of(self, name: str) -> int:
        """How many rows a site has."""
        place = self._places[name]
        return int(self._starts[place + 1] - self._starts[place])

    @cached_property
    def _classes(self) -> Classes | None:
        if isinstance(self._rows, pa.Table | tuple | Mapping):  # of a Dataset each sample would have to be made
            with suppress(DataError):  # no target, or several: the rows can be dealt without
                return _classes_of(self._rows, self.source)
        return None

    @property
    def labels(self) -> list[str] | None:
        """The classes of the target (ranges, where it is a number); None where none is known, or where samples were not looked at."""
        return None if self._classes is None else list(self._classes[0])

    def counts(self) -> dict[str, dict[str, int]]:
        """Site -> class -> rows; one class named "rows" where no classes are known."""
        return self._counts(range(len(self)))

    def _counts(self, places: Any) -> dict[str, dict[str, int]]:
        labels, codes = self._classes or (["rows"], np.zeros(len(self._order), dtype=np.int64))
        result = {}
        for place in places:
            found = np.bincount(codes[self._order[self._starts[place] : self._starts[place + 1]]], minlength=len(labels))
            result[self.names[place]] = dict(zip(labels, found.tolist(), strict=True))
        return result

    def to_json(self) -> dict[str, Any]:
        """What a run's record says: how, seed, how many sites and rows, sizes, and the classes of up to 100 sites evenly picked."""
        sizes = np.diff(self._starts)
        picked = np.unique(np.linspace(0, len(self) - 1, min(len(self), SHOWN_SITES)).round().astype(int))
        return {
            "how": self.how,
            "seed": self.seed,
            "sites": len(self),
            "rows": len(self._order),
            "rows_per_site": {"lowest": int(sizes.min()), "median": float(np.median(sizes)), "highest": int(sizes.max())},
            "sha256": hashlib.sha256(self._order.tobytes() + self._starts.tobytes()).hexdigest(),  # of who has which rows
            "counts": _few_classes(self._counts(picked.tolist())),
        }


def partition(
    origin: Any, how: str, num_sites: int | None = None, *, target: str | None = None, seed: int = 0, split: str = "train"
) -> Partition:
    """Deal rows to sites, each row once; equal arguments give equal sites on any machine.

    `how`: "iid"; "dirichlet:ALPHA": sites of equal size, each with class shares drawn from Dirichlet(ALPHA x shares of all rows),
    as far as the rows reach; "shards:K": sorted by class, cut into num_sites * K pieces, K to each site; "quantity:ALPHA": sizes from
    Dirichlet(ALPHA), contents at random; "column:NAME": a site for each value of that column, which is then no feature. A target of
    numbers counts as ten classes of equal size. `split`: whose rows are dealt.
    """
    source = Source.of(origin, target)
    rows, others = _read(source, split)
    way, value = _way(how)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed (={seed!r}) must be a whole number from 0 up")
    if way == "column":
        if num_sites is not None:
            raise DataError(
                f"num_sites (={num_sites!r}) cannot be chosen with how (={how!r}): there is a site for each value; leave it out"
            )
        names, sites, kept = _by_value(rows, source, str(value))
        return Partition(source, kept, how, seed, names, sites, _without(source, str(value)), None, others)
    total = _total(rows)
    if num_sites is None:
        raise DataError(f"num_sites is not given; how (={how!r}) needs it, e.g. partition(data, {how!r}, 10)")
    if isinstance(num_sites, bool) or not isinstance(num_sites, int) or not 1 <= num_sites <= total:
        raise DataError(f"num_sites (={num_sites!r}) must be a whole number from 1 to the {total:,} rows, so that each site has one")
    generator = np.random.default_rng(seed)
    classes = _classes_of(rows, source, how) if way in ("dirichlet", "shards") else None
    if way == "iid":
        sites = _at_random(_even(total, num_sites), generator)
    elif way == "quantity":
        sites = _at_random(_uneven(total, num_sites, float(value), generator), generator)
    elif way == "dirichlet":
        assert classes is not None
        sites = _skewed(classes[1], num_sites, float(value), generator)
    else:
        assert classes is not None
        if num_sites * int(value) > total:
            raise DataError(
                f"how (={how!r}) cuts num_sites (={num_sites}) * {value} = {num_sites * int(value):,} shards from {total:,} rows; give fewer"
            )
        sites = _in_shards(classes[1], num_sites, int(value), generator)
    names = [f"site-{place:0{len(str(num_sites - 1))}d}" for place in range(num_sites)]
    return Partition(source, rows, how, seed, names, sites, replace(source, split=None), classes, others)


def _read(source: Source, split: str) -> tuple[Any, dict[str, Any]]:
    """The rows of a split, where they are all at hand, and the other splits."""
    if isinstance(source.origin, DataLoader | IterableDataset | Stream):
        raise DataError(
            f"origin (a {type(source.origin).__name__}) cannot be dealt to sites: its rows come one by one; give a table, tensors or a Dataset"
        )
    found = read_splits(source, None, None, wants_validation=False)
    if split not in found:
        raise DataError(f"split (={split!r}) is not there; {source.name} has: {', '.join(found)}")
    rows = found[split]
    if isinstance(rows, Blocks):
        raise DataError(
            f"origin (={source.name!r}) has {rows.num_rows:,} rows on disk, too many to be dealt in memory; give each site a file of its own"
        )
    whole = rows.combine_chunks() if isinstance(rows, pa.Table) else rows  # to take rows from many chunks is slow
    return whole, {name: part for name, part in found.items() if name != split}


def _way(how: Any) -> tuple[str, float | int | str]:
    way, colon, text = how.partition(":") if isinstance(how, str) else ("", "", "")
    if way == "iid" and not colon:
        return way, 0
    if way == "column" and text:
        return way, text
    if way == "shards" and colon:
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise DataError(f"how (={how!r}): the number of shards of each site must be a whole number from 1 up, e.g. shards:2")
        return way, int(text)
    if way in ("dirichlet", "quantity") and colon:
        alpha = math.nan
        with suppress(ValueError):
            alpha = float(text)
        if not 0 < alpha < math.inf:
            raise DataError(f"how (={how!r}): alpha must be a number above 0, e.g. {way}:0.5 (smaller is more uneven)")
        return way, alpha
    raise DataError(f"how (={how!r}) is unknown; it must be {WAYS}")


def _total(rows: Any) -> int:
    total = num_rows(rows)
    if not total:
        raise DataError("origin has no rows; give at least one")
    return total


# ------------------------------------------------------------------ ways: each gives (rows,) the site of each row


def _even(total: int, parts: int) -> Whole:
    return total // parts + (np.arange(parts) < total % parts)


def _uneven(total: int, num_sites: int, alpha: float, generator: np.random.Generator) -> Whole:
    """One row each, and of the others what a Dirichlet draw says, by largest remainder."""
    exact = generator.dirichlet(np.full(num_sites, alpha)) * (total - num_sites)
    sizes = np.floor(exact).astype(np.int64)
    lacking = total - num_sites - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:lacking]] += 1
    return sizes + 1


def _at_random(sizes: Whole, generator: np.random.Generator) -> Whole:
    return generator.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _in_shards(codes: Whole, num_sites: int, each: int, generator: np.random.Generator) -> Whole:
    owners = generator.permutation(np.repeat(np.arange(num_sites), each))
    sites = np.empty(len(codes), dtype=np.int64)
    sites[np.argsort(codes, kind="stable")] = np.repeat(owners, _even(len(codes), num_sites * each))
    return sites


def _skewed(codes: Whole, num_sites: int, alpha: float, generator: np.random.Generator) -> Whole:
    """Each site draws its class shares, then its rows; a class that is used up leaves its share to the others."""
    left = np.bincount(codes)
    shares = generator.dirichlet(np.maximum(alpha * left / len(codes), np.finfo(float).tiny), num_sites)
    sizes, counts = _even(len(codes), num_sites), np.zeros((num_sites, len(left)), dtype=np.int64)
    for site in generator.permutation(num_sites):  # who comes late gets what is left, so the order must not follow the names
        while lacking := int(sizes[site] - counts[site].sum()):
            wanted = np.where(left > 0, shares[site], 0.0)
            if not wanted.sum() > 0:
                wanted = left.astype(float)
            drawn = np.minimum(generator.multinomial(lacking, wanted / wanted.sum()), left)
            counts[site] += drawn
            left = left - drawn
    mixed = generator.permutation(len(codes))
    sites = np.empty(len(codes), dtype=np.int64)
    by_class = mixed[np.argsort(codes[mixed], kind="stable")]
    sites[by_class] = np.repeat(np.tile(np.arange(num_sites), len(left)), counts.T.ravel())
    return sites


def _by_value(rows: Any, source: Source, name: str) -> tuple[list[str], Whole, Any]:
    """-> the values, the site of each row, and the rows without the column."""
    if not isinstance(rows, pa.Table | Mapping):
        raise DataError(f"how (='column:{name}') needs a table or a dict of tensors; these rows have no columns")
    columns = rows.column_names if isinstance(rows, pa.Table) else list(rows)
    if name not in columns:
        raise DataError(f"how (='column:{name}'): {name!r} is not a column of {source.name}; the columns are: {', '.join(columns)}")
    if name in (*source.targets, source.weight):
        raise DataError(f"how (='column:{name}'): {name!r} is the {'weight' if name == source.weight else 'target'}; give another column")
    if isinstance(rows, pa.Table):
        names, sites = _codes_of(rows, name, {name: "categorical"})
        return names, sites, rows.drop_columns([name])
    names, sites = _codes_of_tensor(rows[name], f"column {name!r}")
    return names, sites, {key: value for key, value in rows.items() if key != name}


def _without(source: Source, column: str) -> Source:
    """The source of one site of a partition by column: what spoke of the column goes with it."""
    return replace(
        source,
        split=None,
        group=None if source.group == column else source.group,
        ignore=tuple(name for name in source.ignore if name != column),
        types={name: kind for name, kind in source.types.items() if name != column},
    )


# ------------------------------------------------------------------ classes


def _classes_of(rows: Any, source: Source, how: str = "") -> Classes:
    """The class of each row."""
    reason = f"how (={how!r}) deals by class, but"
    if isinstance(rows, pa.Table):
        if len(source.targets) > 1:
            raise DataError(f"{reason} target (={list(source.targets)}) names several columns; name one: target={source.targets[0]!r}")
        name = source.targets[0] if source.targets else "target"
        if name not in rows.column_names:
            raise DataError(f"{reason} no target is named; name one with target=...; the columns are: {', '.join(rows.column_names)}")
        return _codes_of(rows, name, source.types)
    if isinstance(rows, tuple | Mapping):
        return _codes_of_tensor(_label_of(rows, reason), "the target")
    labels = [torch.as_tensor(_label_of(rows[index], reason)) for index in range(len(rows))]
    if any(label.numel() != 1 for label in labels):
        raise DataError(f"{reason} a label of the Dataset has more than one number; give one class for each row")
    return _codes_of_tensor(torch.stack([label.reshape(()) for label in labels]), "the target")


def _label_of(item: Any, reason: str) -> Any:
    """The labels of a batch, or the label of a sample: by name, or the last of several."""
    if isinstance(item, Mapping):
        found = next((name for name in ("target", "labels") if name in item), None)
        if found is None:
            raise DataError(f"{reason} none of {', '.join(map(str, item))} is named target or labels; name the labels so")
        return item[found]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"{reason} the rows have no labels; give (inputs, labels), or a dict with target or labels")
    return item[-1]


def _codes_of(table: pa.Table, name: str, types: Mapping[str, Any]) -> Classes:
    """As training sees a column: its classes, or ranges of its numbers."""
    column = table.select([name])
    kind = table.schema.field(name).type
    if pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType) or pa.types.is_binary(kind):
        raise DataError(f"column {name!r} holds {kind}, which gives no class for each row; name another")
    schema = infer_schema(column, name, types={name: types[name]} if name in types else None)
    if schema[name].type == "continuous":
        return _ranges(np.asarray(to_tensors(column, schema)["target"]))
    schema = fitted(schema, statistics(column, schema))
    return _named(list(schema.classes or ()), to_tensors(column, schema)["target"].numpy(), f"column {name!r}")


def _codes_of_tensor(labels: Any, what: str) -> Classes:
    labels = torch.as_tensor(labels).detach().cpu() if not isinstance(labels, Tensor) else labels.detach().cpu()
    if labels.dim() != 1 or labels.is_complex():
        raise DataError(f"{what} has the shape {tuple(labels.shape)}; classes must be one number for each row")
    if labels.is_floating_point():
        return _ranges(labels.double().numpy())
    values, codes = np.unique(labels.long().numpy(), return_inverse=True)
    known = values != -100  # what training leaves out
    places = np.where(known, np.cumsum(known) - 1, -100)
    return _named([str(value) for value in values[known]], places[codes], what)


def _named(names: list[str], codes: Whole, what: str) -> Classes:
    """With a class of their own for rows that have none (-100)."""
    if not (codes == -100).any():
        return names, codes
    if MISSING in names:
        raise DataError(f"{what} has rows without a value and rows that say {MISSING!r}; fill the empty ones or rename that value")
    return [*names, MISSING], np.where(codes == -100, len(names), codes)


def _ranges(values: np.ndarray[Any, np.dtype[np.float64]]) -> Classes:
    """Ten classes of equal size, or fewer where many values are equal."""
    if not np.isfinite(values).all():
        raise DataError("the target has rows that are no finite number; drop them or fill them")
    inner = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1))[1:-1])
    found, codes = np.unique(np.searchsorted(inner, values, side="right"), return_inverse=True)
    ends = [(values[codes == code].min(), values[codes == code].max()) for code in range(len(found))]
    spelled: list[str] = []
    for digits in (4, 8, 17):  # no two ranges may have one name
        spelled = [f"{low:.{digits}g}" if low == high else f"{low:.{digits}g} to {high:.{digits}g}" for low, high in ends]
        if len(set(spelled)) == len(spelled):
            break
    return spelled, codes.astype(np.int64)


def _taken(rows: Any, indices: Whole) -> Any:
    if isinstance(rows, pa.Table):
        return rows.take(pa.array(indices))
    if isinstance(rows, tuple | Mapping):
        places = torch.from_numpy(indices)
        return map_tensors(lambda tensor: tensor.index_select(0, places.to(tensor.device)), rows)
    return Part(rows, indices)


def _few_classes(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The largest classes, and the others as one."""
    labels = list(next(iter(counts.values())))
    if len(labels) <= SHOWN_CLASSES:
        return counts
    totals = {label: sum(found[label] for found in counts.values()) for label in labels}
    kept = set(sorted(labels, key=lambda label: -totals[label])[: SHOWN_CLASSES - 1])
    rest = f"{len(labels) - len(kept):,} others"
    return {
        site: {
            **{label: found[label] for label in labels if label in kept},
            rest: sum(found[label] for label in labels if label not in kept),
        }
        for site, found in counts.items()
    }
