"""What `adapt_languages` writes: result records, the table, the figure, and samples of text."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from metaopt.comparison import Comparison, RowResult
from metaopt.console import printable
from metaopt.files import write_json_lines, write_text
from metaopt.inner_loop import adapt
from metaopt.languages import is_text
from metaopt.losses import NATS_TO_BITS
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.sequence import decoding
from metaopt.statistics import Interval, interval
from metaopt.training.runs import Run
from metaopt.types import Array, Episode

STEPS, DIFFERENCES = (0, 1, 2, 5, 10), (1, 2, 5)
BASELINE = "joint pretraining"
SUPPORT_LIMIT, PREFIX_LIMIT = "Bayes: support", "Bayes: support + prefix"


class Report:
    """Collects the rows of a run and keeps its files up to date after each of them."""

    def __init__(
        self,
        run: Run,
        comparison: Comparison,
        *,
        tasks: str,
        preset: str,
        command: str,
        seeds: Sequence[int],
        reads_prefix: bool,
    ):
        """Start with no rows.

        Args:
          run: where the files go.
          comparison: gives the test episodes, which all seeds share.
          tasks: the name of the table.
          preset: which made the numbers.
          command: that makes them again.
          seeds: every row is trained once with each.
          reads_prefix: whether the model reads more of the query than its last token. It is then
            judged by the limit that reads the earlier tokens too.
        """
        self._run, self._comparison = run, comparison
        self._is_bytes = is_text(tasks)
        self._unit = "bits/byte" if self._is_bytes else "nats/token"
        self._scale = NATS_TO_BITS if self._is_bytes else 1.0
        self._groups = np.asarray(comparison.test.task)
        self._limits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._rows: dict[str, list[RowResult]] = {}  # one result a seed
        self._limit = PREFIX_LIMIT if reads_prefix else SUPPORT_LIMIT
        self._cell = cell_maker(
            table=f"adapt_languages/{tasks}",
            preset=preset,
            command=command,
            seeds=seeds,
            episodes=len(self._groups),
        )

    def add_limits(self, bayes_loss: Callable[..., Array]) -> None:
        """Adds the exact Bayes limits, ``(episode, use_support=, use_prefix=) -> [E]``."""
        for name, use_prefix in ((SUPPORT_LIMIT, False), (PREFIX_LIMIT, True)):
            without, after = (
                np.asarray(
                    bayes_loss(
                        self._comparison.test, use_support=use_support, use_prefix=use_prefix
                    ),
                    np.float64,
                )
                for use_support in (False, True)
            )
            self._limits[name] = without, after

    def add(self, results: Sequence[RowResult]) -> None:
        """Adds a row, trained once a seed, rewrites all files and prints its final loss."""
        name = results[0].row.name
        self._rows[name] = list(results)
        write_json_lines(self._run.results, self._records())
        self._draw()
        steps = self._comparison.inner.num_steps
        found = self._interval(self._curves(name)[:, steps])
        seconds = sum(result.seconds for result in results)
        Console().print(
            f"{name}: {found.mean:.4f} ± {found.ci95:.4f} {self._unit} after "
            f"{steps} steps ({seconds:.0f} s)",
            markup=False,
            highlight=False,
        )

    def finish(self) -> None:
        """Writes and prints the table, and text before and after adaptation."""
        (table,) = tables.arrange(self._records())
        directory = self._run.directory
        tables.write(directory, [table])
        samples = self._samples()
        write_text(directory / "samples.md", samples)
        self._run.finish()
        console = Console()
        console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(samples, markup=False, highlight=False)
        console.print(f"written to {directory}", markup=False, highlight=False)

    def _curves(self, name: str) -> np.ndarray:
        """Of a row, float64 ``[E, steps + 1]``: the mean over its seeds."""
        return np.mean([result.curves for result in self._rows[name]], axis=0)

    def _interval(self, values: np.ndarray) -> Interval:
        return interval(values * self._scale, self._groups)

    def _records(self) -> list[dict]:
        losses: dict[str, dict[int, np.ndarray]] = {}
        more: dict[str, dict] = {}
        for name, results in self._rows.items():
            curves = self._curves(name)
            losses[name] = {step: curves[:, step] for step in self._steps()}
            more[name] = {"seconds": round(sum(r.seconds for r in results), 1)}
        for name, (without, after) in self._limits.items():
            losses[name] = {step: after if step else without for step in self._steps()}
            more[name] = {"limit": True}
        records = []
        for name, columns in losses.items():
            records += self._row_records(name, columns, **more[name])
        return records

    def _steps(self) -> list[int]:
        return [step for step in STEPS if step <= self._comparison.config.max_inner_steps]

    def _row_records(self, name: str, losses: dict[int, np.ndarray], **more) -> list[dict]:
        records = []
        for step, values in losses.items():
            rates = [float(result.rates[step]) for result in self._rows.get(name, [])]
            rate = {"inner_learning_rate": rates[0] if len(rates) == 1 else rates} if rates else {}
            found = self._interval(values)
            records.append(self._cell(name, _column(step), found, self._unit, **rate, **more))
        for step, difference in self._gains(name, losses).items():
            found, column = self._interval(difference), f"Δ {_column(step)}"
            records.append(self._cell(name, column, found, self._unit, better="higher", **more))
        return records + self._gap_record(name, **more)

    def _gains(self, name: str, losses: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """The baseline's losses minus the row's, episode by episode: positive is better."""
        if BASELINE not in self._rows or name == BASELINE:
            return {}
        of_baseline = self._curves(BASELINE)
        return {step: of_baseline[:, step] - losses[step] for step in DIFFERENCES if step in losses}

    def _gap_record(self, name: str, **more) -> list[dict]:
        """The distance to the limit of what the model sees, after the trained number of steps."""
        if name not in self._rows or not self._limits:
            return []
        limit = self._limits[self._limit][1]
        losses = self._curves(name)[:, self._comparison.inner.num_steps]
        found = self._interval(losses - limit)
        return [self._cell(name, "gap to Bayes", found, self._unit, limit_of=self._limit, **more)]

    def _draw(self) -> None:
        curves = {name: self._curves(name) for name in self._rows}
        baseline = curves.get(BASELINE)
        others = {} if baseline is None else {n: c for n, c in curves.items() if n != BASELINE}
        plots.adaptation_curves(
            self._run.directory / "curves.png",
            {name: self._curve(losses) for name, losses in curves.items()},
            {name: self._curve(baseline - losses) for name, losses in others.items()},
            {name: self._interval(after).mean for name, (_, after) in self._limits.items()},
            baseline=BASELINE,
            unit=self._unit,
            trained_steps=self._comparison.inner.num_steps,
        )

    def _curve(self, losses: np.ndarray) -> plots.Curve:
        found = [self._interval(column) for column in losses.T]
        return plots.Curve(np.array([f.mean for f in found]), np.array([f.ci95 for f in found]))

    def _samples(self) -> str:
        """Text of the last row's model for the first test episode, before and after."""
        result = list(self._rows.values())[-1][0]
        episode: Episode = jax.tree.map(lambda x: jnp.asarray(x[0]), self._comparison.test)
        learner, problem = result.row.learner, self._comparison.problem
        start = learner.start(result.meta_params)
        optimizer = learner.inner_opt(result.meta_params, result.hparams)
        adapted = adapt(
            problem.loss_fn, optimizer, start, episode.support, self._comparison.inner
        ).params
        prompt = episode.query.inputs[0]
        names = problem.family.test.task_names
        language = names[int(episode.task)] if names else "a new language"
        steps = self._comparison.inner.num_steps
        lines = [
            f"Text of {result.row.name} for {printable(language)}, a held-out language.",
            "",
            *self._block("Support (first sequence)", episode.support.inputs[0]),
            *self._block("Prompt", prompt),
        ]
        for title, params in (("Before", start), (f"After {steps} steps of", adapted)):
            loss = float(problem.loss_fn(params, episode.query)) * self._scale
            tokens = decoding.generate(
                problem.model, params, prompt, 2 * len(prompt), jax.random.key(0), 0.7
            )
            lines += self._block(
                f"{title} adaptation, {loss:.3f} {self._unit}", tokens[len(prompt) :]
            )
        return "\n".join(lines)

    def _block(self, title: str, tokens: Array) -> list[str]:
        if self._is_bytes:
            shown = bytes(tokens.tolist()).decode("utf-8", errors="replace")
        else:
            shown = "".join(chr(ord("a") + t) if t < 26 else f"<{t}>" for t in tokens.tolist())
        return [f"{title}:", "", *(f"    {printable(line)}" for line in shown.splitlines()), ""]


def _column(step: int) -> str:
    return f"{step} step" if step == 1 else f"{step} steps"
