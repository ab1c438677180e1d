"""Pretrained language models: brought from elsewhere, and taken there again.

    found = open_pretrained("FOLDER or FILE.gguf")
    logits = found.model.apply(found.params, found.codec.encode(b"a text")[None])
    export("NEW FOLDER", found, adapted)

Llama, Mistral, Qwen2 and GPT-2, from a folder of Hugging Face (safetensors); Llama and Qwen2 also
from a GGUF file. All are a `metaopt.models.transformer` with other options, so every learner,
estimator and loss takes them. A model of Hugging Face is exported to a folder of its kind, which
other programs read. `score` gives the loss on a text, and `read_along` adapts along it.
"""

from metaopt.pretrained.model import Pretrained, export, lay_over, open_pretrained, save_adapter
from metaopt.pretrained.reading import ReadingConfig, read_along, score

__all__ = [
    "Pretrained",
    "ReadingConfig",
    "export",
    "lay_over",
    "open_pretrained",
    "read_along",
    "save_adapter",
    "score",
]
