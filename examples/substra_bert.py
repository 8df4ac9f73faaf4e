"""Substra's second example as one task: BERT with frozen layers learns to tell questions apart; only its head travels.

python examples/substra_bert.py FOLDER OF TREC

The data set is a torch Dataset that gives dicts, the loss is the model's own. The second run exchanges every weight, as Substra does:
the figures are the same to the last digit, the bytes are not. The encoder is small and random, for nothing is downloaded.
"""

import sys
from pathlib import Path

import tokenizers
import torch
import transformers

import anyfit

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


class TrecDataset(torch.utils.data.Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __getitem__(self, index):
        found = self.tokens[index]
        ids, mask = torch.tensor(found.ids), torch.tensor(found.attention_mask)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(self.labels[index])}

    def __len__(self):
        return len(self.labels)


class Bert(anyfit.Task):
    words: int
    width: int = 64
    lr: float = 1e-2

    def build_model(self, schema):
        sizes = {"hidden_size": self.width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * self.width}
        config = transformers.BertConfig(
            vocab_size=self.words, num_labels=len(LABELS), hidden_dropout_prob=0.0, initializer_range=0.2, **sizes
        )
        model = transformers.BertForSequenceClassification(config)
        for param in model.bert.parameters():
            param.requires_grad = False
        return model


class Everything(Bert):
    def shared(self, name, tensor):
        return tensor.is_floating_point()


def read(path):
    lines = Path(path).read_text("latin-1").splitlines()
    return [line.partition(" ")[2] for line in lines], [LABELS.index(line.partition(":")[0]) for line in lines]


questions, labels = read(Path(sys.argv[1]) / "train_5500.label")
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))  # noqa: S106 - a word, no password
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer.train_from_iterator(questions, tokenizers.trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["[PAD]", "[UNK]"]))
tokenizer.enable_padding(length=40)
tokens, labels = tokenizer.encode_batch(questions[:2000]), labels[:2000]
sites = {name: TrecDataset(tokens[place::2], labels[place::2]) for place, name in enumerate(("one", "two"))}
asked, answers = read(Path(sys.argv[1]) / "TREC_10.label")
test = TrecDataset(tokenizer.encode_batch(asked), answers)

with torch.device("meta"):  # as large as the usual BERT, without its memory
    base = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=len(LABELS)))
whole, head = (sum(parameter.numel() for parameter in part.parameters()) for part in (base, base.classifier))
print(f"of BERT-base {head:,} of {whole:,} weights would travel: {whole // head:,} times less")

for task in (Bert(words=tokenizer.get_vocab_size()), Everything(words=tokenizer.get_vocab_size())):
    run = anyfit.federate(task, sites, rounds=2, batch_size=64, test=test)
    moved = run.history[0]["bytes_up"] // len(sites)
    print(f"{type(task).__name__:<11} accuracy {run.splits['test']['accuracy']}  {moved:>12,} bytes from each site in a round")
