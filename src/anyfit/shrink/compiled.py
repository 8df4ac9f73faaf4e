"""A C export as it is on the machine: compiled, its bytes read from the object file, and run over many rows."""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyfit.errors import InputError, RunError

__all__ = ["STRICT", "Measured", "Ran", "absence", "build", "compiler", "measure", "run"]

STRICT = (
    *(
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-Wconversion",
        "-Wsign-conversion",
        "-Wshadow",
        "-Wcast-qual",
        "-Wcast-align",
    ),
    *("-Wstrict-prototypes", "-Wmissing-prototypes", "-Wundef", "-Wvla", "-Wdouble-promotion"),
)
_SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
_LINES = 30  # of what a compiler says, in an error

# Rows from standard input; for each the answer (int32) and the logits to standard output; at the end seconds of all predictions (double).
_HARNESS = """
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "{name}.h"

int main(void)
{{
    static unsigned char row[{upper}_INPUT_SIZE * sizeof(*{name}_input())];
    clock_t spent = 0;
    while (fread(row, sizeof(row), 1, stdin) == 1) {{
        int8_t logits[{upper}_OUTPUTS];
        const clock_t start = clock();
        memcpy({name}_input(), row, sizeof(row));
        const int32_t answer = (int32_t){name}_predict(logits);
        spent += clock() - start;
        fwrite(&answer, sizeof(answer), 1, stdout);
        fwrite(logits, sizeof(logits), 1, stdout);
    }}
    const double seconds = (double)spent / CLOCKS_PER_SEC;
    fwrite(&seconds, sizeof(seconds), 1, stdout);
    return 0;
}}
"""


@dataclass(frozen=True)
class Measured:
    """Bytes of a compiled network: constants, memory, code, and stack where the compiler tells of it."""

    flash: int  # .rodata and .data of the object
    ram: int  # .bss: the arena
    text: int
    stack: int | None
    compiler: str  # its command
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Ran:
    """What a compiled network gave for B rows."""

    answers: NDArray[np.int32]  # (B,) what predict returned
    logits: NDArray[np.int8]  # (B, N)
    microseconds: float  # of processor time a row


def compiler() -> str | None:
    """The command of a C compiler: what CC says, else cc, gcc or clang; None where there is none."""
    given = os.environ.get("CC", "").strip()
    for command in [given] if given else ["cc", "gcc", "clang"]:
        if shutil.which(_words(command)[0]):
            return command
    return None


def absence() -> str:
    """Why there is no compiler, in a few words."""
    given = os.environ.get("CC", "").strip()
    return f"no cc ({given!r}, which CC names)" if given else "no cc"


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"CC (={command!r}) cannot be read as a command: {error}") from error
    return words or [""]


def build(
    folder: Path, name: str, into: Path, *, sanitize: bool = False, flags: Sequence[str] = ("-O2",), command: str | None = None
) -> Path:
    """Compile NAME.c of `folder` with a program that runs it over rows; gives its path, in the folder `into`."""
    harness = into / f"{name}_rows.c"
    harness.write_text(_HARNESS.format(name=name, upper=name.upper()), encoding="utf-8")
    binary = into / f"{name}_rows"
    base = (*_command(command), *(_SANITIZED if sanitize else ()), *flags, "-iquote", str(folder))
    source = folder / f"{name}.c"
    _compile((*base, *STRICT, "-c", str(source), "-o", str(into / f"{name}.o")), source)
    _compile((*base, str(into / f"{name}.o"), str(harness), "-o", str(binary)), source)
    return binary


def run(binary: Path, rows: NDArray[np.generic], outputs: int) -> Ran:
    """Predict raw `rows` (B, ...): all inputs of a row, one after the other, in the type that NAME_input() has."""
    try:
        done = subprocess.run([str(binary.resolve())], input=np.ascontiguousarray(rows).tobytes(), capture_output=True, check=False)
    except OSError as error:
        raise RunError(
            f"{binary} cannot be run here ({error.strerror or error}); give a compiler for this machine (CC), and a TMPDIR where programs may run"
        ) from error
    size = 4 + outputs
    if done.returncode or len(done.stdout) != len(rows) * size + 8:
        raise RunError(
            f"{binary.name} failed (exit code {done.returncode}) after {len(done.stdout)} bytes of answers:\n{_tail(done.stderr)}"
        )
    body = np.frombuffer(done.stdout[:-8], dtype=np.uint8).reshape(len(rows), size)
    seconds = struct.unpack("d", done.stdout[-8:])[0]
    return Ran(
        answers=np.ascontiguousarray(body[:, :4]).view(np.int32)[:, 0],
        logits=np.ascontiguousarray(body[:, 4:]).view(np.int8),
        microseconds=seconds / max(len(rows), 1) * 1e6,
    )


def measure(folder: Path, name: str, *, flags: Sequence[str] = ("-Os",), command: str | None = None) -> Measured | None:
    """Compile NAME.c of `folder` and read the bytes of its object file; None where that is no ELF object. Another `command` measures for
    another processor.
    """
    words = _command(command)
    source = folder / f"{name}.c"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / f"{name}.o"
        line = (*words, *STRICT, *flags, "-iquote", str(folder), "-c", str(source), "-o", str(target))
        try:
            _compile((*line, "-fstack-usage"), source)
        except RunError:  # a compiler without that option; what is wrong with the source is wrong without it too
            _compile(line, source)
        usage = target.with_suffix(".su")
        stack = _stack(usage.read_text(encoding="utf-8"), name) if usage.is_file() else None
        sizes = dict.fromkeys((".rodata", ".data", ".bss", ".text"), 0)
        data = target.read_bytes()
        if data[:4] != b"\x7fELF":
            return None
        for section, size in _sections(data):
            for kind in sizes:
                if section == kind or section.startswith(f"{kind}."):
                    sizes[kind] += size
    return Measured(sizes[".rodata"] + sizes[".data"], sizes[".bss"], sizes[".text"], stack, shlex.join(words), tuple(flags))


def _command(given: str | None) -> list[str]:
    command = given or compiler()
    words = _words(command or "")
    if not shutil.which(words[0]):
        named = command or os.environ.get("CC", "")
        what = f"the C compiler (={named!r}) is not there" if named else "there is no C compiler"
        raise InputError(f"{what}; install a C compiler (cc, gcc or clang), or set CC")
    return words


def _compile(line: Sequence[str], source: Path) -> None:
    if not source.is_file():
        raise InputError(f"{source} is not there; export a network to C first")
    done = subprocess.run(list(line), capture_output=True, check=False)
    made = Path(line[line.index("-o") + 1])
    if done.returncode or not made.is_file():
        raise RunError(f"{line[0]} cannot compile {source.name} (exit code {done.returncode}):\n{_tail(done.stderr)}")


def _tail(words: bytes) -> str:
    lines = words.decode("utf-8", "replace").strip().splitlines()
    return "\n".join(lines[:_LINES])


def _stack(usage: str, name: str) -> int:
    """Bytes of the deepest path: a prediction calls a kernel, which may call one more."""
    sizes: dict[str, int] = {}
    for line in usage.splitlines():
        place, size, _ = line.split("\t")
        sizes[place.split(":")[-1].split(".")[0]] = int(size)  # copies of a function have a suffix
    own = sizes.pop(f"{name}_predict")
    return own + sum(sorted(sizes.values())[-2:])


def _sections(data: bytes) -> Iterator[tuple[str, int]]:
    """Names and sizes of the sections of an ELF object that take memory when it runs."""
    order = "<" if data[5] == 1 else ">"
    wide = data[4] == 2
    (table,) = struct.unpack_from(order + "Q" * wide + "I" * (not wide), data, 0x28 if wide else 0x20)
    entry, count, names = struct.unpack_from(order + "HHH", data, 0x3A if wide else 0x2E)
    form = order + ("IIQQQQ" if wide else "IIIIII")  # name, type, flags, address, offset, size
    sections = [struct.unpack_from(form, data, table + index * entry) for index in range(count)]
    start = sections[names][4]
    for name, _, flags, _, _, size in sections:
        if flags & 2:  # it is loaded
            first = start + name
            yield data[first : data.index(b"\0", first)].decode("ascii"), size
