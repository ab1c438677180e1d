import json

import jax

from metaopt.models import TransformerConfig, transformer
from metaopt.pretrained.huggingface import write_folder
from metaopt.tasks.tokenizers import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog, née Zoë; " * 5


def write_model(folder, num_layers):
    """A small random Llama, as a folder of Hugging Face."""
    config = TransformerConfig(
        vocab_size=290,
        width=8,
        num_layers=num_layers,
        num_heads=2,
        mlp_width=12,
        activation="swiglu",
    )
    definition = json.loads(train_bpe([TEXT], 280)) | {"normalizer": {"type": "NFC"}}
    write_folder(
        folder, config, transformer(config).init(jax.random.key(0)), json.dumps(definition)
    )
    return folder
