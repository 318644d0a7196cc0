"""Renders scenes inside Blender's Python: each line of standard input is the facts of a clip and a
folder, each answered by a line.

Standard output takes the answers alone; what Blender says goes to standard error. The process ends
with its input, so that none outlives the program that started it.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import bpy  # noqa: E402
import gases  # noqa: E402
import soft  # noqa: E402
import solids  # noqa: E402
import stage  # noqa: E402
import things  # noqa: E402

BUILD = {
    "glass": solids.glass, "liquid": solids.liquid, "bubbles": solids.bubbles,
    "wires": solids.wires, "hair": soft.hair, "cloth": soft.cloth, "leaves": soft.leaves,
    "smoke": gases.smoke, "flames": gases.flames, "sparks": gases.sparks,
    "objects": things.objects,
}  # fmt: skip


def render(facts: dict[str, Any], folder: Path, threads: int) -> list[float]:
    scene = stage.empty()
    stage.film(scene, facts, threads)
    stage.camera(scene, facts)
    stage.lights(scene, facts)
    updates = BUILD[facts["kind"]](facts)
    return stage.shoot(scene, facts, folder, updates)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        seconds = render(request["facts"], Path(request["folder"]), request["threads"])
        return {"seconds": seconds}
    except Exception:
        return {"error": traceback.format_exc()}


def listen(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the parent is gone; a frame that is being rendered is nobody's


def main() -> None:
    print(json.dumps({"blender": bpy.app.version_string}), file=answers)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    while True:
        print(json.dumps(answer(json.loads(requests.get()))), file=answers)


if __name__ == "__main__":
    main()
