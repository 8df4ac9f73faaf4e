from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR

from anyfit import schedule
from anyfit.errors import InputError
from anyfit.schedule import Schedule

SHAPES = [schedule.constant, schedule.linear, schedule.polynomial, schedule.cosine]


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


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda held: Schedule(StepLR(held, 3, gamma=0.5), "epoch"), lambda held: schedule.step_decay(held, 3, gamma=0.5)),
        (lambda held: Schedule(LambdaLR(held, lambda n: 0.7**n)), lambda held: schedule.step_decay(held, 1, gamma=0.7, every="step")),
        (lambda held: Schedule(CosineAnnealingLR(held, 10)), lambda held: schedule.cosine(held, 10)),
        (lambda held: Schedule(LinearLR(held, 1.0, 0.25, 10)), lambda held: schedule.linear(held, 10, end=0.25)),
    ],
    ids=["step", "lambda", "cosine", "linear"],
)
def test_torchs_schedulers_run_as_they_are_and_ours_agree(theirs: Any, ours: Any) -> None:
    first, second = optimizer(), optimizer()
    assert rates(theirs(first), first, 10) == pytest.approx(rates(ours(second), second, 10))


@given(st.sampled_from(SHAPES), st.integers(1, 60), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 90))
def test_a_rate_rises_to_the_first_one_then_falls_to_its_end(make: Any, total: int, warmup: float, end: float, step: int) -> None:
    held = optimizer(1.0)
    options = {} if make is schedule.constant else {"end": end}
    made = make(held, total, warmup=warmup, **options)
    made.skip(step)
    rising = round(warmup * total)
    rate = held.param_groups[0]["lr"]
    if step < rising:
        assert rate == pytest.approx((step + 1) / rising)
    else:
        assert options.get("end", 1.0) - 1e-12 <= rate <= 1.0
    if step == rising and rising < total:
        assert rate == pytest.approx(1.0)
    if step >= total > rising:
        assert rate == pytest.approx(options.get("end", 1.0))


def test_each_group_keeps_its_own_first_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    held = torch.optim.SGD(groups)
    made = schedule.linear(held, 4)
    made.skip(2)
    assert [group["lr"] for group in held.param_groups] == [0.5, 0.05]


def test_a_plateau_waits_for_losses_and_skips_nothing() -> None:
    held = optimizer()
    made = Schedule(ReduceLROnPlateau(held, factor=0.5, patience=0), "evaluation")
    made.skip(5)
    made.advance()
    assert held.param_groups[0]["lr"] == 2
    for loss in (1.0, 0.5, 0.5):
        made.advance(loss)
    assert held.param_groups[0]["lr"] == 1


MAKERS = {
    "cosine": lambda held: schedule.cosine(held, 20, warmup=0.2),
    "step_decay": lambda held: schedule.step_decay(held, 2),
    "lambda": lambda held: Schedule(LambdaLR(held, lambda n: 0.9**n)),
    "step": lambda held: Schedule(StepLR(held, 2)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_skipping_and_restoring_equal_advancing(make: Any) -> None:
    held, skipped, restored = optimizer(), optimizer(), optimizer()
    first, second, third = make(held), make(skipped), make(restored)
    rates(first, held, 7)
    second.skip(7)
    restored.load_state_dict(held.state_dict())  # where torch's own keep their rate
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
    with pytest.raises(InputError, match=r"size \(=0\) must be at least 1"):
        schedule.step_decay(optimizer(), 0)
