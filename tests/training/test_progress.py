import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import sys
from rich.console import Console
from metaopt import console
from metaopt.training import progress
from metaopt.reporting import tables
console.set_up_output()
name = "π [/bold] \x1b[2J \udcff|"
record = {"table": name, "row": name, "column": "±", "value": 1.0, "ci95": 0.5, "unit": "▁"}
(table,) = tables.arrange([record])
print(tables.to_markdown(table), tables.to_latex(table))
Console().print(*tables.to_rich(table, 80))
console.log(name)
for terminal in (True, False):
    if terminal:
        sys.stderr.isatty = lambda: True
    with progress.Progress(name, total=3) as bar:
        bar.update(3, loss=1.0)
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_is_shown_needs_no_encoding_and_moves_no_cursor(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode(encoding)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "1.00" in out and "3/3" in err and "\\udcff" in out and "\\udcff" in err
    assert "\x1b[2J" not in out + err and "[/bold]" in out
