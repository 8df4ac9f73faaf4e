"""python benchmarks/contestants.py ENGINE: one engine in a process of its own, as benchmarks/engine.py drives it.

Reads names of works from stdin and answers each with a line of JSON: microseconds of CPU per step, and the last logged loss.
Every engine trains the same module with fused AdamW at one thread, logs its loss every 50 steps and keeps the history.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from works import WORKS, Work

LOG = 50
LR = 1e-3


class Clock:
    """CPU seconds between the end of the warm-up and the last step."""

    def __init__(self, work: Work) -> None:
        self.first, self.last = work.warmup, work.warmup + work.steps
        self.marks: dict[int, float] = {}

    def at(self, step: int) -> None:
        if step == self.first or step == self.last:
            self.marks[step] = time.process_time()

    def microseconds(self) -> float:
        return (self.marks[self.last] - self.marks[self.first]) / (self.last - self.first) * 1e6


def raw_loop(work: Work, x: Any, y: Any, clock: Clock) -> list[float]:
    """The loop that a tutorial shows."""
    model, history, total, step = work.model(), [], 0.0, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=work.weight_decay, fused=True)
    for inputs, targets in itertools.islice(work.loader(x, y), clock.last):
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, step = total + loss.item(), step + 1
        if step % LOG == 0:
            history.append(total / LOG)
            total = 0.0
        clock.at(step)
    return history


def best_raw_loop(work: Work, x: Tensor, y: Tensor, clock: Clock) -> list[float]:
    """The best that we can write by hand: one gather for many batches, losses left alone until a log line is due, freed memory kept."""
    keep_freed_memory()
    model, history, losses, step = work.model(), [], [], 0
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=work.weight_decay, fused=True)
    order = torch.randperm(len(x))
    for chunk in order.split(work.batch_size * 64):
        for inputs, targets in zip(x[chunk].split(work.batch_size), y[chunk].split(work.batch_size), strict=True):
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            losses.append(loss.detach())
            step += 1
            if step % LOG == 0:
                history.append(float(torch.stack(losses).mean()))
                losses = []
            clock.at(step)
    return history


def keep_freed_memory() -> None:
    """As anyfit does: else glibc may hand large freed blocks back to the kernel and take them anew at every step (mallopt(3))."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        library.mallopt(mmap_threshold, 32 << 20)  # the most that every glibc takes
        library.mallopt(trim_threshold, (1 << 31) - 1)


def anyfit(work: Work, x: Tensor, y: Tensor, clock: Clock, *, writes: bool = True, **plan: Any) -> list[float]:
    """As a user has it: a run folder on disk, events, history."""
    from anyfit import Schema, Task, adamw, fit

    class Same(Task):
        def build_model(self, schema: Schema) -> nn.Module:
            return work.model()

        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return adamw(model, lr=LR, weight_decay=work.weight_decay)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock.at(event["step"])

    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            Same(),
            (x, y),
            steps=clock.last,
            batch_size=work.batch_size,
            log_every=LOG,
            run=f"{folder}/run" if writes else None,
            on_event=on_event,
            **plan,
        )
    return [line["loss"] for line in run.history if line["event"] == "step"]


def anyfit_unwritten(work: Work, x: Tensor, y: Tensor, clock: Clock) -> list[float]:
    """The same with nothing written: events and history only."""
    return anyfit(work, x, y, clock, writes=False)


def anyfit_bf16(work: Work, x: Tensor, y: Tensor, clock: Clock) -> list[float]:
    """The same with bf16 autocast and channels last."""
    return anyfit(work, x, y, clock, precision="bf16", channels_last=True)


def huggingface(work: Work, x: Tensor, y: Tensor, clock: Clock) -> list[float]:
    """The Trainer of transformers on rows in memory."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.model()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": x[index], "labels": y[index]}

    return train_by_huggingface(WithLoss(), Rows(), work, clock)


def train_by_huggingface(model: nn.Module, rows: Any, work: Work, clock: Clock, collator: Any = None) -> list[float]:
    """The Trainer of transformers, lean: no bar, no saving, no clipping, a constant rate."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.at(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=work.batch_size,
            max_steps=clock.last,
            learning_rate=LR,
            weight_decay=work.weight_decay,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            logging_steps=LOG,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, data_collator=collator, train_dataset=rows, callbacks=[Watch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def lightning(work: Work, x: Any, y: Any, clock: Clock) -> list[float]:
    """Lightning's Trainer: no bar, no checkpoint, a CSV log of the loss."""
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    history: list[float] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=work.weight_decay, fused=True)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            clock.at(trainer.global_step)
            if trainer.global_step % LOG == 0:
                history.append(float(trainer.callback_metrics["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=clock.last,
            accelerator="cpu",
            logger=CSVLogger(folder),
            log_every_n_steps=LOG,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch()],
        )
        trainer.fit(Module(), work.loader(x, y))
    return history


ENGINES = {
    "anyfit": anyfit,
    "anyfit unwritten": anyfit_unwritten,
    "anyfit bf16": anyfit_bf16,
    "raw loop": raw_loop,
    "best raw loop": best_raw_loop,
    "huggingface": huggingface,
    "lightning": lightning,
}


def serve(engine: str, run: Callable[[Work, Any, Any, Clock], list[float]], works: Mapping[str, Work]) -> None:
    """Answer one line of JSON for each work named on stdin."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever an engine prints must not stand between the answers
    rows: dict[str, tuple[Any, Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        work, clock = works[name], Clock(works[name])
        if name not in rows:
            rows[name] = work.rows(name)
        x, y = rows[name]
        torch.manual_seed(0)
        history = run(work, x, y, clock)
        expected = clock.last // LOG
        assert len(history) == expected, f"{engine} kept {len(history)} losses, expected {expected}"
        answers.write(json.dumps({"us": clock.microseconds(), "loss": history[-1]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], ENGINES[sys.argv[1]], WORKS)
