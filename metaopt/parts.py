"""Parts that a flag names: one of the library's, or ``module:function`` of the user's own.

Every command has the same convention. A module of the user's own is one that can be imported
from the current directory.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from metaopt.errors import UserError

Made = TypeVar("Made")


def load_part(
    flag: str,
    name: str,
    takes: Sequence[str],
    library: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """The function that a flag names, itself the part, such as an estimator.

    Args:
      flag: such as ``--estimator``, for the messages.
      name: a name of the library's, or ``module:function``.
      takes: what the function is given, by position; it must take that number of arguments.
      library: the library's own functions of this kind, by name.

    Raises:
      UserError: there is no such name, module or function, or the function takes other
        arguments.
    """
    function = _find(flag, name, library or {})
    if not can_be_called(function, *takes):
        raise UserError(f"{flag} {name}: the function must take ({', '.join(takes)})")
    return function


def make_part(
    flag: str,
    name: str,
    returns: type[Made],
    arguments: Mapping[str, Any] | None = None,
    library: Mapping[str, Callable[..., Any]] | None = None,
) -> Made:
    """What the function that a flag names returns, such as a learner or a model.

    Args:
      flag, name, library: as for `load_part`.
      returns: the type that the function must return.
      arguments: what the function may take, by name. It is given those that it has a parameter
        for.

    Raises:
      UserError: there is no such name, module or function; or it needs other arguments, or
        returns something else.
    """
    arguments = arguments or {}
    function = _find(flag, name, library or {})
    given = {n: x for n, x in arguments.items() if n in _parameters(function)}
    if not can_be_called(function, **given):
        allowed = f"only {', '.join(arguments)}, by name" if arguments else "no arguments"
        raise UserError(f"{flag} {name}: the function may take {allowed}")
    made = function(**given)
    if not isinstance(made, returns):
        expected = f"{returns.__module__}.{returns.__qualname__}"
        raise UserError(
            f"{flag} {name}: the function must return a {expected}, "
            f"not an object of type {type(made).__name__}"
        )
    return made


def can_be_called(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> bool:
    """Whether a function takes these arguments; what is written in C may have no signature."""
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except (TypeError, ValueError):
        return False
    return True


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _find(flag: str, name: str, library: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if name in library:
        return library[name]
    module_name, colon, function_name = name.partition(":")
    if not colon or not all(p.isidentifier() for p in [*module_name.split("."), function_name]):
        choices = f"one of {', '.join(library)}, or " if library else ""
        raise UserError(f"{flag} takes {choices}module:function of your own, not {name!r}")
    function = getattr(_import(flag, module_name), function_name, None)
    if not callable(function):
        raise UserError(f"{flag} {name}: the module {module_name} has no function {function_name}")
    return function


def _import(flag: str, name: str) -> Any:
    """A module, from the current directory too, where an installed command does not look."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the user's module is there, and misses another one
        raise UserError(f"{flag}: no module {name} can be imported from {here}") from None
