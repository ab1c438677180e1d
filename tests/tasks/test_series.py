import jax
import numpy as np
import pytest
from scipy import stats

from metaopt import models
from metaopt.errors import UserError
from metaopt.tasks.series import (
    BEGIN,
    NUM_FEATURES,
    NUM_OUTPUTS,
    Series,
    SeriesConfig,
    day_losses,
    features,
    read_series,
    split_date,
    stretches,
    variance,
    walk_forward,
)
from metaopt.types import Batch

DATES = (np.datetime64("2001-01-01") + np.arange(500)).astype(str)
SMALL = SeriesConfig(num_support=20, num_query=5)


def returns(seed=0, number=400):
    return 0.01 * np.random.default_rng(seed).standard_t(5, number)


def series(seed=0, number=400):
    return Series(DATES[:number], returns(seed, number))


def test_the_variance_is_a_weighted_mean_of_the_days_before():
    values, decay = returns(number=30), 0.5 ** (1 / 5)
    weights = decay ** np.arange(12)[::-1]
    wanted = (weights * values[:12] ** 2).sum() / weights.sum()
    np.testing.assert_allclose(variance(values, 5)[12], wanted, rtol=1e-6)


def test_shuffling_the_future_changes_no_past_prediction():
    values, rng = returns(), np.random.default_rng(1)
    other = np.concatenate([values[:250], rng.permutation(values[250:])])
    before, after = features(values), features(other)
    np.testing.assert_array_equal(before[:251], after[:251])  # of the 251st day all is known
    assert not np.array_equal(before[251:], after[251:])
    dates = DATES[:400]
    walks = [walk_forward(Series(dates, x), SMALL, str(dates[200])) for x in (values, other)]
    whole = [i for i in range(len(walks[0].task)) if 200 + 5 * (i + 1) <= 250]
    for i in whole:
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y[i]), *walks)
    assert len(whole) == 10


def test_a_walk_predicts_every_day_of_the_second_part_once():
    one, config = series(number=403), SMALL
    date = split_date({"a": one}, config)
    assert date == DATES[201]
    found = walk_forward(one, config, date)
    np.testing.assert_array_equal(
        found.query.targets.ravel(), one.returns[201 : 201 + found.query.targets.size].astype("f4")
    )
    assert 403 - 201 - found.query.targets.size < config.num_query
    for i in range(len(found.task)):
        start = 201 + 5 * i
        wanted = one.returns[start - 20 : start].astype("f4")
        np.testing.assert_array_equal(found.support.targets[i], wanted)


def test_training_stretches_are_of_the_first_part():
    named = {"a": series(0), "b": series(1)}
    later = Series(DATES[50:450], returns(1))
    assert split_date({"a": series(0), "b": later}, SMALL) == DATES[225]
    found = stretches(named, SMALL).sample(jax.random.key(0), 300)
    for i, name in enumerate(named):
        late = named[name].returns[200:].astype("f4")
        mine = found.task == i
        seen = np.concatenate(
            [found.support.targets[mine].ravel(), found.query.targets[mine].ravel()]
        )
        assert mine.any() and not np.isin(late, seen).any()
    assert BEGIN == 60


def test_the_density_is_student_t_with_the_variance_that_it_says():
    model = models.mlp(NUM_FEATURES, NUM_OUTPUTS, hidden=())
    params = model.init(jax.random.key(3))
    inputs = features(returns()).astype(np.float32)[100:110]
    targets = returns()[100:110].astype(np.float32)
    found, direction = day_losses(model, params, Batch(inputs, targets))
    outputs = np.asarray(model.apply(params, inputs[:, 1:]), np.float64)
    nu = 2.1 + np.log1p(np.exp(outputs[:, 1]))
    spread = np.exp(0.5 * (inputs[:, 0] + outputs[:, 0]))
    frozen = stats.t(nu, scale=spread * np.sqrt((nu - 2) / nu))
    np.testing.assert_allclose(found, -frozen.logpdf(targets), rtol=1e-4)
    np.testing.assert_allclose(frozen.std(), spread, rtol=1e-6)
    up = 1 / (1 + np.exp(-outputs[:, 2]))
    np.testing.assert_allclose(direction, -np.log(np.where(targets > 0, up, 1 - up)), rtol=1e-5)


def test_a_file_is_read_and_days_without_a_logarithm_are_left_out(tmp_path):
    lines = [f"2020-{1 + i // 28:02d}-{1 + i % 28:02d},{100 + i}" for i in range(80)]
    lines.insert(70, "2020-03-14T,-3")
    (tmp_path / "x.csv").write_text("\n".join(["date,value", *lines]), encoding="utf-8")
    found = read_series(tmp_path / "x.csv")
    np.testing.assert_allclose(found.returns, np.diff(np.log(100 + np.arange(80))))


@pytest.mark.parametrize(
    "text", ["a,b\n1,2", "date,value\n2020-01-01,x", "date,value\n2020-01-01,1", ""]
)
def test_what_is_no_series_is_refused(text, tmp_path):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        read_series(tmp_path / "x.csv")
