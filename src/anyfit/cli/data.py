"""anyfit data: what a source holds, and how two sources or schemas differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anyfit.cli.options import DataPath, Ignore, Json, SourceFields, Target, Types, print_result, source_of
from anyfit.cli.progress import print_table
from anyfit.errors import DataError, InputError

__all__ = ["app"]

app = typer.Typer(
    name="data", help="What a source holds, and how two differ.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


@app.command()
def describe(
    data: DataPath,
    target: Target = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    published: Annotated[bool, typer.Option("--published", help="Only what may be told of it to others.")] = False,
    minimum: Annotated[int, typer.Option("--minimum", help="With --published: rows that must stand behind what is told.")] = 10,
    allow: Annotated[list[str] | None, typer.Option("--allow", help="With --published: a column to tell whole. Can be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the schema to a JSON file.")] = None,
    json: Json = False,
) -> None:
    """Columns, their semantic types, and what stands in them (nothing leaves this machine)."""
    from anyfit.data import Blocks, in_tables, tables
    from anyfit.prepare import infer
    from anyfit.schema import published as told
    from anyfit.values import write_json

    given = source_of(data, target, ignore=ignore, types=type, fields=source)
    read = given.read()
    rows = read["train"]
    first = next(in_tables(rows.head() if isinstance(rows, Blocks) else rows), None)
    if first is None:
        raise DataError(f"data (={data!r}) has no columns to describe; give a table")
    schema = infer(given, rows)
    about = tables.describe(first, schema)
    if out is not None:
        write_json(out, schema.to_json())
    if published:
        about = told(about, minimum, allow or ())
    result = {
        **({} if published else {"data": given.name}),
        "rows": {split: getattr(part, "num_rows", None) for split, part in read.items()},
        **({"described_rows": first.num_rows} if isinstance(rows, Blocks) else {}),
        "schema": schema.hash(),
        "target": schema.target,
        "columns": about,
    }

    def show() -> None:
        counts = ", ".join(f"{split} {count}" for split, count in result["rows"].items())
        typer.echo(f"{given.name}: {counts} rows, {len(schema.columns)} columns, schema {schema.hash()[:12]}")
        print_table(["column", "type", "missing", "what stands there"], [_line(column, schema.targets) for column in about])

    print_result(result, json, show)


def _line(column: dict[str, Any], targets: tuple[str, ...]) -> list[Any]:
    name = f"{column['name']} (target)" if column["name"] in targets else column["name"]
    return [name, column["type"], column.get("missing", ""), _words(column)]


def _words(column: dict[str, Any]) -> str:
    """A few words on one column."""
    if "range" in column:
        return f"about {_short(column['range'][0])} to {_short(column['range'][1])}"
    if column.get("lowest"):
        ends = f"{_short(column['lowest'][0])} to {_short(column['highest'][0])}"
        return f"{ends}, mean {_short(column['mean'])}, deviation {_short(column['std'])}" if "mean" in column else ends
    if "counts" in column:
        parts = [f"{word} {count}" for word, count in list(column["counts"].items())[:6]]
        more = len(column["counts"]) - len(parts)
        return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
    if "categories" in column:
        more = len(column["categories"]) - 8
        return ", ".join(column["categories"][:8]) + (f", {more} more" if more > 0 else "") + (" and others" if column["others"] else "")
    if "shape" in column:
        return " x ".join(map(str, column["shape"]))
    if "mean_characters" in column:
        return (
            f"{column['distinct']} distinct, {_short(column['mean_characters'])} characters on average, {column['most_characters']} at most"
        )
    return f"{column['distinct']} distinct" if "distinct" in column else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A schema (JSON) or a source.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    target: Target = None,
    ignore: Ignore = None,
    type: Types = None,
    source: SourceFields = None,
    json: Json = False,
) -> None:
    """Whether two schemas agree; exit code 1 and the differences where they do not. Of sources, names and types are compared; of runs and
    saved schemas, what was fitted too.
    """
    from anyfit.prepare import infer
    from anyfit.schema import Schema
    from anyfit.values import parse

    def schema_of(place: str) -> Schema:
        if place.endswith(".json"):
            try:
                value = parse(Path(place).read_bytes(), place)
                return Schema.from_json(value.get("schema", value))  # a run's record holds one
            except OSError as error:
                raise InputError(f"schema (={place!r}) cannot be read: {error.strerror or error}") from error
        given = source_of(place, target, ignore=ignore, types=type, fields=source)
        return infer(given, given.read()["train"])

    one, other = schema_of(first), schema_of(second)
    differences = one.differences(other)
    result = {"equal": not differences, "differences": differences, "schemas": [one.hash(), other.hash()]}
    print_result(result, json, lambda: typer.echo("\n".join(differences) or "equal"))
    if differences:
        raise typer.Exit(1)
