"""A run as one page: results, course, alarms and responses, decisions with their evidence.

    metaopt report runs/adapt_languages/cpu-20260101-120000
    metaopt report RUN --to page.html

The page is one file of HTML with its figures inside, and is opened by any browser, without a
server. It is ``report.html`` in the directory of the run unless another file is named.
"""

import dataclasses
from pathlib import Path

import tyro

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import local_path, write_text
from metaopt.ranges import Checked
from metaopt.reporting.page import PAGE, page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """A run as one page.

    Attributes:
      run: Directory of a run, finished or not.
      to: File of the page; report.html in the directory of the run if not given.
    """

    run: tyro.conf.Positional[Path]
    to: Path | None = None


def run(config: Config) -> None:
    """Writes the page, and prints where it is.

    Raises:
      UserError: the directory holds no run, or damaged results, or the file cannot be written.
    """
    directory = local_path(config.run)
    if not directory.is_dir():
        raise UserError(f"there is no run {directory}: give its directory")
    log(f"reading {directory}")
    path = directory / PAGE if config.to is None else local_path(config.to)
    write_text(path, page(directory))
    print(path)
