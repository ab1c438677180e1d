"""Tiny random models of the library `transformers`, and the fixtures that are made of them.

    python tests/pretrained/transformers_models.py    # needs torch and transformers

The fixtures hold the weights in float16, so that they are small, and the logits of these weights
in float32.
"""

from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = ("gpt2", "llama", "llama-scaled", "qwen2")
LENGTH, VOCAB_SIZE = 17, 19
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
WIDE = SMALL | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": ("Llama", WIDE | {"rms_norm_eps": 1e-5, "rope_theta": 5000.0}),
    "llama-scaled": (
        "Llama",
        SMALL
        | {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    ),
    "llama-linear": ("Llama", SMALL | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "qwen2": ("Qwen2", WIDE | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 3, "sliding_window": 5}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 19, "n_embd": 9, "n_layer": 2, "n_head": 3, "n_positions": 20}
        | {"n_inner": 14},
    ),
}


def make(name):
    """A model with random weights that float16 holds, norms and biases too."""
    import torch
    import transformers

    kind, fields = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    heads = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, heads)(config)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))
        for key, parameter in model.named_parameters():
            if ("norm" in key or "ln_" in key) and key.endswith("weight"):
                parameter += 1
            parameter.copy_(parameter.half())
    return model.eval()


def logits_of(model, tokens):
    """Its logits, float32 ``[S, L, V]``."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def main():
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, LENGTH)).astype(np.int32)
    for name in KEPT:
        model, folder = make(name), FIXTURES / name
        halves = {key: tensor.half() for key, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=halves)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            folder / "logits.npz",
            tokens=tokens,
            logits=logits_of(model, tokens),
            allow_pickle=False,
        )


if __name__ == "__main__":
    main()
