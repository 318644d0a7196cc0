"""Which checkpoint a run goes on from."""

from pathlib import Path


def checkpoint_to_resume(resume: str | None, outputs: Path) -> str | None:
    """A checkpoint path as it is; `last` is the newest last.ckpt below `outputs`. Raises FileNotFoundError."""
    if resume is None:
        return None
    if resume != "last":
        if not Path(resume).exists():
            raise FileNotFoundError(f"resume={resume} does not exist. Give a .ckpt file, or `last` for the newest run.")
        return resume
    found = sorted(outputs.glob("**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"resume=last: no last.ckpt below {outputs}. Leave out resume to start anew.")
    return str(found[-1])
