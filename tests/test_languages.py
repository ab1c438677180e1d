"""Tasks, model and rows from a config, the library's and one's own."""

import sys
import textwrap

import jax
import optax
import pytest

from metaopt.errors import UserError
from metaopt.languages import LanguageConfig, make_family, make_model, make_rows

OWN = """
    import optax
    from metaopt import learners, meta_gradients, models
    from metaopt.comparison import Row
    from metaopt.tasks.markov import MarkovConfig, markov

    def tasks():
        return markov(MarkovConfig(vocab_size=6, num_support=2, num_query=2, length=4))

    def model(vocab_size):
        return models.bigram(vocab_size)

    def optimizer(learning_rate):
        return optax.adamw(learning_rate, eps_root=1e-8)

    def row(model, inner_optimizer, num_steps):
        return Row("mine", learners.maml(inner_optimizer), meta_gradients.first_order)
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own_languages.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_languages", None)


def test_parts_of_ones_own():
    config = LanguageConfig(
        tasks="own_languages:tasks",
        model="own_languages:model",
        vocab_size=6,
        inner_optimizer="own_languages:optimizer",
        rows=("MAML", "own_languages:row"),
    )
    episode = make_family(config).train.sample(jax.random.key(0), 3)
    model = make_model(config)
    logits = model.apply(model.init(jax.random.key(0)), episode.support.inputs[0])
    assert logits.shape == (2, 4, 6)
    maml, mine = make_rows(config, model)
    assert (maml.name, mine.name) == ("MAML", "mine")
    assert isinstance(mine.learner.inner_opt({}, {"inner_learning_rate": 0.1}), tuple)
    assert maml.inner_optimizer(0.1).init is not optax.sgd(0.1).init
    alone = LanguageConfig(model="own_languages:model", rows=("own_languages:row",))
    assert [row.name for row in make_rows(alone, model)] == ["mine"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tasks": "own_languages:model"},
            "own_languages:model: the function may take no arg",
        ),
        (
            {"model": "own_languages:optimizer"},
            "may take only vocab_size, width, num_layers",
        ),
        (
            {"model": "own_languages:tasks"},
            r"must return a metaopt\.types\.Model, not",
        ),
        ({"rows": ("own_languages:none",)}, "no function none"),
        ({"tasks": "nothing"}, r"ciphers, text, stdlib, tfds:NAME or module:function"),
        (
            {"model": "nothing"},
            "bigram, rnn, gru, lstm, transformer, pretrained, or module:function",
        ),
        ({"inner_optimizer": "nothing"}, "--inner-optimizer takes one of sgd, momentum"),
    ],
)
def test_what_is_wrong_is_said(flags, message):
    config = LanguageConfig(**flags)
    with pytest.raises(UserError, match=message):
        make_family(config)
        make_rows(config, make_model(config))
