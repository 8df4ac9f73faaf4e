from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from anyfit.errors import InputError, StateError
from anyfit.tree import clone, first_tensor, leaves, map_tensors, pack, unpack, wide
from anyfit.values import canonical, parse

Pair = namedtuple("Pair", "x y")


@dataclass
class Point:
    x: torch.Tensor
    name: str = "p"
    norm: float = field(init=False, default=0.0)


class Encoding(UserDict[str, Any]):
    """A mapping of its own kind that takes its content by name, as transformers' BatchEncoding does."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.integers(0, 99).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab.1", max_size=3) | st.integers(0, 2), inner, max_size=3)
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
    return type(a) is type(b) and (a == b or (a != a and b != b))


@given(TREES)
@example({"a": [float("inf"), -float("inf")]})
@example(float("nan"))
def test_pack_and_unpack_are_the_identity(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = parse(canonical(pack(tree, tensors, "root")))
    assert same(unpack(packed, tensors), tree)
    assert len(tensors) == len(list(leaves(tree)))


@pytest.mark.parametrize("names", [("a.b", "a"), ("1", 1)])
def test_names_that_look_alike_keep_their_tensors(names: tuple[Any, Any]) -> None:
    """`{"a.b": x, "a": {"b": y}}` has two tensors at a.b; one must not take the other's place."""
    first, second = torch.tensor(1), torch.tensor(2)
    tree = {names[0]: first, names[1]: {"b": second} if names[1] == "a" else second}
    tensors: dict[str, torch.Tensor] = {}
    assert same(unpack(pack(tree, tensors, "root"), tensors), tree)


@pytest.mark.parametrize("value", [Pair(1, torch.tensor(2)), torch.Size([2, 3])], ids=["named tuple", "size"])
def test_every_kind_of_tuple_comes_back_as_a_tuple(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert same(unpack(pack(value, tensors, "root"), tensors), tuple(value))


@pytest.mark.parametrize("value", [object(), {1.5: 1}, {"a": {1, 2}}, {True: 1}])
def test_what_cannot_be_saved_is_named(value: Any) -> None:
    with pytest.raises(StateError):
        pack({"extras": value}, {})


def one(x: torch.Tensor) -> dict[str, Any]:
    """Every container, with `x` in each."""
    return {
        "pair": Pair(x, 1),
        "own": Encoding({"a": x}),
        "ordered": OrderedDict(a=x),
        "list": [x, (x,)],
        "other": "text",
        "type": Point,
    }


def test_map_keeps_every_container() -> None:
    x = torch.ones(2)
    tree = one(x)
    doubled = map_tensors(lambda tensor: tensor * 2, tree)
    assert {name: type(value) for name, value in doubled.items()} == {name: type(value) for name, value in tree.items()}
    assert doubled["pair"].y == 1 and doubled["other"] == "text" and doubled["type"] is Point
    assert [leaf.tolist() for leaf in leaves(doubled)] == [[2.0, 2.0]] * 5
    assert [leaf.tolist() for leaf in leaves(tree)] == [[1.0, 1.0]] * 5
    odd = map_tensors(lambda tensor: tensor * 2, defaultdict(list, a=x))
    assert odd["a"].tolist() == [2.0, 2.0], "the content of a mapping that cannot be made from its content alone"


def test_map_goes_through_a_dataclass_whose_fields_are_not_all_given() -> None:
    point = Point(torch.ones(2))
    point.norm = 2.0
    doubled = map_tensors(lambda tensor: tensor * 2, point)
    assert isinstance(doubled, Point) and doubled.x.tolist() == [2.0, 2.0] and point.x.tolist() == [1.0, 1.0]


def test_clone_shares_nothing() -> None:
    x = torch.ones(2, requires_grad=True)
    copy = clone(one(x))
    with torch.no_grad():
        x.zero_()
    assert all(leaf.tolist() == [1.0, 1.0] and not leaf.requires_grad for leaf in leaves(copy))


def test_clone_keeps_strides() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert clone(x).stride() == x.stride()


def test_the_first_tensor_tells_the_size_and_a_batch_without_any_is_refused() -> None:
    assert first_tensor({"ids": ["a", "b"], "x": (Point(torch.zeros(3)), torch.zeros(4))}).shape == (3,)
    with pytest.raises(InputError, match=r"batch \(a dict\) holds no tensor"):
        first_tensor({"a": "text"})


def test_wide_is_float64_and_leaves_the_graph_whole() -> None:
    x = torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True)
    assert wide(x).dtype == torch.float64 and wide(torch.tensor(3)).dtype == torch.float64
    wide(x).sum().backward()
    assert x.grad is not None
