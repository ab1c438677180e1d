"""metaopt: meta-learning sequence models in JAX.

**To train and judge**: `fit` trains a learner on a `Problem` as a `FitConfig` says and gives a
`Fitted`; `evaluate` gives its losses on held-out tasks with intervals; `Comparison` trains and
judges several learners alike, as a `ComparisonConfig` says.

**What is meta-learned, and how**: `learners`, `meta_gradients`, and `Learner`, for one of your own.
`OuterConfig` describes the outer optimiser, `optimizers` has the optimisers themselves.

**Afterwards**: `load` gives a row of a run as a `Loaded`, which adapts to a text, scores and
generates.

**A text as it comes**: a `Reader` reads on and learns, as a `ReaderConfig` says.

**One episode by hand**: `adapt` takes the steps of an `InnerLoop` and gives an `Adapted`.

**Models, tasks and losses**: `models`, `tasks`, `losses`; `as_model` makes a `Model` of what you
have; `Batch`, `Episode` and `TaskFamily` are the data.

**Errors**: `UserError` says in one line what is wrong and what to do.

Names are imported when they are first used: ``import metaopt`` alone does not import JAX.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt import learners, losses, meta_gradients, models, optimizers, tasks
    from metaopt.comparison import Comparison, ComparisonConfig
    from metaopt.errors import UserError
    from metaopt.evaluate import evaluate
    from metaopt.fit import FitConfig, Fitted, Problem, fit
    from metaopt.inner_loop import Adapted, InnerLoop, adapt
    from metaopt.load import load
    from metaopt.loaded import Loaded
    from metaopt.models import as_model
    from metaopt.optimizers.outer import OuterConfig
    from metaopt.streams.reader import Reader, ReaderConfig
    from metaopt.types import Batch, Episode, Learner, Model, TaskFamily

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Batch",
    "Comparison",
    "ComparisonConfig",
    "Episode",
    "FitConfig",
    "Fitted",
    "InnerLoop",
    "Learner",
    "Loaded",
    "Model",
    "OuterConfig",
    "Problem",
    "Reader",
    "ReaderConfig",
    "TaskFamily",
    "UserError",
    "__version__",
    "adapt",
    "as_model",
    "evaluate",
    "fit",
    "learners",
    "load",
    "losses",
    "meta_gradients",
    "models",
    "optimizers",
    "tasks",
]
_MODULES = {
    "metaopt.comparison": ("Comparison", "ComparisonConfig"),
    "metaopt.errors": ("UserError",),
    "metaopt.evaluate": ("evaluate",),
    "metaopt.fit": ("FitConfig", "Fitted", "Problem", "fit"),
    "metaopt.inner_loop": ("Adapted", "InnerLoop", "adapt"),
    "metaopt.load": ("load",),
    "metaopt.loaded": ("Loaded",),
    "metaopt.models": ("as_model",),
    "metaopt.optimizers.outer": ("OuterConfig",),
    "metaopt.streams.reader": ("Reader", "ReaderConfig"),
    "metaopt.types": ("Batch", "Episode", "Learner", "Model", "TaskFamily"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"metaopt.{name}")
    else:
        raise AttributeError(f"metaopt has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """The package, in which the import of a module never hides the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
