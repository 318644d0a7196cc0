"""Draws curves.png of a run from its metrics.csv, for its page, too: losses, what validations
measured, learning rate."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from acetate.callbacks.metrics_file import MetricsFile, direction, measured, read_metrics
from acetate.pages.of_run import CURVES, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, float]]

INK, GREY, GRID = "#22262b", "#8a9099", "#e6e8eb"
COLORS = ("#3266c9", "#d9622b", "#2f9e62", "#a03fb0", "#c7a008", "#1aa3b8", "#c93a53", "#7a5c45")
VIEWS = {"alpha": COLORS[0], "soft": COLORS[1], "hard": COLORS[2], "rgb": COLORS[1]}
DASHES = {"edge": (0, (1, 1.2)), "perceptual": (0, (4, 1.5))}  # terms of a view's loss beside l1
CELL, AXES = (5.6, 3.2), (3.4, 2.45)  # inches, of a panel and within it; names stand on the right
WIDE = 400  # points of a line; more are averaged
LOG_FROM = 4.0  # largest over smallest from which on a logarithmic axis shows more
ROOM = 0.072  # of a panel's height, for the name of a line


class Panel(NamedTuple):
    """Lines that share an axis: names of their columns, and what all of those begin with."""

    title: str
    names: Sequence[str]
    prefix: str = ""
    log: bool = True


class Curves(Callback):
    """Draws the curves after each validation and at the end of training, on rank 0.

    directory: that of metrics.csv, and of curves.png. A fault in drawing is said and stops nothing.
    """

    def __init__(self, directory: str):
        self.directory = Path(directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.save()
        try:
            draw(
                read_metrics(self.directory / "metrics.csv"),
                self.directory / CURVES,
                _title(self.directory),
            )
            write(self.directory)  # which shows them below the clips
        except Exception as error:  # a picture is worth less than the run
            rank_zero_warn(f"curves.png is not drawn: {error}")


def _title(run: Path) -> str:
    return "/".join(run.absolute().parts[-2:])


def draw(metrics: Mapping[str, Points], path: Path, title: str) -> None:
    """Draws metrics, as `read_metrics` finds them, into a file; writes nothing where there are
    none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in plan(metrics) if panel.names]
    if not panels:
        return
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = CELL[0] * columns, CELL[1] * rows + 0.5
    figure = Figure(figsize=(width, height), dpi=100)
    last = max(points[-1][0] for points in metrics.values())
    heading = f"{title}   step {last:,}   ★ best, with its value"
    figure.text(0.2 / width, 1 - 0.3 / height, heading, fontsize=12, color=INK, va="center")
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left, bottom = CELL[0] * column + 0.65, CELL[1] * (rows - 1 - row) + 0.4
        box = (left / width, bottom / height, AXES[0] / width, AXES[1] / height)
        _draw_panel(figure.add_axes(box), panel, metrics, last)
    temporary = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, path)


def plan(metrics: Mapping[str, Points]) -> list[Panel]:
    """Returns the panels in the order in which they are drawn, those without lines included."""

    def of(prefix: str, *ends: str) -> list[str]:
        names = sorted(name for name in metrics if name.startswith(prefix))
        return [name for name in names if not ends or name.rsplit("/")[-1].startswith(ends)]

    parts = [name for name in of("train/") if name != "train/loss"]
    return [
        Panel("loss", [name for name in ("train/loss", "val/loss") if name in metrics]),
        Panel("parts of the training loss", parts if len(parts) > 1 else [], "train/"),
        Panel("validation: PSNR, dB", of("val/", "psnr"), "val/", log=False),
        Panel("validation: SSIM", of("val/", "ssim"), "val/", log=False),
        Panel("validation: absolute error of alpha", of("val/alpha/", "mae"), "val/alpha/"),
        Panel("validation: LPIPS", of("val/", "lpips"), "val/", log=False),
        Panel("validation loss by timestep", of("val_t/"), "val_t/"),
        Panel("training loss by timestep", of("train_t/"), "train_t/"),
        Panel("learning rate", of("lr-"), "lr-", log=False),
    ]


def _draw_panel(axis: "Axes", panel: Panel, metrics: Mapping[str, Points], last: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    ends = []
    for place, name in enumerate(panel.names):
        points, label = metrics[name], name.removeprefix(panel.prefix)
        x, y = _thinned(points)
        style = _style(name, label, place, len(panel.names))
        color = style["color"]
        if name.endswith("mae_of_mean"):
            label = "of the mean alpha"
        elif measured(name):
            best = (max if direction(name) == "max" else min)(points, key=lambda point: point[1])
            axis.plot(
                *best,
                "*",
                markersize=12,
                color=color,
                markeredgecolor="white",
                zorder=5,
                clip_on=False,
            )
            label = f"{label}  {best[1]:.{4 if abs(best[1]) >= 1 else 3}g}"
            if len(x) <= 60:
                style |= {"marker": "o", "markersize": 3.2}
        elif not name.startswith("lr-") and len(y) > 30:
            axis.plot(x, y, color=color, linewidth=0.8, alpha=0.25)
            y = _smooth(y)
        axis.plot(x, y, **style)
        ends.append((float(y[-1]), label, color))
    values = np.array([value for name in panel.names for _, value in metrics[name]])
    if panel.log and values.min() > 0 and values.max() > LOG_FROM * values.min():
        axis.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    axis.set_xlim(0, max(last, 1))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=GREY, labelsize=8.5, which="both", length=0)
    axis.spines[:].set_visible(False)
    if ends and panel.title != "learning rate":
        _label(axis, ends)


def _style(name: str, label: str, place: int, count: int) -> dict[str, Any]:
    """Chooses colour by view and dashes by term of a VIEW/TERM, and shades where lines have an
    order."""
    view, _, term = label.rpartition("/")
    color = VIEWS.get(view, COLORS[(place + 3 * (count > 6)) % len(COLORS)])
    if name in ("train/loss", "val/loss"):
        color = GREY if name == "train/loss" else COLORS[0]
    elif name.endswith("mae_of_mean"):
        return {"color": GREY, "linewidth": 1.0, "linestyle": (0, (2, 2))}
    elif name.startswith(("val_t/", "train_t/")):
        from matplotlib import colormaps

        color = colormaps["viridis"](0.85 * place / max(count - 1, 1))
    return {"color": color, "linewidth": 1.6, "linestyle": DASHES.get(term, "-")}


def _label(axis: "Axes", ends: list[tuple[float, str, Any]]) -> None:
    """Writes names at the right ends of their lines, moved apart where they would overlap."""
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = [float(to_axes.transform((0, value))[1]) for value, _, _ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    places: list[float] = []
    for index in order:
        places.append(max(heights[index], places[-1] + ROOM if places else 0.0))
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - ROOM
    for place, index in zip(places, order, strict=True):
        _, label, color = ends[index]
        axis.annotate(
            label, (1.03, place), xycoords="axes fraction", fontsize=8.5, color=color, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _thinned(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values; where there are more than fit, means over neighbours."""
    array = np.array(points, dtype=float).T
    size = -(-array.shape[1] // WIDE)
    whole = array[:, : array.shape[1] // size * size].reshape(2, -1, size).mean(2)
    return whole[0], whole[1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the mean over a twentieth of the line around each point."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
