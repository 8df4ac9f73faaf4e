"""Memory of a graph of steps: an order in which few bytes are live at once, and an offset in one arena for each value.

A buffer is a value and all its aliases. What is live while a step runs follows from the steps that are done and from the step itself, so the
best order is a path through sets of done steps whose largest step is smallest. What stays at hand: whether a step never hurts
(it fits beneath what is needed anyway, and no more is live after it than before) and can be taken without a choice, as in a chain.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Arena", "Step", "arranged", "check"]

_STATES = 20_000  # sets of done steps that are looked at before the order counts as good rather than best
_REPAIRS = 12  # how often what sticks out of a placement is placed first
_FEW = 24  # units, for which placements are searched where the greedy ones leave gaps
_PLACEMENTS = 20_000  # partial placements that are tried at most


class Step(NamedTuple):
    """One operation as memory sees it."""

    name: str
    inputs: tuple[str, ...]
    output: str
    bytes: int  # of the output
    replaces: str | None = None  # an input whose place the output may take, if nobody needs it afterwards and it is at least as large
    alias: str | None = None  # the input whose memory the output is: it has no bytes of its own
    scratch: int = 0  # bytes that it needs while it runs


@dataclass(frozen=True)
class Arena:
    """Where each value lies, and when."""

    order: tuple[int, ...]  # of the steps that were given
    offsets: Mapping[str, int]  # value -> byte; scratch stands under "<name of the step>!scratch"
    bytes: int
    lower_bound: int  # the largest number of live bytes in this order: no placement needs less
    live: tuple[Mapping[str, int], ...]  # by position in the order: buffers, by their first name, and bytes that they hold while it runs
    exact: bool  # whether no order has fewer live bytes


def arranged(steps: Sequence[Step], sources: Mapping[str, int], results: Sequence[str], *, align: Mapping[str, int] | None = None) -> Arena:
    """Order and offsets of `steps`, which are given in an order in which they may run; `sources` are there from the start, `results` stay."""
    graph = _Graph(steps, sources, results)
    orders, exact = _orders(graph)
    alignment = dict.fromkeys(graph.sizes, 1)
    for value, multiple in (align or {}).items():
        root = graph.roots.get(value, value)
        alignment[root] = math.lcm(alignment.get(root, 1), multiple)
    best: Arena | None = None
    for peak, order in orders:
        if best is not None and best.bytes <= peak:
            break  # no placement of an order needs less than its live bytes
        units = graph.units(order)
        placed, size = _placed(units, alignment, peak)
        if best is None or size < best.bytes:
            live: list[dict[str, int]] = [{} for _ in order]
            for span in [span for unit in units for span in unit.spans]:
                for held in live[span.first : span.last + 1]:
                    held[span.name] = span.bytes
            offsets = {value: placed[root] for value, root in graph.roots.items()} | placed
            best = Arena(order, offsets, size, peak, tuple(live), exact and peak == orders[0][0])
    assert best is not None
    check(best)
    return best


def check(arena: Arena) -> None:
    """Assert that no two live buffers of an arena overlap at any position, and that all lie within it."""
    for live in arena.live:
        end, before = 0, ""
        for start, name in sorted((arena.offsets[name], name) for name in live if live[name]):
            assert start >= end, f"{name} (at {start}) overlaps {before}, which ends at {end}"
            end, before = start + live[name], name
        assert end <= arena.bytes, f"{before} ends at {end}, beyond the arena (of {arena.bytes} bytes)"
        assert sum(live.values()) <= arena.lower_bound <= arena.bytes


class _Span(NamedTuple):
    """A buffer's bytes over positions of the order, both ends included."""

    name: str
    first: int
    last: int
    bytes: int


class _Unit(NamedTuple):
    """Buffers at one offset, for each takes the place of the one before."""

    names: tuple[str, ...]
    spans: tuple[_Span, ...]  # one after the other

    @property
    def bytes(self) -> int:
        return max(span.bytes for span in self.spans)

    @property
    def lifetime(self) -> int:
        return self.spans[-1].last - self.spans[0].first + 1


class _Graph:
    """Steps with the buffers behind their values. Sets of steps are whole numbers, a bit for each step."""

    def __init__(self, steps: Sequence[Step], sources: Mapping[str, int], results: Sequence[str]) -> None:
        self.steps = steps
        self.sources = tuple(sources)
        self.sizes = dict(sources)  # buffer -> bytes
        self.roots = {name: name for name in sources}  # value -> its buffer
        self.users = dict.fromkeys(sources, 0)  # buffer -> the steps that read it, by any name
        self.makers: dict[str, int] = dict.fromkeys(sources, -1)
        self.needs: list[int] = []  # by step: the steps that must be done before it
        value_makers: dict[str, int] = {}
        for index, step in enumerate(steps):
            assert step.output not in self.roots, f"value {step.output} is made twice"
            assert all(value in self.roots for value in step.inputs), f"{step.name} needs {step.inputs}, of which one is not made before it"
            assert {step.alias, step.replaces} - {None} <= set(step.inputs), f"{step.name} aliases or replaces what is not its input"
            assert step.alias is None or step.replaces is None, f"{step.name} cannot be an alias and take a place"
            self.needs.append(sum({1 << value_makers[value] for value in step.inputs if value in value_makers}))
            value_makers[step.output] = index
            for value in step.inputs:
                self.users[self.roots[value]] |= 1 << index
            if step.alias is None:
                self.sizes[step.output], self.users[step.output], self.makers[step.output] = step.bytes, 0, index
            self.roots[step.output] = step.output if step.alias is None else self.roots[step.alias]
        assert all(value in self.roots for value in results), f"a result of {tuple(results)} is made by no step"
        self.all = (1 << len(steps)) - 1
        for value in results:
            self.users[self.roots[value]] |= 1 << len(steps)  # somebody who is never done
        self.reads = [tuple(dict.fromkeys(self.roots[value] for value in step.inputs)) for step in steps]
        self.idle = sum(sources[name] for name in sources if not self.users[name])  # written by the caller, read by nobody

    def takes_place(self, done: int, index: int) -> str | None:
        """The buffer whose place the output of a step takes when it runs after the steps in `done`."""
        step = self.steps[index]
        if step.replaces is None:
            return None
        root = self.roots[step.replaces]
        # an input that is the same memory by another name may be read at other places than are written
        others = any(self.roots[value] == root for value in step.inputs if value != step.replaces)
        free = self.users[root] & ~done == 1 << index
        return root if free and not others and self.sizes[root] >= step.bytes else None

    def start(self) -> int:
        return sum(self.sizes[name] for name in self.sources)

    def costs(self, done: int, live: int, index: int) -> tuple[int, int]:
        """Bytes while a step runs and after it, when the steps in `done` have run and `live` bytes are live."""
        step = self.steps[index]
        own = 0 if step.alias is not None else step.bytes
        during = live + step.scratch + (0 if self.takes_place(done, index) else own)
        after = live - sum(self.sizes[root] for root in self.reads[index] if self.users[root] & ~done == 1 << index)
        if not done:
            after -= self.idle
        return during, after + (own if step.alias is not None or self.users[step.output] else 0)

    def ready(self, done: int) -> Iterator[int]:
        rest = self.all & ~done
        while rest:
            bit = rest & -rest
            index = bit.bit_length() - 1
            if not self.needs[index] & ~done:
                yield index
            rest ^= bit

    def peak(self, order: Iterable[int]) -> int:
        done, live = 0, self.start()
        peak = live
        for index in order:
            during, live = self.costs(done, live, index)
            peak, done = max(peak, during), done | 1 << index
        return peak

    def floor(self) -> int:
        """Bytes that are live at once in every order: for each step what is made before it and needed by it or after it."""
        before: list[int] = []
        for needs in self.needs:
            before.append(needs)
            for index in _bits(needs):
                before[-1] |= before[index]
        after = [0] * len(self.steps)
        for index, earlier in enumerate(before):
            for other in _bits(earlier):
                after[other] |= 1 << index
        least = self.start()
        for index, step in enumerate(self.steps):
            later = after[index] | 1 << len(self.steps)  # results included
            there = [name for name, maker in self.makers.items() if maker < 0 or before[index] >> maker & 1]
            live = sum(self.sizes[name] for name in there if self.users[name] & (later | 1 << index))
            place = self.takes_place(self.all & ~(later | 1 << index), index)
            least = max(least, live + step.scratch + (0 if place or step.alias is not None else step.bytes))
        return least

    def units(self, order: Sequence[int]) -> list[_Unit]:
        """What is to be placed when the steps run in this order."""
        at = {index: position for position, index in enumerate(order)}
        at[-1], at[len(order)] = 0, max(len(order) - 1, 0)  # sources are made at the start, results read at the end
        ends = {root: max([at[index] for index in _bits(users)], default=at[self.makers[root]]) for root, users in self.users.items()}
        units = {name: _Unit((name,), (_Span(name, 0, ends[name], self.sizes[name]),)) for name in self.sources}
        done = 0
        for position, index in enumerate(order):
            step, place = self.steps[index], self.takes_place(done, index)
            done |= 1 << index
            if step.scratch:
                name = f"{step.name}!scratch"
                units[name] = _Unit((name,), (_Span(name, position, position, step.scratch),))
            if step.alias is not None:
                continue
            span = _Span(step.output, position, ends[step.output], step.bytes)
            if place is None:
                units[step.output] = _Unit((step.output,), (span,))
            else:  # while the step runs, the place is still as large as what it held
                names, (*before, held) = units.pop(place)
                spans = (
                    *before,
                    held._replace(last=position - 1),
                    span._replace(last=position, bytes=held.bytes),
                    span._replace(first=position + 1),
                )
                units[step.output] = _Unit((*names, step.output), tuple(span for span in spans if span.first <= span.last))
        return list(units.values())


def _bits(steps: int) -> Iterator[int]:
    while steps:
        bit = steps & -steps
        yield bit.bit_length() - 1
        steps ^= bit


# The order


def _orders(graph: _Graph) -> tuple[list[tuple[int, tuple[int, ...]]], bool]:
    """Orders with their peaks, the best first, and whether that is the best there is."""
    found = {tuple(range(len(graph.steps))): None}
    found |= dict.fromkeys(_greedy(graph, rule) for rule in (_small_step, _small_rest, _depth_first))
    orders = sorted(((graph.peak(order), order) for order in found), key=lambda one: one[0])  # stable: the given one is first among equals
    floor = graph.floor()
    if orders[0][0] == floor:
        return orders, True
    order, exact = _best_first(graph, floor, orders[0][0])
    if order is not None:
        orders.insert(0, (graph.peak(order), order))
    return orders, exact


Rule = Callable[[int, int, int], tuple[int, ...]]  # (bytes while it runs, bytes after it, when its latest input was made) -> smallest first


def _small_step(during: int, after: int, latest: int) -> tuple[int, ...]:
    return during, after, -latest


def _small_rest(during: int, after: int, latest: int) -> tuple[int, ...]:
    return after, during, -latest


def _depth_first(during: int, after: int, latest: int) -> tuple[int, ...]:
    return -latest, after, during


def _greedy(graph: _Graph, rule: Rule) -> tuple[int, ...]:
    order: list[int] = []
    made = dict.fromkeys(graph.sources, -1)  # buffer -> position of the last step that gave it a name
    done, live = 0, graph.start()
    while done != graph.all:
        chosen, best = -1, None
        for index in graph.ready(done):
            during, after = graph.costs(done, live, index)
            value = rule(during, after, max((made[root] for root in graph.reads[index]), default=-1))
            if best is None or (value, index) < best:
                chosen, best = index, (value, index)
        _, live = graph.costs(done, live, chosen)
        made[graph.roots[graph.steps[chosen].output]] = len(order)
        order.append(chosen)
        done |= 1 << chosen
    return tuple(order)


def _best_first(graph: _Graph, floor: int, ceiling: int) -> tuple[tuple[int, ...] | None, bool]:
    """The best order with a peak beneath `ceiling`, if there is one, and whether the search came to its end."""

    def settled(done: int, live: int, peak: int) -> tuple[int, int, tuple[int, ...]]:
        """Takes every step that never hurts: within the peak, and no more is live after it."""
        taken: list[int] = []
        again = True
        while again:
            again = False
            for index in graph.ready(done):
                during, after = graph.costs(done, live, index)
                if during <= peak and after <= (live if done else live - graph.idle):  # any first step frees what is idle
                    taken.append(index)
                    done, live, again = done | 1 << index, after, True
                    break
        return done, live, tuple(taken)

    done, live, taken = settled(0, graph.start(), floor)
    came = {done: (floor, -1, taken)}  # set of done steps -> the smallest peak that leads to it, from which set, by which steps
    waiting = [(floor, -done.bit_count(), done, live)]
    while waiting:
        peak, _, done, live = heapq.heappop(waiting)
        if peak > came[done][0]:
            continue
        if done == graph.all:
            order: tuple[int, ...] = ()
            while done >= 0:
                _, done, taken = came[done]
                order = taken + order
            return order, True
        if len(came) > _STATES:
            return None, False
        for index in graph.ready(done):
            during, after = graph.costs(done, live, index)
            if during >= ceiling:
                continue
            reached = max(peak, during)
            following, left, taken = settled(done | 1 << index, after, reached)
            if following not in came or reached < came[following][0]:
                came[following] = (reached, done, (index, *taken))
                heapq.heappush(waiting, (reached, -following.bit_count(), following, left))
    return None, True


# The offsets


def _placed(units: Sequence[_Unit], alignment: Mapping[str, int], lower_bound: int) -> tuple[dict[str, int], int]:
    """An offset for each buffer, and the bytes of the arena."""
    placement = _Placement(units, alignment)
    sizes = [unit.bytes for unit in units]
    lifetimes = [unit.lifetime for unit in units]
    crowds = [sum(sizes[other] for other in others) for others in placement.conflicts]
    rules: list[Callable[[int], Any]] = [
        lambda index: (-sizes[index], -lifetimes[index]),
        lambda index: (-lifetimes[index], -sizes[index]),
        lambda index: -sizes[index] * lifetimes[index],
        lambda index: (-crowds[index] - sizes[index], -sizes[index]),
        lambda index: (units[index].spans[0].first, -sizes[index]),
        lambda index: (-units[index].spans[-1].last, -sizes[index]),
    ]
    best, least = [0] * len(units), -1
    for rule in rules:
        ranking = sorted(range(len(units)), key=rule)
        for _ in range(_REPAIRS):
            offsets = placement.first_fit(ranking)
            tops = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            if least < 0 or max(tops, default=0) < least:
                best, least = offsets, max(tops, default=0)
            if least <= lower_bound:
                break
            highest = max(ranking, key=tops.__getitem__)  # who sticks out chooses first
            if ranking[0] == highest:
                break
            ranking = [highest, *(index for index in ranking if index != highest)]
        if least <= lower_bound:
            break
    if least > lower_bound and len(units) <= _FEW:
        best, least = placement.searched(best, least, lower_bound)
    return {name: offset for unit, offset in zip(units, best, strict=True) for name in unit.names}, least


class _Placement:
    """Which units are live at once, and the lowest place of one among others."""

    def __init__(self, units: Sequence[_Unit], alignment: Mapping[str, int]) -> None:
        self.sizes = [unit.bytes for unit in units]
        self.multiples = [math.lcm(*(alignment.get(name, 1) for name in unit.names)) for unit in units]
        # unit -> each unit that it meets -> how far it must stay beneath and above its offset
        self.conflicts: list[dict[int, tuple[tuple[int, int], ...]]] = [{} for _ in units]
        for one, unit in enumerate(units):
            for other in range(one):
                pairs = {
                    (mine.bytes, its.bytes)
                    for mine in unit.spans
                    for its in units[other].spans
                    if mine.first <= its.last and its.first <= mine.last and mine.bytes and its.bytes
                }
                if pairs:
                    self.conflicts[one][other] = tuple(sorted(pairs))
                    self.conflicts[other][one] = tuple(sorted((its, mine) for mine, its in pairs))

    def lowest(self, index: int, offsets: Sequence[int]) -> int:
        """The lowest offset beside what is placed; -1 is not placed yet."""
        taken = sorted(
            (offsets[other] - beneath, offsets[other] + above)
            for other, pairs in self.conflicts[index].items()
            if offsets[other] >= 0
            for beneath, above in pairs
        )
        at, multiple = 0, self.multiples[index]
        for low, high in taken:
            if low < at < high:
                at = -(-high // multiple) * multiple
        return at

    def first_fit(self, ranking: Sequence[int]) -> list[int]:
        offsets = [-1] * len(ranking)
        for index in ranking:
            offsets[index] = self.lowest(index, offsets)
        return offsets

    def searched(self, best: list[int], least: int, lower_bound: int) -> tuple[list[int], int]:
        """A better placement if a bounded search has one. Some best placement is made by putting units, from the lowest up, as low as they go."""
        tried = 0
        offsets = [-1] * len(best)

        def place(left: frozenset[int], floor: tuple[int, int]) -> bool:
            """Whether to stop."""
            nonlocal best, least, tried
            if not left:
                best, least = list(offsets), max(offset + size for offset, size in zip(offsets, self.sizes, strict=True))
                return least <= lower_bound
            choices = sorted((self.lowest(index, offsets), -self.sizes[index], index) for index in left)
            if any(at + -size >= least for at, size, _ in choices):
                return False  # what else is placed only moves it up
            for at, _, index in choices:
                if (at, index) < floor:
                    continue
                tried += 1
                offsets[index] = at
                stop = place(left - {index}, (at, index))
                offsets[index] = -1
                if stop or tried > _PLACEMENTS:
                    return True
            return False

        place(frozenset(range(len(best))), (0, -1))
        return best, least
