"""Lines about every clip, which the next run finds again, and copies of clips."""

from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from acetate.data.shards import BadClip, ClipRef, read_media, read_meta_text
from acetate.data.writer import ShardWriter
from data_prep.bad_clips import BadClips
from data_prep.journal import Line, open_journal


def gather(
    lines: Iterable[Line | BadClip], journal: Path, known: dict[str, Line], bad: BadClips
) -> None:
    """Adds every line to `known`, by its key, and to the journal before the next one is made."""
    with open_journal(journal) as append:
        for line in lines:
            if isinstance(line, BadClip):
                bad.add({line.key: line.reason})
            else:
                append(line)
                known[line["key"]] = line


def copy_clips(
    refs: Iterable[ClipRef],
    writer: ShardWriter,
    bad: BadClips,
    text_of: Callable[[ClipRef], bytes] = read_meta_text,
) -> None:
    """Copies the media of clips that the writer lacks, byte for byte. text_of: a clip's JSON."""
    for ref in tqdm(refs, unit="clip", desc="copies"):
        if ref.key not in writer:
            try:
                writer.copy(ref, read_media(ref), text_of(ref))
            except BadClip as error:  # its line may be older than the damage
                bad.add({error.key: error.reason})
    writer.skipped = dict(sorted(bad.items()))
