"""The trainer in place of transformers': the seed's exercise as it stands, and the same weights step for step."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import anyfit
from anyfit.adapt.huggingface import Trainer, from_transformers
from anyfit.adapt.huggingface.arguments import HARMLESS, HARMLESS_FAMILIES, HEEDED, refused
from anyfit.adapt.huggingface.rows import Collated, TokenRows, read_once, rows_of
from anyfit.errors import AnyfitError, DataError, InputError, StateError, TaskError

WORDS = [f"w{index}" for index in range(20)]


class SimpleCNN(transformers.PreTrainedModel):
    """The seed's network."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(num_embeddings=config.vocab_size, embedding_dim=config.embedding_dim)
        self.convolution = torch.nn.Conv1d(config.embedding_dim, config.num_filters, config.filter_size, padding=1)
        self.activation = torch.nn.ReLU()
        self.pooling_layer = torch.nn.AdaptiveMaxPool1d(output_size=1)
        self.output_layer = torch.nn.Linear(in_features=config.num_filters, out_features=config.num_labels)
        self.loss = torch.nn.CrossEntropyLoss()
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        x = self.embeddings(input_ids).transpose(1, 2)
        x = self.pooling_layer(self.activation(self.convolution(x))).squeeze(-1)
        output = self.output_layer(x)
        return (self.loss(output, labels), output) if labels is not None else (output,)


class LogSavingCallback(transformers.TrainerCallback):
    """The seed's, as it stands."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.logs: dict[str, list[Any]] = defaultdict(list)
        self.training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        if self.training:
            for k, v in logs.items():
                if k != "epoch" or v not in self.logs[k]:
                    self.logs[k].append(v)


def compute_accuracy(outputs_and_labels: Any) -> dict[str, float]:
    outputs, labels = outputs_and_labels
    predictions = outputs.argmax(axis=-1)
    return {"accuracy": (predictions == labels).mean()}


def make_tokenizer(**options: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **options)


def make_texts(count: int, seed: int = 0) -> datasets.Dataset:
    """Sentences of different lengths; the label is which half of the words is more frequent."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = draw.randint(0, 1)
        words = draw.choices(WORDS[:10] if label else WORDS[10:], k=draw.randint(2, 9)) + draw.choices(WORDS, k=2)
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> dict[str, Any]:
    def tokenize(entry: Any) -> Any:
        return tokenizer(entry["text"], max_length=128, truncation=True)

    datasets.disable_progress_bars()
    made = {name: make_texts(count, seed).map(tokenize) for seed, (name, count) in enumerate((("train", 96), ("test", 40)))}
    datasets.enable_progress_bars()
    return made


def make_model(tokenizer: Any, seed: int = 0) -> SimpleCNN:
    torch.manual_seed(seed)
    config = transformers.PretrainedConfig(vocab_size=len(tokenizer), num_labels=2, embedding_dim=8, filter_size=3, num_filters=6)
    return SimpleCNN(config)


def arguments(folder: Path, **options: Any) -> Any:
    given = {"learning_rate": 0.01, "per_device_train_batch_size": 8, "max_steps": 20, "use_cpu": True, "report_to": "none", **options}
    return transformers.TrainingArguments(str(folder / "checkpoints"), **given)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return set(one) == set(other) and all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


# ------------------------------------------------------------------ the seed


def test_the_seed_runs_with_one_changed_import(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    trainer_args = transformers.TrainingArguments(
        str(tmp_path / "checkpoints"),
        eval_strategy="steps",
        logging_strategy="steps",
        load_best_model_at_end=True,
        eval_steps=10,
        logging_steps=10,
        save_steps=10,
        learning_rate=0.05,
        per_device_train_batch_size=8,
        max_steps=60,
    )
    data_collator = transformers.DataCollatorWithPadding(tokenizer)
    early_stopping = transformers.EarlyStoppingCallback(early_stopping_patience=5)
    training_logs = LogSavingCallback()
    model = make_model(tokenizer)
    trainer = Trainer(
        model=model,
        args=trainer_args,
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        compute_metrics=compute_accuracy,
        data_collator=data_collator,
        callbacks=[early_stopping, training_logs],
    )
    before = weights(model)
    done = trainer.train()
    assert done.global_step == 60 and done.training_loss > 0
    assert trainer.model is model and not same(before, weights(model))

    logs = training_logs.logs
    assert len(logs["loss"]) == len(logs["eval_loss"]) == len(logs["epoch"]) == len(logs["eval_accuracy"]) == 6
    assert logs["epoch"] == pytest.approx([10 / 12, 20 / 12, 30 / 12, 40 / 12, 50 / 12, 5.0])
    assert logs["loss"][-1] < logs["loss"][0]
    assert not training_logs.training

    best = min(logs["eval_loss"])
    assert trainer.state.best_metric == best
    results = trainer.evaluate(texts["test"])
    assert results["eval_loss"] == pytest.approx(best, abs=1e-12)  # the best weights, in place
    assert results["eval_accuracy"] > 0.8 and results["epoch"] == 5.0
    record = anyfit.open_run(tmp_path / "checkpoints", task=from_transformers(model))
    assert record[1].position.step <= 60
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [10, 20, 30, 40, 50, 60]


def test_logs_come_in_the_order_and_under_the_names_of_transformers(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    histories = []
    for kind, place in ((Trainer, "ours"), (transformers.Trainer, "theirs")):
        args = arguments(tmp_path / place, eval_strategy="steps", eval_steps=4, logging_steps=4, max_steps=12, disable_tqdm=True)
        trainer = kind(
            model=make_model(tokenizer),
            args=args,
            train_dataset=texts["train"],
            eval_dataset=texts["test"],
            compute_metrics=compute_accuracy,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        histories.append(trainer.state.log_history)
    ours, theirs = histories
    leave_out = {"grad_norm", "total_flos", "eval_model_preparation_time"}
    assert [list(line) for line in ours] == [[name for name in line if name not in leave_out] for line in theirs]
    for name in ("step", "epoch", "learning_rate"):
        assert [line.get(name) for line in ours] == pytest.approx([line.get(name) for line in theirs])


# ------------------------------------------------------------------ the same weights


def trained_by_both(tmp_path: Path, model: torch.nn.Module, data: Any, collator: Any = None, **options: Any) -> list[Any]:
    trainers = []
    for kind, place in ((Trainer, "ours"), (transformers.Trainer, "theirs")):
        args = arguments(tmp_path / place, disable_tqdm=True, logging_steps=1, **options)
        trainer = kind(model=copy.deepcopy(model), args=args, train_dataset=data, eval_dataset=data, data_collator=collator)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainers.append(trainer)
    return trainers


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.0},
        {"lr_scheduler_type": "polynomial", "warmup_steps": 0.2, "lr_scheduler_kwargs": {"power": 2.0}, "optim": "adamw_torch"},
        {"max_steps": -1, "num_train_epochs": 1.3, "gradient_accumulation_steps": 2},
        {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1.0}},
    ],
    ids=["decay and clip", "cosine", "polynomial", "epochs and accumulation", "plateau"],
)
def test_weights_are_those_of_transformers(tmp_path: Path, tokenizer: Any, texts: Any, options: Any) -> None:
    """No dropout and no shuffle, so that both see the same batches."""
    collator = transformers.DataCollatorWithPadding(tokenizer)
    ours, theirs = trained_by_both(
        tmp_path, make_model(tokenizer), texts["train"], collator, train_sampling_strategy="sequential", **options
    )
    assert ours.state.global_step == theirs.state.global_step and ours.state.epoch == pytest.approx(theirs.state.epoch)
    assert same(weights(ours.model), weights(theirs.model), 2e-6)
    for name in ("loss", "learning_rate", "eval_loss"):
        mine, others = ([line[name] for line in trainer.state.log_history if name in line] for trainer in (ours, theirs))
        assert mine == pytest.approx(others, abs=2e-6)


def small_bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=22,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def small_gpt() -> Any:
    config = transformers.GPT2Config(
        vocab_size=22,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def test_a_library_model_trains_as_with_transformers(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    collator = transformers.DataCollatorWithPadding(tokenizer)
    ours, theirs = trained_by_both(
        tmp_path, small_bert(), texts["train"], collator, train_sampling_strategy="sequential", weight_decay=0.1, max_steps=8
    )
    assert same(weights(ours.model), weights(theirs.model), 5e-6)
    assert len(ours.optimizer.param_groups) == 2
    assert [len(g["params"]) for g in ours.optimizer.param_groups] == [len(g["params"]) for g in theirs.optimizer.param_groups]


def test_tokens_are_counted_as_the_loss_counts_them(tmp_path: Path) -> None:
    """Accumulation over uneven batches of tokens is one large batch: each counted label weighs the same."""
    rows = [{"input_ids": torch.tensor([3, 4, 5, 6, 7, 8]), "labels": torch.tensor([3, 4, 5, 6, 7, 8])}]
    rows += [{"input_ids": torch.tensor([9, 8, 7, 6, 5, 4]), "labels": torch.tensor([9, -100, -100, -100, -100, 4])}]
    data = ListOf(rows)
    found = []
    for place, size, accumulate in (("one", 2, 1), ("two", 1, 2)):
        args = arguments(
            tmp_path / place,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            train_sampling_strategy="sequential",
        )
        # not Adam, whose first step is one of signs
        model = small_gpt()
        trainer = Trainer(model=model, args=args, train_dataset=data, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
        trainer.train()
        found.append(weights(trainer.model))
        task = trainer._task()
        assert int(task.count({"labels": torch.stack([row["labels"] for row in rows])})) == 6
    assert same(*found, 1e-6)
    assert int(from_transformers(small_bert()).count({"labels": torch.tensor([0, 1, -100])})) == 2


class ListOf(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


# ------------------------------------------------------------------ what is refused


def test_all_that_cannot_be_honoured_is_refused_at_once(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    args = arguments(
        tmp_path,
        label_smoothing_factor=0.1,
        neftune_noise_alpha=5.0,
        auto_find_batch_size=True,
        optim="adafactor",
        eval_delay=2,
        push_to_hub=True,
        metric_for_best_model="accuracy",
        train_sampling_strategy="batch_rebalance",
        data_seed=7,
    )
    with pytest.raises(InputError) as error:
        Trainer(model=make_model(tokenizer), args=args, train_dataset=texts["train"])
    message = str(error.value)
    for part in (
        "9 arguments",
        "label_smoothing_factor (=0.1)",
        "neftune_noise_alpha (=5.0)",
        "auto_find_batch_size (=True)",
        "optim (='adafactor')",
        "eval_delay (=2)",
        "push_to_hub (=True)",
        "metric_for_best_model (='accuracy'",
        "train_sampling_strategy (='batch_rebalance')",
        "data_seed (=7)",
        "adamw_torch_fused",
    ):
        assert part in message


def test_harmless_arguments_are_accepted(tmp_path: Path, tokenizer: Any) -> None:
    options = {
        "run_name": "x",
        "disable_tqdm": True,
        "save_total_limit": 3,
        "save_only_model": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": False,
        "do_train": True,
        "hub_strategy": "end",
        "log_level": "error",
        "eval_accumulation_steps": 4,
        "average_tokens_across_devices": False,
        "ddp_timeout": 10,
    }
    Trainer(model=make_model(tokenizer), args=arguments(tmp_path, **options))


def test_every_argument_of_transformers_is_known_or_refused(tmp_path: Path) -> None:
    assert not HEEDED & HARMLESS
    args = arguments(tmp_path)
    assert refused(args) == []
    for field in fields(args):
        if field.name not in HEEDED | HARMLESS and not field.name.startswith(HARMLESS_FAMILIES):
            changed = copy.copy(args)
            setattr(changed, field.name, "something else")
            assert field.name in " ".join(refused(changed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_init": SimpleCNN}, "model_init cannot be honoured here; pass a model that is made"),
        ({"eval_strategy": "steps"}, "eval_strategy (='steps') needs an eval_dataset"),
        ({"train_dataset": None}, "train_dataset (=None)"),
        ({"train_dataset": datasets.Dataset.from_dict({"text": ["a"], "stars": [1]})}, "columns (=text, stars)"),
        ({"num_train_epochs": 0.0, "max_steps": -1}, "num_train_epochs (=0.0)"),
        ({"dataloader_drop_last": True, "gradient_accumulation_steps": 8}, "dataloader_drop_last"),
        ({"compute_metrics": lambda p: {"loss": 1.0}}, "a figure named 'loss'"),
        ({"compute_metrics": lambda p: 1.0}, "compute_metrics gave a float"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path, tokenizer: Any, texts: Any, options: Any, message: str) -> None:
    given = {
        "model": make_model(tokenizer),
        "train_dataset": texts["train"],
        "data_collator": transformers.DataCollatorWithPadding(tokenizer),
    }
    chosen = {name: options.pop(name) for name in list(options) if name in ("model_init", "train_dataset", "compute_metrics")}
    if "compute_metrics" in chosen:
        given["eval_dataset"] = texts["test"]
        options = {"eval_strategy": "epoch"}
    with pytest.raises(AnyfitError) as error:
        Trainer(args=arguments(tmp_path, **options), **{**given, **chosen}).train()
    assert message in str(error.value)


def test_a_subclass_may_replace_the_loss_and_nothing_that_is_never_called(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            (output,) = model(**inputs)
            loss = 2 * torch.nn.functional.cross_entropy(output, labels)
            return (loss, (loss, output)) if return_outputs else loss

    def trained(kind: type[Trainer], place: str, **options: Any) -> Trainer:
        args = arguments(tmp_path / place, max_steps=3, logging_steps=1, max_grad_norm=0.0)
        made = kind(
            model=make_model(tokenizer),
            args=args,
            train_dataset=texts["train"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
            **options,
        )
        made.train()
        return made

    plain, doubled = trained(Trainer, "plain"), trained(Doubled, "doubled")
    by_function = trained(
        Trainer,
        "function",
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            2 * torch.nn.functional.cross_entropy(outputs[0], labels, reduction="sum") / num_items_in_batch
        ),
    )
    first, second, third = ([line["loss"] for line in t.state.log_history if "loss" in line] for t in (plain, doubled, by_function))
    assert second[0] == pytest.approx(2 * first[0])
    assert second == pytest.approx(third)
    assert doubled.evaluate(texts["test"])["eval_accuracy"] == by_function.evaluate(texts["test"])["eval_accuracy"]

    with pytest.raises(TaskError, match="Mine replaces training_step"):

        class Mine(Trainer):
            def training_step(self) -> None: ...


# ------------------------------------------------------------------ callbacks


class Recorder(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []


def _recording(name: str) -> Any:
    def note(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert state.is_world_process_zero and more["model"] is not None
        self.told.append((name, state.global_step))

    return note


EVENTS = ("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_log", "on_evaluate", "on_step_begin", "on_step_end")


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"eval_strategy": "steps", "eval_steps": 5, "logging_steps": 5, "max_steps": 15},
        {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 3, "max_steps": 24},
    ],
    ids=["by epoch", "by step", "ends on an epoch"],
)
def test_callbacks_are_called_as_by_transformers(tmp_path: Path, tokenizer: Any, texts: Any, options: Any) -> None:
    told = []
    for kind, place in ((Trainer, "ours"), (transformers.Trainer, "theirs")):
        recorder = type("All", (Recorder,), {name: _recording(name) for name in EVENTS})()
        trainer = kind(
            model=make_model(tokenizer),
            args=arguments(tmp_path / place, disable_tqdm=True, save_strategy="no", **options),
            train_dataset=texts["train"],
            eval_dataset=texts["test"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[recorder],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        told.append(recorder.told)
    ours, theirs = told
    assert ours == theirs


def test_a_callback_stops_the_training(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            control.should_training_stop = state.global_step == 7
            return control

    trainer = make_trainer(tmp_path, tokenizer, texts, callbacks=[Stop])
    assert trainer.train().global_step == 7
    assert trainer.run is not None and trainer.run.stopped == "asked"


def test_what_a_callback_asks_for_in_vain_is_refused(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    class Evaluate(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_evaluate = True

    class Norms(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...

    with pytest.raises(InputError, match=r"Evaluate set control\.should_evaluate in on_log"):
        make_trainer(tmp_path, tokenizer, texts, callbacks=[Evaluate], logging_steps=2).train()
    with pytest.raises(InputError, match=r"callback Norms\.on_pre_optimizer_step"):
        make_trainer(tmp_path, tokenizer, texts, callbacks=[Norms()])
    trainer = make_trainer(tmp_path, tokenizer, texts, callbacks=[transformers.DefaultFlowCallback])
    assert trainer.events.handler.callbacks == []
    trainer.add_callback(Evaluate)
    trainer.remove_callback(Evaluate)
    assert trainer.events.handler.callbacks == []


def make_trainer(tmp_path: Path, tokenizer: Any, texts: Any, callbacks: Any = (), **options: Any) -> Trainer:
    return Trainer(
        model=make_model(tokenizer),
        args=arguments(tmp_path, **options),
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_accuracy,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(("threshold", "best"), [(0.0, True), (0.5, True), (0.0, False)])
def test_early_stopping_stops_where_transformers_stops(tmp_path: Path, tokenizer: Any, texts: Any, threshold: float, best: bool) -> None:
    found = []
    for kind, place in ((Trainer, "ours"), (transformers.Trainer, "theirs")):
        args = arguments(
            tmp_path / place,
            disable_tqdm=True,
            learning_rate=0.3,  # the loss goes up soon
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=2,
            max_steps=60,
            load_best_model_at_end=best,
            metric_for_best_model="loss",
            train_sampling_strategy="sequential",
        )
        trainer = kind(
            model=make_model(tokenizer),
            args=args,
            train_dataset=texts["train"],
            eval_dataset=texts["test"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[transformers.EarlyStoppingCallback(2, threshold)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        done = trainer.train()
        found.append((done.global_step, trainer.state.best_global_step, pytest.approx(trainer.state.best_metric, abs=1e-4)))
        assert (trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)) is best
    assert found[0] == found[1] and found[0][0] < 60


# ------------------------------------------------------------------ resume and save


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 12:
            raise Killed


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "logging_steps": 5,
        "save_steps": 5,
        "max_steps": 30,
        "load_best_model_at_end": True,
    }
    whole = make_trainer(tmp_path / "whole", tokenizer, texts, [transformers.EarlyStoppingCallback(9)], **options)
    whole.train()
    killed = make_trainer(tmp_path / "killed", tokenizer, texts, [transformers.EarlyStoppingCallback(9), Kill], **options)
    with pytest.raises(Killed):
        killed.train()
    again = make_trainer(tmp_path / "killed", tokenizer, texts, [transformers.EarlyStoppingCallback(9)], **options)
    assert again.train(resume_from_checkpoint=True).global_step == 30
    assert same(weights(whole.model), weights(again.model))
    timed = ("runtime", "per_second", "train_loss")
    plain = [
        [{name: value for name, value in line.items() if not name.endswith(timed)} for line in trainer.state.log_history]
        for trainer in (whole, again)
    ]
    assert plain[0] == plain[1]
    assert whole.state.best_metric == again.state.best_metric
    assert again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoints")).global_step == 30  # it is finished


def test_an_interrupt_leaves_a_checkpoint_and_ends_the_script(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    class Interrupt(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, tokenizer, texts, [Interrupt], logging_steps=6).train()
    again = make_trainer(tmp_path, tokenizer, texts)
    assert again.train(resume_from_checkpoint=True).global_step == 20
    again.save_model(str(tmp_path / "saved"))


def test_worker_processes_give_the_same_batches(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    found = []
    for workers in (0, 1):
        options = {"dataloader_num_workers": workers, "max_steps": 5, "eval_strategy": "epoch", "save_strategy": "no"}
        trainer = make_trainer(tmp_path, tokenizer, texts, **options)
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)


def test_a_run_is_neither_overwritten_nor_taken_up_unasked(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    trainer = make_trainer(tmp_path, tokenizer, texts, max_steps=2)
    with pytest.raises(StateError, match="holds no run"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(InputError, match="holds a run already"):
        trainer.train()
    with pytest.raises(InputError, match="in output_dir"):
        trainer.train(resume_from_checkpoint="elsewhere/checkpoint-500")
    nothing = make_trainer(tmp_path / "new", tokenizer, texts, max_steps=2, save_strategy="no")
    nothing.train()
    nothing.train()
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="save_strategy"):
        nothing.train(resume_from_checkpoint=True)


def test_a_saved_model_is_read_back(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    trainer = make_trainer(tmp_path, tokenizer, texts, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert same(weights(SimpleCNN.from_pretrained(tmp_path / "saved")), weights(trainer.model))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == "[PAD]"
    trainer.save_model()  # beside the run
    assert (tmp_path / "checkpoints" / "model.safetensors").exists()

    plain = Trainer(model=Plain(), args=arguments(tmp_path / "plain", max_steps=2), train_dataset=points())
    plain.train()
    plain.save_model(str(tmp_path / "saved_plain"))
    loaded = Plain()
    from safetensors.torch import load_file

    loaded.load_state_dict(load_file(tmp_path / "saved_plain" / "model.safetensors"))
    assert same(weights(loaded), weights(plain.model))


class Plain(torch.nn.Module):
    """No model of transformers: a forward with labels, a dict as outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.layer(x).squeeze(1)
        return {"logits": y} if labels is None else {"loss": ((y - labels) ** 2).mean(), "logits": y}


def points(labelled: bool = True) -> ListOf:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 3, generator=generator)
    return ListOf([{"x": x, "unknown": "left out", **({"label": float(x.sum())} if labelled else {})} for x in inputs])


# ------------------------------------------------------------------ evaluate and predict


def test_predictions_and_labels_are_numpy_in_the_order_of_rows(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    trainer = make_trainer(tmp_path, tokenizer, texts, max_steps=2)
    outputs, labels, metrics = (found := trainer.predict(texts["test"])).predictions, found.label_ids, found.metrics
    assert outputs.shape == (40, 2) and labels.tolist() == texts["test"]["label"]
    assert metrics["test_accuracy"] == pytest.approx((outputs.argmax(1) == labels).mean()) and metrics["test_loss"] > 0
    unlabelled = trainer.predict(texts["test"].remove_columns("label"))
    assert unlabelled.label_ids is None and "test_loss" not in unlabelled.metrics
    np.testing.assert_array_equal(unlabelled.predictions, outputs)
    with pytest.raises(InputError, match=r"eval_dataset \(= a, b\) must be one data set"):
        trainer.evaluate({"a": texts["test"], "b": texts["train"]})


def test_predictions_of_different_lengths_are_filled_up(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(3, 3 + size), "labels": torch.arange(3, 3 + size)} for size in (4, 4, 6)]
    seen = []

    def shares(given: Any) -> dict[str, Any]:
        seen.append(given)
        return {"share": np.float32(0.5), "kinds": np.array([1, 2])}

    args = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = Trainer(
        model=small_gpt(),
        args=args,
        compute_metrics=shares,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate(ListOf(rows))
    assert metrics["eval_share"] == 0.5 and metrics["eval_kinds"] == [1, 2]
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (3, 6)
    assert seen[0].label_ids[0].tolist() == [3, 4, 5, 6, -100, -100] and seen[0][0] is seen[0].predictions


def test_rows_of_any_kind_are_taken(tmp_path: Path) -> None:
    class Flow(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(points().rows)

    listed = [{**row, "x": row["x"].tolist()} for row in points().rows]
    kinds = {"list": points(), "flow": Flow(), "table": datasets.Dataset.from_list(listed)}
    losses = {}
    for name, data in {**kinds, "table flow": kinds["table"].to_iterable_dataset()}.items():
        trainer = Trainer(model=Plain(), args=arguments(tmp_path / name, max_steps=30, logging_steps=10), train_dataset=data)
        losses[name] = trainer.train().training_loss
        assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [10, 20, 30]
    assert all(loss < 10 for loss in losses.values())
    with pytest.raises(InputError, match="max_steps"):
        Trainer(model=Plain(), args=arguments(tmp_path / "none", max_steps=-1), train_dataset=Flow()).train()


def test_optimizers_may_be_given(tmp_path: Path) -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    args = arguments(tmp_path, max_steps=2, save_strategy="no")
    trainer = Trainer(model=model, optimizers=(optimizer, scheduler), args=args, train_dataset=points())
    trainer.train()
    assert trainer.optimizer is optimizer and optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


# ------------------------------------------------------------------ the fast path


@pytest.mark.parametrize("options", [{}, {"model_input_names": ["input_ids"]}, {"pad_token_type_id": 1}])
@pytest.mark.parametrize("dropped", ["attention_mask", "label", None])
def test_batches_read_once_are_those_of_the_collator(options: Any, dropped: str | None) -> None:
    tokenizer = make_tokenizer(**options)
    rows = make_texts(50)
    columns = dict(tokenizer(list(rows["text"])))
    if "pad_token_type_id" in options:
        columns["token_type_ids"] = [[0] * len(ids) for ids in columns["input_ids"]]
    data = datasets.Dataset.from_dict({**columns, "label": rows["label"], "weight": [float(i) / 7 for i in range(50)]})
    data = data.remove_columns([name for name in (dropped,) if name in data.column_names]).shuffle(seed=3)  # rows by an index
    collator = transformers.DataCollatorWithPadding(tokenizer)
    plain = Collated(data, collator, None)
    fast = read_once(plain)
    assert isinstance(fast, TokenRows) and len(fast) == 50
    for indices in ([0], [3, 1, 2], list(range(50)), [49, 49, 0]):
        mine, theirs = fast.__getitems__(indices), collator([data[index] for index in indices])
        assert set(mine) == set(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name]), name
    assert list(fast.lengths) == [len(ids) for ids in data["input_ids"]]
    sample = fast[7]
    assert sample["input_ids"].tolist() == data[7]["input_ids"]


def test_other_collators_and_columns_take_the_plain_path(tokenizer: Any, texts: Any) -> None:
    padded = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    wanted = frozenset({"input_ids", "labels"})
    assert type(rows_of(texts["train"], padded, wanted)) is Collated
    assert type(rows_of(texts["train"], transformers.default_data_collator, wanted)) is Collated
    fits = transformers.DataCollatorWithPadding(tokenizer)
    assert type(rows_of(texts["train"], fits, wanted)) is TokenRows
    assert set(rows_of(texts["train"], fits, wanted).__getitems__([0, 1])) == {"input_ids", "labels"}
    left = transformers.DataCollatorWithPadding(make_tokenizer(padding_side="left"))
    assert type(rows_of(texts["train"], left, wanted)) is Collated
    words = texts["train"].add_column("tags", [[1, 2]] * 96)
    assert type(rows_of(words, fits, wanted | {"tags"})) is Collated
    changed = texts["train"].with_transform(lambda rows: {"input_ids": rows["input_ids"], "label": rows["label"]})
    assert type(rows_of(changed, fits, wanted)) is Collated


@pytest.mark.parametrize("source", ["fast", "rows"])
def test_rows_of_like_length_come_together(tmp_path: Path, tokenizer: Any, texts: Any, source: str) -> None:
    data = texts["train"]
    collator = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=None if source != "rows" else 1)
    widths: list[int] = []

    class Wide(SimpleCNN):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
            widths.append(int((input_ids == 0).sum()))
            return super().forward(input_ids, labels, attention_mask)

    torch.manual_seed(0)
    args = arguments(tmp_path, max_steps=12, train_sampling_strategy="group_by_length")
    Trainer(model=Wide(make_model(tokenizer).config), args=args, train_dataset=data, data_collator=collator).train()
    assert sum(widths) < 60  # padding; in any order it is about 240


# ------------------------------------------------------------------ the task alone


def test_a_model_of_transformers_is_a_task(tmp_path: Path, tokenizer: Any, texts: Any) -> None:
    model = make_model(tokenizer)
    before = weights(model)
    task = from_transformers(
        model, collator=transformers.DataCollatorWithPadding(tokenizer), compute_metrics=compute_accuracy, epochs=3, batch_size=16, lr=0.1
    )
    rows = {name: ListOf([data[index] for index in range(len(data))]) for name, data in texts.items()}
    run = anyfit.fit(task, rows["train"], validation=rows["test"], run=tmp_path / "run", seed=1)
    assert same(before, weights(model))  # a copy is trained
    assert run.splits["validation"]["accuracy"] > 0.6 and run.result["epochs"] == 3
    assert run.record["task"]["values"]["lr"] == 0.1
    again = anyfit.fit(task.replaced(lr="0.1"), rows["train"], validation=rows["test"], seed=1)
    assert same(weights(run.model), weights(again.model))
    assert anyfit.predict(run, rows["test"]).shape == (40, 2)
    read_once = anyfit.fit(task, task.rows(texts["train"]), validation=task.rows(texts["test"]), seed=1)
    assert same(weights(run.model), weights(read_once.model)) and read_once.splits == run.splits
    plain = anyfit.fit(from_transformers(small_gpt(), steps=2, batch_size=4), lines(), validation=lines(), seed=1)
    assert 0 <= plain.splits["validation"]["accuracy"] <= 1
    with pytest.raises(InputError, match="no field of the plan"):
        from_transformers(model, epoch=3)
    with pytest.raises(TaskError, match="float16"):
        from_transformers(make_model(tokenizer).half())


def lines() -> ListOf:
    return ListOf([{"input_ids": torch.arange(i % 9, i % 9 + 6), "labels": torch.arange(i % 9, i % 9 + 6)} for i in range(16)])


def test_data_errors_of_a_collator_are_named() -> None:
    with pytest.raises(DataError, match="data_collator gave a list"):
        Collated(points(), lambda samples: samples, None).__getitems__([0])
