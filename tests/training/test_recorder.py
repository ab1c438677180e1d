import subprocess
import sys

import pytest

from metaopt.training.recorder import TensorBoard

FULL = """
import resource, sys
from pathlib import Path
from metaopt.training.recorder import TensorBoard

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
curves = TensorBoard(Path(sys.argv[1]), 0)
for step in range(2000):
    curves.add_scalars(step, {"loss": 1.0, "rate": float("nan"), "vector": [1.0]})
curves.close()
"""


def test_a_full_disk_ends_the_curves_and_not_the_training(tmp_path):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path) in done.stderr


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    curves = TensorBoard(tmp_path / "file" / "curves", 3)
    for step in range(3):
        curves.add_scalars(step, {"loss": 1.0})
    curves.close()
    assert len(capsys.readouterr().err.splitlines()) == 1
