"""A task as a scikit-learn estimator: fit, predict and score on arrays and frames; fields of the task and of the plan are parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from sklearn.base import BaseEstimator
from sklearn.metrics import r2_score
from sklearn.utils import ClassifierTags, RegressorTags, Tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from anyfit.data import Source
from anyfit.data.hashes import image_column
from anyfit.errors import DataError, InputError
from anyfit.fit import fit as fit_task
from anyfit.run import Run
from anyfit.schema import Schema
from anyfit.task import Task
from anyfit.trained import predict as predict_with
from anyfit.values import Plan

__all__ = ["Estimator"]

Array = np.ndarray[Any, Any]
Kind = Literal["classifier", "regressor"]
KINDS = ("classifier", "regressor")
MOST_CLASSES = 100  # whole numbers with at most so many distinct values are taken for classes, as in tables


def _classifies(estimator: Estimator) -> bool:
    return estimator._kind() != "regressor"


class Estimator(BaseEstimator):  # type: ignore[misc]
    """A task with scikit-learn's face: `Estimator(Tabular(hidden=(64,)), epochs=20, lr=1e-3)`.

    X: an array (its columns are x0, x1, ...), a frame of pandas or polars, a pyarrow table, texts, or images (N, H, W) or (N, C, H, W).
    `kind` None: y decides. Texts, truth values and whole numbers of few distinct values are classes, floats are numbers to predict; give
    it too where folds are to hold each class alike, since that is asked before y is seen. `run`: a folder for the record of the fit.
    Beside `plan`, names of the task's fields are taken; `task__name` is a field whose name is a parameter here.
    A batch size that the plan does not name becomes smaller where the rows would not fill one batch.
    """

    run_: Run
    n_features_in_: int

    def __init__(self, task: Task, *, run: Any = None, kind: Kind | None = None, **plan: Any) -> None:
        self.task, self.run, self.kind = task, run, kind
        self.plan: dict[str, Any] = {}
        self.set_params(**plan)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; `deep` adds the task's fields and the rest of the plan."""
        own = {"task": self.task, "run": self.run, "kind": self.kind, **self.plan}
        if not deep:
            return own
        fields = {name: getattr(self.task, name) for name in _fields(self.task)}
        taken = {f"task__{name}" if name in own else name: value for name, value in fields.items()}
        return {**self.task.plan().to_json(), **taken, **own}

    def set_params(self, **params: Any) -> Self:
        """Set own parameters, fields of the plan and fields of the task."""
        for name in ("task", "run", "kind"):
            if name in params:
                setattr(self, name, params.pop(name))
        if not isinstance(self.task, Task):
            raise InputError(f"task (a {type(self.task).__name__}) must be an anyfit.Task, such as anyfit.Tabular()")
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"kind (={self.kind!r}) must be one of {', '.join(KINDS)}, or None for what y is")
        fields = _fields(self.task)
        values = {}
        for name, value in params.items():
            field = name.removeprefix("task__")
            if name in Plan.__dataclass_fields__:
                self.plan[name] = value
            elif field in fields:
                values[field] = _plain(value)
            else:
                raise InputError(
                    f"{name} is neither a field of the plan ({', '.join(Plan.__dataclass_fields__)}) nor of {type(self.task).__name__} "
                    f"({', '.join(fields) or 'which has none'})"
                )
        self.task = self.task.replaced(**values)
        return self

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Train from the beginning."""
        table, names = _table(X)
        labels = _labels(y, table.num_rows)
        self.kind_ = self.kind or _kind_of(labels)
        for name in {"classes_", "feature_names_in_"} & set(vars(self)):  # of another fit
            delattr(self, name)
        self.n_features_in_ = table.num_columns
        if names:
            self.feature_names_in_ = np.array(table.column_names, dtype=object)
        self._columns = table.column_names
        target, weight = _free("target", table), _free("weight", table)
        types: dict[str, Any] = {name: "text" for name in table.column_names if _is_text(X)}
        if self.kind_ == "classifier":
            self.classes_, places = np.unique(labels, return_inverse=True)
            names_of = [f"{place} {label}" for place, label in enumerate(self.classes_.tolist())]  # labels that spell alike stay apart
            table = table.append_column(target, pa.array([names_of[place] for place in places.tolist()], pa.string()))
            types[target] = "categorical"
        else:
            try:
                table = table.append_column(target, pa.array(labels.astype(np.float64)))
            except (TypeError, ValueError) as error:
                raise DataError(f"y holds {labels.dtype}, which is no number to predict: {error}; pass kind='classifier'") from error
            types[target] = "continuous"
        options: dict[str, Any] = {}
        if sample_weight is not None:
            weights = np.asarray(sample_weight, dtype=np.float64)
            if weights.shape != (table.num_rows,):
                raise DataError(f"sample_weight has shape {weights.shape}; give one number for each of the {table.num_rows} rows")
            table = table.append_column(weight, pa.array(weights))
            options["weight"] = weight
        source = Source(table, target=target, types=types, **options)
        self.run_ = fit_task(self.task, source, run=self.run, **self._plan_for(table.num_rows))
        if self.kind_ == "classifier":
            known = Schema.from_json(self.run_.state.schema or {}).classes or ()
            self._order = np.array([int(name.partition(" ")[0]) for name in known])  # of each output of the model among classes_
        return self

    def predict(self, X: Any) -> Array:
        """Labels as y had them, or numbers."""
        outputs = self._outputs(X)
        if self.kind_ == "regressor":
            if outputs.ndim == 2 and outputs.shape[1] == 1:
                outputs = outputs[:, 0]
            return outputs.astype(np.float64)
        return np.asarray(self.classes_[_probabilities(outputs)[:, np.argsort(self._order)].argmax(1)])

    @available_if(_classifies)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:
        """(N, classes) probabilities in the order of `classes_`."""
        return _probabilities(self._outputs(X))[:, np.argsort(self._order)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy of a classifier, R2 of a regressor."""
        check_is_fitted(self)
        predicted = self.predict(X)
        labels = _labels(y, len(predicted))
        if self.kind_ == "regressor":
            return float(r2_score(labels, predicted, sample_weight=sample_weight))
        return float(np.average(labels == predicted, weights=sample_weight))  # scikit-learn's own refuses labels such as 0.5

    def _plan_for(self, rows: int) -> dict[str, Any]:
        """The plan as plain numbers, with a batch size that the rows can fill."""
        plan = {name: _plain(value) for name, value in self.plan.items()}
        default = self.task.plan().batch_size
        if "batch_size" not in plan and default is not None and default > rows * 0.8:  # early stopping takes a part of the rows
            plan["batch_size"] = max(1, min(default, rows // 8))
        return plan

    def _outputs(self, X: Any) -> Array:
        """What the model gives for each row: logits or numbers."""
        check_is_fitted(self)
        outputs = predict_with(self.run_, self._matched(X))
        if isinstance(outputs, Mapping):
            outputs = outputs.get("logits")
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"predict of {type(self.task).__name__} gives a {type(outputs).__name__}; an estimator needs one tensor, rows first"
            )
        return outputs.float().numpy() if outputs.dtype.itemsize < 4 else outputs.numpy()

    def _matched(self, X: Any) -> pa.Table:
        """The columns of X as fit saw them: by name where both have names, else by place."""
        table, names = _table(X)
        if table.num_columns != self.n_features_in_:
            raise DataError(f"X has {table.num_columns} columns, but fit saw {self.n_features_in_}; give the same columns")
        if not (names and hasattr(self, "feature_names_in_")):
            return table.rename_columns(self._columns)
        absent = [name for name in self._columns if name not in table.column_names]
        if absent:
            raise DataError(f"column {absent[0]!r} that fit saw is not in X; it has: {', '.join(table.column_names)}")
        return table.select(self._columns)

    def _kind(self) -> Kind | None:
        kind: Kind | None = getattr(self, "kind_", self.kind)
        return kind

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "run_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.estimator_type = self._kind()
        tags.classifier_tags = ClassifierTags() if tags.estimator_type == "classifier" else None
        tags.regressor_tags = RegressorTags() if tags.estimator_type == "regressor" else None
        tags.target_tags.required = True
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = tags.input_tags.three_d_array = True
        return tags


def _fields(task: Task) -> list[str]:
    return list(task.__dataclass_fields__)  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """A grid's numpy number as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _is_text(X: Any) -> bool:
    """Whether X is one text per row."""
    if isinstance(X, str) or hasattr(X, "columns") or isinstance(X, pa.Table):
        return False
    array = np.asarray(X, dtype=object) if isinstance(X, list | tuple) and all(isinstance(item, str) for item in X) else X
    return getattr(array, "ndim", 0) == 1 and len(array) > 0 and all(isinstance(item, str) for item in array)


def _table(X: Any) -> tuple[pa.Table, bool]:
    """X as a table, and whether its columns have names of their own."""
    if isinstance(X, pa.Table):
        return X, True
    if hasattr(X, "iloc") and hasattr(X, "columns"):  # pandas, whose index is no column
        return pa.Table.from_pandas(X, preserve_index=False), all(isinstance(name, str) for name in X.columns)
    if hasattr(X, "columns") and hasattr(X, "__arrow_c_stream__"):  # polars
        return pa.table(X), True
    if hasattr(X, "toarray"):
        raise DataError(f"X (a {type(X).__name__}) is sparse; pass X.toarray()")
    if _is_text(X):
        return pa.table({"text": pa.array([str(item) for item in X], pa.string())}), False
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise DataError(f"X (a {type(X).__name__}) is no array: {error}") from error
    if array.ndim in (3, 4) and array.dtype.kind in "buif":
        array = array.astype(np.uint8) if array.dtype.kind == "b" else array
        return pa.table({"image": image_column(array if array.ndim == 4 else array[:, None])}), False
    if array.ndim != 2:
        raise DataError(f"X has shape {array.shape}; give rows and columns, images (N, H, W) or (N, C, H, W), or a list of texts")
    columns = [pa.array(column.tolist() if array.dtype.kind == "O" else np.ascontiguousarray(column)) for column in array.T]
    return pa.table(columns, names=[f"x{place}" for place in range(len(columns))]), False


def _labels(y: Any, rows: int) -> Array:
    """(N,) labels without missing ones."""
    if y is None:
        raise DataError("y (=None) is needed; give a label or a number for each row")
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"y has shape {labels.shape}; give one label or number for each row")
    if len(labels) != rows:
        raise DataError(f"y has {len(labels)} values, but X has {rows} rows; give one for each")
    try:
        column = pa.array(labels, from_pandas=True)  # None, NaN and pandas' NA are missing
    except pa.ArrowException as error:
        raise DataError(f"y holds labels of several types, which have no order: {error}") from error
    missing = column.null_count
    if missing:
        raise DataError(f"y is missing in {missing} rows; drop them or fill them")
    plain = labels.dtype.kind == "O" and not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
    return np.asarray(column.to_numpy(zero_copy_only=False)) if plain else labels  # numbers as such, also of a column that could have NA


def _kind_of(labels: Array) -> Kind:
    if labels.dtype.kind in "iu":
        return "classifier" if len(np.unique(labels)) <= MOST_CLASSES else "regressor"
    return "regressor" if labels.dtype.kind == "f" else "classifier"


def _free(name: str, table: pa.Table) -> str:
    """A column name that the features leave free."""
    while name in table.column_names:
        name += "_"
    return name


def _probabilities(outputs: Array) -> Array:
    """(N, C) from logits (N, C), or from one logit per row for the second of two classes."""
    logits = outputs.astype(np.float64)
    if logits.ndim == 1 or logits.shape[1] == 1:
        one = logits.reshape(-1, 1)
        logits = np.concatenate((np.zeros_like(one), one), 1)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
