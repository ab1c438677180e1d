"""Functions called outside `jax.jit`: compiled once for equal functions and equal shapes.

A closure that is made again at each call (`optax.sgd(0.1)`, `losses.next_token(model)`) is a new
function to `jax.jit`, and would be compiled again. Here two functions are equal if their code
is, and all that it reads: closures, defaults, global variables.
"""

import collections
import enum
import functools
import hashlib
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MOST_KEPT = 64
"""Number of compiled functions that are kept; the least recently used is dropped."""
MOST_PARTS = 20_000
"""A function that reads more objects than this is not compared with others."""

_compiled: collections.OrderedDict[Hashable, "_Compiled"] = collections.OrderedDict()
_lock = threading.Lock()
_ATOMS = (bool, int, str, bytes, type(None), type(Ellipsis), enum.Enum, np.dtype, types.CodeType)
_PLAIN = (int, float, complex, str, bytes, dict, list, tuple)
_LIBRARIES = tuple(
    str(path.resolve())
    for path in (
        *map(Path, map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))),
        Path(__file__).parent,
    )
)


def compile_once(function: Callable) -> Callable:
    """The function; called with arrays alone, as one that is compiled once for all its equals.

    If an argument is traced it is the function itself, and so it is if equality cannot be
    known, since it reads an object that may change.

    Args:
      function: pure, of pytrees of arrays.

    Returns:
      A function of the same arguments and the same result.
    """

    @functools.wraps(function)
    def call(*arguments):
        leaves = jax.tree.leaves(arguments)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(*arguments)
        try:
            key = _Parts().of(function)
        except _Unknown:
            return function(*arguments)
        return _kept(key, jax.jit)(function, arguments)

    return call


def shared(function: Callable, transform: Callable, *options: Hashable) -> Callable:
    """``transform(function)``, whose programs are those of all equal functions and options.

    Equality is judged now, and not again at each call as by `compile_once`: like a jitted function,
    this one computes what it did when it was traced.

    Args:
      function: pure, of pytrees of arrays.
      transform: compiles it, such as `jax.jit` with options.
      *options: what tells this transformation from others.
    """
    try:
        compiled = _kept((_Parts().of(function), *options), transform)
    except _Unknown:
        return transform(function)
    return lambda *arguments: compiled(function, arguments)


def _kept(key: Hashable, transform: Callable) -> "_Compiled":
    with _lock:
        compiled = _compiled.get(key) or _compiled.setdefault(key, _Compiled(transform))
        _compiled.move_to_end(key)
        while len(_compiled) > MOST_KEPT:
            _compiled.popitem(last=False)
    return compiled


class _Compiled:
    """The program of all functions of one key.

    For arguments of new shapes it is traced from the function that is called then: the one that
    was called first may have changed since.
    """

    def __init__(self, transform: Callable):
        self.called = threading.local()
        self.program = transform(lambda *arguments: self.called.function(*arguments))

    def __call__(self, function: Callable, arguments: tuple) -> Any:
        self.called.function = function
        try:
            return self.program(*arguments)
        finally:
            del self.called.function


class _Unknown(Exception):
    """An object of which nobody knows whether it is what it was."""


class _Same:
    """An object that equals itself alone, kept alive so that no other takes its place."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Parts:
    """What an object consists of, as something that can be compared and hashed."""

    def __init__(self):
        self.seen: dict[int, int] = {}  # objects that are being or were taken apart
        self.kept: list[Any] = []  # so that none of them is freed, and its id used again

    def of(self, value: Any) -> Hashable:
        """Raises `_Unknown` for what may change without this showing."""
        is_plain = isinstance(value, _PLAIN) and not isinstance(value, enum.Enum)
        if is_plain and getattr(value, "__dict__", None):
            raise _Unknown  # a number or container of a class of the user's, with attributes
        if isinstance(value, _ATOMS):
            return type(value), value
        if isinstance(value, float | complex | np.generic):
            return type(value), repr(value)  # which tells -0.0 from 0.0, and NaN equals itself
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        if len(self.seen) >= MOST_PARTS:
            raise _Unknown
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return self._taken_apart(value)

    def _taken_apart(self, value: Any) -> Hashable:
        if isinstance(value, Tracer):
            raise _Unknown
        if isinstance(value, jax.Array | np.ndarray):
            return self._array(value)
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType | np.ufunc):
            return _Same(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, dict | types.MappingProxyType):
            return type(value), tuple((self.of(k), self.of(v)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(map(self.of, value))
        if isinstance(value, classmethod | staticmethod):
            return type(value), self.of(value.__func__)
        if isinstance(value, property):
            return "property", self.of(value.fget)
        if isinstance(value, type):
            return self._class(value)
        if _made_by_jax(value):
            if _is_library(value):
                return _Same(value)
            functions = {n: v for n, v in vars(value).items() if n[0] != "_" or n == "__wrapped__"}
            return type(value), self.of(functions)
        if hasattr(value, "__dict__") and _is_python(type(value)):
            return self.of(type(value)), self.of(vars(value))
        raise _Unknown

    def _class(self, value: type) -> Hashable:
        """A class of the user's, with what may be set on it; a library's is what it was."""
        if _in_library(value.__module__):
            return _Same(value)
        read = {n: v for n, v in vars(value).items() if not n.startswith("__") or n == "__call__"}
        return _Same(value), self.of(value.__bases__), self.of(read)

    def _array(self, value: Any) -> Hashable:
        if isinstance(value, jax.Array):
            if jnp.issubdtype(value.dtype, jax.dtypes.extended) or value.size > 4096:
                return _Same(value)  # which cannot change
            value = np.asarray(value)
        elif value.flags.writeable:
            raise _Unknown  # JAX takes it for what it was while a program that holds it lives
        if value.dtype.hasobject:
            raise _Unknown
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).digest()
        return "array", value.shape, str(value.dtype), digest

    def _function(self, function: types.FunctionType) -> Hashable:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:  # an empty cell, of a function that is being made
                raise _Unknown from None
        defaults = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        return function.__code__, tuple(cells), defaults, self._globals(function)

    def _globals(self, function: types.FunctionType) -> Hashable:
        """What the code of a user's function may read of its module, and of other modules.

        Libraries' functions read what does not change.
        """
        if _is_library(function):
            return None
        names = sorted(_names(function.__code__))
        parts, spaces = [], [function.__globals__]
        for space in spaces:  # which grows on the way
            for name, value in ((n, space[n]) for n in names if n in space):
                parts.append((name, self.of(value)))
                is_users = isinstance(value, types.ModuleType) and not _in_library(value.__name__)
                if is_users and not any(vars(value) is known for known in spaces):
                    spaces.append(vars(value))
        return tuple(parts)


def _names(code: types.CodeType) -> set[str]:
    """The names that code reads, that of the functions inside it too."""
    inside = [
        _names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)
    ]
    return set(code.co_names).union(*inside)


def _made_by_jax(value: Any) -> bool:
    """What jax makes of a function: `jax.jit`, `jax.custom_jvp` and the like."""
    return callable(value) and type(value).__module__.split(".")[0] in ("jax", "jaxlib")


def _is_python(kind: type) -> bool:
    """Whether a class and its bases are written in Python, and hide nothing in slots."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE, of classes that are written in Python
    bases = [base for base in kind.__mro__ if base not in (object, Generic, Protocol)]
    return all(base.__flags__ & heap and not vars(base).get("__slots__") for base in bases)


def _is_library(value: Any) -> bool:
    return _in_library(getattr(value, "__module__", None) or "")


@functools.cache
def _in_library(module_name: str) -> bool:
    """Whether a module is of Python, an installed package or metaopt, by where its file is."""
    if not module_name or module_name == "__main__":
        return False
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:
        return module_name in sys.builtin_module_names
    return str(Path(file).resolve()).startswith(_LIBRARIES)
