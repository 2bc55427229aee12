"""Tiny random models and tokenizers, made in-process: nothing is fetched."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path

_SCRATCH = tempfile.mkdtemp(prefix="dpo-cache-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(_SCRATCH, "hf"))  # before datasets is imported: it reads this once
os.environ["XDG_CACHE_HOME"] = str(Path(_SCRATCH, "cache"))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cache.types import Completion
from tests.rotation import mark_others_slow, set_day

DAY = set_day()  # before workers start, so that all choose the same

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_report_header() -> str:
    return DAY


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU run wherever there is one, and are skipped in sight elsewhere. Whole loops get more time."""
    mark_others_slow(items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and torch finds no such device here"))
        if item.get_closest_marker("slow") or item.get_closest_marker("real_model"):
            item.add_marker(pytest.mark.timeout(1800))


# What is imported stays to the end; searching for garbage in it took a tenth of the time of all tests.


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Models of transformers are imported when a test needs them. The state that trainers of other libraries
    leave in the process ends with the tests of a file.
    """
    if nextitem is None or nextitem.path != item.path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        gc.freeze()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random model whose log-probs are far from uniform, so that a wrong mask shows."""
    fields = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def make_completions(seed: int = 0, num_prompts: int = 6, vocab_size: int = 264) -> list[Completion]:
    """Completions that share prompts, prefixes of every length, and nothing; one-token and equal ones among
    them.
    """
    generator = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, vocab_size, length).astype(np.uint32)

    system = ids(7)
    completions = []
    for index in range(num_prompts):
        prompt = np.concatenate([system, ids(int(generator.integers(1, 20)))]) if index % 3 else ids(5)
        answer = ids(int(generator.integers(1, 25)))
        completions.append(Completion(prompt, answer))
        completions.append(
            Completion(
                prompt, np.concatenate([answer[: index % len(answer)], ids(int(generator.integers(1, 12)))])
            )
        )
        completions.append(
            Completion(np.concatenate([prompt, answer]), ids(3))
        )  # a dialogue is the prompt of its own next turn
    completions.append(completions[0])
    completions.append(Completion(ids(1), ids(1)))
    return completions


def naive_token_logps(
    model: torch.nn.Module, completion: Completion, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The definition: full log_softmax of the model's own forward, one sequence at a time; float64 by
    default.
    """
    ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None].to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].to(dtype)
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(completion.prompt_ids) - 1 :]


def chat_rows(num_rows: int = 12, seed: int = 0) -> list[dict]:
    """Conversations in the usual columns; every third prompt occurs twice, and its answers with it."""
    generator = np.random.default_rng(seed)
    words = ["red", "green", "blue", "small", "large", "seven", "north", "under", "often", "never"]

    def sentence(length: int) -> str:
        return " ".join(generator.choice(words, length))

    rows: list[dict] = []
    for number in range(num_rows):
        if number % 3 == 2:
            before = rows[-1]
            rows.append({**before, "rejected": [{"role": "assistant", "content": sentence(4)}]})
            continue
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{number}: {sentence(3)}?"}],
                "chosen": [{"role": "assistant", "content": sentence(3)}],
                "rejected": [{"role": "assistant", "content": sentence(6)}],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", chat_rows())
