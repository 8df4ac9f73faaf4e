"""The page of a run, part by part."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyfit.report.markup import Html, hide, markup, plain, spell, table, tag
from anyfit.report.plots import MANY_COLUMNS, MANY_PANELS, MANY_SITES, Picture
from anyfit.report.records import Records, mapping, mappings, number, scalars, whole
from anyfit.report.shrunk import sections

__all__ = ["build"]

_HEADLINES = ("accuracy", "rmse", "auroc", "f1")  # the first that a split has is its large figure
_MANY_ROWS, _LONG = 100, 25  # rows of a table at most; more than can be looked over, so folded up


def _figure(picture: Picture, alt: str, caption: str) -> Html:
    """A picture that follows the reader's light or dark; paper is light."""
    both = (("light", picture.light), ("dark", picture.dark))
    sources = {mode: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for mode, svg in both}
    parts = [tag("img", src=source, alt=alt, class_=mode) for mode, source in sources.items()]
    parts += [tag("figcaption", caption)] if caption else []
    return tag("figure", *parts, style=f"width: {1024 * picture.width:.0f}px")


def _section(title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children)


def build(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """The page's parts from top to bottom."""
    yield _head(records)
    yield from sections(records) if records.kind == "shrink" else _curves(records, pictures)
    yield from _class_section(records, pictures)
    yield from _comparison_section(records, pictures)
    yield from _site_section(records, pictures)
    yield from _privacy_section(records, pictures)
    yield from _rank_section(records, pictures)
    yield _configuration(records)
    yield _data_section(records)
    yield _environment(records)
    yield _repeat(records)
    yield tag("footer", f"anyfit {records.record.get('anyfit', '')} · written from the records in {records.run.resolve().name}/")


def _head(records: Records) -> Html:
    words = {"finished": "finished", "patience": "finished early", "signal": "stopped by a signal"}
    state = words.get(records.stopped or "", records.stopped or "finished") if records.result else "unfinished"
    pill = tag("span", state, class_="pill" if state.startswith("finished") else "pill warn")
    doing = f"federated over {len(mapping(records.record.get('sites'))):,} sites" if records.kind == "federate" else records.kind
    line = tag("p", f"{records.run.resolve().name} · {doing}", class_="muted")
    tiles = [_tile(records, split, figures) for split, figures in _told(records).items()]
    facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in _facts(records)]
    return tag(
        "header",
        tag("div", tag("h1", records.task), pill, class_="title"),
        line,
        *_notices(records),
        *([tag("div", *tiles, class_="tiles")] if tiles else []),
        tag("dl", *facts, class_="facts"),
    )


def _told(records: Records) -> dict[str, dict[str, float | None]]:
    """The figures by split; splits that have a loss only where no split has more."""
    found = {split: scalars(figures) for split, figures in records.splits.items()}
    return {split: figures for split, figures in found.items() if set(figures) - {"loss"}} or {s: f for s, f in found.items() if f}


def _tile(records: Records, split: str, figures: Mapping[str, float | None]) -> Html:
    """One split: its headline metric large, the others small."""
    headline = next(iter([name for name in _HEADLINES if name in figures] or [name for name in figures if name != "loss"] or figures))
    data = mapping(mapping(records.record.get("data")).get(split))
    rows = whole(records.splits[split].get("rows")) or whole(data.get("rows"))
    heading = tag("h2", split, *([tag("span", f"{rows:,} rows")] if rows else []))
    others = [tag("div", tag("dt", name), tag("dd", value)) for name, value in figures.items() if name != headline]
    large = [tag("p", figures[headline], class_="big"), tag("p", headline, class_="muted")]
    return tag("div", heading, *large, tag("dl", *others), class_="tile")


def _facts(records: Records) -> Iterator[tuple[str, str]]:
    """Size, length and cost of the run, as far as they are known."""
    for name, count in records.length.items():
        if count:
            yield name, spell(count)
    for split, figures in records.splits.items():
        if split not in _told(records) and "loss" in figures:
            yield f"{split} loss", spell(number(figures["loss"]))
    best = number(records.best.get(records.clock))
    if best is not None:
        yield f"best {records.clock}", f"{best:,.0f} (loss {spell(number(records.best.get('loss')))})"
    parameters, trainable = (whole(records.record.get(name)) for name in ("parameters", "trainable"))
    if parameters is not None:
        yield "parameters", spell(parameters) + (f" ({trainable:,} train)" if trainable not in (None, parameters) else "")
    seconds = number(records.result.get("seconds"))
    if seconds is not None:
        yield "time", _duration(seconds)
    if records.samples_per_s:
        yield "median speed", f"{records.samples_per_s:,.0f} samples/s"
    counts = [int(count) for _, count in records.ranks.counts]
    if counts:
        last, least, most = counts[-1], min(counts), max(counts)
        yield "ranks", f"{last:,}" if least == most else f"{last:,} ({least:,} to {most:,})"
    if any(records.moved.values()):
        yield "moved", f"{_size(records.moved['bytes_up'])} up, {_size(records.moved['bytes_down'])} down"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _notices(records: Records) -> Iterator[Html]:
    """What a reader must know before they believe the figures."""
    if not records.result:
        where = f"its records end at {records.clock} {records.reached:,}" if records.reached else "no step is recorded yet"
        text = f"This run is unfinished: {where}" + (", and the figures are those of the last evaluation." if records.latest else ".")
        command = _resume_command(records)
        more = [" To go on:", tag("code", command)] if command else []
        yield tag("div", text, *more, class_="notice")
    if records.not_finite is not None:
        where = f"{records.clock} {records.not_finite:,.0f}"
        yield tag("div", f"The loss was not finite at {where}; such points are not drawn.", class_="notice")
    if records.torn:
        lines = "One line" if records.torn == 1 else f"{records.torn:,} lines"
        yield tag("div", f"{lines} of metrics.jsonl could not be read (torn by a kill?) and left out.", class_="notice")


def _curves(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    if "loss" not in pictures and "metrics" not in pictures:
        yield _section("Curves", tag("p", "Nothing has been recorded yet.", class_="note"))
        return
    forks = " Dashed lines: resumed with changed settings." if mappings(records.record.get("forks")) else ""
    meaning = "rows of all sites in that round" if records.clock == "round" else "batches since the point before"
    parts = []
    if "loss" in pictures:
        caption = f"Each training point is the mean over the {meaning}." + forks
        parts.append(_figure(pictures["loss"], "Loss in training and evaluation", caption))
    if "metrics" in pictures:
        left_out = len({*records.evaluations, *records.training} - {"loss", "lr", "epsilon"}) - MANY_PANELS
        caption = f"{left_out} further metrics are in metrics.jsonl." if left_out > 0 else ""
        parts.append(_figure(pictures["metrics"], "Metrics", caption))
    yield _section("Curves", *parts)


def _class_section(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """Which classes are told apart: the confusion matrix, and precision, recall and F1 of each class."""
    found = records.classes
    if found is None:
        yield from _regression_section(records)
        return
    split, matrix = found
    names, total = records.class_names(len(matrix)), sum(map(sum, matrix))
    hits, support = sum(matrix[index][index] for index in range(len(matrix))), [sum(row) for row in matrix]
    low, high = _interval(hits, total)
    text = (
        f"{hits:,} of {total:,} rows right: accuracy {spell(hits / max(1, total))}, 95 % interval {spell(low)} to {spell(high)} (Wilson). "
        f"Always answering “{names[support.index(max(support))]}” would give {spell(max(support) / max(1, total))}."
    )
    parts: list[Html] = []
    if "confusion" in pictures:
        caption = "A row for each true class, a column for each predicted one; shade is the share of the row."
        parts.append(_figure(pictures["confusion"], f"Confusion matrix of the {split} split", caption))
    else:
        reason = f"With {len(matrix):,} classes a confusion matrix is too large to read; it is in result.json."
        parts.append(tag("p", reason, class_="note"))
    tables = tag("div", *_class_tables(matrix, names), class_="column")
    yield _section(f"Classes ({split})", tag("p", text, class_="note"), tag("div", *parts, tables, class_="pair"))


def _regression_section(records: Records) -> Iterator[Html]:
    """How far off a number is, against the plainest guess."""
    for split, figures in _told(records).items():
        if not {"rmse", "mae", "r2"} & set(figures):
            continue
        rmse, explained = figures.get("rmse"), figures.get("r2")
        text = "The target is a number, so there are no classes to confuse; rmse and mae are in its unit."
        if rmse is not None and explained is not None and explained < 1:
            guess = rmse / math.sqrt(1 - explained)  # r2 = 1 - rmse² / variance
            text += f" Always answering the mean of these rows would give an rmse of {spell(guess)}."
        yield _section(f"Regression ({split})", tag("p", text, class_="note"))
        return


def _class_tables(matrix: list[list[int]], names: Sequence[str]) -> Iterator[Html]:
    figures = [_scores(matrix, index) for index in range(len(matrix))]
    order = list(range(len(matrix)))
    if len(order) > _MANY_ROWS:
        order = sorted(order, key=lambda index: 2.0 if (score := figures[index][2]) is None else score)[:_MANY_ROWS]
        yield tag("p", f"The {_MANY_ROWS} of {len(matrix):,} classes with the lowest F1.", class_="note")
    support = [sum(row) for row in matrix]
    rows = [(names[index], *figures[index], support[index]) for index in order]
    ones = [1] * len(matrix)
    means = [
        (title, *(_mean([line[column] for line in figures], weights) for column in range(3)), sum(support))
        for title, weights in (("mean of classes", ones), ("weighted by support", support))
    ]
    yield table(("class", "precision", "recall", "F1", "support"), rows, means)
    pairs = [(matrix[a][b], a, b) for a in range(len(matrix)) for b in range(len(matrix)) if a != b and matrix[a][b]]
    worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:5]
    if worst and len(matrix) > 2:
        yield tag("h3", "Most frequent confusions")
        yield table(("true", "taken for", "rows", "share of class"), [(names[a], names[b], n, n / support[a]) for n, a, b in worst])


def _scores(matrix: list[list[int]], index: int) -> tuple[float | None, float | None, float | None]:
    """(precision, recall, F1) of a class; None where nothing was predicted or nothing is there."""
    hits, actual, predicted = matrix[index][index], sum(matrix[index]), sum(row[index] for row in matrix)

    def ratio(above: int, beneath: int) -> float | None:
        return above / beneath if beneath else None

    return ratio(hits, predicted), ratio(hits, actual), ratio(2 * hits, actual + predicted)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Weighted mean of what is defined."""
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right near 0 and 1 too, where the usual one leaves the range."""
    if not total:
        return 0.0, 1.0
    z, share = 1.959964, hits / total
    centre, scale = share + z * z / (2 * total), 1 + z * z / total
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - reach) / scale, (centre + reach) / scale


def _comparison_section(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """The same task by different means."""
    lines, names = [(str(line["what"]), scalars(line)) for line in records.comparison], records.compared
    if not names:
        return
    about, more = mapping(records.result.get("compared")), len(names) - MANY_COLUMNS
    caption = f"{about['figure']} on {about['split']} rows. " if {"figure", "split"} <= set(about) else ""
    caption += f"The table has {more:,} more column{'s' if more > 1 else ''}." if more > 0 else ""
    picture = [_figure(pictures["comparison"], "Bars of the figures compared", caption)] if "comparison" in pictures else []
    yield _section("Comparison", *picture, table(("", *names), [(what, *(figures.get(name) for name in names)) for what, figures in lines]))


def _privacy_section(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """What differential privacy was asked for, and what was spent of it."""
    told = mapping(records.record.get("privacy"))
    if not told and "privacy" not in pictures:
        return
    parts: list[Html] = []
    if "privacy" in pictures:
        at, spent = records.training["epsilon"][-1]
        caption = f"An attacker who sees the weights learns no more of one row or site than epsilon allows: {spell(spent)} at "
        parts.append(_figure(pictures["privacy"], f"Epsilon over each {records.clock}", f"{caption}{records.clock} {at:,.0f}."))
    yield _section("Privacy", *parts, *([_settings("What was asked for", told)] if told else []))


def _rank_section(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """How the step was shared, and what was gained by it."""
    ranks = records.ranks
    if not ranks.last:
        return
    parts: list[Html] = []
    if "ranks" in pictures:
        caption = "A rank is named by its place at the first line of the log that tells of it."
        if ranks.gains:
            gain, share = (_median([value for _, value in points]) for points in (ranks.gains, ranks.reached))
            caption = f"In the middle, a step was {gain:.2f} times as fast as with equal shares, {share:.0%} of what the speeds of its ranks allow. {caption}"
        parts.append(_figure(pictures["ranks"], "Share and waiting of each rank", caption))
    rows = []
    for name, told in list(ranks.last.items())[:_MANY_ROWS]:
        waits, shares = ([value for _, value in panel.get(name, [])] for panel in (ranks.waited, ranks.shares))
        part, wait = (_median(values) if values else None for values in (shares, waits))
        spell_part = None if part is None else f"{part:.1f} %"
        host, until = str(told.get("host") or ""), f"{told['first']:,.0f} to {told['step']:,.0f}"
        rows.append((name, host, spell_part, number(told.get("speed")), wait, whole(told.get("cap")), until))
    head = ("rank", "host", "median share", "last speed (/s)", "median waiting (ms)", "rows at once", "steps")
    capped = any(row[5] is not None for row in rows)  # only where memory was short
    listed = table(head if capped else (*head[:5], head[6]), rows if capped else [(*row[:5], row[6]) for row in rows])
    more = [tag("p", f"The first {_MANY_ROWS} of {len(ranks.last):,} ranks.", class_="note")] if len(ranks.last) > _MANY_ROWS else []
    many = [tag("details", tag("summary", f"{len(ranks.last):,} ranks"), listed)] if len(ranks.last) > _LONG else [listed]
    yield _section("Ranks", *parts, *many, *more)


def _median(values: Sequence[float]) -> float:
    """The middle one; of an even number the lower of two."""
    return sorted(values)[(len(values) - 1) // 2]


def _partition_figure(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """Who has what."""
    if "partition" not in pictures:
        return
    told, shown = mapping(records.record.get("partition")), min(len(records.partition), MANY_SITES)
    sites = max(whole(told.get("sites")) or 0, len(records.partition))
    caption = f"Who has what: the rows were dealt to {sites:,} sites by {plain(told.get('how'))}, seed {plain(told.get('seed'))}."
    sizes = mapping(told.get("rows_per_site"))
    lowest, median, highest = (number(sizes.get(name)) for name in ("lowest", "median", "highest"))
    if lowest is not None and median is not None and highest is not None:
        caption += f" A site has {lowest:,.0f} to {highest:,.0f} rows, in the middle {median:,.0f}."
    caption += f" {shown:,} sites are shown, evenly picked." if shown < sites else ""
    yield _figure(pictures["partition"], "Rows of each class at each site", caption)


def _fairness_table(records: Records) -> Iterator[Html]:
    """How a figure differs between sites."""
    keys = ("mean", "lowest", "highest", "deviation")
    rows = [
        (metric, *(number(spread.get(key)) for key in keys), None if spread.get("worst_site") is None else str(spread["worst_site"]))
        for metric, spread in records.fairness.items()
    ]
    if rows:
        yield tag("h3", "Differences between sites")
        yield table(("figure", "mean of sites", *keys[1:3], "standard deviation", "worst site"), rows)


def _site_section(records: Records, pictures: Mapping[str, Picture]) -> Iterator[Html]:
    """Each site's part in a federation."""
    names = list(dict.fromkeys([*mapping(records.record.get("sites")), *records.last_at_site]))
    parts = [*_partition_figure(records, pictures)]
    parts += [_figure(pictures["sites"], "Curves of the sites", "")] if "sites" in pictures else []
    parts += _fairness_table(records)
    parts += _site_table(records, names) if names else []
    if parts:
        yield _section("Sites", *parts)


def _site_table(records: Records, names: Sequence[str]) -> Iterator[Html]:
    known = mapping(records.record.get("sites"))
    metrics = list(records.sites)
    entries = {
        name: mapping(known.get(name)) | {key: value for key, value in records.last_at_site.get(name, {}).items() if value is not None}
        for name in names
    }
    sizes = [whole(entry.get("rows")) or 0 for entry in entries.values()]
    total, largest = sum(sizes), max(*sizes, 1)
    traffic = [key for key in ("bytes_up", "bytes_down") if any(entry.get(key) for entry in entries.values())]
    notes = {name: entry["notes"] for name, entry in entries.items() if isinstance(entry.get("notes"), list) and entry["notes"]}
    noted = [name for name in notes if name not in names[:_MANY_ROWS]]
    known_rounds = any(entry.get("rounds") for entry in entries.values())  # who took part is not told where whole sites are protected
    rows = []
    for name in [*names[:_MANY_ROWS], *noted[:_MANY_ROWS]]:
        entry = entries[name]
        count, figures = whole(entry.get("rows")), [number(entry.get(metric)) for metric in metrics]
        share = (count or 0) / total if total else 0.0
        bar = tag("span", tag("i", style=f"width: {100 * (count or 0) / largest:.1f}%"), class_="bar")
        moved = [_size(entry.get(key) or 0) for key in traffic]
        said = ["; ".join(map(str, notes.get(name, [])))] if notes else []
        rounds = whole(entry.get("rounds")) if known_rounds else None
        rows.append((name, count, tag("span", bar, f"{share:.1%}", class_="nowrap"), rounds, *figures, *moved, *said))
    last = [f"last {metric}" for metric in metrics]
    head = (
        "site",
        "rows",
        "share of rows",
        "rounds",
        *last,
        *(key.replace("bytes_", "") for key in traffic),
        *(["notes"] if notes else []),
    )
    listed = table(head, rows)
    yield tag("details", tag("summary", f"{len(names):,} sites"), listed) if len(names) > _LONG else listed
    note = (
        [f"The first {_MANY_ROWS} of {len(names):,} sites{', and others with notes' if noted else ''}."] if len(names) > _MANY_ROWS else []
    )
    if any(records.moved.values()):
        note.append(f"All sites together sent {_size(records.moved['bytes_up'])} and received {_size(records.moved['bytes_down'])}.")
    if note:
        yield tag("p", " ".join(note), class_="note")


def _settings(title: str, values: Mapping[str, Any]) -> Html:
    """Names and values as they were given."""
    rows = [(name, tag("code", plain(value))) for name, value in values.items()]
    inside = table(("name", "value"), rows) if rows else tag("p", "none", class_="note")
    return tag("div", tag("h3", title), inside, class_="column")


def _configuration(records: Records) -> Html:
    task = mapping(records.record["task"])
    columns = [_settings("Plan: how it is trained", mapping(records.record.get("plan")))]
    strategy = mapping(records.record.get("strategy"))
    identity: dict[str, Any] = {key: task[key] for key in ("class", "code") if key in task}
    right = [_settings("Task: what is learnt", mapping(task.get("values"))), _settings("Identity", identity)]
    if strategy:
        right.insert(1, _settings("Strategy", {"name": strategy.get("name"), **mapping(strategy.get("values"))}))
    parts = [tag("div", *columns, tag("div", *right, class_="column"), class_="pair")]
    forks = mappings(records.record.get("forks"))
    if forks:
        rows = []
        for fork in forks:
            for name, change in mapping(fork.get("changed")).items():
                before, after = change if isinstance(change, list) and len(change) == 2 else (None, change)
                rows.append((spell(fork.get("step")), name, tag("code", plain(before)), tag("code", plain(after))))
        parts += [tag("h3", "Forks: settings changed on resume"), table(("at step", "setting", "before", "after"), rows)]
    return _section("Configuration", *parts)


def _data_section(records: Records) -> Html:
    splits = {name: mapping(entry) for name, entry in mapping(records.record.get("data")).items()}
    hashed = any("sha256" in entry for entry in splits.values())
    rows = [
        (name, whole(entry.get("rows")), tag("code", plain(entry.get("source"))))
        + ((tag("code", str(entry.get("sha256", ""))[:12]),) if hashed else ())
        for name, entry in splits.items()
    ]
    head = ("part", "rows", "source", *(["sha256"] if hashed else []))
    parts = [table(head, rows)] if rows else [tag("p", "No sources are recorded.", class_="note")]
    schema = mapping(records.record.get("schema"))
    columns = mappings(schema.get("columns"))
    if not columns:
        return _section("Data", *parts, tag("p", "No schema is recorded: the data came as tensors.", class_="note"))
    listed = table(("column", "type", "values"), [_column(column, schema.get("target")) for column in columns[:_MANY_ROWS]])
    count = f"{len(columns):,} columns" if len(columns) > 1 else "One column"
    count += f", of which the first {_MANY_ROWS} are shown" if len(columns) > _MANY_ROWS else ""
    if len(columns) > _LONG:
        return _section("Data", *parts, tag("details", tag("summary", count), listed))
    return _section("Data", *parts, tag("h3", count), listed)


def _column(column: Mapping[str, Any], target: object) -> tuple[object, ...]:
    """A schema's column as a row: name, type, and what is known of its values."""
    categories, mean, deviation, shape = (column.get(name) for name in ("categories", "mean", "std", "shape"))
    values = []
    if isinstance(categories, list):
        shown = ", ".join(str(category) for category in categories[:8])
        values.append(f"{len(categories):,}: {shown[:160]}" + (", …" if len(categories) > 8 or len(shown) > 160 else ""))
    if shape:
        values.append(f"shape {plain(shape)}")
    if mean is not None and deviation is not None:
        values.append(f"mean {_moment(mean)}, standard deviation {_moment(deviation)}")
    name = str(column.get("name"))
    marked = Html(markup(name) + tag("span", "target", class_="tag")) if name == target else name
    return marked, str(column.get("type")), "; ".join(values) or None


def _moment(value: Any) -> str:
    """A column's mean or standard deviation; one for each channel of an image."""
    numbers = [number(item) for item in (value if isinstance(value, list) else [value])]
    return ", ".join(spell(item) if item is None or abs(item) < 1 else f"{item:,.2f}" for item in numbers)


def _environment(records: Records) -> Html:
    hardware = dict(mapping(records.record.get("hardware")))
    memory = number(hardware.pop("memory_bytes", None))
    if memory is not None:
        hardware["memory"] = f"{memory / 2**30:.1f} GiB"
    versions = {"anyfit": records.record.get("anyfit")} | mapping(records.record.get("versions"))
    return _section("Environment", tag("div", _settings("Versions", versions), _settings("Hardware", hardware), class_="pair"))


def _repeat(records: Records) -> Html:
    command = _command(records)
    if command:
        taken = any(word == "--run" or word.startswith("--run=") for word in command)
        note = [tag("p", "Name another folder with --run, for this one holds the run already.", class_="note")] if taken else []
        return _section("Repeat it", tag("pre", hide(shlex.join(command))), *note)
    text = "The run was started from Python; the task, plan and seed above repeat it."
    return _section("Repeat it", tag("p", text, class_="note"))


def _command(records: Records) -> list[str]:
    command = records.record.get("command")
    return [str(word) for word in command] if isinstance(command, list) else []


def _resume_command(records: Records) -> str:
    """The command that goes on with an unfinished run; empty where it was started from Python."""
    command = _command(records)
    if not command:
        return ""
    names_run = any(word == "--run" or word.startswith("--run=") for word in command)
    command += [] if names_run else ["--run", str(records.run)]
    return hide(shlex.join([*command, *([] if "--resume" in command else ["--resume"])]))
