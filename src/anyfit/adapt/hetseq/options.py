"""HetSeq's options: which become fields of the plan, where the others went, and which would change the training and cannot be had."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from anyfit.errors import InputError, TaskError
from anyfit.values import canonical

__all__ = ["ELSEWHERE", "PLANNED", "Options", "json_values", "plan_of"]

# field of the plan <- options. `distributed_world_size` ranks stepped together, each with `update_freq` batches.
PLANNED = {
    "epochs": ("max_epoch",),
    "steps": ("max_update",),
    "batch_size": ("max_sentences",),
    "max_tokens": ("max_tokens",),
    "accumulate": ("update_freq", "distributed_world_size"),
    "clip": ("clip_norm",),
    "seed": ("seed",),
    "workers": ("num_workers",),
    "log_every": ("log_interval",),
    "device": ("cpu",),
}
_OWN = "the task's own classes read it"
_RANKS = "ranks are told by --nproc, --nnodes and --rdzv"
_UNNEEDED = "there is nothing to choose here"
_VALIDATION = "say fit(..., validation=task.rows(split)); it is evaluated in larger batches, after each epoch or evaluate_every steps"
_KEPT = "a run keeps its last two checkpoints and the best one, written after each epoch and every checkpoint_every_s"
_ANEW = "to leave optimizer, schedule and position behind, start another run with weights=RUN"
ELSEWHERE = {
    **dict.fromkeys(("task", "data", "dict", "config_file", "max_pred_length", "num_file"), _OWN),
    **dict.fromkeys(("hetseq_state_dict", "transformers_state_dict", "load_state_dict_strict"), _OWN),
    **dict.fromkeys(("train_file", "validation_file", "test_file", "extension_file"), _OWN),
    **dict.fromkeys(("root_data_dir", "entities", "ent_vecs_filename"), _OWN),
    **dict.fromkeys(("optimizer", "lr", "adam_betas", "adam_eps", "weight_decay"), "the optimizer reads it"),
    **dict.fromkeys(("adadelta_rho", "adadelta_eps", "dadelta_weight_decay"), "the optimizer reads it"),
    **dict.fromkeys(("lr_scheduler", "warmup_updates", "total_num_update", "end_learning_rate", "power"), "the scheduler reads it"),
    "force_anneal": "the scheduler reads it",
    "train_subset": "the split that from_hetseq gives rows of",
    **dict.fromkeys(("valid_subset", "validate_interval", "disable_validation", "max_tokens_valid", "max_sentences_valid"), _VALIDATION),
    **dict.fromkeys(("distributed_rank", "distributed_gpus", "distributed_backend", "distributed_init_method", "device_id"), _RANKS),
    **dict.fromkeys(("distributed_no_spawn", "ddp_backend"), _RANKS),
    **dict.fromkeys(("bucket_cap_mb", "find_unused_parameters", "fast_stat_sync", "fix_batches_to_gpus"), _UNNEEDED),
    **dict.fromkeys(("save_dir", "restore_file"), "say fit(..., run=FOLDER, resume=True)"),
    **dict.fromkeys(("reset_dataloader", "reset_lr_scheduler", "reset_meters", "reset_optimizer"), _ANEW),
    "optimizer_overrides": "say fit(..., resume=True, optimizer_overrides={...})",
    **dict.fromkeys(("save_interval", "save_interval_updates", "keep_interval_updates", "keep_last_epochs", "no_save"), _KEPT),
    **dict.fromkeys(("no_epoch_checkpoints", "no_last_checkpoints", "no_save_optimizer_state"), _KEPT),
    **dict.fromkeys(("best_checkpoint_metric", "maximize_best_checkpoint_metric"), "best=True keeps the best by validation loss"),
    **dict.fromkeys(("no_progress_bar", "log_format"), "on_event gets what happens; the command line shows it"),
    "log_interval": "1, HetSeq's default, is left out, since a line for each step takes time; say log_every=1",
    "min_lr": "nothing: it is refused where it would stop the training",
    "curriculum": "nothing: it is refused where it would keep an epoch unshuffled",
    "required_batch_size_multiple": "nothing: it is refused where it would change a batch",
    "use_bmuf": "nothing: it is refused",
}


class Options(NamedTuple):
    """What HetSeq's options became."""

    plan: dict[str, Any]  # fields of `anyfit.Plan`
    left: dict[str, str]  # every option that is no field of the plan: where it went
    refused: list[str]  # what would change the training and cannot be honoured, with the way out


def plan_of(args: argparse.Namespace | Mapping[str, Any], rows: int | None = None) -> Options:
    """HetSeq's options as fields of the plan, so that a step has the samples that it had on `distributed_world_size` ranks there.

    `rows` of the training data tell which of `max_epoch` and `max_update` ends first where both are given.
    """
    given = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    batch_size, max_tokens = _whole(given, "max_sentences"), _whole(given, "max_tokens")
    plan: dict[str, Any] = {}
    if batch_size is not None or max_tokens is not None:
        plan["batch_size"] = batch_size
    if max_tokens is not None:
        plan["max_tokens"] = max_tokens
    frequencies = _several(given, "update_freq")
    ranks = _whole(given, "distributed_world_size")
    if frequencies or ranks is not None:
        plan["accumulate"] = (frequencies[-1] if frequencies else 1) * (1 if ranks is None else ranks)
    if (seed := _whole(given, "seed", least=0)) is not None:
        plan["seed"] = seed
    if (workers := _whole(given, "num_workers", least=-1)) is not None:
        plan["workers"] = max(0, workers)  # HetSeq's default, -1, is one that it cannot run with
    if (lines := _whole(given, "log_interval")) is not None and lines > 1:  # 1 is HetSeq's default
        plan["log_every"] = lines
    if given.get("cpu"):
        plan["device"] = "cpu"
    if given.get("clip_norm") is not None:
        clip = _number(given, "clip_norm")
        plan["clip"] = clip if clip > 0 else None
    refused = [*_length(given, plan, rows), *_refused(given, frequencies, batch_size, max_tokens)]
    taken = {option for options in PLANNED.values() for option in options}
    left = {
        name: ELSEWHERE.get(name, f"no option of HetSeq; {_OWN}, if at all")
        for name in given
        if name not in taken or (name == "log_interval" and "log_every" not in plan)
    }
    return Options(plan, left, refused)


def _length(given: Mapping[str, Any], plan: dict[str, Any], rows: int | None) -> Iterator[str]:
    """How long to train, into the plan: HetSeq stops at whichever comes first, and 0 means no end."""
    epochs, steps = _whole(given, "max_epoch", least=0), _whole(given, "max_update", least=0)
    if epochs and steps:
        if rows is None or plan.get("batch_size") is None or "max_tokens" in plan:
            yield f"max_epoch (={epochs}) and max_update (={steps}) are both given, and which ends first is not known: set one of them to 0"
            return
        per_epoch = -(-rows // (plan["batch_size"] * plan.get("accumulate", 1)))
        epochs, steps = (epochs, 0) if epochs * per_epoch <= steps else (0, steps)
    if epochs:
        plan["epochs"] = epochs
    elif steps:
        plan["steps"] = steps


def _refused(given: Mapping[str, Any], frequencies: list[int], batch_size: int | None, max_tokens: int | None) -> Iterator[str]:
    if len(set(frequencies)) > 1:
        yield f"update_freq (={frequencies}) changes with the epoch: give one, and start another run with weights= for the next"
    if given.get("min_lr") is not None and (lowest := _number(given, "min_lr")) >= 0:
        yield f"min_lr (={lowest}) would stop the training by its rate: leave it at -1 and say max_update"
    if (epochs := _whole(given, "curriculum", least=0) or 0) > 1:
        yield f"curriculum (={epochs}) would leave the first epochs unshuffled: leave it at 0"
    multiple = _whole(given, "required_batch_size_multiple") or 1
    if multiple > 1 and (max_tokens is not None or (batch_size or 0) % multiple):
        yield f"required_batch_size_multiple (={multiple}) would change what a batch holds: leave it at 1"
    if given.get("use_bmuf"):
        yield "use_bmuf (=True) only kept HetSeq's ranks from adding up gradients: leave it out"


def json_values(args: argparse.Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON values, which a record holds and other processes read."""
    if not isinstance(args, argparse.Namespace | Mapping):
        raise TaskError(f"args (a {type(args).__name__}) must be an argparse.Namespace or a mapping of JSON values")
    result: dict[str, Any] = {}
    for name, value in (vars(args) if isinstance(args, argparse.Namespace) else args).items():
        plain = os.fspath(value) if isinstance(value, os.PathLike) else list(value) if isinstance(value, tuple) else value
        try:
            canonical({name: plain})
        except InputError as error:
            raise TaskError(
                f"args.{name} (={value!r}) is no JSON value; give what makes it, and make it in setup_task(cls, args)"
            ) from error
        result[str(name)] = plain
    return result


def _whole(given: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} (={value!r}) must be a whole number of at least {least}")
    return value


def _number(given: Mapping[str, Any], name: str) -> float:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} (={value!r}) must be a number")
    return float(value)


def _several(given: Mapping[str, Any], name: str) -> list[int]:
    """One whole number or several."""
    values = given.get(name)
    each = values if isinstance(values, list | tuple) else [] if values is None else [values]
    return [_whole({name: value}, name) or 1 for value in each]
