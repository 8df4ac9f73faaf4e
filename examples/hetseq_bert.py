"""HetSeq's second example, BERT pre-training: masked words and next sentences, learnt together by a small BERT that starts from nothing.

    python examples/hetseq_bert.py [FILE OF PLAIN TEXT]

Batches are cut by a budget of tokens, the rate rises and falls as in HetSeq's script. A sentence is a line of the file; without a file,
sentences are made. HetSeq adds the mean loss of masked words to that of next sentences, each with a count of its own, which no sum over
parts of a batch gives back. Here a row's loss is the mean over its own masked words plus that of its next sentence, and rows are counted.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import anyfit
from anyfit.adapt.hetseq import polynomial_decay
from anyfit.data import Uniform, uniform

PADDING, CLS, SEP, MASK, UNKNOWN = range(5)
IGNORED = -100
TOPICS = (
    "river boat water harbour fish rope anchor tide",
    "king castle sword crown knight horse tower battle",
    "engine wheel road driver brake fuel tunnel bridge",
)
FORMS = ("the {} is near the {}", "a {} and a {} behind the {}", "every {} has its {}", "we saw the {} without a {} or {}")


def make_texts(count: int, seed: int) -> list[str]:
    """Sentences that stay with their topic for a while."""
    draw, lines = random.Random(seed), list[str]()
    while len(lines) < count:
        words = draw.choice(TOPICS).split()
        lines += [draw.choice(FORMS).format(*draw.sample(words, 3)) for _ in range(draw.randint(8, 14))]
    return lines


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """[CLS] a sentence [SEP] the next one, or in half of the rows any other [SEP]."""

    def __init__(self, lines: list[str], vocabulary: dict[str, int], seed: int, longest: int = 62) -> None:
        draw = random.Random(seed)
        ids = [[vocabulary.get(word, UNKNOWN) for word in line.split()][: longest // 2 - 2] for line in lines]
        self.rows = []
        for place in range(len(ids) - 1):
            follows = draw.random() < 0.5
            other = ids[place + 1] if follows else ids[draw.randrange(len(ids))]
            self.rows.append(([CLS, *ids[place], SEP], [*other, SEP], int(follows)))
        self.lengths = [len(first) + len(second) for first, second, _ in self.rows]  # a budget of tokens needs them

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, second, follows = self.rows[index]
        segments = [0] * len(first) + [1] * len(second)
        return {"input_ids": torch.tensor(first + second), "token_type_ids": torch.tensor(segments), "target": torch.tensor(follows)}


class BertPreTraining(anyfit.Task):
    """B rows, T tokens of the longest, V words."""

    words: int
    width: int = 64
    layers: int = 2
    lr: float = 2e-3
    warmup_updates: int = 50
    total_num_update: int = 1200

    def plan(self) -> anyfit.Plan:
        return anyfit.Plan(steps=self.total_num_update, max_tokens=768, batch_size=None, clip=1.0)

    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        from transformers import BertConfig, BertForPreTraining

        config = BertConfig(
            vocab_size=self.words,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            intermediate_size=4 * self.width,
            max_position_embeddings=64,
            initializer_range=0.1,  # so small a model learns sooner from larger weights, and more without dropout
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PADDING,
        )
        return BertForPreTraining(config)

    def augment(self, batch: Any, uniform: Uniform) -> Any:
        """What is masked depends on a row's place alone, whoever holds it."""
        return {**batch, "chance": uniform(batch["input_ids"].shape[1], 3)}

    def step(self, model: nn.Module, batch: Any) -> anyfit.Step:
        ids_BT = batch["input_ids"]
        chosen_BT, how_BT, other_BT = batch["chance"].unbind(2)
        chosen_BT = (chosen_BT < 0.15) & (ids_BT > UNKNOWN)
        other_BT = (UNKNOWN + 1 + other_BT * (self.words - UNKNOWN - 1)).long()
        masked_BT = torch.where(how_BT < 0.8, MASK, torch.where(how_BT < 0.9, other_BT, ids_BT))
        labels_BT = ids_BT.masked_fill(~chosen_BT, IGNORED)
        outputs = self.forward(model, {**batch, "input_ids": torch.where(chosen_BT, masked_BT, ids_BT)})
        words_BT = cross_entropy(outputs.prediction_logits.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORED)
        words_B = words_BT.sum(1) / chosen_BT.sum(1).clamp(min=1)
        loss = words_B.mean() + cross_entropy(outputs.seq_relationship_logits, batch["target"])
        return anyfit.Step(loss, len(ids_BT), outputs.seq_relationship_logits, batch["target"], {"words": words_B.mean()})

    def evaluate_step(self, model: nn.Module, batch: Any) -> anyfit.Step:
        """The same words are masked at each evaluation."""
        return self.step(model, self.augment(batch, uniform(0, 0, torch.arange(len(batch["target"]), device=batch["target"].device))))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        ids_BT = batch["input_ids"]
        return model(input_ids=ids_BT, token_type_ids=batch["token_type_ids"], attention_mask=(ids_BT != PADDING).long())

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return self.forward(model, batch).seq_relationship_logits

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> anyfit.Schedule:
        return polynomial_decay(optimizer, warmup_updates=self.warmup_updates, total_num_update=self.total_num_update)


def main(file: str | None) -> None:
    torch.set_num_threads(1)  # threads gain nothing with so small a model
    text = Path(file).read_text(encoding="utf-8").lower() if file else "\n".join(make_texts(4000, 0))
    lines = [" ".join(re.findall(r"\w+|[^\w\s]", line)) for line in text.splitlines() if line.strip()]
    counted = Counter(word for line in lines for word in line.split()).most_common(3000)
    vocabulary = {word: UNKNOWN + 1 + place for place, (word, _) in enumerate(counted)}
    tested = len(lines) // 8
    task = BertPreTraining(words=UNKNOWN + 1 + len(vocabulary))
    train, test = Pairs(lines[tested:], vocabulary, 0), Pairs(lines[:tested], vocabulary, 1)
    run = anyfit.fit(task, train, test=test, on_event=tell)
    first = next(event["logs"]["words"] for event in run.history if event["event"] == "step")
    print(f"masked words: loss {first:.2f} at first, {run.splits['test']['words']:.2f} on other texts at the end")
    print(f"next sentences: accuracy {run.splits['test']['accuracy']:.3f}")


def tell(event: dict[str, Any]) -> None:
    if event["event"] == "step":
        print(f"step {event['step']:>4}  loss {event['loss']:.3f}  of masked words {event['logs']['words']:.3f}  rate {event['lr']:.5f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
