"""Text tasks: fast layers equal torch's, padding and neighbours change nothing, the vocabulary is that of the training rows."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyfit
from anyfit import Source, data
from anyfit.data import tokenizer_of
from anyfit.errors import DataError, InputError, TaskError
from anyfit.prepare import prepare
from anyfit.tasks.fast import NARROW, ConvolvedMaximum, TanhRNN, _Unrolled

SIZES = st.integers(1, 7)


# Fast layers


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
@settings(max_examples=40)
def test_states_and_all_gradients_of_the_recurrent_layer_are_those_of_torch(
    rows: int, steps: int, inputs: int, hidden: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = TanhRNN(inputs, hidden).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs = nn.RNN(inputs, hidden, batch_first=True).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    words = torch.randn(rows, steps, inputs, generator=generator, dtype=dtype)
    weights = torch.randn(rows, steps, hidden, generator=generator, dtype=dtype)
    results = []
    for states_of, layer in ((lambda x: ours.states(x).transpose(0, 1), ours), (lambda x: theirs(x)[0], theirs)):
        x = words.clone().requires_grad_()
        states = states_of(x)
        (states * weights).sum().backward()
        results.append([states.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradients_of_the_unrolled_recurrence_are_those_of_finite_differences(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    shapes = ((2, steps, 3), (4, 3), (4, 4), (4,))
    given = tuple(torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(_Unrolled.apply, given)
    assert torch.autograd.gradcheck(lambda *x: _Unrolled.apply(*x)[-1].sum(), given), "a gradient that is not contiguous"


def test_a_recurrent_layer_under_autocast_is_torchs_own() -> None:
    ours, words = TanhRNN(3, 4), torch.randn(2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.states(words), ours(words)[0].transpose(0, 1))


@given(SIZES, st.integers(1, 12), SIZES, st.sampled_from([1, 2, 5, NARROW]), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=60)
def test_the_convolved_maximum_is_torchs_convolution_relu_and_maximum(
    rows: int, steps: int, width: int, channels: int, size: int, seed: int
) -> None:
    """For odd sizes it is padding size // 2; for even ones, torch's padding "same"."""
    generator = torch.Generator().manual_seed(seed)
    ours = ConvolvedMaximum(width, channels, size).double()
    theirs = nn.Conv1d(width, channels, size, padding=size // 2 if size % 2 else 0).double()
    theirs.load_state_dict(ours.state_dict())
    words = torch.randn(rows, steps, width, generator=generator, dtype=torch.float64)
    longer = nn.functional.pad(words, (0, 0, 0, 4))
    ended = (torch.arange(steps + 4) >= steps).expand(rows, -1)
    weights = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    results = []
    for pooled_of, layer in (
        (ours, ours),
        (lambda x: ours(nn.functional.pad(x, (0, 0, 0, 4)), ended), ours),
        (lambda x: _plain(theirs, x, size), theirs),
    ):
        x = words.clone().requires_grad_()
        layer.zero_grad()
        pooled = pooled_of(x)
        (pooled * weights).sum().backward()
        results.append([pooled.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours(longer, ended), ours(words), atol=1e-12)


@given(SIZES, st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=60)
def test_looking_up_only_the_words_beneath_the_maxima_gives_the_same(
    rows: int, steps: int, channels: int, size: int, padded: bool, seed: int
) -> None:
    """Long texts and few filters take the short way; the values and all gradients are those of the long one."""
    generator = torch.Generator().manual_seed(seed)
    table, layer = nn.Embedding(30, 5, padding_idx=0).double(), ConvolvedMaximum(5, channels, size).double()
    with torch.no_grad():
        for parameter in (table.weight, *layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        table.weight[0].zero_()
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator) if padded else torch.full((rows,), steps)
    ended = torch.arange(steps) >= lengths[:, None]
    ids = torch.randint(1, 30, (rows, steps), generator=generator).masked_fill(ended, 0)
    weights = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    results = []
    for pooled in (lambda: layer.looked_up(table, ids, ended), lambda: layer(table(ids), ended)):
        for module in (table, layer):
            module.zero_grad()
        out = pooled()
        (out * weights).sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in (table.weight, *layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(layer.looked_up(table, ids, ended), layer(table(ids), ended))


def _plain(convolution: nn.Conv1d, words: Tensor, size: int) -> Tensor:
    x = words.transpose(1, 2)
    if not size % 2:
        x = nn.functional.pad(x, ((size - 1) // 2, size - 1 - (size - 1) // 2))
    return nn.AdaptiveMaxPool1d(1)(nn.functional.relu(convolution(x))).squeeze(2)


# A small set that can be learnt


def sentences(count: int = 240, seed: int = 0) -> pa.Table:
    """The label is told by one of a few words among others, and not by how long the text is."""
    draw = random.Random(seed)
    telling = {"food": ["bread", "soup", "apple"], "sport": ["ball", "race", "goal"], "music": ["song", "drum", "choir"]}
    plain = [f"word{index}" for index in range(40)]
    rows = []
    for index in range(count):
        label = list(telling)[index % 3]
        words = draw.choices(plain, k=draw.randint(0, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(telling[label]))
        rows.append((" ".join(words), label))
    return pa.table({"text": [text for text, _ in rows], "target": [label for _, label in rows]})


SMALL: dict[str, anyfit.Task] = {
    "cnn": anyfit.TextCNN(embedding=24, filters=12, widths=(2, 3)),
    "cnn-exercise": anyfit.TextCNN(embedding=24, filters=2, widths=(3,), dropout=0),
    "cnn-wide": anyfit.TextCNN(embedding=24, filters=50, widths=(3,)),
    "rnn": anyfit.TextRNN(embedding=24, hidden=20),
    "rnn-lstm": anyfit.TextRNN(embedding=24, hidden=20, cell="lstm", pooling="mean", layers=2),
    "rnn-last": anyfit.TextRNN(embedding=24, hidden=20, pooling="last"),
    "rnn-one-way": anyfit.TextRNN(embedding=24, hidden=20, bidirectional=False, pooling="max"),
    "rnn-exercise": anyfit.TextRNN(cell="tanh", embedding=24, hidden=20, bidirectional=False, pooling="last", dropout=0, unknown=0),
    "rnn-tanh-deep": anyfit.TextRNN(cell="tanh", embedding=24, hidden=20, bidirectional=False, layers=2, pooling="last"),
    "transformer": anyfit.TextTransformer(embedding=24, heads=2),
}
EACH = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL)
FIT: dict[str, Any] = {"best": False, "batch_size": 20}
TEXT = {"text": "text"}  # few different texts would be taken for categories


@pytest.mark.parametrize("name", ["cnn", "rnn", "rnn-exercise", "transformer"])
def test_a_small_set_is_learnt(name: str) -> None:
    run = anyfit.fit(SMALL[name].replaced(lr=0.01), sentences(), test=sentences(90, seed=1), **{**FIT, "epochs": 16})
    assert run.splits["test"]["accuracy"] > 0.9


@EACH
def test_check_finds_nothing_wrong(task: anyfit.Task) -> None:
    seen = anyfit.check(task, sentences(60), **FIT)
    assert seen["ok"], seen["problems"]


@EACH
def test_predictions_depend_on_neither_padding_nor_neighbours(task: anyfit.Task) -> None:
    run = anyfit.fit(task, sentences(60), **{**FIT, "epochs": 1}, dtype="float64")
    texts = ["soup", "", "a drum of word3", "word1 word2 " * 30 + "ball", "never seen at all", "goal ."]
    together = outputs(run, texts)
    for index, text in enumerate(texts):
        assert torch.allclose(outputs(run, [text])[0], together[index], atol=1e-10)
    assert torch.allclose(outputs(run, texts[::-1]).flip(0), together, atol=1e-10)
    assert together.isfinite().all()


def outputs(run: Any, texts: list[str]) -> Tensor:
    """What the model says of texts in one batch."""
    schema = anyfit.Schema.from_json(run.record["schema"])
    rows = run.task.build_dataset(pa.table({"text": pa.array(texts, pa.string())}), "predict", schema)["input_ids"]
    places = torch.arange(len(texts))
    run.model.eval()
    with torch.no_grad():
        return run.task.predict(run.model, {"input_ids": rows.padded(places), "lengths": rows.lengths})


@EACH
def test_a_resume_is_exact(task: anyfit.Task, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 5:
            raise Stop

    options: dict[str, Any] = {**FIT, "epochs": 3, "seed": 4, "checkpoint_every_s": 0.0, "log_every": 3}
    whole = anyfit.fit(task, sentences(60), run=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        anyfit.fit(task, sentences(60), run=tmp_path / "cut", on_event=stop, **options)
    again = anyfit.fit(task, sentences(60), run=tmp_path / "cut", resume=True, **options)
    assert again.history == whole.history
    assert all(torch.equal(again.state.model[name], tensor) for name, tensor in whole.state.model.items())


def test_the_same_seed_gives_the_same_result_and_another_another() -> None:
    first, second, third = (anyfit.fit(SMALL["rnn"], sentences(60), seed=seed, **{**FIT, "epochs": 2}) for seed in (1, 1, 2))
    assert first.history == second.history != third.history


def test_batches_of_texts_of_like_length_are_the_same_rows_and_learn_the_same() -> None:
    widths = {}
    for bucket in (True, False):
        prepared = prepare(SMALL["cnn"], sentences(), target=None, validation=None, test=None, plan={**FIT, "bucket": bucket})
        batches = prepared.batches("train")
        windows = [batches.window(anyfit.state.Position(index, 0, index))[0] for index in range(12)]
        assert sorted(torch.cat([batch["lengths"] for batch in windows]).tolist()) == sorted(batches.columns["input_ids"].lengths.tolist())
        widths[bucket] = sum(batch["input_ids"].shape[1] for batch in windows)
        run = anyfit.fit(SMALL["cnn"].replaced(lr=0.01), sentences(), test=sentences(90, 1), **{**FIT, "bucket": bucket, "epochs": 8})
        assert run.splits["test"]["accuracy"] > 0.9
    assert widths[True] < 0.8 * widths[False]


# Vocabularies


def vocabulary(run: Any) -> dict[str, int]:
    column = next(column for column in run.record["schema"]["columns"] if column.get("tokenizer"))
    return tokenizer_of(column["tokenizer"]).get_vocab()


def test_the_vocabulary_is_learnt_from_the_training_rows_only() -> None:
    test = pa.table({"text": ["soup unheard", "ball unheard"], "target": ["food", "sport"]})
    run = anyfit.fit(SMALL["cnn"], sentences(60), test=test, validation=test, **{**FIT, "epochs": 1})
    assert "soup" in vocabulary(run) and "unheard" not in vocabulary(run)
    assert run.model.embeddings.num_embeddings == len(vocabulary(run))
    assert torch.equal(outputs(run, ["soup unheard"]), outputs(run, ["soup unknown"]))


def test_words_that_are_rare_or_beyond_the_size_are_unknown() -> None:
    table = pa.table({"text": ["one two two three three three"] * 3 + ["once One"], "target": ["a", "b", "a", "b"]})

    def words(**fields: Any) -> set[str]:
        source = Source(table, types=TEXT)
        prepared = prepare(anyfit.TextCNN(**fields), source, target=None, validation=None, test=None, plan={"batch_size": 2, "best": False})
        return {word for word in tokenizer_of(prepared.schema["text"].tokenizer).get_vocab() if not word.startswith("[")}

    assert words(least=4) == {"one", "two", "three"}, "One is one, so it stands there four times"
    assert words(vocabulary_size=7, lowercase=False) == {"three", "two"}, "five are special"
    assert words(lowercase=False) == {"one", "two", "three", "once", "One"}


def test_byte_pairs_spell_words_that_were_never_seen() -> None:
    task = anyfit.TextCNN(embedding=24, filters=12, widths=(2, 3), vocabulary="bpe", vocabulary_size=120, lr=0.01)
    run = anyfit.fit(task, sentences(), test=sentences(90, 1), **{**FIT, "epochs": 10})
    assert run.splits["test"]["accuracy"] > 0.9 and len(vocabulary(run)) <= 120
    tokenizer = tokenizer_of(next(c["tokenizer"] for c in run.record["schema"]["columns"] if c.get("tokenizer")))
    assert "[UNK]" not in tokenizer.encode("breadrum").tokens


def test_a_given_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    first = anyfit.fit(SMALL["cnn"], sentences(60), **{**FIT, "epochs": 1})
    text = next(c["tokenizer"] for c in first.record["schema"]["columns"] if c.get("tokenizer"))
    (tmp_path / "tokenizer.json").write_text(text)
    task = SMALL["cnn"].replaced(tokenizer=str(tmp_path / "tokenizer.json"))
    other = Source(pa.table({"text": ["soup unheard", "ball unheard"] * 10, "target": ["food", "sport"] * 10}), types=TEXT)
    run = anyfit.fit(task, other, **{**FIT, "epochs": 1}, run=tmp_path / "run")
    assert vocabulary(run) == vocabulary(first) and "unheard" not in vocabulary(run)
    with pytest.raises(TaskError, match=re.escape("tokenizer (='t.json') must be a File; write File.of('t.json')")):
        anyfit.fit(anyfit.TextCNN(tokenizer="t.json"), other, **{**FIT, "epochs": 1})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="has changed since its hash was taken"):
        anyfit.fit(task, other, **{**FIT, "epochs": 1})
    with pytest.raises(DataError, match=re.escape("is no tokenizer of the tokenizers library")):
        anyfit.fit(SMALL["cnn"].replaced(tokenizer=str(tmp_path / "tokenizer.json")), other, **{**FIT, "epochs": 1})


def test_a_tokenizer_without_a_word_for_padding_still_pads_nothing_that_counts(tmp_path: Path) -> None:
    """Id 0 is then a word like others."""
    vocabulary = {word: index for index, word in enumerate(["soup", "ball", "of", "drum", "<unk>"])}
    plain = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": plain}))
    table = pa.table({"text": ["soup of of", "ball of of", "drum"] * 20, "target": ["food", "sport", "music"] * 20})
    source = Source(table, types=TEXT)
    run = anyfit.fit(
        anyfit.TextCNN(embedding=24, filters=12, widths=(1, 3), lr=0.02, tokenizer=anyfit.File.of(tmp_path / "t.json")),
        source,
        dtype="float64",
        **{**FIT, "epochs": 6},
    )
    assert anyfit.evaluate(run, source)["accuracy"] == 1.0
    assert torch.allclose(outputs(run, ["soup", "of " * 9])[0], outputs(run, ["soup"])[0], atol=1e-12)


# Texts as they come


def test_empty_missing_and_unseen_texts_are_read() -> None:
    texts = pa.array(["soup", None, "", "ball", "  ", "soup"] * 10, pa.string())
    source = Source(pa.table({"text": texts, "target": ["food", "none", "none", "sport", "none", "food"] * 10}), types=TEXT)
    run = anyfit.fit(SMALL["cnn"].replaced(lr=0.02), source, **{**FIT, "epochs": 8})
    assert anyfit.evaluate(run, source)["accuracy"] == 1.0
    assert torch.equal(outputs(run, [""]), outputs(run, ["unseen"]))


def test_several_text_columns_are_read_one_after_the_other() -> None:
    draw = random.Random(0)
    heads, bodies = draw.choices(["red", "blue", "old"], k=120), draw.choices(["cat", "dog", "owl"], k=120)
    answers = ["yes" if head == "red" or body == "owl" else "no" for head, body in zip(heads, bodies, strict=True)]
    table = pa.table({"head": heads, "body": bodies, "answer": answers})
    source = Source(table, target="answer", types={"head": "text", "body": "text"})
    run = anyfit.fit(SMALL["cnn"].replaced(lr=0.02), source, **{**FIT, "epochs": 10})
    assert anyfit.evaluate(run, source)["accuracy"] > 0.95
    with pytest.raises(DataError, match="column 'body' is missing"):
        anyfit.predict(run, table.drop(["body"]))


def test_words_beyond_max_length_are_not_read() -> None:
    run = anyfit.fit(SMALL["cnn"].replaced(max_length=4), sentences(60), **{**FIT, "epochs": 1})
    long, short = outputs(run, ["word1 word2 word3 word4 soup", "word1 word2 word3 word4"])
    assert torch.equal(long, short)
    run = anyfit.fit(SMALL["transformer"].replaced(max_length=4), sentences(60), **{**FIT, "epochs": 1})
    assert outputs(run, ["word1 " * 50]).isfinite().all()


def test_what_is_no_text_is_refused_by_name() -> None:
    table = sentences(60)
    with pytest.raises(DataError, match=re.escape("needs a text column, but the data has: x (continuous)")):
        anyfit.fit(SMALL["cnn"], pa.table({"x": np.arange(60.0), "target": ["a", "b"] * 30}), **FIT)
    with pytest.raises(DataError, match="column 'x' is of type continuous, which task TextCNN does not take"):
        anyfit.fit(SMALL["cnn"], table.append_column("x", [np.arange(60.0)]), **FIT)
    with pytest.raises(DataError, match="needs a target column"):
        anyfit.fit(SMALL["cnn"], table.drop(["target"]), **FIT)
    with pytest.raises(InputError, match=re.escape("embedding (=25) must be a multiple of heads (=2)")):
        anyfit.fit(SMALL["transformer"].replaced(embedding=25), table, **FIT)
    with pytest.raises(InputError, match=re.escape("'gru'")):
        SMALL["rnn"].replaced(cell="elman")


# Targets and weights


def test_numbers_are_regressed_from_texts_in_their_unit() -> None:
    draw = random.Random(0)
    counts = [draw.randint(0, 4) for _ in range(300)]
    texts = [" ".join(draw.sample(["big"] * count + ["thing"] * (6 - count), 6)) for count in counts]
    table = pa.table({"text": texts, "price": [1000.0 + 50 * count for count in counts]})
    task = anyfit.TextTransformer(embedding=24, heads=2, dropout=0.0, lr=0.01)
    source = Source(table, target="price", types=TEXT)
    run = anyfit.fit(task, source, **{**FIT, "epochs": 20})
    assert anyfit.evaluate(run, source)["r2"] > 0.9
    assert outputs(run, ["big big big big thing thing", "thing"]).shape == (2,)
    assert abs(float(outputs(run, ["big big big big thing thing"])) - 1200) < 40


def test_balance_lifts_a_rare_class_and_weights_decide_between_rows_that_differ() -> None:
    texts = ["plain"] * 190 + ["plain"] * 10
    table = pa.table({"text": texts, "target": ["common"] * 190 + ["rare"] * 10})
    source = Source(table, types=TEXT)
    options = {**FIT, "epochs": 6}
    plain, balanced = (anyfit.fit(SMALL["cnn"].replaced(lr=0.01, balance=balance), source, **options) for balance in (False, True))
    chance = [float(outputs(run, ["plain"]).softmax(1)[0, 1]) for run in (plain, balanced)]
    assert chance[0] < 0.2 and 0.35 < chance[1] < 0.65
    weighted = table.append_column("w", [[0.0] * 190 + [1.0] * 10])
    run = anyfit.fit(SMALL["cnn"].replaced(lr=0.01), Source(weighted, weight="w", types=TEXT), **options)
    assert float(outputs(run, ["plain"]).softmax(1)[0, 1]) > 0.9


# Sites


def test_sites_add_up_their_words_and_learn_together() -> None:
    table = sentences()
    sites = {"a": table.slice(0, 80), "b": table.slice(80)}
    task = SMALL["cnn"].replaced(lr=0.01)
    run = anyfit.federate(task, sites, rounds=6, batch_size=20, test=sentences(90, 1), best=False, patience=None)
    whole = prepare(task, table, target=None, validation=None, test=None, plan=FIT)
    assert vocabulary(run) == tokenizer_of(whole.schema["text"].tokenizer).get_vocab()
    assert run.splits["test"]["accuracy"] > 0.9


def test_words_of_one_site_only_are_known_to_all() -> None:
    table = sentences(120)
    only = pa.table({"text": ["zebra soup"] * 20 + ["zebra ball"] * 20, "target": ["food"] * 20 + ["sport"] * 20})
    run = anyfit.federate(SMALL["cnn"], {"a": table, "b": Source(only, types=TEXT)}, rounds=1, batch_size=20)
    assert {"zebra", "word1"} <= set(vocabulary(run))


# TREC


def trec(path: Path) -> pa.Table:
    lines = path.read_text("latin-1").splitlines()
    return pa.table({"text": [line.partition(" ")[2] for line in lines], "target": [line.partition(":")[0] for line in lines]})


@pytest.mark.slow
@pytest.mark.parametrize(("task", "accuracy"), [(anyfit.TextCNN(), 0.88), (anyfit.TextRNN(), 0.86)], ids=["text-cnn", "text-rnn"])
def test_questions_of_trec_are_told_apart(task: anyfit.Task, accuracy: float, data_folder: Path) -> None:
    begun = time.process_time()
    folder = data_folder / "trec"
    run = anyfit.fit(task, trec(folder / "train_5500.label"), test=trec(folder / "TREC_10.label"))
    assert run.splits["test"]["accuracy"] >= accuracy
    assert time.process_time() - begun < 120


SCRIPTS = ["नमस्ते दुनिया", "مُحَمَّد رَسُول", "สวัสดี โลก", "İstanbul İyi", "cafe\u0301 noir", "ΟΔΟΣ Σοφίας", "don't_stop 3.14!"]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_vocabulary_knows_every_word_that_it_was_learnt_from(kind: Any) -> None:
    texts = pa.chunked_array([pa.array(SCRIPTS)])
    counts = data.word_statistics(texts, "t", lowercase=True).sums("words:t")
    tokenizer = data.tokenizer_of(data.trained_tokenizer(counts, kind, size=500, least=1, lowercase=True))
    assert not [token for text in SCRIPTS for token in tokenizer.encode(text).tokens if token == "[UNK]"]


LEARN = """
from anyfit import data
counts = {f"w{'abcdefghij'[n % 10]}{'klmnopqrst'[n % 7]}x{n}": 1 + n % 5 for n in range(300)}
print(data.trained_tokenizer(counts, "bpe", size=200, least=1, lowercase=True))
"""


def test_byte_pairs_are_the_same_in_every_process() -> None:
    assert len({subprocess.run([sys.executable, "-c", LEARN], capture_output=True, check=True).stdout for _ in range(3)}) == 1
