"""Signatures of the public names. Written by `python -m tests.write_stub`; do not edit."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_cache.evaluation.run import Log
from dpo_cache.evaluation.run import OnProgress
from dpo_cache.precomputing.run import Dataset
from dpo_cache.precomputing.run import DatasetDict
from dpo_cache.precomputing.run import IterableDataset
from dpo_cache.precomputing.run import OnSurvey
from dpo_cache.precomputing.run import PreTrainedModel
from dpo_cache.precomputing.run import PreTrainedTokenizerBase
from dpo_cache.precomputing.run import pd
from dpo_cache.precomputing.run import pl
from dpo_cache.sweeping.run import OnRow
from dpo_cache.sweeping.run import SweepProgress
from dpo_cache.training.loop import OnCheckpoint
from dpo_cache.training.loop import OnMetrics
from dpo_cache.upkeep import Location
from dpo_cache.upkeep import OnBytes
from dpo_cache.upkeep import OnTransfer
from dpo_cache.errors import CacheError as CacheError
from dpo_cache.errors import CorruptShardError as CorruptShardError
from dpo_cache.errors import DataError as DataError
from dpo_cache.errors import DpoCacheError as DpoCacheError
from dpo_cache.errors import FormatError as FormatError
from dpo_cache.errors import MissingFileError as MissingFileError
from dpo_cache.errors import ModelError as ModelError
from dpo_cache.errors import NewerFormatError as NewerFormatError
from dpo_cache.errors import NotInCacheError as NotInCacheError
from dpo_cache.errors import OptionError as OptionError
from dpo_cache.errors import OtherRankError as OtherRankError
from dpo_cache.errors import ShapeError as ShapeError
from dpo_cache.errors import StepZeroError as StepZeroError
from dpo_cache.errors import StorageError as StorageError
from dpo_cache.errors import TrainingError as TrainingError
from dpo_cache.errors import UnknownOptionError as UnknownOptionError
from dpo_cache.evaluation import EvalReport as EvalReport
from dpo_cache.exchange import ExportReport as ExportReport
from dpo_cache.exchange import ImportReport as ImportReport
from dpo_cache.losses.reference_losses import preference_loss as preference_loss
from dpo_cache.planning.report import PlanReport as PlanReport
from dpo_cache.precomputing import PrecomputeReport as PrecomputeReport
from dpo_cache.store import Cache as Cache
from dpo_cache.store import PairSet as PairSet
from dpo_cache.store import open_cache as open_cache
from dpo_cache.store.upkeep.compact import Compacted as Compacted
from dpo_cache.store.upkeep.copy import TransferReport as TransferReport
from dpo_cache.store.upkeep.merge import MergeReport as MergeReport
from dpo_cache.store.upkeep.verify import VerifyReport as VerifyReport
from dpo_cache.sweeping import SweepReport as SweepReport
from dpo_cache.training.batches import TrainingBatch as TrainingBatch
from dpo_cache.training.batches import training_batches as training_batches
from dpo_cache.training.output.report import TrainReport as TrainReport
from dpo_cache.types import Completion as Completion
from dpo_cache.types import Pair as Pair
from dpo_cache.types import Score as Score
from dpo_cache.types import ScoredPair as ScoredPair

__version__: str
__all__ = [
    "Cache",
    "CacheError",
    "Compacted",
    "Completion",
    "CorruptShardError",
    "DataError",
    "DpoCacheError",
    "EvalReport",
    "ExportReport",
    "FormatError",
    "ImportReport",
    "MergeReport",
    "MissingFileError",
    "ModelError",
    "NewerFormatError",
    "NotInCacheError",
    "OptionError",
    "OtherRankError",
    "Pair",
    "PairSet",
    "PlanReport",
    "PrecomputeReport",
    "Score",
    "ScoredPair",
    "ShapeError",
    "StepZeroError",
    "StorageError",
    "SweepReport",
    "TrainReport",
    "TrainingBatch",
    "TrainingError",
    "TransferReport",
    "UnknownOptionError",
    "VerifyReport",
    "compact",
    "evaluate",
    "export_pairs",
    "import_pairs",
    "merge",
    "open_cache",
    "plan",
    "precompute",
    "preference_loss",
    "pull",
    "push",
    "sweep",
    "train",
    "training_batches",
    "verify",
]

def compact(
    cache: Location,
    *,
    reference: str | None = None,
) -> list[Compacted]:
    """Merge many score shards into few large ones: one entry of the result for each reference.

    Other processes may read and write during this. A crash loses nothing; a compact cache is not changed.
    Raises `CorruptShardError` for a damaged shard.
    """

def evaluate(
    cache: str | os.PathLike[str],
    pairs: str | None = None,
    model: str | os.PathLike[str] | None = None,
    *,
    loss: str | Sequence[str] = ('sigmoid',),
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = 'reverse_kl',
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    ld_reference: bool = True,
    wpo: Literal["off", "on", "clipped"] = 'off',
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    reference_free: bool = False,
    run: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    reference: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = 'auto',
    device: Literal["auto", "cpu", "cuda", "mps"] = 'auto',
    budget_tokens: int | str = 'auto',
    attention: Literal["auto", "forest", "rows"] = 'auto',
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    progress: bool = False,
) -> EvalReport:
    """Rewards, accuracy and calibration of a policy on a pair set, against the reference log-probs stored
    with it.

    `pairs` is NAME or NAME/SPLIT, None: the only one in the cache. The model is loaded once, and only its own
    log-probs are computed: those of the reference are always read from the cache. With `output` the
    pairs are written as well, one line each: see `pair_lines.py`.

    With `run`, the folder of a training run, the loss settings that are not given are those of the run, and
    `model` is by default its model. Without `run`, the run of a model in RUN/model or RUN/best is found.

    `progress=True` shows on stderr what the command line shows. `on_progress` is called after every chunk,
    `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too. Raises
    `DpoCacheError`; then nothing is written.
    """

def export_pairs(
    cache: str | os.PathLike[str],
    pairs: str,
    output: str | os.PathLike[str] | None = None,
    *,
    format: Literal["auto", "parquet", "jsonl", "datasets"] = 'auto',
    token_logps: bool = False,
    text: bool = True,
    dataset: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    log: Log | None = None,
) -> ExportReport:
    """Write a pair set to a Parquet or JSONL file or a folder of `datasets`, with the columns of the module's
    docstring.

    The output is streamed, so memory stays flat, and appears under its name when it is complete. `log` gets
    each remark (default: the logger `dpo_cache`); the report lists them, too. Raises `DpoCacheError`.
    """

def import_pairs(
    cache: str | os.PathLike[str],
    dataset: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str | Sequence[str] = (),
    format: Literal["auto", "ids", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "messages", "swift", "openai", "output", "compared"] = 'auto',
    map: str | Sequence[str] = (),
    model: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    template_date: str | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["unknown", "float32", "bfloat16", "float16"] = 'unknown',
    max_length: int | None = None,
    truncation: Literal["keep-start", "keep-end", "prompt-left", "drop"] = 'keep-start',
    max_prompt_length: int | None = None,
    overwrite: bool = False,
    reference: str,
    log: Log | None = None,
) -> ImportReport:
    """Enter pairs whose reference log-probs were computed elsewhere, under a reference of this name.

    Every row is read and checked before anything is written. A pair set of that name is replaced if it was
    imported from the same source under the same name; another one only with `overwrite`.
    `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too. Raises
    `DpoCacheError`: `DataError` names each unusable row.
    """

def merge(
    sources: Location | Sequence[Location],
    destination: Location,
    *,
    prefer: Literal["src", "dest"] | None = None,
    rename: bool = False,
    on_progress: OnBytes | None = None,
    progress: bool = False,
) -> MergeReport:
    """Copy everything that the destination lacks from the sources. A missing destination is created.

    The order of the sources does not matter, and a second merge copies nothing. Pair sets of one name with
    different pairs raise `CacheError` before anything is copied, unless `prefer` or `rename` decides; so do
    values of one completion that differ by more than rounding, unless `prefer` decides. Raises
    `CorruptShardError` for a damaged file.
    """

def plan(
    model: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    pairs: str | None = None,
    dataset: str | os.PathLike[str] | None = None,
    gpu: str | None = None,
    ram: str | None = None,
    tflops: float | None = None,
    link_gbs: float = 25.0,
    device: Literal["cuda", "mps", "cpu"] = 'cuda',
    split: str | Sequence[str] = (),
    limit: int | None = None,
    format: Literal["auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "messages", "swift", "openai", "output", "compared", "ranked", "completions"] = 'auto',
    map: str | Sequence[str] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    max_length: int = 1024,
    truncation: Literal["keep-start", "keep-end", "prompt-left", "drop"] = 'keep-start',
    max_prompt_length: int | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = 'auto',
    stream_weights: Literal["auto", "on", "off"] = 'auto',
    lora_r: int | None = None,
    lora_targets: str = 'all-linear',
    quantize: Literal["none", "8bit", "4bit"] = 'none',
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 32,
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor"] = 'adamw',
    max_grad_norm: float = 1.0,
    budget_tokens: int | str = 'auto',
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = 'auto',
    rounding: Literal["auto", "nearest", "stochastic", "compensated"] = 'auto',
    gradient_checkpointing: Literal["auto", "none", "cheap", "selective", "full"] = 'auto',
    memory: Literal["auto", "fast", "small", "least"] = 'auto',
    place: str | None = None,
    log: Log | None = None,
) -> PlanReport:
    """Predict the memory, time and disk of scoring and training, without weights and without a GPU.

    Activations are counted by running the package's own passes on tensors without values; weights, gradients
    and optimizer state are arithmetic. Next to each way to train is DPO with a live reference, as TRL 1.16
    runs it. Nothing is written. `log` gets each remark (default: the logger `dpo_cache`). Raises
    `DpoCacheError`.
    """

def precompute(
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: str | os.PathLike[str] | Dataset | DatasetDict | IterableDataset | Sequence[dict[str, Any]] | pd.DataFrame | pl.DataFrame,
    cache: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str | Sequence[str] = (),
    limit: int | None = None,
    streaming: bool = False,
    window: int = 16384,
    format: Literal["auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "messages", "swift", "openai", "output", "compared", "ranked", "completions"] = 'auto',
    map: str | Sequence[str] = (),
    ranked_pairs: Literal["all", "best"] = 'all',
    on_error: Literal["stop", "drop"] = 'stop',
    revision: str | None = None,
    reference: str | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    template_date: str | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = 'auto',
    quantize: Literal["none", "8bit", "4bit"] = 'none',
    device: Literal["auto", "cpu", "cuda", "mps"] = 'auto',
    max_length: int = 1024,
    truncation: Literal["keep-start", "keep-end", "prompt-left", "drop"] = 'keep-start',
    max_prompt_length: int | None = None,
    budget_tokens: int | str = 'auto',
    overwrite: bool = False,
    dry_run: bool = False,
    show: int = 0,
    early_answers: Literal["stop", "keep"] = 'stop',
    attention: Literal["auto", "forest", "rows"] = 'auto',
    stream_weights: Literal["auto", "on", "off"] = 'auto',
    audit: int | str = 'auto',
    num_workers: int | None = None,
    min_workers: int | None = None,
    max_workers: int | None = None,
    ray: str | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float | None = None,
    unit_tokens: int | str = 'auto',
    device_map: Literal["off", "auto"] = 'off',
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    on_show: OnSurvey | None = None,
    on_survey: OnSurvey | None = None,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    progress: bool = False,
) -> PrecomputeReport:
    """Score the data set's completions that the cache lacks and publish its pair sets.

    Only completions that no earlier run scored under the same reference are run through the model, and the
    model is loaded only if there are any. Scores are published at least every 20 seconds. Interrupted runs
    resume: make the same call again. The global random state is not changed.

    `dataset` may be rows that are loaded already; then `name=` is needed, and the split is train, or the
    splits are those of a `DatasetDict`. `model` may be a loaded model; then `tokenizer` is needed, too. If
    its weights and config equal those of the checkpoint it was loaded from, it is the same reference as that
    checkpoint; otherwise it is a separate reference, and a remark reports it. It is scored in eval mode,
    and has its former mode afterwards.

    With `num_workers`, other processes score, each on its own device; with `ray`, actors on a Ray cluster do.
    Two runs over the same data at the same time share the work: each draws its units in random order, and
    leaves out what others have published.

    With `dry_run` the data is surveyed and nothing else happens: no model is loaded, nothing is written.

    `progress=True` shows on stderr what the command line shows. `on_survey` gets the survey of each split
    before the model is loaded (of a stream: at its end), `on_progress` is called after every chunk, and `log`
    gets each remark (default: the logger `dpo_cache`); the report lists them, too. With `show`, `on_show`
    gets each survey before anything is scored, with that many rows as text in `shown` (of a stream: rows of
    its first window). Raises `DpoCacheError`; nothing that was published before is lost.
    """

def pull(
    remote: str,
    local: Location,
    *,
    pairs: str | Sequence[str] = (),
    reference: str | Sequence[str] = (),
    overwrite: bool = False,
    on_progress: OnTransfer | None = None,
    progress: bool = False,
) -> TransferReport:
    """Copy a remote cache, or some of it, to a local folder, which is created if it does not exist.

    See `push`, which copies in the other direction.
    """

def push(
    local: Location,
    remote: str,
    *,
    pairs: str | Sequence[str] = (),
    reference: str | Sequence[str] = (),
    overwrite: bool = False,
    on_progress: OnTransfer | None = None,
    progress: bool = False,
) -> TransferReport:
    """Copy a local cache, or some of it, to a remote one, such as `s3://bucket/cache`.

    Only files that are missing there are sent, each checked against its digest. Interrupted copies resume:
    make the same call again. Raises `CacheError` before anything is sent if the target holds other pairs
    under the same name.
    """

def sweep(
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | Sequence[str | None] = (),
    pairs: str | Sequence[str | None] = (),
    trust_remote_code: bool | Sequence[bool] = (),
    chat_template: str | Sequence[str] = (),
    reference: str | Sequence[str | None] = (),
    lora_r: int | str | Sequence[int | str | None] = (),
    lora_alpha: float | str | Sequence[float | str | None] = (),
    lora_targets: str | Sequence[str] = (),
    peft_config: str | Sequence[str | None] = (),
    merge_adapter: bool | Sequence[bool] = (),
    quantize: str | Sequence[str] = (),
    loss: str | Sequence[str] = (),
    beta: float | str | Sequence[float | str] = (),
    label_smoothing: float | str | Sequence[float | str] = (),
    f_divergence: str | Sequence[str] = (),
    f_alpha: float | str | Sequence[float | str] = (),
    ld_alpha: float | str | Sequence[float | str | None] = (),
    ld_reference: bool | Sequence[bool] = (),
    wpo: str | Sequence[str] = (),
    discopop_tau: float | str | Sequence[float | str] = (),
    simpo_gamma: float | str | Sequence[float | str] = (),
    cpo_alpha: float | str | Sequence[float | str] = (),
    reference_free: bool | Sequence[bool] = (),
    router_aux_loss_coef: float | str | Sequence[float | str | None] = (),
    epochs: float | str | Sequence[float | str] = (),
    max_steps: int | str | Sequence[int | str | None] = (),
    batch_size: int | str | Sequence[int | str] = (),
    shuffle: bool | Sequence[bool] = (),
    lr: float | str | Sequence[float | str | None] = (),
    lr_schedule: str | Sequence[str] = (),
    warmup_ratio: float | str | Sequence[float | str] = (),
    warmup_steps: int | str | Sequence[int | str | None] = (),
    optimizer: str | Sequence[str] = (),
    weight_decay: float | str | Sequence[float | str] = (),
    max_grad_norm: float | str | Sequence[float | str] = (),
    memory: str | Sequence[str] = (),
    place: str | Sequence[str | None] = (),
    budget_tokens: str | Sequence[str] = (),
    precision: str | Sequence[str] = (),
    rounding: str | Sequence[str] = (),
    gradient_checkpointing: str | Sequence[str] = (),
    offload_activations: bool | Sequence[bool] = (),
    free_gradients: bool | Sequence[bool] = (),
    device: str | Sequence[str] = (),
    eval_pairs: str | Sequence[str | None] = (),
    eval_fraction: float | str | Sequence[float | str | None] = (),
    eval_every: str | Sequence[str | None] = (),
    best: str | Sequence[str] = (),
    patience: int | str | Sequence[int | str | None] = (),
    sample: int | str | Sequence[int | str] = (),
    save_every: str | Sequence[str | None] = (),
    keep: int | str | Sequence[int | str] = (),
    seed: int | str | Sequence[int | str] = (),
    deterministic: bool | Sequence[bool] = (),
    step_zero: str | Sequence[str] = (),
    log_to: str | Sequence[str] = (),
    log_names: str | Sequence[str] = (),
    jobs: int = 1,
    resume: bool | str | os.PathLike[str] = False,
    plot: str | os.PathLike[str] | None = None,
    on_progress: Callable[[SweepProgress], None] | None = None,
    on_run: OnRow | None = None,
    log: Log | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> SweepReport:
    """Train once for each combination of the options' values, `jobs` at once, and compare the runs.

    Keyword arguments are the options of `train`; a list holds several values, as in
    `beta=[0.05, 0.1], loss=["sigmoid", "ipo"]`, and a string may hold several between commas. Called again
    with the same values, or with more of them, finished runs are left as they are, stopped ones are resumed,
    and failed ones are tried again; `resume=SWEEP` reads cache and values from that folder's sweep.json. A
    run that fails does not end the others.

    `progress=True` shows on stderr what the command line shows. `on_progress` is called a few times a second,
    `on_run` with a report when a run has ended, `log` gets each remark (default: the logger `dpo_cache`); the
    report lists them, too. When `should_stop` returns True, active runs finish their step and save, and no
    other starts.

    Raises `DpoCacheError` before anything runs: combinations that make no sense, a folder of something else,
    a missing pair set.
    """

def train(
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    loss: str | Sequence[str] = ('sigmoid',),
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = 'reverse_kl',
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    ld_reference: bool = True,
    wpo: Literal["off", "on", "clipped"] = 'off',
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    reference_free: bool = False,
    pairs: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | os.PathLike[str] = 'pairs',
    reference: str | None = None,
    config: str | os.PathLike[str] | None = None,
    trl_config: str | os.PathLike[str] | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str = 'all-linear',
    peft_config: str | os.PathLike[str] | None = None,
    merge_adapter: bool = False,
    quantize: Literal["none", "8bit", "4bit"] = 'none',
    router_aux_loss_coef: float | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 32,
    shuffle: bool = True,
    lr: float | None = None,
    lr_schedule: Literal["constant", "linear", "cosine"] = 'linear',
    warmup_ratio: float = 0.1,
    warmup_steps: int | None = None,
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor"] = 'adamw',
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    memory: Literal["auto", "fast", "small", "least"] = 'auto',
    place: str | None = None,
    budget_tokens: int | str = 'auto',
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = 'auto',
    rounding: Literal["auto", "nearest", "stochastic", "compensated"] = 'auto',
    gradient_checkpointing: Literal["auto", "none", "cheap", "selective", "full"] = 'auto',
    offload_activations: bool = False,
    free_gradients: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = 'auto',
    parallel: Literal["ddp", "fsdp"] = 'ddp',
    launch: int | None = None,
    eval_pairs: str | None = None,
    eval_fraction: float | None = None,
    eval_every: int | str | None = None,
    best: Literal["loss", "accuracy", "margin"] = 'loss',
    patience: int | None = None,
    sample: int = 0,
    save_every: int | str | None = None,
    keep: int = 1,
    resume: bool | str = False,
    seed: int = 0,
    deterministic: bool = False,
    step_zero: Literal["auto", "strict", "warn", "off"] = 'auto',
    log_to: str | Sequence[str] = (),
    log_names: Literal["trl", "original"] = 'trl',
    dry_run: bool = False,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_metrics: OnMetrics | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    log: Log | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> TrainReport:
    """Fine-tune a policy on a pair set of the cache, against the reference log-probs stored there.

    Options that are not given come from the file `config`, if one is given. `progress=True` shows on stderr
    what the command line shows.

    `model` may be a model that is loaded already. It is trained in place: afterwards it has the weights of
    the last step, in the dtype and on the device of the run, and a new adapter (`lora_r`) stays in it. It
    counts as the reference only if its weights are those of its checkpoint and of the reference; then step
    zero is checked. `tokenizer` is saved with it; default: the one that made the pairs. Callbacks:

    - `on_metrics` gets each line of metrics.jsonl once it is written, with `total_steps` and `left_s`
      (seconds, or None) added;
    - `on_checkpoint` the folder of each checkpoint once it is published;
    - `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too;
    - `should_stop` is called after every step. If it returns True, the state is saved, and the run can be
      resumed.

    In a program that accelerate launch, torchrun or SLURM has started several times, all processes call this
    with the same options and train together; the main one calls the callbacks, and all return its report.

    An exception in a callback ends the run; saved files stay. Raises `DpoCacheError`. The model is saved
    in `output/model`, the metrics in `output/metrics.jsonl`. With `dry_run` nothing is written.
    """

def verify(
    cache: Location,
    *,
    repair: bool = False,
    subset: str | None = None,
    rescore: int | None = None,
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = 'auto',
    trust_remote_code: bool = False,
    on_progress: OnBytes | None = None,
    log: Log | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Check every byte of a cache, and that its files agree with each other.

    If something is wrong, `report.is_whole` is False, and `report.problems` names each file, what was
    expected, what was found, and what to do. With `repair` bad files are moved aside, and `report.repair`
    lists them; files that could not be read are left. With `subset`, such as `10%`, so many of the files are
    read, and others the next time. With `rescore` and `model` some completions are scored again, and
    `report.rescored` compares them with the cache.

    Problems raise nothing. Raises `FormatError` if there is no cache, and `ModelError` if the model is not
    the reference: then nothing is returned, and files that were moved aside stay there.
    """
