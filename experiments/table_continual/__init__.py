"""Streams of text: who learns the new without losing the old, and whose data are worth it.

`continual/text`: a small transformer, pretrained on other domains, reads 12 domains one after
another, each twice, every sequence once. Beside plain fine-tuning: a penalty on the distance to the
start, elastic weight consolidation (Kirkpatrick et al., 2017), fast and slow weights, replay of a
sample of at most 5 % of the stream (Chaudhry et al., 2019) and online meta-learning with the same
memory (Finn et al., 2019; Gupta et al., 2020). Each is tuned by 12 settings on a stream of other
domains. `continual/drifting`: Markov languages that change, beside the exact Bayes filter (Adams
and MacKay, 2007). `continual/cleaning`: copies and noise are put into data; they are found by
MinHash, and by a rater that meta-gradients teach (Calian et al., 2025). `continual/volatility`,
with ``--series FOLDER``: the density of the next day's price, beside GARCH(1,1). `continual/slow`,
if statsmodels is installed: sunspots, CO2 and the temperature of the Pacific.

    python -m experiments.table_continual                     # Python's own library
    python -m experiments.table_continual --folder FOLDER     # under an hour and a half, two cores
    python -m experiments.table_continual --preset smoke
"""

from pathlib import Path

from experiments import harness
from experiments.table_continual import cleaning, drifting, slow, text, volatility
from experiments.table_continual.config import Config, presets
from metaopt.pytrees import digest_of
from metaopt.self_improvement.improving import RATES_ALONE
from metaopt.tasks.sources.text import fingerprint, folder_domains, stdlib_domains
from metaopt.tasks.sources.text_checks import check_text

__all__ = ["Config", "presets", "run"]


def run(config: Config) -> None:
    """Trains the rows, and writes the tables and the figure."""
    train_fn = harness.begin(config, RATES_ALONE)
    prices = {} if config.series is None else volatility.read_all(config.series)
    of_series = [volatility.Row(name) for name in ([volatility.ALL] if prices else [])]
    known = [*text.ROWS, *drifting.ROWS, *cleaning.ROWS, *of_series]
    known += slow.ROWS if slow.is_installed() else ()
    chosen = harness.select(known, config.rows)
    domains = stdlib_domains() if config.folder is None else folder_domains(Path(config.folder))
    streams = text.Study(config, domains) if any(r in text.ROWS for r in chosen) else None
    cleaned = cleaning.Study(config, domains) if any(r in cleaning.ROWS for r in chosen) else None
    of_prices = volatility.Study(config, prices) if any(r in of_series for r in chosen) else None
    check_text(domains)
    table = harness.TableRun(
        "table_continual",
        config,
        presets,
        table=text.TABLE,
        unit="bits/byte",
        rows=[row.name for row in known],
        seeds=[config.seed],
        data="-".join([fingerprint(domains), *(digest_of(x.returns) for x in prices.values())]),
    )
    if any(row in drifting.ROWS for row in chosen):
        rows = [row for row in drifting.ROWS if row in chosen]
        drifting.add_rows(table, config, rows, train_fn)
    if any(row in slow.ROWS for row in chosen):
        slow.add_rows(table, config, [row for row in slow.ROWS if row in chosen])
    if of_prices is not None:
        volatility.add_rows(table, of_prices, train_fn)
    if cleaned is not None:
        cleaning.add_rows(table, cleaned, [row for row in cleaning.ROWS if row in chosen])
    if streams is not None:
        text.add_rows(table, streams, [row for row in text.ROWS if row in chosen], train_fn)
    table.finish(text.notes(table, config))
