"""A clip as the RGBA-VAE of a run gives it back, beside the clip itself."""

from collections.abc import Iterator
from functools import partial

from acetate.clips import Clip
from acetate.media.clip import Limits, MediaError, Stream
from acetate.pipeline import RGBAVAE
from data_prep.candidates import Candidate
from data_prep.measuring import PIECE, Piece, Reconstruct, piece_of


def reconstruction(run: str) -> Reconstruct:
    """Loads the RGBA-VAE of a run, a checkpoint or a file. Raises as `RGBAVAE.load`."""
    return partial(reconstructed, vae=RGBAVAE.load(run))


def reconstructed(
    candidate: Candidate, stream: Stream, limits: Limits, vae: RGBAVAE
) -> Iterator[tuple[Piece, Piece]]:
    """Yields pieces of the clip as the RGBA-VAE gives it back, and of the clip itself, cut to 4k+1
    frames and around its middle to sides that the VAE takes. The whole clip is in memory. Raises
    MediaError for one that is smaller."""
    frames = stream.collected(candidate.files[0], limits).frames
    geometry = vae.model.geometry
    count, height, width = frames.shape[:3]
    length = count - (count - 1) % geometry.time_stride
    sides = [side - side % geometry.space_stride for side in (height, width)]
    if not all(sides):
        raise MediaError(
            f"{candidate.files[0]}: {width}x{height}; this VAE takes sides of "
            f"{geometry.space_stride} pixels and more"
        )
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    frames = frames[:length, top : top + sides[0], left : left + sides[1]]
    true = piece_of(list(frames), stream)
    clip = Clip(true.rgb[0], true.alpha[0])
    seen = vae.decode(vae.encode(clip))[0]
    whole = Piece(seen.rgb[None].cpu(), seen.alpha[None].cpu())
    for start in range(0, length, PIECE):
        yield whole.part(start, start + PIECE), true.part(start, start + PIECE)
