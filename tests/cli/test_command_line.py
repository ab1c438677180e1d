import dataclasses
import importlib
import os
import sys

import pytest

from metaopt.cli import command_line, huge_pages
from metaopt.errors import UserError
from metaopt.training.recorder import Diverged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float = 0.1
    clip: bool = True

    def __post_init__(self):
        if self.rate <= 0:
            raise UserError(f"rate is {self.rate}; it must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    preset: str = "cpu"
    width: int = 8
    names: tuple[str, ...] = ()
    folder: str | None = None
    remat: bool = False
    outer: Outer = dataclasses.field(default_factory=Outer)


def main(*args, run=None):
    """The config that ``run`` is called with."""
    configs = []
    with command_line.one_line_exits(args):
        (run or configs.append)(command_line.parse(Config, args, "python -m toy", "A toy."))
    return configs[0]


def leaves(capsys, *args, run=None):
    """The exit code and the lines on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(*args, run=run)
    return stop.value.code, capsys.readouterr().err.splitlines()


def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(capsys):
    def run(config):
        raise UserError(f"no width {config.width}; give another")

    assert leaves(capsys, run=run) == (2, ["error: no width 8; give another"])
    rate = ("--outer.rate", "0")
    assert leaves(capsys, *rate) == (2, ["error: rate is 0.0; it must be above 0"])


def test_a_flag_that_cannot_be_read_is_named_with_exit_code_2(capsys):
    for args in (("--width", "wide"), ("--widht", "3"), ("--outer.rate",)):
        code, lines = leaves(capsys, *args)
        assert code == 2 and any(args[0] in line for line in lines)


def test_divergence_is_exit_code_1_and_a_bug_is_not_hidden(capsys):
    def diverge(config):
        raise Diverged("diverged at step 3")

    def break_down(config):
        raise ValueError("a bug")

    assert leaves(capsys, run=diverge) == (1, ["error: diverged at step 3"])
    with pytest.raises(ValueError, match="a bug"):
        main(run=break_down)


def test_a_command_starts_again_with_huge_pages_once(monkeypatch):
    started = []
    monkeypatch.setattr(huge_pages.sys, "platform", "linux")
    monkeypatch.setattr(huge_pages.os, "execv", lambda *args: started.append(args))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    huge_pages.restart_with_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    huge_pages.restart_with_huge_pages()
    assert len(started) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")  # set above, and not for the tests after this one


IMPROVING = ("adapt_languages", "table_bayes_gap", "table_dynamic_evaluation")
IMPROVING += ("table_inner_optimizers", "table_omniglot", "table_sinusoid")


@pytest.mark.parametrize("name", IMPROVING)
def test_a_memory_that_cannot_be_is_refused_before_a_run_is_made(tmp_path, monkeypatch, name):
    monkeypatch.setenv("METAOPT_MEMORY", str(tmp_path))
    module = importlib.import_module(f"experiments.{name}")
    config = module.presets("smoke")
    config = dataclasses.replace(config, improve="on", root=str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"is a folder; give the path of a file in it"):
        module.run(config)
    assert not list(tmp_path.iterdir())
