"""The one-way order of imports, read from the source, so that no import is run to find out."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "metaopt"
FILES = sorted(ROOT.rglob("*.py"))
OTHERS = [p for d in ("experiments", "benchmarks") for p in (ROOT.parent / d).rglob("*.py")]
ORDER = [
    {"console"},
    {"types", "errors"},
    {"files", "frozen", "ranges", "indices", "npz", "parts", "pytrees", "signals"},
    {"losses", "models", "measure", "parallel", "statistics"},
    {"adapted_file", "checks", "eager"},
    {"tasks", "rematerialization", "resources", "timing"},
    {"autotune", "optimizers"},
    {"inner_loop"},
    {"learners", "meta_gradients"},
    {"outer_step", "diagnostics"},
    {"sequence", "streams"},
    {"evaluate", "training"},
    {"pretrained"},
    {"reporting"},
    {"fit"},
    {"comparison"},
    {"languages"},
    {"loaded"},
    {"load"},
    {"evolution", "self_improvement"},
    {"cli"},
    {"__main__"},
]
RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}


def unit(path):
    """The top-level module or folder of metaopt that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """The full dotted names of all that a file imports, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = unit(path)
    if here == "__init__":
        assert "metaopt" not in roots(path)
        return
    assert here in RANK, f"give {here} its place in ORDER"
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "metaopt" and rest and rest[0] != here:
            assert RANK[rest[0]] < RANK[here], f"{here} imports {rest[0]}"


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_modules_import_one_another():
    """Nor a circle of more; an import inside a function counts."""
    modules = {module_name(path): path for path in [*FILES, *OTHERS]}

    def module_of(name):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {module_of(imported) for imported in imports(path)} - {"", name}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def files_that_import(package):
    return {str(path.relative_to(ROOT)) for path in FILES if package in roots(path)}


def test_each_library_has_its_place():
    assert files_that_import("experiments") == set()
    assert {Path(name).parts[0] for name in files_that_import("flax")} == {"models"}
    assert files_that_import("tensorflow_datasets") == {"tasks/sources/tfds.py"}
    assert (
        "orbax" in roots(ROOT / "training" / "checkpoint.py")
        and len(files_that_import("orbax")) == 1
    )
    for name in ("errors", "files", "reporting/tables"):  # read and watch without JAX
        assert roots(ROOT / f"{name}.py") <= {*sys.stdlib_module_names, "rich", "metaopt"}


def test_arrays_are_read_by_one_reader():
    files = [*FILES, *OTHERS]
    loading = [
        str(p) for p in files if re.search(r"\b(np|numpy|jnp)\.load\(", p.read_text("utf-8"))
    ]
    assert not loading, "metaopt.npz reads arrays"


def test_devices_are_named_in_one_file():
    names = {"devices", "local_devices", "device_count", "local_device_count", "pmap", "shard_map"}

    def named(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jax":
                yield node.attr

    users = {(str(p.relative_to(ROOT)), name) for p in FILES for name in names & {*named(p)}}
    assert users == {
        ("parallel.py", "devices"),
        ("parallel.py", "pmap"),
        ("training/runs.py", "devices"),  # for the name of the device in the results
    }


def test_every_text_file_has_its_encoding():
    """Or it would be that of the machine: cp1252 on some, ASCII on others."""
    opening = {"open", "read_text", "write_text", "fdopen", "TemporaryFile", "NamedTemporaryFile"}

    def without(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            binary = any(re.fullmatch("[rwaxb+]*b[rwaxb+]*", str(mode)) for mode in modes)
            ours = name in ("read_text", "write_text")  # of metaopt.files, which are UTF-8
            binary |= name == "archive.open"  # of a zip, whose members are bytes
            opens_text = name.split(".")[-1] in opening and not binary and not ours
            if (opens_text or "text" in options) and "encoding" not in options:
                yield f"{path}:{node.lineno}"

    files = [*FILES, *OTHERS]
    assert not [place for path in files for place in without(path)]
