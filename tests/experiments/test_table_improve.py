import json

import pytest

from experiments import harness, table_improve
from metaopt.errors import UserError

ROW = "joint pretraining, 400 steps, 30 times too small"
RUN = "--preset smoke --steps 400 --num-trials 2 --inner.num-steps 1 --comparison.test-episodes 8"


def test_a_bad_rate_is_repaired_and_what_it_costs_is_written(tmp_path):
    args = [*RUN.split(), "--root", str(tmp_path), "--rows", ROW]
    harness.main("table_improve", table_improve.run, table_improve.presets, "", args)
    (results,) = tmp_path.glob("table_improve/*/results.jsonl")
    cells = {}
    for line in results.read_text("utf-8").splitlines():
        record = json.loads(line)
        assert (record["table"], record["row"]) == ("improve/text", ROW)
        cells[record["column"]] = record
    assert set(cells) == {"ratio to tuned", "time ratio", "trials"}
    (end,) = cells["ratio to tuned"]["settings"]
    assert end["outer_learning_rate"] > 3 * cells["ratio to tuned"]["start_rate"]
    assert 0 < cells["trials"]["value"] < 30


@pytest.mark.parametrize("flags", ["--rates 0.1 0.1", "--tasks markov --model bigram"])
def test_what_the_table_is_not_of_is_refused(flags):
    with pytest.raises((UserError, SystemExit)):
        harness.parse("table_improve", table_improve.presets, "", flags.split())
