"""Any `transformers` model as a task: classify or regress texts, or learn language by masked or by next words.

B texts, T tokens of the longest, V words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import logging
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from anyfit import data
from anyfit.errors import InputError, MissingExtra, StorageError, TaskError
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Step, Task
from anyfit.tasks.text import TextTask
from anyfit.update import Update
from anyfit.values import Plan

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["HuggingFace"]

IGNORED = -100
SPECIAL = {  # what transformers calls them -> the words that a tokenizer may have for them
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "<|endoftext|>"),
    "eos": ("</s>", "<|endoftext|>"),
}
UNDECAYED = ("bias", "norm.weight", "layernorm.weight", "layer_norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")


class _Words(NamedTuple):
    """What masking needs to know of a vocabulary."""

    size: int
    mask: int
    special: tuple[int, ...]  # never masked


class HuggingFace(TextTask):
    """Fine-tune or pre-train a `transformers` model. Batch: `input_ids` (B, T), `lengths` (B,), `target` (B,) or `labels` (B, T).

    `model`: a folder that `save_pretrained` made, spelt as a path (./base), or a hub id (asking for one is asking for the network); `pretrained` off takes
    its config alone. `config`: in place of `model`, a config as JSON with its `model_type`; the vocabulary is then learnt from the
    training texts, or `tokenizer` is given. `freeze`: patterns of parameter names that do not train. `lora`: the rank of adapters
    that train in place of the weights (peft). `mask`: the share of words to be guessed; `pack` cuts the text of a language model
    into rows of `max_length` without padding. Where numbers are learnt, the saved config's `target_unit` holds mean and deviation of
    each, by which `transformers`' own outputs are to be multiplied.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    pretrained: bool = True
    objective: Literal["classification", "masked-lm", "causal-lm"] = "classification"
    freeze: tuple[str, ...] = ()
    lora: int = 0
    mask: float = 0.15
    pack: bool = True
    vocabulary: Literal["word", "bpe"] = "bpe"
    max_length: int = 128
    lr: float = 5e-5

    def plan(self) -> Plan:
        language = self.objective != "classification"
        return Plan(epochs=3, batch_size=32, bucket=not (language and self.pack), clip=1.0)

    @property
    def framed(self) -> bool:
        return self.objective != "causal-lm"

    def statistics(self, table: pa.Table, schema: Schema) -> Update:
        if self.model is None:
            return super().statistics(table, schema)
        self._texts(schema)
        return data.statistics(table, schema)

    def prepare(self, schema: Schema, statistics: Update) -> Schema:
        if self.model is not None and Path(self.model).is_dir() and not _is_path(self.model):
            raise TaskError(
                f"model (={self.model!r}) is a folder, but spelt like a hub id; write ./{self.model}, so that it is never looked for there"
            )
        if (self.model is None) == (self.config is None):
            raise TaskError("give model (a folder or a hub id) or config (JSON with model_type), one of the two")
        if self.model is None or self.tokenizer is not None:
            return super().prepare(schema, statistics)
        fitted = Task.prepare(self, schema, statistics)
        first = fitted[self._texts(schema)[0]]
        return fitted.replace([replace(first, tokenizer=self._own_tokenizer())])

    def _own_tokenizer(self) -> str:
        """The model's tokenizer as JSON."""
        transformers = _library()
        try:
            with _quiet():
                found = transformers.AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise TaskError(f"model (={self.model!r}) has no tokenizer that can be read: {_short(error)}; give tokenizer=") from error
        if not getattr(found, "is_fast", False):
            raise TaskError(f"the tokenizer of model (={self.model!r}) has no tokenizer.json; give one with tokenizer=")
        return str(found.backend_tokenizer.to_str())

    def build_dataset(self, table: pa.Table, split: str, schema: Schema) -> Any:
        built = super().build_dataset(table, split, schema)
        if self.objective == "classification" or not self.pack or split == "predict":
            return built
        if schema.weight is not None:
            raise TaskError(
                f"weight (={schema.weight!r}) weighs rows, which pack (=True) cuts anew; pass pack=False or leave the weights out"
            )
        tokenizer = data.tokenizer_of(self._tokenizer(schema))
        ends = None if tokenizer.num_special_tokens_to_add(False) else _first(tokenizer, ("[SEP]", "</s>", "<|endoftext|>"))
        return {"input_ids": data.packed(built["input_ids"], self.max_length, ends)}

    def build_model(self, schema: Schema) -> nn.Module:
        if self.model is not None and _is_path(self.model) and not Path(self.model).is_dir():
            raise TaskError(f"model (={self.model!r}) is no folder; the one that save_pretrained made must stay where it was")
        transformers = _library()
        words = self.num_words(schema)
        if self.objective == "classification" and not schema.targets:
            raise TaskError(
                "task hf needs a target column to classify; name it with target=..., or set objective to masked-lm or causal-lm"
            )
        options: dict[str, Any] = {}
        if self.objective == "classification":
            options["num_labels"] = schema.num_outputs
        kind = {"classification": "SequenceClassification", "masked-lm": "MaskedLM", "causal-lm": "CausalLM"}[self.objective]
        auto = getattr(transformers, f"AutoModelFor{kind}")
        with _quiet():
            try:
                if self.config is not None:
                    padding = data.padding_of(data.tokenizer_of(self._tokenizer(schema)))
                    config = transformers.AutoConfig.for_model(**{"vocab_size": words, "pad_token_id": padding, **self.config, **options})
                elif not self.pretrained:
                    config = transformers.AutoConfig.from_pretrained(self.model, **options)
                model = (
                    auto.from_config(config)
                    if self.config is not None or not self.pretrained
                    # a last layer of other classes is made anew
                    else auto.from_pretrained(self.model, ignore_mismatched_sizes=self.objective == "classification", **options)
                )
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"config (={self.config!r})" if self.model is None else f"model (={self.model!r})"
                raise TaskError(f"{what} cannot be made for {self.objective}: {_short(error)}") from error
        table = model.get_input_embeddings()
        if table.num_embeddings < words:
            raise TaskError(
                f"the model knows {table.num_embeddings} words, but the tokenizer has {words}; give the tokenizer that belongs to it"
            )
        longest = _longest(model)
        if longest is not None and self.max_length > longest:
            raise InputError(f"max_length (={self.max_length}) is more than the {longest} positions that the model knows")
        if getattr(model.config, "pad_token_id", None) is None:  # GPT-2 finds the end of a text by it
            model.config.pad_token_id = data.padding_of(data.tokenizer_of(self._tokenizer(schema)))
        columns = [] if schema.classes is not None or self.objective != "classification" else [schema[name] for name in schema.targets]
        model.config.target_unit = [[float(column.mean or 0.0), float(column.std or 1.0)] for column in columns] or None  # type: ignore[arg-type]
        _freeze(model, self.freeze)
        built: nn.Module = self._adapted(model) if self.lora else model
        if self.objective == "masked-lm":
            built.words = self._words(schema)  # type: ignore[assignment]
        return built

    def _words(self, schema: Schema) -> _Words:
        tokenizer = data.tokenizer_of(self._tokenizer(schema))
        mask = _first(tokenizer, SPECIAL["mask"])
        if mask is None:
            raise TaskError("the tokenizer has no word for a mask ([MASK] or <mask>), so nothing can be masked; give another")
        special = tuple(sorted(index for index, word in tokenizer.get_added_tokens_decoder().items() if word.special))
        return _Words(self.num_words(schema), mask, special)

    def _adapted(self, model: nn.Module) -> nn.Module:
        try:
            import peft
        except ImportError as error:
            raise MissingExtra("peft", "hf") from error
        kinds = {"classification": "SEQ_CLS", "masked-lm": None, "causal-lm": "CAUSAL_LM"}
        config = peft.LoraConfig(task_type=kinds[self.objective], r=self.lora, lora_alpha=2 * self.lora, lora_dropout=0.05)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on what it mends itself, and on names within transformers
                return peft.get_peft_model(model, config)
        except ValueError as error:
            raise TaskError(f"lora (={self.lora}) cannot be added to this model: {error}") from error

    def augment(self, batch: Any, uniform: data.Uniform) -> Any:
        return {**batch, "chance": uniform(batch["input_ids"].shape[1], 3)} if self.objective == "masked-lm" else batch

    def step(self, model: nn.Module, batch: Any) -> Step:
        return super().step(model, self._labelled(model, batch))

    def _labelled(self, model: nn.Module, batch: Any) -> Any:
        """What is to be guessed: nothing for classification; the next words; or masked ones, of which BERT replaces 80 % by
        [MASK] and 10 % by another word (Devlin et al. 2019).
        """
        if self.objective == "classification":
            return batch
        ids_BT: Tensor = batch["input_ids"]
        real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < batch["lengths"][:, None]
        if self.objective == "causal-lm":
            return {**batch, "labels": ids_BT[:, 1:].masked_fill(~real_BT[:, 1:], IGNORED)}
        words: _Words = model.words  # type: ignore[assignment]
        chosen_BT, how_BT, other_BT = batch["chance"].unbind(2)
        chosen_BT = (chosen_BT < self.mask) & real_BT & ~torch.isin(ids_BT, torch.tensor(words.special, device=ids_BT.device))
        masked_BT = torch.where(how_BT < 0.8, words.mask, torch.where(how_BT < 0.9, (other_BT * words.size).long(), ids_BT))
        return {
            **batch,
            "input_ids": torch.where(chosen_BT, masked_BT, ids_BT),
            "labels": ids_BT.masked_fill(~chosen_BT, IGNORED),
        }

    def forward(self, model: nn.Module, batch: Any) -> Any:
        ids_BT = batch["input_ids"]
        real_BT = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < batch["lengths"][:, None]).long()
        logits: Tensor = model(input_ids=ids_BT, attention_mask=real_BT).logits
        if self.objective == "causal-lm":
            return logits[:, :-1]
        if (unit := getattr(model.config, "target_unit", None)) is not None:
            means_K, deviations_K = logits.new_tensor(unit).unbind(1)
            logits = logits * deviations_K + means_K
        return logits.squeeze(1) if logits.dim() == 2 and logits.shape[1] == 1 else logits

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        """A language model guesses the same words at each evaluation."""
        if self.objective == "masked-lm":
            positions = torch.arange(len(batch["lengths"]), device=batch["lengths"].device)
            batch = self.augment(batch, data.uniform(0, 0, positions))
        return self.step(model, batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        if self.objective != "classification":
            raise TaskError(f"objective (={self.objective!r}) learns language and predicts nothing of a text; save it and fine-tune it")
        return self.forward(model, batch)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW; biases and norms are not decayed, as BERT does."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not named:
            raise TaskError(f"freeze (={self.freeze!r}) leaves nothing to train; leave the last layer out of it")
        plain = [parameter for name, parameter in named if name.lower().endswith(UNDECAYED)]
        decayed = [parameter for name, parameter in named if not name.lower().endswith(UNDECAYED)]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr, fused=True)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.1)

    def save(self, model: nn.Module, schema: Schema, folder: str | Path) -> Path:
        """Model, config and tokenizer as `transformers` reads them (and `model=` of this task): all of it or nothing."""
        transformers = _library()
        place = Path(folder)
        if place.exists():
            raise InputError(f"folder (={str(folder)!r}) exists; choose another name")
        # merging takes the adapters out of the model that it is given
        merged = copy.deepcopy(model).merge_and_unload() if self.lora else model  # type: ignore[operator]
        tokenizer = data.tokenizer_of(self._tokenizer(schema))
        found = {name: next((w for w in words if tokenizer.token_to_id(w) is not None), None) for name, words in SPECIAL.items()}
        known = {f"{name}_token": word for name, word in found.items() if word is not None}
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        try:
            with _quiet():
                merged.save_pretrained(temporary)  # type: ignore[operator]
                transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(temporary)
            temporary.chmod(0o755)
            temporary.replace(place)
        except OSError as error:
            raise StorageError(f"cannot write {place}: {error.strerror or error}; free some space or choose another folder") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return place


def _is_path(name: str) -> bool:
    """A folder is spelt with a place before it; anything else is a hub id."""
    return Path(name).is_absolute() or name.startswith(("./", "../", "~"))


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    return transformers


def _first(tokenizer: Any, words: Iterable[str]) -> int | None:
    """The id of the first of these words that a tokenizer has."""
    return next((found for word in words if (found := tokenizer.token_to_id(word)) is not None), None)


def _longest(model: nn.Module) -> int | None:
    """Positions that a model knows; RoBERTa and its kin number them from padding + 1 on."""
    longest = getattr(model.config, "max_position_embeddings", None)
    table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
    before = getattr(table, "padding_idx", None)
    return longest if longest is None or before is None else longest - before - 1


def _short(error: Exception) -> str:
    """The beginning of an error, which may list every model there is."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's word on new heads and its bars; those of a download stay."""
    logger, own = logging.getLogger("transformers"), _library().utils.logging
    level, hook = logger.level, None
    logger.setLevel(logging.ERROR)
    if hasattr(own, "set_tqdm_hook"):  # what switches bars off would switch those of downloads off too, and for good
        hook = own.set_tqdm_hook(lambda make, arguments, options: make(*arguments, **{**options, "disable": True}))
    try:
        yield
    finally:
        logger.setLevel(level)
        if hasattr(own, "set_tqdm_hook"):
            own.set_tqdm_hook(hook)


def _freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = set(fnmatch.filter(names, pattern))
        if not found:
            raise InputError(f"freeze (={pattern!r}) matches no parameter; they are named like {', '.join(names[:3])}")
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.requires_grad_(False)
