"""Rows dealt to sites: each row once, as skewed as asked, equal everywhere, and nothing gathered before it is asked for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from anyfit import data
from anyfit.data import Partition, Source, partition
from anyfit.data.blocks import Blocks
from anyfit.errors import DataError

WAYS = ("iid", "dirichlet:0.3", "shards:2", "quantity:0.5")


def table_of(rows: int = 300, classes: int = 10) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(range(rows)),
            "target": pa.array([f"class {row * 7 % classes}" for row in range(rows)]),
            "place": pa.array([["north", "south", "east"][row % 3] for row in range(rows)]),
        }
    )


def dealt(parts: Partition) -> list[int]:
    return sorted(row for name in parts for row in parts.indices_of(name).tolist())


def skew(parts: Partition) -> float:
    """The mean over sites of the share of the largest class."""
    return float(np.mean([max(found.values()) / sum(found.values()) for found in parts.counts().values()]))


class Samples(Dataset[Any]):
    """Twelve rows; counts how often one is made."""

    def __init__(self) -> None:
        self.made = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.made += 1
        return torch.full((2,), float(index)), index % 3


@given(
    how=st.sampled_from(["iid", "dirichlet:0.01", "dirichlet:1", "dirichlet:1e300", "dirichlet:1e-300", "quantity:0.01", "quantity:9"]),
    rows=st.integers(1, 80),
    share=st.floats(0, 1),
    classes=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_row_is_dealt_once_and_every_site_has_one(how: str, rows: int, share: float, classes: int, seed: int) -> None:
    num_sites = max(1, round(share * rows))
    labels = torch.arange(rows) ** 2 % classes
    parts = partition((torch.arange(rows), labels), how, num_sites, seed=seed)
    assert dealt(parts) == list(range(rows))
    assert len(parts) == num_sites
    assert min(parts.rows_of(name) for name in parts) >= 1
    for name in parts:
        assert (np.diff(parts.indices_of(name)) > 0).all()


@pytest.mark.parametrize("how", WAYS)
def test_sites_hold_the_rows_and_keep_what_is_known_of_them(how: str) -> None:
    source = Source(table_of(), "target", ignore=("row",), types={"place": "text"})
    parts = partition(source, how, 8, seed=3)
    assert parts.names == [f"site-{place}" for place in range(8)]
    assert parts.source is source
    seen: list[int] = []
    for name, site in parts.items():
        rows = site.read()["train"]
        assert rows["row"].to_pylist() == parts.indices_of(name).tolist() == sorted(rows["row"].to_pylist())
        assert rows.num_rows == parts.rows_of(name)
        assert dict(Counter(rows["target"].to_pylist())) == {label: count for label, count in parts.counts()[name].items() if count}
        assert (site.target, site.ignore, site.types) == ("target", ("row",), {"place": "text"})
        seen += rows["row"].to_pylist()
    assert sorted(seen) == list(range(300))
    assert parts.labels == [f"class {index}" for index in range(10)]


def test_names_have_the_width_of_the_last_so_that_they_sort() -> None:
    names = partition((torch.zeros(1000), torch.zeros(1000).long()), "iid", 1000).names
    assert (names[7], names[-1]) == ("site-007", "site-999")
    assert names == sorted(names)


def test_iid_sites_differ_by_one_row_at_most() -> None:
    parts = partition(table_of(103), "iid", 10)
    assert {parts.rows_of(name) for name in parts} == {10, 11}


def test_shards_give_a_site_few_classes() -> None:
    even = partition(table_of(300), "shards:2", 10, seed=5)  # 20 shards of 15 rows, two of each class
    assert max(sum(count > 0 for count in found.values()) for found in even.counts().values()) <= 2
    assert {even.rows_of(name) for name in even} == {30}
    labels = torch.from_numpy(np.repeat(np.arange(5), [40, 50, 60, 70, 77]))
    odd = partition((torch.zeros(297), labels), "shards:1", 11, seed=5)  # a shard may lie across a border
    assert max(sum(count > 0 for count in found.values()) for found in odd.counts().values()) == 2


def test_small_alpha_is_more_skewed_than_large() -> None:
    skews = [skew(partition(table_of(2000), f"dirichlet:{alpha}", 20, seed=1)) for alpha in (0.1, 1, 10, 10_000)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7
    assert skews[-1] < 0.2
    assert skew(partition(table_of(2000), "iid", 20, seed=1)) < 0.25


def test_dirichlet_sites_are_of_equal_size_and_follow_uneven_classes_where_alpha_is_large() -> None:
    labels = torch.from_numpy(np.repeat([0, 1, 2], [700, 200, 100]))
    parts = partition((torch.zeros(1000), labels), "dirichlet:1e9", 10, seed=2)
    assert {parts.rows_of(name) for name in parts} == {100}
    shares = np.array([list(found.values()) for found in parts.counts().values()])
    assert np.abs(shares - [70, 20, 10]).max() <= 20


def test_quantity_makes_sizes_uneven_and_leaves_the_content_alike() -> None:
    few, many = (partition(table_of(3000), f"quantity:{alpha}", 20, seed=4) for alpha in ("0.2", "100"))
    spread = [np.std([parts.rows_of(name) for name in parts]) for parts in (few, many)]
    assert spread[0] > 5 * spread[1]
    largest = max(few, key=few.rows_of)
    found = np.array(list(few.counts()[largest].values()))
    assert np.abs(found / found.sum() - 0.1).max() < 0.05


def test_equal_arguments_give_equal_sites_in_another_process() -> None:
    code = (
        "import hashlib, torch; from anyfit.data import partition\n"
        f"for how in {list(WAYS)!r}:\n"
        "    parts = partition({'target': torch.arange(90) % 4, 'x': torch.arange(90.0)}, how, 7, seed=11)\n"
        "    print(hashlib.sha256(b''.join(parts.indices_of(name).tobytes() for name in parts)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    origin = {"x": torch.arange(90.0), "target": torch.arange(90) % 4}  # the order of a dict says nothing
    for how, expected in zip(WAYS, there, strict=True):
        here = partition(origin, how, 7, seed=11)
        assert hashlib.sha256(b"".join(here.indices_of(name).tobytes() for name in here)).hexdigest() == expected
        assert here == partition(origin, how, 7, seed=11)
        assert here != partition(origin, how, 7, seed=12)
        assert here != partition({**origin, "x": torch.zeros(90)}, how, 7, seed=11)


def test_column_gives_a_site_for_each_value_and_is_no_feature() -> None:
    source = Source(table_of(), "target", group="place", ignore=("place", "row"), types={"place": "categorical"})
    parts = partition(source, "column:place")
    assert parts.names == ["east", "north", "south"]
    assert dealt(parts) == list(range(300))
    site = parts["north"]
    assert site.read()["train"].column_names == ["row", "target"]
    assert (site.group, site.ignore, site.types) == (None, ("row",), {})
    assert set(site.read()["train"]["row"].to_pylist()) == set(range(0, 300, 3))
    assert sum(parts.counts()["east"].values()) == 100


def test_rows_without_a_value_are_a_site_named_missing_unless_one_has_that_name() -> None:
    table = pa.table({"x": [1.0, 2, 3, 4], "place": ["b", None, "a", None]})
    parts = partition(table, "column:place")
    assert parts.names == ["a", "b", "missing"]
    assert parts["missing"].read()["train"]["x"].to_pylist() == [2.0, 4.0]
    assert parts.labels is None
    assert parts.counts()["missing"] == {"rows": 2}
    with pytest.raises(DataError, match="rows without a value and rows that say 'missing'"):
        partition(table.set_column(1, "place", [["b", None, "missing", "b"]]), "column:place")


def test_column_of_tensors_and_one_site_for_each_row() -> None:
    origin = {"x": torch.arange(6.0), "user": torch.tensor([7, 7, 30, 2, 30, 7]), "target": torch.tensor([0, 1, 0, 1, 0, 1])}
    parts = partition(origin, "column:user")
    assert parts.names == ["2", "7", "30"]
    assert set(parts["7"].origin) == {"x", "target"}
    assert parts["7"].origin["x"].tolist() == [0.0, 1.0, 5.0]
    assert parts.counts()["30"] == {"0": 2, "1": 0}
    assert len(partition(table_of(40), "column:row")) == 40


def test_hospitals_of_heart_disease_are_sites(data_folder: Path) -> None:
    parts = partition(data_folder / "heart-disease" / "heart_disease_all_sites.csv", "column:site", target="num")
    assert {name: parts.rows_of(name) for name in parts} == {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
    assert parts.counts()["hungarian"] == {"0": 188, "1": 106, "2": 0, "3": 0, "4": 0}
    assert "site" not in parts["va"].read()["train"].column_names
    assert parts["va"].read()["train"].num_rows == 200


def test_ten_thousand_sites_are_dealt_without_gathering_a_row() -> None:
    images, labels = torch.zeros(1, 28, 28, dtype=torch.uint8).expand(60_000, 28, 28), torch.arange(60_000) % 10
    begun = time.process_time()
    for how in WAYS:
        parts = partition((images, labels), how, 10_000)
        assert len(parts) == 10_000
        assert sum(map(parts.rows_of, parts)) == 60_000
        assert len(parts.counts()) == 10_000
        image, label = parts["site-1234"].read()["train"]
        assert len(image) == len(label) == parts.rows_of("site-1234")
    assert time.process_time() - begun < 5
    assert parts._rows[0].untyped_storage().nbytes() == 28 * 28


def test_torch_data_sets_are_looked_at_only_where_labels_are_needed() -> None:
    samples = Samples()
    parts = partition(samples, "iid", 3)
    assert parts.counts()["site-0"] == {"rows": 4}
    assert samples.made == 0
    parts = partition(samples, "shards:1", 3, seed=2)
    assert samples.made == 12
    assert sorted(max(found, key=lambda label: found[label]) for found in parts.counts().values()) == ["0", "1", "2"]
    site = parts["site-1"].read()["train"]
    assert [int(site[place][0][0]) for place in range(len(site))] == parts.indices_of("site-1").tolist()


def test_tensor_data_sets_dicts_and_left_out_labels_have_classes() -> None:
    labels = torch.tensor([0, 1, -100, 1, 0, 5])
    expected = ["0", "1", "5", "missing"]
    for origin in (TensorDataset(torch.zeros(6, 2), labels), (torch.zeros(6), labels), {"x": torch.zeros(6), "labels": labels}):
        parts = partition(origin, "dirichlet:1", 2)
        assert parts.labels == expected
        assert sum(found["missing"] for found in parts.counts().values()) == 1


def test_numbers_as_target_are_binned_by_quantile() -> None:
    values = pa.table({"x": range(1000), "price": [float(row) ** 2 for row in range(1000)]})
    parts = partition(values, "shards:1", 10, target="price")
    assert len(parts.labels or []) == 10
    assert all(sum(count > 0 for count in found.values()) == 1 for found in parts.counts().values())
    same = partition((torch.zeros(50), torch.ones(50)), "shards:1", 5)
    assert same.labels == ["1"]


def test_split_column_says_whose_rows_are_dealt(tmp_path: Path) -> None:
    table = table_of(60).append_column("part", pa.array([["train", "test"][row % 4 == 0] for row in range(60)]))
    source = Source(table, "target", split="part")
    assert sum(partition(source, "iid", 3).rows_of(f"site-{place}") for place in range(3)) == 45
    parts = partition(source, "iid", 3, split="test")
    assert parts["site-0"].read()["train"].column_names == ["row", "target", "place"]
    assert sum(map(parts.rows_of, parts)) == 15
    with pytest.raises(DataError, match=r"split \(='validation'\) is not there; Table of 60 rows has: train, test"):
        partition(source, "iid", 3, split="validation")


def test_description_is_json_of_at_most_a_hundred_sites_and_thirty_classes() -> None:
    labels = torch.arange(6000) % 50
    parts = partition((torch.zeros(6000), labels), "quantity:1", 1000, seed=8)
    told = parts.to_json()
    json.dumps(told, allow_nan=False)
    assert (told["how"], told["seed"], told["sites"], told["rows"]) == ("quantity:1", 8, 1000, 6000)
    assert len(told["counts"]) == 100
    assert {"site-000", "site-999"} < set(told["counts"])
    assert told["rows_per_site"]["lowest"] == min(map(parts.rows_of, parts))
    for name, found in told["counts"].items():
        assert len(found) == 30
        assert "21 others" in found
        assert sum(found.values()) == parts.rows_of(name)
    assert partition(table_of(), "column:place").to_json()["counts"]["east"] == {f"class {index}": 10 for index in range(10)}


def test_partition_is_a_mapping_that_federate_can_take() -> None:
    parts = partition(table_of(), "iid", 4)
    assert "site-2" in parts
    assert "nowhere" not in parts
    with pytest.raises(KeyError):
        parts["nowhere"]
    assert "4 sites, 300 rows" in repr(parts)
    assert data.Partition is Partition


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


TENSORS = (torch.zeros(30), torch.arange(30) % 3)


@pytest.mark.parametrize(
    ("origin", "how", "num_sites", "more", "message"),
    [
        (TENSORS, "even", 3, {}, r"how \(='even'\) is unknown; it must be iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME"),
        (TENSORS, None, 3, {}, r"how \(=None\) is unknown"),
        (TENSORS, "iid:3", 3, {}, r"how \(='iid:3'\) is unknown"),
        (TENSORS, "column:", None, {}, r"how \(='column:'\) is unknown"),
        (TENSORS, "dirichlet", 3, {}, r"how \(='dirichlet'\) is unknown"),
        (TENSORS, "dirichlet:0", 3, {}, r"how \(='dirichlet:0'\): alpha must be a number above 0, e.g. dirichlet:0.5"),
        (TENSORS, "dirichlet:nan", 3, {}, "alpha must be a number above 0"),
        (TENSORS, "quantity:-1", 3, {}, "alpha must be a number above 0, e.g. quantity:0.5"),
        (TENSORS, "quantity:inf", 3, {}, "alpha must be a number above 0"),
        (TENSORS, "dirichlet:x", 3, {}, "alpha must be a number above 0"),
        (TENSORS, "shards:0", 3, {}, "whole number from 1 up, e.g. shards:2"),
        (TENSORS, "shards:1.5", 3, {}, "whole number from 1 up"),
        (TENSORS, "shards:11", 3, {}, r"num_sites \(=3\) \* 11 = 33 shards from 30 rows; give fewer"),
        (TENSORS, "iid", 0, {}, r"num_sites \(=0\) must be a whole number from 1 to the 30 rows"),
        (TENSORS, "dirichlet:1", 31, {}, r"num_sites \(=31\) must be a whole number from 1 to the 30 rows"),
        (TENSORS, "iid", 2.0, {}, r"num_sites \(=2.0\)"),
        (TENSORS, "iid", True, {}, r"num_sites \(=True\)"),
        (TENSORS, "iid", None, {}, r"num_sites is not given; how \(='iid'\) needs it"),
        (TENSORS, "iid", 3, {"seed": -1}, r"seed \(=-1\) must be a whole number from 0 up"),
        (TENSORS, "column:x", None, {}, "needs a table or a dict of tensors"),
        (table_of(), "column:place", 3, {}, r"num_sites \(=3\) cannot be chosen with how \(='column:place'\)"),
        (table_of(), "column:nowhere", None, {}, "'nowhere' is not a column of Table of 300 rows; the columns are: row, target, place"),
        (table_of(), "column:place", None, {"target": "place"}, "'place' is the target; give another column"),
        (table_of(), "shards:1", 3, {"target": "nowhere"}, r"target \(='nowhere'\) is not a column"),
        (pa.table({"x": [1, 2]}), "dirichlet:1", 2, {}, "no target is named; name one with target=...; the columns are: x"),
        (Source(table_of(), ("target", "place")), "shards:1", 3, {}, "names several columns; name one: target='target'"),
        (pa.table({"x": [[1], [2]], "target": [["a"], ["b"]]}), "shards:1", 2, {}, "gives no class for each row"),
        (pa.table({"target": [1.5, None]}), "shards:1", 2, {}, "missing in 1 rows"),
        ((torch.zeros(4), torch.zeros(4, 2)), "shards:1", 2, {}, r"the shape \(4, 2\)"),
        ((torch.zeros(4), torch.tensor([0.0, 1, 2, float("nan")])), "shards:1", 2, {}, "no finite number"),
        ((torch.zeros(4),), "shards:1", 2, {}, r"the rows have no labels; give \(inputs, labels\)"),
        ({"x": torch.zeros(4)}, "shards:1", 2, {}, "none of x is named target or labels"),
        (TENSORS, "iid", 3, {"split": "test"}, r"split \(='test'\) is not there; .* has: train"),
        (Numbers(), "iid", 3, {}, r"origin \(a Numbers\) cannot be dealt to sites"),
        (data.Stream(lambda: iter([{"x": 1}])), "iid", 3, {}, r"origin \(a Stream\) cannot be dealt to sites"),
    ],
)
def test_what_cannot_be_dealt_is_refused(origin: Any, how: Any, num_sites: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(origin, how, num_sites, **more)


def test_rows_larger_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyfit.data.blocks.HOLD_BYTES", 100)
    path = tmp_path / "rows.csv"
    path.write_text("x,target\n" + "1,a\n2,b\n" * 500)
    assert isinstance(Source(str(path)).read()["train"], Blocks)
    with pytest.raises(DataError, match="1,000 rows on disk, too many to be dealt in memory; give each site a file of its own"):
        partition(str(path), "iid", 3)
