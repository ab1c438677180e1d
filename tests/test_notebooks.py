import os
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def execute(notebook, path):
    """The notebook as a kernel of the Python that runs the tests leaves it.

    In a process of its own: a client of a kernel leaves sockets and an event loop to the garbage
    collector, which then fails whatever test it happens to run in.
    """
    nbformat.write(notebook, path)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=120", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_smoke_size_and_draws(path, tmp_path):
    notebook = read(path)
    (parameters,) = filter(is_parameters, notebook.cells)
    assert parameters.source.count("SMOKE = False") == 1
    parameters.source = parameters.source.replace("SMOKE = False", "SMOKE = True")
    executed = execute(notebook, tmp_path / path.name)
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    pictures = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert pictures and all(len(picture) > 10_000 for picture in pictures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_what_running_it_left(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"tags"}


def test_there_are_notebooks():
    assert NOTEBOOKS
