"""Text that a model writes before and after it has adapted."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adapt_languages.config import Config, scales, unit_of
from experiments.adapt_languages.references import on_plain_text, reading_key
from metaopt.comparison import Comparison, RowResult
from metaopt.console import printable
from metaopt.inner_loop import adapt
from metaopt.languages import cipher_config, is_cipher, make_codec
from metaopt.sequence import decoding
from metaopt.types import Array, Episode

PROMPT = 64
"""Tokens of a query that are continued, by twice as many."""


def samples(config: Config, comparison: Comparison, result: RowResult) -> str:
    """Text of a row's model for the first test episode, before and after adaptation."""
    episode: Episode = jax.tree.map(lambda x: jnp.asarray(x[0]), comparison.test)
    learner, problem = result.row.learner, comparison.problem
    start = learner.start(result.meta_params)
    optimizer = learner.inner_opt(result.meta_params, result.hparams)
    adapted = adapt(problem.loss_fn, optimizer, start, episode.support, comparison.inner).params
    scale = scales(config, jax.tree.map(lambda x: x[:1], comparison.test))[0]
    prompt, show = episode.query.inputs[0][:PROMPT], make_codec(config).show
    names = problem.family.test.task_names
    language = names[int(episode.task)] if names else "a new language"
    lines = [
        f"Text of {printable(result.row.name)} for {printable(language)}, a held-out language.",
        "",
        *_block("Support (first sequence)", show(episode.support.inputs[0])),
        *_block("Prompt", show(prompt)),
    ]
    read = _reading(config, comparison, episode)
    if read:
        lines += [*_block("Prompt, read with the key", read(prompt))]
    after = f"After {comparison.inner.num_steps} steps of"
    for title, params in (("Before", start), (after, adapted)):
        loss = float(problem.loss_fn(params, episode.query)) * scale
        key, length = jax.random.key(0), 2 * len(prompt)
        tokens = decoding.generate(problem.model, params, prompt, length, key, 0.7)[len(prompt) :]
        heading = f"{title} adaptation, {loss:.3f} {unit_of(config)}"
        lines += _block(heading, show(tokens))
        if read:
            lines += _block("The same, read with the key", read(tokens))
    return "\n".join(lines)


def _reading(
    config: Config, comparison: Comparison, episode: Episode
) -> Callable[[Array], str] | None:
    """What shows the plain text of a cipher that renames symbols."""
    if not is_cipher(config.tasks) or config.cipher not in ("substitution", "caesar"):
        return None
    plain = jax.tree.map(lambda x: x[0], on_plain_text(config, comparison).test)
    key = reading_key(episode, plain, cipher_config(config).vocab_size)
    return lambda tokens: make_codec(config).show(key[np.asarray(tokens)])


def _block(title: str, text: str) -> Iterator[str]:
    yield from (f"{title}:", "", *(f"    {printable(line)}" for line in text.splitlines()), "")
