"""Stands in for an interpreter with Blender: says its version, and answers the facts of clips with
flat pictures whose light is the seed's."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import OpenEXR

if "-c" in sys.argv:
    print("bpy 5.0.1")
    raise SystemExit
print(json.dumps({"blender": "5.0.1"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    facts, stumble = request["facts"], os.environ.get("STUMBLE", "")
    if stumble == "dies":
        print("out of everything", file=sys.stderr)
        raise SystemExit(7)
    if facts["kind"] == stumble:
        print(json.dumps({"error": "Traceback\nKeyError: 'no such shape'"}), flush=True)
        continue
    picture = np.full((facts["height"], facts["width"], 4), 0.5, np.float32)
    picture[..., 0] = facts["seed"] % 97 / 200
    for frame in range(facts["frames"]):
        file = Path(request["folder"]) / f"{frame:05d}.exr"
        OpenEXR.File({}, {"RGBA": picture}).write(str(file))
    print(json.dumps({"seconds": []}), flush=True)
