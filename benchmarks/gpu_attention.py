"""A forest's attention on a CUDA device: is each kernel right, and how fast does it train?

    python benchmarks/gpu_attention.py [--seconds 85]

1. On small random models, log-probs and gradients by each kernel, compared with the model's own attention over
   padded rows in float32. In bf16 a kernel may err about as much as these rows do in bf16.
2. Forward and backward passes of a Llama of 1.2 billion random bf16 weights over three shapes of pairs.
   Tokens are those of the padded batch without its padding, the same for all; `rows` is that batch.

Whatever does not fit into the time is left out, and named. Needs torch, transformers and a GPU, nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers as hf

from dpo_cache.lm.forest.attention import set_attention, use_forest_attention
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import Completion

CUDA = torch.device("cuda")
SHAPES = ((4, 512, 256), (16, 100, 60), (64, 30, 20))  # pairs, tokens of the prompt and of each answer
HEADS = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
}
LARGE = {
    "vocab_size": 128256,
    "num_hidden_layers": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **HEADS)),
    "mistral, window 100": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**SMALL, **HEADS, sliding_window=100)
    ),
    "gemma2, soft cap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**{**SMALL, **HEADS}, head_dim=64, sliding_window=100, query_pre_attn_scalar=64)
    ),
}
KERNELS_OF = {
    "llama": ("rows", "segments", "varlen"),
    "mistral, window 100": ("rows", "segments", "varlen"),
    "gemma2, soft cap": ("rows", "segments"),
}
PAIRS = [(name, torch.bfloat16) for name in MODELS] + [("llama", torch.float32)]


PARITY = "\n| model | dtype | kernel | log-prob: largest gap | mean gap | gradient: largest relative gap | seconds |\n|---|---|---|---|---|---|---|"
SPEED = "\n| pairs | kernel | ms a step | tokens/s | peak, GB | waits in forward |\n|---|---|---|---|---|---|"
Task = tuple[float, str, Callable[[], None]]  # seconds that it may take, what it is, and the function


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=85)
    started, limit = time.monotonic(), parser.parse_args().seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {hf.__version__}")
    skipped = []
    for header, tasks in _tables():
        print(header)
        for seconds, name, run in tasks:
            if time.monotonic() - started + seconds < limit:
                run()
            else:
                skipped.append(name)
    print(f"\n{time.monotonic() - started:.0f} s", f"left out: {', '.join(skipped)}" if skipped else "")


def _tables() -> Iterator[tuple[str, list[Task]]]:
    """The compiler of FlexAttention takes longest, so that comes last, the most useful first."""
    fast = ("rows", "segments", "varlen")
    yield (
        PARITY,
        [_parity(name, dtype, one) for name, dtype in PAIRS for one in fast if one in KERNELS_OF[name]],
    )
    model = make_large()
    yield SPEED, [_speed(model, shape, kernel, 3) for kernel in fast for shape in SHAPES]
    yield PARITY, [_parity(name, torch.bfloat16, "flex") for name in ("llama", "gemma2, soft cap")]
    yield SPEED, [_speed(model, shape, "flex", 5) for shape in SHAPES]
    yield PARITY, [_parity("llama", torch.float32, "flex")]


def _parity(name: str, dtype: torch.dtype, kernel: str) -> Task:
    seconds = 20 if kernel == "flex" else 3
    return seconds, f"{kernel} on {name} in {str(dtype)[6:]}", lambda: compare(name, dtype, kernel)


def _speed(model: hf.PreTrainedModel, shape: tuple[int, int, int], kernel: str, seconds: float) -> Task:
    return seconds, f"speed of {kernel}, {shape}", lambda: measure(model, shape, kernel)


def make_pairs(
    num_pairs: int, prompt: int, answer: int, vocab_size: int, vary: bool = False
) -> list[Completion]:
    """Two random answers to each of some random prompts; of these lengths, or shorter ones if they vary."""
    generator = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        if vary:
            length = int(generator.integers(1, length + 1))
        return generator.integers(0, vocab_size, length).astype(np.uint32)

    prompts = [ids(prompt) for _ in range(num_pairs)]
    return [Completion(one, ids(answer)) for one in prompts for _ in range(2)]


def make_small(name: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    with CUDA:
        return MODELS[name]().eval().to(dtype)


def make_large() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LARGE, **HEADS})).eval()
    finally:
        torch.set_default_dtype(before)


def policy_of(model: hf.PreTrainedModel, kernel: str) -> PolicyModel:
    if kernel == "rows":
        set_attention(model, "eager" if model.config.model_type == "gemma2" else "sdpa")
        return PolicyModel(
            model, AttentionChoice("rows", "", has_plain_head=model.config.model_type != "gemma2")
        )
    assert use_forest_attention(model)
    return PolicyModel(
        model,
        AttentionChoice("forest", "", kernel=kernel, has_plain_head=model.config.model_type != "gemma2"),
    )


def values(name: str, dtype: torch.dtype, kernel: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of the tokens, and the gradient of a weighted sum of them."""
    policy, completions = (
        policy_of(make_small(name, dtype), kernel),
        make_pairs(24, 300, 150, 1000, vary=True),
    )
    (logps,) = policy([completions])
    weights = torch.linspace(-1, 1, len(logps.lengths), device=CUDA, dtype=torch.float64)
    (logps.sums() * weights).sum().backward()
    grads = {key: one.grad.float() for key, one in policy.model.named_parameters() if one.grad is not None}
    return logps.tokens_T.detach().float(), grads


expected: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}


def compare(name: str, dtype: torch.dtype, kernel: str) -> None:
    """One line: the gaps of a kernel to padded rows in float32."""
    started = time.monotonic()
    if name not in expected:
        expected[name] = values(name, torch.float32, "rows")
    line = f"| {name} | {str(dtype)[6:]} | {kernel} |"
    try:
        logps, grads = values(name, dtype, kernel)
    except Exception as error:  # a kernel that fails is a result
        print(line, f"{type(error).__name__}: {str(error)[:200]!r} | | | |", flush=True)
        return
    gaps = (logps - expected[name][0]).abs()
    relative = max(
        float((grads[key] - one).norm() / one.norm())
        for key, one in expected[name][1].items()
        if float(one.norm()) > 0
    )
    seconds = time.monotonic() - started
    print(
        line,
        f"{float(gaps.max()):.2e} | {float(gaps.mean()):.2e} | {relative:.2e} | {seconds:.1f} |",
        flush=True,
    )


def measure(model: hf.PreTrainedModel, shape: tuple[int, int, int], kernel: str) -> None:
    """One line: the speed of forward and backward passes."""
    policy, completions = policy_of(model, kernel), make_pairs(*shape, LARGE["vocab_size"])
    line = f"| {shape[0]} of {shape[1]} + 2 x {shape[2]} | {kernel} |"

    def step() -> None:
        (logps,) = policy([completions])
        logps.sums().sum().backward()
        model.zero_grad(set_to_none=True)

    try:
        for _ in range(2):
            step()
        waits = "none" if (found := first_wait(lambda: policy([completions]))) is None else found
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started, num_steps = time.perf_counter(), 0
        while time.perf_counter() - started < 1.2 or num_steps < 3:
            step()
            num_steps += 1
            torch.cuda.synchronize()
        elapsed = (time.perf_counter() - started) / num_steps
    except Exception as error:  # a kernel that fails is a result
        print(line, f"{type(error).__name__}: {str(error)[:200]!r} | | | |", flush=True)
        return
    tokens, peak = sum(map(len, completions)), torch.cuda.max_memory_allocated() / 1e9
    print(line, f"{1e3 * elapsed:.1f} | {tokens / elapsed:,.0f} | {peak:.1f} | {waits} |", flush=True)


def first_wait(run: Callable[[], object]) -> str | None:
    """The first place where the host waits for the device within a forward pass."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


if __name__ == "__main__":
    main()
