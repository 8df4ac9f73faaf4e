"""The page of a run: complete, safe with hostile names, and there for unfinished and torn runs too."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anyfit.errors import InputError
from anyfit.federate.rules import fairness
from anyfit.report import summary, write_report
from anyfit.report.plots import _COLOURS, _GRID, _INK, _MUTED, _PAPER, _quantile, _smooth, _thin

HOSTILE = "<script>alert('ü')</script> & $x_$ 中"


def write_run(folder: Path, record: dict[str, Any], events: Iterable[dict[str, Any]], result: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "timings.jsonl").write_text('{"step": 50, "seconds": 1.2, "samples_per_s": 5321.0}\n')
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def record_of(kind: str = "fit", **more: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": kind,
        "anyfit": "0.1.0",
        "task": {
            "reference": "tabular",
            "class": "anyfit.tasks.tabular:Tabular",
            "code": "ab" * 32,
            "values": {"hidden": [64, 32], "lr": 0.001},
        },
        "plan": {"epochs": 3, "batch_size": 64, "seed": 1, "clip": None, "dtype": "float32"},
        "schema": {
            "columns": [
                {"name": "age", "type": "continuous", "mean": 38.5, "std": 13.6},
                {"name": "work", "type": "categorical", "categories": ["private", "state", "self"]},
                {"name": "income", "type": "categorical", "categories": ["<=50K", ">50K", HOSTILE]},
            ],
            "target": "income",
        },
        "data": {"train": {"source": "adult.csv.gz", "rows": 54000}, "test": {"source": "sql://me:secret@host/db", "rows": 10000}},
        "parameters": 123456,
        "trainable": 123000,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 8 * 2**30, "device": "cpu"},
        "command": ["anyfit", "fit", "tabular", "--data", "my data.csv"],
        "forks": [],
        **more,
    }


def fit_events(steps: int = 2400, every: int = 50, names: tuple[str, ...] = ("accuracy", "f1", "auroc")) -> list[dict[str, Any]]:
    draw, events = random.Random(1), []
    for step in range(every, steps + 1, every):
        loss = 0.3 + math.exp(-step / 400) + draw.gauss(0, 0.02)
        logs = {"logs": {"penalty": 1 / step}} if step % 200 == 0 else {}
        events.append({"event": "step", "step": step, "epoch": step // 800, "loss": loss, "lr": 0.001 * (1 - step / steps), **logs})
        if step % (steps // 6) == 0:
            figures: dict[str, Any] = {name: 0.9 - 0.3 * math.exp(-step / 500) - 0.02 * index for index, name in enumerate(names)}
            figures |= {"loss": loss + 0.02, "best": True}
            events.append({"event": "evaluate", "step": step, "epoch": 0, "split": "validation", **figures})
    return [*events, {"event": "stop", "step": steps, "reason": "finished"}]


def result_of(steps: int = 2400, **test: Any) -> dict[str, Any]:
    figures = {"loss": 0.31, "accuracy": 0.87, "f1": 0.81, "rows": 100, "confusion": [[40, 5, 0], [6, 38, 1], [0, 1, 9]], **test}
    best = {"step": 2000, "loss": 0.32}
    splits = {"train": {"loss": 0.29}, "validation": {"loss": 0.32, "accuracy": 0.86, "f1": 0.8, "rows": 6000}, "test": figures}
    return {"stopped": "finished", "steps": steps, "epochs": 3, "seconds": 12.3, "best": best, "splits": splits}


def classification(folder: Path) -> Path:
    forks = [{"step": 1200, "changed": {"lr": [0.001, 0.0005]}}]
    return write_run(folder, record_of(forks=forks), fit_events(), result_of())


def regression(folder: Path) -> Path:
    schema = {"columns": [{"name": "rooms", "type": "continuous"}, {"name": "price", "type": "continuous"}], "target": "price"}
    result = result_of()
    result["splits"] = {"test": {"loss": 0.2, "rmse": 51234.5, "mae": 30211.25, "r2": 0.83, "rows": 500}}
    return write_run(folder, record_of(schema=schema, command=None), fit_events(names=("rmse", "mae", "r2")), result)


def unfinished(folder: Path) -> Path:
    run = write_run(folder, record_of(), fit_events()[:30], None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 1500, "lo')
    return run


def federated(folder: Path, sites: int = 4, rounds: int = 12) -> Path:
    draw, names = random.Random(2), [f"hospital {index}" for index in range(sites)]
    rows = {name: 50 + 90 * index for index, name in enumerate(names)}
    events: list[dict[str, Any]] = []
    for round in range(1, rounds + 1):
        told = {name: {"rows": rows[name], "loss": 0.4 + math.exp(-round / 4) + draw.gauss(0, 0.05)} for name in names}
        loss = sum(entry["loss"] for entry in told.values()) / sites
        events.append({"event": "round", "round": round, "loss": loss, "sites": told, "bytes_up": 4_000_000, "bytes_down": 4_100_000})
        accuracy = 0.9 - 0.4 * math.exp(-round / 4)
        events.append({"event": "evaluate", "round": round, "split": "test", "loss": loss + 0.05, "accuracy": accuracy})
    origins = {name: {"source": f"{name}.csv", "rows": count} for name, count in rows.items()}
    record = record_of("federate", sites=origins, data=origins, strategy={"name": "FedAvg", "values": {"rate": 1.0}})
    result = {
        "stopped": "finished", "steps": rounds, "rounds": rounds, "seconds": 222.0, "best": None,
        "bytes": {"up": 48_000_123, "down": 49_200_456},
        "splits": {"test": {"loss": 0.5, "accuracy": 0.88, "rows": 80, "confusion": [[50, 6], [4, 20]]}},
    }  # fmt: skip
    return write_run(folder, record, events, result)


class Page(HTMLParser):
    """What a browser would find: tags, what they load, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


KINDS: dict[str, Callable[[Path], Path]] = {
    "classification": classification,
    "regression": regression,
    "unfinished": unfinished,
    "federated": federated,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_page_stands_alone_and_runs_nothing(make: Callable[[Path], Path], tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path / "run")))
    assert not {"script", "link", "iframe", "a", "form", "object"} & set(page.tags)
    assert page.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    for load in page.loads:
        picture = base64.b64decode(load.partition(",")[2]).decode()
        assert "<script" not in picture
        assert not re.search(r'href="(?!#)', picture)


def test_page_of_a_classification_shows_all_its_parts(tmp_path: Path) -> None:
    run = classification(tmp_path / "run")
    path = write_report(run)
    text = Page(path).text
    assert path == run / "report.html"
    assert {entry.name for entry in run.glob("*.png")} == {"loss.png", "metrics.png", "confusion.png"}
    assert all(entry.read_bytes().startswith(b"\x89PNG") for entry in run.glob("*.png"))
    for part in ("tabular", "finished", "0.8700", "train loss", "2,400", "12.3 s", "5,321 samples/s", "best step", "batch_size", "hidden"):
        assert part in text
    for part in ("87 of 100 rows right", "0.7902 to 0.9224", "adult.csv.gz", "mean 38.50", "target", "8.0 GiB", "2.13.0+cpu", "0.0005"):
        assert part in text
    assert "anyfit fit tabular --data 'my data.csv'" in text
    assert HOSTILE in text
    assert "unfinished" not in text


def test_names_from_data_never_become_markup(tmp_path: Path) -> None:
    hostile = '"><img src=x onerror=alert(1)>'
    run = classification(tmp_path / "run")
    record = record_of(
        task={"reference": hostile, "class": hostile, "values": {hostile: hostile}},
        plan={hostile: hostile},
        data={hostile: {"source": hostile, "rows": 1}},
        versions={hostile: hostile},
        hardware={hostile: hostile},
        command=[hostile],
        sites={hostile: {"rows": 3}},
        forks=[{"step": hostile, "changed": {hostile: [hostile, hostile]}}],
        schema={"columns": [{"name": hostile, "type": hostile, "categories": [hostile, "b", "\x00\n"]}], "target": hostile},
    )
    (run / "run.json").write_text(json.dumps(record))
    event = {"event": "evaluate", "step": 2400, "split": hostile + "\ud800", hostile: 1.0, "sites": {hostile: {"loss": 1.0}}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    page = Page(write_report(run))
    assert page.tags.count("img") == 8
    assert "script" not in page.tags
    assert all(load.startswith("data:image/") for load in page.loads)
    assert page.text.count(hostile) >= 12


def test_passwords_in_sources_are_not_shown(tmp_path: Path) -> None:
    text = write_report(classification(tmp_path / "run")).read_text()
    assert "secret" not in text
    assert "sql://me:***@host/db" in text


def test_scores_of_classes_come_from_the_confusion(tmp_path: Path) -> None:
    rows = re.findall(r"<tr.*?</tr>", write_report(classification(tmp_path / "run")).read_text())
    cells = {found[0]: found[1:] for row in rows if len(found := re.findall(r">([^<]+)</t[hd]>", row)) == 5}
    assert cells["&lt;=50K"] == ["0.8696", "0.8889", "0.8791", "45"]
    assert cells["mean of classes"] == ["0.8777", "0.8778", "0.8777", "100"]


def test_class_that_is_never_predicted_has_no_precision(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record_of(), [], result_of(confusion=[[3, 0, 0], [2, 0, 0], [0, 0, 0]]))
    assert '<td class="number">\N{EN DASH}</td>' in write_report(run).read_text()


def test_unfinished_and_torn_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    text = Page(write_report(run)).text
    assert "This run is unfinished: its records end at step 1,350" in text
    assert f"anyfit fit tabular --data 'my data.csv' --run {run} --resume" in text
    assert "One line of metrics.jsonl could not be read" in text
    assert summary(run)["finished"] is False
    assert summary(run)["steps"] == 1350
    assert summary(run)["splits"]["validation"]["accuracy"] == pytest.approx(0.9 - 0.3 * math.exp(-1200 / 500))


def test_result_of_before_a_resume_is_not_taken_for_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record_of(), fit_events(steps=4800), result_of(steps=2400))
    assert "unfinished" in Page(write_report(run)).text


def test_run_of_which_nothing_but_its_record_is_left_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"format": 1, "task": {"reference": None, "class": "notebook:Mine"}}))
    (run / "loss.png").write_bytes(b"of an earlier life")
    text = Page(write_report(run)).text
    assert "notebook:Mine" in text
    assert "no step is recorded yet" in text
    assert not (run / "loss.png").exists()


def test_regression_has_a_sentence_in_place_of_a_matrix(tmp_path: Path) -> None:
    run = regression(tmp_path / "run")
    text = Page(write_report(run)).text
    assert not (run / "confusion.png").exists()
    assert "no classes to confuse" in text
    assert "51,234.50" in text
    assert "started from Python" in text


@pytest.mark.parametrize("sites", [1, 4, 150])
def test_federated_run_has_a_row_for_each_site(sites: int, tmp_path: Path) -> None:
    run = federated(tmp_path / "run", sites)
    page = Page(write_report(run))
    assert (run / "sites.png").is_file()
    assert all(f"hospital {index}" in page.text for index in range(min(sites, 100)))
    assert ("The first 100 of 150 sites." in page.text) == (sites == 150)
    assert "48.0 MB up, 49.2 MB down" in page.text
    assert "FedAvg" in page.text
    assert summary(run)["rounds"] == 12
    assert "steps" not in summary(run)


def dealt(run: Path, sites: int, classes: int, rows: int = 12) -> None:
    """Add to a run's record that one data set was dealt to its sites."""
    draw, record = random.Random(3), json.loads((run / "run.json").read_text())
    counts = {f"hospital {site}": {f"kind {label}": draw.randrange(rows) for label in range(classes)} for site in range(sites)}
    sizes = {"lowest": 3, "median": 7.0, "highest": 2400}
    record["partition"] = {"how": "dirichlet:0.5", "seed": 11, "sites": sites, "rows_per_site": sizes, "counts": counts}
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("sites", "classes"), [(1, 1), (4, 3), (4, 10), (30, 10), (100, 2), (150, 40)])
def test_partition_has_a_picture_in_colours_that_turn_dark(sites: int, classes: int, tmp_path: Path) -> None:
    run = federated(tmp_path / "run", 4)
    dealt(run, sites, classes)
    page = Page(write_report(run))
    assert (run / "partition.png").stat().st_size > 5000
    caption = f"dealt to {sites} sites by dirichlet:0.5, seed 11. A site has 3 to 2,400 rows, in the middle 7."
    assert caption in page.text
    assert ("100 sites are shown, evenly picked." in page.text) == (sites > 100)
    light = [svg_of(load) for load in page.loads[::2]]
    assert all(set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {_INK, _MUTED, _GRID, _PAPER, *_COLOURS} for svg in light)
    assert any("<!-- share of site" in svg for svg in light) == (classes > 8 or (sites > 40 and classes > 1))
    assert (run / "report.html").stat().st_size < 2_000_000
    (run / "run.json").write_text(json.dumps(record_of("federate")))
    write_report(run)
    assert not (run / "partition.png").exists()


def svg_of(load: str) -> str:
    return base64.b64decode(load.partition(",")[2]).decode()


@pytest.mark.parametrize("value", [3, "x", [1], {"counts": 3}, {"counts": {"a": 1}}, {"counts": {"a": {"b": -1, "c": "x", "d": True}}}])
def test_partition_that_says_nothing_has_no_picture(value: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record_of("federate", partition=value, privacy=value), [], {"fairness": value, "comparison": value})
    write_report(run)
    assert not (run / "partition.png").exists()


def test_partition_of_empty_sites_is_drawn(tmp_path: Path) -> None:
    counts = {"a": dict.fromkeys(map(str, range(9)), 0), "b": dict.fromkeys(map(str, range(9)), 0)}
    run = write_run(tmp_path / "run", record_of("federate", partition={"counts": counts}), [], None)
    write_report(run)
    assert (run / "partition.png").exists()


def test_many_sites_are_a_band_their_median_and_the_worst(tmp_path: Path) -> None:
    few, many = federated(tmp_path / "few" / "run", 30), federated(tmp_path / "many" / "run", 31)
    sizes = [write_report(run).stat().st_size for run in (few, many)]
    assert sizes[1] < 0.7 * sizes[0]
    assert [_quantile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]
    assert _quantile([5.0], 0.9) == 5


def test_epsilon_of_each_round_is_drawn_apart_from_metrics(tmp_path: Path) -> None:
    run = federated(tmp_path / "run", 3)
    events = [{"event": "round", "round": round, "loss": 0.5, "epsilon": 0.25 * round} for round in range(1, 13)]
    record = record_of("federate", privacy={"unit": "site", "epsilon": 4.0, "delta": 1e-5})
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = Page(write_report(run)).text
    assert (run / "privacy.png").stat().st_size > 5000
    assert not (run / "metrics.png").exists()
    assert "than epsilon allows: 3.0000 at round 12." in text
    for part in ("Privacy", "What was asked for", "delta", "1e-05"):
        assert part in text


def test_fairness_comparison_and_notes_are_tables(tmp_path: Path) -> None:
    run = federated(tmp_path / "run", 130)
    record, result = (json.loads((run / name).read_text()) for name in ("run.json", "result.json"))
    record["sites"]["hospital 1"]["notes"] = ["one class only", HOSTILE]
    record["sites"]["hospital 129"]["notes"] = ["few rows"]
    spread = {"mean": 0.84, "lowest": 0.615, "highest": 0.97, "deviation": 0.08, "worst_site": "hospital 7"}
    result |= {
        "fairness": {"accuracy": spread, "odd": 3},
        "comparison": [{"what": "federated", "accuracy": 0.874}, {"what": HOSTILE, "accuracy": 0.712, "loss": 0.93}, 3, {"accuracy": 1.0}],
    }
    (run / "run.json").write_text(json.dumps(record))
    (run / "result.json").write_text(json.dumps(result))
    text = Page(write_report(run)).text
    assert (run / "comparison.png").stat().st_size > 5000
    for part in ("Differences between sites", "0.6150", "hospital 7", "Comparison", "0.7120", "0.9300", f"one class only; {HOSTILE}"):
        assert part in text
    assert "few rows" in text
    assert "The first 100 of 130 sites, and others with notes." in text


def test_traffic_and_metrics_of_each_site_are_shown_where_told(tmp_path: Path) -> None:
    run = federated(tmp_path / "run")
    told = {"hospital 1": {"rows": 140, "loss": 0.5, "bytes_up": 2500, "bytes_down": 1}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "round", "round": 12, "loss": 0.5, "sites": told}) + "\n")
        file.write(json.dumps({"event": "evaluate", "round": 12, "split": "test", "sites": {"hospital 1": {"accuracy": 0.75}}}) + "\n")
    text = Page(write_report(run)).text
    assert "2.5 kB" in text
    assert "last test accuracy" in text


def cells_of(path: Path) -> dict[str, list[str]]:
    """The texts of each row in the part about sites, by the first."""
    part = path.read_text().split("<h2>Sites</h2>")[1].split("</section>")[0]
    rows = [re.findall(r"<t[hd].*?</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)]
    return {found[0]: found[1:] for row in rows if (found := [re.sub("<[^>]*>", "", cell) for cell in row])}


def test_rows_of_a_site_are_those_it_trains_on(tmp_path: Path) -> None:
    run = federated(tmp_path / "run", 2, rounds=1)
    held_back = {"hospital 0": {"rows": 30, "accuracy": 0.75}, "hospital 1": {"rows": 10, "accuracy": 0.5}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "evaluate", "round": 1, "split": "validation", "loss": 0.5, "sites": held_back}) + "\n")
    cells = cells_of(write_report(run))
    assert cells["hospital 0"][:3] == ["50", "26.3%", "1"]
    assert cells["hospital 1"][:3] == ["140", "73.7%", "1"]


def test_where_sites_are_protected_the_page_does_not_say_who_took_part(tmp_path: Path) -> None:
    run, events = federated(tmp_path / "run", 3), []
    for round in range(1, 4):
        told = {f"hospital {index}": {"loss": 0.5, "accuracy": 0.7 + 0.1 * index} for index in range(3)}
        line = {"sites": {}, "answered": 2, "epsilon": 0.5 * round, "clip": 1.0, "bytes_up": 100, "bytes_down": 300}
        events += [{"event": "round", "round": round, **line}]
        events += [{"event": "evaluate", "round": round, "split": "validation", "loss": 0.5, "accuracy": 0.8, "sites": told}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "run.json").write_text(json.dumps(record_of("federate", sites={f"hospital {index}": {"rows": 100} for index in range(3)})))
    cells = cells_of(write_report(run))
    assert cells["hospital 2"][:3] == ["100", "33.3%", "\N{EN DASH}"]
    assert "0.9000" in cells["hospital 2"]


@pytest.mark.parametrize(("columns", "more"), [(5, None), (6, "1 more column."), (21, "16 more columns.")])
def test_picture_of_a_comparison_has_all_rows_and_four_sites(columns: int, more: str | None, tmp_path: Path) -> None:
    run = federated(tmp_path / "run", 2)
    names = ["all", *(f"hospital {index}" for index in range(columns - 1))]
    lines = [{"what": what} | {name: 0.5 + 0.01 * place for place, name in enumerate(names)} for what in ("federated", "pooled rows")]
    result = json.loads((run / "result.json").read_text())
    result |= {"comparison": lines, "compared": {"figure": "accuracy", "split": "test"}}
    (run / "result.json").write_text(json.dumps(result))
    page = Page(write_report(run))
    picture = next(svg for svg in map(svg_of, page.loads[::2]) if "<!-- pooled rows -->" in svg)
    assert all(f"<!-- {name} -->" in picture for name in names[:5])
    assert not any(f"<!-- {name} -->" in picture for name in names[5:])
    assert "accuracy on test rows." in page.text
    assert ("The table has" in page.text) == (more is not None)
    assert more is None or f"The table has {more}" in page.text


def test_worst_site_has_the_lowest_score_or_the_highest_error() -> None:
    figures = {"accuracy": 0.9, "macro_f1": 0.9, "r2": 0.9, "loss": 0.9, "rmse": 0.9, "calibration_error": 0.9, "perplexity": 0.9}
    worst = {name: told["worst_site"] for name, told in fairness({"high": figures, "low": dict.fromkeys(figures, 0.1)}).items()}
    scores = {"accuracy", "macro_f1", "r2"}
    assert worst == {name: "low" if name in scores else "high" for name in figures}


def test_losses_that_are_not_finite_are_told_and_left_out(tmp_path: Path) -> None:
    events = fit_events()
    events[3]["loss"], events[5]["loss"] = math.nan, math.inf
    run = write_run(tmp_path / "run", record_of(), events, result_of(loss=math.nan, accuracy=None))
    assert "The loss was not finite at step 200" in Page(write_report(run)).text
    assert summary(run)["splits"]["test"]["loss"] is None
    json.dumps(summary(run), allow_nan=False)


def test_curve_of_one_point_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record_of(), [{"event": "step", "step": 1, "loss": 0.5, "lr": 0.1}], None)
    write_report(run)
    assert (run / "loss.png").stat().st_size > 5000


def test_too_many_classes_have_a_table_but_no_picture(tmp_path: Path) -> None:
    size = 120
    matrix = [[9 if row == column else int((row * 7 + column) % 31 == 0) for column in range(size)] for row in range(size)]
    run = write_run(tmp_path / "run", record_of(), fit_events(), result_of(confusion=matrix))
    text = Page(write_report(run)).text
    assert not (run / "confusion.png").exists()
    assert "With 120 classes a confusion matrix is too large to read" in text
    assert "The 100 of 120 classes with the lowest F1." in text


def test_equal_records_give_equal_pages_byte_for_byte(tmp_path: Path) -> None:
    pages = [write_report(classification(tmp_path / name / "run")).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]
    assert (tmp_path / "a/run/loss.png").read_bytes() == (tmp_path / "b/run/loss.png").read_bytes()


def test_summary_is_strict_json_with_figures_by_split(tmp_path: Path) -> None:
    seen = summary(classification(tmp_path / "run"))
    json.dumps(seen, allow_nan=False)
    assert seen["task"] == "tabular"
    assert seen["best"] == {"step": 2000, "loss": 0.32}
    assert list(seen["splits"]) == ["test", "validation", "train"]
    assert seen["splits"]["test"] == {"loss": 0.31, "accuracy": 0.87, "f1": 0.81}
    assert (seen["steps"], seen["epochs"], seen["stopped"], seen["finished"]) == (2400, 3, "finished", True)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"format": 2, "task": {"reference": "image"}}', '{"format": 1}', "[" * 100_000])
def test_missing_or_malformed_record_names_the_path(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    for read in (write_report, summary):
        with pytest.raises(InputError, match=re.escape(str(tmp_path))):
            read(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], {"a": None}, [[1]], True])
def test_record_with_odd_entries_still_gives_a_page(value: Any, tmp_path: Path) -> None:
    record = dict.fromkeys(record_of("federate", sites={}, strategy={}), value)
    record |= {"format": 1, "task": {"reference": "image", "values": value}}
    events = [dict.fromkeys((*event, "sites", "logs"), value) | {"event": event["event"], "step": 1} for event in fit_events()[:12]]
    splits = {"test": value, "validation": {"confusion": value, "rows": value, "loss": value}}
    for result in ({"splits": value, "best": value, "bytes": value}, {"splits": splits}):
        run = write_run(tmp_path / str(len(result)), record, events, result)
        json.dumps(summary(run), allow_nan=False)
    write_report(run)


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(float(step), math.sin(step / 900)) for step in range(100_000)]
    points[50_321] = (50_321.0, 9.0)
    kept = _thin(points)
    assert len(kept) <= 2_002
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[50_321] in kept
    assert kept == sorted(kept)
    assert _thin(points[:2000]) == points[:2000]


def test_smoothing_leaves_a_straight_line_straight() -> None:
    line = [(float(step), 2.0 * step) for step in range(500)]
    assert [value for _, value in _smooth(line)] == pytest.approx([value for _, value in line])


def test_long_run_stays_small_and_fast(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record_of(), fit_events(60_000, every=1), result_of(60_000))
    assert write_report(run).stat().st_size < 1_500_000


def test_reading_a_run_loads_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    run = classification(tmp_path / "run")
    code = f"import sys; from anyfit.report import summary; from pathlib import Path; summary(Path({str(run)!r})); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib"} & set(found)
