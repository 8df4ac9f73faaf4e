"""Differential privacy as values and accounting: what is protected, how much noise that takes, and what was spent.

An (epsilon, delta) here bounds what the weights tell of one unit that is added or removed: a row, all rows of one value of a
column (a patient), or a whole site. Sums of clipped contributions with Gaussian noise (Abadi et al. 2016; McMahan et al. 2018),
units drawn independently at each step (Poisson sampling), composed by Renyi divergence (Mironov 2017) in dp-accounting. How many
units there are counts as public. The proofs are of real numbers; attacks on the last bits of floating-point noise (Mironov 2012)
are out of scope.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anyfit.errors import InputError, MissingExtra

__all__ = ["Accountant", "ExamplePrivacy", "SitePrivacy", "noise_for"]

LEAST_NOISE = 0.1  # where calibration begins: less than this protects nobody
MOST_STEPS = 1 << 40


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} (={value}) of the privacy must be a number above 0")


def _checked(privacy: ExamplePrivacy | SitePrivacy) -> None:
    _positive(clip=privacy.clip, epsilon=privacy.epsilon)
    noise = privacy.noise_multiplier
    if not 0 < privacy.delta < 1:
        raise InputError(f"delta (={privacy.delta}) of the privacy must lie between 0 and 1, well below one over the number of units")
    if noise is None and privacy.epsilon is None:
        raise InputError("noise_multiplier and epsilon of the privacy are both None; give the noise, the budget, or both")
    if noise is not None and not 0 <= noise < math.inf:
        raise InputError(f"noise_multiplier (={noise}) of the privacy must be 0 or more")
    if noise == 0 and privacy.epsilon is not None:
        raise InputError(f"noise_multiplier (=0) keeps no budget (epsilon={privacy.epsilon}); leave it None to have it calibrated")


@dataclass(frozen=True, kw_only=True)
class ExamplePrivacy:
    """Protects one row, or all rows that share a value of the column `unit`.

    clip: the most that a unit's gradient may weigh (L2). noise_multiplier: standard deviation of the noise over `clip`; None takes
    the least that keeps `epsilon`, the budget, over all steps. noise_multiplier=0 clips only: epsilon is infinite.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    unit: str | None = None

    def __post_init__(self) -> None:
        _checked(self)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SitePrivacy:
    """Protects a whole site: its update is clipped, and the sum of all updates gets noise.

    quantile: the clip follows this quantile of the norms (Andrew et al. 2021), at the rate clip_lr; None keeps it. bits_noise: the
    standard deviation on the number of sites within the clip; None takes the paper's twentieth of the expected sites, but never
    less than the noise multiplier.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    quantile: float | None = None
    clip_lr: float = 0.2
    bits_noise: float | None = None

    def __post_init__(self) -> None:
        _checked(self)
        _positive(clip_lr=self.clip_lr, bits_noise=self.bits_noise)
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise InputError(f"quantile (={self.quantile}) of the privacy must lie between 0 and 1; 0.5 is the paper's choice")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return dataclasses.asdict(self)

    def split(self, noise_multiplier: float, sites: float) -> tuple[float, float]:
        """-> the noise multiplier of the updates and the standard deviation on the sum of bits, which together cost `noise_multiplier`.

        `sites`: how many are expected in a round. A site's bit is +1/2 where its update lies within the clip, else -1/2, so the sum has
        the sensitivity 1/2 and z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2). Account for `noise_multiplier` alone.
        """
        if self.quantile is None or noise_multiplier == 0:
            return noise_multiplier, 0.0
        bits = max(sites / 20, noise_multiplier) if self.bits_noise is None else self.bits_noise
        if 2 * bits <= noise_multiplier:
            raise InputError(
                f"bits_noise (={bits}) must be above half of the noise multiplier (={noise_multiplier}); "
                "leave it None, or give less noise to the updates"
            )
        return (noise_multiplier**-2 - (2 * bits) ** -2) ** -0.5, bits

    def next_clip(self, clip: float, bits: float, sites: float) -> float:
        """The clip of the next round, from the noisy sum of bits of this one and the expected sites."""
        if self.quantile is None:
            return clip
        return clip * math.exp(-self.clip_lr * (bits / sites + 0.5 - self.quantile))


class Accountant:
    """Epsilon at `delta` of steps of the Poisson-sampled Gaussian mechanism. What one step costs is worked out once."""

    def __init__(self, delta: float) -> None:
        self.delta = delta
        self._costs: dict[tuple[float, float], Any] = {}  # of one step, by order of the Renyi divergence

    def epsilon(self, steps: int, sampling_rate: float, noise_multiplier: float) -> float:
        """What `steps` steps have spent; infinite without noise."""
        if steps == 0:
            return 0.0
        if noise_multiplier == 0:
            return math.inf
        accounting, rdp = _library()
        key = (sampling_rate, noise_multiplier)
        if key not in self._costs:
            with _quietly():
                one = rdp.RdpAccountant().compose(_event(accounting, 1, *key))
            self._costs[key] = (one.orders, one.rdp)
        orders, cost = self._costs[key]
        return float(rdp.compute_epsilon(orders, steps * cost, self.delta)[0])

    def allowed(self, epsilon: float, sampling_rate: float, noise_multiplier: float) -> int:
        """The most steps that keep within the budget `epsilon`."""

        def fits(steps: int) -> bool:
            return self.epsilon(steps, sampling_rate, noise_multiplier) <= epsilon

        least, most = 0, 1
        while most < MOST_STEPS and fits(most):
            least, most = most, most * 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least


def noise_for(epsilon: float, delta: float, steps: int, sampling_rate: float) -> float:
    """The least noise multiplier with which `steps` steps keep within (epsilon, delta)."""
    accounting, rdp = _library()
    if Accountant(delta).epsilon(steps, sampling_rate, LEAST_NOISE) <= epsilon:
        return LEAST_NOISE
    try:
        with _quietly():
            noise = accounting.calibrate_dp_mechanism(
                rdp.RdpAccountant,
                lambda noise: _event(accounting, steps, sampling_rate, noise),
                epsilon,
                delta,
                accounting.LowerEndpointAndGuess(LEAST_NOISE, 1.0),
            )
    except accounting.mechanism_calibration.NoBracketIntervalFoundError as error:
        raise InputError(f"no noise keeps {steps} steps within epsilon (={epsilon}) at delta (={delta}); give a larger budget") from error
    return float(noise)


def _event(accounting: Any, steps: int, sampling_rate: float, noise_multiplier: float) -> Any:
    step = accounting.PoissonSampledDpEvent(sampling_rate, accounting.GaussianDpEvent(noise_multiplier))
    return accounting.SelfComposedDpEvent(step, steps)


@contextmanager
def _quietly() -> Iterator[None]:
    """An order that does not converge is left out, which a bound over the others allows; the library warns of it hundreds of times."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy") from error
    return dp_accounting, rdp
