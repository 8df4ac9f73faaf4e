"""python benchmarks/shrink.py [--json] [--only NAME] [--retrain] [--quick]: what shrinking costs and gains, measured on what it gives.

tiny      the kept network (benchmarks/tiny_mnist.safetensors: three seeds of `python examples/tiny_mnist.py MNIST --seed N`) as C, compiled;
          all test images through the compiled C; flash and RAM from its object file. --retrain trains the three seeds again, half an hour.
lenet     LeNet-5 on MNIST with a tenth of its parameters left, in int8
half      half of the channels pruned: latency against dense and against torch-pruning's own result, in turn
int8      int8 and float32 through onnxruntime, in turn
sparse    90 % of the weights of a digits network to zero: the cubic ramp with masks against a ramp that ends with the training
morphs    each morph: what it changes of a network's outputs in float64

One torch thread. Needs the MNIST files (--data FOLDER), a C compiler for `tiny` and the extra `shrink`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyfit
from anyfit.data import read_splits
from anyfit.engine import load_model
from anyfit.load import module_of
from anyfit.prepare import built, prepare
from anyfit.schedule import constant
from anyfit.schema import Schema
from anyfit.shrink.morph import grow
from anyfit.shrink.morph import morphs as offered
from anyfit.state import Position, State
from anyfit.task import Task
from anyfit.tasks.shrunk import prunable, prune_to

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "mnist"
KEPT = HERE / "tiny_mnist.safetensors"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    data: Path
    quick: bool
    retrain: bool

    def rows(self, count: int | None = None) -> dict[str, Any]:
        """MNIST, or its first `count` training rows, as the arguments of a fit."""
        if not self.data.is_dir():
            raise SystemExit(f"data (={self.data}) is no folder; give the folder of MNIST's files: --data FOLDER")
        parts = read_splits(anyfit.Source(self.data), None, None, wants_validation=False)
        return {"data": parts["train"] if count is None else parts["train"].slice(0, count), "test": parts["test"]}


def images(task: Task, rows: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """All test images as the data has them, and their labels."""
    prepared = prepare(task, rows["data"], target=None, validation=None, test=rows["test"], plan={})
    batches = list(prepared.batches("test"))
    return torch.cat([batch["image"] for batch in batches]), torch.cat([batch["target"] for batch in batches])


def model_of(task: Task, state: State) -> nn.Module:
    """A state's network, ready to predict."""
    model = built(task, Schema.from_json(state.schema or {}))
    load_model(model, state.model)
    return model.eval()


def answers_of(task: Task, model: nn.Module, pixels: Tensor) -> Tensor:
    """The class of each image."""
    model.eval()
    with torch.no_grad():
        return torch.cat([task.predict(model, {"image": part}).argmax(1) for part in pixels.split(500)])


def accuracy_of(answers: Tensor, targets: Tensor) -> float:
    return float((answers == targets).double().mean())


def in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int, block_s: float = 0.05) -> dict[str, list[float]]:
    """Milliseconds of a call, a figure per round; contestants in turn within a round, the order turning."""
    calls, names = {}, list(contestants)
    for name, call in contestants.items():
        call()
        begun = time.perf_counter()
        call()
        calls[name] = max(1, round(block_s / (time.perf_counter() - begun)))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        place = turn % len(names)
        for name in names[place:] + names[:place]:
            begun = time.perf_counter()
            for _ in range(calls[name]):
                contestants[name]()
            taken[name].append((time.perf_counter() - begun) / calls[name] * 1e3)
    return taken


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster: the median of the rounds' ratios, low and high."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


# ------------------------------------------------------------------ networks


class LeNet(anyfit.Image):
    """LeNet-5 with ReLU and max pooling: 61,706 parameters. Training images are shifted by up to two pixels."""

    shift: int | None = 2
    lr: float = 3e-3

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, schema.num_classes)),
        )

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].float() / 255)


def normalised(into: int, out: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its batch normalisation."""
    return [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)]


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*normalised(channels, channels), nn.ReLU(), *normalised(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.relu(x_BCHW + self.body(x_BCHW))


class ResNet(LeNet):
    """Two residual blocks: 112,106 parameters, 8.4 M multiply-accumulates."""

    width: int = 32

    def build_model(self, schema: Schema) -> nn.Module:
        width = self.width
        return nn.Sequential(
            *(*normalised(1, width), nn.ReLU(), nn.MaxPool2d(2), Residual(width)),
            *(*normalised(width, 2 * width, 2), nn.ReLU(), Residual(2 * width)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, schema.num_classes)),
        )


class VGG(LeNet):
    """Four convolutions in a row and a hidden layer: 468,010 parameters, 18.7 M multiply-accumulates."""

    width: int = 32

    def build_model(self, schema: Schema) -> nn.Module:
        width = self.width
        return nn.Sequential(
            *(*normalised(1, width), nn.ReLU(), *normalised(width, width), nn.ReLU(), nn.MaxPool2d(2)),
            *(*normalised(width, 2 * width), nn.ReLU(), *normalised(2 * width, 2 * width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(2 * width * 49, 4 * width), nn.ReLU(), nn.Linear(4 * width, schema.num_classes)),
        )


class Digits(anyfit.Image):
    """The network of the digits: 57,594 parameters."""

    lr: float = 2e-3

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(
            *(*normalised(1, 16), nn.ReLU(), *normalised(16, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(*normalised(32, 64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, schema.num_classes)),
        )

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].float() / 16)


class Ramp(Digits):
    """The way of SpArSeMod (quant_n_prune.py): after each step a share of the weights that grows to `amount` at the very last one is set to
    zero, by magnitude over all layers but the last; what is zero may grow again. Its rate is constant.
    """

    amount: float = 0.9

    def constrain(self, model: nn.Module, progress: float | None) -> Callable[[], None]:
        tensors = list(prunable(model).values())[:-1]
        return lambda: prune_to(tensors, 0.01 + (self.amount - 0.01) * (progress or 0.0))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.lr)

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return constant(optimizer, total_steps)


# ------------------------------------------------------------------ tiny

DRIVER = """
#include <stdio.h>
#include "tiny.h"

int main(void) {
    static int8_t logits[10];
    while (fread(tiny_input(), 1, 784, stdin) == 784) putchar(tiny_predict(logits));
    return 0;
}
"""


def keep(trained: list[anyfit.Run]) -> None:
    """Write the seeds' weights beside this file, in half precision and one behind the other: under 20 KB."""
    states = [run.state.model for run in trained]
    halved = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    save_file({name: value.half() if value.is_floating_point() else value for name, value in halved.items()}, KEPT)


def kept(schema: Schema) -> list[State]:
    """The seeds' states as they were kept."""
    stacked, states = load_file(KEPT), []
    for seed in range(len(SEEDS)):
        weights = {name: value[seed].float() if value.is_floating_point() else value[seed] for name, value in stacked.items()}
        steps = int(weights["layers.1.num_batches_tracked"])
        states.append(State(model=weights, schema=schema.to_json(), position=Position(steps, 0, 0)))
    return states


def through_c(folder: Path, pixels: Tensor) -> tuple[Tensor, float]:
    """What the exported pair of files answers for all images, compiled by the host's compiler; microseconds an image, reading included."""
    (folder / "driver.c").write_text(DRIVER)
    compile_ = ["cc", "-std=c99", "-O2", "-Wall", "-Werror", "driver.c", "tiny.c", "-o", "driver"]
    subprocess.run(compile_, cwd=folder, check=True)
    begun = time.perf_counter()
    done = subprocess.run([folder / "driver"], input=pixels.numpy().tobytes(), stdout=subprocess.PIPE, check=True)
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8), (time.perf_counter() - begun) / len(pixels) * 1e6


def tiny(options: Options) -> dict[str, Any]:
    """Each seed in float, as simulated int8 and as compiled C, with any scales and with powers of two; the median seed by C stands at the top."""
    example = module_of(str(HERE.parent / "examples" / "tiny_mnist.py"))
    rows, task = options.rows(), example.TinyDigits()
    pixels, targets = images(task, rows)
    if options.retrain:
        keep([example.train(**rows, seed=seed) for seed in SEEDS])
    schema = prepare(task, rows["data"], target=None, validation=None, test=None, plan={}).schema
    found = []
    for scales in ("any", "powers of two"):
        for seed, state in zip(SEEDS, kept(schema), strict=True):
            with tempfile.TemporaryDirectory() as name:
                small, integers = anyfit.quantize(task, state, rows["data"], power_of_two=scales == "powers of two")
                figures = anyfit.export(small, integers, Path(name) / "tiny.c").figures
                answers, microseconds = through_c(Path(name), pixels)
            found.append(
                {
                    "seed": seed,
                    "scales": scales,
                    "float": accuracy_of(answers_of(task, model_of(task, state), pixels), targets),
                    "accuracy": accuracy_of(answers, targets),
                    "differs": int((answers != answers_of(small, model_of(small, integers), pixels)).sum()),  # C from simulated int8
                    **{name: figures[name] for name in ("flash_bytes", "ram_bytes", "text_bytes", "stack_bytes")},
                    "us": microseconds,
                }
            )
        sys.stderr.write(f"tiny: scales {scales}\n")
    median = sorted(found[: len(SEEDS)], key=lambda row: row["accuracy"])[len(SEEDS) // 2]
    return {**median, "rows": found, "goal": {"accuracy": 0.988, "flash_bytes": 2800, "ram_bytes": 2048}}


# ------------------------------------------------------------------ lenet


def lenet(options: Options) -> dict[str, Any]:
    """Dense; a tenth of the weights; seven tenths of the channels and then so few of the weights that a tenth is left; each in int8."""
    rows = options.rows(6000 if options.quick else None)
    short: dict[str, Any] = {"epochs": 2 if options.quick else 10, "batch_size": 64, "seed": 0}
    long = short | {"epochs": 2 if options.quick else 16, "begin": 0.0, "end": 0.5}
    run = anyfit.fit(LeNet(), **rows, **short)
    pixels, targets = images(run.task, rows)
    fewer = anyfit.prune(run.task, run.state, rows["data"], 0.3, structured=True, **short)
    ways = {
        "dense": (run.task, run.state),
        "weights": anyfit.prune(run.task, run.state, rows["data"], 0.905, **long),
        "channels, weights": anyfit.prune(*fewer, rows["data"], 0.8, **long),
    }
    found: list[dict[str, Any]] = []
    for kind, (task, state) in ways.items():
        small, integers = anyfit.quantize(task, state, rows["data"])
        model = model_of(task, state)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        nonzero = sum(int((parameter != 0).sum()) for parameter in model.parameters())
        exact, rounded = (accuracy_of(answers_of(*pair, pixels), targets) for pair in ((task, model), (small, model_of(small, integers))))
        row = {"kind": kind, "parameters": parameters, "nonzero": nonzero, "float": exact, "int8": rounded}
        dense = found[0] if found else row
        found.append(row | {"fewer": dense["parameters"] / nonzero, "lost_points": 100 * (dense["float"] - rounded)})
    return {"rows": found, "goal": {"dense": 0.99, "fewer": 10, "lost_points": 0.3}}


# ------------------------------------------------------------------ half of the channels


@functools.cache
def trained(network: Task, options: Options) -> tuple[anyfit.Run, dict[str, Any]]:
    """A network after three epochs on a fifth of MNIST, and those rows."""
    rows = options.rows(2000 if options.quick else 12000)
    return anyfit.fit(network, **rows, epochs=1 if options.quick else 3, batch_size=64, seed=0), rows


def by_torch_pruning(dense: nn.Module, pixels: Tensor) -> nn.Module:
    """What torch-pruning makes of the network: half of the channels of each layer, by magnitude over dependency groups."""
    import torch_pruning

    model = copy.deepcopy(dense)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        pixels[:1].float() / 255,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    return model


def half(options: Options) -> dict[str, Any]:
    """Both prunings of one trained network, trained on alike; then all three in turn."""
    found = []
    for network in (VGG(), ResNet()):
        (run, rows), plan = trained(network, options), {"epochs": 1, "batch_size": 64, "seed": 0}
        pixels, targets = images(network, rows)
        peer = by_torch_pruning(run.model, pixels)

        class Given(LeNet):
            """Trains on what torch-pruning made."""

            def build_model(self, schema: Schema, peer: nn.Module = peer) -> nn.Module:
                return copy.deepcopy(peer)

        task, state = anyfit.prune(network, run.state, rows["data"], 0.5, structured=True, **plan)
        models = {
            "dense": run.model.eval(),
            "anyfit": model_of(task, state),
            "torch-pruning": anyfit.fit(Given(), rows["data"], **plan).model.eval(),
        }
        for size in (1, 64):
            batch = pixels[:size].float() / 255
            with torch.no_grad():
                taken = in_turn(
                    {name: lambda model=model, batch=batch: model(batch) for name, model in models.items()}, 3 if options.quick else 15
                )
            for name, model in models.items():
                resources = anyfit.resources(network, model, {"image": pixels[:1]})
                found.append(
                    {
                        "network": type(network).__name__,
                        "batch": size,
                        "kind": name,
                        "parameters": resources.parameters,
                        "macs": resources.macs,
                        "accuracy": accuracy_of(answers_of(network, model, pixels), targets),
                        "ms": statistics.median(taken[name]),
                        **ratio(taken["dense"], taken[name]),
                        "over_peer": "",
                    }
                )
            found[-2] |= {f"over_peer_{key}": value for key, value in ratio(taken["torch-pruning"], taken["anyfit"]).items()}
            found[-2]["over_peer"] = "{over_peer_ratio:.2f} ({over_peer_low:.2f} to {over_peer_high:.2f})".format(**found[-2])
        sys.stderr.write(f"half: {type(network).__name__}\n")
    return {"rows": found}


# ------------------------------------------------------------------ int8 by onnxruntime


def int8(options: Options) -> dict[str, Any]:
    """Both files in one process, one thread, in turn."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    found = []
    for network in (LeNet(), VGG(), ResNet()):
        run, rows = trained(network, options)
        pixels, targets = images(network, rows)
        small, integers = anyfit.quantize(network, run.state, rows["data"])
        with tempfile.TemporaryDirectory() as name:
            sessions = {}
            for kind, task, state in (("float32", network, run.state), ("int8", small, integers)):
                path = Path(name) / f"{kind}.onnx"
                anyfit.export(task, state, path)
                sessions[kind] = (
                    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"]),
                    path.stat().st_size,
                )
            for size in (1, 64):
                batch = {"image": pixels[:size].numpy()}
                taken = in_turn(
                    {kind: lambda s=s, batch=batch: s.run(None, batch) for kind, (s, _) in sessions.items()}, 3 if options.quick else 15
                )
                for kind, (session, bytes_) in sessions.items():
                    answers = np.concatenate([session.run(None, {"image": part.numpy()})[0].argmax(1) for part in pixels.split(500)])
                    found.append(
                        {
                            "network": type(network).__name__,
                            "batch": size,
                            "kind": kind,
                            "file_bytes": bytes_,
                            "accuracy": accuracy_of(torch.from_numpy(answers), targets),
                            "ms": statistics.median(taken[kind]),
                            **ratio(taken["float32"], taken[kind]),
                        }
                    )
        sys.stderr.write(f"int8: {type(network).__name__}\n")
    return {"rows": found}


# ------------------------------------------------------------------ nine of ten weights


def sparse(options: Options) -> dict[str, Any]:
    """One trained network for each seed, pruned in five further epochs; what the control gives at its end, and as its best epoch."""
    found = []
    parts = read_splits(anyfit.Source("digits"), None, 0.25, wants_validation=False)
    train, rows = parts["train"], {"data": parts["train"], "test": parts["test"]}
    pixels, targets = images(Digits(), rows)
    kinds: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for seed in (0,) if options.quick else (0, 1, 2, 3, 4):
        plan: dict[str, Any] = {"epochs": 5, "batch_size": 32, "seed": seed}
        dense = anyfit.fit(Digits(), train, **{**plan, "epochs": 10})
        for amount in (0.9, 0.95):
            ramp = Ramp(amount=amount)
            last = anyfit.fit(ramp, train, weights=dense, **plan)
            best = anyfit.fit(ramp, train, weights=dense, best=True, validation=0.2, **plan)
            models = {
                "dense": dense.model,
                "anyfit": model_of(*anyfit.prune(Digits(), dense, train, amount, **plan)),
                "ramp": last.model,
                "ramp, best epoch": best.model,
            }
            for kind, model in models.items():
                tensors = list(prunable(model).values())[: -1 if kind.startswith("ramp") else None]  # of those that it prunes
                zero = sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
                kinds.setdefault((amount, kind), []).append((accuracy_of(answers_of(Digits(), model, pixels), targets), zero))
    for (amount, kind), runs in kinds.items():
        accuracies, zeros = zip(*runs, strict=True)
        spread = {"low": min(accuracies), "high": max(accuracies), "zero": statistics.median(zeros)}
        found.append({"amount": amount, "kind": kind, "accuracy": statistics.median(accuracies), **spread})
    return {"rows": sorted(found, key=lambda row: row["amount"]), "goal": {"lost_points": 1.0}}


# ------------------------------------------------------------------ morphs


def morphs(options: Options) -> dict[str, Any]:
    """Every morph that the trained networks offer; how far the child's outputs are from the parent's, relative to the largest, in float64."""
    rows, found = options.rows(2000), []
    for network in (VGG(width=8), ResNet(width=8)):
        run = anyfit.fit(network, rows["data"], epochs=1, batch_size=64, seed=0)
        row = images(network, rows)[0][:1]
        x_BCHW = torch.rand(16, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        parent = run.model.double().eval()
        kinds: dict[tuple[str, str], list[dict[str, float]]] = {}
        for edit in offered(network, parent, {"image": row}):
            child = grow(network, parent, {"image": row}, **edit)
            sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (parent, child.model)]
            apart = {"size": sizes[1] / sizes[0]}
            for mode, training in (("evaluation", False), ("training", True)):
                with torch.no_grad():  # on copies, for training moves batch statistics
                    expected, given = (copy.deepcopy(model).train(training)(x_BCHW) for model in (parent, child.model))
                apart[mode] = float((expected - given).abs().max() / expected.abs().max())
            kinds.setdefault((edit["edit"], child.label), []).append(apart)
        for (edit_, label), children in kinds.items():
            most = {key: max(child[key] for child in children) for key in ("evaluation", "training", "size")}
            found.append({"network": type(network).__name__, "edit": edit_, "label": label, "children": len(children), **most})
    return {"rows": found, "goal": {"exact": 1e-12}}


# ------------------------------------------------------------------ tables

SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "tiny": tiny,
    "lenet": lenet,
    "half": half,
    "int8": int8,
    "sparse": sparse,
    "morphs": morphs,
}
COLUMNS = {  # name:format
    "tiny": "seed scales float:.4f accuracy:.4f differs flash_bytes:, ram_bytes:, text_bytes:, stack_bytes:, us:.0f",
    "lenet": "kind parameters:, nonzero:, fewer:.1f float:.4f int8:.4f lost_points:.2f",
    "half": "network batch kind parameters:, macs:, accuracy:.4f ms:.3f ratio:.2f low:.2f high:.2f over_peer",
    "int8": "network batch kind file_bytes:, accuracy:.4f ms:.3f ratio:.2f low:.2f high:.2f",
    "sparse": "amount:.2f kind accuracy:.3f low:.3f high:.3f zero:.3f",
    "morphs": "network edit label children evaluation:.1e training:.1e size:.2f",
}


def print_table(rows: list[dict[str, Any]], columns: str) -> None:
    """Words on the left, figures on the right."""
    forms = dict(column.partition(":")[::2] for column in columns.split())
    cells = [[name.replace("_", " ") for name in forms], *([format(row[name], form) for name, form in forms.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [isinstance(rows[0][name], str) for name in forms]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(line, widths, words, strict=True)
            ).rstrip()
        )


def main() -> None:
    """Measure, print tables and, where asked, one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="one section, or several")
    parser.add_argument("--retrain", action="store_true", help="train the tiny network's seeds again, and keep them")
    parser.add_argument("--quick", action="store_true", help="few rows and rounds: a look, no result")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of MNIST's files")
    given = parser.parse_args()
    options = Options(given.data, given.quick, given.retrain)
    torch.set_num_threads(1)
    begun, found = time.monotonic(), {}
    for name in given.only or SECTIONS:
        found[name] = SECTIONS[name](options)
        print(f"\n{name}")
        print_table(found[name]["rows"], COLUMNS[name])
    sys.stderr.write(f"done in {(time.monotonic() - begun) / 60:.1f} minutes\n")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
