import subprocess
import sys

BASE = "dora=null rgba_vae=null"
LOST = {
    f"sample prompts=none.txt {BASE}": "sample: prompts=none.txt does not exist",
    "sample prompt=x dora=none@best": "sample: dora=none@best does not exist. Name a run,",
    "sample prompt=x dora=null rgba_vae=[none.pt,none.bin]": "sample: rgba_vae=none.pt does not",
    f"sample prompt=x {BASE} guide.clip=none.png": "sample: guide.clip=none.png",
    f"sample prompt=x {BASE} image=none.png": "sample: image=none.png does not",
    "follow dora=none": "follow: dora=none does not exist. Name a run,",
    "view . none": "view: folders=none is not a folder. Name one that holds clips.",
    "view . reference=none": "view: reference=none is not a folder.",
    "evaluate . references=none": "evaluate: references=none is not a folder.",
    "prep inspect shards=none": "prep inspect: shards=none does not exist. `acetate prep synth",
    "prep cache_latents shards=[.,none] rgba_vae=. out=x": "prep cache_latents: shards=none does",
}  # fmt: skip


def test_what_is_not_there_is_told_before_anything_is_imported(tmp_path):
    """One after the other in one process, which never imports torch."""
    code = """
import sys
from acetate.cli import main
for arguments in sys.argv[1:]:
    try:
        main(arguments.split())
    except SystemExit as end:
        assert end.code == 1, arguments
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *LOST], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["False"], done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == len(LOST), done.stderr
    for line, expected in zip(said, LOST.values(), strict=True):
        assert line.startswith(expected)
