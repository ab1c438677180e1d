import pytest
from pretrained_text import write_model


@pytest.fixture
def folder(tmp_path):
    """A small random Llama with a tokenizer whose NFC form is that of Qwen2."""
    return write_model(tmp_path / "model", num_layers=1)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """One of two layers, for tests that do not change it."""
    return write_model(tmp_path_factory.mktemp("shared") / "model", num_layers=2)
