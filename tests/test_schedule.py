from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, PolynomialLR

from anyfit import schedule
from anyfit.errors import InputError
from anyfit.schedule import Schedule


def optimizer(lr: float = 2.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(made: Schedule, held: torch.optim.Optimizer, steps: int, loss: float | None = None) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(held.param_groups[0]["lr"])
        held.step()
        made.advance(loss)
    return found


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (schedule.constant, {"warmup": 0.5}, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        (schedule.linear, {}, [2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25]),
        (schedule.linear, {"end": 0.5, "warmup": 0.25}, [1, 2, 2, 11 / 6, 10 / 6, 9 / 6, 8 / 6, 7 / 6]),
        (schedule.polynomial, {"power": 2.0}, [2 * (1 - n / 8) ** 2 for n in range(8)]),
        (schedule.cosine, {}, [2, 1.9239, 1.7071, 1.3827, 1, 0.6173, 0.2929, 0.0761]),
    ],
)
def test_shapes(make: Any, options: dict[str, float], expected: list[float]) -> None:
    held = optimizer()
    assert rates(make(held, 8, **options), held, 8) == pytest.approx(expected, abs=1e-4)


def test_polynomial_decay_is_torchs() -> None:
    ours, theirs = optimizer(), optimizer()
    made, reference = schedule.polynomial(ours, 10, power=3.0), Schedule(PolynomialLR(theirs, 10, power=3.0))
    assert rates(made, ours, 10) == pytest.approx(rates(reference, theirs, 10))


def test_step_decay_and_plateau() -> None:
    held = optimizer()
    assert rates(schedule.step_decay(held, 2), held, 5) == pytest.approx([2, 2, 0.2, 0.2, 0.02])
    held = optimizer()
    made = schedule.plateau(held, factor=0.5, patience=1)
    assert made.every == "evaluation"
    assert rates(made, held, 6, loss=1.0) == [2, 2, 2, 1, 1, 0.5]


@pytest.mark.parametrize("torchs", [False, True])
def test_skipping_and_restoring_equal_advancing(torchs: bool) -> None:
    def make(held: torch.optim.Optimizer) -> Schedule:
        return Schedule(LambdaLR(held, lambda n: 0.9**n)) if torchs else schedule.cosine(held, 20, warmup=0.2)

    held, skipped, restored = optimizer(), optimizer(), optimizer()
    first, second, third = make(held), make(skipped), make(restored)
    rates(first, held, 7)
    second.skip(7)
    third.scheduler.load_state_dict(first.scheduler.state_dict())
    expected = rates(first, held, 5)
    assert rates(second, skipped, 5) == pytest.approx(expected)
    restored.step()
    third.advance()
    assert restored.param_groups[0]["lr"] == pytest.approx(expected[1])


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"warmup \(=1.5\) must be a share"):
        schedule.cosine(optimizer(), 10, warmup=1.5)
    with pytest.raises(InputError, match=r"every \(='batch'\) must be"):
        Schedule(None, every="batch")  # type: ignore[arg-type]
