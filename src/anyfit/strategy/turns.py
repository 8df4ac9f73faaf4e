"""Strategies that differ in who takes part: one site after the other, or one alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyfit.errors import InputError
from anyfit.strategy.averaging import FedAvg

__all__ = ["Cyclic", "SingleSite"]


@dataclass(frozen=True, kw_only=True)
class Cyclic(FedAvg):
    """The weights go from site to site, one each round (cyclic weight transfer, Chang et al. 2018)."""

    def choose(self, round: int, sites: Sequence[str], count: int, seed: int) -> list[str]:
        return [sites[(round - 1) % len(sites)]]


@dataclass(frozen=True, kw_only=True)
class SingleSite(FedAvg):
    """One site trains, the others only evaluate: what a federation has to beat."""

    site: str

    def choose(self, round: int, sites: Sequence[str], count: int, seed: int) -> list[str]:
        if self.site not in sites:
            raise InputError(f"site (={self.site!r}) of SingleSite is no site; there are: {', '.join(sites[:20])}")
        return [self.site]
