"""acetate benchmark [name=value ...]: speeds, side by side and in one run.

`ceilings` (benchmark_ceilings) is what the device gives at most. `step` (benchmark_step) is a
training step of the RGBA-VAE, ours and as released; `norm` (benchmark_norm) the ways to its norms;
`dit` (benchmark_dit) one of the DiT with DoRA,
ours and PEFT's on diffusers; both beside the ceilings where these are measured. `reader`
(benchmark_reader) is reading clips, `evaluate` (benchmark_evaluate) measuring them. Each part is
printed and written as soon as it is done, and one that fails does not cost the others.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.commands import benchmark_dit, benchmark_step
from acetate.commands.benchmark_ceilings import CeilingsLoad, benchmark_ceilings, rates_of
from acetate.commands.benchmark_clock import failures_in, failures_of, release, set_up
from acetate.commands.benchmark_dit import DiTLoad, attention_shapes, check_ways, time_shape
from acetate.commands.benchmark_evaluate import EvaluateLoad, benchmark_evaluate
from acetate.commands.benchmark_norm import benchmark_norm
from acetate.commands.benchmark_reader import ReaderLoad, benchmark_reader, rows_of
from acetate.commands.benchmark_step import Workload
from acetate.replacing import check_out, write_json

PARTS = ("ceilings", "step", "norm", "dit", "reader", "evaluate")
# What a setting without a value is
BY_DEVICE: dict[str, dict[str, Any]] = {
    "cuda": {
        "precision": "bfloat16",
        "cudnn_benchmark": True,
        "frames": 17,
        "height": 272,
        "width": 272,
        "ceilings.side": 8192,
        "ceilings.gib": 2,
        "dit.size": "1.3B",
        "dit.shapes": [[21, 640, 624], [81, 480, 832]],
    },
    "cpu": {
        "precision": "float32",
        "cudnn_benchmark": False,
        "frames": 9,
        "height": 64,
        "width": 64,
        "ceilings.side": 1024,
        "ceilings.gib": 0.25,
        "dit.size": "tiny",
        "dit.shapes": [[5, 64, 64]],
    },
}


def main(config: DictConfig) -> None:
    """Measures the parts. Raises RuntimeError at the end, after everything is printed and written,
    where one or a way of one failed."""
    if config.out is not None:
        check_out(Path(config.out))
    choose(config)
    load = Workload(**{field.name: config[field.name] for field in fields(Workload)})
    sizes, reading = CeilingsLoad(**config.ceilings), ReaderLoad(**config.reader)
    measuring = EvaluateLoad(**config.evaluate)
    generator = dit_load(config)
    set_up(load.threads, load.cudnn_benchmark)
    console = Console(width=140)
    results: dict[str, Any] = {"machine": machine(load)}
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    console.print(facts, markup=False)
    rates: dict[str, float] | None = None
    for part in (part for part in PARTS if part in config.parts):  # ceilings first
        results[part] = {}
        with failures_in(results[part], load.device):
            if part == "ceilings":
                results[part] |= measure_ceilings(sizes, load, generator, console)
                rates = rates_of(results[part]["rows"])
            elif part == "step":
                measure_step(load, config, rates, results[part], console)
            elif part == "norm":
                rows = benchmark_norm(load, sizes.repeats)
                results[part] |= {"workload": asdict(load), "rows": rows}
                print_norm(rows, console)
            elif part == "dit":
                measure_dit(generator, rates, results[part], console)
            elif part == "evaluate":
                results[part] |= {"workload": asdict(measuring), **benchmark_evaluate(measuring)}
                print_evaluate(results[part], measuring, console)
            else:
                results[part] |= {"workload": asdict(reading), **benchmark_reader(reading)}
                print_reader(results[part], reading, console)
        release(load.device)
        if config.out is not None:
            write_json(Path(config.out), results)
    if failed := list(failures_of(results)):
        raise RuntimeError("Not measured:\n" + "\n".join(failed))


def choose(config: DictConfig) -> None:
    """Gives the settings without a value theirs, by the device."""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    config.threads = config.threads or os.cpu_count()
    for name, value in BY_DEVICE.get(config.device, {}).items():
        if OmegaConf.select(config, name) is None:
            OmegaConf.update(config, name, value)


def dit_load(config: DictConfig) -> DiTLoad:
    """Builds the DiT's work of its own settings and those of all parts."""
    own: dict[str, Any] = OmegaConf.to_container(config.dit, resolve=True)  # type: ignore
    shapes = tuple((frames, height, width) for frames, height, width in own.pop("shapes"))
    shared = {name: config[name] for name in ("device", "precision", "seed")}
    return DiTLoad(shapes=shapes, **own | {"ways": tuple(own["ways"])} | shared)


def machine(load: Workload) -> dict[str, Any]:
    """Returns what figures depend on: the card, versions, threads, the command."""
    arguments = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    facts: dict[str, Any] = {"device": "CPU", "torch": torch.__version__}
    if load.device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
        facts |= {"cuDNN": torch.backends.cudnn.version()}
    facts |= {"threads": load.threads, "precision": load.precision}
    return facts | {"command": shlex.join(["acetate", "benchmark", *arguments])}


def measure_ceilings(
    sizes: CeilingsLoad, load: Workload, generator: DiTLoad, console: Console
) -> dict[str, Any]:
    rows = benchmark_ceilings(sizes, load, attention_shapes(generator))
    table = Table("ceilings", "", "ms", "TFLOP/s", "TB/s")
    for row in rows:
        if "rate" not in row:
            table.add_row(row["what"], "missing" if "missing" in row else "failed", "", "", "")
            continue
        rate = f"{row['rate'] / 1e12:.3f}"
        rates = ("", rate) if row["kind"] == "copy" else (rate, "")
        table.add_row(
            row["what"], row["kind"].split(", ")[-1], f"{1e3 * row['seconds']:.3f}", *rates
        )
    console.print(table)
    return {"workload": asdict(sizes), "rows": rows}


def measure_step(
    load: Workload,
    config: DictConfig,
    rates: Mapping[str, float] | None,
    results: dict[str, Any],
    console: Console,
) -> None:
    results |= {"workload": asdict(load)}
    results |= benchmark_step.time_step(load, config.warmup, config.repeats)
    results["summary"] = benchmark_step.summarise(results, rates)
    agreement = results["agreement"]
    table = Table("step", *benchmark_step.WAYS, "released / ours", "TFLOP", "of the ceilings")
    for name, row in results["summary"].items():
        ways = [row.get(way) for way in benchmark_step.WAYS]
        ratio = f"{ways[1] / ways[0]:.2f}" if ways[0] and ways[1] else ""
        cells = ["failed" if value is None else f"{value:.4g}" for value in ways]
        cells += [ratio, f"{row['tflop']:.4g}" if "tflop" in row else ""]
        table.add_row(name, *cells, f"{row['share']:.1%}" if "share" in row else "")
    console.print(
        f"{load}\nBoth ways agree: loss to {agreement['loss']:.0e}, gradients to "
        f"{agreement['gradient']:.0e} of a tensor's largest."
    )
    console.print(table)


def print_norm(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table("norm and SiLU", "way", "", "ms", "TB/s")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        if "error" in row:
            table.add_row(shape, row["way"], "failed", "", "")
            continue
        figures = f"{1e3 * row['seconds']:.3f}", f"{row['rate'] / 1e12:.3f}"
        table.add_row(shape, row["way"], row["direction"], *figures)
    console.print(table)


def measure_dit(
    load: DiTLoad, rates: Mapping[str, float] | None, results: dict[str, Any], console: Console
) -> None:
    results |= {"workload": asdict(load), "errors": check_ways(load), "shapes": []}
    print_errors(results["errors"], console)
    for size in tqdm(load.shapes, desc="DiT", unit="shape"):
        found = time_shape(load, size, results["errors"])
        found["summary"] = benchmark_dit.summarise(found, rates)
        results["shapes"].append(found)
        print_dit(load, found, console)


def print_errors(errors: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table("error against float64", "precision", "velocity", "gradients", "rule holds")
    for way, found in errors.items():
        for precision, one in found.items():
            if precision == "error":
                table.add_row(way, "failed", "", "", one)
                continue
            values = (f"{one[name]:.2e}" for name in ("velocity", "gradient"))
            table.add_row(way, precision, *values, "yes" if one["holds"] else "no")
    console.print(table)


def print_dit(load: DiTLoad, found: Mapping[str, Any], console: Console) -> None:
    needed = {kind: f"{count / 1e12:.4g}" for kind, count in found["needed"].items()}
    console.print(
        f"DiT {load.size}, {found['layers']} of {found['of_layers']} layers, frames x height x "
        f"width {'x'.join(map(str, found['shape']))}, rank {load.rank}, "
        f"checkpointing {load.checkpointing}; TFLOP that a step needs: attention "
        f"{needed['attention']}, matrices {needed['matmul']}"
    )
    summary = found["summary"]
    columns = list(next(iter(summary.values()), {}))
    table = Table("dit", *columns, "stock / way")
    for way in found["ways"]:
        if way not in summary:
            table.add_row(way, "failed")
            continue
        row = summary[way]
        cells = [f"{row[name]:.4g}" if name in row else "" for name in columns]
        ratio = summary["stock"]["step, s"] / row["step, s"] if "stock" in summary else None
        table.add_row(way, *cells, f"{ratio:.2f}" if ratio else "")
    console.print(table)


def print_reader(results: dict[str, Any], load: ReaderLoad, console: Console) -> None:
    console.print(
        f"{load}; per core: of processor time. `datamodule` is one worker with transform and "
        "collation."
    )
    table = Table(
        "shard", "way", "clips/s/core", "frames/s/core", "clips/s by the clock", "time / plain"
    )
    for row in rows_of({kind: ways for kind, ways in results.items() if kind != "workload"}):
        table.add_row(*row)
    console.print(table)


def print_evaluate(results: dict[str, Any], load: EvaluateLoad, console: Console) -> None:
    table = Table("evaluate", "core s", "core s/frame", "decoding", "metrics", "peak GiB")
    for name in ("few", "all"):
        one = results[name]
        table.add_row(
            f"{one['frames'] // load.frames} clips", f"{one['seconds']:.1f}",
            f"{one['seconds'] / one['frames']:.3f}", f"{one['decoding']:.1%}",
            f"{one['metrics']:.1%}", f"{one['peak_memory'] / 2**30:.2f}",
        )  # fmt: skip
    console.print(f"{load}; start included")
    console.print(table)


if __name__ == "__main__":
    run("benchmark")
