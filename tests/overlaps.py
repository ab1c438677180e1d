"""Texts that a figure draws over one another."""

import itertools
from collections.abc import Iterator

from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text


def overlapping_labels(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that a figure draws over one another."""
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
