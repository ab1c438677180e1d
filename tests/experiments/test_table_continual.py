import dataclasses

import numpy as np

from experiments.table_continual import ROWS, measures, presets, run, settings_of, visits_of
from metaopt.reporting.tables import read_records

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
    assert {len(settings_of(row, presets())) for row in ROWS} == {12}
    assert presets().capacity <= 0.05 * 12 * 2 * 600


def test_a_run_writes_the_table_and_the_figure(tmp_path):
    run(dataclasses.replace(SMOKE, root=str(tmp_path)))
    (place,) = (tmp_path / "table_continual").iterdir()
    records = read_records(place / "results.jsonl")
    assert list(dict.fromkeys(r["row"] for r in records)) == [row.name for row in ROWS]
    assert all(np.isfinite(r["value"]) for r in records)
    assert (place / "curves.png").exists()
    start = [np.load(x)["losses"][:, 0] for x in (place / "rows").iterdir()]
    for each in start[1:]:  # all rows start alike
        np.testing.assert_array_equal(each, start[0])
