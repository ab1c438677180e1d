import warnings

import numpy as np
import pytest
from matplotlib.image import imread
from overlaps import overlapping_labels

from metaopt.console import printable
from metaopt.reporting.plots import (
    STYLES,
    Curve,
    adaptation_curves,
    adaptation_summary,
    new_figure,
    panels,
    styles,
    trajectories,
)

STEPS = np.arange(4.0)
GOOD = Curve(3 - STEPS / 10, np.full(4, 0.1))


def draw(path, curves, differences, limits):
    labels = {"title": "Held-out tasks", "baseline": "joint", "unit": "nats/token"}
    adaptation_curves(path, curves, differences, limits, trained_steps=2, **labels)
    return imread(path)


def figure_of(monkeypatch, path, *args):
    """The figure that is drawn, before it is gone."""
    made = []
    monkeypatch.setattr(
        "metaopt.reporting.plots.new_figure",
        lambda *size: made.append(new_figure(*size)) or made[0],
    )
    draw(path, *args)
    return made[0]


BAD = {
    "nan": Curve(np.full(4, np.nan), np.full(4, np.nan)),
    "infinite": Curve(np.array([3.0, np.inf, -np.inf, np.nan]), np.array([0.1, np.inf, np.nan, 0])),
    "huge": Curve(np.array([3.0, 1e30, 1e300, 2.0]), np.zeros(4)),
}


@pytest.mark.parametrize("names", [("nan",), ("infinite",), ("huge",), ("nan", "infinite", "huge")])
@pytest.mark.parametrize("limits", [{}, {"Bayes": 2.0}, {"Bayes": np.nan}])
def test_a_picture_comes_out_whatever_diverged(tmp_path, names, limits):
    curves = {name: BAD[name] for name in names}
    with warnings.catch_warnings():  # not pytest's mark, which another test's garbage can fail
        warnings.simplefilter("error")
        picture = draw(tmp_path / "bad.png", curves, curves, limits)
    assert picture.shape == (660, 1650, 4)


def test_panels_have_the_curves_that_they_are_given(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves = {"one": {"good": GOOD, **BAD}, "$": {"good": GOOD}}
        panels(tmp_path / "p.png", curves, x_label="steps", y_label="nats", spacing=0.5)
    assert imread(tmp_path / "p.png").std() > 0.01


def test_a_row_that_diverged_does_not_hide_the_others(tmp_path, monkeypatch):
    curves = {f"row {i}": GOOD for i in range(15)} | {"huge": BAD["huge"], "nan": BAD["nan"]}
    figure = figure_of(monkeypatch, tmp_path / "curves.png", curves, {}, {"Bayes": 2.5})
    low, high = figure.axes[0].get_ylim()
    assert 1.5 < low < 2.5 and 3 < high < 4


def test_any_name_is_in_the_legend_as_it_is(tmp_path, monkeypatch):
    names = ["$", r"a $\frac$ b", "_private", "a\nb", "\x1b[31m", "\udcff", "%"]
    figure = figure_of(monkeypatch, tmp_path / "c.png", dict.fromkeys(names, GOOD), {}, {})
    (legend,) = figure.legends
    shown = [text.get_text().replace(r"\$", "$").strip() for text in legend.get_texts()]
    assert shown == [printable(name) for name in names]
    options = {"x_label": "", "y_label": "", "title": ""}
    trajectories(tmp_path / "t.png", dict.fromkeys(names, np.ones((2, 2))), **options)


def test_every_row_and_limit_is_in_the_legend_and_the_baseline_has_no_gain(tmp_path, monkeypatch):
    rows = {"joint": GOOD, "MAML": Curve(GOOD.mean - 0.3, GOOD.ci95)}
    gains = {"MAML": Curve(np.full(4, 0.3), np.full(4, 0.01))}
    figure = figure_of(monkeypatch, tmp_path / "curves.png", rows, gains, {"Bayes": 2.5})
    left, right = figure.axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["joint", "MAML", "Bayes"]
    drawn = [line.get_ydata() for line in right.lines if len(line.get_ydata()) == 4]
    np.testing.assert_array_equal(drawn, [np.full(4, 0.3)])
    assert "nats/token" in left.get_ylabel() and "joint" in right.get_ylabel()
    assert not overlapping_labels(figure)


def test_trajectories_are_drawn_each_at_its_own_points(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "metaopt.reporting.plots.new_figure",
        lambda *size: made.append(new_figure(*size)) or made[0],
    )
    points = {
        "one": np.array([[0.0, 3.0], [5.0, 2.0]]),
        "two": np.array([[0.0, np.inf], [9.0, 1.0]]),
    }
    path = tmp_path / "curves.png"
    trajectories(path, points, x_label="tokens", y_label="loss", title="runs")
    one, two = made[0].axes[0].lines
    np.testing.assert_array_equal(one.get_xydata(), points["one"])
    assert np.isnan(two.get_ydata()[0]) and two.get_ydata()[1] == 1.0
    assert path.exists() and not overlapping_labels(made[0])


def test_no_label_of_logarithmic_axes_is_over_another(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "metaopt.reporting.plots.new_figure",
        lambda *size: made.append(new_figure(*size)) or made[0],
    )
    sizes = [4, 8, 16, 32, 64, 128]
    points = np.stack([sizes, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]], axis=1)
    options = {"x_label": "width", "y_label": "seconds", "title": "a step"}
    path, names = tmp_path / "l.png", ("reverse", "mixed mode")
    trajectories(path, dict.fromkeys(names, points), y_scale="log", x_ticks=sizes, **options)
    assert [text.get_text() for text in made[0].axes[0].get_xticklabels()] == list(map(str, sizes))
    assert not overlapping_labels(made[0])


def test_labels_that_are_drawn_over_one_another_are_found():
    figure = new_figure(4.0, 3.0)
    axes = figure.subplots()
    axes.plot([0, 1, 2, 3], [0, 1, 2, 3])
    axes.set(title="title", xlabel="x")
    names = ["a long name of a setting " * 2, "another long name " * 2, "outside", "outside too"]
    axes.set_xticks(range(4), names)
    axes.set_xlim(0, 1)
    assert overlapping_labels(figure) == [(names[0], names[1])]
    axes.tick_params(axis="x", rotation=90)
    assert not overlapping_labels(figure)


def test_a_row_has_its_style_in_every_figure_and_no_two_look_alike():
    some, all_of = styles(["mine", "MAML"]), styles([*STYLES, "mine", "yours"])
    assert some["MAML"] == all_of["MAML"] and some["mine"] == all_of["mine"]
    assert len({(s["color"], s["marker"]) for s in all_of.values()}) == len(all_of)
    assert not {all_of["mine"]["color"], all_of["yours"]["color"]} & {c for c, _ in STYLES.values()}


def test_an_untrained_row_does_not_squeeze_the_others(tmp_path, monkeypatch):
    far = Curve(np.full(4, 4.5), np.full(4, 0.1))
    curves = {"random init": far, "MAML": GOOD}
    figure = figure_of(monkeypatch, tmp_path / "c.png", curves, {}, {"Bayes": 2.5})
    assert figure.axes[0].get_ylim()[1] < 3.5
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["random init (off the axis)", "MAML", "Bayes"]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_summary_names_every_score_and_shows_whatever_diverged(tmp_path, monkeypatch, scale):
    made = []
    monkeypatch.setattr(
        "metaopt.reporting.plots.new_figure",
        lambda *size: made.append(new_figure(*size)) or made[0],
    )
    scores = {"MAML": (0.02, 0.01), "nan": (np.nan, np.nan), "hill climbing": (0.1, np.inf)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptation_summary(
            tmp_path / "s.png",
            {"MAML": Curve(np.array([1.0, 0.1, -0.01]), np.full(3, 0.01)), **BAD},
            scores,
            title="left",
            y_label="gap",
            score_title="right",
            score_label="gap",
            trained_steps=1,
            limits={"unigram": 0.5},
            scale=scale,
        )
    figure = made[0]
    ticks = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert ticks == list(scores) and not overlapping_labels(figure)
