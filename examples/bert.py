"""BERT as HetSeq and Substra use it, offline: learn a language from texts, then tell questions apart with what was learnt.

python examples/bert.py input.txt train_5500.label --labelled train_5500.label --test TREC_10.label

The first files are read as plain text. --labelled and --test are lines `LABEL:detail question` as TREC has them, or CSV with columns
text and target. Without files, sentences are made. --out keeps the model as a folder that transformers reads; --quick is for a look.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import tempfile
from pathlib import Path
from typing import Any

import anyfit

ENCODER = ("bert.embeddings.*", "bert.encoder.*")  # what is frozen; the pooler and the last layer always train
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


def read_labelled(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".label":
        labels = [line.partition(":")[0] for line in path.read_text("latin-1").splitlines() if line]
        return {"text": read_texts(path), "target": labels}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in ("text", "target")}


def make_questions(count: int, seed: int) -> dict[str, list[str]]:
    """Questions whose first words and whose noun both tell the label; some have only the noun."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label = draw.choice(list(THINGS))
        first, nouns, second = THINGS[label]
        start = draw.choice((first, second, "tell me about"))
        rows.append((f"{start} the {draw.choice(('old', 'great', 'first', 'famous'))} {draw.choice(nouns.split())} ?", label))
    return {"text": [text for text, _ in rows], "target": [label for _, label in rows]}


def main(given: argparse.Namespace, out: Path) -> None:
    train = read_labelled(given.labelled) if given.labelled else make_questions(400, 0)
    test = read_labelled(given.test) if given.test else make_questions(200, 1)
    texts = [text for path in given.texts for text in read_texts(path)] or train["text"]
    width, layers = (32, 1) if given.quick else (given.width, given.layers)
    config = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, width // 32),
        "intermediate_size": 4 * width,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": given.dropout,
        "attention_probs_dropout_prob": given.dropout,
    }
    language = anyfit.HuggingFace(config=config, objective="masked-lm", vocabulary_size=given.vocabulary, max_length=64, lr=given.lr)
    steps = 100 if given.quick else given.steps
    run = anyfit.fit(language, {"text": texts}, steps=steps, batch_size=32, log_every=max(1, steps // 10), on_event=tell)
    language.save(run.model, run.schema, out)
    print(f"\n{'encoder':<22}accuracy")
    frozen: dict[str, Any] = {"model": str(out), "freeze": ENCODER, "lr": 5e-3, "max_length": 64}
    ways = {
        "frozen, pre-trained": anyfit.HuggingFace(**frozen),
        "frozen, random": anyfit.HuggingFace(**frozen, pretrained=False),
        "unfrozen, pre-trained": anyfit.HuggingFace(model=str(out), lr=5e-4, max_length=64),
    }
    for name, task in ways.items():
        fitted = anyfit.fit(task, train, test=test, target="target", epochs=3 if given.quick else 10)
        print(f"{name:<22}{fitted.splits['test']['accuracy']:.3f}")


def tell(event: dict[str, Any]) -> None:
    if event["event"] == "step":
        print(f"step {event['step']:>5}  loss of masked words {event['loss']:.3f}", flush=True)
