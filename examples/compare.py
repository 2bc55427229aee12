"""Shows what a run has learned: its accuracy on held-out pairs next to two rules that need no training, and
answers to the first held-out prompts before and after.

python examples/compare.py CACHE PAIRS DATA REFERENCE RUN
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import dpo_cache

NUM_PROMPTS, NUM_TOKENS = 3, 24


def share_right(margins: list[float]) -> float:
    """The share of pairs with a margin above 0: the chosen answer is ranked first. A tie counts half."""
    return sum((margin > 0) + (margin == 0) / 2 for margin in margins) / len(margins)


def last_accuracy(run: Path) -> float:
    """The accuracy of a run's last evaluation."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/rewards/accuracies"] for line in metrics if "eval/rewards/accuracies" in line][-1]


def write_answers(model: str | Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """A model's most likely answer to each prompt, on one line."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        written = policy.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)[0]
        answer = tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(" ".join(answer.split()))
    return texts


def main(cache: str, name: str, data: Path, reference: str, run: Path) -> None:
    """Print the comparison. The pair set `name` was made from the file `data`."""
    scored = list(dpo_cache.open_cache(cache).pairs(name))
    lengths = [len(one.pair.rejected.completion_ids) - len(one.pair.chosen.completion_ids) for one in scored]
    likelier = [one.ref_chosen.logps - one.ref_rejected.logps for one in scored]
    print(f"Pairs whose chosen answer is ranked first, of {len(scored)} that were held out:")
    print(f"  the shorter answer first       {share_right(lengths):6.1%}")
    print(f"  by the reference's log-probs   {share_right(likelier):6.1%}")
    print(f"  by the rewards after training  {last_accuracy(run):6.1%}")

    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()[:NUM_PROMPTS]]
    before, after = write_answers(reference, prompts), write_answers(run / "model", prompts)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"\n{prompt[-1]['content']}\n  before  {old}\n  after   {new}")


if __name__ == "__main__":
    disable_progress_bar()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
