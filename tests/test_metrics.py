from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from anyfit.errors import InputError
from anyfit.metrics import AUROC, F1, MAE, R2, RMSE, Accumulator, Accuracy, CalibrationError, Confusion, LogLoss, Metric, default_metrics

CLASSIFICATION = {
    "accuracy": Accuracy(),
    "f1": F1(),
    "log_loss": LogLoss(),
    "auroc": AUROC(),
    "confusion": Confusion(),
    "ece": CalibrationError(),
}
REGRESSION = {"rmse": RMSE(), "mae": MAE(), "r2": R2()}


def values(metrics: Any, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Figures over batches; the loss, which is 1, and the rows are left out."""
    totals = Accumulator(metrics)
    for out, target in zip(outputs, targets, strict=True):
        totals.add(torch.tensor(1.0), 1, out, target, None, len(target))
    found = totals.values()
    assert found.pop("loss") == 1 and found.pop("rows") == sum(map(len, targets))
    return found


def value(metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, parts: int = 1) -> Any:
    return values({"m": metric}, outputs.tensor_split(parts), targets.tensor_split(parts))["m"]


@pytest.fixture(params=[2, 5])
def classified(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    targets = torch.randint(0, request.param, (300,), generator=generator)
    logits = torch.randn(300, request.param, generator=generator) + 1.5 * torch.nn.functional.one_hot(targets, request.param)
    return logits, targets


def expected(name: str, logits: torch.Tensor, targets: torch.Tensor) -> Any:
    classes, probabilities, chosen = logits.shape[1], logits.double().softmax(1).numpy(), logits.argmax(1)
    if name == "f1":
        return sk.f1_score(targets, chosen, average="binary" if classes == 2 else "macro")
    if name == "auroc":
        return sk.roc_auc_score(targets, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr")
    if name == "confusion":
        return sk.confusion_matrix(targets, chosen).tolist()
    return {"accuracy": sk.accuracy_score(targets, chosen), "log_loss": sk.log_loss(targets, probabilities)}[name]


@pytest.mark.parametrize(
    ("name", "metric", "tolerance"),
    [
        ("accuracy", Accuracy(), 0),
        ("f1", F1(), 1e-12),
        ("log_loss", LogLoss(), 1e-6),
        ("auroc", AUROC(), 2e-4),
        ("confusion", Confusion(), 0),
    ],
)
def test_classification_metrics_are_sklearns_however_the_rows_are_split(
    name: str, metric: Metric, tolerance: float, classified: tuple[torch.Tensor, torch.Tensor]
) -> None:
    right = expected(name, *classified)
    for parts in (1, 7, 300):
        found = value(metric, *classified, parts)
        assert found == right if name == "confusion" else found == pytest.approx(right, abs=tolerance + 1e-12)


def test_regression_metrics_are_sklearns() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 1e4 + torch.randn(200, generator=generator, dtype=torch.float64)
    outputs = targets + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64)
    for metric, right in (
        (RMSE(), sk.root_mean_squared_error(targets, outputs)),
        (MAE(), sk.mean_absolute_error(targets, outputs)),
        (R2(), sk.r2_score(targets, outputs)),
    ):
        for parts in (1, 9):
            assert value(metric, outputs, targets, parts) == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("metric", [Accuracy(), F1(), LogLoss(), AUROC(), Confusion(), CalibrationError()], ids=lambda m: type(m).__name__)
def test_ignored_targets_are_left_out_and_sequences_count_tokens(metric: Metric) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(40, 7, 3, generator=generator), torch.randint(0, 3, (40, 7), generator=generator)
    targets[torch.rand(40, 7, generator=generator) < 0.4] = -100
    kept = targets != -100
    right = value(metric, logits[kept], targets[kept])
    for found in (value(metric, logits, targets, 9), value(metric, logits.reshape(-1, 3), targets.reshape(-1), 9)):
        assert found == (right if type(metric) is Confusion else pytest.approx(right, rel=1e-6))
    nothing = value(metric, logits[:2], torch.full((2, 7), -100), 2)
    assert nothing == ([[0] * 3] * 3 if type(metric) is Confusion else None)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 80), max_size=6))
def test_no_metric_depends_on_how_the_rows_are_batched(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(80, 3, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    for metrics, outputs, targets in (
        (CLASSIFICATION, logits, labels),
        (REGRESSION, logits[:, 0].double(), logits[:, 1].double()),
    ):
        whole = values(metrics, [outputs], [targets])
        parts = values(metrics, outputs.tensor_split(sorted(cuts)), targets.tensor_split(sorted(cuts)))
        assert parts.pop("confusion", None) == whole.pop("confusion", None)
        assert parts == pytest.approx(whole, rel=1e-6)


def test_only_the_order_of_scores_matters_to_auroc() -> None:
    """A rare class has small probabilities throughout: a shift of its logit changes no rank."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(2000, generator=generator) < 0.3).long()
    score = torch.randn(2000, generator=generator) + targets
    right = sk.roc_auc_score(targets, score)
    for shift, scale in ((0.0, 1.0), (-12.0, 1.0), (0.0, 10.0)):
        logits = torch.stack((torch.zeros(2000), scale * score + shift), 1)
        assert value(AUROC(), logits, targets) == pytest.approx(right, abs=2e-3), (shift, scale)


def test_f1_leaves_out_classes_that_occur_nowhere_as_sklearn_does() -> None:
    targets, chosen = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 2, 2, 2, 4])
    logits = torch.nn.functional.one_hot(chosen, 6).float()
    assert value(F1(), logits, targets, 2) == pytest.approx(sk.f1_score(targets, chosen, average="macro"))


def test_a_metric_of_nothing_is_none_and_a_constant_target_has_no_r2() -> None:
    assert value(R2(), torch.randn(4), torch.full((4,), 2.0)) is None
    assert value(RMSE(), torch.zeros(0), torch.zeros(0)) is None
    assert value(AUROC(), torch.randn(4, 2), torch.zeros(4, dtype=torch.long)) is None, "one class only"


def test_outputs_that_are_not_finite_are_measured_all_the_same() -> None:
    """The loss says that something is wrong; a metric that fails first would hide it."""
    logits = torch.full((6, 2), float("nan"))
    logits[:2] = torch.tensor([[1.0, float("inf")], [-float("inf"), 0.0]])
    found = values(CLASSIFICATION, [logits], [torch.arange(6) % 2])
    assert found.keys() == CLASSIFICATION.keys() and found["log_loss"] is None


def test_outputs_and_targets_that_do_not_belong_together_are_named() -> None:
    for metric, outputs, targets in ((Accuracy(), (4, 3), (5,)), (RMSE(), (4, 3), (4,))):
        with pytest.raises(InputError, match=re.escape(f"outputs {outputs} and targets {targets} do not belong together")):
            value(metric, torch.zeros(outputs), torch.zeros(targets, dtype=torch.long))


def test_a_plain_function_gets_all_outputs_and_targets_at_once() -> None:
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def share(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append((outputs, targets))
        return (outputs.argmax(1) == targets).double().mean()

    def broken(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return float("nan")

    logits, targets = torch.randn(10, 3), torch.arange(10) % 3
    found = values({"share": share, "broken": broken, "accuracy": Accuracy()}, logits.split(4), targets.split(4))
    assert len(calls) == 1 and torch.equal(calls[0][0], logits) and torch.equal(calls[0][1], targets)
    assert found == {"share": found["accuracy"], "broken": None, "accuracy": found["accuracy"]}


def test_one_logit_is_class_one_against_zero() -> None:
    logits, targets = torch.tensor([2.0, -1.0, 3.0, -2.0]), torch.tensor([1, 0, 0, 0])
    for outputs in (logits, logits[:, None]):
        assert value(Accuracy(), outputs, targets) == 0.75
        assert value(AUROC(), outputs, targets) == pytest.approx(2 / 3)


def test_calibration_error_is_nought_for_a_calibrated_model_and_large_for_a_sure_one() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator)
    targets = (torch.rand(20_000, generator=generator) < p).long()
    logits = torch.stack(((1 - p).log(), p.log()), 1)
    assert value(CalibrationError(), logits, targets) < 0.02
    assert value(CalibrationError(), logits * 20, targets) > 0.2


def test_defaults_go_by_the_targets_type() -> None:
    assert set(default_metrics(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))) == {"accuracy", "f1", "confusion"}
    assert set(default_metrics(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))) == {"accuracy", "f1", "confusion", "auroc"}
    assert set(default_metrics(torch.zeros(4, 7, 5000), torch.zeros(4, 7, dtype=torch.long))) == {"accuracy"}
    assert set(default_metrics(torch.zeros(4), torch.zeros(4))) == {"rmse", "mae", "r2"}


def test_loss_and_logs_are_weighted_by_their_count_and_an_empty_batch_spoils_nothing() -> None:
    totals = Accumulator({})
    for loss, count in ((1.0, 1), (4.0, torch.tensor(3)), (float("nan"), torch.tensor(0))):
        totals.add(torch.tensor(loss), count, None, None, {"twice": torch.tensor(2 * loss)}, 1)
    assert totals.values() == {"loss": 13 / 4, "twice": 13 / 2, "rows": 3}


def test_counts_may_be_sums_of_weights() -> None:
    totals = Accumulator({})
    for loss, count in ((1.0, 0.25), (4.0, torch.tensor(0.5))):
        totals.add(torch.tensor(loss), count, None, None, None, 1)
    assert totals.values() == {"loss": 3.0, "rows": 2}


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no batch was evaluated"):
        Accumulator(None).values()
