"""Plain values: strict JSON with one spelling, hashes, typed fields, files, and the Plan of a fit.

What is hashed, signed or compared goes through `canonical`, so that equal values have equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self, Union

from anyfit.errors import InputError, StorageError

__all__ = [
    "File",
    "Plan",
    "atomic",
    "canonical",
    "coerce",
    "digest",
    "parse",
    "without_secrets",
    "write_atomic",
    "write_json",
]


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value (RFC 8785 in spirit): sorted keys, no spaces, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"value is not strict JSON: {error}") from error


def without_secrets(text: str) -> str:
    """Text in which URLs have neither passwords nor the values of their queries (signatures, tokens)."""
    masked = re.sub(r"(?<=://)([^:/@\s]*):\S*@", r"\1:***@", text)
    masked = re.sub(r"(https?://)[^/@\s:]+@", r"\1***@", masked)  # a token in place of a name
    return re.sub(r"(://\S*?\?)(\S+)", lambda found: found[1] + re.sub(r"=[^&#\s]*", "=***", found[2]), masked)


def parse(data: bytes | str, what: str = "JSON") -> Any:
    """Read strict JSON: no NaN, no duplicate keys. `what` names the origin in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(text)

    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not strict JSON: {error}") from error


def digest(value: Any) -> str:
    """SHA-256 of the canonical spelling, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over it."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes 0600; a run folder is for anyone whom the umask lets read
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder. What was there before is untouched."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, fill: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a whole file or nothing: a temporary file, fsync, one rename."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        if isinstance(fill, bytes):
            file.write(fill)
        else:
            fill(file)


def write_json(path: Path, value: Any) -> None:
    """Write readable strict JSON atomically."""
    canonical(value)
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True, slots=True)
class File:
    """A file that belongs to a task's values: known by its content, shipped where the task travels."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """Hash the file at `path`."""
        try:
            with Path(path).open("rb") as file:
                return cls(str(path), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"file (={str(path)!r}) cannot be read: {error.strerror or error}") from error

    def read(self) -> bytes:
        """The content; refused where it is not what was hashed."""
        data = Path(self.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise InputError(f"file (={self.path!r}) has changed since its hash was taken; make the value anew with File.of(path)")
        return data


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Check one field's `value` against its annotation; a string from a command line becomes what the annotation says."""
    found, result = _fit(value, hint)
    if not found:
        raise InputError(f"{name} (={value!r}) must be {_spell(hint)}")
    return result


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fit(value, arguments[0])
    if hint is Any or hint is dataclasses.MISSING:
        return True, value
    if hint is None or hint is type(None):
        return value in (None, "none", "null"), None
    if origin is Literal:
        named = {str(choice): choice for choice in arguments}
        if any(type(choice) is type(value) and choice == value for choice in arguments):
            return True, value
        return isinstance(value, str) and value in named, named.get(value) if isinstance(value, str) else None
    if origin in (Union, types.UnionType):
        for option in sorted(arguments, key=lambda option: option is str):  # str last: it takes any text
            found, result = _fit(value, option)
            if found:
                return True, result
        return False, None
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return (True, words[value.lower()]) if isinstance(value, str) and value.lower() in words else (isinstance(value, bool), value)
    if hint in (int, float):
        return _number(value, hint)
    if hint is str:
        return isinstance(value, str), value
    if hint is File:
        if isinstance(value, dict) and set(value) == {"path", "sha256"}:
            return True, File(**value)
        return isinstance(value, File | str | Path), File.of(value) if isinstance(value, str | Path) else value
    if origin in (tuple, list) or hint in (tuple, list):
        return _sequence(value, origin or hint, arguments)
    if origin is dict or hint is dict:
        if isinstance(value, str):
            value = parse(value, "a dict given as text")
        if not isinstance(value, Mapping):
            return False, None
        fitted = {key: _fit(item, arguments[1] if arguments else Any) for key, item in value.items()}
        return all(found for found, _ in fitted.values()), {key: item for key, (_, item) in fitted.items()}
    return (isinstance(value, hint), value) if isinstance(hint, type) else (True, value)


def _number(value: Any, hint: type[int] | type[float]) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, None
    try:
        number = hint(value) if isinstance(value, str) else value
    except ValueError:
        return False, None
    if hint is int:
        return isinstance(number, int), number
    try:
        return isinstance(number, int | float) and math.isfinite(number), float(number) if isinstance(number, int | float) else None
    except OverflowError:
        return False, None


def _sequence(value: Any, kind: type, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = [part for part in value.split(",") if part]
        value = parsed if isinstance(parsed, list) else [parsed]
    if not isinstance(value, list | tuple):
        return False, None
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:  # tuple[int, str]: one annotation for each
        if len(arguments) != len(value):
            return False, None
        hints = list(arguments)
    else:
        hints = [arguments[0] if arguments else Any] * len(value)
    parts = [_fit(part, hint) for part, hint in zip(value, hints, strict=True)]
    return all(found for found, _ in parts), kind(part for _, part in parts)


def _spell(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "none"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", File: "a path to a file"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


@functools.cache
def _plan_hints() -> dict[str, Any]:
    return typing.get_type_hints(Plan)  # two milliseconds, and a simulation makes a plan for each site


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how to train. A task gives defaults, the caller overrides; both are recorded.

    batch_size None means the whole data set; evaluate_every counts steps (None: each epoch); patience counts evaluations;
    used_rows trains only the word vectors that training texts hold, where that is the same mathematics; max_tokens is the most that
    rows x longest of a batch may be (batch_size then is the most rows); exact_dropout draws the masks of a sample from its place in the
    epoch, so that they do not depend on how a step is cut.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = 64
    max_tokens: int | None = None
    accumulate: int = 1
    evaluate_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    best: bool = False
    clip: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    channels_last: bool = False
    device: str = "auto"
    seed: int = 0
    bucket: bool = False
    drop_last: bool = False
    used_rows: bool = True
    exact_dropout: bool = False
    workers: int = 0
    log_every: int = 50
    checkpoint_every_s: float = 60.0

    def __post_init__(self) -> None:
        for name, hint in _plan_hints().items():
            object.__setattr__(self, name, coerce(name, getattr(self, name), hint))
        if self.epochs is not None and self.steps is not None:
            raise InputError(f"epochs (={self.epochs}) and steps (={self.steps}) exclude each other; give one")
        for name in ("epochs", "steps", "batch_size", "max_tokens", "accumulate", "evaluate_every", "patience", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} (={value}) must be at least 1")
        for name in ("min_delta", "seed", "workers", "checkpoint_every_s"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} (={getattr(self, name)}) must not be negative")
        if self.seed >= 2**64:
            raise InputError(f"seed (={self.seed}) must be below 2^64")
        if self.clip is not None and self.clip <= 0:
            raise InputError(f"clip (={self.clip}) must be above 0; clip=None switches it off")

    def updated(self, **overrides: Any) -> Plan:
        """The plan with some fields replaced; epochs and steps push each other out."""
        unknown = sorted(set(overrides) - set(self.__dataclass_fields__))
        if unknown:
            known = ", ".join(self.__dataclass_fields__)
            raise InputError(f"{', '.join(unknown)} is no field of the plan; it has: {known}")
        if overrides.get("epochs") is not None:
            overrides.setdefault("steps", None)
        if overrides.get("steps") is not None:
            overrides.setdefault("epochs", None)
        return dataclasses.replace(self, **overrides)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return dataclasses.asdict(self)

    @property
    def keeps_best(self) -> bool:
        """Whether a best checkpoint is kept: asked for, or implied by early stopping."""
        return self.best or self.patience is not None
