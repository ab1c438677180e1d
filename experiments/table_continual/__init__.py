"""Streams of text: who learns the new without losing the old, and whose data are worth it.

`continual/text`: a small transformer, pretrained on other domains, reads 12 domains one after
another, each twice, every sequence once. Beside plain fine-tuning: a penalty on the distance to the
start, elastic weight consolidation (Kirkpatrick et al., 2017), fast and slow weights, replay of a
sample of at most 5 % of the stream (Chaudhry et al., 2019) and online meta-learning with the same
memory (Finn et al., 2019; Gupta et al., 2020). Each is tuned by 12 settings on a stream of other
domains. `continual/cleaning`: copies and noise are put into data; they are found by MinHash, and by
a rater that meta-gradients teach (Calian et al., 2025).

    python -m experiments.table_continual                     # Python's own library
    python -m experiments.table_continual --folder FOLDER     # under an hour and a half, two cores
    python -m experiments.table_continual --preset smoke
"""

from pathlib import Path

from experiments import harness
from experiments.table_continual import cleaning, text
from experiments.table_continual.config import Config, presets
from metaopt.self_improvement.improving import RATES_ALONE
from metaopt.tasks.sources.text import fingerprint, folder_domains, stdlib_domains
from metaopt.tasks.sources.text_checks import check_text

__all__ = ["Config", "presets", "run"]


def run(config: Config) -> None:
    """Trains the rows, and writes the tables and the figure."""
    train_fn = harness.begin(config, RATES_ALONE)
    rows = [row.name for row in (*text.ROWS, *cleaning.ROWS)]
    chosen = harness.select([*text.ROWS, *cleaning.ROWS], config.rows)
    domains = stdlib_domains() if config.folder is None else folder_domains(Path(config.folder))
    streams = text.Study(config, domains) if any(r in text.ROWS for r in chosen) else None
    cleaned = cleaning.Study(config, domains) if any(r in cleaning.ROWS for r in chosen) else None
    check_text(domains)
    table = harness.TableRun(
        "table_continual",
        config,
        presets,
        table=text.TABLE,
        unit="bits/byte",
        rows=rows,
        seeds=[config.seed],
        data=fingerprint(domains),
    )
    if cleaned is not None:
        cleaning.add_rows(table, cleaned, [row for row in cleaning.ROWS if row in chosen])
    if streams is not None:
        text.add_rows(table, streams, [row for row in text.ROWS if row in chosen], train_fn)
    table.finish(text.notes(table, config))
