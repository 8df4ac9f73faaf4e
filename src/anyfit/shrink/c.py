"""A program as one pair of C99 files: integer kernels, constants in one struct, one static arena, no malloc and no libm.

What decides how many bytes it takes: all constants stand in `model`, 4-byte ones first, so nothing is padded; sizes, strides and single
multipliers are arguments in the code; kernels are copied from kernels.c where they are used. A right shift of a negative number, which C99
leaves to the compiler, is checked when it is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from anyfit.errors import InputError
from anyfit.program.operations import Program
from anyfit.shrink.arena import Arena
from anyfit.shrink.calls import BYTES, Code, Field, float_literal, plus, whole_literal, words
from anyfit.shrink.places import RAW, plan, steps_of

__all__ = ["RAW", "check_name", "emit", "flash_bytes", "plan", "steps_of"]

_LABEL = 1000  # bytes of a label: a C99 compiler need not take strings of more than 4,095
_SIGN = "/* Kernels round by shifting negative numbers to the right, which must keep the sign: checked here. */\n"
_ARENA = "/* All values while a prediction runs; the raw input is one of them. */\n"
# keywords of C up to C23, headers that a file of this name would hide, and main.c
_TAKEN = """
auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return short signed
sizeof static struct switch typedef union unsigned void volatile while alignas alignof asm bool constexpr false nullptr static_assert
thread_local true typeof typeof_unqual
assert complex ctype errno fenv inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic stdbit stdbool stdckdint stddef
stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype main
"""


# Kernels


@cache
def _library() -> dict[str, tuple[tuple[str, ...], str]]:
    """The kernels of kernels.c by name, in their order: those that each needs, and its text."""
    text = Path(__file__).with_name("kernels.c").read_text(encoding="utf-8")
    parts = re.split(r"^/\* kernel (\w+)(?:: ([\w ]+))? \*/\n", text, flags=re.MULTILINE)[1:]
    return {name: (tuple((needs or "").split()), body.strip("\n")) for name, needs, body in zip(*[iter(parts)] * 3, strict=True)}


def _kernel(name: str) -> tuple[tuple[str, ...], str]:
    """A kernel, or the form of it that computes in 32 bits: what it needs, and its text."""
    library = _library()
    if name in library:
        return library[name]
    wide = name.removesuffix("_32")
    needs, text = library[wide]
    text = re.sub(r"const int32_t \*multiplier,\s+", "", text)  # an array of multipliers holds only ones
    text = re.sub(r"\(int64_t\)(\w+) \* multiplier\[\w+\]", r"\1", text)
    text = text.replace("int64_t", "int32_t").replace("requantized(", "requantized_32(")
    if wide != "requantized":
        text = text.replace(f" {wide}(", f" {name}(", 1)
    return tuple("requantized_32" if other == "requantized" else other for other in needs), text


def _used_kernels(names: Iterable[str]) -> list[str]:
    """The texts of kernels and of those that they need, in the order of the library."""
    texts: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in texts:
            needs, texts[name] = _kernel(name)
            waiting += needs
    order = list(_library())
    return [texts[name] for name in sorted(texts, key=lambda name: (order.index(name.removesuffix("_32")), name))]


# Files


def flash_bytes(program: Program) -> int:
    """Bytes of the constants as the C file stores them; single multipliers stand in the code."""
    fields = Code(program, plan(program)).fields
    size = sum(field.bytes for field in fields)
    return _up(size, max((BYTES[field.type] for field in fields), default=1))


def emit(program: Program, name: str, arena: Arena) -> dict[str, str]:
    """The files of a program: NAME.c, NAME.h and main.c by file name. `arena` is what `plan` gives."""
    check_name(name)
    code = Code(program, arena)
    return {f"{name}.c": _source(code, name), f"{name}.h": _header(code, name), "main.c": _main(code, name)}


def check_name(name: str) -> None:
    """Refuse what functions and files of C cannot be called."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", name, flags=re.ASCII):
        raise InputError(
            f"name (={name!r}) must be a C identifier: a letter, then letters, digits and _, at most 63; give one like 'model'"
        )
    if name in _TAKEN.split():
        raise InputError(f"name (={name!r}) is a word of C, a header of its library or main; give another, like '{name}_model'")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _arena_bytes(code: Code) -> int:
    return _up(max(code.arena.bytes, 1), code.raw_bytes)


def _source(code: Code, name: str) -> str:
    texts = _used_kernels(code.kernels)
    used = "\n".join(texts)
    parts = [
        f"/* {name}.c: a network in integers. Written by anyfit; see {name}.h. */",
        f'#include "{name}.h"',
        f"{_SIGN}typedef char {name}_shift_keeps_sign[(-1 >> 1) == -1 ? 1 : -1];",
    ]
    if re.search(r"\bfloat\b", used):
        parts.append('#ifdef __FAST_MATH__\n#error "missing values are not numbers, which -ffast-math rules out"\n#endif')
    types = {"raw_value": code.raw_type, "wide_value": "float" if code.raw_type == "float" else "int32_t"}
    types["column_index"] = "int16_t" if code.wide_column else "int8_t"
    if typedefs := [f"typedef {type_} {alias};" for alias, type_ in types.items() if re.search(rf"\b{alias}\b", used)]:
        parts.append("\n".join(typedefs))
    if code.fields:
        parts.append(_struct(code.fields))
    size = _arena_bytes(code)
    parts += [
        f"{_ARENA}static union {{\n    int8_t bytes[{size}];\n    {code.raw_type} raw[{size // code.raw_bytes}];\n}} arena;",
        *texts,
        f"{code.raw_type} *{name}_input(void)\n{{\n    return {plus('arena.raw', min(code.starts.values()))};\n}}",
        "\n".join([f"int {name}_predict(int8_t *logits)", "{", *code.calls, f"    return {code.answer};", "}"]),
    ]
    return "\n\n".join(parts) + "\n"


def _struct(fields: Sequence[Field]) -> str:
    fields = sorted(fields, key=lambda field: -BYTES[field.type])  # stable: wide ones first, so nothing is padded
    lines = ["static const struct {"]
    lines += [f"    {field.type} {field.name}[{field.values.size}];" for field in fields]
    lines.append("} model = {")
    for field in fields:
        items = [float_literal(value) if field.type == "float" else whole_literal(value) for value in field.values]
        rows = [items[start : start + 20] for start in range(0, len(items), 20)]
        lines += [f"    {{ /* {field.name} */", *(f"        {', '.join(row)}," for row in rows), "    },"]
    return "\n".join([*lines, "};"])


def _quoted(text: str) -> str:
    """A C string that gives exactly these UTF-8 bytes, whatever they are: no escape runs on, no trigraph begins."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > _LABEL:
        data = text.encode("utf-8", "surrogatepass")[:_LABEL].decode("utf-8", "ignore").encode() + "…".encode()
    plain = [chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in data]
    return '"' + "".join(plain) + '"'


def _header(code: Code, name: str) -> str:
    program, upper = code.program, name.upper()
    last = program.operations[-1]
    count = sum(given.bytes for given in program.inputs) // code.raw_bytes
    inputs = ", then ".join(f"{words(given.name)} {' x '.join(map(str, given.shape))}" for given in program.inputs)
    answer = {
        "classes": "the class: the first of the largest logits" + (", before they were rounded to 8 bits" if program.accumulates else ""),
        "binary": "1 or 0: whether the only logit, before it was rounded to 8 bits, is positive",
        "numbers": f"the number, to be multiplied by {upper}_RESULT_SCALE" if last.bytes == 1 else "0; the numbers are the logits",
    }[program.task]
    lines = [
        f"/* {name}.h: a network in integers. Written by anyfit.",
        "",
        f"   Write {upper}_INPUT_SIZE raw values to {name}_input(), then call {name}_predict().",
        f"   Inputs: {inputs}; several dimensions with the last one running fastest, values as the data has them.",
        *(f"   {words(line)}" for line in program.about),
        "*/",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {upper}_INPUT_SIZE {count}",
        f"#define {upper}_OUTPUTS {last.bytes}",
        f"#define {upper}_ARENA_BYTES {_arena_bytes(code)}",
        f"#define {upper}_LOGIT_SCALE {float(program.scales[program.result])!r} /* a logit times this is a real number */",
        f"#define {upper}_RESULT_SCALE {float(program.result_scale)!r} /* likewise for what is decided by */",
    ]
    if program.labels is not None:
        lines.append(f"#define {upper}_LABEL_COUNT {len(program.labels)}")
        lines.append(f"#define {upper}_LABELS \\\n    {{ \\")
        lines += [f"        {_quoted(label)}, \\" for label in program.labels]
        lines.append("    }")
    lines += [
        "",
        "/* Where the raw values go. They are overwritten by each prediction. */",
        f"{code.raw_type} *{name}_input(void);",
        "",
        f"/* Writes {upper}_OUTPUTS logits. Gives {answer}. */",
        f"int {name}_predict(int8_t *logits);",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        f"#endif /* {upper}_H */",
    ]
    return "\n".join(lines) + "\n"


def _main(code: Code, name: str) -> str:
    program, upper = code.program, name.upper()
    if program.task == "numbers":
        tell = f'printf("%g", answer * {upper}_RESULT_SCALE);' if program.operations[-1].bytes == 1 else ""
    elif program.labels is None:
        tell = 'printf("%d", answer);'
    else:
        tell = f'printf("%s", answer >= 0 && answer < {upper}_LABEL_COUNT ? labels[answer] : "?");'
    labels = f"static const char *const labels[] = {upper}_LABELS;\n\n" if program.labels is not None and program.task != "numbers" else ""
    unused = "" if tell else "        (void)answer;\n"
    tell = f"        {tell}\n" if tell else ""
    return f"""/* Written by anyfit. An example: reads rows of {upper}_INPUT_SIZE values ({code.raw_type}) from the standard input, and prints a line for each.

   cc -std=c99 -O2 {name}.c main.c -o {name} && ./{name} < rows.bin */
#include <stdio.h>

#include "{name}.h"

{labels}int main(void)
{{
    int8_t logits[{upper}_OUTPUTS];
    size_t got;
    while ((got = fread({name}_input(), sizeof({code.raw_type}), {upper}_INPUT_SIZE, stdin)) == {upper}_INPUT_SIZE) {{
        const int answer = {name}_predict(logits);
{tell}{unused}        for (int i = 0; i < {upper}_OUTPUTS; i++) {{
            printf(" %g", logits[i] * {upper}_LOGIT_SCALE);
        }}
        printf("\\n");
    }}
    if (got != 0) {{
        fprintf(stderr, "the last row has %lu values, not %d\\n", (unsigned long)got, {upper}_INPUT_SIZE);
        return 1;
    }}
    return 0;
}}
"""
