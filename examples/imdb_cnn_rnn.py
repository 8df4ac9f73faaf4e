"""A CNN and an RNN learn the tone of reviews: an exercise written for transformers' Trainer, run by anyfit's.

python examples/imdb_cnn_rnn.py reviews.csv --out results

The file has columns text and label (IMDB exported as CSV); without one, review-like texts are made. --out keeps checkpoints, models
and a plot of the losses; --steps makes it short.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from anyfit.adapt.huggingface import Trainer  # the one changed import: it was transformers.Trainer


class SimpleCNN(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.convolution = nn.Conv1d(config.embedding_dim, config.num_filters, config.filter_size, padding=1)
        self.output_layer = nn.Linear(config.num_filters, config.num_labels)
        self.loss = nn.CrossEntropyLoss()
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        x = torch.relu(self.convolution(self.embeddings(input_ids).transpose(1, 2)))
        output = self.output_layer(x.amax(2))  # the strongest answer of each filter, wherever it was
        return (output,) if labels is None else (self.loss(output, labels), output)


class SimpleRNN(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.rnn = nn.RNN(config.embedding_dim, config.hidden_size, config.num_layers, config.nonlinearity, batch_first=True)
        self.output_layer = nn.Linear(config.hidden_size, config.num_labels)
        self.loss = nn.CrossEntropyLoss()
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        steps, _ = self.rnn(self.embeddings(input_ids))
        # the last real step: where texts are padded, steps[:, -1] has read padding after the text
        last = input_ids.shape[1] - 1 if attention_mask is None else attention_mask.sum(1) - 1
        output = self.output_layer(steps[torch.arange(len(steps), device=steps.device), last])
        return (output,) if labels is None else (self.loss(output, labels), output)


class LogSavingCallback(transformers.TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.logs: dict[str, list[float]] = defaultdict(list)
        self.training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if self.training:
            for k, v in logs.items():
                if k != "epoch" or v not in self.logs[k]:
                    self.logs[k].append(v)


def compute_accuracy(outputs_and_labels: Any) -> dict[str, float]:
    outputs, labels = outputs_and_labels
    return {"accuracy": (outputs.argmax(axis=-1) == labels).mean()}


def make_reviews(count: int, seed: int = 0) -> datasets.Dataset:
    """Texts of 2,000 invented words, frequent and rare ones as in a language; about one in eight tells the tone, some are misleading."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = sorted({"".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(3000)})
    draw.shuffle(words)
    plain, tones = words[:1600], (words[1600:1800], words[1800:2000])
    frequency = [1 / rank for rank in range(1, len(plain) + 1)]
    rows = []
    for _ in range(count):
        label = draw.randint(0, 1)
        text = draw.choices(plain, frequency, k=draw.randint(15, 120))
        for place in range(0, len(text), 8):
            text[place + draw.randrange(min(8, len(text) - place))] = draw.choice(tones[label if draw.random() < 0.8 else 1 - label])
        rows.append({"text": " ".join(text), "label": label})
    return datasets.Dataset.from_list(rows)


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A vocabulary learnt from the training texts: nothing is downloaded."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    made.normalizer, made.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(
        texts, tokenizers.trainers.WordPieceTrainer(vocab_size=20_000, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")  # noqa: S106


def plot(logs: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots()
    for key, label in (("loss", "Training loss"), ("eval_loss", "Evaluation loss")):
        axes.plot(logs["epoch"], logs[key], marker="o", label=label)
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
    sizes = {"vocab_size": len(tokenizer), "num_labels": len(set(parts["train"]["label"])), "embedding_dim": 64}
    torch.manual_seed(0)
    models = {
        "CNN": SimpleCNN(transformers.PretrainedConfig(**sizes, filter_size=3, num_filters=10)),
        "RNN": SimpleRNN(transformers.PretrainedConfig(**sizes, hidden_size=96, num_layers=1, nonlinearity="tanh")),
    }
    every = max(1, steps // 5)  # 500 of 2,500
    for name, model in models.items():
        trainer_args = transformers.TrainingArguments(
            str(out / name / "checkpoints"),
            eval_strategy="steps",
            logging_strategy="steps",
            load_best_model_at_end=True,
            eval_steps=every,
            logging_steps=every,
            save_steps=every,
            learning_rate=0.001,
            per_device_train_batch_size=8,
            max_steps=steps,
        )
        training_logs = LogSavingCallback()
        trainer = Trainer(
            model=model,
            args=trainer_args,
            train_dataset=parts["train"],
            eval_dataset=parts["test"],
            compute_metrics=compute_accuracy,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=5), training_logs],
        )
        trainer.train()
        results = trainer.evaluate(parts["test"])
        print(f"{name}: loss {results['eval_loss']:.3f}, accuracy {results['eval_accuracy']:.3f}")
        trainer.save_model(str(out / name / "model"))
        plot(training_logs.logs, out / name / "losses.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("reviews", nargs="?", help="a CSV file with columns text and label")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, help="a folder to keep what is written; it is thrown away otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(given.reviews, given.steps, given.out or Path(temporary))
