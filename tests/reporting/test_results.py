import json
import math

from metaopt.reporting import results
from metaopt.reporting.results import cell_maker
from metaopt.reporting.tables import arrange, to_markdown
from metaopt.statistics import Interval

CELL = cell_maker(
    table="toy", preset="smoke", command="python -m experiments.toy", seeds=(3,), episodes=8
)


def test_a_record_says_how_to_make_it_again():
    record = CELL("MAML", "5 steps", Interval(2.5, 0.125, 4), "nats/token", better="lower")
    assert record | {"device": "", "versions": {}, "commit": ""} == {
        "table": "toy",
        "row": "MAML",
        "column": "5 steps",
        "value": 2.5,
        "ci95": 0.125,
        "unit": "nats/token",
        "n": 4,
        "episodes": 8,
        "seeds": [3],
        "paper": None,
        "source": None,
        "preset": "smoke",
        "device": "",
        "versions": {},
        "commit": "",
        "command": "python -m experiments.toy",
        "better": "lower",
    }
    assert {"jax", "metaopt"} <= set(record["versions"]) and "CPU" in record["device"]


def test_what_is_not_finite_is_written_as_json_and_shown_as_a_dash():
    records = [
        CELL("diverged", "loss", Interval(math.inf, math.nan, 4), "nats"),
        CELL("one task", "loss", Interval(2.5, math.nan, 1), "nats"),
        CELL("MAML", "loss", Interval(2.0, 0.4, 4), "nats"),
    ]
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    (table,) = arrange(records)
    lines = to_markdown(table).splitlines()[2:5]
    assert lines == ["| diverged | – |", "| one task | 2.500 |", "| MAML | **2.00 ± 0.40** |"]


def test_a_line_says_on_which_side_of_a_published_number_a_cell_is():
    def record(value):
        shared = {"row": "MAML", "column": "5-shot", "ci95": 0.05, "source": "S"}
        return shared | {"value": value, "paper": 1.13, "paper_ci95": 0.18}

    lines = results.beside_published(map(record, (0.9, 1.0, 1.4, None)))
    assert [line.split(", ")[2].split(" the ")[0] for line in lines] == ["below", "within", "above"]
    assert lines[1] == "MAML, 5-shot: 1.000 ± 0.050, within the published 1.13 ± 0.18; S"
