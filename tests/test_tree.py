from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyfit.errors import InputError, StateError
from anyfit.tree import clone, first_tensor, leaves, map_tensors, pack, unpack

Pair = namedtuple("Pair", "x y")


@dataclass
class Point:
    x: torch.Tensor
    name: str = "p"


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.builds(torch.arange, st.integers(0, 4)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(TREES)
def test_pack_and_unpack_are_the_identity(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert same(unpack(pack(tree, tensors, "root"), tensors), tree)
    assert len(tensors) <= len(list(leaves(tree)))


@pytest.mark.parametrize("value", [object(), {1.5: 1}, {"a": {1, 2}}, {True: 1}])
def test_what_cannot_be_saved_is_named(value: Any) -> None:
    with pytest.raises(StateError):
        pack({"extras": value}, {})


def test_map_keeps_every_container_and_clone_shares_nothing() -> None:
    x = torch.ones(2)
    tree = {"pair": Pair(x, 1), "point": Point(x), "own": UserDict(a=x), "list": [x, (x,)], "other": "text"}
    doubled = map_tensors(lambda tensor: tensor * 2, tree)
    assert isinstance(doubled["pair"], Pair) and isinstance(doubled["point"], Point) and isinstance(doubled["own"], UserDict)
    assert all(torch.equal(leaf, torch.full((2,), 2.0)) for leaf in leaves(doubled))
    assert len(list(leaves(doubled))) == 5
    copy = clone(tree)
    x.zero_()
    assert all(float(leaf.sum()) == 2 for leaf in leaves(copy))


def test_clone_keeps_strides() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert clone(x).stride() == x.stride()


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(InputError, match="holds no tensor"):
        first_tensor({"a": "text"})
