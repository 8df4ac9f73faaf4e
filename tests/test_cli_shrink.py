"""anyfit shrink: one command from a trained run to C that was compiled and run, and what bad input gets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import anyfit as package
from anyfit.cli import main
from anyfit.cli.demo import SEED, _shrink, _sites
from anyfit.data import Source, read_splits
from anyfit.errors import InputError, RunError, TaskError
from anyfit.shrink import compiled
from anyfit.state import State
from anyfit.tasks.shrunk import Pruned, Quantized


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Outcome]
needs_cc = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")


@pytest.fixture
def anyfit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyfit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits, which was tested on a fifth of them."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    task = package.Image(channels=8, hidden=32)
    package.fit(task, "digits", test=0.2, epochs=6, batch_size=32, seed=1, run=folder)
    return folder


class Made(NamedTuple):
    path: Path
    told: Outcome


@pytest.fixture(scope="module")
def made(digits: Path) -> Made:
    """What the command makes of it: half the channels, some zeros, int8, C and ONNX."""
    command = ["shrink", digits, "--structured", 0.5, "--prune", 0.3, "--quantize", "int8", "--finetune", 2]
    command += ["--set", "batch_size=32", "--run", digits.parent / "small"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["anyfit", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return Made(digits.parent / "small", Outcome(int(stopped.value.code or 0), out.getvalue(), err.getvalue()))


@pytest.fixture
def small(made: Made) -> Path:
    return made.path


def stages(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: {**stage, **stage["metrics"], **stage["costs"]} for stage in told["stages"]}


def only_messages(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    for part in parts:
        assert part in outcome.err


# ------------------------------------------------------------------ the command


@needs_cc
def test_one_command_ends_in_c_that_was_compiled_run_and_compared(made: Made) -> None:
    done = made.told
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["stage", "accuracy", "parameters", "not", "zero", "bytes", "RAM", "MACs", "us/row"]
    assert [line.split("  ")[0] for line in lines[2:8]] == ["original", "structured 50 %", "pruned 30 %", "int8", "c", "onnx"]
    int8, c = lines[5].split(), lines[6].split()
    assert c[1] == int8[1] and float(c[1]) > 0.5, "the C is as good as the integers"
    assert int8[4] == f"~{c[4]}" and int8[5] == f"~{c[5]}", "what was estimated is what was measured"
    assert "in each answer and logit of 355 rows" in done.out
    assert "note: structured 50 %: accuracy" in done.err and "stop: finished" in done.err
    names = {path.name for path in made.path.iterdir()}
    assert {"run.json", "result.json", "shrink.json", "memory.png", "tradeoff.png", "report.html", "checkpoints", "export"} <= names
    assert {path.name for path in (made.path / "export").iterdir()} == {"image_model.c", "image_model.h", "main.c", "image_model.onnx"}


@needs_cc
def test_json_says_of_each_figure_whether_it_was_measured(anyfit: Command, digits: Path, tmp_path: Path) -> None:
    done = anyfit("shrink", digits, "--prune", 0.5, "--quantize", "int8", "--name", "digits", "--run", "o", "--quiet", "--json")
    assert done.code == 0 and done.err == "" and len(done.out.splitlines()) == 1
    found = stages(done.json)
    kinds = {
        name: {key: value["kind"] for key, value in stage.items() if isinstance(value, dict) and "kind" in value}
        for name, stage in found.items()
    }
    assert kinds["original"]["weights_bytes"] == kinds["original"]["macs"] == kinds["int8"]["ram_bytes"] == "estimated"
    assert kinds["original"]["accuracy"] == kinds["original"]["latency_us"] == "measured"
    assert "latency_us" not in kinds["int8"], "simulated int8 runs nowhere"
    assert set(kinds["c"].values()) == set(kinds["onnx"].values()) == {"measured"}
    assert found["c"]["equal"] == {"rows": 355, "answers": True, "logits": True}
    assert found["onnx"]["agreement"]["answers"] > 0.98
    assert found["pruned 50 %"]["nonzero"]["value"] < 0.6 * found["original"]["nonzero"]["value"]
    (artifact,) = [artifact for artifact in done.json["artifacts"] if artifact["kind"] == "c"]
    assert artifact["flash_bytes"] == found["c"]["weights_bytes"]["value"] and artifact["ram_bytes"] == found["c"]["ram_bytes"]["value"]
    assert done.json["files"][0] == "o/export/digits.c" and (tmp_path / done.json["files"][0]).is_file()
    assert any("C stores zeros" in note for note in done.json["notes"])


@needs_cc
def test_the_files_compute_what_was_told_when_another_program_compiles_them(small: Path, tmp_path: Path) -> None:
    told = json.loads((small / "shrink.json").read_text())
    test = read_splits(Source("digits"), None, 0.2, wants_validation=False)["test"]
    pixels, truth = np.stack(test["image"].combine_chunks().to_numpy_ndarray()), np.array(test["target"].to_pylist())
    binary = compiled.build(small / "export", "image_model", tmp_path, sanitize=True)
    ran = compiled.run(binary, pixels.astype(np.uint8), 10)
    assert float((ran.answers == truth).mean()) == pytest.approx(stages(told)["c"]["accuracy"]["value"], abs=1e-9)


def test_a_shrunk_run_is_a_run(anyfit: Command, small: Path, tmp_path: Path) -> None:
    task, _ = package.open_run(small)
    assert isinstance(task, Quantized) and isinstance(task.task, Pruned) and isinstance(task.task.task, Pruned)
    told = stages(json.loads((small / "shrink.json").read_text()))
    test = read_splits(Source("digits"), None, 0.2, wants_validation=False)["test"]
    assert package.evaluate(small, test)["accuracy"] == told["int8"]["accuracy"]["value"]
    assert json.loads((small / "result.json").read_text())["splits"]["test"]["accuracy"] == told["int8"]["accuracy"]["value"]
    assert anyfit("evaluate", small, "--data", "digits", "--json").json["rows"] == 1797
    assert anyfit("predict", small, "--data", "digits", "--out", "p.csv", "--json").json["rows"] == 1797
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert {row["prediction"] for row in rows} <= set("0123456789")
    shown = anyfit("show", small, "--json").json
    assert shown["kind"] == "shrink" and shown["task"] == "image, pruned, pruned, quantized" and shown["finished"]


def test_the_record_names_what_it_was_made_from(digits: Path, small: Path) -> None:
    record = json.loads((small / "run.json").read_text())
    parent = record["shrink"]["parent"]
    assert parent["run"] == str(digits)
    (weights,) = sorted((digits / "checkpoints").glob("*.safetensors"))[-1:]
    assert parent["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["data"]["train"]["source"] == "digits" and record["data"]["test"]["rows"] == 355
    before = json.loads((digits / "run.json").read_text())["data"]
    assert record["data"]["test"]["sha256"] == before["test"]["sha256"]


def test_shrinking_goes_on_from_a_shrunk_run(anyfit: Command, digits: Path, tmp_path: Path) -> None:
    first = anyfit("shrink", digits, "--prune", 0.5, "--export", "none", "--run", "sparse", "--quiet", "--json")
    second = anyfit("shrink", "sparse", "--quantize", "int8", "--export", "none", "--run", "int8", "--quiet", "--json")
    assert first.code == second.code == 0
    assert stages(second.json)["original"]["accuracy"] == stages(first.json)["pruned 50 %"]["accuracy"], "on the same rows, found again"
    assert not (tmp_path / "int8/export").exists()
    third = anyfit("shrink", "int8", "--export", "onnx", "--run", "exported", "--quiet", "--json")
    assert [stage["form"] for stage in third.json["stages"]] == ["int8", "onnx"]


def test_without_a_compiler_the_table_says_so_and_all_else_goes_on(
    anyfit: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    done = anyfit("shrink", digits, "--quantize", "int8", "--export", "c", "--run", "o", "--quiet")
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if line.startswith("c "))
    assert "not compiled: no cc ('no-such-compiler'" in line and re.search(r"~[\d,]+ +~[\d,]+", line)
    assert "in each answer" not in done.out and (tmp_path / "o/export/image_model.c").is_file()
    assert "not compiled: no cc" in (tmp_path / "o/report.html").read_text()
    (told,) = json.loads((tmp_path / "o/shrink.json").read_text())["artifacts"]
    assert told["compiled"] is False


def test_the_page_shows_stages_pictures_and_files(small: Path, anyfit: Command) -> None:
    page = (small / "report.html").read_text()
    assert "<h1>image, pruned, pruned, quantized</h1>" in page
    for words in ("structured 50 %", "export/image_model.c", "Memory of one prediction", "accuracy against bytes", "≈ "):
        assert words in page
    (small / "memory.png").unlink()
    assert anyfit("report", small).code == 0 and (small / "memory.png").is_file() and (small / "report.html").read_text() == page


def test_the_page_of_a_run_whose_record_is_torn_says_so(small: Path, anyfit: Command, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "torn")
    (tmp_path / "torn/shrink.json").write_text('{"stages": [')
    assert anyfit("report", "torn").code == 0
    assert "shrink.json is missing or torn" in (tmp_path / "torn/report.html").read_text()
    assert not (tmp_path / "torn/tradeoff.png").exists()


# ------------------------------------------------------------------ bad input


BAD = {
    "a share of one": (("--prune", 1.0), "prune (=1.0) must be above 0 and below 1"),
    "a share of nothing": (("--structured", 0.0), "structured (=0.0) must be above 0 and below 1"),
    "another type": (("--quantize", "int4"), "quantize (='int4') must be int8"),
    "another export": (("--prune", 0.5, "--export", "c,elf"), "export (='elf') must be one of c, onnx"),
    "C of floats": (("--prune", 0.5, "--export", "c"), "export (='c') needs quantize='int8'"),
    "no name of C": (("--quantize", "int8", "--name", "my-net"), "name (='my-net') must be a C identifier"),
    "a word of C": (("--quantize", "int8", "--name", "float"), "name (='float') is a word of C"),
    "nothing to do": ((), "there is nothing to do"),
    "less than no training": (("--prune", 0.5, "--finetune", -1), "finetune (=-1)"),
    "scales of nothing": (("--prune", 0.5, "--power-of-two",), "power_of_two is about int8 scales"),
    "no rows to calibrate": (("--quantize", "int8", "--calibration", 0), "calibration (=0)"),
    "no such data": (("--quantize", "int8", "--data", "gone.csv"), "gone.csv"),
    "no such field": (("--quantize", "int8", "--set", "lrr=1"), "lrr is no field of Image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str, anyfit: Command, digits: Path, tmp_path: Path) -> None:
    options, message = BAD[case]
    only_messages(anyfit("shrink", digits, *options, "--run", "o", "--quiet"), message)
    assert not (tmp_path / "o").exists()


def test_a_folder_that_holds_something_is_refused(anyfit: Command, digits: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/mine.txt").write_text("mine")
    before = sorted(path.name for path in small.iterdir())
    only_messages(anyfit("shrink", digits, "--prune", 0.5, "--run", "o"), "is a folder with other files")
    only_messages(anyfit("shrink", digits, "--prune", 0.5, "--run", small), "holds a run already")
    only_messages(anyfit("shrink", digits, "--prune", 0.5, "--run", digits), "is the run that is to be shrunk")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in small.iterdir()) == before


def test_what_is_quantized_is_not_quantized_or_pruned_again(anyfit: Command, small: Path) -> None:
    only_messages(anyfit("shrink", small, "--quantize", "int8", "--run", "o"), "quantize: the network is quantized already")
    only_messages(anyfit("shrink", small, "--prune", 0.9, "--run", "o"), "prune: the network is quantized already")


def test_rows_that_are_not_there_any_more_are_asked_for(anyfit: Command, tmp_path: Path) -> None:
    lines = [f"{i % 7},{i % 5},{'yes' if (i % 7) > 3 else 'no'}" for i in range(300)]
    (tmp_path / "rows.csv").write_text("a,b,answer\n" + "\n".join(lines) + "\n")
    fitted = anyfit(
        "fit", "tabular", "--data", "rows.csv", "--target", "answer", "--test", 0.3, "--epochs", 8, "--run", "r", "--quiet", "--json"
    )
    done = anyfit("shrink", "r", "--quantize", "int8", "--export", "none", "--run", "ok", "--quiet", "--json")
    assert done.code == 0, done.err
    assert stages(done.json)["original"]["accuracy"]["value"] == fitted.json["test"]["accuracy"], "the same test rows, by their hash"
    untested = anyfit("fit", "tabular", "--data", "rows.csv", "--target", "answer", "--epochs", 1, "--run", "u", "--quiet", "--json")
    assert untested.code == 0
    only_messages(anyfit("shrink", "u", "--prune", 0.5, "--run", "o"), "--test is missing")
    (tmp_path / "rows.csv").rename(tmp_path / "moved.csv")
    only_messages(anyfit("shrink", "r", "--prune", 0.5, "--run", "o"), "--data is missing", "rows.csv, which is not there now")
    assert anyfit("shrink", "r", "--prune", 0.5, "--data", "moved.csv", "--run", "o", "--export", "none", "--quiet").code == 0
    (tmp_path / "moved.csv").write_text("a,b,answer\n" + "\n".join(lines[:100]) + "\n")
    only_messages(anyfit("shrink", "r", "--prune", 0.5, "--data", "moved.csv", "--run", "p"), "--test is missing", "not found in moved.csv")


@needs_cc
def test_a_table_goes_through_c_as_raw_columns(anyfit: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ages, hours = generator.uniform(18, 90, 400), generator.normal(40, 12, 400)
    kinds = generator.choice(["a", "b", "c"], 400)
    answers = np.where((ages > 45) ^ (kinds == "b"), "old", "young")
    spelled = ["" if index % 9 == 0 else f"{hours[index]:.3f}" for index in range(400)]  # missing ones too
    lines = [f"{age:.2f},{hour},{kind},{answer}" for age, hour, kind, answer in zip(ages, spelled, kinds, answers, strict=True)]
    (tmp_path / "rows.csv").write_text("age,hours,kind,answer\n" + "\n".join(lines) + "\n")
    anyfit(
        "fit",
        "tabular",
        "--data",
        "rows.csv",
        "--target",
        "answer",
        "--test",
        0.3,
        "--epochs",
        30,
        "--batch-size",
        32,
        "--run",
        "r",
        "--quiet",
    )
    done = anyfit("shrink", "r", "--quantize", "int8", "--export", "c", "--run", "o", "--quiet", "--json")
    found = stages(done.json)
    assert found["c"]["equal"]["rows"] > 80 and found["int8"]["accuracy"]["value"] > 0.8
    assert abs(found["c"]["accuracy"]["value"] - found["int8"]["accuracy"]["value"]) < 0.03, "raw columns are folded in, in float32"


def test_a_text_task_is_refused_by_what_cannot_be_lowered(anyfit: Command, tmp_path: Path) -> None:
    words = ["good fine nice", "bad poor sad"]
    (tmp_path / "rows.csv").write_text(
        "text,mood\n" + "".join(f"{words[i % 2]} {i % 11},{'up' if i % 2 == 0 else 'down'}\n" for i in range(120))
    )
    anyfit(
        "fit",
        "text-rnn",
        "--data",
        "rows.csv",
        "--target",
        "mood",
        "--type",
        "text=text",
        "--test",
        0.2,
        "--steps",
        2,
        "--run",
        "r",
        "--quiet",
    )
    only_messages(anyfit("shrink", "r", "--quantize", "int8", "--finetune", 1, "--run", "o"), "int8 form")
    assert not (tmp_path / "o").exists()
    assert anyfit("shrink", "r", "--prune", 0.5, "--run", "o", "--export", "none", "--quiet").code == 0


def test_the_folder_of_a_federation_is_shrunk_with_rows_that_are_given(anyfit: Command, tmp_path: Path) -> None:
    sites = ("--data", "digits", "--partition", "iid", "--num-sites", 3)
    anyfit("federate", "image", *sites, "--rounds", 1, "--test", 0.2, "--set", "channels=4", "--run", "f", "--quiet")
    only_messages(anyfit("shrink", "f", "--quantize", "int8", "--run", "o"), "--data is missing", "names no rows of its own")
    done = anyfit(
        "shrink", "f", "--quantize", "int8", "--data", "digits", "--test", 0.1, "--run", "o", "--export", "none", "--quiet", "--json"
    )
    assert done.code == 0 and [stage["stage"] for stage in done.json["stages"]] == ["original", "int8"]


# ------------------------------------------------------------------ the verb


@pytest.fixture(scope="module")
def sites_of_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Source], Source]:
    return _sites(tmp_path_factory.mktemp("demo"))


def test_sites_train_and_calibrate_and_what_they_moved_is_told(sites_of_demo: Any, tmp_path: Path) -> None:
    sites, test = {name: Source(source.origin.slice(0, 150)) for name, source in sites_of_demo[0].items()}, sites_of_demo[1]
    run = package.federate(package.Image(channels=8, hidden=16), sites, rounds=5, epochs=3, batch_size=32, seed=SEED, test=test)
    told = _shrink(run, sites, test, tmp_path / "o")
    assert told["accuracy"] > run.splits["test"]["accuracy"] - 0.15 and told["bytes_moved"] > 0
    assert told["checked"] == ("equal to the integers in 355 rows" if compiled.compiler() else "not compiled: no cc")
    assert Path(told["report"]).is_file()
    task, _ = package.open_run(tmp_path / "o")
    assert isinstance(task, Quantized)


def test_the_demo_goes_on_without_a_compiler(sites_of_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    sites, test = {name: Source(source.origin.slice(0, 40)) for name, source in sites_of_demo[0].items()}, sites_of_demo[1]
    run = package.federate(package.Image(channels=4, hidden=8), sites, rounds=1, batch_size=32, seed=SEED, test=test)
    told = _shrink(run, sites, test, tmp_path / "o")
    assert told["checked"].startswith("not compiled: no cc") and told["what"].endswith("simulated int8")


def test_without_a_folder_nothing_is_written(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task, state = package.open_run(digits)
    done = package.shrink(task, state, "digits", test=0.2, quantize="int8", export=())
    assert isinstance(done.task, Quantized) and isinstance(done.state, State) and done.path is None
    assert not list(tmp_path.iterdir())


def test_rows_to_compare_on_must_be_named(digits: Path) -> None:
    task, state = package.open_run(digits)
    with pytest.raises(InputError, match="test is missing"):
        package.shrink(task, state, "digits", prune=0.5)
    with pytest.raises(InputError, match="must be a source"):
        package.shrink(task, state, {"a": "digits"}, prune=0.5, test=0.2, fit=partial(package.federate, rounds=1))


def test_an_untrained_network_is_refused(digits: Path) -> None:
    task, state = package.open_run(digits)
    with pytest.raises(InputError, match="untrained"):
        package.shrink(task, State(model=state.model, schema=state.schema), "digits", test=0.2, prune=0.5)


class Gated(package.Task):
    """What no int8 kernel exists for."""

    def build_model(self, schema: package.Schema) -> nn.Module:
        return nn.Linear(64, schema.num_classes)

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        pixels = batch["image"].flatten(1).float() / 16
        logits: torch.Tensor = model(pixels * pixels.softmax(1))
        return logits


def test_what_cannot_be_lowered_is_refused_before_any_training(tmp_path: Path) -> None:
    run = package.fit(Gated(), "digits", test=0.2, epochs=1)
    heard: list[dict[str, Any]] = []
    with pytest.raises(TaskError, match="softmax has no int8 form: return the logits"):
        package.shrink(run.task, run, "digits", test=0.2, prune=0.5, quantize="int8", finetune=1, run=tmp_path / "o", on_event=heard.append)
    assert not [event for event in heard if event["event"] == "step"] and not (tmp_path / "o").exists()


@needs_cc
def test_c_that_differs_from_the_integers_is_an_error_and_leaves_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, state = package.open_run(digits)
    honest = compiled.run

    def wrong(*given: Any) -> compiled.Ran:
        ran = honest(*given)
        if len(ran.logits) > 3:  # not the rehearsal's one row
            ran.logits[3, 0] += 1
        return ran

    monkeypatch.setattr(compiled, "run", wrong)
    with pytest.raises(RunError, match="differs from the integer program in 1 of 355 rows, first in row 3"):
        package.shrink(task, state, "digits", test=0.2, quantize="int8", export=["c"], run=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@needs_cc
def test_a_compiler_that_does_not_work_is_found_before_any_training(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, state = package.open_run(digits)
    heard: list[str] = []
    fakes = {"fails": "exit 3", "writes nothing": "exit 0", "makes what does not run": 'while [ "$1" != -o ]; do shift; done; echo x > $2'}
    for name, script in fakes.items():
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", f"'{fake}'")
        with pytest.raises(RunError, match=r"cannot compile|cannot be run here"):
            package.shrink(
                task, state, "digits", test=0.2, quantize="int8", finetune=50, export=["c"], run=tmp_path / "o",
                on_event=lambda event: heard.append(event["event"]),
            )  # fmt: skip
    assert "start" not in heard and not (tmp_path / "o").exists()
    monkeypatch.setenv("CC", 'gcc "')
    with pytest.raises(InputError, match="cannot be read as a command"):
        package.shrink(task, state, "digits", test=0.2, quantize="int8", export=["c"])


def test_what_others_wrote_is_never_overwritten(digits: Path, tmp_path: Path) -> None:
    task, state = package.quantize(*package.open_run(digits), "digits")
    (tmp_path / "main.c").write_text("int main(void) { return 1; }\n")
    with pytest.raises(InputError, match=r"main.c is there and was not written by anyfit"):
        package.export(task, state, tmp_path / "net.c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main.c"]
    (tmp_path / "main.c").unlink()
    for _ in range(2):  # what anyfit wrote may be written again
        artifact = package.export(task, state, tmp_path / "any.c", name="net")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main.c", "net.c", "net.h"] and artifact.path == tmp_path / "net.c"
    for path in ("foo-bar.c", "main.c"):
        with pytest.raises(InputError, match="name"):
            package.export(task, state, tmp_path / path)


class Lenient(package.Image):
    """Right is what is among the three likeliest."""

    def evaluate(self, model: Any, batches: Any) -> dict[str, Any]:
        pairs = [(self.predict(model, batch), batch["target"]) for batch in batches]
        right = [(out.topk(3).indices == target[:, None]).any(1) for out, target in pairs]
        return {"loss": 0.0, "accuracy": float(torch.cat(right).float().mean())}


def test_stages_are_compared_by_one_measure(tmp_path: Path) -> None:
    run = package.fit(Lenient(channels=4, hidden=12), "digits", test=0.2, epochs=3, batch_size=32, seed=1)
    done = package.shrink(run.task, run, "digits", test=0.2, quantize="int8")
    figures = [stage.value("accuracy") for stage in done.stages]
    assert max(figures) - min(figures) < 0.03 and run.splits["test"]["accuracy"] > max(figures) + 0.02
    assert any("figures are computed of predictions" in note for note in done.notes)


def test_texts_are_exported_as_floats_and_refused_in_int8_by_their_column(tmp_path: Path) -> None:
    rows = [("a very good film that I liked", "y"), ("bad", "n"), ("good", "y"), ("a bad one", "n")] * 15
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "\n".join(f"{text} {number},{label}" for number, (text, label) in enumerate(rows)) + "\n")
    source = Source(str(file), target="label", types={"text": "text"})
    run = package.fit(package.TextCNN(embedding=8, filters=4), source, test=0.2, epochs=2, batch_size=16, seed=1)
    done = package.shrink(run.task, run, source, test=0.2, prune=0.5)
    assert [stage.form for stage in done.stages] == ["float", "float", "onnx"]
    assert done.stages[1].value("accuracy") == done.stages[2].value("accuracy")
    with pytest.raises(TaskError, match=r"column 'text' is text.*tokenizer"):
        package.shrink(run.task, run, source, test=0.2, quantize="int8")


def test_rows_of_a_federation_must_be_named(anyfit: Command) -> None:
    sites = ["--data", "digits", "--partition", "iid", "--num-sites", "2"]
    assert anyfit("federate", "image", *sites, "--rounds", "1", "--set", "channels=4", "--set", "hidden=8", "--run", "f").code == 0
    told = anyfit("shrink", "f", "--data", "digits", "--quantize", "int8", "--run", "o")
    assert told.code == 2 and "--test is missing" in told.err


def test_a_signal_ends_the_chain_and_nothing_is_left(digits: Path, tmp_path: Path) -> None:
    task, state = package.open_run(digits)

    def press(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        package.shrink(task, state, "digits", test=0.2, quantize="int8", finetune=2, export=(), run=tmp_path / "o", on_event=press)
    assert not (tmp_path / "o").exists()
