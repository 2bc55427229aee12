"""The names of metrics in trackers: those of TRL's trainer, or those of the original DPO repository.

`docs/tracking.md` has a table of both. A metric that the other program does not have keeps its own name.
"""

from __future__ import annotations

from dpo_cache.losses.metrics import Metrics

EVAL = "eval/"
# TRL's own num_tokens is a different count: the tokens read since the start
TRL_NAMES = {"lr": "learning_rate", "num_tokens": "tokens_run"}
ORIGINAL_NAMES = {"pairs_per_s": "examples_per_second"}
# names that contain train or eval: rewards_train/chosen, loss/train
ORIGINAL_GROUPS = ("rewards", "logps", "loss")


def tracked_names(line: Metrics, log_names: str, tracker: str, *, epoch: float, num_examples: int) -> Metrics:
    """A line of metrics.jsonl in the form that is sent to a tracker.

    `epoch` and `num_examples` (trained on so far) are arguments because lines of evaluations lack them.
    """
    is_eval = any(name.startswith(EVAL) for name in line)
    values = {
        name.removeprefix(EVAL): value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }
    if log_names == "original":
        return _original_names(
            values, "eval" if is_eval else "train", step=int(line["step"]), num_examples=num_examples
        )
    return _trl_names(values, tracker, is_eval=is_eval, step=int(line["step"]), epoch=epoch)


def _trl_names(values: Metrics, tracker: str, *, is_eval: bool, step: int, epoch: float) -> Metrics:
    """The names by transformers' rule: without a prefix for MLflow; with the step for Weights & Biases and
    Trackio.
    """
    evaluated, trained = ("eval_", "") if tracker == "mlflow" else ("eval/", "train/")
    prefix = evaluated if is_eval else trained
    named = {
        f"{prefix}{TRL_NAMES.get(name, name)}": value for name, value in values.items() if name != "epoch"
    }
    global_step = {"train/global_step": step} if tracker in ("wandb", "trackio") else {}
    return {**named, f"{trained}epoch": epoch, **global_step}


def _original_names(values: Metrics, phase: str, *, step: int, num_examples: int) -> Metrics:
    counters = {"counters/examples": num_examples, "counters/updates": step} if phase == "train" else {}
    return {**{_original_name(name, phase): value for name, value in values.items()}, **counters}


def _original_name(name: str, phase: str) -> str:
    group, _, rest = name.partition("/")
    if name == "loss":
        return f"loss/{phase}"
    if group in ORIGINAL_GROUPS:
        return f"{group}_{phase}/{rest}"
    return ORIGINAL_NAMES.get(name, name) if phase == "train" else f"eval/{name}"
