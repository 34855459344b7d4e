import pytest
import torch


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A complete checkpoint folder of a tiny Llama, not to be changed."""
    from tests.tasks.tiny_models import tiny_llama

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder
