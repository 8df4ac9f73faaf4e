from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn import metrics as sk

from anyfit.metrics import AUROC, F1, MAE, R2, RMSE, Accumulator, Accuracy, CalibrationError, Confusion, LogLoss, Metric, default_metrics


def value(metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, parts: int = 1) -> Any:
    totals = Accumulator({"m": metric})
    for out, target in zip(outputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
        totals.add(torch.tensor(1.0), len(target), out, target, None, len(target))
    return totals.values()["m"]


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


def test_ignored_targets_and_sequences() -> None:
    logits = torch.eye(3).repeat(2, 1).reshape(2, 3, 3) * 5
    targets = torch.tensor([[0, 1, -100], [2, 1, -100]])
    assert value(Accuracy(), logits, targets) == 0.75
    assert value(Accuracy(), logits.reshape(6, 3), targets.reshape(6)) == 0.75
    nothing = value(Accuracy(), logits, torch.full((2, 3), -100))
    assert nothing is None


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


def test_the_loss_is_weighted_by_its_count_and_an_empty_batch_spoils_nothing() -> None:
    totals = Accumulator({})
    for loss, count in ((1.0, 1), (4.0, torch.tensor(3)), (float("nan"), torch.tensor(0))):
        totals.add(torch.tensor(loss), count, None, None, None, 1)
    assert totals.values() == {"loss": 13 / 4, "rows": 3}
