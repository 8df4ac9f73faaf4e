"""What `TrainingArguments` mean here: what is heeded, what changes nothing, what is refused, and when things happen."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from anyfit.errors import InputError, MissingExtra

__all__ = ["Timetable", "refused", "theirs", "word"]

HEEDED = {
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16"),
    *("logging_strategy", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "seed", "data_seed", "use_cpu"),
    *("dataloader_drop_last", "dataloader_num_workers", "remove_unused_columns", "label_names", "use_cache"),
    *("train_sampling_strategy", "report_to"),
}
# These change neither weights nor figures here: where they log to, how they move memory, what several processes would do. Checkpoints
# are whole, bounded (the last two and the best) and written by anyfit's own clock.
HARMLESS = {
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "debug", "skip_memory_metrics", "tf32"),
    *("run_name", "project", "disable_tqdm", "logging_dir", "logging_nan_inf_filter", "liger_kernel_config", "torch_empty_cache_steps"),
    *("save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "overwrite_output_dir"),
    *("eval_accumulation_steps", "eval_use_gather_object", "average_tokens_across_devices", "accelerator_config", "fsdp_config"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "torch_compile_backend", "torch_compile_mode"),
}
HARMLESS_FAMILIES = ("dataloader_", "ddp_", "hub_", "log_", "trackio_")
WAYS = {
    "auto_find_batch_size": "give per_device_train_batch_size and gradient_accumulation_steps",
    "full_determinism": "call torch.use_deterministic_algorithms(True) yourself",
    "gradient_checkpointing": "call model.gradient_checkpointing_enable() yourself",
    "label_smoothing_factor": "pass compute_loss_func with the smoothed loss",
    "push_to_hub": "call model.push_to_hub() after training",
    "torch_compile": "pass a compiled model",
}


def theirs(module: str, name: str) -> Any:
    """A name of transformers, imported where it is needed."""
    try:
        return getattr(import_module(f"transformers{module}"), name)
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error


def word(value: Any) -> Any:
    """An enumeration's value, anything else as it is."""
    return getattr(value, "value", value)


def refused(args: Any) -> list[str]:
    """What these arguments ask for and anyfit does not do, each with the way out."""
    found = []
    for field in dataclasses.fields(args):
        value, default = word(getattr(args, field.name)), word(field.default)
        known = field.name in HEEDED | HARMLESS or field.name.startswith(HARMLESS_FAMILIES)
        if not known and value not in (None, False, "", [], {}, default):
            found.append(f"{field.name} (={value!r}): {WAYS.get(field.name, f'leave it at {default!r}')}")
    optim, sampling = word(args.optim), args.train_sampling_strategy
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        found.append(f"optim (={optim!r}): take 'adamw_torch_fused', or pass optimizers=(optimizer, None)")
    if args.metric_for_best_model not in (None, "loss", "eval_loss") or args.greater_is_better:
        found.append(
            f"metric_for_best_model (={args.metric_for_best_model!r}, greater_is_better={args.greater_is_better}): the best model is that of "
            "the smallest evaluation loss; leave both out, or write an anyfit.Task whose evaluate() gives that figure as 'loss'"
        )
    if sampling not in ("random", "sequential", "group_by_length"):
        found.append(f"train_sampling_strategy (={sampling!r}): take 'random', 'sequential' or 'group_by_length'")
    if word(args.lr_scheduler_type) == "greedy":
        found.append("lr_scheduler_type (='greedy'): take another, or pass optimizers=(optimizer, scheduler)")
    if args.data_seed not in (None, args.seed):
        found.append(f"data_seed (={args.data_seed}): one seed serves for all; leave it out")
    if args.world_size > 1:
        found.append(f"world_size (={args.world_size}): start one process, not torchrun")
    return found


@dataclass(frozen=True)
class Timetable:
    """When things happen, in steps; a stream has no epochs that could be counted."""

    total: int = 0
    per_epoch: int | None = None
    batches_per_epoch: int = 0
    accumulate: int = 1
    log_every: int | None = None  # None: not by steps
    log_epochs: bool = False
    evaluate_every: int | None = None  # None: not by steps

    @classmethod
    def of(cls, args: Any, rows: int | None) -> Timetable:
        """What the arguments say for so many rows; None for a stream."""
        size, accumulate = args.train_batch_size, args.gradient_accumulation_steps
        logging_by, evaluation_by = word(args.logging_strategy), word(args.eval_strategy)
        batches, per_epoch = 0, None
        if rows is not None:
            batches = rows // size if args.dataloader_drop_last else -(-rows // size)
            per_epoch = max(1, -(-batches // accumulate))
            if args.dataloader_drop_last and batches % accumulate:
                raise InputError(
                    f"dataloader_drop_last (=True) with gradient_accumulation_steps (={accumulate}) drops whole steps here; {rows} rows are "
                    f"{batches} batches, which is no multiple: leave one of the two out"
                )
        elif args.max_steps <= 0:
            raise InputError(f"max_steps (={args.max_steps}) must be given for a train_dataset without length")
        elif "epoch" in (logging_by, evaluation_by):
            raise InputError("eval_strategy and logging_strategy (='epoch') need a train_dataset with a length; take 'steps'")
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (per_epoch or 0))
        if total < 1:
            raise InputError(f"num_train_epochs (={args.num_train_epochs}) gives no step; give more, or max_steps")

        def whole(steps: float) -> int:
            return int(steps) if steps >= 1 else max(1, math.ceil(total * steps))

        return cls(
            total,
            per_epoch,
            batches,
            accumulate,
            log_every=whole(args.logging_steps) if logging_by == "steps" else None,
            log_epochs=logging_by == "epoch",
            evaluate_every=whole(args.eval_steps) if evaluation_by == "steps" else None,
        )

    def ends_epoch(self, step: int) -> bool:
        return self.per_epoch is not None and step % self.per_epoch == 0

    def logs(self, step: int) -> bool:
        """The last step is logged too, so that losses and evaluations pair up."""
        if self.log_every is None and not self.log_epochs:
            return False
        due = step % self.log_every == 0 if self.log_every else self.ends_epoch(step)
        return due or step == self.total

    def evaluates_by_step(self, step: int) -> bool:
        return self.evaluate_every is not None and (step == self.total or step % self.evaluate_every == 0)

    def epoch(self, step: int) -> float:
        """How many epochs `step` steps are, counted in batches."""
        if self.per_epoch is None:
            return step / self.total
        whole, part = divmod(step, self.per_epoch)
        return whole + min(1.0, part * self.accumulate / max(1, self.batches_per_epoch))

    def wakes(self, *, each_step: bool, each_epoch: bool) -> int:
        """How often the engine has to tell of a step so that everything here gets its turn."""
        needs = [self.log_every] if self.log_every else []
        if self.per_epoch is not None and (each_epoch or self.log_epochs):
            needs.append(self.per_epoch)
        if each_step:
            needs.append(1)
        return math.gcd(*needs) if needs else self.total
