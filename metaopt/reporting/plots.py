"""Figures, drawn without a display and written as PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from metaopt.console import printable
from metaopt.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def new_figure(width: float = 7.0, height: float = 4.4) -> "Figure":
    """An empty figure that belongs to no window; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: a start draws nothing
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn)
    write_bytes(path, drawn.getvalue())


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
        steps = np.arange(len(curve.mean))
        _draw(left, i, steps, curve.mean, label=label(name))
        if name in differences:
            _draw(right, i, steps, *differences[name])
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
    entries = left.get_legend_handles_labels()
    figure.legend(*entries, fontsize=8, loc="outside right center", frameon=False)
    _save_with_grids(figure, path)


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
            x, every = spacing * np.arange(len(curve.mean)), max(1, len(curve.mean) // 10)
            line_style = LINE_STYLES[i % len(LINE_STYLES)]
            _draw(axes, i, x, *curve, label=label(name), linestyle=line_style, markevery=every)
        axes.set(xlabel=x_label, ylabel=y_label, title=label(title), yscale=y_scale)
    entries = panels[0].get_legend_handles_labels()
    figure.legend(*entries, fontsize=8, loc="outside lower center", ncols=2)
    _save_with_grids(figure, path)


def trajectories(
    path: Path,
    points: Mapping[str, np.ndarray],
    *,
    dashed: Mapping[str, np.ndarray] | None = None,
    x_label: str,
    y_label: str,
    title: str,
    y_scale: Literal["linear", "log"] = "linear",
    x_ticks: Sequence[float] = (),
) -> None:
    """Lines, each at its own points, such as quantities that move on as a run does.

    Args:
      path: PNG file.
      points: Points ``[n, 2]``, x and y, by the name in the legend; NaN and inf are gaps.
      dashed: Lines that belong to some of these, by the same names, drawn in the same colour.
      x_label: Label of the horizontal axis.
      y_label: Label of the vertical axis.
      title: Title of the figure.
      y_scale: Scale of the vertical axis.
      x_ticks: Labels of the horizontal axis, which is logarithmic if they are given.
    """
    figure = new_figure()
    axes = figure.subplots()
    for i, (name, line) in enumerate(points.items()):
        _draw(axes, i, *line.T, label=label(name))
        if dashed and name in dashed:
            _draw(axes, i, *dashed[name].T, linestyle="--", marker=None)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, yscale=y_scale)
    if x_ticks:
        axes.set_xscale("log")
        axes.set_xticks(x_ticks, [f"{value:g}" for value in x_ticks])
        axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)
    _save_with_grids(figure, path)


def _draw(axes: "Axes", i: int, x: Any, y: Any, half: Any = None, **style: Any) -> None:
    """Line number ``i``, with a band of half-width ``half``; NaN and inf are gaps."""
    marker = MARKERS[i % len(MARKERS)]
    axes.plot(x, _finite(y), **{"color": f"C{i}", "marker": marker, "markersize": 4, **style})
    if half is not None:
        low, high = _finite(y) - _finite(half), _finite(y) + _finite(half)
        axes.fill_between(x, low, high, color=f"C{i}", alpha=0.12, lw=0)


def _save_with_grids(figure: "Figure", path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    save(figure, path)


def _limit(
    axes: "Axes", lines: Sequence[np.ndarray], levels: Sequence[float], reach: float
) -> None:
    """The axis up to ``reach`` from its median: a line that diverged does not hide the rest."""
    shown = np.concatenate([*lines, levels])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        median = np.quantile(shown, 0.5, method="lower")  # one of them, so that some are left
        shown = shown[np.abs(shown - median) <= reach]
        low, high = shown.min(), shown.max()
        margin = 0.1 * (high - low) + 1e-9
        axes.set_ylim(low - margin, high + margin)


def _finite(values: Any) -> np.ndarray:
    """NaN, which is not drawn, in place of infinities."""
    return np.where(np.isfinite(values), values, np.nan)
