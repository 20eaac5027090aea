"""Shared by every test: the environment before heavy imports, one private Ray, and a tiny model that vLLM can run."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trace_rl.workers import environment

environment.apply()
environment.protect_private_ray()
sys.path.append(str(Path(__file__).parent))  # for what tests share: learner_harness, synthetic_step


@pytest.fixture(scope="session")
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray of this session's own with 4 logical CPUs; classes defined in test modules can be used as actors."""
    import ray

    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # socket paths below it must stay short
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    names = {item.module.__name__ for item in request.session.items if isinstance(item, pytest.Function)}
    for name in names | ({"learner_harness"} & sys.modules.keys()):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # workers cannot import modules of tests
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def groups(local_ray: None) -> Iterator[dict[int, Any]]:
    """Learner processes by world size (`learner_harness.Group`), kept through a module."""
    from learner_harness import Group

    started = {1: Group(1), 2: Group(2)}
    yield started
    for group in started.values():
        group.close()


@pytest.fixture(scope="session")
def model_path(build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    build_tiny_model(folder, tied=True)
    return str(folder)


@pytest.fixture(scope="session")
def build_tiny_model() -> Callable[..., Any]:
    """A function that writes a random Qwen3 model with a word-level tokenizer to a folder and returns the model.

    Weights are large enough that log-probs differ by nats between seeds. Ids 1 to 39 end a sequence.
    """
    return _build_tiny_model


def _build_tiny_model(folder: Path, tied: bool, seed: int = 0) -> Any:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = list(range(1, 40))
    model.save_pretrained(folder)
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{token}": token for token in range(2, 300)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return model
