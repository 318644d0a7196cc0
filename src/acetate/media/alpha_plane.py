"""The way a file carries its alpha, as players and editors look for it, and who shows it."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from acetate.media.clip import decoding
from acetate.media.color import UNSPECIFIED
from acetate.media.film_facts import ALPHA_DECODERS, opened
from acetate.media.sequences import is_sequence, sequence_files
from acetate.media.videos import VIDEOS

BLOCK_ADDITIONAL = "matroska_block_additional"  # where WebM has alpha: a second picture beside each
MATRICES = {0: "RGB", 1: "BT.709", 5: "BT.601", 6: "BT.601", 9: "BT.2020"}  # H.273's numbers
EDITORS = "Premiere Pro, After Effects, DaVinci Resolve, Final Cut, Nuke, Blender"
BROWSERS = "Chrome, Edge, Firefox, Safari"
# By suffix and codec, or by suffix alone: who shows the transparency, and who does not.
SHOWN = {
    ("webm", "vp9"): ("Chrome, Edge, Firefox, OBS", "Safari and most editors, which drop it"),
    ("webm", "vp8"): ("Chrome, Edge, Firefox, OBS", "Safari and most editors, which drop it"),
    ("mov", "prores"): (EDITORS, "browsers"),
    ("mov", "hevc"): ("Safari, macOS, iOS, Final Cut", "Chrome, Edge and Firefox"),
    ("mov", "qtrle"): (EDITORS, "browsers"),
    ("mov", "png"): ("After Effects, Premiere Pro, Blender", "browsers"),
    ("png",): (f"{BROWSERS}; {EDITORS}", ""),
    ("apng",): (BROWSERS, "most editors, which show its first picture"),
    ("webp",): (BROWSERS, "most editors, if it moves"),
    ("avif",): (BROWSERS, "most editors"),
    ("gif",): (BROWSERS, "soft edges: a pixel is there or not"),
    ("exr",): ("Nuke, After Effects, Blender, DaVinci Resolve", "browsers"),
    ("tif",): (EDITORS, "browsers"),
    ("tiff",): (EDITORS, "browsers"),
    ("tga",): (EDITORS, "browsers"),
}


@dataclass(frozen=True)
class Carried:
    """The statements of the file's own structure, before a picture counts.

    codec, pixels: names, as FFmpeg or PIL have them. packets: of a film; planes: those of them with
    alpha beside the picture, None where the codec has it inside. tagged: whether the container
    announces alpha, None where there is no such tag. depth: bits of a pixel that QuickTime's sample
    description states. stated: matrix and range of a film's colour in words, None for RGB and
    stills. unstated: what is not said of it.
    """

    codec: str
    pixels: str
    packets: int | None = None
    planes: int | None = None
    tagged: bool | None = None
    depth: int | None = None
    stated: str | None = None
    unstated: tuple[str, ...] = ()

    def faults(self, alpha: bool) -> list[str]:
        """Returns in words why transparency that is there is not seen, or none where it is
        announced. alpha: whether a decoder finds any."""
        found = []
        if self.tagged and not alpha:
            found.append("the container announces alpha (alpha_mode=1), and there is none")
        if self.planes and not self.tagged:
            found.append(
                "it has alpha beside its pictures and no alpha_mode tag: players show "
                "it opaque: ffmpeg -i FILE -c copy -metadata:s:v:0 alpha_mode=1 OUT.webm"
            )
        if self.planes and self.packets and self.planes < self.packets:
            found.append(f"alpha stands beside {self.planes} of its {self.packets} pictures")
        # Apple's own encoder writes 24 for HEVC with alpha, whose second layer says enough
        if alpha and self.codec != "hevc" and self.depth not in (None, 0, 32, 64):
            found.append(
                f"its sample description says depth {self.depth}; editors take 32 for alpha and "
                "others for none"
            )
        return found


def carried(path: Path) -> Carried:
    """Reads the structure of a film, a still, an animation or a sequence. Raises MediaError."""
    with decoding(path):
        if is_sequence(path):
            return carried(sequence_files(path)[0])
        if path.suffix.lower() in VIDEOS:
            return _of_film(path)
        if path.suffix.lower() == ".exr":
            return Carried("EXR", "linear light")
        with Image.open(path) as image:
            return Carried(image.format or path.suffix[1:], image.mode)


def _of_film(path: Path) -> Carried:
    with opened(path) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        said = {name.lower(): value for name, value in stream.metadata.items()}
        packets = planes = 0
        for packet in container.demux(stream):
            packets += bool(packet.size)
            planes += packet.has_sidedata(BLOCK_ADDITIONAL)
        beside = codec.name in ALPHA_DECODERS
        pixels = codec.pix_fmt or "unknown"
        depth = codec.bits_per_coded_sample if path.suffix.lower() == ".mov" else None
        stated, unstated = None, ()
        if not (codec.format and codec.format.is_rgb):
            limited = {1: "limited range", 2: "full range"}.get(int(codec.color_range), "")
            matrix = MATRICES.get(int(codec.colorspace), f"matrix {int(codec.colorspace)}")
            known = int(codec.colorspace) != UNSPECIFIED
            stated = ", ".join(filter(None, (matrix if known else "", limited)))
            values = {
                "primaries": codec.color_primaries, "transfer": codec.color_trc,
                "matrix": codec.colorspace,
            }  # fmt: skip
            unstated = tuple(name for name, value in values.items() if int(value) == UNSPECIFIED)
        return Carried(
            codec.name, pixels, packets, planes if beside else None,
            said.get("alpha_mode") == "1" if beside else None, depth, stated, unstated,
        )  # fmt: skip


def who_shows(path: Path, codec: str) -> tuple[str, str] | None:
    """Returns who shows the alpha of such a file and who does not; None where nothing is known."""
    suffix = (sequence_files(path)[0] if is_sequence(path) else path).suffix.lower()[1:]
    suffix = {"mp4": "mov", "m4v": "mov"}.get(suffix, suffix)
    return SHOWN.get((suffix, codec)) or SHOWN.get((suffix,))
