"""Measures `acetate evaluate` for commands.benchmark: where its time goes, and whether its memory
depends on the number of clips.

Clips are drawn; those of the system are the true ones with soft edges and noise. The command runs
twice as a process of its own on one thread, on two clips and on all of them, under Python's
profiler, which makes what is not a call into a library seem slower than it is.
"""

import os
import pstats
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from acetate.data.synthetic import KINDS, render
from acetate.data.transforms import to_uint8
from acetate.data.writer import encode_clip

FEW = 2
# functions of data_prep/measuring.py, and what their time is spent on
PARTS = {"_read": "decoding", "add": "metrics", "figures": "metrics"}


@dataclass(frozen=True)
class EvaluateLoad:
    """The clips that are drawn and measured."""

    clips: int
    frames: int
    size: int  # of a square picture
    seed: int


def benchmark_evaluate(load: EvaluateLoad) -> dict[str, dict[str, float]]:
    """Returns for two clips and for all {frames, seconds of the processor, seconds by the clock,
    shares of decoding and of metrics in the profiled time, bytes of the process at its peak}."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = {"few": _measured(root, draw_pairs(root, load, range(FEW)))}
        found["all"] = _measured(root, draw_pairs(root, load, range(FEW, load.clips)))
    return found


def draw_pairs(root: Path, load: EvaluateLoad, numbers: range) -> int:
    """Adds pairs to `root`/true and `root`/system; returns how many frames there are by now."""
    generator = torch.Generator().manual_seed(load.seed)
    for i in tqdm(numbers, desc="draw", unit="clip"):
        clip = render(KINDS[i % len(KINDS)], load.seed + i, load.frames, load.size, load.size)
        soft = F.avg_pool2d(clip.alpha.transpose(0, 1), 3, 1, 1).transpose(0, 1)
        noise = torch.randn(clip.rgb.shape, generator=generator) / 50
        pairs = {"true": (clip.rgb, clip.alpha), "system": (clip.rgb + noise, soft)}
        for name, (rgb, alpha) in pairs.items():
            encoded = encode_clip(to_uint8(rgb.clamp(-1, 1), alpha.clamp(0, 1)).numpy(), fps=16)
            (root / name).mkdir(exist_ok=True)
            assert isinstance(encoded.media, bytes)
            (root / name / f"clip{i:06d}{Path(encoded.kind).suffix}").write_bytes(encoded.media)
    return (numbers.stop) * load.frames


def _measured(root: Path, frames: int) -> dict[str, float]:
    profile, log = root / "profile", root / "log"
    command = [
        sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "acetate", "evaluate",
        str(root / "system"), f"references={root / 'true'}", f"out={root / 'out'}", "workers=0",
    ]  # fmt: skip
    start = time.perf_counter()
    with open(log, "w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[5:])} failed:\n{log.read_text()[-2000:]}")
    found = {
        "frames": frames,
        "seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": time.perf_counter() - start,
        "peak_memory": used.ru_maxrss * 1024,
    }
    stats = pstats.Stats(str(profile))
    shares = dict.fromkeys(PARTS.values(), 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore
        if file.endswith("measuring.py") and name in PARTS:
            shares[PARTS[name]] += cumulative / stats.total_tt  # type: ignore
    if not all(shares.values()):
        raise RuntimeError(f"no call of {', '.join(PARTS)} in the profile; it was {shares}")
    return found | shares
