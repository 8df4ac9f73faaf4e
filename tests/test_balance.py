"""Shares of a step: the split is the best there is, times are learnt through noise, and plans change only for a reason."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyfit.cluster.balance import Balancer, Cost, Timing, makespan, memory_cap, shares
from anyfit.errors import InputError, StateError

SLOWNESS = {"1:2": (1, 2), "1:3": (1, 3), "1:4": (1, 4), "two and a third": (1, 1, 3), "four kinds": (1, 1.5, 2, 4)}
UNIT = 0.001  # seconds of the fastest rank

# ------------------------------------------------------------------ ranks that do not exist


class Taken(NamedTuple):
    """One step of a simulation: shares, how much longer than with the best ones it takes without noise, and whether they then changed."""

    units: list[int]
    excess: float
    changed: bool


def gaussian(size: float) -> Callable[[random.Random], float]:
    return lambda draw: max(0.2, 1.0 + size * draw.gauss(0.0, 1.0))


def uniform(size: float) -> Callable[[random.Random], float]:
    return lambda draw: 1.0 + size * draw.uniform(-1.0, 1.0)


def ranks(slowness: Sequence[float], fixed: float = 0.0) -> list[Cost]:
    return [Cost(fixed, UNIT * slow) for slow in slowness]


def simulate(
    costs: Sequence[Cost],
    steps: int,
    *,
    noise: Callable[[random.Random], float] = lambda draw: 1.0,
    seed: int = 0,
    later: Mapping[int, Sequence[Cost]] | None = None,
    balancer: Balancer | None = None,
) -> list[Taken]:
    """Steps of 120 units a rank; `later` gives other costs from some step on."""
    draw, balancer, taken = random.Random(seed), balancer or Balancer(range(len(costs))), []
    total = 120 * len(costs)
    for step in range(steps):
        costs = (later or {}).get(step, costs)
        units = balancer.shares(total)
        excess = makespan(costs, units) / makespan(costs, shares(total, costs))
        seconds = [(cost.a + cost.c * count) * noise(draw) if count else 0.0 for cost, count in zip(costs, units, strict=True)]
        taken.append(Taken(units, excess, balancer.observe(units, seconds)))
    return taken


def changes(taken: Sequence[Taken]) -> int:
    return sum(step.changed for step in taken)


# ------------------------------------------------------------------ one split


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[Cost], list[int | None], int]:
    size = draw(st.integers(1, 7))
    part = st.floats(1e-4, 10.0)
    costs = [Cost(draw(st.just(0.0) | part), draw(part)) for _ in range(size)]
    total = draw(st.integers(0, 400))
    caps = [draw(st.none() | st.integers(1, 200)) for _ in range(size)]
    least = draw(st.integers(0, total // size))
    return total, costs, caps, least


def bounds(total: int, caps: Sequence[int | None], least: int) -> tuple[list[int], list[int]]:
    """As the docstring of `shares` tells them."""
    most = [total if cap is None else cap for cap in caps]
    times = next(times for times in range(1, total + 2) if times * sum(most) >= total)
    most = [times * high for high in most]
    return [min(least, high) for high in most], most


def one_by_one(total: int, costs: Sequence[Cost], lows: Sequence[int], highs: Sequence[int]) -> list[int]:
    """The plain way: each unit goes to who would finish it first."""
    counts = list(lows)
    while sum(counts) < total:
        free = [i for i in range(len(costs)) if counts[i] < highs[i]]
        counts[min(free, key=lambda i: costs[i].a + costs[i].c * (counts[i] + 1))] += 1
    return counts


@given(splits())
@settings(max_examples=300)
def test_a_split_adds_up_keeps_its_bounds_and_ends_as_early_as_one_by_one(case: tuple[int, list[Cost], list[int | None], int]) -> None:
    total, costs, caps, least = case
    counts = shares(total, costs, caps, least)
    lows, highs = bounds(total, caps, least)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(lows, counts, highs, strict=True))
    assert makespan(costs, counts) <= makespan(costs, one_by_one(total, costs, lows, highs)) * (1 + 1e-9)


@given(splits())
def test_no_unit_is_better_elsewhere(case: tuple[int, list[Cost], list[int | None], int]) -> None:
    total, costs, caps, least = case
    counts = shares(total, costs, caps, least)
    lows, highs = bounds(total, caps, least)
    now = makespan(costs, counts)
    for giver in range(len(costs)):
        for taker in range(len(costs)):
            if giver != taker and counts[giver] > lows[giver] and counts[taker] < highs[taker]:
                moved = [count + (i == taker) - (i == giver) for i, count in enumerate(counts)]
                assert makespan(costs, moved) >= now * (1 - 1e-9)


@given(st.integers(1, 40), st.integers(0, 5000), st.floats(0.0, 3.0), st.floats(1e-6, 3.0))
def test_equal_ranks_have_equal_shares_and_the_first_have_the_more(size: int, total: int, a: float, c: float) -> None:
    assert shares(total, [Cost(a, c)] * size) == [total // size + (i < total % size) for i in range(size)]


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(1e-11, 1e6)), min_size=1, max_size=6), st.integers(0, 10**4))
def test_a_split_adds_up_where_costs_are_out_of_all_proportion(costs: list[tuple[float, float]], total: int) -> None:
    counts = shares(total, [Cost(*cost) for cost in costs])
    assert sum(counts) == total and min(counts) >= 0


def test_all_finish_together() -> None:
    assert shares(96, ranks((1, 2))) == [64, 32]
    assert shares(145, ranks((1, 1.5, 2, 4))) == [60, 40, 30, 15]
    assert shares(100, [Cost(0.030, 0.001), Cost(0.010, 0.001)]) == [40, 60]  # 70 ms each


def test_who_needs_longer_for_nothing_than_the_others_for_all_has_nothing() -> None:
    slow = Cost(0.5, 0.001)
    assert shares(96, [Cost(0.0, 0.001), slow]) == [96, 0]
    assert shares(96, [Cost(0.0, 0.001), slow], least=1) == [95, 1]
    assert shares(960, [Cost(0.0, 0.001), slow]) == [730, 230]


def test_caps_hold_and_what_they_keep_out_goes_to_the_others() -> None:
    assert shares(90, ranks((1, 1, 1)), [10, None, None]) == [10, 40, 40]
    assert shares(90, ranks((1, 2, 2)), [20, None, None]) == [20, 35, 35]
    assert shares(90, ranks((1, 1, 1)), [0, None, None]) == [0, 45, 45]


def test_caps_that_are_too_small_together_are_raised_by_one_whole_factor() -> None:
    assert shares(90, ranks((1, 1)), [10, 20]) == [30, 60]
    assert shares(91, ranks((1, 1)), [10, 20]) == [40, 51]  # four passes of up to 10 and 20


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(InputError, match=r"least \(=2\) for each of 2 members is more than all 3 units"):
        shares(3, ranks((1, 1)), least=2)
    with pytest.raises(InputError, match=r"caps \(=\[0, 0\]\) leave no room for 3 units"):
        shares(3, ranks((1, 1)), [0, 0])


# ------------------------------------------------------------------ one rank's time


def timed(*observations: tuple[int, float], warmup: int = 0) -> Timing:
    timing = Timing(warmup=warmup)
    for units, seconds in observations:
        timing.observe(units, seconds)
    return timing


def test_one_size_alone_is_held_to_be_proportional() -> None:
    timing = timed(*[(50, 0.2)] * 30)
    assert timing.a == pytest.approx(0.0, abs=1e-12) and timing.c == pytest.approx(0.004)


def test_a_fixed_cost_is_learnt_once_sizes_differ() -> None:
    timing = timed(*[(50, 0.1 + 0.002 * 50)] * 10, *[(80, 0.1 + 0.002 * 80)] * 10)
    assert timing.a == pytest.approx(0.1, rel=0.02) and timing.c == pytest.approx(0.002, rel=0.02)


def test_a_fixed_cost_is_not_forgotten_while_sizes_stay_alike_nor_when_all_slows_down() -> None:
    draw, noise = random.Random(1), uniform(0.02)
    timing = timed(*[(50 + 30 * (k % 2), (0.1 + 0.002 * (50 + 30 * (k % 2))) * noise(draw)) for k in range(20)])
    known = timing.a / timing.c
    for _ in range(1000):
        timing.observe(60, (0.1 + 0.002 * 60) * noise(draw))
    assert timing.a / timing.c == pytest.approx(known, rel=0.1)
    for _ in range(300):
        timing.observe(60, 2 * (0.1 + 0.002 * 60) * noise(draw))
    assert timing.a == pytest.approx(0.2, rel=0.1) and timing.c == pytest.approx(0.004, rel=0.1)


def test_the_first_observations_are_dropped() -> None:
    assert not timed((50, 9.0), (50, 9.0), (50, 9.0), warmup=3).measured
    assert timed((50, 9.0), (50, 9.0), (50, 9.0), (50, 0.05), warmup=3).c == pytest.approx(0.001)


@pytest.mark.parametrize("before", [1, 3, 5, 20])
def test_one_hiccup_moves_little_and_a_change_is_followed_at_once(before: int) -> None:
    for hiccup in (0.15, 5.0):
        timing = timed(*[(50, 0.05)] * before, (50, hiccup), *[(50, 0.05)] * 2)
        assert timing.c == pytest.approx(0.001, rel=0.06)
    for two in (0.05, 0.15), (0.15, 0.05):  # of two, the shorter: a hiccup only ever adds
        assert timed((50, two[0]), (50, two[1])).c == pytest.approx(0.001, rel=0.1)
    for changed in (0.15, 0.01):
        timing = timed(*[(50, 0.05)] * before, *[(50, changed)] * (3 if before > 3 else 6))
        assert timing.c == pytest.approx(changed / 50, rel=0.03)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-9, 1e9)), min_size=1, max_size=60))
def test_costs_stay_possible_whatever_is_observed(observations: list[tuple[int, float]]) -> None:
    timing = timed(*observations)
    assert 0.0 <= timing.a < 1e300 and 0.0 < timing.c < 1e300 and timing.error(10) >= 0.0


# ------------------------------------------------------------------ all of them, over time


@pytest.mark.parametrize("kind", SLOWNESS)
@pytest.mark.parametrize("fixed", [0.0, 0.02])
def test_the_shares_are_right_within_15_steps(kind: str, fixed: float) -> None:
    for seed in range(8):
        taken = simulate(ranks(SLOWNESS[kind], fixed), 60, noise=gaussian(0.02), seed=seed)
        assert taken[0].excess > 1.1
        assert max(step.excess for step in taken[15:]) <= 1.03


def test_a_fixed_cost_that_only_one_rank_has_is_learnt() -> None:
    balancer = Balancer("ab")
    taken = simulate([Cost(0.1, UNIT), Cost(0.0, UNIT)], 40, noise=gaussian(0.02), balancer=balancer)
    found = [member["a"] for member in balancer.report()["members"]]
    assert taken[-1].excess <= 1.03
    assert found[0] == pytest.approx(0.1, rel=0.2) and found[1] < 0.02


@pytest.mark.parametrize("swap", [8, 16, 23, 60])
def test_speeds_that_swap_are_followed_within_15_steps(swap: int) -> None:
    for seed in range(8):
        after = {swap: ranks((3, 1))}
        taken = simulate(ranks((1, 3)), swap + 60, noise=gaussian(0.03), seed=seed, later=after)
        assert max(step.excess for step in taken[swap + 15 :]) <= 1.1
        assert taken[swap].excess > 2 or swap < 16


@pytest.mark.parametrize("noise", [uniform(0.1), gaussian(0.1)], ids=["uniform", "gaussian"])
@pytest.mark.parametrize("kind", ["1:1", *SLOWNESS])
def test_jitter_of_ten_percent_changes_nothing(kind: str, noise: Callable[[random.Random], float]) -> None:
    for seed in range(4):
        taken = simulate(ranks(SLOWNESS.get(kind, (1, 1))), 600, noise=noise, seed=seed)
        assert changes(taken[100:]) == 0
        assert taken[100].excess < 1.08
        if kind == "1:1":
            assert changes(taken) == 0


def test_a_drift_of_a_fifth_is_followed_and_one_of_three_percent_is_not() -> None:
    for slower, expected in ((1.2, True), (1.03, False)):
        taken = simulate(ranks((1, 1, 1)), 120, noise=gaussian(0.02), later={50: ranks((1, 1, slower))})
        assert bool(changes(taken)) is expected
        assert max(step.excess for step in taken[70:]) <= 1.03


@pytest.mark.parametrize("place", [3, 4, 5, 6, 10, 50])
def test_a_hiccup_moves_no_share(place: int) -> None:
    hiccup = {place: [Cost(0.0, 3 * UNIT), Cost(0.0, UNIT)], place + 1: ranks((1, 1))}
    assert changes(simulate(ranks((1, 1)), 80, noise=gaussian(0.02), later=hiccup)) == 0


def test_a_member_without_units_is_tried_again() -> None:
    stalled = ranks((1, 1, 500))
    taken = simulate(ranks((1, 1, 1)), 200, noise=gaussian(0.02), later={20: stalled, 40: ranks((1, 1, 1))})
    assert taken[39].units[2] == 0
    assert any(step.units[2] == 1 for step in taken)
    assert taken[-1].excess <= 1.03
    forever = simulate(ranks((1, 1, 500)), 400, noise=gaussian(0.02))
    assert sum(step.units[2] > 0 for step in forever[30:]) <= 15  # twice six steps


def test_fixed_ratios_are_kept_whatever_is_measured() -> None:
    balancer = Balancer("ab", fixed={"a": 3})
    assert [step.units for step in simulate(ranks((4, 1)), 30, balancer=balancer)] == [[180, 60]] * 30
    assert changes(simulate(ranks((4, 1)), 30, balancer=Balancer("ab", fixed={}))) == 0
    balancer.members("bca")
    assert balancer.shares(100) == [20, 20, 60]
    assert balancer.report()["members"][0]["speed"] == pytest.approx(1 / UNIT)
    for speed in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"the fixed speed of a \(="):
            Balancer("ab", fixed={"a": speed})


def test_shorter_steps_are_split_by_the_same_costs_and_hold_nothing_up() -> None:
    balancer = Balancer(range(2))
    costs = [Cost(0.05, UNIT), Cost(0.0, UNIT)]
    simulate(costs, 40, balancer=balancer)
    assert balancer.shares(240) == pytest.approx(shares(240, costs), abs=1)
    assert balancer.shares(60) == pytest.approx(shares(60, costs), abs=5)  # 5 and 55: its own 50 ms weigh more in a short step
    assert balancer.shares(10) == [0, 10]
    restless, costs = Balancer(range(2)), ranks((1, 3))
    for step in range(12):  # each third has one unit, with which there is nothing to gain; still three in a row show the gain
        units = restless.shares(240 if step % 3 else 1)
        restless.observe(units, [cost.c * count for cost, count in zip(costs, units, strict=True)])
    assert restless.shares(240) == [180, 60]


def test_each_has_its_least_where_a_step_has_enough() -> None:
    balancer = Balancer(range(2), least=1)
    simulate([Cost(0.0, UNIT), Cost(1.0, UNIT)], 30, balancer=balancer)
    assert balancer.shares(240) == [239, 1]
    assert balancer.shares(1) == [1, 0]
    with pytest.raises(InputError, match=r"least \(=-1\) must be 0 or more"):
        Balancer(range(2), least=-1)


def test_a_cap_counts_at_once_and_in_every_later_plan() -> None:
    balancer = Balancer("ab")
    balancer.cap("a", 30)
    assert balancer.shares(100) == [30, 70] and balancer.cap_of("a") == 30 and balancer.cap_of("b") is None
    simulate(ranks((1, 3)), 30, balancer=balancer)
    assert balancer.shares(240) == [30, 210]
    balancer.cap("a", None)
    simulate(ranks((1, 3)), 10, balancer=balancer)
    assert balancer.shares(240) == [180, 60]
    tokens = Balancer("ab", capped=False)
    tokens.cap("a", 30)
    assert tokens.shares(1000) == [500, 500] and tokens.cap_of("a") == 30
    with pytest.raises(InputError, match=r"rows \(=-1\) of the cap"):
        balancer.cap("a", -1)


def test_newcomers_begin_at_the_median_and_the_others_stay_known() -> None:
    balancer = Balancer("abc")
    simulate(ranks((1, 2, 4)), 40, balancer=balancer)
    balancer.members("acd")  # b left
    assert balancer.shares(145) == shares(145, [Cost(0, 1), Cost(0, 4), Cost(0, 2.5)])
    taken = simulate(ranks((1, 4, 1)), 40, balancer=balancer)
    assert taken[15].excess <= 1.03
    assert balancer.report()["members"][2]["measured"]
    for wrong in ("", "aa"):
        with pytest.raises(InputError, match=r"members \(="):
            balancer.members(wrong)


@pytest.mark.parametrize("after", [0, 2, 5, 11, 47])
def test_a_joiner_with_the_json_comes_to_the_same_shares_ever_after(after: int) -> None:
    first, second = Balancer([3, 5, 8], least=1), Balancer([3, 5, 8], least=1)
    simulate(ranks((1, 2, 3), 0.01), after, noise=gaussian(0.05), balancer=first)
    simulate(ranks((1, 2, 3), 0.01), after, noise=gaussian(0.05), balancer=second)
    first.cap(5, 100)
    second.cap(5, 100)
    joined = Balancer.from_json(json.loads(json.dumps(first.to_json(), allow_nan=False)))
    later = {"noise": gaussian(0.05), "seed": 9, "later": {60: ranks((3, 1, 1))}}
    taken = [simulate(ranks((1, 2, 3), 0.01), 120, balancer=balancer, **later) for balancer in (second, joined)]  # type: ignore[arg-type]
    assert taken[0] == taken[1] and changes(taken[0])
    assert second.to_json() == joined.to_json()  # to the bit


def test_a_json_that_is_none_is_refused() -> None:
    whole = Balancer(range(2)).to_json()
    for wrong in ({}, {**whole, "seats": [1]}, {**whole, "seats": []}, {**whole, "seats": [[0, {"timing": {"pace": 1}}]]}):
        with pytest.raises(StateError, match="the balance of the ranks is not one that this version wrote"):
            Balancer.from_json(wrong)


def test_after_a_new_start_the_first_observations_are_dropped_again() -> None:
    balancer = Balancer(range(2))
    simulate(ranks((1, 2)), 40, balancer=balancer)
    before = balancer.report()
    balancer.warm_up()
    assert changes(simulate(ranks((9, 1)), 3, balancer=balancer)) == 0
    assert balancer.report() == before


def test_times_that_no_clock_gives_are_left_out() -> None:
    balancer = Balancer(range(2))
    for _ in range(20):
        assert not balancer.observe([50, 50], [0.0, float("nan")])
        assert not balancer.observe([0, 0], [1.0, 1.0])
    assert balancer.report()["limit"] is None


def test_the_report_tells_speeds_and_what_there_is_to_gain() -> None:
    balancer = Balancer(["a", "b", "c"])
    nothing = balancer.report()
    assert nothing["limit"] is None and [member["speed"] for member in nothing["members"]] == [None] * 3
    simulate(ranks((1, 1, 3)), 4, balancer=balancer)
    equal = balancer.report()
    assert equal["equal"] == equal["current"] == pytest.approx(0.36)
    simulate(ranks((1, 1, 3)), 30, balancer=balancer)
    found = json.loads(json.dumps(balancer.report(), allow_nan=False))
    assert found["limit"] == pytest.approx(7 / 3)
    assert found["equal"] == pytest.approx(0.36) and found["current"] == pytest.approx(found["best"]) == pytest.approx(0.155)
    assert [member["member"] for member in found["members"]] == ["a", "b", "c"]
    assert [member["speed"] for member in found["members"]] == pytest.approx([1000, 1000, 333.3], rel=1e-3)
    assert sum(member["share"] for member in found["members"]) == found["total"] == 360


# ------------------------------------------------------------------ memory


@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 5000))
def test_the_most_rows_that_fit_are_found(base: int, per_row: int, most: int) -> None:
    limit = -(-(base + per_row * most) * 10 // 9)  # nine tenths of it hold `most` rows
    found = memory_cap([(rows, base + per_row * rows) for rows in (8, 16, 64)], limit)
    assert found is not None and base + per_row * found <= 0.9 * limit + 1
    assert base + per_row * (found + 1) > 0.9 * limit - 1


def test_memory_that_tells_of_no_limit() -> None:
    assert memory_cap([], 100) is None
    assert memory_cap([(8, 50), (8, 60)], 100) is None
    assert memory_cap([(8, 60), (16, 60)], 100) is None
    assert memory_cap([(8, 800), (16, 1600)], 100) == 0
