"""Means with intervals, by stratum, and paired differences
of systems; as tables on the screen and in files."""

import csv
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from acetate.console import printable
from acetate.metrics.catalogue import BY_NAME, FIGURES, PER_COLOR, WRONG
from acetate.metrics.intervals import mean_interval
from acetate.replacing import remove, rename_over, writing
from data_prep.measuring import Measured, Work

FACTS = ("system", "clip", "stratum", "frames", "height", "width")
WORDS = ("faults", "skipped")
ALL = "all"  # the stratum of all clips
SUMMARY = ("system", "against", "stratum", "figure", "clips", "mean", "low", "high")
OURS = ("clips.csv", "clips.parquet", "summary.csv", "summary.json")
# Of the table by stratum, where they were measured
SHORT = ("psnr", "mad", "dtssd", "background", "holes", "halo", "flicker")
Row = dict[str, Any]


def row_of(work: Work, found: Measured) -> Row:
    """Returns a clip's row of the table: facts, figures, faults in words, why it was skipped."""
    facts = (work.system, printable(work.name), work.stratum, *_size(found))
    words = ("; ".join(found.faults), found.why)
    figures = {name: found.figures[name] for name in BY_NAME if name in found.figures}
    return dict(zip(FACTS, facts, strict=True)) | figures | dict(zip(WORDS, words, strict=True))


def _size(found: Measured) -> tuple[int | None, ...]:
    return (None, None, None) if found.why else (found.frames, found.height, found.width)


def summarised(rows: Sequence[Row]) -> list[Row]:
    """Returns means and 95 % intervals of every figure, of all clips and by stratum, of each
    system; and of the differences of each further system from the first, over the clips that both
    have."""
    systems, strata = systems_of(rows), strata_of(rows)
    made: list[Row] = []
    for stratum in (ALL, *(strata if len(strata) > 1 else ())):
        held = {
            system: {
                row["clip"]: row
                for row in rows
                if row["system"] == system and not row["skipped"]
                and stratum in (ALL, row["stratum"])
            }
            for system in systems
        }  # fmt: skip
        first = held[systems[0]]
        for system in systems:
            for name in BY_NAME:
                values = [row[name] for row in held[system].values() if name in row]
                made += _line((system, "", stratum, name), values)
        for system in systems[1:]:
            for name in BY_NAME:
                apart = [
                    row[name] - first[clip][name]
                    for clip, row in held[system].items()
                    if name in row and name in first.get(clip, ())
                ]
                made += _line((system, systems[0], stratum, name), apart)
    return made


def _line(of: tuple[str, ...], values: Sequence[float]) -> list[Row]:
    if not values:
        return []
    found = (len(values), *mean_interval(np.asarray(values, np.float64)))
    return [dict(zip(SUMMARY, (*of, *found), strict=True))]


def systems_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["system"] for row in rows))


def strata_of(rows: Sequence[Row]) -> list[str]:
    return sorted({row["stratum"] for row in rows if not row["skipped"]})


def print_summary(console: Console, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Prints the table of all clips, that by stratum, and what is wrong with clips."""
    systems = systems_of(rows)
    counts = Counter(row["system"] for row in rows if not row["skipped"])
    found = {(line["system"], line["against"], line["stratum"], line["figure"]): line
             for line in summary}  # fmt: skip
    table = Table(Column(no_wrap=True), "better")
    for system in systems:
        table.add_column(f"{system}\n{counts[system]} clips", justify="right")
    for system in systems[1:]:
        table.add_column(f"{system} - {systems[0]}\nthe same clips", justify="right")
    for group, figures in groupby(FIGURES, key=lambda figure: figure.group):
        lines = [
            _cells(found, systems, figure.name)
            for figure in figures
            if figure.group != WRONG and figure.name not in PER_COLOR
        ]
        if lines := [line for line in lines if any(line[2:])]:
            table.add_section()
            table.add_row(group)
            for line in lines:
                table.add_row(*line)
    console.print(table)
    console.print(f"Means over clips; ±: half of the 95 % interval, whose ends are in {OURS[2]}.")
    strata = strata_of(rows)
    if len(strata) > 1:
        console.print(_by_stratum(found, systems, strata))
    for line in faults_of(rows, counts):
        console.print(line, soft_wrap=True)


def _cells(found: Mapping[tuple[str, ...], Row], systems: Sequence[str], name: str) -> list[str]:
    """Returns a figure's row: its title, which way is better, systems, differences."""
    figure = BY_NAME[name]
    cells = [_shown(found.get((system, "", ALL, name))) for system in systems]
    for system in systems[1:]:
        line = found.get((system, systems[0], ALL, name))
        cells.append(_shown(line, sign="+") + (_verdict(line, figure.better) if line else ""))
    return [f"  {figure.title}", figure.better, *cells]


def _shown(line: Row | None, sign: str = "") -> str:
    """Returns the mean with four digits and half of its interval with two."""
    if line is None:
        return ""
    mean = f"{line['mean']:{sign}.4g}"
    return mean if math.isnan(line["low"]) else f"{mean} ± {(line['high'] - line['low']) / 2:.2g}"


def _verdict(line: Row, better: str) -> str:
    """Says which way a difference goes, where its interval leaves out 0."""
    if better not in ("higher", "lower") or not (line["low"] > 0 or line["high"] < 0):
        return ""
    return " better" if (line["mean"] > 0) == (better == "higher") else " worse"


def _by_stratum(
    found: Mapping[tuple[str, ...], Row], systems: Sequence[str], strata: Sequence[str]
) -> Table:
    names = [n for n in SHORT if any((system, "", ALL, n) in found for system in systems)]
    table = Table("stratum", "system", "clips", *(BY_NAME[name].title for name in names))
    for stratum in strata:
        table.add_section()
        for system in systems:
            lines = [found.get((system, "", stratum, name)) for name in names]
            if any(lines):
                count = max(line["clips"] for line in lines if line)
                table.add_row(stratum or "-", system, str(count), *map(_shown, lines))
    return table


def faults_of(rows: Sequence[Row], counts: Mapping[str, int]) -> Iterator[str]:
    """Yields what is wrong with the clips of each system, and with how many of them."""
    for system in systems_of(rows):
        own = [row for row in rows if row["system"] == system]
        told = Counter(fault for row in own for fault in filter(None, row["faults"].split("; ")))
        lags = Counter(int(row["lag"]) for row in own if row.get("lag"))
        for lag, count in lags.items():
            way = "after" if lag > 0 else "before"
            told[f"alpha changes {abs(lag)} frame{'s' * (abs(lag) != 1)} {way} its colour"] = count
        for fault, count in told.most_common():
            yield f"{system}: {fault} in {count} of {counts[system]} clips"


def check_ours(out: Path) -> None:
    """Raises FileExistsError where `out` is a folder that holds something else."""
    others = sorted(path.name for path in out.iterdir() if path.name not in OURS) if (
        out.is_dir()
    ) else []  # fmt: skip
    if others:
        raise FileExistsError(
            f"out={out} holds {', '.join(others[:3])}, which evaluate did not write. Name another "
            "folder, which may be new."
        )


def write_tables(console: Console, out: Path, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Writes the tables into a folder that takes the place of `out` once it is whole."""
    folder = out.absolute().with_name(f".new-{out.absolute().name}")
    held = {name for row in rows for name in row}
    columns = [name for name in (*FACTS, *BY_NAME, *WORDS) if name in held]
    parquet = importlib.util.find_spec("pyarrow") is not None
    with writing(out):
        remove(folder)
        folder.mkdir(parents=True)
        try:
            _write_csv(folder / "clips.csv", columns, rows)
            _write_csv(folder / "summary.csv", SUMMARY, summary)
            if parquet:
                _write_parquet(folder / "clips.parquet", columns, rows)
            (folder / "summary.json").write_text(_json(columns, rows, summary), encoding="utf-8")
            rename_over(folder, out)
        except BaseException:
            remove(folder)
            raise
    console.print(f"clips       {out / 'clips.csv'}", soft_wrap=True)
    if parquet:
        console.print(f"            {out / 'clips.parquet'}", soft_wrap=True)
    else:
        console.print("            no clips.parquet: that needs pyarrow (pip install pyarrow)")
    console.print(f"summary     {out / 'summary.csv'}\n            {out / 'summary.json'}",
                  soft_wrap=True)  # fmt: skip


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes rows with numbers of nine digits; what a row does not have is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_text(row.get(name)) for name in columns])


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow as pa  # type: ignore[import-not-found]  # optional
    import pyarrow.parquet as pq  # type: ignore[import-not-found]

    def kind(name: str) -> Any:
        if name in BY_NAME:
            return pa.float64()
        return pa.int64() if name in ("frames", "height", "width") else pa.string()

    schema = pa.schema([(name, kind(name)) for name in columns])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def _json(columns: Sequence[str], rows: Sequence[Row], summary: Sequence[Row]) -> str:
    """Returns the summary as JSON, with what its figures say. NaN is null."""
    said = {
        name: {"says": BY_NAME[name].says, "better": BY_NAME[name].better,
               "source": BY_NAME[name].source}
        for name in columns
        if name in BY_NAME
    }  # fmt: skip
    lines = [
        {name: None if value != value else value for name, value in line.items()}
        for line in summary
    ]
    counts = Counter(row["system"] for row in rows if not row["skipped"])
    skipped = {f"{row['system']}/{row['clip']}": row["skipped"] for row in rows if row["skipped"]}
    held = {"clips": counts, "skipped": skipped, "figures": said, "summary": lines}
    return json.dumps(held, ensure_ascii=False, indent=1) + "\n"
