"""BERT as HetSeq and Substra use it, offline: learn a language from texts, then tell questions apart with what was learnt.

python examples/bert.py input.txt.gz train_5500.label --labelled train_5500.label --test TREC_10.label

The first files are read as plain text. --labelled and --test are lines `LABEL:detail question` as TREC has them, or CSV with columns
text and target. Without files, sentences are made. --out keeps the model as a folder that transformers reads; --quick is for a look,
too short for what frozen encoders show. The default, BERT with rotary positions, learns from so few texts sooner than --kind bert.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import anyfit
from anyfit import Schema, Source

ENCODER = ("*.embeddings.*", "*.encoder.*")  # what is frozen; the layers after it always train
THINGS = {
    "LOC": ("where is", "river city lake island desert harbour", "which country holds"),
    "HUM": ("who was", "painter singer king sailor doctor writer", "what man became"),
    "NUM": ("how many", "miles pounds years feet grams days", "what amount of"),
}


def read_texts(path: Path) -> list[str]:
    """Lines of a file that may be gzipped; the label before a question is not part of the text."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line.strip() for line in data.decode("utf-8", errors="replace").splitlines()]
    return [line.partition(" ")[2] if path.suffix == ".label" else line for line in lines if line]


def read_labelled(path: Path) -> pa.Table:
    if path.suffix != ".label":
        with path.open(newline="", encoding="utf-8") as file:
            return pa.Table.from_pylist(list(csv.DictReader(file))).select(["text", "target"])
    labels = [line.partition(":")[0] for line in path.read_text("latin-1").splitlines() if line]
    return pa.table({"text": read_texts(path), "target": labels})


def make_questions(count: int, seed: int) -> pa.Table:
    """Questions whose first words and whose noun both tell the label; some have only the noun."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label = draw.choice(list(THINGS))
        first, nouns, second = THINGS[label]
        start, kind = draw.choice((first, second, "tell me about")), draw.choice(("old", "great", "first", "famous"))
        rows.append({"text": f"{start} the {kind} {draw.choice(nouns.split())} ?", "target": label})
    return pa.Table.from_pylist(rows)


def tell(event: dict[str, Any]) -> None:
    if event["event"] == "step":
        print(f"step {event['step']:>5}  loss of masked words {event['loss']:.3f}", flush=True)


def main(given: argparse.Namespace, out: Path) -> None:
    train = read_labelled(given.labelled) if given.labelled else make_questions(600, 0)
    test = read_labelled(given.test) if given.test else make_questions(200, 1)
    texts = [text for path in given.texts for text in read_texts(path)] or train["text"].to_pylist()
    width = 32 if given.quick else 128
    config = {
        "model_type": given.kind,
        "hidden_size": width,
        "embedding_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 64,
        "initializer_range": 0.2 if given.quick else 0.02,
        "hidden_dropout_prob": 0.0,  # a small model that sees each word a few times learns more without
        "attention_probs_dropout_prob": 0.0,
    }
    language = anyfit.HuggingFace(config=config, objective="masked-lm", vocabulary_size=1500, max_length=32, lr=1e-3)
    steps = 80 if given.quick else given.steps
    source = Source(pa.table({"text": texts}), types={"text": "text"})
    run = anyfit.fit(language, source, steps=steps, batch_size=32, log_every=max(1, steps // 10), on_event=tell)
    place = language.save(run.model, Schema.from_json(run.record["schema"]), out)

    frozen: dict[str, Any] = {"model": str(place), "max_length": 64, "freeze": ENCODER, "lr": 5e-3}
    ways = {
        "frozen, pre-trained": anyfit.HuggingFace(**frozen),
        "frozen, random": anyfit.HuggingFace(**frozen, pretrained=False),
        "unfrozen, pre-trained": anyfit.HuggingFace(model=str(place), max_length=64, lr=3e-3 if given.quick else 5e-4),
    }
    labelled = Source(train, target="target", types={"text": "text"})
    print(f"\n{'encoder':<23}accuracy on {test.num_rows} questions")
    for name, task in ways.items():
        fitted = anyfit.fit(task, labelled, test=test, epochs=6 if given.quick else 10)
        print(f"{name:<23}{fitted.splits['test']['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="*", type=Path, help="files to learn the language from")
    parser.add_argument("--labelled", type=Path, help="questions to learn to tell apart")
    parser.add_argument("--test", type=Path, help="questions to be told apart")
    parser.add_argument("--kind", choices=("bert", "roformer"), default="roformer", help="roformer: BERT with rotary positions")
    parser.add_argument("--steps", type=int, default=3000, help="of learning the language")
    parser.add_argument("--out", type=Path, help="a new folder for the model; it is thrown away otherwise")
    parser.add_argument("--quick", action="store_true", help="a smaller model and a few steps")
    arguments = parser.parse_args()
    if arguments.quick:
        torch.set_num_threads(1)  # threads gain nothing with so small a model
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments, arguments.out or Path(temporary) / "bert")
