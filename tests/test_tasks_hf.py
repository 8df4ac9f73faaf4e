"""Models of `transformers` as a task: what is guessed and counted, what is frozen, what is saved; and nothing is downloaded."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import anyfit
from anyfit import Schema, Source
from anyfit.data import tokenizer_of
from anyfit.errors import InputError, MissingExtra, TaskError
from anyfit.prepare import prepare
from anyfit.tasks.hf import IGNORED, _quiet

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

WORDS = [f"{first}{second}" for first in ("ba", "do", "ki") for second in ("na", "ro", "tu", "le")]
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
DISTIL = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40}
CONFIGS = {"bert": BERT, "gpt2": GPT2, "distilbert": DISTIL}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FIT: dict[str, Any] = {"batch_size": 16}
TEXT = {"text": "text"}  # few different texts would be taken for categories


def sentences(count: int = 96) -> pa.Table:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        words = [WORDS[i] for i in torch.randint(0, len(WORDS), (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)]
        rows.append((" ".join(["yes" if index % 2 else "no", *words]), "true" if index % 2 else "false"))
    return pa.table({"text": [text for text, _ in rows], "target": [target for _, target in rows]})


def task(config: dict[str, Any] = BERT, **fields: Any) -> anyfit.HuggingFace:
    return anyfit.HuggingFace(**{"config": config, "max_length": 40, "vocabulary_size": 60, "lr": 3e-3, **fields})


def schema_of(run: Any) -> Schema:
    return Schema.from_json(run.record["schema"])


def met(given: anyfit.Task, data: Any = None, **plan: Any) -> tuple[nn.Module, Any, Schema]:
    """A model, and the windows of its first epoch."""
    prepared = prepare(given, sentences() if data is None else data, target=None, validation=None, test=None, plan={**FIT, **plan})
    torch.manual_seed(0)
    batches = prepared.batches("train")
    windows = [batches.window(anyfit.state.Position(index, 0, index))[0] for index in range(batches.steps_per_epoch)]
    return given.build_model(prepared.schema), windows, prepared.schema


def outputs(given: Any, model: nn.Module, schema: Schema, texts: list[str]) -> Tensor:
    rows = given.build_dataset(pa.table({"text": texts}), "predict", schema)["input_ids"]
    model.eval()
    with torch.no_grad():
        return given.predict(model, {"input_ids": rows.padded(torch.arange(len(texts))), "lengths": rows.lengths})


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of model, as masked or causal language learning left it."""
    folder, places = tmp_path_factory.mktemp("models"), {}
    for name, config in CONFIGS.items():
        given = task(config, objective="causal-lm" if name == "gpt2" else "masked-lm")
        run = anyfit.fit(given, sentences().drop(["target"]), steps=2, batch_size=8)
        places[name] = given.save(run.model, schema_of(run), folder / name)
    return places


# Classification


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_told_apart(name: str) -> None:
    run = anyfit.fit(task(CONFIGS[name]), sentences(), test=sentences(50), epochs=6, **FIT)
    assert run.splits["test"]["accuracy"] > 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_depend_on_neither_padding_nor_neighbours(name: str) -> None:
    given = task(CONFIGS[name])
    model, _, schema = met(given)
    texts = ["yes bana", "no " + "dotu kile " * 12, "", "unheard of", "no"]
    together = outputs(given, model, schema, texts)
    for index, text in enumerate(texts):
        assert torch.allclose(outputs(given, model, schema, [text])[0], together[index], atol=1e-5)


def test_numbers_are_regressed_in_their_unit(tmp_path: Path) -> None:
    table = pa.table({"text": ["no bana", "yes bana"] * 40, "target": [10.0, 20.0] * 40})
    source = Source(table, types=TEXT)
    run = anyfit.fit(task({**BERT, **STILL}), source, epochs=10, **FIT)
    assert anyfit.evaluate(run, source)["r2"] > 0.9
    folder = run.task.save(run.model, schema_of(run), tmp_path / "numbers")
    read = anyfit.HuggingFace(model=str(folder), max_length=40)
    other, _, schema = met(read, source)
    assert torch.equal(outputs(read, other, schema, ["yes bana"]), outputs(run.task, run.model, schema_of(run), ["yes bana"]))
    with _quiet():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    ((mean, deviation),) = theirs.config.target_unit
    assert (mean, deviation) == (15.0, pytest.approx(5.0, rel=0.02))
    classifier, _, _ = met(read)
    assert classifier.config.target_unit is None, "classes have no unit"


def test_check_finds_nothing_wrong() -> None:
    seen = anyfit.check(task({**BERT, **STILL}), sentences(), **FIT)
    assert seen["ok"], seen["problems"]


# Masked words


def test_about_the_asked_share_of_words_is_masked_and_never_a_special_one_or_padding() -> None:
    for pack in (True, False):
        given = task(objective="masked-lm", pack=pack, mask=0.3)
        model, windows, _ = met(given, Source(pa.concat_tables([sentences(96)] * 8), types=TEXT), batch_size=24)
        chosen = kept = words = real_special = 0
        how = torch.zeros(3)
        for batch in windows:
            labelled = given._labelled(model, batch)
            ids, labels = batch["input_ids"], labelled["labels"]
            masked = labels != IGNORED
            special = torch.isin(ids, torch.tensor(model.words.special))
            padding = torch.arange(ids.shape[1]) >= batch["lengths"][:, None]
            assert not (masked & (special | padding)).any()
            assert torch.equal(labels[masked], ids[masked]) and torch.equal(labelled["input_ids"][~masked], ids[~masked])
            new = labelled["input_ids"][masked]
            how += torch.tensor([(new == model.words.mask).sum(), ((new != model.words.mask) & (new != ids[masked])).sum(), 0])
            kept += int((new == ids[masked]).sum())
            chosen, words = chosen + int(masked.sum()), words + int((~special & ~padding).sum())
            real_special += int((special & ~padding).sum())
        assert real_special, "[CLS] and [SEP] stand in the rows"
        assert abs(chosen / words - 0.3) < 0.02
        assert abs(how[0] / chosen - 0.8) < 0.04 and abs(how[1] / chosen - 0.1) < 0.04 and abs(kept / chosen - 0.1) < 0.04


def test_the_default_masks_fifteen_words_of_a_hundred_and_others_each_epoch() -> None:
    given = task(objective="masked-lm")
    prepared = prepare(
        given, Source(pa.concat_tables([sentences()] * 8), types=TEXT), target=None, validation=None, test=None, plan={"batch_size": 100}
    )
    model, batches = given.build_model(prepared.schema), prepared.batches("train")
    masks = []
    for epoch in range(2):
        batch = batches.window(anyfit.state.Position(epoch * batches.steps_per_epoch, epoch, 0))[0]
        masks.append((given._labelled(model, batch)["labels"] != IGNORED, batch))
    special = torch.isin(masks[0][1]["input_ids"], torch.tensor(model.words.special))
    assert abs(masks[0][0].sum() / (~special).sum() - 0.15) < 0.02
    assert not torch.equal(masks[0][0], masks[1][0])


def test_evaluation_masks_the_same_each_time_and_counts_what_is_masked() -> None:
    given = task(objective="masked-lm")
    model, windows, _ = met(given)
    batch = {name: value for name, value in windows[0].items() if name != "chance"}
    model.eval()
    with torch.no_grad():
        first, second = given.evaluate_step(model, batch), given.evaluate_step(model, batch)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.targets, second.targets)
    assert int(first.count) == int((first.targets != IGNORED).sum()) > 0
    expected = nn.functional.cross_entropy(first.outputs[first.targets != IGNORED], first.targets[first.targets != IGNORED])
    assert torch.allclose(first.loss, expected, atol=1e-6)
    run = anyfit.fit(given, sentences().drop(["target"]), test=sentences(50).drop(["target"]), steps=2, batch_size=4)
    assert anyfit.evaluate(run, sentences(50).drop(["target"]))["loss"] == run.splits["test"]["loss"]


def test_masked_words_are_learnt() -> None:
    table = pa.table({"text": ["one two three four five", "red green blue gold grey", "ape bear cat dog eel"] * 60})
    source = Source(table, types=TEXT)
    given = task({**BERT, **STILL, "initializer_range": 0.2}, objective="masked-lm", lr=5e-3, pack=False)
    run = anyfit.fit(given, source, steps=120, batch_size=32, log_every=10)
    losses = [line["loss"] for line in run.history if line["event"] == "step"]
    assert losses[-1] < 0.5 < 2.0 < losses[0]
    with pytest.raises(TaskError, match=r"objective \(='masked-lm'\) learns language and predicts nothing"):
        list(anyfit.predict(run, table))


# Next words


def test_the_loss_of_next_words_is_the_one_made_by_hand() -> None:
    given = task({**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, objective="causal-lm", pack=False)
    model, windows, _ = met(given, sentences().drop(["target"]))
    model.eval()
    for batch in windows[:2]:
        total, count = torch.zeros(()), 0
        for ids, length in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True):
            logits = model(input_ids=ids[None, :length]).logits[0]
            for place in range(length - 1):
                total = total - logits[place].log_softmax(0)[ids[place + 1]]
                count += 1
        step = given.step(model, batch)
        assert int(step.count) == count == int((batch["lengths"] - 1).sum())
        assert torch.allclose(step.loss, total / count, atol=1e-5)


def test_packed_rows_hold_all_words_in_order_without_padding() -> None:
    given = task(GPT2, objective="causal-lm", max_length=16)
    _, _, schema = met(given, sentences(), batch_size=4)
    rows = given.build_dataset(sentences(), "train", schema)["input_ids"]
    assert rows.lengths[:-1].eq(16).all()
    tokenizer = tokenizer_of(schema["text"].tokenizer)
    expected = [identity for text in sentences()["text"].to_pylist() for identity in (*tokenizer.encode(text).ids, ENDS)]
    ends = tokenizer.token_to_id("[SEP]")
    assert rows.values.tolist() == [ends if identity is ENDS else identity for identity in expected][: len(rows.values)]
    assert len(given.build_dataset(sentences(), "predict", schema)["input_ids"]) == 96
    apart = task(GPT2, objective="causal-lm", pack=False).build_dataset(sentences(), "train", schema)["input_ids"]
    assert len(apart) == 96


ENDS = None


# What trains


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (("bert.embeddings.*", "bert.encoder.*"), lambda name: name.startswith(("bert.embeddings.", "bert.encoder."))),
        (("*.layer.0.*",), lambda name: ".layer.0." in name),
        ((), lambda name: False),
    ],
)
def test_what_is_frozen_stays_and_all_else_moves(saved: dict[str, Path], freeze: tuple[str, ...], frozen: Any) -> None:
    given = anyfit.HuggingFace(model=str(saved["bert"]), freeze=freeze, lr=1e-2, max_length=40)
    run = anyfit.fit(given, sentences(), epochs=1, **FIT)
    with _quiet():
        before = transformers.AutoModelForMaskedLM.from_pretrained(saved["bert"]).state_dict()
    pooler = [name for name in run.state.model if name.startswith(("bert.pooler", "classifier"))]
    assert len(pooler) == 4
    for name, tensor in run.state.model.items():
        if name in before:
            assert torch.equal(tensor, before[name]) == bool(frozen(name)), name


def test_patterns_that_freeze_nothing_or_all_are_refused() -> None:
    with pytest.raises(InputError, match=r"freeze \(='encoder\.\*'\) matches no parameter; they are named like bert\.embeddings"):
        anyfit.fit(task(freeze=("bert.embeddings.*", "encoder.*")), sentences(), epochs=1, **FIT)
    with pytest.raises(TaskError, match="leaves nothing to train"):
        anyfit.fit(task(freeze=("*",)), sentences(), epochs=1, **FIT)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapters_train_in_place_of_the_weights_and_are_merged_when_saved(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    given = anyfit.HuggingFace(model=str(saved[name]), lora=2, lr=1e-2, max_length=40)
    run = anyfit.fit(given, sentences(), test=sentences(50), epochs=4, **FIT)
    auto = transformers.AutoModelForCausalLM if name == "gpt2" else transformers.AutoModelForMaskedLM
    with _quiet():
        before = auto.from_pretrained(saved[name]).state_dict()
    seen = 0
    for key, tensor in run.state.model.items():
        plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in before:
            assert torch.equal(tensor, before[plain]), key
            seen += 1
    assert seen > 10
    moved = [key for key, tensor in run.state.model.items() if "lora_B" in key and bool(tensor.any())]
    assert moved and run.record["trainable"] < 0.3 * run.record["parameters"]
    keys = list(run.model.state_dict())
    texts = ["yes bana", "no kile dotu"]
    expected = outputs(given, run.model, schema_of(run), texts)
    given.save(run.model, schema_of(run), tmp_path / "merged")
    assert list(run.model.state_dict()) == keys, "saving leaves the model as it was"
    assert torch.equal(outputs(given, run.model, schema_of(run), texts), expected)
    with _quiet():
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not any("lora" in key for key in merged.state_dict())
    assert torch.allclose(outputs(given, merged, schema_of(run), texts), expected, atol=1e-5)


def test_biases_and_norms_are_not_decayed() -> None:
    for config in CONFIGS.values():
        model, _, _ = met(task(config))
        groups = task(config).build_optimizer(model).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, plain = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
        assert all(parameter.dim() > 1 for group in groups[:1] for parameter in group["params"]), decayed
        assert all(parameter.dim() == 1 for parameter in groups[1]["params"]), plain


# Folders


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_read_again_by_the_task_and_by_transformers(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = task(CONFIGS[name])
    run = anyfit.fit(given, sentences(), epochs=1, **FIT)
    texts = ["yes bana dotu", "no", "unheard kile", ""]
    expected = outputs(given, run.model, schema_of(run), texts)
    folder = given.save(run.model, schema_of(run), tmp_path / "models" / name)
    capfd.readouterr()
    again = anyfit.HuggingFace(model=str(folder), max_length=40)
    model, _, schema = met(again)
    assert capfd.readouterr().err == "", "no bars"
    assert torch.equal(outputs(again, model, schema, texts), expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts[:3], padding=True, return_tensors="pt")
    with _quiet():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    assert torch.allclose(logits, expected[:3], atol=1e-5)
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token) == ("[PAD]", "[UNK]", "[MASK]")
    with pytest.raises(InputError, match="exists; choose another name"):
        given.save(run.model, schema_of(run), folder)
    assert [path.name for path in folder.parent.iterdir()] == [name], "nothing half-written stays"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_becomes_a_classifier(name: str, saved: dict[str, Path]) -> None:
    run = anyfit.fit(anyfit.HuggingFace(model=str(saved[name]), lr=3e-3, max_length=40), sentences(), test=sentences(50), epochs=6, **FIT)
    assert run.splits["test"]["accuracy"] > 0.9


def test_a_model_without_a_word_for_padding_classifies_batches(saved: dict[str, Path], tmp_path: Path) -> None:
    """As GPT-2 comes: its config names none."""
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(saved["gpt2"])
        model.config.pad_token_id = None
        model.save_pretrained(tmp_path / "gpt2")
        transformers.AutoTokenizer.from_pretrained(saved["gpt2"]).save_pretrained(tmp_path / "gpt2")
    given = anyfit.HuggingFace(model=str(tmp_path / "gpt2"), lr=3e-3, max_length=40)
    assert anyfit.fit(given, sentences(), test=sentences(50), epochs=6, **FIT).splits["test"]["accuracy"] > 0.9


def test_not_pretrained_takes_the_config_alone(saved: dict[str, Path]) -> None:
    fresh, _, schema = met(anyfit.HuggingFace(model=str(saved["bert"]), pretrained=False, max_length=40))
    learnt, _, other = met(anyfit.HuggingFace(model=str(saved["bert"]), max_length=40))
    assert schema == other and fresh.config.hidden_size == learnt.config.hidden_size == 32
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(fresh.state_dict()[name], learnt.state_dict()[name])


def test_bars_and_words_are_silenced_for_our_calls_only(saved: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    own = transformers.utils.logging
    calls: list[str] = []
    before = own.set_tqdm_hook(lambda make, arguments, options: calls.append("made") or make(*arguments, **{**options, "disable": True}))
    try:
        level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
        met(anyfit.HuggingFace(model=str(saved["bert"]), max_length=40))
        assert not calls and capfd.readouterr().err == ""
        assert (own.get_verbosity(), own.is_progress_bar_enabled()) == (level, bars)
        transformers.AutoModelForMaskedLM.from_pretrained(saved["bert"])
        assert calls, "the user's own hook stands again"
    finally:
        own.set_tqdm_hook(before)


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None, "config": None}, "give model .* or config .*, one of the two"),
        ({"model": "x", "config": BERT}, "give model .* or config .*, one of the two"),
        ({"config": {"hidden_size": 3}}, "cannot be made for classification: .*model_type"),
        ({"config": {"model_type": "nonsense"}}, "cannot be made for classification: Unrecognized model identifier: nonsense"),
        ({"config": {**BERT, "num_attention_heads": 3}}, "cannot be made for classification: .*multiple of the number of attention heads"),
        ({"max_length": 41}, r"max_length \(=41\) is more than the 40 positions that the model knows"),
        ({"config": {**BERT, "vocab_size": 9}}, "the model knows 9 words, but the tokenizer has .*; give the tokenizer that belongs to it"),
        ({"config": GPT2, "objective": "masked-lm"}, "cannot be made for masked-lm"),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        anyfit.fit(task(**fields), sentences(), epochs=1, batch_size=4)
    assert len(str(caught.value)) < 700


def test_positions_that_begin_after_padding_are_not_counted_as_room() -> None:
    """RoBERTa numbers words from padding + 1 on."""
    roberta = {**BERT, "model_type": "roberta"}
    with pytest.raises(InputError, match=r"max_length \(=40\) is more than the 39 positions"):
        met(task(roberta))
    given = task(roberta, max_length=39)
    model, _, schema = met(given)
    assert outputs(given, model, schema, ["bana dotu " * 40]).isfinite().all()


def test_a_tokenizer_of_another_model_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    run = anyfit.fit(task(vocabulary="word", vocabulary_size=500), pa.concat_tables([sentences(), _many_words()]), epochs=1, **FIT)
    (tmp_path / "tokenizer.json").write_text(schema_of(run)["text"].tokenizer)
    given = anyfit.HuggingFace(model=str(saved["bert"]), tokenizer=anyfit.File.of(tmp_path / "tokenizer.json"), max_length=40)
    with pytest.raises(TaskError, match="give the tokenizer that belongs to it"):
        anyfit.fit(given, sentences(), epochs=1, **FIT)
    own = anyfit.HuggingFace(model=str(saved["bert"]), tokenizer=anyfit.File.of(saved["bert"] / "tokenizer.json"), max_length=40)
    plain = anyfit.HuggingFace(model=str(saved["bert"]), max_length=40)
    (a, _, ours), (b, _, theirs) = met(own), met(plain)
    assert torch.equal(outputs(own, a, ours, ["yes bana"]), outputs(plain, b, theirs, ["yes bana"]))


def _many_words() -> pa.Table:
    return pa.table({"text": [f"word{index} word{index + 100}" for index in range(100)], "target": ["true", "false"] * 50})


def test_a_hub_id_without_a_network_is_a_clear_error() -> None:
    with pytest.raises(TaskError, match=r"model \(='nobody/knows-this'\) has no tokenizer that can be read"):
        anyfit.fit(anyfit.HuggingFace(model="nobody/knows-this"), sentences(), epochs=1, **FIT)


def test_missing_libraries_name_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingExtra, match=r"transformers is not installed; run: pip install 'anyfit\[hf\]'"):
            anyfit.fit(task(), sentences(), epochs=1, **FIT)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"peft is not installed; run: pip install 'anyfit\[hf\]'"):
        anyfit.fit(task(lora=2), sentences(), epochs=1, **FIT)


# Resume


@pytest.mark.parametrize(
    "given",
    [task(), task(objective="masked-lm"), task(GPT2, objective="causal-lm"), task(lora=2)],
    ids=["classify", "mask", "next", "lora"],
)
def test_a_resume_is_exact_with_dropout(given: anyfit.HuggingFace, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 3:
            raise Stop

    options: dict[str, Any] = {"steps": 6, "batch_size": 5, "log_every": 2, "seed": 4, "checkpoint_every_s": 0.0}
    whole = anyfit.fit(given, sentences(), run=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        anyfit.fit(given, sentences(), run=tmp_path / "cut", on_event=stop, **options)
    again = anyfit.fit(given, sentences(), run=tmp_path / "cut", resume=True, **options)
    assert again.history == whole.history
    assert all(torch.equal(again.state.model[name], tensor) for name, tensor in whole.state.model.items())
