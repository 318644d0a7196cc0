"""wandb's offline files, read: LevelDB's log format around wandb's own protobuf records."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

# bytes of wandb's own header, of a block, of the header of a chunk in it
HEADER, BLOCK, CHUNK = 7, 32768, 7


@dataclass
class WandbFile:
    """One process's part of a run. summary is the last value of each key, exit_code None where it
    never finished."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)  # name -> MetricRecord of define_metric
    exit_code: int | None = None


def records(path: Path) -> Iterator[Record]:
    """In the order in which they were written, put together from their chunks."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no wandb file"
    at, parts = HEADER, []
    while at + CHUNK <= len(data):
        left = BLOCK - at % BLOCK
        if left < CHUNK:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + CHUNK])
        if at + CHUNK + length > len(data):  # cut, as by a kill
            return
        parts.append(data[at + CHUNK : at + CHUNK + length])
        at += CHUNK + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield Record.FromString(b"".join(parts))
            parts = []


def read(path: Path) -> WandbFile:
    found = WandbFile()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.id, found.name, found.group, found.job_type = (
                run.run_id,
                run.display_name,
                run.run_group,
                run.job_type,
            )
            found.tags = list(run.tags)
            _update(found.config, run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "history":
            found.history.append(_update({}, record.history.item))
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def runs_below(folder: Path) -> list[WandbFile]:
    """In order of their files' paths, which begin with the run's folder and the time."""
    return [read(path) for path in sorted(folder.glob("**/wandb/offline-run-*/*.wandb"))]


def _update(values: dict[str, Any], items: Any) -> dict[str, Any]:
    """values with what records say, nested keys as nested mappings."""
    for item in items:
        names = list(item.nested_key) or [item.key]
        place = values
        for name in names[:-1]:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[names[-1]] = json.loads(item.value_json)
    return values
