"""Every number of every config: it gives a run, or one line at once, and leaves nothing behind."""

import dataclasses
import importlib
import inspect
import itertools
import math
import os
import pkgutil
import typing

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import experiments
import metaopt
from experiments import harness
from metaopt import cli
from metaopt.errors import UserError
from metaopt.ranges import Checked, Range, field_types

SPECIAL = [0, -1, math.nan, math.inf, -math.inf, 1e300, 1e-300, 10**20, 2**31, -(2**63), -0.5, 7]
NUMBERS = st.sampled_from(SPECIAL) | st.integers(1, 100) | st.integers() | st.floats()
EXAMPLES = int(os.environ.get("NUMBERS_EXAMPLES", "10"))
SMALL = {
    "adapt_languages": "--preset smoke --rows MAML",
    "table_bayes_gap": "--preset smoke --models transformer",
    "table_dynamic_evaluation": "--preset smoke --tasks-per-step 4 --train text --streams text/a",
    "table_inner_optimizers": "--preset smoke --tasks text --folder text --optimizers sgd",
    "table_meta_gradients": "--preset smoke",
    "table_omniglot": "--preset smoke --source images --rows MAML --settings 5-way-1-shot "
    "--num-train-characters 20 --num-valid-characters 10 --test-episodes 2",
    "table_peers": "--preset smoke --peers",
    "table_self_improvement": "--preset smoke --folder text",
    "table_continual": "--preset smoke --folder text",
    "table_test_time_training": "--preset smoke --parts switching",
    "table_pretraining": "--preset smoke --file text/a",
    "table_improve": "--preset smoke --tasks text --folder text",
    "table_linear": "--preset smoke",
    "table_pretrained": "--preset smoke --model text --streams text/a",
    "table_sinusoid": "--preset smoke --rows MAML",
    "evolve": "text --preset smoke --num-held-out 2",
    "adapt": "run --on text/a",
    "generate": "run --on text/a",
    "score": "run --on text/a",
    "read": "text/a --model run",
    "doctor": "--length 4 --model bigram",
    "watch": "run",
}
"""A quick way to call each command whose config has numbers."""


class Accepted(Exception):
    """All is checked, and a run would begin."""


def modules(package):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.count(".") == 1 or package is metaopt:
            yield importlib.import_module(found.name)


def commands():
    """The modules of all commands, by name: those of ``metaopt`` and the tables."""
    named = {name: command.function.partition(":")[0] for name, command in cli.COMMANDS.items()}
    return {name: importlib.import_module(module) for name, module in named.items()} | {
        module.__name__.split(".")[1]: module
        for module in modules(experiments)
        if hasattr(module, "Config")
    }


def numbers_of(hint):
    """Whether each int and float in a type has a range, in their order."""
    if hint in (int, float):
        return [False]
    args = [arg for arg in typing.get_args(hint) if not isinstance(arg, str)]
    if typing.get_origin(hint) is typing.Annotated:
        inner, *limits = args
        ranged = any(isinstance(limit, Range) for limit in limits)
        return [ranged or has for has in numbers_of(inner)]
    return [has for arg in args for has in numbers_of(arg)]


def is_config(hint):
    """Whether a type is that of a config within a config, which has numbers of its own."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return isinstance(hint, type) and issubclass(hint, Checked)


def flags_of(config, prefix=""):
    """The flags of a config that take numbers."""
    for name, hint in field_types(type(config)).items():
        value, flag = getattr(config, name), f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Checked):
            yield from flags_of(value, f"{flag}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Checked):
            yield from (f for i, each in enumerate(value) for f in flags_of(each, f"{flag}.{i}."))
        elif numbers_of(hint):
            yield flag


def small(name):
    """A config of a command that is quick to check."""
    module, args = commands()[name], SMALL[name].split()
    if hasattr(module, "presets"):
        return tyro.cli(module.Config, args=args, default=module.presets("smoke"))
    return tyro.cli(module.Config, args=args)


def test_every_number_of_every_config_has_a_range():
    configs = {
        found
        for package in (metaopt, experiments)
        for module in modules(package)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Checked) and found is not Checked
    }
    assert {module.Config for module in commands().values()} <= configs and len(configs) > 20
    without = [
        f"{config.__name__}.{name}"
        for config in configs
        for name, hint in field_types(config).items()
        if not all(numbers_of(hint))
    ]
    assert not without, "annotate them with a metaopt.ranges.Range"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a little text, a few drawings and no run."""
    place = tmp_path_factory.mktemp("place")
    for name in ("text", "images", "run"):
        (place / name).mkdir()
    rng = np.random.default_rng(0)
    for name in "abcdefgh":  # no two alike: those are refused
        (place / "text" / name).write_bytes(rng.integers(32, 127, 2**14).astype(np.uint8).tobytes())
    np.savez(
        place / "images" / "a_28x28.npz",
        images=rng.integers(0, 256, (4 * 40, 28, 28)).astype(np.uint8),
        character=np.repeat(np.arange(40), 4),
        character_names=np.array([f"A/{i:02d}" for i in range(40)]),
    )
    return place


def replaced(config, flag, number):
    """The config with a number in every place of a flag."""
    name, *rest = flag.replace("-", "_").split(".")
    value = getattr(config, name)
    if isinstance(value, tuple) and rest and rest[0].isdigit():
        i, *inner = rest
        each = replaced(value[int(i)], ".".join(inner), number)
        return dataclasses.replace(config, **{name: (*value[: int(i)], each, *value[int(i) + 1 :])})
    if rest:
        number = replaced(value, ".".join(rest), number)
    elif isinstance(value, tuple):
        number = (number,) * max(1, len(numbers_of(field_types(type(config))[name])))
    return dataclasses.replace(config, **{name: number})


@pytest.mark.parametrize("name", sorted(SMALL))
def test_any_number_gives_a_run_or_one_line(name, place, monkeypatch):
    module, base = commands()[name], small(name)

    def accept(*args, **kwargs):
        raise Accepted

    for begin in ("open_run", "open_row", "open_model", "open_pretrained", "open_view", "examine"):
        if hasattr(module, begin):
            monkeypatch.setattr(module, begin, accept)
    monkeypatch.setattr(harness, "open_run", accept)
    monkeypatch.setenv("METAOPT_DATA", str(place / "store"))
    monkeypatch.chdir(place)

    with pytest.raises(Accepted):
        module.run(base)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(flag=st.sampled_from(sorted(flags_of(base))), number=NUMBERS)
    def check(flag, number):
        before = found_in(place)
        try:
            config = replaced(base, flag, number)
            module.run(config)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        except Accepted:
            pass
        else:
            raise AssertionError("it was run")
        assert found_in(place) == before

    check()


def found_in(place):
    """All files but the stored text, which is kept for the next run."""
    return {path for path in place.rglob("*") if place / "store" not in (path, *path.parents)}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_no_number_of_a_config_is_nan_or_far_below_zero(name):
    base = small(name)
    for flag, number in itertools.product(flags_of(base), (math.nan, -(2**63), -math.inf)):
        with pytest.raises(UserError, match=flag.split(".")[-1].replace("-", "_")):
            replaced(base, flag, number)


def test_every_command_with_numbers_is_tried():
    with_numbers = {
        name
        for name, module in commands().items()
        if any(numbers_of(hint) or is_config(hint) for hint in field_types(module.Config).values())
    }
    assert with_numbers == set(SMALL)
