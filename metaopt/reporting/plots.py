"""Figures, drawn without a display and written as PNG."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from metaopt.console import printable
from metaopt.files import write_bytes

MARKERS = "osD^v<>Ph*"
LINE_STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """A line with a band.

    Attributes:
      mean: Means ``[steps + 1]``.
      ci95: Half-widths ``[steps + 1]``.
    """

    mean: np.ndarray
    ci95: np.ndarray


def new_figure(width: float = 7.0, height: float = 4.4) -> Figure:
    """An empty figure that belongs to no window; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn)
    write_bytes(path, drawn.getvalue())


def overlapping_labels(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that a figure draws over one another, for tests of figures."""
    figure.draw_without_rendering()
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    hidden = {label for axis in axes for label in _labels_outside(axis)}
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t not in hidden]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    pairs = itertools.combinations(boxes, 2)
    return [(one, other) for (one, a), (other, b) in pairs if a.overlaps(b)]


def _labels_outside(axis: Axis) -> Iterator[Artist]:
    """The labels of ticks outside the limits of an axis, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


def label(name: str) -> str:
    """A name from outside as it is.

    Matplotlib would read mathematics into ``$``, and leave out of a legend what begins with ``_``.
    """
    shown = printable(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def adaptation_curves(
    path: Path,
    curves: Mapping[str, Curve],
    differences: Mapping[str, Curve],
    limits: Mapping[str, float],
    *,
    title: str,
    baseline: str,
    unit: str,
    trained_steps: int,
) -> None:
    """Loss on held-out tasks against inner steps, and what each learner gains on a baseline.

    Tasks differ more than learners do, so the bands are on the paired differences.

    Args:
      path: PNG file.
      curves: Loss by name, in the order of the legend.
      differences: Loss of the baseline minus that of the row, by name; a subset of the curves.
      limits: Horizontal lines by name, such as Bayes limits.
      title: Title of the left panel: what the loss is of.
      baseline: Name of the baseline.
      unit: Unit of the loss.
      trained_steps: K, marked by a vertical line.
    """
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2)
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        steps = np.arange(len(curve.mean))
        left.plot(steps, _finite(curve.mean), label=label(name), **style)
        if name in differences:
            mean, half = map(_finite, differences[name])
            right.plot(steps, mean, **style)
            right.fill_between(steps, mean - half, mean + half, color=f"C{i}", alpha=0.12, lw=0)
    for dashes, (name, value) in zip(["--", ":", "-."], limits.items(), strict=False):
        left.axhline(value, color="black", linestyle=dashes, linewidth=1.2, label=label(name))
    left.set(xlabel="inner steps", ylabel=f"query loss, {unit}", title=title)
    right.set(xlabel="inner steps", ylabel=f"{baseline} − row, {unit}", title="Paired gain")
    right.axhline(0, color="black", linewidth=0.8)
    starts = np.array([curve.mean[0] for curve in curves.values()])
    reach = float(np.median(starts[np.isfinite(starts)])) if np.isfinite(starts).any() else np.inf
    _limit(left, [c.mean for c in curves.values()], list(limits.values()), reach)
    _limit(right, [c.mean for c in differences.values()], [0.0], reach)
    for axes in (left, right):
        axes.axvline(trained_steps, color="grey", linewidth=0.8, alpha=0.6)
        axes.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center", frameon=False)
    save(figure, path)


def panels(
    path: Path,
    curves: Mapping[str, Mapping[str, Curve]],
    *,
    x_label: str,
    y_label: str,
    spacing: float = 1.0,
    y_scale: Literal["linear", "log"] = "linear",
) -> None:
    """Curves of the same names in several panels side by side, told apart without colour too.

    Args:
      path: PNG file.
      curves: Curves by the title of a panel and the name in the legend.
      x_label: Label of the horizontal axes.
      y_label: Label of the vertical axes.
      spacing: Distance of the points of a curve on the horizontal axis, from 0 on.
      y_scale: Scale of the vertical axes.
    """
    count = max(map(len, curves.values()))
    figure = new_figure(1.0 + 5.0 * len(curves), 4.0 + 0.1 * count)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, of_panel) in zip(panels, curves.items(), strict=True):
        for i, (name, curve) in enumerate(of_panel.items()):
            mean, half = map(_finite, curve)
            x, every = spacing * np.arange(len(mean)), max(1, len(mean) // 10)
            style = {"color": f"C{i}", "linestyle": LINE_STYLES[i % len(LINE_STYLES)]}
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "markevery": every}
            axes.plot(x, mean, label=label(name), **style)
            axes.fill_between(x, mean - half, mean + half, color=f"C{i}", alpha=0.12, lw=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=label(title), yscale=y_scale)
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)


def lines(
    path: Path,
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> None:
    """Lines over a common axis, both axes logarithmic.

    Args:
      path: PNG file.
      x: Points ``[n]``, positive.
      ys: Values ``[n]``, positive, by the name in the legend.
      x_label: Label of the horizontal axis.
      y_label: Label of the vertical axis.
      title: Title of the figure.
    """
    figure = new_figure()
    axes = figure.subplots()
    for i, (name, y) in enumerate(ys.items()):
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(x, y, label=label(name), color=f"C{i}", marker=marker, markersize=4)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, xscale="log", yscale="log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


def trajectories(
    path: Path,
    points: Mapping[str, np.ndarray],
    *,
    dashed: Mapping[str, np.ndarray] | None = None,
    x_label: str,
    y_label: str,
    title: str,
    y_scale: Literal["linear", "log"] = "linear",
) -> None:
    """Quantities that move on as a run does, each at its own points.

    Args:
      path: PNG file.
      points: Points ``[n, 2]``, x and y, by the name in the legend; NaN and inf are gaps.
      dashed: Lines that belong to some of these, by the same names, drawn in the same colour.
      x_label: Label of the horizontal axis.
      y_label: Label of the vertical axis.
      title: Title of the figure.
      y_scale: Scale of the vertical axis.
    """
    figure = new_figure()
    axes = figure.subplots()
    for i, (name, line) in enumerate(points.items()):
        marker = MARKERS[i % len(MARKERS)]
        (drawn,) = axes.plot(
            line[:, 0], _finite(line[:, 1]), label=label(name), marker=marker, markersize=4
        )
        if dashed and name in dashed:
            other, color = dashed[name], drawn.get_color()
            axes.plot(other[:, 0], _finite(other[:, 1]), color=color, linestyle="--")
    axes.set(xlabel=x_label, ylabel=y_label, title=title, yscale=y_scale)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


def _limit(axes, lines: Sequence[np.ndarray], levels: Sequence[float], reach: float) -> None:
    """The axis up to ``reach`` from its median: a line that diverged does not hide the rest."""
    shown = np.concatenate([*lines, levels])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        median = np.quantile(shown, 0.5, method="lower")  # one of them, so that some are left
        shown = shown[np.abs(shown - median) <= reach]
        low, high = shown.min(), shown.max()
        margin = 0.1 * (high - low) + 1e-9
        axes.set_ylim(low - margin, high + margin)


def _finite(values: np.ndarray) -> np.ndarray:
    """NaN, which is not drawn, in place of infinities."""
    return np.where(np.isfinite(values), values, np.nan)
