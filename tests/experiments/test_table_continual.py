import dataclasses

import numpy as np
import pytest

from experiments.table_continual import cleaning, presets, run, slow, volatility
from experiments.table_continual.text import ROWS, measures, settings_of, visits_of
from metaopt.reporting.tables import read_records
from metaopt.tasks.series import SeriesConfig
from metaopt.training.runs import slug

SMOKE = presets("smoke")


def test_the_measures_are_those_of_the_matrix():
    """Two domains: 1 comes first, then 0, then 0 again, then 1 again."""
    order = [(1, 0), (0, 0), (0, 1), (1, 1)]
    losses = np.array([[5.0, 5.0], [4.5, 3.0], [2.0, 4.0], [1.5, 4.2], [2.5, 2.9]])
    found = measures(losses, order)
    assert found["average"].tolist() == [2.5, 2.9]
    assert found["forgetting"].tolist() == [1.0, 0.0]
    assert found["new"].tolist() == [2.0, 3.0]
    assert found["forward transfer"].tolist() == [0.5, 0.0]


def test_every_domain_comes_as_often_and_each_order_is_another():
    config = presets()
    orders = [visits_of(config, seed) for seed in config.orders]
    for order in orders:
        assert sorted(order) == [(d, v) for d in range(12) for v in range(2)]
        assert [visit for _, visit in order] == [0] * 12 + [1] * 12
    assert orders[0] != orders[1]


def test_every_learner_is_tuned_by_as_many_settings():
    assert {len(settings_of(row, presets(), (0.1, 1.0))) for row in ROWS} == {12}
    assert presets().capacity <= 0.05 * 12 * 2 * 600


def test_a_run_writes_the_tables_and_the_figure(tmp_path):
    chosen = [ROWS[0].name, "replay", "drift: Bayes filter", "drift: replay"]
    chosen += ["linear drift: Kalman filter", "linear drift: fine-tuning"]
    chosen += [cleaning.COPIES, "random bytes"]
    run(dataclasses.replace(SMOKE, root=str(tmp_path), rows=tuple(chosen)))
    (place,) = (tmp_path / "table_continual").iterdir()
    records = read_records(place / "results.jsonl")
    assert list(dict.fromkeys(r["row"] for r in records)) == chosen
    assert all(r["value"] is not None or r["unit"].startswith("%") for r in records)
    assert (place / "curves.png").exists()

    def row_file(row):
        return place / "rows" / f"{slug(row)}.npz"

    start = [np.load(x)["losses"][:, 0] for x in map(row_file, chosen[:2])]
    for each in start[1:]:  # all rows start alike
        np.testing.assert_array_equal(each, start[0])


def texts(config):
    rng = np.random.default_rng(0)
    size = 8 * (config.length + 1)
    clean, other = (rng.integers(97, 123, (400, size)).astype(np.int32) for _ in range(2))
    return cleaning.Texts(clean, clean[:0], clean[:0], clean[:0], other)


@pytest.mark.parametrize("kind", cleaning.KINDS)
def test_a_pool_has_the_shares_that_were_asked_for(kind):
    config = presets()
    sizes = dataclasses.replace(config.cleaning, passages=400)
    config = dataclasses.replace(config, cleaning=sizes)
    rng = np.random.default_rng(1)
    pool = cleaning.make_pool(texts(config), cleaning.KINDS[kind], config, rng)
    assert len(pool.passages) == 400 and pool.is_noise.sum() == 120
    assert pool.is_copy.sum() == 200 and not (pool.is_copy & pool.is_noise).any()
    assert len(pool.clean) == 80
    found = cleaning.duplicates_of(pool.passages)
    assert (found & pool.is_copy).sum() >= 0.95 * max(found.sum(), pool.is_copy.sum())


def garch_series(number=500):
    """Returns of a GARCH(1,1) with Student's t."""
    rng, values, sigma2 = np.random.default_rng(0), [], 1e-4
    for _ in range(number):
        values.append(np.sqrt(sigma2 * 6 / 8) * rng.standard_t(8))
        sigma2 = 2e-6 + 0.08 * values[-1] ** 2 + 0.9 * sigma2
    return np.array(values)


def test_the_loss_of_garch_is_that_of_the_library_and_reads_no_future():
    arch = pytest.importorskip("arch")
    values = garch_series()
    fitted = arch.arch_model(100 * values, mean="Zero", dist="t").fit(disp="off")
    nu, sigma = fitted.params["nu"], np.asarray(fitted.conditional_volatility)
    ours = volatility._student_loss(100 * values, sigma, nu)
    np.testing.assert_allclose(-ours.sum(), fitted.loglikelihood, rtol=1e-6)
    found = volatility.garch_losses(values, 400, 20, 440)
    shuffled = np.concatenate([values[:420], values[420:][::-1]])
    other = volatility.garch_losses(shuffled, 400, 20, 440)
    np.testing.assert_array_equal(found[:20], other[:20])
    assert not np.array_equal(found[20:], other[20:])


def test_series_are_walked_through(tmp_path):
    pytest.importorskip("arch")
    for name in "ab":
        prices = np.exp(np.cumsum(garch_series()))
        days = np.datetime64("2020-01-01") + np.arange(500)
        lines = [f"{day},{price}" for day, price in zip(days, prices, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["date,value", *lines]), encoding="utf-8")
    sizes = SeriesConfig(num_support=50, num_query=50)
    small = dataclasses.replace(SMOKE.volatility, series=sizes)
    config = dataclasses.replace(SMOKE, series=str(tmp_path), rows=("all series",))
    run(dataclasses.replace(config, volatility=small, root=str(tmp_path / "runs")))
    (place,) = (tmp_path / "runs" / "table_continual").iterdir()
    found = {(r["row"], r["column"]): r for r in read_records(place / "results.jsonl")}
    assert {row for row, _ in found} == {"series: a", "series: b", "all series"}
    assert np.isfinite([r["value"] for r in found.values()]).all()
    months = found["all series", "gain on GARCH"]["n"]
    assert 1 < months <= found["series: a", "gain on GARCH"]["n"]


def test_a_part_of_what_is_lost_has_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    cost = 1 + 0.1 * rng.standard_normal(500)
    found = cleaning.part_of(0.9 * cost, cost)
    assert found.mean == pytest.approx(90) and found.ci95 < 1e-6  # all of it comes from the cost
    noisy = cleaning.part_of(0.9 + 0.1 * rng.standard_normal(500), cost)
    assert noisy.ci95 == pytest.approx(1.96 * 100 * 0.1345 / np.sqrt(500), rel=0.1)
    assert np.isnan(cleaning.part_of(cost, 0.1 * rng.standard_normal(500)).mean)


def test_examples_of_a_slow_series_read_no_future():
    values = np.random.default_rng(0).normal(size=200).cumsum()
    other = np.concatenate([values[:120], values[120:][::-1]])
    found, shuffled = slow.cut(values, season=12), slow.cut(other, season=12)
    known = 120 - 14  # examples that predict a value before the change
    np.testing.assert_array_equal(found.inputs[: known + 1], shuffled.inputs[: known + 1])
    np.testing.assert_array_equal(found.targets[:known], shuffled.targets[:known])
    assert not np.array_equal(found.targets[known:], shuffled.targets[known:])


def test_least_squares_is_that_of_all_examples_so_far():
    series = slow.cut(np.random.default_rng(1).normal(size=60).cumsum(), season=5)
    errors = slow.least_squares_errors(series, forgetting=0.9)
    x, y = series.inputs[:20].astype(np.float64), series.targets[:20].astype(np.float64)
    weight = np.sqrt(0.9 ** np.arange(20)[::-1])
    prior = np.sqrt(0.9**20) * np.eye(x.shape[1])
    wanted, *_ = np.linalg.lstsq(
        np.concatenate([x * weight[:, None], prior]), np.concatenate([y * weight, prior[0] * 0])
    )
    assert errors[20] == pytest.approx(float(series.targets[20] - wanted @ series.inputs[20]) ** 2)


def test_slow_series_are_followed(tmp_path):
    pytest.importorskip("statsmodels")
    chosen = ("slow: least squares", "slow: rate learned online")
    run(dataclasses.replace(SMOKE, root=str(tmp_path), rows=chosen))
    (place,) = (tmp_path / "table_continual").iterdir()
    found = {(r["row"], r["column"]): r["value"] for r in read_records(place / "results.jsonl")}
    assert {column for _, column in found} == {"sunspots", "CO2", "El Niño"}
    assert found[chosen[0], "sunspots"] > 20  # they have a cycle of 11 years
