"""Figures, drawn without a display and written as PNG."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from metaopt.console import printable
from metaopt.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLES = {
    "random init": ("#999999", "o"),
    "joint pretraining": ("#000000", "s"),
    "Reptile": ("#CC79A7", "D"),
    "FOMAML": ("#56B4E9", "^"),
    "ANIL": ("#8C6D1F", "<"),
    "MAML": ("#0072B2", "v"),
    "per-layer-per-step": ("#E69F00", ">"),
    "Meta-SGD": ("#D55E00", "P"),
    "Meta-SGD on Adagrad": ("#009E73", "*"),
    "iMAML": ("#882255", "X"),
    "MAML++": ("#117733", "p"),
}
"""Colour and marker of the rows that many tables have, the same in all figures.

The colours are those of Okabe and Ito, and for other rows those that Tol calls muted, which
readers who are colour-blind can tell apart. No other row has the colour of one of these.
"""
UNTRAINED = "random init"
"""A row that does not decide what a figure shows: the others would be squeezed."""
_OTHER_COLORS = ("#332288", "#CC6677", "#44AA99", "#AA4499", "#999933", "#88CCEE", "#661100")
_OTHER_MARKERS = "osD^v<>Ph*"
_DIVERGED = 1e6  # what is above is no loss that a figure should show
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


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each row of a figure: those of `STYLES`, and of its own for others."""
    found, others = {}, 0
    for name in names:
        color = _OTHER_COLORS[others % len(_OTHER_COLORS)]
        style = color, _OTHER_MARKERS[others % len(_OTHER_MARKERS)]
        others += name not in STYLES
        found[name] = dict(zip(("color", "marker"), STYLES.get(name, style), strict=True))
    return found


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
    style = styles(curves)
    for name, curve in curves.items():
        steps = np.arange(len(curve.mean))
        _draw(left, steps, curve.mean, label=label(name), **style[name])
        if name in differences:
            _draw(right, steps, *differences[name], **style[name])
    for dashes, (name, value) in zip(["--", ":", "-."], limits.items(), strict=False):
        left.axhline(value, color="black", linestyle=dashes, linewidth=1.2, label=label(name))
    x_label = f"inner steps on the new task (grey: the {trained_steps} trained for)"
    left.set(xlabel=x_label, ylabel=f"query loss, {unit} (lower is better)", title=title)
    right.set(
        xlabel=x_label, ylabel=f"{baseline} − row, {unit}", title="Paired gain (higher is better)"
    )
    right.axhline(0, color="black", linewidth=0.8)
    trained = {n: c for n, c in curves.items() if n != UNTRAINED} or curves
    starts = np.array([curve.mean[0] for curve in curves.values()])
    reach = float(np.median(starts[np.isfinite(starts)])) if np.isfinite(starts).any() else np.inf
    _limit(left, [c.mean for c in trained.values()], list(limits.values()), reach)
    gains = [c.mean for name, c in differences.items() if name in trained]
    _limit(right, gains, [0.0], reach)
    for axes in (left, right):
        axes.axvline(trained_steps, color="grey", linewidth=0.8, alpha=0.6)
    entries = left.get_legend_handles_labels()
    top = left.get_ylim()[1]
    outside = {label(n) for n, c in curves.items() if not np.any(_finite(c.mean) <= top)}
    names = [f"{name} (off the axis)" if name in outside else name for name in entries[1]]
    figure.legend(entries[0], names, fontsize=8, loc="outside right center", frameon=False)
    _save_with_grids(figure, path)


def adaptation_summary(
    path: Path,
    curves: Mapping[str, Curve],
    scores: Mapping[str, tuple[float, float]],
    *,
    title: str,
    y_label: str,
    score_title: str,
    score_label: str,
    trained_steps: int,
    limits: Mapping[str, float] | None = None,
    scale: Literal["linear", "log"] = "linear",
) -> None:
    """How learners adapt step by step, and one number for each, with its name beside it.

    Args:
      path: PNG file.
      curves: What is drawn against the inner steps, by name.
      scores: The number of each row and its half-width, by name, from the top; names that have no
        curve are drawn in black.
      title: Title of the left panel.
      y_label: Label of its vertical axis.
      score_title: Title of the right panel.
      score_label: Label of its horizontal axis.
      trained_steps: K, marked by a vertical line.
      limits: Horizontal lines by name.
      scale: Scale of the curves and the scores.
    """
    figure = new_figure(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    style = styles(curves)
    for name, curve in curves.items():
        shown = np.abs(curve.mean) < _DIVERGED
        shown &= (curve.mean > 0) | (scale == "linear")
        mean = np.where(shown, curve.mean, np.nan)
        _draw(left, np.arange(len(mean)), mean, label=label(name), **style[name])
    lines = zip(LINE_STYLES[1:], (limits or {}).items(), strict=False)
    for dashes, (name, value) in lines:
        left.axhline(value, color="black", linestyle=dashes, linewidth=1.2, label=label(name))
    if limits:
        left.legend(fontsize=8, frameon=False)
    left.axvline(trained_steps, color="grey", linewidth=0.8, alpha=0.6)
    x_label = f"inner steps on the new task (grey: the {trained_steps} trained for)"
    y_label = f"{y_label}\n(lower is better)"
    left.set(xlabel=x_label, ylabel=y_label, title=title, yscale=scale)
    for place, (name, (value, half)) in enumerate(scores.items()):
        of_row = style.get(name, {"color": "black", "marker": "|"})
        right.errorbar(_finite(value), place, xerr=_finite(half), capsize=3, markersize=7, **of_row)
    right.set_yticks(range(len(scores)), [label(name) for name in scores])
    for tick, name in zip(right.get_yticklabels(), scores, strict=True):
        tick.set_color(style.get(name, {"color": "black"})["color"])
    right.set(ylim=(len(scores) - 0.5, -0.5), xlabel=score_label, title=score_title, xscale=scale)
    if scale == "log":
        _plain_ticks(left.yaxis)
        _plain_ticks(right.xaxis)
    _save_with_grids(figure, path)


def _plain_ticks(axis: "Axis") -> None:
    """0.01, 0.02, 0.05 ... on a logarithmic axis, in place of powers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


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
        style = styles(of_panel)
        for i, (name, curve) in enumerate(of_panel.items()):
            x, every = spacing * np.arange(len(curve.mean)), max(1, len(curve.mean) // 10)
            line_style = LINE_STYLES[i % len(LINE_STYLES)]
            more = {"label": label(name), "linestyle": line_style, "markevery": every}
            _draw(axes, x, *curve, **style[name], **more)
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
    from matplotlib.ticker import MaxNLocator

    figure = new_figure()
    axes = figure.subplots()
    style = styles(points)
    for name, line in points.items():
        _draw(axes, *line.T, label=label(name), **style[name])
        if dashed and name in dashed:
            _draw(axes, *dashed[name].T, **(style[name] | {"linestyle": "--", "marker": None}))
    axes.set(xlabel=x_label, ylabel=y_label, title=title, yscale=y_scale)
    if x_ticks:
        axes.set_xscale("log")
        axes.set_xticks(x_ticks, [f"{value:g}" for value in x_ticks])
        axes.xaxis.minorticks_off()
    elif all(np.all(line[:, 0] % 1 == 0) for line in points.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if y_scale == "log":
        _plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, frameon=False)
    _save_with_grids(figure, path)


def course(lines: Mapping[str, np.ndarray], marks: Sequence[float], *, title: str) -> bytes:
    """Losses of one training by step, as PNG.

    Args:
      lines: Points ``[n, 2]``, step and value, by the name in the legend; ``held out`` is black.
      marks: Steps at which something was changed.
      title: Title of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.0, 2.8)
    axes = figure.subplots()
    for name, points in lines.items():
        color = "#000000" if name == "held out" else "#56B4E9"
        marker = "o" if len(points) < 30 else None
        _draw(axes, *points.T, label=label(name), color=color, marker=marker, lw=1.2)
    for mark in marks:
        axes.axvline(mark, color="#D55E00", lw=0.8, ls=":")
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title(label(title), fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    return drawn.getvalue()


def _draw(axes: "Axes", x: Any, y: Any, half: Any = None, **style: Any) -> None:
    """A line, with a band of half-width ``half``; NaN and inf are gaps."""
    axes.plot(x, _finite(y), **{"markersize": 4, **style})
    if half is not None:
        low, high = _finite(y) - _finite(half), _finite(y) + _finite(half)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


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
