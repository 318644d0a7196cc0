"""Motion between the frames of a clip, by FFmpeg's block matching."""

import av
import numpy as np
import torch
from av.error import BlockingIOError as NothingYet
from av.filter import Graph
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 8  # pixels of a side
REACH = 16  # pixels that a block may move, along each side
METHOD = "umh"  # uneven multi-hexagon search; it looks at this frame alone, not at earlier ones


def motion(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where each pixel of frames 0 to T-2 is in the frame before and in the one after.

    plane: (T, H, W) in [0, 1], which is matched in 8-bit steps on blocks of 8x8 pixels (FFmpeg's
    mestimate). Both results are whole pixels (T-1, H, W, 2), x and y; frame 0 has itself before it.
    Runs on the CPU.
    """
    frames, height, width = plane.shape
    if frames < 2:
        empty = torch.zeros(0, height, width, 2, dtype=torch.long, device=plane.device)
        return empty, empty
    levels = (plane.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    pad = [(0, 0), (0, -height % BLOCK), (0, -width % BLOCK)]
    levels = np.pad(levels, pad, mode="edge")
    fields = np.stack([_field(found, levels.shape[1:]) for found in _estimates(levels)])
    spread = fields.repeat(BLOCK, 2).repeat(BLOCK, 3)[:, :, :height, :width]
    before, after = torch.from_numpy(spread).to(plane.device).unbind(1)
    return before, after


def moved(plane: Tensor, vectors: Tensor) -> Tensor:
    """Returns the values of frames (T, H, W) at the places that vectors (T, H, W, 2) lead to; those
    outside of the frame are at its border."""
    frames, height, width = plane.shape
    t = torch.arange(frames, device=plane.device)[:, None, None]
    y = torch.arange(height, device=plane.device)[:, None] + vectors[..., 1]
    x = torch.arange(width, device=plane.device) + vectors[..., 0]
    return plane[t, y.clamp(0, height - 1), x.clamp(0, width - 1)]


def _estimates(levels: NDArray[np.uint8]) -> list[NDArray[np.void]]:
    """Returns FFmpeg's motion vectors of every frame but the last."""
    graph = Graph()
    height, width = levels.shape[1:]
    source = graph.add_buffer(width=width, height=height, format="gray", time_base="1/25")
    matched = graph.add("mestimate", f"method={METHOD}:mb_size={BLOCK}:search_param={REACH}")
    sink = graph.add("buffersink")
    source.link_to(matched)
    matched.link_to(sink)
    graph.configure()
    found = []
    for number, frame in enumerate(levels):
        picture = av.VideoFrame.from_ndarray(frame, format="gray")
        picture.pts = number
        graph.push(picture)
        try:
            found.append(graph.pull().side_data.get("MOTION_VECTORS").to_ndarray().copy())
        except NothingYet:
            assert number == 0  # a frame is matched once its successor is there
    return found


def _field(found: NDArray[np.void], size: tuple[int, ...]) -> NDArray[np.int64]:
    """Returns x and y that blocks are moved by, to the frame before and the one after, (2, h, w,
    2)."""
    field = np.zeros((2, size[0] // BLOCK, size[1] // BLOCK, 2), np.int64)
    side = (found["source"] > 0).astype(np.int64)
    rows, columns = found["dst_y"] // BLOCK, found["dst_x"] // BLOCK
    for axis, name in enumerate("xy"):
        steps = found[f"src_{name}"].astype(np.int64) - found[f"dst_{name}"]
        field[side, rows, columns, axis] = steps
    return field
