"""The drop-in for `transformers.Trainer`: arguments become a plan, model and losses a task, `fit` does the rest."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_model as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from anyfit import engine, machine
from anyfit.adapt.huggingface.arguments import Timetable, refused, theirs, word
from anyfit.adapt.huggingface.callbacks import Events, named
from anyfit.adapt.huggingface.rows import Collate, Collated
from anyfit.adapt.huggingface.task import Figures, Parts, Passed, TransformersTask, dtype_of, label_names, loss_of, parameters_of
from anyfit.data import make_batches
from anyfit.errors import InputError, StateError, TaskError
from anyfit.fit import fit
from anyfit.run import Run
from anyfit.schedule import Schedule
from anyfit.schema import Schema
from anyfit.task import Step, evaluating
from anyfit.values import Plan, atomic

__all__ = ["Trainer"]

# Methods of transformers' class that a subclass may have replaced and that are never called here.
UNUSED_METHODS = (
    *("training_step", "prediction_step", "evaluation_loop", "log", "create_optimizer", "create_scheduler"),
    *("create_optimizer_and_scheduler", "get_train_dataloader", "get_eval_dataloader", "get_test_dataloader"),
    *("_get_train_sampler", "_get_eval_sampler", "_inner_training_loop", "_save_checkpoint", "_load_best_model", "_save"),
)

log = logging.getLogger(__name__)


class _TrainerTask(TransformersTask):
    """The task of a `Trainer`: it trains the model itself, and calls what the trainer was given."""

    owner: ClassVar[Trainer]

    def build_model(self, schema: Schema) -> nn.Module:
        return self.owner.model

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        self.owner.optimizer = self.owner.given[0] or super().build_optimizer(model)
        return self.owner.optimizer

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | None:
        scheduler = self.owner.given[1]
        if scheduler is None:
            schedule = super().build_schedule(optimizer, total_steps)
        else:
            schedule = Schedule(scheduler, "evaluation" if isinstance(scheduler, ReduceLROnPlateau) else "step")
        self.owner.lr_scheduler = None if schedule is None else schedule.scheduler
        return schedule

    def train_step(self, trainer: engine.Trainer, window: Iterable[Any]) -> Step | None:
        self.owner.events.before_step(trainer.position.step, trainer.position.offset)
        return super().train_step(trainer, window)

    def step(self, model: nn.Module, batch: Any) -> Step:
        count = self.count(batch)
        return Step(self.owner.compute_loss(model, dict(batch), num_items_in_batch=count), count)

    def measured(self, model: nn.Module, batch: Any) -> tuple[Tensor, int | Tensor, Any]:
        count = self.count(batch)
        loss, outputs = self.owner.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=count)
        return loss, count, outputs

    def shown(self, predictions: Any, labels: Any) -> Any:
        change = self.owner.preprocess_logits_for_metrics
        return predictions if change is None else change(predictions, labels)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Figures:
        events, started = self.owner.events, time.time()
        if (known := events.known()) is not None:  # `fit` ends with one more of the same weights
            return known
        figures = self.passed(model, batches).figures
        events.measured = (figures, started)
        return figures


class Trainer:
    """`transformers.Trainer`, run by anyfit: one object that trains, evaluates, predicts and saves a model.

    The run folder is `args.output_dir` (none with save_strategy='no'): `train(resume_from_checkpoint=True)` goes on exactly where it
    was killed. Checkpoints are the last two and the best, at ends of epochs, at a new best and once a minute. The loss of a window or an
    evaluation is over all its rows (or tokens), not a mean of batch means. Losses that are not finite end a run.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Collate | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise InputError(
                f"{', '.join(others)} cannot be honoured here; pass a model that is made for model_init, processing_class for tokenizer, "
                "optimizers for optimizer_cls_and_kwargs"
            )
        self.args = theirs("", "TrainingArguments")(output_dir="tmp_trainer") if args is None else args
        if found := refused(self.args):
            raise InputError(f"{len(found)} arguments cannot be honoured here: " + "; ".join(found))
        if word(self.args.eval_strategy) != "no" and eval_dataset is None:
            raise InputError(f"eval_strategy (={word(self.args.eval_strategy)!r}) needs an eval_dataset; pass one, or eval_strategy='no'")
        if data_collator is None and hasattr(processing_class, "pad"):
            data_collator = theirs(".data.data_collator", "DataCollatorWithPadding")(processing_class)
        self.model, self.data_collator, self.processing_class = model, data_collator, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.given = self.optimizer, self.lr_scheduler = optimizers
        self.loader: DataLoader[Any] | None = None  # of the evaluation that goes on, for callbacks
        self.run: Run | None = None
        config: Any = getattr(model, "config", None)
        if config is not None:
            config.use_cache = self.args.use_cache
        if self.args.report_to:
            log.warning("report_to (=%s) is not written to; the run folder and callbacks tell of the run", self.args.report_to)
        self.events = Events(self)
        for callback in callbacks or ():
            self.add_callback(callback)
        self.events.call("on_init_end")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        replaced = [name for name in UNUSED_METHODS if name in vars(cls)]
        if replaced:
            raise TaskError(
                f"{cls.__name__} replaces {', '.join(replaced)} of Trainer, which anyfit never calls; replace compute_loss, or write an "
                "anyfit.Task (from_transformers gives one to start from)"
            )

    @property
    def state(self) -> Any:
        """Transformers' TrainerState: step, epoch, best and the log."""
        return self.events.state

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class of one."""
        self.events.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, by itself or by its class."""
        self.events.handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """True: one process trains."""
        return True

    # -------------------------------------------------------------- train

    def train(self, resume_from_checkpoint: bool | str | None = None) -> Any:
        """Train the model in place; with load_best_model_at_end it ends with the weights of the smallest evaluation loss.

        `resume_from_checkpoint`: True, or the output_dir of an earlier run.
        """
        if self.train_dataset is None:
            raise InputError("train_dataset (=None) must be given to train")
        folder = self._folder(resume_from_checkpoint)
        if hasattr(self.model, "config") and hasattr(self.processing_class, "pad"):
            theirs(".trainer_utils", "align_special_tokens")(self.model, self.processing_class)
        task = self._task()
        rows = task.rows(self.train_dataset)
        count = None
        if isinstance(rows, Collated):
            count = len(rows)
            if self.args.train_sampling_strategy == "sequential":
                rows.order = rows.as_they_stand
            elif self.args.train_sampling_strategy == "group_by_length" and rows.lengths is None:
                rows.lengths = [len(self.train_dataset[index]["input_ids"]) for index in range(count)]
        times = Timetable.of(self.args, count)
        self.loader = None if word(self.args.eval_strategy) == "no" else self._batches_of(task, self.eval_dataset)
        self.events.begin(times)
        started = time.time()
        self.run = fit(
            task,
            rows,
            validation=self.loader,
            run=folder,
            resume=bool(resume_from_checkpoint),
            on_event=self.events.hear,
            **self._plan(times, count),
        )
        if self.run.stopped == "signal":  # the checkpoint is written; what the script would do next was not asked for
            if self.run.result["signal"] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + int(self.run.result["signal"]))
        events = self.events
        events.end_epoch()
        steps, step_size = self.state.global_step - events.first_step, self.args.train_batch_size * times.accumulate
        metrics: Figures = theirs(".trainer_utils", "speed_metrics")("train", started, steps * min(count or step_size, step_size), steps)
        metrics["train_loss"] = events.total_loss / max(steps, 1)
        events.log(metrics)
        events.call("on_train_end")
        return theirs(".trainer_utils", "TrainOutput")(self.state.global_step, metrics["train_loss"], metrics)

    def _folder(self, resume: bool | str | None) -> Path | None:
        """The run folder; what is in it already is neither overwritten nor taken up without being asked for."""
        if word(self.args.save_strategy) == "no":
            if resume:
                raise InputError("resume_from_checkpoint needs checkpoints, which save_strategy (='no') does not keep")
            return None
        folder = Path(self.args.output_dir)
        if isinstance(resume, str) and folder.resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
            raise InputError(
                f"resume_from_checkpoint (={resume!r}) must be True or in output_dir (={str(folder)!r}), where the run goes on"
            )
        exists = (folder / "run.json").exists()
        if resume and not exists:
            raise StateError(f"resume_from_checkpoint (={resume!r}): output_dir (={str(folder)!r}) holds no run; call train() without it")
        if exists and not resume:
            raise InputError(
                f"output_dir (={str(folder)!r}) holds a run already; train(resume_from_checkpoint=True) goes on with it, another "
                "output_dir starts anew, save_strategy='no' keeps nothing"
            )
        return folder

    def _task(self) -> TransformersTask:
        args = self.args
        made = Parts(self.model, self.data_collator, self.compute_metrics, keeps_columns=not args.remove_unused_columns)

        class OfTrainer(_TrainerTask):
            parts = made
            owner = self

        return OfTrainer(
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            epsilon=args.adam_epsilon,
            schedule=word(args.lr_scheduler_type),
            schedule_options=args.lr_scheduler_kwargs or None,
            warmup_steps=args.warmup_steps,
            label_names=tuple(args.label_names or label_names(self.model)),
        )

    def _plan(self, times: Timetable, count: int | None) -> dict[str, Any]:
        args, waiting = self.args, self.events.waiting
        return {
            **self._precision(),
            "steps": times.total,
            "batch_size": min(args.train_batch_size, count or args.train_batch_size),
            "accumulate": times.accumulate,
            "evaluate_every": times.evaluate_every,
            "best": args.load_best_model_at_end,
            "clip": args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
            "device": str(args.device),
            "seed": args.seed,
            "bucket": count is not None and args.train_sampling_strategy == "group_by_length",
            "drop_last": args.dataloader_drop_last,
            "workers": args.dataloader_num_workers,
            "log_every": times.wakes(each_step=bool(waiting("on_step_end")), each_epoch=bool(waiting("on_epoch_end"))),
        }

    def _precision(self) -> dict[str, str]:
        return {"dtype": dtype_of(self.model), "precision": "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"}

    # -------------------------------------------------------------- loss and figures

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | Tensor | None = None
    ) -> Any:
        """The loss of a batch as a mean over `num_items_in_batch`; replace it in a subclass for a loss of your own."""
        labels = inputs.pop("labels", None) if self.compute_loss_func is not None else None
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss: Tensor | None = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = loss_of(outputs)
        if loss is None:
            raise TaskError(
                f"model (a {type(model).__name__}) gave no loss from {', '.join(inputs)}; give its labels a name of its forward "
                f"({', '.join(parameters_of(model))}), or pass compute_loss_func"
            )
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> Figures:
        """Loss and metrics of `eval_dataset`, under names that start with the prefix."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("eval_dataset (=None) must be given to evaluate")
        _, metrics = self._pass(dataset, metric_key_prefix)
        self.events.evaluated(metrics)
        return metrics

    def predict(self, test_dataset: Any, *, metric_key_prefix: str = "test") -> Any:
        """Predictions, labels and metrics of `test_dataset` as numpy; its labels may be absent."""
        passed, metrics = self._pass(test_dataset, metric_key_prefix, keep=True)
        self.events.call("on_predict", metrics=metrics)
        return theirs(".trainer_utils", "PredictionOutput")(passed.predictions, passed.labels, metrics)

    def _pass(self, dataset: Any, prefix: str, *, keep: bool = False) -> tuple[Passed, Figures]:
        task, device, plan = self._task(), torch.device(str(self.args.device)), Plan().updated(**self._precision())
        self.loader = self._batches_of(task, dataset)
        self.model.to(device)
        started = time.time()
        with machine.own_random(), machine.autocast(plan, device), torch.no_grad(), evaluating(self.model):
            passed = task.passed(self.model, make_batches(self.loader, plan, task.collate, device=device), keep=keep)
        return passed, named(passed.figures, started, prefix, self.args.eval_batch_size)

    def _batches_of(self, task: TransformersTask, dataset: Any) -> DataLoader[Any]:
        """Batches for evaluation, in the order of rows. The generator is its own: a pass must not move the one that training draws from."""
        if isinstance(dataset, dict):
            raise InputError(f"eval_dataset (= {', '.join(dataset)}) must be one data set; call evaluate for each, with metric_key_prefix")
        return DataLoader(
            task.rows(dataset),
            batch_size=self.args.eval_batch_size,
            collate_fn=task.collate,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )

    # -------------------------------------------------------------- save

    def save_model(self, output_dir: str | None = None) -> None:
        """Write model (and tokenizer) to a folder from which `from_pretrained` reads."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(str(folder))
        else:
            with atomic(folder / "model.safetensors") as temporary:
                save_tensors(self.model, str(temporary), metadata={"format": "pt"})
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(folder))
