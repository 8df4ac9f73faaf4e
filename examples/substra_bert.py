"""Substra's second example as one task: BERT with frozen layers learns to tell questions apart; only its head travels.

python examples/substra_bert.py FOLDER OF TREC

The data set is a torch Dataset that gives dicts, the loss is the model's own. The second run exchanges every weight, as Substra does:
the figures are the same to the last digit, the bytes are not. The encoder is small and random, for nothing is downloaded.
"""

import sys
from pathlib import Path

import tokenizers
import torch
from transformers import BertConfig, BertForSequenceClassification

import anyfit

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


class Questions(torch.utils.data.Dataset):
    def __init__(self, lines, tokenizer):
        self.tokens = tokenizer.encode_batch([line.partition(" ")[2] for line in lines])
        self.labels = [LABELS.index(line.partition(":")[0]) for line in lines]

    def __getitem__(self, index):
        row = {"input_ids": self.tokens[index].ids, "attention_mask": self.tokens[index].attention_mask, "labels": self.labels[index]}
        return {name: torch.tensor(value) for name, value in row.items()}

    def __len__(self):
        return len(self.labels)


class Bert(anyfit.Task):
    lr: float = 1e-2

    def build_model(self, schema):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 2000}
        model = BertForSequenceClassification(BertConfig(num_labels=len(LABELS), hidden_dropout_prob=0.0, initializer_range=0.2, **sizes))
        model.bert.requires_grad_(False)
        return model


class Everything(Bert):
    def shared(self, name, tensor):
        return tensor.is_floating_point()


train, test = ((Path(sys.argv[1]) / name).read_text("latin-1").splitlines() for name in ("train_5500.label", "TREC_10.label"))
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))  # noqa: S106 - a word, no password
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["[PAD]", "[UNK]"])
tokenizer.train_from_iterator((line.partition(" ")[2] for line in train), trainer)
tokenizer.enable_padding(length=40)
sites = {name: Questions(train[place:2000:2], tokenizer) for place, name in enumerate(("one", "two"))}

with torch.device("meta"):  # as large as the usual BERT, without its memory
    base = BertForSequenceClassification(BertConfig(num_labels=len(LABELS)))
whole, head = base.num_parameters(), base.classifier.weight.numel() + base.classifier.bias.numel()
print(f"of BERT-base {head:,} of {whole:,} weights would travel: {whole // head:,} times less")

for task in (Bert(), Everything()):
    run = anyfit.federate(task, sites, rounds=2, batch_size=64, test=Questions(test, tokenizer))
    moved = run.history[0]["bytes_up"] // len(sites)
    print(f"{type(task).__name__:<11} accuracy {run.splits['test']['accuracy']}  {moved:>12,} bytes from each site in a round")
