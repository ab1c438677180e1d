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
    takes: Sequence[str] = (),
    library: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """The function that the value of a flag names.

    Args:
      flag: such as ``--estimator``, for the messages.
      name: a name of the library's, or ``module:function``.
      takes: the names of the arguments that it will be given, in their order. A function of the
        user's own must take so many; what it calls them is its own affair.
      library: the library's own functions of this kind, by name.

    Raises:
      UserError: there is no such name, module or function, or the function takes other
        arguments.
    """
    if library and name in library:
        return library[name]
    module_name, colon, function_name = name.partition(":")
    if not colon or not all(p.isidentifier() for p in [*module_name.split("."), function_name]):
        choices = f"one of {', '.join(library)}, or " if library else ""
        raise UserError(f"{flag} takes {choices}module:function of your own, not {name!r}")
    function = getattr(_import(flag, module_name), function_name, None)
    if not callable(function):
        raise UserError(f"{flag} {name}: the module {module_name} has no function {function_name}")
    if not can_be_called(function, *takes):
        raise UserError(f"{flag} {name}: the function must take ({', '.join(takes)})")
    return function


def make_part(
    flag: str, name: str, returns: type[Made], arguments: Mapping[str, Any] | None = None
) -> Made:
    """What ``module:function`` of the user's own returns.

    Args:
      flag: such as ``--problem``, for the messages.
      name: ``module:function``.
      returns: the type that it must return.
      arguments: what it is given, in this order; nothing by default.

    Raises:
      UserError: see `load_part`; or the function returns something else.
    """
    arguments = arguments or {}
    function = load_part(flag, name, tuple(arguments))
    return checked(flag, name, function(*arguments.values()), returns)


def checked(flag: str, name: str, made: Any, returns: type[Made]) -> Made:
    """What a function of the user's own has returned, if it is of the right type.

    Raises:
      UserError: it is of another type.
    """
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
