"""Models as `transformers` saved them: the same logits, and the same files on the way back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from transformers_models import CONFIGS, FIXTURES, KEPT, LENGTH, VOCAB_SIZE, logits_of, make

from metaopt import learners, losses, meta_gradients
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models import TransformerConfig, transformer
from metaopt.pretrained.architectures import to_huggingface
from metaopt.pretrained.huggingface import read_folder, write_folder
from metaopt.types import Batch, Episode


def assert_same(params, others):
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_close(config, params, tokens, expected):
    found = transformer(config).apply(params, tokens)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture
def folder(tmp_path):
    """A copy of a fixture, to spoil."""
    return shutil.copytree(FIXTURES / "llama", tmp_path / "llama")


@pytest.mark.parametrize("name", KEPT)
def test_logits_are_those_of_transformers_and_nothing_changes_on_the_way_back(name, tmp_path):
    config, params, tokenizer = read_folder(FIXTURES / name, "float32")
    with np.load(FIXTURES / name / "logits.npz") as saved:
        assert_close(config, params, saved["tokens"], saved["logits"])
    write_folder(tmp_path / "new", config, params, tokenizer)
    again, others, _ = read_folder(tmp_path / "new", "float32")
    assert again == config
    assert_same(params, others)
    with pytest.raises(UserError, match="is there already"):
        write_folder(tmp_path / "new", config, params, tokenizer)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_architectures_with_the_library_itself(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, LENGTH))
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(model, tokens)
    config, params, _ = read_folder(tmp_path / "theirs", "float32")
    assert_close(config, params, tokens, expected)
    write_folder(tmp_path / "ours", config, params, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(logits_of(theirs, tokens), expected)


def test_parameters_are_of_the_dtype_that_is_asked_for(tmp_path):
    config, params, _ = read_folder(FIXTURES / "llama", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    write_folder(tmp_path / "new", config, params, None)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(read_folder(tmp_path / "new", "bfloat16")[1], params)


def test_weights_in_several_files_and_gpt2_without_its_prefix(folder, tmp_path):
    whole = safetensors.flax.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, tensor) in enumerate(whole.items()):
        parts[sorted(parts)[i % 2]][name] = tensor
    for file, tensors in parts.items():
        safetensors.flax.save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, params, _ = read_folder(folder, "float32")
    assert_same(params, read_folder(FIXTURES / "llama", "float32")[1])

    shutil.copytree(FIXTURES / "gpt2", tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in safetensors.flax.load_file(path).items()}
    bare["h.0.attn.bias"] = jnp.ones((1, 1, 4, 4))  # the causal mask, in old files
    bare["lm_head.weight"] = bare["wte.weight"]  # the tied head, once more
    safetensors.flax.save_file(bare, path)
    assert_same(
        read_folder(tmp_path / "gpt2", "float32")[1], read_folder(FIXTURES / "gpt2", "float32")[1]
    )

    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        read_folder(folder, "float32")
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(UserError, match="no name of a file"):
        read_folder(folder, "float32")


def spoil(tensors, name, tensor=None):
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.norm.weight", None, "tensor model.norm.weight is missing"),
        ("model.extra.weight", jnp.ones(3), "tensor model.extra.weight is not known"),
        ("model.norm.weight", jnp.ones(3), r"is \[3\], and the config asks for \[16\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, name, tensor, words):
    path = folder / "model.safetensors"
    tensors = safetensors.flax.load_file(path)
    spoil(tensors, name, tensor)
    safetensors.flax.save_file(tensors, path)
    with pytest.raises(UserError, match=words):
        read_folder(folder, "float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' is not known here: llama, mistral, qwen2, gpt2 are"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and only 'silu' is known"),
        ({"hidden_size": None}, "no number for 'hidden_size'"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not known"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window is True, and only False is known"),
        ({"rope_parameters": {"rope_type": "linear"}}, "not understood .KeyError: 'factor'"),
        ({"rms_norm_eps": "small"}, "norm_epsilon"),
    ],
)
def test_configs_that_are_not_known_are_refused(folder, change, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as refused:
        read_folder(folder, "float32")
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_damaged_and_missing_files_are_one_line(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="is no whole file of safetensors") as refused:
        read_folder(folder, "float32")
    assert "\n" not in str(refused.value)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="other formats are not read, since they may run code"):
        read_folder(folder, "float32")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"no readable config\.json"):
        read_folder(folder, "float32")


def test_what_hugging_face_has_no_name_for_is_not_exported():
    for fields, words in (
        ({}, "without SwiGLU"),
        ({"norm": "layer"}, "layer norms"),
        ({"causal": False}, "causal=False"),
        ({"activation": "swiglu", "window": 3, "biases": "all"}, "window with biases"),
    ):
        with pytest.raises(UserError, match=words):
            to_huggingface(TransformerConfig(vocab_size=7, width=8, num_heads=2, **fields))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_learners_and_estimators_take_them(name):
    config, params, _ = read_folder(FIXTURES / name, "float32")
    model = transformer(config)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 9)).astype(np.int32)
    batch = Batch(tokens[:2, :-1], tokens[:2, 1:])
    episode = Episode(batch, Batch(tokens[2:, :-1], tokens[2:, 1:]))
    learner, inner = learners.maml(), InnerLoop(num_steps=2, unroll=False)
    meta_params, hparams = learner.init(params), {"inner_learning_rate": jnp.float32(0.1)}
    found = [
        estimator(learner, losses.next_token(model), inner)(
            meta_params, hparams, episode, jax.random.key(0)
        )[0]
        for estimator in (meta_gradients.reverse, meta_gradients.mixed_mode)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *found)
