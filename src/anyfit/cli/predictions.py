"""Predictions as a CSV file: the class and its probabilities, or the number."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from anyfit.data import Source
from anyfit.errors import InputError
from anyfit.schema import Schema
from anyfit.trained import open_run, predict
from anyfit.values import write_atomic

__all__ = ["write_predictions"]


def write_predictions(run: Path, data: Source, out: Path, device: str) -> int:
    """Predict and write; returns how many rows."""
    outputs = predict(run, data, device=device)
    schema = Schema.from_json(open_run(run)[1].schema or {})
    if not isinstance(outputs, Tensor):
        raise InputError(f"predict gives a {type(outputs).__name__}, which has no one column; call anyfit.predict from Python")
    header, rows = _rows(outputs.float(), schema)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(out, text.getvalue().encode())
    return len(rows)


def _rows(outputs: Tensor, schema: Schema) -> tuple[list[str], list[list[Any]]]:
    classes = schema.classes
    if classes is not None and schema.multilabel and outputs.dim() == 2:
        labels = [
            [";".join(name for name, p in zip(classes, row, strict=True) if p > 0.5), *(f"{p:.6g}" for p in row)]
            for row in outputs.sigmoid().tolist()
        ]
        return ["prediction", *(f"probability {name}" for name in classes)], labels
    if classes is not None and outputs.dim() == 2 and outputs.shape[1] == len(classes):
        probabilities = outputs.softmax(1)
        chosen = probabilities.argmax(1).tolist()
        rows = [[classes[index], *(f"{p:.6g}" for p in row)] for index, row in zip(chosen, probabilities.tolist(), strict=True)]
        return ["prediction", *(f"probability {name}" for name in classes)], rows
    flat = outputs.reshape(outputs.shape[0], -1)
    names = [f"prediction {name}" for name in schema.targets] if len(schema.targets) == flat.shape[1] > 1 else None
    header = names or ["prediction"] if flat.shape[1] == 1 or names else [f"output {index}" for index in range(flat.shape[1])]
    return header, [[f"{value:.9g}" for value in row] for row in flat.tolist()]
