"""A `DPOConfig` of TRL 1.16, in a YAML or JSON file, as options of `train`.

`trl_fields.py` lists every field with its counterpart. Fields that a file lacks have TRL's defaults where
they change what is learned, so that a run from the file is TRL's run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.losses.terms import SETTINGS, is_served, loss_terms
from dpo_cache.options.trl_fields import DPO_CONFIG, FIELDS, TrlField

LOSS_NAMES = {"ipo": "ipo_norm"}  # TRL's loss -> the loss here, where names differ
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
}  # fmt: skip
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw-8bit",
    "adamw_bnb_8bit": "adamw-8bit", "paged_adamw": "adamw-paged", "paged_adamw_32bit": "adamw-paged",
    "paged_adamw_8bit": "adamw-8bit-paged", "adafactor": "adafactor",
}  # fmt: skip
MEASURES = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
RENAMED = {  # fields whose value is taken as it is
    "output_dir": "output", "num_train_epochs": "epochs", "learning_rate": "lr", "seed": "seed",
    "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm", "full_determinism": "deterministic",
    "beta": "beta", "label_smoothing": "label_smoothing", "ld_alpha": "ld_alpha",
    "f_divergence_type": "f_divergence", "f_alpha_divergence_coef": "f_alpha", "discopop_tau": "discopop_tau",
    "router_aux_loss_coef": "router_aux_loss_coef", "model_name_or_path": "model",
    "warmup_ratio": "warmup_ratio",
}  # fmt: skip
LEARNED = ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "warmup_steps", "seed")
READ = {field for field, entry in FIELDS.items() if entry.equal and field != "fsdp"}
SWITCHES = {"bf16", "activation_checkpointing"}  # whose default is neither
NUMBERS = {"eval_steps", "save_total_limit", "ld_alpha", "router_aux_loss_coef"}  # whose default is none
LISTS = {"loss_type", "report_to", "lora_target_modules"}
SHOWN = 40  # characters of a value in a remark
EMPTY: tuple[Any, ...] = (None, "", [], {}, "no", "none", "None")


def options_of_trl(
    path: Path, given: Mapping[str, Any], num_processes: int, log: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The options of `train` that a file with a `DPOConfig` stands for, by name.

    `given` are the options of the command line, which override them. `log` gets two remarks: which values are
    TRL's defaults, and which fields of the file have no counterpart. Raises `OptionError` for a file that is
    not readable, for a field that TRL does not have, and for a reference that changes during training.
    """
    name = f"`trl_config` {path}"
    found = _read(path, name)
    translated = _Translation(name, found, given, num_processes)
    options = translated.options()
    lacking = [
        field for field in LEARNED if not ({field, *DPO_CONFIG[field].equal.split(", ")} & {*found, *given})
    ]
    if lacking:
        values = ", ".join(f"{field} {DPO_CONFIG[field].default:g}" for field in lacking)
        log(f"{name}: TRL's defaults for the fields that it lacks: {values}.")
    if translated.left_out:
        log("\n  ".join([f"{name}: without a counterpart here, and left out:", *translated.left_out]))
    return options


class _Translation:
    """The options for the fields of one file; `left_out` collects fields without an option, with reasons."""

    def __init__(self, name: str, found: dict[str, Any], given: Mapping[str, Any], num_processes: int):
        self.name, self.found, self.given, self.num_processes = name, found, given, num_processes
        self.left_out: list[str] = []

    def options(self) -> dict[str, Any]:
        if self.found.get("sync_ref_model"):
            raise OptionError(
                f"{self.name}: `sync_ref_model`: the reference would change during training, and the cache "
                "has the log-probs of one that does not.\nTrain with TRL, or leave `sync_ref_model` out."
            )
        known: dict[str, Any] = {
            option: self._value(field)
            for field, option in RENAMED.items()
            if field in self.found or field in LEARNED
        }
        for part in (self._loss, self._steps, self._memory, self._evaluation, self._model):
            known.update(part())
        known = {option: value for option, value in known.items() if value is not None}
        self._drop_unserved(known)
        if self.found.get("trust_remote_code") and not self.given.get("trust_remote_code"):
            self._leave_out("trust_remote_code", "give `trust_remote_code` again to run code of the model")
        for field, value in self.found.items():
            if not FIELDS[field].equal and not is_default(FIELDS[field], value):
                self._leave_out(field, FIELDS[field].note)
        return known

    def _value(self, field: str) -> Any:
        return self.found.get(field, FIELDS[field].default)

    def _leave_out(self, field: str, reason: str) -> None:
        value = str(self.found[field])
        self.left_out.append(f"{field} {value if len(value) <= SHOWN else value[:SHOWN] + '…'}: {reason}")

    def _loss(self) -> dict[str, Any]:
        names, weights = self._value("loss_type"), self._value("loss_weights")
        names = [LOSS_NAMES.get(name, name) for name in ([names] if isinstance(names, str) else names)]
        if weights is not None and len(weights) != len(names):
            raise OptionError(
                f"{self.name}: `loss_weights` has {len(weights)} values, and `loss_type` {len(names)}."
            )
        if len(names) > 1 and weights is None:
            weights = [1.0] * len(names)
        if weights is not None:
            names = [f"{one}:{weight:g}" for one, weight in zip(names, weights, strict=True)]
        return {"loss": tuple(names), "wpo": "on" if self._value("use_weighting") else None}

    def _steps(self) -> dict[str, Any]:
        """Batch size, schedule and optimizer."""
        steps = self._value("max_steps")
        pairs = self._value("per_device_train_batch_size") * self._value("gradient_accumulation_steps")
        options = {
            "batch_size": pairs * self.num_processes,
            "max_steps": steps if steps > 0 else None,
            "lr_schedule": self._named("lr_scheduler_type", SCHEDULES),
            "optimizer": self._named("optim", OPTIMIZERS),
        }
        return {**options, **self._warmup()}

    def _warmup(self) -> dict[str, Any]:
        """The warm-up as a number of steps or as a share of them."""
        warmup = self._value("warmup_steps")
        if self.found.get("lr_scheduler_type") == "constant":  # TRL's has no warm-up
            return {"warmup_ratio": 0.0}
        if warmup >= 1:  # overrides warmup_ratio, as in transformers
            return {"warmup_ratio": None, "warmup_steps": int(warmup)}
        return {} if "warmup_ratio" in self.found else {"warmup_ratio": float(warmup)}

    def _memory(self) -> dict[str, Any]:
        bf16, checkpoints = self.found.get("bf16"), self.found.get("activation_checkpointing")
        checkpoints = self.found.get("gradient_checkpointing") if checkpoints is None else checkpoints
        return {
            "precision": None if bf16 is None else ("bf16-mixed" if bf16 else "fp32"),
            "gradient_checkpointing": None if checkpoints is None else ("full" if checkpoints else "none"),
            "place": "inputs=host" if self.found.get("activation_offloading") else None,
            "device": "cpu" if self.found.get("use_cpu") else None,
            "parallel": "fsdp" if self.found.get("fsdp") not in (*EMPTY, False) else None,
        }

    def _evaluation(self) -> dict[str, Any]:
        strategy = self.found.get("eval_strategy", self.found.get("evaluation_strategy", "no"))
        every = self._period(strategy, self.found.get("eval_steps") or self.found.get("logging_steps") or 10)
        has_pairs = any(self.given.get(option) is not None for option in ("eval_pairs", "eval_fraction"))
        if every and not has_pairs:
            field = "eval_strategy" if "eval_strategy" in self.found else "evaluation_strategy"
            self._leave_out(field, "give `eval_pairs` or `eval_fraction`")
        saves = self.found.get("save_strategy", "steps" if "save_steps" in self.found else "no")
        saved = self._period(saves, self._value("save_steps"))
        keep, measure = self.found.get("save_total_limit"), self.found.get("metric_for_best_model")
        if measure is not None and str(measure).removeprefix("eval_") not in MEASURES:
            self._leave_out("metric_for_best_model", "`best` is loss, accuracy or margin")
        return {
            "eval_every": every if has_pairs else None,
            "save_every": saved,
            "keep": keep if saved else None,
            "best": MEASURES.get(str(measure).removeprefix("eval_")) if has_pairs else None,
            "log_to": self._trackers(),
        }

    def _period(self, strategy: Any, steps: Any) -> str | None:
        """A strategy and its steps as the options `eval_every` and `save_every` take them."""
        strategy = str(strategy)
        if strategy == "epoch":
            return "1epoch"
        if strategy != "steps":
            return None
        if steps >= 1:
            return str(int(steps))
        return f"{steps * self._value('num_train_epochs'):g}epochs"

    def _trackers(self) -> tuple[str, ...] | None:
        names = self.found.get("report_to")
        if names in EMPTY or names == ["none"]:
            return None
        names = [names] if isinstance(names, str) else list(names or ())
        if any(name not in TRACKERS for name in names):
            self._leave_out("report_to", f"`log_to` knows {', '.join(TRACKERS)}")
        return tuple(name for name in names if name in TRACKERS)

    def _model(self) -> dict[str, Any]:
        """The fields of TRL's `ModelConfig`."""
        options: dict[str, Any] = {
            "quantize": next((bits for bits in ("4bit", "8bit") if self.found.get(f"load_in_{bits}")), None)
        }
        if self.found.get("use_peft"):
            layers = self.found.get("lora_target_modules")
            layers = ",".join(layers) if isinstance(layers, list) else layers
            options |= {
                "lora_r": self._value("lora_r"),
                "lora_alpha": float(self._value("lora_alpha")),
                "lora_targets": layers,
            }
        return options

    def _named(self, field: str, names: Mapping[str, str]) -> str | None:
        """The option's name for a value of the field; None, and a remark, for a value that has none."""
        value = self._value(field)
        if field in self.found and value not in names:
            self._leave_out(field, f"`{FIELDS[field].equal}` has {', '.join(sorted(set(names.values())))}")
        return names.get(value)

    def _drop_unserved(self, options: dict[str, Any]) -> None:
        """Leave out settings that the losses do not use: TRL ignores them, and they are errors here."""
        chosen = self.given.get("loss", options["loss"])
        try:
            names = tuple(loss_terms((chosen,) if isinstance(chosen, str) else chosen))
        except OptionError as error:
            raise OptionError(f"{self.name}: {error}") from error
        smoothed = [one for one in names if is_served("label_smoothing", (one,)) and one != "sigmoid"]
        if "sigmoid" in names and options.get("label_smoothing"):
            if smoothed:
                raise OptionError(
                    f"{self.name}: `label_smoothing` smooths {smoothed[0]} in TRL, but not sigmoid; here it "
                    "smooths both.\nLeave `label_smoothing` or one of the losses out."
                )
            del options["label_smoothing"]
            self._leave_out("label_smoothing", "TRL ignores it under sigmoid; here it makes cDPO, if given")
        if options.get("f_divergence", "reverse_kl") != "alpha_divergence":
            options.pop("f_alpha", None)
        for setting in [one for one in options if one in SETTINGS]:
            if not is_served(setting, names):
                field = next(field for field, entry in FIELDS.items() if entry.equal == setting)
                if options.pop(setting) != SETTINGS[setting].default:
                    self._leave_out(field, f"{', '.join(names)} has no use for it")


def is_default(field: TrlField, value: Any) -> bool:
    """Return whether a value of a file is the field's default, in one of the ways that a file writes it."""
    if value in EMPTY and (field.default in EMPTY or field.default is False):
        return True
    return value == field.default or value in field.also


def _read(path: Path, name: str) -> dict[str, Any]:
    """The fields in the file, with numbers where TRL has numbers. Raises `OptionError`."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) else f"not {path.suffix.strip('.') or 'YAML'}"
        raise OptionError(
            f"{name}: not readable ({detail}).\nGive a DPOConfig as a YAML or JSON file."
        ) from error
    if not isinstance(content, dict):
        raise OptionError(f"{name}: expected fields of a DPOConfig, such as beta: 0.1, found none.")
    for field in content:
        if field not in FIELDS:
            near = difflib.get_close_matches(str(field), FIELDS, n=1, cutoff=0.75)
            advice = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise OptionError(f"{name}: TRL 1.16's DPOConfig has no field {field}.\n{advice}")
    return {field: _checked(field, value, name) for field, value in content.items()}


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _checked(field: str, value: Any, name: str) -> Any:
    """The value in the type that the field has; text such as `1e-6`, which YAML takes for text, is a number.

    Raises `OptionError`.
    """
    default = FIELDS[field].default
    if value is None or field not in READ:
        return value
    if isinstance(default, bool) or field in SWITCHES:
        is_right, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)) or field in NUMBERS:
        try:
            number = float(value)
            return int(number) if number.is_integer() and not isinstance(default, float) else number
        except (TypeError, ValueError):
            is_right, expected = False, "a number"
    elif field == "loss_weights":
        is_right = isinstance(value, list) and all(type(weight) in (int, float) for weight in value)
        expected = "a list of numbers"
    else:
        texts = value if isinstance(value, list) and field in LISTS else [value]
        is_right = all(isinstance(text, str) for text in texts)
        expected = "text, or a list of texts" if field in LISTS else "text"
    if not is_right:
        raise OptionError(f"{name}: {field} {value}: expected {expected}.")
    return value
