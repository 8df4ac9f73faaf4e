"""Shares of a step for unequal ranks: what a rank's time is made of, and the split at which all finish together.

Every rank computes this from the same numbers and comes to the same shares, bit for bit, so nobody has to hand them out: only
+ - * / and sqrt, which IEEE 754 rounds exactly, and comparisons, in a fixed order. (Python's own sum of floats is not among
them: it adds otherwise from 3.12 on.) Units are rows, or tokens. Free of torch and numpy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, Self

from anyfit.errors import InputError, StateError

__all__ = ["Balancer", "Cost", "Timing", "makespan", "memory_cap", "shares"]

Name = int | str

WARM_UP = 3  # observations after a start that are dropped
FORGETTING = 0.96  # weight of a step's observation when the next one comes: about the last 25 count
RECENT = 8  # observations kept as they came: what a change leaves to begin with anew
FIRST_NOISE, LEAST_NOISE = 0.05, 0.01  # relative; what is assumed at first, and what no clock is better than
DOUBT = 0.3  # how far a fixed cost that nobody measured may be from the assumed one, relative to a step
KNOWN = 0.1  # a fixed cost is known once its standard error is below this, relative to a step
LEAST_SLOPE = 0.05  # the least part of a step's time that units are held to make
FAR = 3.0  # standard deviations beyond which an observation counts as one at that distance
CHANGED = 5.9  # of Page's cumulative sums: three far observations in a row, not two
GAIN, REVIEW_GAIN = 0.05, 0.01  # of a step's time: what makes a new plan, and what corrects one made in haste
CONFIRM, PAUSE = 3, 5  # steps in a row that show the gain; steps after a new plan without another
REVIEWS = (6, 30)  # steps after a new plan, made of few observations, at which it is corrected
LEAST_SECONDS, MOST_SECONDS = 1e-9, 1e9  # beyond these a time is the mistake of a clock
IDLE = 100  # steps without a unit after which a member is tried again; twice as many after each trial
TRIAL = 6  # steps of such a trial


class Cost(NamedTuple):
    """Seconds of a step with b units: a + c b; none for no units."""

    a: float
    c: float


UNKNOWN = Cost(0.0, 1.0)  # of members that nothing is known of: alike


class Costly(Protocol):
    """What has a fixed cost and a cost per unit."""

    @property
    def a(self) -> float: ...

    @property
    def c(self) -> float: ...


@dataclass(slots=True)
class Timing:
    """One rank's time as a + c units: least squares with forgetting, clipped far observations, and a start anew after a change.

    What sizes that do not differ cannot tell (how much of the time is fixed) is held to be what it was: at first nothing, later
    `overhead`, the fixed cost counted in units. It enters as one more weak observation: minus `overhead` units take no time.
    A change is Page's test (1954): sums of what observations deviate by, upwards and downwards, beyond one standard deviation.
    """

    warmup: int = WARM_UP
    a: float = 0.0
    c: float = 1.0
    overhead: float = 0.0
    noise: float = FIRST_NOISE
    count: int = 0  # observations since the start or the last change
    weight: float = 0.0  # the forgotten-away number of observations, their means and moments about them
    units: float = 0.0
    seconds: float = 0.0
    spread: float = 0.0
    joint: float = 0.0
    up: float = 0.0
    down: float = 0.0
    rising: int = 0  # for how many observations `up` has been above nothing
    falling: int = 0
    recent: list[tuple[int, float]] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether a and c come from observations."""
        return self.count > 0

    def error(self, units: int) -> float:
        """The standard error of the time of so many units, relative to the mean time."""
        weight, mean, _, spread, _ = self._with_prior()
        away = units - mean
        return self.noise * math.sqrt(1.0 / weight + away * away / spread)

    def observe(self, units: int, seconds: float) -> None:
        """Take in that so many units took so long."""
        if self.warmup:
            self.warmup -= 1
            return
        self.recent = [*self.recent[1 - RECENT :], (units, seconds)]
        self.count += 1
        if self.count <= CONFIRM + 2:
            self._restart(self.recent[-self.count :])
            return
        expected = self.a + self.c * units
        error = self.error(units) * self.seconds
        deviation = math.sqrt(self.noise * self.noise * expected * expected + error * error)
        far = max(-FAR, min(FAR, (seconds - expected) / deviation))
        self.up, self.down = max(0.0, self.up + far - 1.0), max(0.0, self.down - far - 1.0)
        self.rising, self.falling = (self.rising + 1 if self.up else 0), (self.falling + 1 if self.down else 0)
        if max(self.up, self.down) > CHANGED:
            self._restart(self.recent[-(self.rising if self.up > self.down else self.falling) :])
            return
        rate = max(1.0 / (self.count + 1), 1.0 - FORGETTING)
        self.noise = max(LEAST_NOISE, self.noise + rate * (1.25 * abs(far) * deviation / expected - self.noise))  # 1.25: of a normal law
        self._add(units, expected + far * deviation)
        self._solve()

    def _restart(self, observations: list[tuple[int, float]]) -> None:
        """Begin with these few: none is believed far from their median."""
        self.up = self.down = self.weight = self.units = self.seconds = self.spread = self.joint = 0.0
        self.rising = self.falling = 0
        self.count = len(observations)
        ordered = sorted((seconds / (self.overhead + units), units) for units, seconds in observations)
        pace, size = ordered[(len(ordered) - 1) // 2]  # the lower one of two: a hiccup only ever adds
        for units, seconds in observations:
            expected = pace * (self.overhead + units)
            room = FAR * expected * (max(self.noise, FIRST_NOISE) + DOUBT * abs(units - size) / (self.overhead + size))
            self._add(units, max(expected - room, min(expected + room, seconds)))
        self._solve()

    def _add(self, units: int, seconds: float) -> None:
        kept = FORGETTING * self.weight
        self.weight = kept + 1.0
        more_units, more_seconds = units - self.units, seconds - self.seconds
        self.units += more_units / self.weight
        self.seconds += more_seconds / self.weight
        self.spread = FORGETTING * self.spread + kept / self.weight * more_units * more_units
        self.joint = FORGETTING * self.joint + kept / self.weight * more_units * more_seconds

    def _with_prior(self) -> tuple[float, float, float, float, float]:
        """Weight, means and moments with the one weak observation about the fixed cost."""
        doubt = self.noise / DOUBT
        prior = doubt * doubt
        weight = self.weight + prior
        more_units, more_seconds = -self.overhead - self.units, -self.seconds
        part = self.weight * prior / weight
        return (
            weight,
            self.units + prior / weight * more_units,
            self.seconds + prior / weight * more_seconds,
            self.spread + part * more_units * more_units,
            self.joint + part * more_units * more_seconds,
        )

    def _solve(self) -> None:
        _, units, seconds, spread, joint = self._with_prior()
        self.c = joint / spread
        self.a = seconds - self.c * units
        least = LEAST_SLOPE * self.seconds / self.units
        if self.a < 0.0:
            self.a = 0.0
            self.c = (self.joint + self.weight * self.units * self.seconds) / (self.spread + self.weight * self.units * self.units)
        elif self.c < least:
            self.c = least
            self.a = self.seconds - least * self.units
        error = self.noise * self.noise * (self.spread / self.weight + self.units * self.units)  # of a, squared, times the spread
        if error < KNOWN * KNOWN * self.spread:
            self.overhead = self.a / self.c


def makespan(costs: Sequence[Costly], units: Sequence[int]) -> float:
    """Seconds until the last has finished its units."""
    return max((cost.a + cost.c * count for cost, count in zip(costs, units, strict=True) if count), default=0.0)


def shares(total: int, timings: Sequence[Costly], caps: Sequence[int | None] | None = None, least: int | Sequence[int] = 0) -> list[int]:
    """`total` units split so that all finish together, each part between `least` and its cap; no split finishes earlier.

    Where the caps add up to less than `total`, all are raised by the same whole factor: as many micro-batches. A member whose
    fixed cost alone takes longer than the others need gets nothing. Equal members differ by one at most, the first have the more.
    """
    lows, highs = _bounds(total, len(timings), caps, least)
    counts = [
        max(low, min(high, math.floor(part)))
        for low, high, part in zip(lows, highs, _equal_finish(total, timings, lows, highs), strict=True)
    ]
    over = total - sum(counts)
    # what rounding left over goes, one by one, to who would finish it first
    queue = [
        (timing.a + timing.c * (count + 1), i) for i, (timing, count) in enumerate(zip(timings, counts, strict=True)) if count < highs[i]
    ]
    heapq.heapify(queue)
    for _ in range(over):
        _, i = queue[0]
        counts[i] += 1
        if counts[i] < highs[i]:
            heapq.heapreplace(queue, (timings[i].a + timings[i].c * (counts[i] + 1), i))
        else:
            heapq.heappop(queue)
    for _ in range(-over):  # costs so unlike that rounding errors reach whole units
        i = max((i for i, count in enumerate(counts) if count > lows[i]), key=lambda i: timings[i].a + timings[i].c * counts[i])
        counts[i] -= 1
    return counts


def _bounds(total: int, size: int, caps: Sequence[int | None] | None, least: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """The least and the most of each member, possible together."""
    highs = [total if cap is None else cap for cap in caps or [None] * size]
    room = sum(highs)
    if room < total:
        if room <= 0:
            raise InputError(f"caps (={list(caps or [])}) leave no room for {total} units; lift one, or make the batch smaller")
        highs = [high * -(-total // room) for high in highs]
    lows = [min(low, high) for low, high in zip([least] * size if isinstance(least, int) else least, highs, strict=True)]
    if sum(lows) > total:
        raise InputError(
            f"least (={least}) for each of {size} members is more than all {total} units; enlarge the batch, or start fewer ranks"
        )
    return lows, highs


def _equal_finish(total: int, timings: Sequence[Costly], lows: Sequence[int], highs: Sequence[int]) -> list[float]:
    """Parts that end at the same time, where their bounds let them; the more violated side is fixed first (Bitran and Hax 1981)."""
    parts, free, rest = [0.0] * len(timings), list(range(len(timings))), float(total)
    while free:
        work, rate, above, below = rest, 0.0, 0.0, 0.0
        for i in free:
            work += timings[i].a / timings[i].c
            rate += 1.0 / timings[i].c
        finish = work / rate
        for i in free:
            parts[i] = (finish - timings[i].a) / timings[i].c
            above += max(0.0, parts[i] - highs[i])
            below += max(0.0, lows[i] - parts[i])
        if not above and not below:
            break
        bounds = highs if above >= below else lows
        held = {i for i in free if (parts[i] > highs[i] if bounds is highs else parts[i] < lows[i])}
        for i in sorted(held):
            parts[i] = float(bounds[i])
            rest -= bounds[i]
        free = [i for i in free if i not in held]
    return parts


@dataclass(slots=True)
class Seat:
    """What is known of one member."""

    timing: Timing = field(default_factory=Timing)
    plan: Cost = UNKNOWN  # what it was held to cost when the plan in force was made
    cap: int | None = None
    idle: int = 0  # steps without a unit
    patience: int = IDLE
    trial: int = 0  # steps of a trial still to come


class Balancer:
    """Who takes how much of each step: equal at first, then by measured speed.

    fixed: relative speeds to go by instead of measured ones (1 for members that it does not name, so {} is the equal split).
    least: units that each member has in every step that has enough of them. capped: whether caps (rows) bound shares; they cannot
    where units are tokens.
    """

    def __init__(self, members: Sequence[Name], *, fixed: Mapping[Name, float] | None = None, least: int = 0, capped: bool = True) -> None:
        for member, speed in (fixed or {}).items():
            if not LEAST_SECONDS <= speed <= MOST_SECONDS:
                raise InputError(f"the fixed speed of {member} (={speed}) must be a number above 0, such as 1 or 2.5")
        if least < 0:
            raise InputError(f"least (={least}) must be 0 or more units")
        self.fixed, self.least, self.capped = fixed, least, capped
        self.seats: dict[Name, Seat] = {}
        self.total = 0  # of the last whole step
        self.streak, self.age = 0, max(REVIEWS)  # steps in a row that promise a gain; steps since the last new plan
        self._made: tuple[int, list[int]] | None = None
        self.members(members)

    def shares(self, total: int) -> list[int]:
        """The units of each member, in order, of a step that has `total`."""
        if self._made is None or self._made[0] != total:
            self._made = (total, self._split(total, [seat.plan for seat in self.seats.values()]))
        return list(self._made[1])

    def _split(self, total: int, costs: Sequence[Cost]) -> list[int]:
        seats = list(self.seats.values())
        least = min(self.least, total // len(seats))
        lows = [max(least, 1) if seat.trial and total >= len(seats) else least for seat in seats]
        return shares(total, costs, [seat.cap for seat in seats] if self.capped else None, lows)

    def observe(self, units: Sequence[int], seconds: Sequence[float]) -> bool:
        """Take in a step: each member's units and the seconds that it took for them. Whether the shares change."""
        for seat, count, time in zip(self.seats.values(), units, seconds, strict=True):
            if count > 0 and LEAST_SECONDS <= time <= MOST_SECONDS:
                seat.timing.observe(count, time)
        total = sum(units)
        if self.fixed is not None:
            self.total = total
            return False
        if not total or 2 * total < self.total:  # the short end of an epoch
            self.total -= self.total // 16
            return False
        self.total = total
        before = self.shares(total)
        self._try_idle(units)
        if any(seat.timing.measured for seat in self.seats.values()):
            self._reconsider(total)
        return self.shares(total) != before

    def _reconsider(self, total: int) -> None:
        """A new plan where the one in force has been worse for some steps, by more than what measuring errs by."""
        costs, now = self._costs(), self.shares(total)
        gain = makespan(costs, now) / makespan(costs, self._split(total, costs)) - 1.0
        error = max(seat.timing.error(count) if seat.timing.measured else 0.0 for seat, count in zip(self.seats.values(), now, strict=True))
        self.streak = self.streak + 1 if gain > GAIN + 2.0 * error else 0
        self.age += 1
        if self.streak >= CONFIRM and self.age > PAUSE:
            self._adopt(costs)
            self.age = 0
        elif self.age in REVIEWS and gain > REVIEW_GAIN:
            self._adopt(costs)

    def _adopt(self, costs: Sequence[Cost]) -> None:
        for seat, cost in zip(self.seats.values(), costs, strict=True):
            seat.plan = cost
        self.streak, self._made = 0, None

    def _costs(self) -> list[Cost]:
        """What each member is held to cost now; who is not measured, the median of the others."""
        known = [Cost(seat.timing.a, seat.timing.c) for seat in self.seats.values() if seat.timing.measured]
        usual = _median(known)
        return [Cost(seat.timing.a, seat.timing.c) if seat.timing.measured else usual for seat in self.seats.values()]

    def _try_idle(self, units: Sequence[int]) -> None:
        """A member without units is measured no more: now and then it has one again, for some steps."""
        for seat, count in zip(self.seats.values(), units, strict=True):
            if seat.trial:
                seat.trial -= 1
                if not seat.trial:
                    self._made = None
            elif count:
                seat.idle = 0
            else:
                seat.idle += 1
                if seat.idle >= seat.patience:
                    seat.idle, seat.trial, seat.patience, self._made = 0, TRIAL, 2 * seat.patience, None
                    seat.timing = Timing(warmup=1)

    def cap(self, member: Name, rows: int | None) -> None:
        """The most rows that fit a member's memory; half of those that did not, after it ran out."""
        if rows is not None and rows < 0:
            raise InputError(f"rows (={rows}) of the cap must be 0 or more")
        self.seats[member].cap = rows
        self._made = None

    def cap_of(self, member: Name) -> int | None:
        """The most rows that fit a member's memory, where that is known."""
        return self.seats[member].cap

    def members(self, ids: Sequence[Name]) -> None:
        """Who takes part from now on, in this order. What is known of those who stay is kept; newcomers begin at their median."""
        if not ids or len(set(ids)) != len(ids):
            raise InputError(f"members (={list(ids)}) must be one or more, each once")
        known = [self.seats[member].plan for member in ids if member in self.seats]
        usual = _median(known) if known else UNKNOWN
        self.seats = {member: self.seats.get(member) or Seat(plan=usual) for member in ids}
        for member, seat in self.seats.items():
            if self.fixed is not None:
                seat.plan = Cost(0.0, 1.0 / self.fixed.get(member, 1.0))
        self.streak, self._made = 0, None

    def warm_up(self) -> None:
        """After a new start: the first observations count as little as they did the first time."""
        for seat in self.seats.values():
            seat.timing.warmup = WARM_UP

    def report(self) -> dict[str, Any]:
        """What is known, as JSON: speeds (units a second) and shares, seconds that a step should take, and the limit.

        equal, current, best: predicted for the equal split, the one in force and the best one. limit: sum of speeds over members times
        the slowest, at the equal split; what balancing can gain where units make up the time.
        """
        seats, now, rows = list(self.seats.values()), self.shares(self.total), []
        for (member, seat), share in zip(self.seats.items(), now, strict=True):
            cost = seat.timing if seat.timing.measured else None
            row = {"member": member, "share": share, "cap": seat.cap, "measured": seat.timing.measured}
            rows.append(row | {"a": cost and cost.a, "c": cost and cost.c, "speed": cost and _speed(cost, share)})
        found: dict[str, Any] = {"total": self.total, "members": rows, "limit": None, "equal": None, "current": None, "best": None}
        if any(seat.timing.measured for seat in seats):
            costs, even = self._costs(), self._split(self.total, [UNKNOWN] * len(seats))
            speeds, together = [_speed(cost, count) for cost, count in zip(costs, even, strict=True)], 0.0
            for speed in speeds:
                together += speed
            plans = {"equal": even, "current": now, "best": self._split(self.total, costs)}
            found |= {name: makespan(costs, plan) for name, plan in plans.items()} | {"limit": together / (len(seats) * min(speeds))}
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, for who joins and for checkpoints."""
        return {
            "fixed": None if self.fixed is None else [[member, speed] for member, speed in self.fixed.items()],
            "least": self.least,
            "capped": self.capped,
            "total": self.total,
            "streak": self.streak,
            "age": self.age,
            "seats": [[member, asdict(seat)] for member, seat in self.seats.items()],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        try:
            fixed = None if value["fixed"] is None else {member: float(speed) for member, speed in value["fixed"]}
            made = cls([member for member, _ in value["seats"]], fixed=fixed, least=value["least"], capped=value["capped"])
            made.total, made.streak, made.age = (int(value[name]) for name in ("total", "streak", "age"))
            for member, kept in value["seats"]:
                timing = Timing(**kept["timing"])
                timing.recent = [(units, seconds) for units, seconds in timing.recent]
                made.seats[member] = Seat(**kept | {"timing": timing, "plan": Cost(*kept["plan"])})
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the balance of the ranks is not one that this version wrote ({error}); delete it to begin with equal shares"
            ) from error
        return made


def _speed(cost: Costly, units: int) -> float:
    """Units a second at that many of them."""
    return max(units, 1) / (cost.a + cost.c * max(units, 1))


def _median(costs: Sequence[Cost]) -> Cost:
    """Of each part by itself."""
    middle = len(costs) // 2
    a, c = sorted(cost.a for cost in costs), sorted(cost.c for cost in costs)
    return Cost(a[middle], c[middle]) if len(costs) % 2 else Cost((a[middle - 1] + a[middle]) / 2.0, (c[middle - 1] + c[middle]) / 2.0)


def memory_cap(points: Sequence[tuple[int, int]], limit: int) -> int | None:
    """The most rows whose peak stays 10 % below `limit` bytes, by a line through measured (rows, peak bytes); 0 where none fits.

    None where the points tell of no limit: fewer than two sizes, or a peak that does not grow.
    """
    count = len(points)
    rows, peaks = sum(row for row, _ in points), sum(peak for _, peak in points)
    spread = count * sum(row * row for row, _ in points) - rows * rows
    slope = count * sum(row * peak for row, peak in points) - rows * peaks  # times spread, as all below: whole numbers are exact
    if spread <= 0 or slope <= 0:
        return None
    room = 9 * limit * count * spread - 10 * (peaks * spread - slope * rows)
    return max(0, room // (10 * count * slope))
