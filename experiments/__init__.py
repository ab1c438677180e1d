"""Experiments: each module is a config with presets, the rows of a table, and a call."""

import sys

if sys.argv[:1] == ["-m"]:  # so it is while `python -m experiments.MODULE` imports, for seconds
    from metaopt.cli.huge_pages import restart_with_huge_pages
    from metaopt.cli.stopping import listen

    listen()
    restart_with_huge_pages()
