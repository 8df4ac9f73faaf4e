"""A task with scikit-learn's face: its tools take it, and labels come back as they went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from anyfit import Image, Tabular, Task, TextCNN
from anyfit.errors import DataError, InputError
from anyfit.estimator import Estimator
from anyfit.schema import Schema

IRIS = load_iris()
NAMES = IRIS.target_names[IRIS.target]


def iris(**options: Any) -> Estimator:
    return Estimator(Tabular(hidden=(16,), dropout=0.0), **{"epochs": 15, "batch_size": 16, "lr": 0.02, **options})


def blobs(rows: int = 60, columns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    y = np.arange(rows) % 2
    return draw.normal(size=(rows, columns)) + 3 * y[:, None], y


class Line(Task):
    """One layer, quickly fitted."""

    lr: float = 0.1
    kind: str = "plain"

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Linear(len(schema.of_type("continuous")), 1 if schema.classes is None else len(schema.classes))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["continuous"])


def line(**options: Any) -> Estimator:
    return Estimator(Line(), **{"epochs": 5, "batch_size": 20, **options})


# ------------------------------------------------------------------ learning


def test_iris_with_its_names() -> None:
    estimator = iris().fit(IRIS.data, NAMES)
    assert estimator.classes_.tolist() == ["setosa", "versicolor", "virginica"] and estimator.n_features_in_ == 4
    assert estimator.score(IRIS.data, NAMES) > 0.95
    predicted, probabilities = estimator.predict(IRIS.data), estimator.predict_proba(IRIS.data)
    assert predicted.dtype == NAMES.dtype and set(predicted) == set(NAMES)
    assert probabilities.shape == (150, 3) and probabilities.sum(1) == pytest.approx(1)
    assert (estimator.classes_[probabilities.argmax(1)] == predicted).all()
    assert is_classifier(estimator) and not hasattr(estimator, "feature_names_in_")
    assert np.array_equal(iris().fit(IRIS.data, NAMES).predict_proba(IRIS.data), probabilities)  # one seed, one result


def test_digits_as_images() -> None:
    digits = load_digits()
    images, held = digits.images.astype(np.uint8), np.arange(1797) % 5 == 0
    estimator = Estimator(Image(channels=8, hidden=64), epochs=8, batch_size=32, lr=4e-3).fit(images[~held], digits.target[~held])
    assert estimator.score(images[held], digits.target[held]) >= 0.95
    four = Estimator(Image(channels=8, hidden=64), epochs=1).fit(images[:200, None] > 8, digits.target[:200])  # (N, C, H, W), bool
    assert four.predict(images[:3] > 8).shape == (3,)
    with pytest.raises(DataError, match=r"are \(1, 8, 4\), but training had \(1, 8, 8\)"):
        estimator.predict(images[:, :, :4])


def test_regression_in_the_targets_unit() -> None:
    X, y = load_diabetes(return_X_y=True)
    estimator = Estimator(Tabular(hidden=(32,), dropout=0.0), epochs=20, batch_size=32, lr=5e-3).fit(X, y)
    assert is_regressor(estimator) and estimator.score(X, y) > 0.4
    assert estimator.predict(X).shape == (442,) and estimator.predict(X).dtype == np.float64
    assert not hasattr(estimator, "predict_proba") and not hasattr(estimator, "classes_")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["no", "yes"], None),
        ([False, True], None),
        ([-3, 12], None),
        (np.array([7, 300], np.uint16), None),
        ([0.0, 1.0], "classifier"),
        ([0.5, 2.25], "classifier"),
        (["10", "9"], None),  # in the order of text here, of numbers in the schema
    ],
)
def test_labels_come_back_as_they_went_in(labels: Any, kind: Any) -> None:
    X, y = blobs()
    given = np.asarray(labels)[y]
    estimator = line(kind=kind).fit(X, given)
    predicted = estimator.predict(X)
    assert predicted.dtype == given.dtype and (predicted == given).mean() > 0.95
    assert estimator.classes_.tolist() == sorted(labels) and estimator.score(X, list(given)) > 0.95
    sure = estimator.predict_proba(X)[np.arange(len(X)), np.searchsorted(estimator.classes_, given)]
    assert sure.mean() > 0.8


def test_y_decides_between_classes_and_numbers() -> None:
    X, y = blobs(120)
    assert line(epochs=1).fit(X, y).kind_ == "classifier"
    assert line(epochs=1).fit(X, y.astype(float)).kind_ == "regressor"
    assert line(epochs=1).fit(X, np.arange(120)).kind_ == "regressor"
    estimator = line(epochs=1, kind="regressor").fit(X, y)
    assert estimator.predict(X).dtype == np.float64 and is_regressor(estimator)
    assert line(epochs=1).fit(X, np.array([0.5, 2.5], object)[y]).kind_ == "regressor"
    with pytest.raises(DataError, match=r"y holds .*, which is no number to predict: .*; pass kind='classifier'"):
        line(kind="regressor").fit(X, np.array(["a", "b"])[y])


def test_one_logit_tells_two_classes() -> None:
    class Single(Line):
        def build_model(self, schema: Schema) -> nn.Module:
            return nn.Linear(len(schema.of_type("continuous")), 1)

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch["continuous"]).squeeze(1)

    X, y = blobs()
    estimator = Estimator(Single(), epochs=5, batch_size=20).fit(X, np.array(["b", "a"])[y])
    assert estimator.score(X, np.array(["b", "a"])[y]) > 0.95 and estimator.predict_proba(X).shape == (60, 2)


def test_sample_weights_change_what_is_learnt() -> None:
    X = np.zeros((40, 1))
    y = np.arange(40) % 2
    heavy = np.where(y == 1, 9.0, 1.0)
    estimator = line(epochs=40, batch_size=None).fit(X, y, sample_weight=heavy)
    assert estimator.predict_proba(X)[0, 1] == pytest.approx(0.9, abs=0.02)
    assert estimator.score(X, y) == 0.5 and estimator.score(X, y, sample_weight=heavy) == pytest.approx(0.9)
    with pytest.raises(DataError, match=r"sample_weight has shape \(3,\); give one number for each of the 40 rows"):
        line().fit(X, y, sample_weight=[1, 2, 3])


def test_a_folder_keeps_the_record(tmp_path: Path) -> None:
    X, y = blobs()
    estimator = line(run=tmp_path / "r").fit(X, y)
    assert (tmp_path / "r/result.json").exists() and estimator.run_.path == tmp_path / "r"


def test_the_default_batch_fits_few_rows() -> None:
    X, y = blobs(60)
    assert Estimator(Tabular(), epochs=1).fit(X, y).run_.record["plan"]["batch_size"] == 7
    assert Estimator(Tabular(), epochs=1, batch_size=60).fit(X, y).run_.record["plan"]["batch_size"] == 60
    with pytest.raises(InputError, match=r"batch_size \(=61\) is larger than the 60 rows"):
        Estimator(Tabular(), epochs=1, batch_size=61).fit(X, y)


# ------------------------------------------------------------------ what X may be


def test_frames_keep_their_names() -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    X, y = blobs()
    columns = {"a": X[:, 0], "target": X[:, 1], "c": np.array(["u", "v"], object)[y]}
    frame = pandas.DataFrame(columns, index=np.arange(60) * 2)
    estimator = Estimator(Tabular(hidden=(8,)), epochs=2).fit(frame, pandas.Series(y, index=frame.index))
    assert estimator.feature_names_in_.tolist() == ["a", "target", "c"] and estimator.n_features_in_ == 3
    expected = estimator.predict_proba(frame)
    plain = {name: list(values) for name, values in columns.items()}
    for other in (polars.DataFrame(plain), pa.table(plain), frame[["c", "a", "target"]], frame.to_numpy()):
        assert np.array_equal(estimator.predict_proba(other), expected)
    whole = line(epochs=1).fit(X, pandas.Series(np.arange(60) % 3, dtype="Int64"))
    assert whole.classes_.tolist() == [0, 1, 2] and whole.classes_.dtype.kind == "i"
    with pytest.raises(DataError, match="y is missing in 1 rows"):
        line().fit(X, pandas.Series([None, *y[1:]], dtype="Int64"))
    same = Estimator(Tabular(hidden=(8,)), epochs=2).fit(polars.DataFrame(plain), polars.Series(y))
    assert np.array_equal(same.predict_proba(frame), expected)
    with pytest.raises(DataError, match="column 'c' that fit saw is not in X; it has: a, target, d"):
        estimator.predict(frame.rename(columns={"c": "d"}))
    numbered = line().fit(pandas.DataFrame(X), y)
    assert not hasattr(numbered, "feature_names_in_") and np.array_equal(numbered.predict(X), numbered.predict(pandas.DataFrame(X)))
    with pytest.raises(DataError, match="X has 2 columns, but fit saw 3; give the same columns"):
        numbered.predict(X[:, :2])


def test_lists_tensors_and_missing_values() -> None:
    X, y = blobs()
    expected = line().fit(X, y).predict_proba(X)
    assert np.array_equal(line().fit(X.tolist(), y.tolist()).predict_proba(torch.from_numpy(X)), expected)
    X[::7, 0] = np.nan
    assert Estimator(Tabular(), epochs=8).fit(X, y).score(X, y) > 0.9


def test_texts() -> None:
    tones = ["good", "bad"] * 40
    texts = [f"number {index} is {tone} and {'fine' if tone == 'good' else 'sad'}" for index, tone in enumerate(tones)]
    estimator = Estimator(TextCNN(), epochs=5).fit(texts, tones)
    assert estimator.score(texts, tones) == 1


def test_input_that_does_not_fit_is_refused() -> None:
    X, y = blobs()
    cases: list[tuple[Any, Any, str]] = [
        (X, None, r"y \(=None\) is needed"),
        (X, y[:9], "y has 9 values, but X has 60 rows"),
        (X, np.stack((y, y), 1), r"y has shape \(60, 2\)"),
        (X, [None, *y[1:]], "y is missing in 1 rows"),
        (X, np.where(y == 0, np.nan, 1.0), "y is missing in 30 rows"),
        (X, np.array([*"ab" * 29, "c", 4], object), "y holds labels of several types, which have no order"),
        (X[:, 0], y, r"X has shape \(60,\); give rows and columns"),
        (X.astype(complex)[None, None], y, r"X has shape \(1, 1, 60, 3\)"),
        ([[1, 2], [3]], y, r"X \(a list\) is no array"),
        (X, np.zeros(60, int), "has one class only"),
    ]
    for given, labels, message in cases:
        with pytest.raises(DataError, match=message):
            line().fit(given, labels)
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(DataError, match=r"X \(a csr_matrix\) is sparse; pass X.toarray\(\)"):
        line().fit(sparse.csr_matrix(X), y)


def test_an_estimator_that_is_not_fitted_says_so() -> None:
    X, y = blobs()
    for call in (line().predict, line().predict_proba, lambda X: line().score(X, y)):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            call(X)


# ------------------------------------------------------------------ parameters


def test_parameters_are_those_of_task_and_plan() -> None:
    estimator = Estimator(Tabular(), epochs=3, lr=0.5, hidden=(4, 2))
    assert estimator.task == Tabular(lr=0.5, hidden=(4, 2))
    assert estimator.get_params(deep=False) == {"task": estimator.task, "run": None, "kind": None, "epochs": 3}
    params = estimator.get_params()
    assert params["lr"] == 0.5 and params["epochs"] == 3 and params["batch_size"] == 256 and params["dropout"] == 0.1
    assert estimator.set_params(lr=np.float64(0.25), seed=np.int64(4), kind="classifier") is estimator
    assert estimator.task.lr == 0.25 and estimator.get_params()["seed"] == 4 and estimator.kind == "classifier"
    clashing = Estimator(Line(), kind="classifier", task__kind="curved")
    assert clashing.get_params()["task__kind"] == "curved" and clashing.get_params()["kind"] == "classifier"
    assert "epochs=3" in repr(estimator)
    for wrong, message in (
        ({"speed": 3}, r"speed is neither a field of the plan \(epochs, .*\) nor of Tabular \(hidden, "),
        ({"kind": "both"}, r"kind \(='both'\) must be one of classifier, regressor"),
        ({"task": "tabular"}, r"task \(a str\) must be an anyfit.Task"),
        ({"lr": "fast"}, r"lr \(='fast'\) must be a finite number"),
    ):
        with pytest.raises(InputError, match=message):
            Estimator(**{"task": Tabular(), **wrong})


def test_clone_is_unfitted_and_equal() -> None:
    X, y = blobs()
    estimator = line(lr=0.2, seed=3).fit(X, y)
    copied = clone(estimator)
    assert copied.get_params(deep=False) == estimator.get_params(deep=False) and copied.task is not estimator.task
    assert not hasattr(copied, "run_") and not hasattr(copied, "kind_")
    assert np.array_equal(copied.fit(X, y).predict_proba(X), estimator.predict_proba(X))


def test_a_second_fit_forgets_the_first() -> None:
    X, y = blobs()
    estimator = line().fit(pa.table({"p": X[:, 0], "q": X[:, 1]}), y)
    estimator.fit(X, y.astype(float))
    assert estimator.n_features_in_ == 3 and not hasattr(estimator, "classes_") and not hasattr(estimator, "feature_names_in_")


# ------------------------------------------------------------------ scikit-learn's tools


def test_cross_validation_holds_each_class_alike() -> None:
    scores = cross_val_score(iris(kind="classifier"), IRIS.data, NAMES, cv=3)
    assert scores.shape == (3,) and scores.min() > 0.85
    losses = cross_val_score(iris(kind="classifier", epochs=10), IRIS.data, NAMES, cv=3, scoring="neg_log_loss")
    assert losses.min() > -0.5


def test_a_grid_over_fields_of_task_and_plan() -> None:
    X, y = blobs()
    search = GridSearchCV(line(kind="classifier"), {"lr": np.array([1e-5, 0.2]), "epochs": [1, 4]}, cv=2).fit(X, y)
    assert search.best_params_["lr"] == 0.2 and search.best_score_ > 0.9
    assert search.best_estimator_.task.lr == 0.2 and search.classes_.tolist() == [0, 1]
    assert (search.predict(X) == y).mean() > 0.9


def test_a_pipeline_scales_first() -> None:
    X, y = blobs()
    pipeline = make_pipeline(StandardScaler(), line(kind="classifier")).fit(X * 1e4, y)
    assert pipeline.score(X * 1e4, y) > 0.95 and is_classifier(pipeline)
    assert cross_val_score(pipeline, X, y, cv=2).min() > 0.9
    assert pipeline.set_params(estimator__lr=0.3)[-1].task.lr == 0.3
