"""Text classification and regression: the convolutional and recurrent networks of the Hugging Face exercise, and a transformer.

With the exercise's numbers: TextCNN(embedding=64, filters=10, widths=(3,), dropout=0), TextRNN(cell="tanh", embedding=64, hidden=96,
bidirectional=False, pooling="last", dropout=0). B texts, T words of the longest, E embedding, H hidden units, C classes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from anyfit import data, dropout
from anyfit.errors import DataError, InputError, TaskError
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Task, adamw
from anyfit.tasks.fast import ConvolvedMaximum, TanhRNN
from anyfit.tasks.tabular import unit_of
from anyfit.update import Update
from anyfit.values import File, Plan

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TextCNN", "TextNetwork", "TextRNN", "TextTask", "TextTransformer"]


class TextTask(Task):
    """What text tasks share. Batch: `input_ids` (B, T), `lengths` (B,), `target` (B,).

    `vocabulary`: whole words, or byte pairs, learnt from the training texts; or `tokenizer`, any tokenizer.json. `least`:
    occurrences below which a word is unknown.
    """

    vocabulary: Literal["word", "bpe"] = "word"
    vocabulary_size: int = 30_000
    least: int = 1
    lowercase: bool = True
    tokenizer: File | None = None
    max_length: int = 256
    balance: bool = False
    lr: float = 2e-3
    weight_decay: float = 0.01

    def plan(self) -> Plan:
        return Plan(epochs=10, batch_size=50, bucket=True, best=True)

    def statistics(self, table: pa.Table, schema: Schema) -> Update:
        texts = self._texts(schema)
        total = super().statistics(table, schema)
        if self.tokenizer is not None:
            return total
        return total.joined(data.word_statistics(data.joined_texts(table, texts), "text", lowercase=self.lowercase))

    def prepare(self, schema: Schema, statistics: Update) -> Schema:
        fitted = super().prepare(schema, statistics)
        if self.tokenizer is not None:
            if not isinstance(self.tokenizer, File):
                raise TaskError(f"tokenizer (={self.tokenizer!r}) must be a File; write File.of({self.tokenizer!r})")
            text = self.tokenizer.read().decode()
        else:
            text = data.trained_tokenizer(
                statistics.sums("words:text"),
                self.vocabulary,
                size=self.vocabulary_size,
                least=self.least,
                lowercase=self.lowercase,
                framed=self.framed,
            )
        data.tokenizer_of(text)
        first = fitted[self._texts(schema)[0]]
        return fitted.replace([replace(first, tokenizer=text)])

    @property
    def framed(self) -> bool:
        """Whether [CLS] and [SEP] stand around each text."""
        return False

    def _texts(self, schema: Schema) -> list[str]:
        """The names of the text columns; refused where there is none, or a feature that is no text."""
        texts = [column.name for column in schema.of_type("text")]
        if not texts:
            have = ", ".join(f"{column.name} ({column.type})" for column in schema.features)
            raise DataError(f"task {type(self).__name__} needs a text column, but the data has: {have or 'none'}; force one with types")
        odd = next((column for column in schema.features if column.type != "text"), None)
        if odd is not None:
            raise DataError(
                f"column {odd.name!r} is of type {odd.type}, which task {type(self).__name__} does not take; leave it out (ignore), or "
                "force it to text (types)"
            )
        return texts

    def _tokenizer(self, schema: Schema) -> str:
        found = schema[self._texts(schema)[0]].tokenizer
        if found is None:
            raise DataError("the schema has no vocabulary yet; fit or prepare makes it from the training rows")
        return found

    def num_words(self, schema: Schema) -> int:
        """Rows of the embedding: the size of the vocabulary."""
        return data.tokenizer_of(self._tokenizer(schema)).get_vocab_size()

    def build_dataset(self, table: pa.Table, split: str, schema: Schema) -> Any:
        texts = self._texts(schema)
        absent = next((name for name in texts if name not in table.column_names), None)
        if absent is not None:
            raise DataError(f"column {absent!r} is missing; the table has: {', '.join(table.column_names)}")
        ids = data.encoded(data.joined_texts(table, texts), self._tokenizer(schema), self.max_length)
        targets = data.targets_of(table, schema, need_target=split != "predict", balanced=split == "train")
        return {"input_ids": ids, **targets}

    def example_row(self, schema: Schema) -> Any:
        return {
            "input_ids": torch.zeros(1, self.max_length, dtype=torch.long),
            "lengths": torch.full((1,), self.max_length),
        }

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return adamw(model, lr=self.lr, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.05)


class TextNetwork(TextTask):
    """What networks that start from nothing share.

    `embedding_std`: of fresh word vectors; torch's own is 1, in which rare words are loud. `unknown`: the share of words that
    training takes for unknown, so that the unknown word is learnt too.
    """

    embedding: int = 300
    embedding_std: float = 0.25
    dropout: float = 0.5
    unknown: float = 0.0


class _Thinning(nn.Dropout):
    """While training, some words are taken for the unknown one."""

    draws_by_place = True  # exact_dropout covers it

    def forward(self, input_ids: Tensor, unknown: int, padding: int | None) -> Tensor:  # type: ignore[override]
        if not (self.training and self.p):
            return input_ids
        dropped = dropout.dropped(self, self.p, input_ids.shape, input_ids.device)
        return torch.where(dropped & (input_ids != padding), unknown, input_ids)


class _Embedded(nn.Module):
    """Word vectors, some of them dropped, and the last layer. (In evaluation nothing is dropped.)"""

    def __init__(self, task: TextNetwork, schema: Schema, width: int) -> None:
        super().__init__()
        if schema.target is None:
            raise DataError(f"task {type(task).__name__} needs a target column; name it with target=...")
        tokenizer = data.tokenizer_of(task._tokenizer(schema))
        self.embeddings = nn.Embedding(task.num_words(schema), task.embedding, padding_idx=data.padding_of(tokenizer))
        nn.init.normal_(self.embeddings.weight, std=task.embedding_std)
        with torch.no_grad():
            self.embeddings.weight[self.embeddings.padding_idx].zero_()
        self.thinning, self.unknown_id = _Thinning(task.unknown), tokenizer.token_to_id("[UNK]")
        self.dropout = nn.Dropout(task.dropout)
        self.output_layer = nn.Linear(width, schema.num_outputs)
        self.unit = nn.Sequential(*unit_of(schema))

    def lookups(self) -> dict[str, tuple[nn.Embedding, tuple[int, ...]]]:
        """Which table a batch's entry indexes, and which rows are looked up beside: the unknown word."""
        return {"input_ids": (self.embeddings, () if self.unknown_id is None else (self.unknown_id,))}

    def thinned(self, input_ids: Tensor) -> Tensor:
        """(B, T) with some words taken for unknown while training."""
        if self.unknown_id is None:
            return input_ids
        out: Tensor = self.thinning(input_ids, self.unknown_id, self.embeddings.padding_idx)
        return out

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)"""
        out: Tensor = self.embeddings(self.thinned(input_ids))
        return out

    def finish(self, pooled_BH: Tensor) -> Tensor:
        """(B, H) -> logits (B, C), or numbers in the target's unit."""
        out: Tensor = self.unit(self.output_layer(self.dropout(pooled_BH)))
        return out


def _ended(input_ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) which steps are padding."""
    return torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths[:, None]


class ConvolutionalClassifier(_Embedded):
    """Filters of several widths over the words, their maxima, and a linear layer (Kim 2014)."""

    def __init__(self, task: TextCNN, schema: Schema) -> None:
        super().__init__(task, schema, task.filters * len(task.widths))
        self.convolutions = nn.ModuleList(ConvolvedMaximum(task.embedding, task.filters, width) for width in task.widths)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        ended_BT = _ended(input_ids, lengths)
        if len(self.convolutions) == 1:
            return self.finish(self.convolutions[0].looked_up(self.embeddings, self.thinned(input_ids), ended_BT))  # type: ignore[operator]
        words_BTE = self.embed(input_ids)
        pooled = [convolution(words_BTE, ended_BT) for convolution in self.convolutions]
        return self.finish(torch.cat(pooled, 1))


class TextCNN(TextNetwork):
    """Classify or regress texts by filters over their words (Kim 2014)."""

    filters: int = 100
    widths: tuple[int, ...] = (3, 4, 5)

    def build_model(self, schema: Schema) -> nn.Module:
        return ConvolutionalClassifier(self, schema)


class RecurrentClassifier(_Embedded):
    """A recurrent network over the words; its last real state, or the maximum or mean over the real ones, and a linear layer."""

    def __init__(self, task: TextRNN, schema: Schema) -> None:
        ways = 2 if task.bidirectional else 1
        super().__init__(task, schema, task.hidden * ways)
        self.pooling, self.ways = task.pooling, ways
        plain = task.cell == "tanh" and task.layers == 1 and ways == 1
        kinds: dict[str, Any] = {"tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
        self.rnn = (
            TanhRNN(task.embedding, task.hidden)
            if plain
            else kinds[task.cell](task.embedding, task.hidden, task.layers, bidirectional=task.bidirectional, batch_first=True)
        )

    def _states(self, words_BTE: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, H) states of every real step; what stands at padding is not used."""
        if isinstance(self.rnn, TanhRNN):
            return self.rnn.states(words_BTE).transpose(0, 1)
        if self.ways == 1 or torch.compiler.is_exporting():  # one row has no padding
            return self.rnn(words_BTE)[0]  # type: ignore[no-any-return]
        packed = nn.utils.rnn.pack_padded_sequence(words_BTE, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words_BTE.shape[1])[0]

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        words_BTE = self.dropout(self.embed(input_ids)) if self.pooling != "last" or self.ways == 2 else self.embed(input_ids)
        states_BTH = self._states(words_BTE, lengths)
        if self.pooling == "last":
            rows = torch.arange(len(lengths), device=lengths.device)
            last_BH = states_BTH[rows, lengths - 1]
            if self.ways == 2:  # the backward direction ends at the first word
                half = last_BH.shape[1] // 2
                last_BH = torch.cat((last_BH[:, :half], states_BTH[:, 0, half:]), 1)
            return self.finish(last_BH)
        ended_BT1 = _ended(input_ids, lengths)[:, :, None]
        if self.pooling == "max":
            return self.finish(states_BTH.masked_fill(ended_BT1, -torch.inf).amax(1))
        return self.finish(states_BTH.masked_fill(ended_BT1, 0.0).sum(1) / lengths[:, None])


class TextRNN(TextNetwork):
    """Classify or regress texts by a recurrent network."""

    cell: Literal["tanh", "gru", "lstm"] = "gru"
    hidden: int = 128
    layers: int = 1
    bidirectional: bool = True
    pooling: Literal["last", "max", "mean"] = "max"
    embedding: int = 200
    embedding_std: float = 1.0
    unknown: float = 0.2
    lr: float = 3e-3

    def plan(self) -> Plan:
        return super().plan().updated(epochs=15)

    def build_model(self, schema: Schema) -> nn.Module:
        return RecurrentClassifier(self, schema)


class TransformerClassifier(_Embedded):
    """A transformer encoder (layer norm first), the mean over its real states, and a linear layer."""

    def __init__(self, task: TextTransformer, schema: Schema) -> None:
        super().__init__(task, schema, task.embedding)
        layer = nn.TransformerEncoderLayer(
            task.embedding, task.heads, 4 * task.embedding, task.dropout / 2, "gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # the three modules of a layer drop out already; this one would be a function
        self.encoder = nn.TransformerEncoder(layer, task.layers, nn.LayerNorm(task.embedding), enable_nested_tensor=False)
        half = torch.exp(torch.arange(0, task.embedding, 2) * (-math.log(10_000.0) / task.embedding))
        angles = torch.arange(task.max_length)[:, None] * half
        places = torch.stack((angles.sin(), angles.cos()), 2).reshape(task.max_length, -1)[:, : task.embedding]
        self.register_buffer("places", places, persistent=False)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        ended_BT = _ended(input_ids, lengths)
        words_BTE = self.embed(input_ids) * math.sqrt(self.embeddings.embedding_dim) + self.places[: input_ids.shape[1]]  # type: ignore[index]
        states_BTE = self.encoder(words_BTE, src_key_padding_mask=ended_BT)
        return self.finish(states_BTE.masked_fill(ended_BT[:, :, None], 0.0).sum(1) / lengths[:, None])


class TextTransformer(TextNetwork):
    """Classify or regress texts by a transformer encoder that starts from nothing."""

    heads: int = 4
    layers: int = 2
    dropout: float = 0.2

    def build_model(self, schema: Schema) -> nn.Module:
        if self.embedding % self.heads:
            raise InputError(f"embedding (={self.embedding}) must be a multiple of heads (={self.heads})")
        return TransformerClassifier(self, schema)
