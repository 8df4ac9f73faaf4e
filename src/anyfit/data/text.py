"""Texts to numbers: vocabularies from additive word counts, any tokenizer of the `tokenizers` library, flat arrays of ids.

A column keeps its tokenizer as that library's own JSON, so that it is part of the state and the same everywhere.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from anyfit.data.blocks import cache_folder
from anyfit.data.ragged import Ragged
from anyfit.errors import DataError, MissingExtra, StorageError
from anyfit.update import COUNTS, Update
from anyfit.values import atomic, digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SPECIAL", "encoded", "joined_texts", "padding_of", "tokenizer_of", "trained_tokenizer", "word_statistics"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PADDINGS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
CACHED_BYTES = 4 << 20  # texts of more bytes are kept as numbers for the next time
CHUNK_ROWS = 8192


def joined_texts(table: pa.Table, names: list[str]) -> pa.ChunkedArray:
    """(rows,) the text columns of each row, one after the other; a missing text is an empty one."""
    columns = [pc.fill_null(table[name].cast(pa.string()), "") for name in names]
    return columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "\n")


def word_statistics(texts: pa.ChunkedArray, name: str, *, lowercase: bool) -> Update:
    """How often each word stands in these texts; counts of any parts of the rows add up to those of all."""
    tokenizers = _library()
    lower, split = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()  # Python's own differ on many scripts
    counts: collections.Counter[str] = collections.Counter()
    for chunk in texts.chunks:
        for start in range(0, len(chunk), CHUNK_ROWS):
            for text in chunk.slice(start, CHUNK_ROWS).to_pylist():
                counts.update(word for word, _ in split.pre_tokenize_str(lower.normalize_str(text) if lowercase else text))
    return Update.of(f"words:{name}", {word: torch.tensor(count) for word, count in counts.items()}, float(len(texts)), COUNTS)


def trained_tokenizer(
    counts: Mapping[str, Any], kind: Literal["word", "bpe"], *, size: int, least: int, lowercase: bool, framed: bool = False
) -> str:
    """A tokenizer (JSON) from word counts: the most frequent `size` words of at least `least` occurrences, or as many byte pairs.

    `framed` puts [CLS] and [SEP] around each text, as BERT wants it.
    """
    tokenizers = _library()
    words = sorted(((word, int(count)) for word, count in counts.items()), key=lambda item: (-item[1], item[0]))
    if kind == "word":
        kept = [word for word, count in words if count >= least and word not in SPECIAL][: max(0, size - len(SPECIAL))]
        vocabulary = {word: index for index, word in enumerate((*SPECIAL, *kept))}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106  (no password)
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bpe":
        # a mark before each word, and none on what follows within it: the library numbers the latter in an order that changes
        parts = [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)]
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, min_frequency=least, special_tokens=list(SPECIAL), show_progress=False)
        repeated = (" ".join([word] * min(count, 1000)) for word, count in words)  # pairs within words are all that is counted
        tokenizer.train_from_iterator(repeated, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    if lowercase:
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    if framed:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
        )
    return str(tokenizer.to_str())


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
        import tokenizers.trainers
    except ImportError as error:
        raise MissingExtra("tokenizers", "hf") from error
    return tokenizers


@functools.lru_cache(maxsize=8)
def tokenizer_of(text: str) -> Tokenizer:
    """The tokenizer of its JSON."""
    try:
        tokenizer: Tokenizer = _library().Tokenizer.from_str(text)
    except MissingExtra:
        raise
    except Exception as error:
        raise DataError(f"this is no tokenizer of the tokenizers library: {error}; give its tokenizer.json") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def padding_of(tokenizer: Tokenizer) -> int:
    """The id that fills up shorter texts: the tokenizer's own, else 0."""
    return next((identity for word in PADDINGS if (identity := tokenizer.token_to_id(word)) is not None), 0)


def encoded(texts: pa.ChunkedArray, tokenizer_json: str, max_length: int) -> Ragged:
    """Ids of each text, cut at `max_length`; an empty text is one unknown word. Large sets are kept on disk for the next time."""
    if texts.nbytes <= CACHED_BYTES:
        return _encoded(texts, tokenizer_json, max_length)
    # chunks by themselves, where they are large: they are a file's blocks, which each epoch puts together in another way
    large = max(chunk.nbytes for chunk in texts.chunks) >= CACHED_BYTES / 4
    pieces = [
        _kept(pa.chunked_array(part), tokenizer_json, max_length) for part in ([[c] for c in texts.chunks] if large else [texts.chunks])
    ]
    offsets = [torch.zeros(1, dtype=torch.int64)]
    for piece in pieces:
        offsets.append(piece.offsets[1:] + offsets[-1][-1])
    return Ragged(torch.cat([piece.values for piece in pieces]), torch.cat(offsets), pieces[0].padding)


def _kept(texts: pa.ChunkedArray, tokenizer_json: str, max_length: int) -> Ragged:
    """As `_encoded`, kept on disk. What is not whole there is made anew; a full disk costs only the next time."""
    hasher = hashlib.sha256()
    for chunk in texts.chunks:
        for text in chunk:
            data = text.as_buffer()
            hasher.update(len(data).to_bytes(8, "little"))
            hasher.update(data)
    key = digest(["tokens", 2, hasher.hexdigest(), hashlib.sha256(tokenizer_json.encode()).hexdigest(), max_length])
    place = cache_folder() / f"{key[:32]}.safetensors"
    with suppress(SafetensorError, KeyError, OSError):
        held = load_file(place)
        if _checksum(held["values"], held["offsets"]) == held["sha256"].tolist():
            return Ragged(held["values"], held["offsets"], padding_of(tokenizer_of(tokenizer_json)))
    result = _encoded(texts, tokenizer_json, max_length)
    checksum = torch.tensor(_checksum(result.values, result.offsets), dtype=torch.uint8)
    with suppress(StorageError, SafetensorError), atomic(place) as temporary:
        save_file({"values": result.values, "offsets": result.offsets, "sha256": checksum}, temporary)
    return result


def _checksum(*tensors: torch.Tensor) -> list[int]:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy().data)
    return list(hasher.digest())


def _encoded(texts: pa.ChunkedArray, tokenizer_json: str, max_length: int) -> Ragged:
    tokenizer = tokenizer_of(tokenizer_json)
    framing = tokenizer.num_special_tokens_to_add(False)
    if max_length <= framing:
        raise DataError(f"max_length (={max_length}) leaves no room for words beside {framing} special tokens; raise it")
    unknown = next((i for word in ("[UNK]", "<unk>") if (i := tokenizer.token_to_id(word)) is not None), padding_of(tokenizer))
    values, lengths = [], []
    tokenizer.enable_truncation(max_length)
    try:
        for chunk in texts.chunks:
            for start in range(0, len(chunk), CHUNK_ROWS):
                rows = [one.ids or [unknown] for one in tokenizer.encode_batch_fast(chunk.slice(start, CHUNK_ROWS).to_pylist())]
                lengths += [len(row) for row in rows]
                values.append(torch.tensor([identity for row in rows for identity in row], dtype=torch.int32))
    finally:
        tokenizer.no_truncation()
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return Ragged(torch.cat(values) if values else torch.zeros(0, dtype=torch.int32), offsets, padding_of(tokenizer))
