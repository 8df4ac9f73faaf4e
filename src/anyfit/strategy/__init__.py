"""Strategies: how a site's update is made and how updates become the next weights. None knows what carries them.

All arithmetic is on vectors: the exchanged weights of a model lie side by side in one (P,) vector, in the order of a `Layout`.

base (the interface) -> averaging, adaptive, robust, turns, exact, calibrate
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from anyfit.errors import InputError
from anyfit.strategy.adaptive import FedAdagrad, FedAdam, FedYogi
from anyfit.strategy.averaging import FedAvg, FedAvgM, FedBN, FedNova, FedProx, Scaffold
from anyfit.strategy.base import Server, Strategy
from anyfit.strategy.calibrate import Calibrate
from anyfit.strategy.exact import FedPCA, NewtonRaphson
from anyfit.strategy.robust import FedMedian, Krum, TrimmedMean
from anyfit.strategy.turns import Cyclic, SingleSite
from anyfit.values import coerce

__all__ = [
    "STRATEGIES",
    "Calibrate",
    "Cyclic",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedMedian",
    "FedNova",
    "FedPCA",
    "FedProx",
    "FedYogi",
    "Krum",
    "NewtonRaphson",
    "Scaffold",
    "Server",
    "SingleSite",
    "Strategy",
    "TrimmedMean",
    "strategy_of",
]

STRATEGIES: dict[str, type[Strategy]] = {
    cls.__name__.lower(): cls
    for cls in (
        FedAvg,
        FedAvgM,
        FedProx,
        FedAdam,
        FedYogi,
        FedAdagrad,
        Scaffold,
        FedNova,
        FedBN,
        FedMedian,
        TrimmedMean,
        Krum,
        Cyclic,
        SingleSite,
        NewtonRaphson,
        FedPCA,
    )
}


def strategy_of(text: str) -> Strategy:
    """A strategy from its name and fields: fedavg, fedprox:mu=0.1, fedadam:lr=0.01,beta1=0.9."""
    name, _, rest = text.partition(":")
    cls = STRATEGIES.get(name.lower().replace("-", "").replace("_", ""))
    if cls is None:
        raise InputError(f"strategy (={text!r}) is not known; there are: {', '.join(STRATEGIES)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in fields:
            raise InputError(f"strategy (={text!r}): {key!r} is no field of {cls.__name__}; it has: {', '.join(sorted(fields)) or 'none'}")
        given[key] = coerce(key, value.replace(";", ","), hints[key])
    none = dataclasses.MISSING
    needed = [field.name for field in dataclasses.fields(cls) if field.default is none and field.default_factory is none]  # type: ignore[arg-type]
    if lacking := [key for key in needed if key not in given]:
        spelled = [*filter(None, rest.split(",")), *(f"{key}={'NAME' if hints[key] is str else 'VALUE'}" for key in lacking)]
        raise InputError(f"strategy (={text!r}) lacks {' and '.join(lacking)}; write {name}:{','.join(spelled)}")
    return cls(**given)
