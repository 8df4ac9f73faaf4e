from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from anyfit.errors import InputError, NonFinite
from anyfit.update import FINE, WIDE, Layout, Order, Total, Update

NUMBERS = st.floats(-1e5, 1e5)
RAW = st.floats(-1e20, 1e20)
COUNTS = st.floats(0, 1e12) | st.integers(0, 10**12).map(float)  # sums of sample weights, and of tokens


def update(values: list[float], count: float, exponents: tuple[int, ...] = FINE) -> Update:
    return Update.of("g", {"w": torch.tensor(values, dtype=torch.float64)}, count, exponents)


def bits(total: Update) -> tuple[list[int], float]:
    group = total.groups["g"].encoded()
    return group.sums["w"].flatten().tolist(), group.count


@given(st.lists(st.tuples(NUMBERS, NUMBERS, COUNTS), min_size=2, max_size=5), st.sampled_from([FINE, WIDE]))
@example([(0.0, 0.0, 1e10), (0.0, 0.0, 0.3), (0.0, 0.0, 0.1000001)], FINE)
def test_addition_is_associative_and_commutative_to_the_bit(rows: list[tuple[float, float, float]], exponents: tuple[int, ...]) -> None:
    updates = [update([a, b], count, exponents) for a, b, count in rows]
    totals = set()
    for order in itertools.islice(itertools.permutations(updates), 6):
        left = order[0]
        for other in order[1:]:
            left = left + other
        right = order[-1]
        for other in reversed(order[:-1]):
            right = other + right
        totals |= {str(bits(left)), str(bits(right))}
    assert len(totals) == 1


@given(st.lists(RAW, min_size=1, max_size=20))
def test_wide_sums_of_raw_data_are_as_good_as_float64_can_say(values: list[float]) -> None:
    total = Update()
    for value in values:
        total = total + update([value, value * 1e-20], 1.0, WIDE)
    large, small = total.sums("g")["w"].tolist()
    scale = max(map(abs, values))
    assert large == pytest.approx(math.fsum(values), rel=1e-15, abs=scale * 1e-15 + 1e-30)
    assert small == pytest.approx(math.fsum(value * 1e-20 for value in values), rel=1e-13, abs=1e-30)


@given(st.lists(st.floats(1e-9, 1e-7), min_size=1, max_size=15), st.lists(st.floats(1e11, 1e12), max_size=15))
def test_sums_of_squares_keep_tiny_and_huge_numbers(tiny: list[float], huge: list[float]) -> None:
    """Standardisation needs both: the squares of 1e-8 are 1e-16, those of 1e12 are 1e24."""
    total = Update()
    for a, b in itertools.zip_longest(tiny, huge, fillvalue=0.0):
        total = total + update([a * a, b * b], 1, WIDE)
    for found, values in zip(total.sums("g")["w"].tolist(), (tiny, huge), strict=True):
        assert found == pytest.approx(math.fsum(value * value for value in values), rel=1e-14)


def test_sums_of_squares_hold_a_column_of_timestamps() -> None:
    """Milliseconds since 1970 squared are 3e24; a site has more than seven rows of them."""
    squares = 1000 * 1.7e12**2
    total = update([squares], 1000, WIDE) + update([squares], 1000, WIDE)
    assert total.mean("g")["w"].item() == pytest.approx(1.7e12**2, rel=1e-14)


def test_tiny_squares_survive_beside_a_huge_one_that_goes_again() -> None:
    total = update([1e-16], 1, WIDE) + update([1e24], 1, WIDE) + update([1e-16], 1, WIDE) + update([-1e24], 1, WIDE)
    assert total.sums("g")["w"].item() == pytest.approx(2e-16, rel=1e-12)


def test_nothing_added_is_a_total_of_nothing_and_changes_no_bit() -> None:
    alone = update([0.1, 1 / 3], 3.0)
    for total in (Update() + alone, alone + Update()):
        assert torch.equal(total.sums("g")["w"], alone.sums("g")["w"]) and total.count("g") == 3.0


def test_a_missing_name_or_group_counts_as_zero() -> None:
    a = Update.of("words", {"red": torch.tensor(2), "blue": torch.tensor(1)}, 3, (0,))
    b = Update.of("words", {"blue": torch.tensor(4)}, 4, (0,)).joined(Update.of("other", {"n": torch.tensor(1.0)}, 1))
    total = a + b
    assert {name: float(value) for name, value in total.sums("words").items()} == {"red": 2, "blue": 5}
    assert total.count("words") == 7 and total.count("other") == 1 and total.count("none") == 0 and total.sums("none") == {}
    assert "other" in total and "none" not in total


def test_the_mean_divides_by_the_groups_own_count_or_a_public_one() -> None:
    total = update([1.0, 2.0], 0.5) + update([3.0, 4.0], 1.5)
    assert total.mean("g")["w"].tolist() == [2.0, 3.0]
    assert total.mean("g", divisor=4)["w"].tolist() == [1.0, 1.5]
    for bad in (update([0.0], 0.0), Update()):
        with pytest.raises(InputError, match="has the count 0"):
            bad.mean("g")
    with pytest.raises(InputError, match="has no mean"):
        total.mean("g", divisor=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_what_fixed_point_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(NonFinite, match="a sum in an update"):
        update([value], 1) + update([0.0], 1)


@pytest.mark.parametrize("count", [math.nan, math.inf])
def test_a_count_that_is_not_finite_is_refused(count: float) -> None:
    with pytest.raises((NonFinite, InputError), match=f"count.*{count}|{count}.*count"):
        update([1.0], count) + update([1.0], 1)


@pytest.mark.parametrize("exponents", [FINE, WIDE], ids=["fine", "wide"])
def test_a_total_that_fixed_point_cannot_hold_is_refused_not_wrapped(exponents: tuple[int, ...]) -> None:
    """Each part fits; their sum passes 2^63 and would come back with another sign."""
    part = update([0.9 * 2.0 ** (exponents[0] + 62)], 1, exponents)
    with pytest.raises(NonFinite):
        sum((part for _ in range(8)), Update())


def test_other_shapes_or_units_are_refused() -> None:
    with pytest.raises(InputError, match=r"w has the shapes \(1,\) and \(2,\)"):
        update([1.0], 1) + update([1.0, 2.0], 1)
    with pytest.raises(InputError, match="different units"):
        update([1.0], 1) + update([1.0], 1, WIDE)
    with pytest.raises(InputError, match="stands in both"):
        update([1.0], 1).joined(update([1.0], 1))


def test_bytes_are_those_of_the_tensors() -> None:
    assert Update.of("g", {"w": torch.zeros(10)}, 1).size_bytes() == 40
    assert Order("train", 1, 1, 0, {"w": torch.zeros(3, dtype=torch.float64)}).size_bytes() == 24


@given(st.lists(st.tuples(NUMBERS | st.floats(-4e5, 4e5), NUMBERS, COUNTS), min_size=1, max_size=8), st.sampled_from([FINE, WIDE]))
@example([(4e5, 0.0, 1.0), (1e-12, 1.0, 1.0), (-4e5, 3.0, 0.5)], FINE)
def test_a_total_in_place_has_the_bits_of_plus(rows: list[tuple[float, float, float]], exponents: tuple[int, ...]) -> None:
    updates = [update([a, b], count, exponents) for a, b, count in rows]
    total = Total()
    for index, part in enumerate(updates):
        total.add(Update({"g": part.groups["g"].encoded()}) if index % 3 == 2 else part)
    assert bits(total.update()) == bits(sum(updates, Update()))


def test_a_total_refuses_what_does_not_fit_and_stays_as_it_was() -> None:
    total = Total()
    total.add(update([1.0, 2.0], 3.0))
    before = bits(total.update())
    for bad, message in [
        (update([1.0], 1.0), "has the shapes"),
        (update([1.0, 2.0], 1.0, WIDE), "different units"),
        (update([1.0, math.nan], 1.0), "is not finite"),
        (update([1.0, 2.0], math.inf), "is not finite"),
    ]:
        with pytest.raises((InputError, NonFinite), match=message):
            total.add(bad.joined(Update.of("other", {"n": torch.tensor(1.0)}, 1)))
        assert bits(total.update()) == before and "other" not in total.update()
    part = update([0.9 * 2.0**22, 0.0], 1.0)
    total.add(part)
    with pytest.raises(NonFinite, match="passes what fixed point can hold"):
        total.add(part)


def test_a_layout_takes_tensors_apart_and_together() -> None:
    named = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0), "none": torch.zeros(0, 4)}
    layout = Layout.of(named)
    flat = layout.flat(named.values())
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7] and layout.size == 7 and flat.dtype == torch.float32
    for view, tensor in zip(layout.views(flat), named.values(), strict=True):
        assert torch.equal(view, tensor)
    assert Layout.of({**named, "b": named["b"].double()}).dtype == torch.float64
    assert len({layout.hash(), Layout.of({"w": named["w"]}).hash(), Layout.of({**named, "b": torch.zeros(1)}).hash()}) == 3


@given(st.lists(st.tuples(NUMBERS, st.floats(-8, 8)), min_size=1, max_size=5), st.sampled_from([FINE, WIDE]))
def test_sums_that_wait_for_their_scale_are_those_that_have_it(rows: list[tuple[float, float]], exponents: tuple[int, ...]) -> None:
    """In float64 before anything is rounded, so that float32 means lose nothing by being multiplied."""
    total, later = Total(), Update()
    for value, scale in rows:
        part = Update.of("g", {"w": torch.tensor([value], dtype=torch.float32)}, 1.0, exponents, scale=scale)
        total.add(part)
        later = later + part
    expected = math.fsum(float(torch.tensor(value, dtype=torch.float32)) * scale for value, scale in rows)
    assert bits(total.update()) == bits(later)
    assert later.sums("g")["w"].item() == pytest.approx(expected, rel=1e-12, abs=1e-11)


def test_a_negative_scale_does_not_hide_what_is_too_large() -> None:
    part = Update.of("g", {"w": torch.tensor([2.0**21])}, 1.0, scale=-1.5)
    total = Total()
    total.add(part)
    with pytest.raises(NonFinite, match="passes what fixed point can hold"):
        total.add(part)
