"""A CNN and an RNN learn the tone of reviews: an exercise written for transformers' Trainer, run by anyfit's.

python examples/imdb_cnn_rnn.py reviews.csv --out results

The file has columns text and label (IMDB exported as CSV); without one, review-like texts are made. --out keeps checkpoints, models
and a plot of the losses; --steps makes it short.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from anyfit.adapt.huggingface import Trainer  # the one changed import: it was transformers.Trainer


class Simple(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.build(config)
        self.loss = nn.CrossEntropyLoss()
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.output_layer(self.features(self.embeddings(input_ids), attention_mask))
        return (output,) if labels is None else (self.loss(output, labels), output)


class CNN(Simple):
    def build(self, config: Any) -> None:
        self.convolution = nn.Conv1d(config.embedding_dim, 10, 3, padding=1)
        self.output_layer = nn.Linear(10, config.num_labels)

    def features(self, words: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.relu(self.convolution(words.transpose(1, 2))).amax(2)  # the strongest answer of each filter, wherever it was


class RNN(Simple):
    def build(self, config: Any) -> None:
        self.rnn = nn.RNN(config.embedding_dim, 96, batch_first=True)
        self.output_layer = nn.Linear(96, config.num_labels)

    def features(self, words: Tensor, attention_mask: Tensor | None) -> Tensor:
        steps, _ = self.rnn(words)
        # the last real step: where texts are padded, steps[:, -1] has read padding after the text
        last = words.shape[1] - 1 if attention_mask is None else attention_mask.sum(1) - 1
        return steps[torch.arange(len(steps), device=steps.device), last]


def compute_accuracy(outputs_and_labels: Any) -> dict[str, float]:
    outputs, labels = outputs_and_labels
    return {"accuracy": (outputs.argmax(axis=-1) == labels).mean()}


def make_reviews(count: int, seed: int = 0) -> datasets.Dataset:
    """Texts of invented words, frequent and rare ones as in a language; about one in eight tells the tone, some are misleading."""
    draw = random.Random(seed)
    plain, tones = [f"plain{rank}" for rank in range(1, 1601)], [[f"{tone}{n}" for n in range(200)] for tone in ("bad", "good")]
    rows = []
    for _ in range(count):
        label = draw.randint(0, 1)
        text = draw.choices(plain, [1 / rank for rank in range(1, 1601)], k=draw.randint(15, 120))
        for place in range(0, len(text), 8):
            text[place + draw.randrange(min(8, len(text) - place))] = draw.choice(tones[label if draw.random() < 0.8 else 1 - label])
        rows.append({"text": " ".join(text), "label": label})
    return datasets.Dataset.from_list(rows)


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A vocabulary learnt from the training texts: nothing is downloaded."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))  # noqa: S106
    made.normalizer, made.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
    words = tokenizers.trainers.WordLevelTrainer(vocab_size=20_000, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    made.train_from_iterator(texts, words)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")  # noqa: S106


def plot(history: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots()
    for key, label in (("loss", "Training loss"), ("eval_loss", "Evaluation loss")):
        lines = [line for line in history if key in line]
        axes.plot([line["epoch"] for line in lines], [line[key] for line in lines], marker="o", label=label)
    axes.set_xlabel("epoch")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def main(reviews: str | None, steps: int, out: Path) -> None:
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_csv(reviews) if reviews else make_reviews(4000)
    parts = dataset.shuffle(seed=0).train_test_split(test_size=0.25, seed=0)
    tokenizer = train_tokenizer(list(parts["train"]["text"]))
    parts = parts.map(lambda entry: tokenizer(entry["text"], max_length=128, truncation=True), batched=True)
    config = transformers.PretrainedConfig(vocab_size=len(tokenizer), num_labels=len(set(parts["train"]["label"])), embedding_dim=64)
    every = max(1, steps // 5)  # 500 of 2,500
    for kind in (CNN, RNN):
        torch.manual_seed(0)
        trainer = Trainer(
            model=kind(config),
            args=transformers.TrainingArguments(
                str(out / kind.__name__ / "checkpoints"),
                eval_strategy="steps",
                eval_steps=every,
                logging_steps=every,
                save_steps=every,
                load_best_model_at_end=True,
                learning_rate=0.001,
                per_device_train_batch_size=8,
                max_steps=steps,
            ),
            train_dataset=parts["train"],
            eval_dataset=parts["test"],
            compute_metrics=compute_accuracy,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=5)],
        )
        trainer.train()
        results = trainer.evaluate(parts["test"])
        print(f"{kind.__name__}: loss {results['eval_loss']:.3f}, accuracy {results['eval_accuracy']:.3f}")
        trainer.save_model(str(out / kind.__name__ / "model"))
        plot(trainer.state.log_history, out / kind.__name__ / "losses.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("reviews", nargs="?", help="a CSV file with columns text and label")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, help="a folder to keep what is written; it is thrown away otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(given.reviews, given.steps, given.out or Path(temporary))
