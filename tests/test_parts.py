"""Parts of the user's own, by flags."""

import subprocess
import sys
import textwrap

import pytest

from metaopt.errors import UserError
from metaopt.parts import load_part, make_part

OWN = """
    from pathlib import Path

    NUMBER = 3

    def two(a, b, *, option=1):
        return a + b

    def place():
        return Path("here")
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module ``of_ones_own`` in the current directory, which Python does not look in."""
    (tmp_path / "of_ones_own.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "misses_another.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("of_ones_own", "misses_another"):
        sys.modules.pop(name, None)


def test_a_name_of_the_library_or_a_function_of_ones_own():
    assert load_part("--part", "power", ("a", "b"), {"power": pow}) is pow
    function = load_part("--part", "of_ones_own:two", ("x", "y"), {"power": pow})
    assert function(1, 2) == 3
    given = {"b": 2, "a": 1, "of no interest": None}
    assert make_part("--part", "of_ones_own:two", int, given) == 3
    assert make_part("--part", "power", int, {"base": 2, "exp": 5}, {"power": pow}) == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minimum", "--part takes one of power, or module:function of your own, not 'minimum'"),
        ("of_ones_own:", "module:function"),
        (":two", "module:function"),
        ("..of_ones_own:two", "module:function"),
        ("of_ones_own:two()", "module:function"),
        ("no_such_module:two", "--part: no module no_such_module can be imported from /"),
        ("of_ones_own.inner:two", "--part: no module of_ones_own.inner"),
        ("of_ones_own:three", "the module of_ones_own has no function three"),
        ("of_ones_own:NUMBER", "the module of_ones_own has no function NUMBER"),
        ("of_ones_own:place", r"the function must take \(x, y\)"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        load_part("--part", name, ("x", "y"), {"power": pow})
    assert "\n" not in str(error.value)


def test_what_is_expected_of_a_wrong_value_is_said():
    expected = r"--part of_ones_own:place: .* must return a builtins\.int, not .* PosixPath"
    with pytest.raises(UserError, match=expected):
        make_part("--part", "of_ones_own:place", int)
    with pytest.raises(UserError, match=r"may take only b, c, by name"):
        make_part("--part", "of_ones_own:two", int, {"b": 1, "c": 1})
    with pytest.raises(UserError, match=r"may take no arguments"):
        make_part("--part", "of_ones_own:two", int)


def test_a_module_that_misses_another_one_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_part("--part", "misses_another:two", ())


def test_the_current_directory_is_searched_by_an_installed_command_too():
    code = "from metaopt.parts import load_part; print(load_part('-', 'of_ones_own:place', ())())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "here\n", done.stderr
