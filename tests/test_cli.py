"""The command line as people and machines use it: figures, files, exit codes, and what bad input gets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from anyfit.cli import main
from anyfit.tasks import READY


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Run = Callable[..., Outcome]


@pytest.fixture
def anyfit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyfit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


QUICK = ("--epochs", 1, "--quiet", "--json")


@pytest.fixture
def adults(tmp_path: Path) -> Path:
    """A table with numbers, categories, a missing value and two classes."""
    path = tmp_path / "adults.csv"
    lines = [f"{20 + i % 50},{'?' if i % 7 == 0 else 'abc'[i % 3]},{'>50K' if i % 50 > 25 else '<=50K'}" for i in range(400)]
    path.write_text("age,job,income\n" + "\n".join(lines) + "\n")
    return path


def test_fit_writes_a_run_and_prints_one_json_object(anyfit: Run, tmp_path: Path) -> None:
    done = anyfit("fit", "image", "--data", "digits", "--test", 0.2, "--validation", 0.1, "--seed", 1, *QUICK)
    assert done.code == 0 and done.err == ""
    assert done.json["run"] == "runs/image-1"
    assert 0 < done.json["test"]["accuracy"] <= 1 and "loss" in done.json["validation"]
    names = {path.name for path in (tmp_path / "runs/image-1").iterdir()}
    assert {"run.json", "metrics.jsonl", "timings.jsonl", "result.json", "report.html", "checkpoints", "loss.png"} <= names
    assert anyfit("fit", "image", "--data", "digits", *QUICK).json["run"] == "runs/image-2"


def test_a_person_sees_lines_and_a_table(anyfit: Run) -> None:
    done = anyfit("fit", "image", "--data", "digits", "--test", 0.2, "--epochs", 2)
    assert "step 46" in done.err and "loss" in done.err and "stop: finished" in done.err
    assert done.out.splitlines()[0].split() == ["split", "loss", "accuracy", "f1", "rows"]


def test_one_seed_gives_one_result(anyfit: Run) -> None:
    first, second, other = (
        anyfit("fit", "image", "--data", "digits", "--test", 0.2, "--seed", seed, *QUICK).json["test"] for seed in (1, 1, 2)
    )
    assert first == second != other


def test_evaluate_and_predict_read_a_run(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    fitted = anyfit(
        "fit",
        "tabular",
        "--data",
        adults,
        "--target",
        "income",
        "--test",
        adults,
        "--run",
        "r",
        "--epochs",
        20,
        "--batch-size",
        32,
        "--quiet",
        "--json",
    )
    assert fitted.json["test"]["accuracy"] > 0.95
    assert anyfit("evaluate", "r", "--data", adults, "--json").json["accuracy"] == fitted.json["test"]["accuracy"]
    unlabelled = tmp_path / "new.csv"
    unlabelled.write_text("age,job\n22,a\n69,zzz\n,\n")
    assert anyfit("predict", "r", "--data", unlabelled, "--out", "p.csv", "--json").json["rows"] == 3
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["prediction"] for row in rows[:2]] == ["<=50K", ">50K"]
    assert sum(float(rows[2][f"probability {name}"]) for name in ("<=50K", ">50K")) == pytest.approx(1, abs=1e-5)


def test_resume_goes_on_with_the_recorded_values_and_a_change_is_a_fork(anyfit: Run, tmp_path: Path) -> None:
    base = ("fit", "image", "--data", "digits", "--run", "r", "--quiet", "--json")
    anyfit(*base, "--epochs", 1, "--set", "channels=4", "--set", "lr=0.01")
    more = anyfit(*base, "--resume", "--epochs", 2)
    assert more.json["epochs"] == 2
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["task"]["values"]["channels"] == 4 and record["task"]["values"]["lr"] == 0.01
    assert record["forks"] == [{"step": 29, "changed": {"epochs": [1, 2]}}]
    forked = anyfit(*base, "--resume", "--epochs", 3, "--set", "lr=0.5")
    assert json.loads((tmp_path / "r/run.json").read_text())["forks"][1]["changed"]["lr"] == [0.01, 0.5]
    assert forked.code == 0


def test_resume_with_nothing_saved_starts_at_the_beginning(anyfit: Run) -> None:
    done = anyfit("fit", "image", "--data", "digits", "--run", "new", "--resume", *QUICK)
    assert done.code == 0 and done.json["steps"] == 29


def test_weights_go_out_and_in(anyfit: Run, tmp_path: Path) -> None:
    anyfit("fit", "image", "--data", "digits", "--out", "w.safetensors", "--set", "channels=4", *QUICK)
    same = anyfit("fit", "image", "--data", "digits", "--weights", "w.safetensors", "--set", "channels=4", *QUICK)
    assert same.code == 0
    other = anyfit("fit", "image", "--data", "digits", "--weights", "w.safetensors", "--set", "channels=8", *QUICK)
    assert other.code == 2 and "conv1.weight: (4, 1, 3, 3) for (8, 1, 3, 3)" in other.err
    partial = anyfit("fit", "image", "--data", "digits", "--weights", "w.safetensors", "--weights-partial", "--set", "channels=8", *QUICK)
    assert partial.code == 0 and "not copied: conv1.weight (copied 4x1x3x3 of 8x1x3x3)" in partial.err
    torch.save({}, tmp_path / "w.pt")
    pickled = anyfit("fit", "image", "--data", "digits", "--weights", "w.pt", *QUICK)
    assert pickled.code == 2 and "save_file(torch.load('w.pt', weights_only=True)" in pickled.err


def test_federate_over_files(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    lines = adults.read_text().splitlines()
    for name, part in (("a", lines[1:30]), ("b", lines[30:180]), ("c", lines[180:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    sites = [item for name in "abc" for item in ("--site", f"{name}.csv")]
    done = anyfit(
        "federate",
        "tabular",
        *sites,
        "--rounds",
        10,
        "--epochs",
        3,
        "--batch-size",
        16,
        "--target",
        "income",
        "--test",
        adults,
        "--quiet",
        "--json",
    )
    assert done.code == 0 and done.json["test"]["accuracy"] > 0.9
    assert done.json["bytes"]["up"] > 0
    twice = anyfit("federate", "tabular", "--site", "a.csv", "--site", "a.csv", "--rounds", 1, "--json")
    assert twice.code == 2 and "two sites are named 'a'" in twice.err


def test_report_show_tasks_check(anyfit: Run, adults: Path) -> None:
    anyfit("fit", "image", "--data", "digits", "--run", "r", "--test", 0.2, *QUICK)
    assert anyfit("report", "r", "--json").json["report"] == "r/report.html"
    assert "Image" in anyfit("show", "r").out or "image" in anyfit("show", "r").out
    assert set(anyfit("tasks", "--json").json) == set(READY)
    assert anyfit("check", "tabular", "--data", adults, "--target", "income", "--json").json["ok"] is True


TASK_FILE = """
import torch
from torch import nn
import anyfit

class Wrong(anyfit.Task):
    def build_model(self, schema):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, model, batch):
        return model(batch["image"].float())

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["target"], weight=torch.arange(1.0, 11.0).to(outputs)), len(outputs)

class Explodes(Wrong):
    def loss(self, outputs, batch):
        return outputs.sum() * float("nan"), len(outputs)

class TooFew(Wrong):
    def build_model(self, schema):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["target"]), len(outputs)
"""


def test_check_finds_a_wrong_count(anyfit: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK_FILE)
    seen = anyfit("check", "mine.py:Wrong", "--data", "digits", "--json")
    assert seen.code == 1 and any("the count is not the loss's denominator" in problem for problem in seen.json["problems"])


def test_nan_stops_and_names_step_and_batch(anyfit: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK_FILE)
    done = anyfit("fit", "mine.py:Explodes", "--data", "digits", "--run", "r", *QUICK)
    assert done.code == 1 and "loss (=nan) is not finite at step 1 (epoch 0, batch 0)" in done.err
    assert not list((tmp_path / "r/checkpoints").glob("*.safetensors"))


BAD = {
    "missing file": (("--data", "nowhere.csv"), "data (='nowhere.csv') does not exist"),
    "empty file": (("--data", "empty.csv"), "data (='empty.csv') is empty"),
    "header only": (("--data", "header.csv", "--target", "y"), "has no rows"),
    "wrong target": (
        ("--data", "adults.csv", "--target", "wage"),
        "target (='wage') is not a column of adults.csv; the columns are: age, job, income",
    ),
    "one class": (("--data", "one.csv", "--target", "y"), "one class only (a)"),
    "ragged": (("--data", "ragged.csv", "--target", "y"), "cannot be read as a table"),
    "large batch": (
        ("--data", "adults.csv", "--target", "income", "--batch-size", "5000"),
        "batch_size (=5000) is larger than the 400 rows",
    ),
    "unknown field": (("--data", "adults.csv", "--target", "income", "--set", "depth=3"), "depth is no field of Tabular"),
    "wrong type": (("--data", "adults.csv", "--target", "income", "--set", "dropout=high"), "dropout (='high') must be a finite number"),
    "wrong plan type": (
        ("--data", "adults.csv", "--target", "income", "--set", "patience=soon"),
        "patience (='soon') must be a whole number or none",
    ),
    "no equals": (("--data", "adults.csv", "--target", "income", "--set", "dropout"), "--set (='dropout') must be NAME=VALUE"),
    "no cuda": (("--data", "adults.csv", "--target", "income", "--device", "cuda:7"), "device (='cuda:7') is not there"),
    "no device": (("--data", "adults.csv", "--target", "income", "--device", "abacus"), "device (='abacus') must be auto, cpu"),
    "bad fraction": (("--data", "adults.csv", "--target", "income", "--test", "1.5"), "fraction (=1.5) of a split must be between 0 and 1"),
    "unknown type": (
        ("--data", "adults.csv", "--target", "income", "--type", "age=colour"),
        "type (='colour') of column 'age' must be one of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_clear_error(case: str, anyfit: Run, adults: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("x,y\n")
    (tmp_path / "one.csv").write_text("x,y\n" + "1,a\n" * 300)
    (tmp_path / "ragged.csv").write_text("x,y\n1,a\n2,b,c\n")
    options, message = BAD[case]
    done = anyfit("fit", "tabular", *options, "--run", "r", "--quiet", "--json")
    assert message in done.err
    assert done.code == 2
    assert message in done.json["error"]["message"]
    assert not (tmp_path / "r" / "run.json").exists()


def test_unknown_task_and_bad_task_files_are_refused(anyfit: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    for name, message in (
        ("imagine", "ready tasks are image, tabular, text-cnn"),
        ("broken.py:Task", "ZeroDivisionError"),
        ("empty.py:Mine", "has no task 'Mine'; it has: none"),
        ("empty.py", "names a file but no class"),
        ("nowhere.py:Mine", "does not exist"),
        ("no.such.module:Mine", "cannot be imported"),
    ):
        done = anyfit("fit", name, "--data", "digits", *QUICK)
        assert done.code == 2 and message in done.err, name


def test_labels_out_of_range_are_refused(anyfit: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK_FILE)
    done = anyfit("fit", "mine.py:TooFew", "--data", "digits", *QUICK)
    assert done.code == 2 and "a label does not fit the model's outputs" in done.err


def test_a_run_folder_is_never_overwritten(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    anyfit("fit", "image", "--data", "digits", "--run", "r", *QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    again = anyfit("fit", "image", "--data", "digits", "--run", "r", *QUICK)
    assert again.code == 2 and "holds a run already; pass resume" in again.err
    other = anyfit("fit", "tabular", "--data", adults, "--target", "income", "--run", "r", "--resume", *QUICK)
    assert (other.code == 2 and "is no field of Tabular" in other.err) or "is a fit of task" in other.err
    seed = anyfit("fit", "image", "--data", "digits", "--run", "r", "--resume", "--seed", 9, *QUICK)
    assert seed.code == 2 and "seed (=9) was 0" in seed.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    foreign = anyfit("fit", "image", "--data", "digits", "--run", "full", *QUICK)
    assert foreign.code == 2 and "is a folder with other files" in foreign.err
    after = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert before == after


def test_a_torn_checkpoint_is_refused_and_the_last_good_one_named(anyfit: Run, tmp_path: Path) -> None:
    anyfit("fit", "image", "--data", "digits", "--run", "r", "--epochs", 2, "--quiet", "--json")
    older, newest = sorted((tmp_path / "r/checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    torn = anyfit("fit", "image", "--data", "digits", "--run", "r", "--resume", "--epochs", 3, "--quiet", "--json")
    assert torn.code == 2 and f"the last good one is r/checkpoints/{older.name}" in torn.err
    content = bytearray(older.read_bytes())
    content[-3] ^= 1
    older.write_bytes(bytes(content))
    altered = anyfit("fit", "image", "--data", "digits", "--run", "r", "--resume", "--epochs", 3, "--quiet", "--json")
    assert altered.code == 2 and "there is no other" in altered.err


SCRIPT = """
import resource, sys
import torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["anyfit", *{arguments!r}]
from anyfit.cli import main
main()
"""


def test_a_full_disk_stops_the_run_and_loses_nothing(anyfit: Run, tmp_path: Path) -> None:
    base = ["fit", "image", "--data", "digits", "--run", "r", "--quiet", "--json"]
    anyfit(*base, "--epochs", 1)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "r/checkpoints").glob("*.safetensors")}
    # no byte beyond 100 kB fits into any file: what a full disk looks like to a writer
    script = SCRIPT.format(limit=100_000, arguments=[*base, "--resume", "--epochs", "2"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "cannot write r/checkpoints" in done.stderr and "untouched" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "r/checkpoints").glob("*.safetensors")} == kept
    assert anyfit(*base, "--resume", "--epochs", 2).json["epochs"] == 2


HOLD = "import sys, time\nfrom pathlib import Path\nfrom anyfit.run import Folder\nfolder = Folder(Path('r'), resume=True)\nprint('held', flush=True)\ntime.sleep(60)\n"


def test_a_run_in_use_by_another_process_is_refused(anyfit: Run, tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done = anyfit("fit", "image", "--data", "digits", "--run", "r", "--resume", *QUICK)
        assert done.code == 2 and "in use by another process" in done.err
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_exits(name: str, code: int, tmp_path: Path) -> None:
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "anyfit",
        "fit",
        "image",
        "--data",
        "digits",
        "--run",
        "r",
        "--epochs",
        "500",
        "--set",
        "checkpoint_every_s=0.1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    while not list(tmp_path.glob("r/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped by a signal; go on with: --run r --resume" in err
    assert not (tmp_path / "r/result.json").exists()


def test_help_loads_neither_torch_nor_numpy() -> None:
    script = "import sys\nsys.argv = ['anyfit', '--help']\nfrom anyfit.cli import main\ntry: main()\nexcept SystemExit: pass\nprint({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_is_refused_leaves_no_folder(anyfit: Run, tmp_path: Path) -> None:
    assert anyfit("fit", "image", "--data", "digits", "--target", "nothing", "--run", "r").code == 2
    assert not (tmp_path / "r").exists()


def test_data_is_described_published_and_compared(anyfit: Run, tmp_path: Path) -> None:
    rows = [f"{20 + n % 50},{'rare' if n == 7 else 'common'},{n % 2}" for n in range(100)]
    (tmp_path / "a.csv").write_text("\n".join(["age,job,ill", *rows]) + "\n")
    (tmp_path / "b.csv").write_text("\n".join(["age;job;ill;site", *(f"{row.replace(',', ';')};north" for row in rows)]) + "\n")
    seen = anyfit("data", "describe", "--data", "a.csv", "--target", "ill", "--out", "schema.json", "--json").json
    assert seen["rows"] == {"train": 100} and seen["target"] == "ill"
    assert {column["name"]: column["type"] for column in seen["columns"]} == {
        "age": "continuous",
        "job": "categorical",
        "ill": "categorical",
    }
    assert "rare" in anyfit("data", "describe", "--data", "a.csv").out
    told = anyfit("data", "describe", "--data", "a.csv", "--target", "ill", "--published")
    assert "common" in told.out and "rare" not in told.out
    assert "rare" in anyfit("data", "describe", "--data", "a.csv", "--published", "--allow", "job").out
    assert anyfit("data", "compare", "schema.json", "a.csv", "--target", "ill").code == 0
    other = anyfit("data", "compare", "schema.json", "b.csv", "--target", "ill")
    assert other.code == 1 and "column 'site' (categorical) is only in the other" in other.out
    forced = anyfit("data", "describe", "--data", "a.csv", "--type", "age=categorical", "--json").json
    assert forced["columns"][0]["type"] == "categorical"


def test_more_can_be_said_of_the_data(anyfit: Run, tmp_path: Path) -> None:
    rows = [f"{n % 7}|{'unknown' if n % 100 == 0 else n * 1.5}|{n % 3}|{n % 2}" for n in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(["x|z|w|y", *rows]) + "\n", encoding="utf-16")
    base = ("fit", "tabular", "--data", "t.csv", "--target", "y", "--quiet", "--json", "--epochs", 1, "--batch-size", 50)
    refused = anyfit(*base, "--source", "delimiter=|")
    assert refused.code == 2 and "column 'z' holds numbers, but 'unknown' in row 1" in refused.err
    done = anyfit(*base, "--source", "delimiter=|", "--source", "missing=unknown", "--source", "weight=w")
    assert done.json["steps"] == 4
    assert "--source (='colour') is no field of the data" in anyfit(*base, "--source", "colour=1").err


DEALT = ("federate", "tabular", "--data", "adults.csv", "--target", "income", "--batch-size", 16)
SILENT = ("--quiet", "--json")


def test_one_file_is_dealt_to_sites_compared_and_reported(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    done = anyfit(*DEALT, "--partition", "quantity:0.5", "--num-sites", 3, "--rounds", 4, "--test", 0.3, "--compare", "--run", "r", *SILENT)
    assert done.code == 0 and done.err == ""
    found = done.json
    assert set(found["sites"]) == {"site-0", "site-1", "site-2"}
    assert sum(site["rows"] for site in found["sites"].values()) + found["test"]["rows"] == 400
    assert found["sites"]["site-0"]["accuracy"] <= found["fairness"]["accuracy"]["highest"]
    assert found["compared"] == {"figure": "accuracy", "split": "test"}
    assert [line["what"] for line in found["comparison"]][:2] == ["federated", "pooled rows"]
    assert found["comparison"][0]["all"] == found["test"]["accuracy"]
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["partition"]["how"] == "quantity:0.5" and record["strategy"]["name"] == "FedAvg"
    assert {"partition.png", "comparison.png", "sites.png"} <= {path.name for path in (tmp_path / "r").iterdir()}


def test_a_column_makes_the_sites(anyfit: Run, adults: Path) -> None:
    done = anyfit(*DEALT, "--partition", "column:job", "--rounds", 1, *SILENT)
    assert set(done.json["sites"]) == {"a", "b", "c", "missing"}


def test_a_person_sees_a_line_for_each_round_and_a_table_of_sites(anyfit: Run, adults: Path) -> None:
    options = ("--partition", "iid", "--num-sites", 4, "--rounds", 3, "--test", 0.2, "--dropout", 0.3, "--quorum", 2, "--compare")
    done = anyfit(*DEALT, *options)
    assert done.code == 0
    rounds = [line for line in done.err.splitlines() if line.strip().startswith("round")]
    assert len(rounds) == 3 and all("loss" in line and "of 4 sites" in line and "kB up" in line for line in rounds)
    assert any("missing: site-" in line for line in rounds)
    sites = json.loads(Path("runs/tabular-1/run.json").read_text())["sites"]
    rows = sum(site["rows"] for site in sites.values())  # without those held back to test on
    assert 200 < rows < 400 and f"4 sites, {rows} rows: site-0 {sites['site-0']['rows']}, " in done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("site-")] == ["site-0", "site-1", "site-2", "site-3"]
    assert any(line.startswith("over sites") for line in lines)
    assert any(line.startswith("alone, mean of sites") for line in lines)


def test_a_terminal_shows_a_live_table_of_its_sites(adults: Path, tmp_path: Path) -> None:
    import os
    import pty

    def run(*options: str) -> str:
        parent, child = pty.openpty()
        command = [sys.executable, "-m", "anyfit", *map(str, DEALT), *options, "--rounds", "2", "--test", "0.2"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
        os.close(child)
        seen = bytearray()
        with os.fdopen(parent, "rb", buffering=0) as screen:
            try:
                while part := screen.read(65536):
                    seen += part
            except OSError:  # the other end is closed
                pass
        assert process.wait() == 0
        return seen.decode()

    few = run("--partition", "iid", "--num-sites", "3")
    assert "last loss" in few and "round 2 of 2  loss" in few
    assert few.rindex("site-2 ") > few.rindex("last loss")  # each site has its line
    many = run("--partition", "iid", "--num-sites", "20")
    last = many[many.rindex("last loss") :]
    assert "all 20 sites (20 heard of)" in last and 5 <= last.count("site-") <= 10


def test_a_resumed_federation_goes_on_with_its_rules(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    base = (*DEALT, "--test", 0.2, "--run", "r", *SILENT)
    rules = ("--partition", "dirichlet:0.5", "--num-sites", 4, "--strategy", "fedprox:mu=0.3", "--sample", 0.5, "--compress", "int8")
    first = anyfit(*base, *rules, "--rounds", 2, "--steps", 3, "--seed", 4, "--set", "lr=0.01")
    assert first.code == 0 and first.json["rounds"] == 2
    more = anyfit(*base, "--resume", "--rounds", 4)
    assert more.code == 0 and more.json["rounds"] == 4
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["strategy"]["name"] == "FedProx" and record["strategy"]["values"]["mu"] == 0.3
    assert record["rules"]["sample"] == 0.5 and record["rules"]["compress"] == "int8" and record["plan"]["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4] and all(len(line["sites"]) == 2 for line in lines)
    at_once = anyfit(*DEALT, "--test", 0.2, "--run", "whole", *SILENT, *rules, "--rounds", 4, "--steps", 3, "--seed", 4, "--set", "lr=0.01")
    assert at_once.json["bytes"] == more.json["bytes"]  # the schedule of the rate went over 2 rounds first, so figures may differ
    other = anyfit(*base, "--resume", "--rounds", 5, "--strategy", "fedavg")
    assert other.code == 2 and "has the strategy" in other.err


def test_a_resumed_federation_knows_its_columns_its_limits_and_its_faults(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    lines = adults.read_text().splitlines()
    for name, part in (("a", lines[1:200]), ("b", lines[200:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *part]).replace(",", "|").replace("?", "unknown") + "\n")
    base = ("federate", "tabular", "--site", "a.csv", "--site", "b.csv", "--run", "r", *SILENT)
    roles = ("--target", "income", "--ignore", "age", "--type", "job=categorical")
    read = ("--source", "delimiter=|", "--source", "missing=unknown")
    other = ("--min-cells", 3, "--max-norm", 100, "--dropout", 0.2, "--quorum", 1, "--straggle", 0.5, "--delay", 0.1, "--join", "b=2")
    assert anyfit(*base, *roles, *read, *other, "--rounds", 2, "--batch-size", 16).code == 0
    before = json.loads((tmp_path / "r/run.json").read_text())
    more = anyfit(*base, "--resume", "--rounds", 3, "--delay", 0.2)
    assert more.code == 0 and more.json["rounds"] == 3
    after = json.loads((tmp_path / "r/run.json").read_text())
    assert after["schema"] == before["schema"] and after["source"] == before["source"]
    assert after["limits"] == before["limits"] and after["limits"]["cells"] == 3 and after["limits"]["norm"] == 100
    assert after["faults"] == {**before["faults"], "delay_s": 0.2} and after["faults"]["joins"] == {"b": 2}


def test_ctrl_c_in_a_comparison_says_what_is_kept(adults: Path, tmp_path: Path) -> None:
    import signal

    options = ("--partition", "iid", "--num-sites", 20, "--rounds", 2, "--epochs", 20, "--test", 0.2, "--compare", "--run", "r", "--json")
    command = [sys.executable, "-m", "anyfit", *map(str, (*DEALT, *options))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None and process.stdout is not None
        assert any("for comparison" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        told, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert "stopped by a signal; all rounds are complete" in err and "go on with: --run r --resume --compare" in err
    assert json.loads(told) == {"run": "r", "stopped": "signal"}
    assert json.loads((tmp_path / "r/result.json").read_text())["rounds"] == 2


def test_local_work_by_time_goes_on_by_time(anyfit: Run, adults: Path, tmp_path: Path) -> None:
    base = (*DEALT, "--partition", "iid", "--num-sites", 2, "--run", "r", *SILENT)
    assert anyfit(*base, "--rounds", 1, "--seconds", 0.05).code == 0
    assert anyfit(*base, "--resume", "--rounds", 2).json["rounds"] == 2
    assert json.loads((tmp_path / "r/run.json").read_text())["rules"]["seconds"] == 0.05


def test_privacy_of_sites_and_of_examples(anyfit: Run, adults: Path) -> None:
    pytest.importorskip("dp_accounting")
    sites = (*DEALT, "--partition", "iid", "--num-sites", 8, "--rounds", 2, "--sample", 0.5, "--test", 0.2)
    done = anyfit(*sites, "--privacy", "site:clip=0.5,epsilon=6,delta=1e-2", "--run", "s", *SILENT)
    assert done.code == 0 and 0 < done.json["privacy"]["epsilon"] <= 6
    more = anyfit(*sites, "--run", "s", "--resume", "--rounds", 3, *SILENT)  # as private as before: its noise was calibrated then
    assert more.code == 0 and more.json["privacy"]["epsilon"] <= 6
    seen = anyfit(*sites, "--privacy", "site:noise_multiplier=2,delta=1e-2")
    first = next(line for line in seen.err.splitlines() if line.strip().startswith("round 1"))
    told = json.loads(Path("runs/tabular-1/metrics.jsonl").read_text().splitlines()[0])
    assert "epsilon" in first and f"  {told['answered']} sites  " in first  # how many of how many is told to nobody
    assert "at delta 0.01" in seen.out
    fitted = ("fit", "tabular", "--data", adults, "--target", "income", "--steps", 5, "--batch-size", 20, "--run", "e", *SILENT)
    example = anyfit(*fitted, "--privacy", "example:clip=1,epsilon=4,delta=1e-3")
    assert example.code == 0
    again = anyfit(*fitted, "--resume")
    assert again.code == 0


def test_sites_that_come_late_or_too_late(anyfit: Run, adults: Path) -> None:
    base = (*DEALT, "--partition", "iid", "--num-sites", 3, "--rounds", 3)
    late = anyfit(*base, "--join", "site-2=2")
    assert "site site-2 joins in round 2" in late.err and "joined in round 2" in late.out
    slow = anyfit(*base, "--straggle", 1.0, "--delay", 100, "--deadline", 50, "--quorum", 1, "--run", "slow")
    assert slow.code == 1 and "0 of 3 sites answered in round 1" in slow.err


def test_a_delay_of_no_site_and_a_chance_beside_names_are_refused(adults: Path) -> None:
    from anyfit.errors import InputError
    from anyfit.federate import Faults, federate
    from anyfit.tasks import Tabular

    with pytest.raises(InputError, match="delay_s of Faults names 'mars', which is no site; there are: adults"):
        federate(Tabular(), [adults], rounds=1, target="income", faults=Faults(delay_s={"mars": 1.0}))
    with pytest.raises(InputError, match=r"needs delay_s .* one number for all sites, not {'adults': 1.0}"):
        Faults(straggle=0.5, delay_s={"adults": 1.0})


def test_limits_of_a_site_are_kept(anyfit: Run, adults: Path) -> None:
    base = (*DEALT, "--partition", "iid", "--num-sites", 4, "--rounds", 1)
    few = anyfit(*base, "--min-rows", 1000)
    assert few.code != 0 and "fewer than this site lets an update stand for (1000)" in few.err
    large = anyfit(*base, "--max-norm", 1e-9)
    assert large.code == 1 and "more than this site lets out (1e-09)" in large.err
    cells = anyfit(*base, "--min-cells", 40, "--run", "cells", *SILENT)
    job = json.loads(Path("cells/run.json").read_text())["schema"]["columns"][1]
    assert cells.code == 0 and job["name"] == "job" and job["categories"] == []


BAD_FEDERATIONS = {
    "no sites": ((), "give the sites' data: --site FILE for each of them"),
    "both": (("--site", "adults.csv", "--data", "adults.csv"), "give the sites' data"),
    "no partition": (("--data", "adults.csv"), "--partition is missing"),
    "unknown partition": (("--data", "adults.csv", "--partition", "pie"), "how (='pie') is unknown"),
    "no number": (("--data", "adults.csv", "--partition", "iid"), "num_sites is not given"),
    "too many sites": (("--data", "adults.csv", "--partition", "iid", "--num-sites", 500), "num_sites (=500) must be"),
    "partition of sites": (("--site", "adults.csv", "--partition", "iid"), "with --site each site has data of its own"),
    "unknown strategy": (("--site", "adults.csv", "--strategy", "fedmagic"), "strategy (='fedmagic') is not known"),
    "unknown field": (("--site", "adults.csv", "--strategy", "fedprox:nu=1"), "'nu' is no field of FedProx"),
    "unknown privacy": (("--site", "adults.csv", "--privacy", "perfect"), "--privacy (='perfect') must begin with site: or example:"),
    "no delta": (("--site", "adults.csv", "--privacy", "site:epsilon=8"), "--privacy (='site:epsilon=8') lacks delta"),
    "unknown privacy field": (("--site", "adults.csv", "--privacy", "site:sigma=1,delta=1e-5"), "'sigma' is no field of it"),
    "bad privacy value": (("--site", "adults.csv", "--privacy", "site:epsilon=low,delta=1e-5"), "epsilon of --privacy (='low') must be"),
    "bad sample": (("--site", "adults.csv", "--sample", "half"), "--sample (='half') must be a whole number or a finite number"),
    "large sample": (("--site", "adults.csv", "--sample", 1.5), "sample (=1.5) must be a whole number of sites"),
    "bad codec": (("--site", "adults.csv", "--compress", "zip"), "compress (='zip') must be one of"),
    "bad dropout": (("--site", "adults.csv", "--dropout", 2), "dropout (=2.0) of Faults must be a chance"),
    "straggle alone": (("--site", "adults.csv", "--straggle", 0.5), "straggle (=0.5) of Faults needs delay_s (--delay) above 0"),
    "delay alone": (("--site", "adults.csv", "--delay", 5), "delay_s (=5.0) of Faults needs straggle (--straggle)"),
    "negative delay": (("--site", "adults.csv", "--straggle", 0.5, "--delay", -1), "delay_s (=-1.0) of Faults must be seconds from 0 up"),
    "strategy lacks a field": (
        ("--site", "adults.csv", "--strategy", "singlesite"),
        "strategy (='singlesite') lacks site; write singlesite:site=NAME",
    ),
    "unknown joiner": (("--site", "adults.csv", "--join", "mars=2"), "names 'mars', which is no site"),
    "two kinds of work": (("--site", "adults.csv", "--seconds", 1, "--epochs", 1), "excludes epochs and steps"),
    "validation": (("--site", "adults.csv", "--validation", 1.5), "validation (=1.5) must be a fraction"),
    "min rows": (("--site", "adults.csv", "--min-rows", 0), "rows (=0) of the limits must be above 0"),
}


@pytest.mark.parametrize("case", BAD_FEDERATIONS)
def test_a_bad_federation_is_refused_with_a_clear_error(case: str, anyfit: Run, adults: Path, tmp_path: Path) -> None:
    options, message = BAD_FEDERATIONS[case]
    done = anyfit("federate", "tabular", "--target", "income", "--rounds", 1, *options, "--run", "r", *SILENT)
    assert message in done.err and done.code == 2
    assert message in done.json["error"]["message"]
    assert not (tmp_path / "r").exists()


def test_rounds_are_needed_where_nothing_is_resumed(anyfit: Run, adults: Path) -> None:
    done = anyfit("federate", "tabular", "--site", "adults.csv", "--target", "income", *SILENT)
    assert done.code == 2 and "--rounds is missing" in done.err
    site = anyfit("fit", "tabular", "--data", "adults.csv", "--target", "income", "--privacy", "site:epsilon=1,delta=1e-3", *SILENT)
    assert site.code == 2 and "must begin with example:" in site.err


@pytest.mark.slow  # tests/test_simulation.py has ranks without the command line
def test_ranks_of_torchrun_share_the_sites(adults: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "anyfit"]
    options = [*DEALT, "--partition", "iid", "--num-sites", "5", "--rounds", "2", "--test", "0.2", "--compare", "--json"]
    results = []
    for name, launcher in (("alone", [sys.executable, "-m", "anyfit"]), ("ranks", torchrun)):
        done = subprocess.run(
            [*launcher, *map(str, options), "--run", name], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(found) == 1  # one rank speaks for all
        results.append({key: found[0][key] for key in ("test", "sites", "comparison")})
    assert results[0] == results[1]
