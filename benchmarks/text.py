"""python benchmarks/text.py [--json] [--quick]: texts by the two networks of the Hugging Face exercise, against a plain loop and trainers.

CPU time of training steps after a warm-up, one torch thread, engines in turn within each round; a ratio per round (the peer's time
over ours), reported as median, low and high. Every engine trains on the same ids, batches of 8, fused AdamW without decay, a table of
28,996 x 64. The peers are those of benchmarks/engine.py, in .venv-peers. --quick: one short round, peers only where they are set up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contestants import LOG, LR, Clock, lightning, raw_loop, serve, train_by_huggingface
from engine import PEERS, Contestant, compare, measure, set_up_peers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from works import DATA, Work

ROOT = Path(__file__).resolve().parents[1]
WORDS, LONGEST = 28_996, 128  # the vocabulary of bert-base-cased, and where the exercise cuts texts
PAD, UNKNOWN = 0, 1
GOALS = {  # least ratio by peer and work
    "raw loop": {"cnn_short": 1.5, "rnn_short": 1.4, "cnn_long": 1.5, "rnn_long": 1.4},
    "huggingface": {"cnn_short": 2.5, "rnn_short": 2.5, "cnn_long": 2.5, "rnn_long": 2.0},
}


class SimpleCNN(nn.Module):
    """(ids (B, T), lengths (B,)) -> logits; padding takes part, as it does in the exercise."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, 64)
        self.layer = nn.Conv1d(64, 10, 3, padding=1)
        self.output_layer = nn.Linear(10, classes)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        words = self.embeddings(inputs[0]).transpose(1, 2)
        return self.output_layer(nn.functional.adaptive_max_pool1d(torch.relu(self.layer(words)), 1).squeeze(2))


class SimpleRNN(nn.Module):
    """The same by the state after the last real word."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, 64)
        self.layer = nn.RNN(64, 96, batch_first=True)
        self.output_layer = nn.Linear(96, classes)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        states = self.layer(self.embeddings(inputs[0]))[0]
        return self.output_layer(states[torch.arange(len(states)), inputs[1] - 1])


def trec() -> tuple[list[Tensor], list[int]]:
    """The questions where they are at hand, each word by its rank, else words and lengths like theirs."""
    path = DATA / "trec/train_5500.label"
    if not path.exists():
        return synthetic(5452, torch.poisson(torch.full((5452,), 8.2), generator=torch.Generator().manual_seed(1)) + 2, 6)
    lines = [line.split() for line in path.read_text("latin-1").splitlines()]
    counts: dict[str, int] = {}
    for _, *words in lines:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    ids = {word: rank + 2 for rank, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word)))}
    classes = {name: index for index, name in enumerate(sorted({line[0].split(":")[0] for line in lines}))}
    return [torch.tensor([ids[word] for word in words]) for _, *words in lines], [classes[line[0].split(":")[0]] for line in lines]


def synthetic(count: int, lengths: Tensor, classes: int) -> tuple[list[Tensor], list[int]]:
    """Words whose frequency falls as their rank (Zipf); some words speak for a class."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, WORDS - 1)
    words = 2 + torch.multinomial(frequency, int(lengths.sum()), replacement=True, generator=generator)
    speaks = torch.randn(WORDS, classes, generator=generator)
    texts = list(words.split(lengths.int().tolist()))
    assert len(texts) == count
    return texts, [int(speaks[text].sum(0).argmax()) for text in texts]


@dataclass(frozen=True)
class Texts(Work):
    """Rows are a list of ids (T,) and a list of labels."""

    def rows(self, name: str) -> tuple[list[Tensor], list[int]]:
        if name.endswith("short"):
            return trec()
        lengths = torch.full((2048,), LONGEST)
        if name.endswith("long"):  # film reviews, of which 83 % go on beyond the cut
            spread = 5.42 + 0.6 * torch.randn(2048, generator=torch.Generator().manual_seed(2))
            lengths = spread.exp().int().clamp(8, LONGEST)
        return synthetic(2048, lengths, 2)

    def loader(self, x: list[Tensor], y: list[int]) -> DataLoader[Any]:
        def collate(rows: list[tuple[Tensor, int]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
            ids = [row[0] for row in rows]
            lengths = torch.tensor([len(row) for row in ids])
            return (pad_sequence(ids, batch_first=True, padding_value=PAD), lengths), torch.tensor([row[1] for row in rows])

        return DataLoader(list(zip(x, y, strict=True)), batch_size=self.batch_size, shuffle=True, collate_fn=collate)


def works(quick: bool) -> dict[str, Work]:
    """Rows suffice for the steps of every work, so that no epoch begins anew."""
    steps, rounds = (50, 1) if quick else (200, 9)
    models = {
        "cnn_short": lambda: SimpleCNN(6),
        "cnn_long": lambda: SimpleCNN(2),
        "rnn_short": lambda: SimpleRNN(6),
        "rnn_long": lambda: SimpleRNN(2),
    }
    return {name: Texts(model, 8, 50, steps, rounds, weight_decay=0.0) for name, model in models.items()}


def tokenizer_file(folder: Path) -> Path:
    """A tokenizer.json in which word w17 is 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": PAD, "[UNK]": UNKNOWN} | {f"w{index}": index for index in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def anyfit(work: Work, x: list[Tensor], y: list[int], clock: Clock, kept: dict[str, Tensor] | None = None, **plan: Any) -> list[float]:
    """The ready tasks with the exercise's numbers, as a user has them: texts, a run folder, events. `kept` gets the first weights."""
    import pyarrow as pa

    from anyfit import File, Source, fit
    from anyfit.tasks.text import TextCNN, TextRNN

    class Constant:
        def build_model(self, schema: Any) -> nn.Module:
            model: nn.Module = super().build_model(schema)  # type: ignore[misc]
            if kept is not None:
                kept.update(
                    {
                        name.replace("convolutions.0", "layer").replace("rnn", "layer"): value.clone()
                        for name, value in model.state_dict().items()
                    }
                )
            return model

        def build_schedule(self, optimizer: Any, total_steps: int) -> None:
            return None

    class CNN(Constant, TextCNN):
        pass

    class RNN(Constant, TextRNN):
        pass

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock.at(event["step"])

    with tempfile.TemporaryDirectory() as folder:
        same: dict[str, Any] = {
            "tokenizer": File.of(tokenizer_file(Path(folder))),
            "embedding": 64,
            "embedding_std": 1.0,
            "dropout": 0.0,
            "unknown": 0.0,
            "max_length": LONGEST,
            "lr": LR,
            "weight_decay": work.weight_decay,
        }
        if isinstance(work.model(), SimpleCNN):
            task: Any = CNN(filters=10, widths=(3,), **same)
        else:
            task = RNN(cell="tanh", hidden=96, bidirectional=False, pooling="last", **same)
        texts = [" ".join(f"w{index}" for index in row.tolist()) for row in x]
        run = fit(
            task,
            Source(pa.table({"text": texts, "target": [f"c{label}" for label in y]}), target="target", types={"text": "text"}),
            run=f"{folder}/run",
            on_event=on_event,
            **{"steps": clock.last, "batch_size": work.batch_size, "bucket": True, "best": False, "log_every": LOG, **plan},
        )
    return [line["loss"] for line in run.history if line["event"] == "step"]


def huggingface(work: Work, x: list[Tensor], y: list[int], clock: Clock) -> list[float]:
    """As the exercise has it: a data set on Arrow, padded by the collator."""
    import datasets
    import transformers

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.model()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net((input_ids, attention_mask.sum(1)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file(Path(folder))), pad_token="[PAD]", unk_token="[UNK]"
        )
    columns = {"input_ids": [row.tolist() for row in x], "attention_mask": [[1] * len(row) for row in x], "labels": y}
    rows = datasets.Dataset.from_dict(columns)
    return train_by_huggingface(WithLoss(), rows, work, clock, transformers.DataCollatorWithPadding(tokenizer))


ENGINES = {"anyfit": anyfit, "raw loop": raw_loop, "huggingface": huggingface, "lightning": lightning}


def check() -> dict[str, tuple[float, float]]:
    """Mean losses of 100 steps by anyfit and by the plain loop, from the same weights in the same order, without padding."""
    from anyfit.data.batches import mix_seed

    class InOrder(Texts):
        def loader(self, x: list[Tensor], y: list[int]) -> Any:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix_seed(0, 0)))
            return [
                ((torch.stack([x[i] for i in part]), torch.full((8,), LONGEST)), torch.tensor(y)[part]) for part in order.split(8)[:100]
            ]

    losses = {}
    for name, kind in (("cnn", SimpleCNN), ("rnn", SimpleRNN)):
        work = InOrder(lambda kind=kind: kind(2), 8, 50, 50, 1, weight_decay=0.0)  # type: ignore[misc]
        x, y = work.rows("full")
        weights: dict[str, Tensor] = {}
        ours = anyfit(work, x, y, Clock(work), weights, bucket=False)
        model = work.model()
        model.load_state_dict(weights)
        plain = raw_loop(replace(work, model=lambda model=model: model), x, y, Clock(work))
        losses[name] = (statistics.mean(ours), statistics.mean(plain))
    return losses


class Process(Contestant):
    """An engine of this file in a process of its own."""

    def __init__(self, engine: str, quick: bool) -> None:
        python = str(PEERS / "bin/python") if engine in ("huggingface", "lightning") else sys.executable
        self.engine, self.complaints = engine, tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints}
        command = [python, __file__, "--engine", engine, *["--quick"] * quick]
        self.process = subprocess.Popen(command, text=True, **pipes)


def main() -> None:
    """Measure, print tables and, where asked, one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = works(arguments.quick)
    if arguments.engine:
        serve(arguments.engine, ENGINES[arguments.engine], chosen)
        return
    torch.set_num_threads(1)
    begun, engines = time.monotonic(), tuple(ENGINES)
    if not arguments.quick:
        set_up_peers()
        if subprocess.run([str(PEERS / "bin/python"), "-c", "import datasets"], capture_output=True, check=False).returncode:
            pins = str(ROOT / "constraints.txt")
            subprocess.run([str(PEERS / "bin/python"), "-m", "pip", "install", "--quiet", "-c", pins, "datasets"], check=True)
    elif not (PEERS / ".ready").exists():
        engines = ("anyfit", "raw loop")
    contestants: dict[str, Contestant] = {engine: Process(engine, arguments.quick) for engine in engines}
    rows: list[dict[str, Any]] = []
    print(f"{'work':<12}{'words in use':<16}{'engine':<14}{'us/step':>10}{'loss':>9}")
    for work, about in chosen.items():
        used = len(torch.cat(about.rows(work)[0]).unique())
        answers = measure(contestants, work, engines, about.rounds)
        for engine, given in answers.items():
            us, loss = (statistics.median(answer[key] for answer in given) for key in ("us", "loss"))
            print(f"{work:<12}{f'{used} ({used / WORDS:.0%})':<16}{engine:<14}{us:>10.1f}{loss:>9.4f}")
        rows += [{**compare(work, answers["anyfit"], peer, answers[peer]), "used": used / WORDS} for peer in engines[1:]]
    for contestant in contestants.values():
        assert contestant.process.stdin is not None
        contestant.process.stdin.close()
    print(f"\n{'work':<12}{'peer':<14}{'ratio':>7}{'low':>7}{'high':>7}{'goal':>7}")
    for row in rows:
        row["goal"] = GOALS.get(row["peer"], {}).get(row["work"])
        print(f"{row['work']:<12}{row['peer']:<14}{row['ratio']:>7.2f}{row['low']:>7.2f}{row['high']:>7.2f}{row['goal'] or '':>7}")
    losses = check()
    print("\nsame loss to 4 digits (same weights, same order, no padding, 100 steps): anyfit, plain loop")
    for name, (ours, plain) in losses.items():
        print(f"{name:<12}{ours:.6f} {plain:.6f} {'yes' if abs(ours - plain) < 5e-5 * abs(plain) else 'NO'}")
    sys.stderr.write(f"done in {(time.monotonic() - begun) / 60:.1f} minutes, set-up included\n")
    if arguments.json:
        print(json.dumps({"rows": rows, "losses": losses}))


if __name__ == "__main__":
    main()
