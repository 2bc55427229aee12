"""Errors of bf16 and fp16 in nats per token, on tiny random models: the basis of the tolerances.

forest - rows    the comparison of the self-check: the same dtype, another order of the sums
forest - fp32    the stored log-probs, compared with the same model's fp32 log-probs
"""

from __future__ import annotations

import torch

from dpo_cache.lm.budget import Budget
from dpo_cache.lm.self_check import AttentionChoice, score_completions, use_forest_attention
from tests.conftest import make_completions
from tests.lm.families import make_model

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "phi", "gpt2", "olmo2", "cohere2", "granite", "glm4")


def main() -> None:
    completions = make_completions(num_prompts=30)
    print("| dtype | forest - rows, largest | mean | forest - fp32, largest | mean |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        to_rows, to_fp32 = [], []
        for family in FAMILIES:
            exact = logps(family, torch.float32, completions, "rows")
            rows = logps(family, dtype, completions, "rows")
            forest = logps(family, dtype, completions, "forest")
            to_rows.append((forest - rows).abs())
            to_fp32.append((forest - exact).abs())
        gaps = [torch.cat(values) for values in (to_rows, to_fp32)]
        print(
            f"| {str(dtype)[6:]} | "
            + " | ".join(f"{float(values.max()):.3f} | {float(values.mean()):.4f}" for values in gaps)
            + " |"
        )


@torch.no_grad()
def logps(family: str, dtype: torch.dtype, completions: list, name: str) -> torch.Tensor:
    model = make_model(family).to(dtype)
    if name == "forest":
        assert use_forest_attention(model)
    found = {}
    for progress in score_completions(
        model, completions, AttentionChoice(name, ""), Budget(512, model.device, print)
    ):
        found.update(progress.scores)
    return torch.cat([torch.from_numpy(found[index].token_logps) for index in range(len(completions))])


if __name__ == "__main__":
    main()
