import json

import jax
import pytest
from pretrained_text import TEXT

from metaopt.models import TransformerConfig, transformer
from metaopt.pretrained.huggingface import write_folder
from metaopt.tasks.tokenizers import train_bpe


@pytest.fixture
def folder(tmp_path):
    """A small random Llama with a tokenizer whose NFC form is that of Qwen2."""
    config = TransformerConfig(
        vocab_size=290, width=8, num_layers=1, num_heads=2, mlp_width=12, activation="swiglu"
    )
    definition = json.loads(train_bpe([TEXT], 280)) | {"normalizer": {"type": "NFC"}}
    params = transformer(config).init(jax.random.key(0))
    write_folder(tmp_path / "model", config, params, json.dumps(definition))
    return tmp_path / "model"
