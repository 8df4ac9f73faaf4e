"""Privacy of whole sites, where updates are added: who is drawn, how much noise a round asks of each guard, and what that has cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from anyfit.errors import InputError
from anyfit.guard import BELOW, LOSS, WEIGHTS
from anyfit.privacy import Accountant, SitePrivacy, noise_for
from anyfit.private import noise_like, seeded
from anyfit.strategy import Strategy
from anyfit.update import FINE, Group, Layout, Update

__all__ = ["SiteNoise"]

DRAW, ALONE = 0, 1  # what a round's secret numbers are for


class SiteNoise:
    """`rate`: the chance of each site to be in a round; `cohort`: how many are expected, the public number that sums are divided by."""

    def __init__(
        self, privacy: SitePrivacy, strategy: Strategy, layout: Layout, *, rounds: int, sites: int, drawn: int, secret: int
    ) -> None:
        if strategy.needs == "each" or set(strategy.sends(layout)) - {WEIGHTS, LOSS} or not strategy.trains:
            raise InputError(f"{strategy.name} needs more of each site than a noisy sum; under site privacy use FedAvg, FedProx or FedAdam")
        self.privacy, self.layout, self._secret = privacy, layout, secret
        if type(strategy).choose is not Strategy.choose:
            raise InputError(f"{strategy.name} chooses who takes part, but under site privacy each site is drawn at random; use FedAvg")
        self.sites, self.rate, self.cohort = sites, drawn / sites, float(drawn)
        self._accountant = Accountant(privacy.delta)
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.epsilon is not None
            noise = noise_for(privacy.epsilon, privacy.delta, rounds, self.rate)
        self.noise = noise
        self.update_noise, self.bits_noise = privacy.split(noise, self.cohort)
        self.allowed = None if privacy.epsilon is None else self._accountant.allowed(privacy.epsilon, self.rate, noise)
        self.clip, self.spent = privacy.clip, 0  # rounds whose noise was released

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "unit": "site",
            **self.privacy.to_json(),
            "noise_multiplier": self.noise,
            "sampling_rate": self.rate,
            "drawn": int(self.cohort),
            "sites": self.sites,
        }

    def progress(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"spent": self.spent, "clip": self.clip}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go to where `progress` stands."""
        self.spent, self.clip = int(progress["spent"]), float(progress["clip"])

    @property
    def used_up(self) -> bool:
        """Whether the budget pays for no further round."""
        return self.allowed is not None and self.spent >= self.allowed

    @property
    def epsilon(self) -> float | None:
        """Spent so far; None where it is infinite."""
        spent = self._accountant.epsilon(self.spent, self.rate, self.noise)
        return spent if math.isfinite(spent) else None

    def drawn(self, members: Sequence[str], round: int, attempt: int) -> list[str]:
        """Each by a coin of its own, which nobody may know: that is what the accounting is about."""
        if self.rate == 1:
            return list(members)
        coins = seeded(self._secret, DRAW, round, attempt).random(len(members))
        return [name for name, coin in zip(members, coins, strict=True) if coin < self.rate]

    def values(self, sites: int) -> dict[str, Any]:
        """What the order tells each guard; the noise of `sites` of them makes that of the round."""
        return {"clip": self.clip, "noise": self.update_noise, "bits_noise": self.bits_noise, "noise_sites": max(1, sites)}

    def total(self, total: Update) -> Update:
        """A round's noisy sum over the public number of sites, noise alone where nobody was drawn; the clip moves on."""
        if WEIGHTS not in total:
            generator = seeded(self._secret, ALONE, self.spent)
            noise = noise_like(torch.zeros(self.layout.size, dtype=torch.float64), self.update_noise * self.clip, generator)
            bits = noise_like(torch.zeros((), dtype=torch.float64), self.bits_noise, generator)
            total = Update({WEIGHTS: Group({WEIGHTS: noise}, 1.0, FINE), BELOW: Group({BELOW: bits}, 1.0, FINE)})
        below = float(total.sums(BELOW)[BELOW]) if BELOW in total else 0.0
        self.clip = self.privacy.next_clip(self.clip, below, self.cohort)
        return Update({WEIGHTS: Group(total.sums(WEIGHTS), self.cohort, FINE)})
