"""Predicts the memory, time and disk of `precompute` and `train` without any weights, and what fits each
card.

config -> lengths -> ways of each method from the fastest down -> those that fit each card, with a command
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.errors import DpoCacheError, ModelError, first_line, shown_bytes
from dpo_cache.lm.budget import SIZES as CHUNK_SIZES
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.free_memory import total_host_bytes
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.architecture import check_causal
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.tensor_names import FAILURES
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.options.plan import CARDS, PlanOptions, size_in_bytes
from dpo_cache.planning.commands import precompute_command, train_command
from dpo_cache.planning.disk import BYTES_PER_TOKEN
from dpo_cache.planning.footprint import build_fake
from dpo_cache.planning.parts import Method, Parts
from dpo_cache.planning.placed import ModelBytes, measure_model
from dpo_cache.planning.report import PlannedData, PlannedScoring, PlannedTraining, PlanReport
from dpo_cache.planning.scoring import ScoringCounts
from dpo_cache.planning.timing import EFFICIENCY, count_operations, forward_operations, measure_tflops
from dpo_cache.planning.ways import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    PROCESS_BYTES,
    Candidates,
    Way,
    counts_of,
    device_need,
    host_need,
    methods_of,
)
from dpo_cache.planning.workload import Workload, read_workload


@keywords_of(PlanOptions)
@keeps_remarks
def plan(model: str | os.PathLike[str], *, log: Log | None = None, **options: Any) -> PlanReport:
    """Predict the memory, time and disk of scoring and training, without weights and without a GPU.

    Activations are counted by running the package's own passes on tensors without values; weights, gradients
    and optimizer state are arithmetic. Next to each way to train is DPO with a live reference, as TRL 1.16
    runs it. Nothing is written. `log` gets each remark (default: the logger `dpo_cache`). Raises
    `DpoCacheError`.
    """
    log = log or log_remark
    chosen = make_options(PlanOptions, {"model": model, **options}, log)
    config = _read_config(chosen)
    workload = read_workload(chosen, config.get_text_config().vocab_size)
    tflops, source = _speed(chosen)
    planner = _Planner(chosen, config, workload, tflops, log)
    try:
        return planner.report(source)
    except DpoCacheError:
        raise
    except FAILURES as error:
        raise ModelError(
            f"{chosen.model}: its memory cannot be predicted ({first_line(error)}): its code does not run on "
            "tensors without values.\nTry `dpo-cache train --dry-run`, which measures two steps."
        ) from error


@dataclass(frozen=True)
class _Card:
    name: str
    device_bytes: int | None  # None: a device without memory of its own
    host_bytes: int | None  # None: any number fits

    def fits(self, device: int, host: int) -> bool:
        if self.device_bytes is None:  # device and host share one memory
            return self.host_bytes is None or device + host <= self.host_bytes
        return device <= self.device_bytes and (self.host_bytes is None or host <= self.host_bytes)


class _Planner:
    def __init__(
        self, options: PlanOptions, config: PreTrainedConfig, workload: Workload, tflops: float, log: Log
    ):
        self.options, self.config, self.workload, self.log = options, config, workload, log
        self.cards = _cards(options)
        self.tflops, self._second = tflops, 1 / (tflops * 1e12 * EFFICIENCY)  # seconds per operation
        self.counts = counts_of(config, workload, options)
        self.is_gpu = options.device == "cuda"
        self._logged: set[str] = set()  # remarks that hold for several methods

    def report(self, tflops_source: str) -> PlanReport:
        workload, options = self.workload, self.options
        methods = methods_of(options)
        training = [way for method in methods for way in self._training(method)]
        scoring = [way for bits in _distinct(methods) for way in self._scoring(bits)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            count = sum(one.numel() for one in build_fake(self.config, torch.bfloat16).parameters())
        return PlanReport(
            model=options.model,
            num_parameters=count,
            device=options.device,
            data=PlannedData(
                workload.source,
                workload.is_assumed,
                workload.num_pairs,
                workload.mean_prompt,
                workload.mean_answer,
                workload.longest,
                workload.row_tokens,
                workload.forest_tokens,
            ),
            num_steps=options.steps(workload.num_pairs),
            tflops=self.tflops,
            tflops_source=tflops_source,
            link_gbs=options.link_gbs,
            cards=[card.name for card in self.cards],
            cache_bytes=BYTES_PER_TOKEN * workload.row_tokens,
            precompute=scoring,
            train=training,
            assumptions=self._assumptions(),
        )

    # -- training ---------------------------------------------------------------------------------------

    def _training(self, method: Method) -> Iterator[PlannedTraining]:
        candidates = Candidates(self.counts, self.options, method, self._second)
        live = self._live_reference(candidates)
        for name, placement in candidates.presets():
            kept = self._first_that_fit(candidates.variants(name, placement))
            for way, cards in kept:
                yield self._planned(way, candidates.sizes, live, cards)
        if candidates.refused:
            self._log_once(f"{self.options.model} cannot run layer by layer: {candidates.refused}.")

    def _first_that_fit(self, variants: Iterator[Way]) -> list[tuple[Way, list[_Card]]]:
        """For each card the first of the variants that fits it; the last one where none fits."""
        kept: list[tuple[Way, list[_Card]]] = []
        left, last = list(self.cards), None
        for way in variants:
            last = way
            cards = [card for card in left if card.fits(self._device_need(way.device), host_need(way.host))]
            left = [card for card in left if card not in cards]
            if cards:
                kept.append((way, cards))
            if not any(self._may_fit(way, card) for card in left):
                break
        return kept if kept or last is None else [(last, [])]

    def _may_fit(self, way: Way, card: _Card) -> bool:
        """Return whether fewer tokens at once could help: the permanent tensors of a step fit."""
        standing = Parts(way.device.weights, way.device.gradients, way.device.optimizer)
        return card.fits(self._device_need(standing), 0)

    def _planned(
        self, way: Way, sizes: ModelBytes, live: int | None, cards: Sequence[_Card]
    ) -> PlannedTraining:
        seconds = way.operations * self._second
        if way.transfers is not None and self.is_gpu:
            link = self.options.link_gbs
            seconds = max(seconds, way.transfers.pass_s(link)) + way.transfers.update_s(link)
        steps = self.options.steps(self.workload.num_pairs)
        return PlannedTraining(
            method=str(way.method),
            memory=way.memory,
            place=str(way.placement),
            gradient_checkpointing=way.recomputation,
            budget_tokens=way.budget_tokens,
            device=way.device,
            host=way.host,
            device_bytes=self._device_need(way.device),
            host_bytes=host_need(way.host),
            live_reference_bytes=live,
            step_seconds=seconds,
            seconds=seconds * steps,
            transfers=way.transfers if self.is_gpu else None,
            checkpoint_bytes=sizes.trained + sizes.optimizer,
            model_bytes=sizes.trained,
            fits=[card.name for card in cards],
            command=train_command(self.options, **self._chosen(way)),
        )

    def _chosen(self, way: Way) -> dict[str, Any]:
        """The options of a way that the user has not given."""
        options, chosen = self.options, dict[str, Any]()
        if way.method.lora_r is not None:
            chosen["lora_r"] = way.method.lora_r
        if way.method.quantize is not None:
            chosen["quantize"] = way.method.quantize
        if way.memory != "place":
            chosen["memory"] = way.memory
        elif way.placement.gradients == "none":
            chosen["max_grad_norm"] = 0  # no preset sets it
        if options.gradient_checkpointing == "auto" and way.recomputation == "full":
            chosen["gradient_checkpointing"] = "full"
        default = Candidates(self.counts, options, way.method, 0.0).default_tokens
        if way.budget_tokens != default:
            chosen["budget_tokens"] = way.budget_tokens
        return chosen

    def _live_reference(self, candidates: Candidates) -> int | None:
        try:
            return self._device_need(candidates.live_reference())
        except DpoCacheError:
            raise
        except FAILURES as error:
            self._log_once(
                f"DPO with a live reference is not counted for {self.options.model}: {first_line(error)}"
            )
            return None

    def _log_once(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            self.log(text)

    # -- scoring ----------------------------------------------------------------------------------------

    def _scoring(self, quantize: str | None) -> Iterator[PlannedScoring]:
        dtype = _scoring_dtype(self.options, self.config)
        method = Method("bf16" if dtype.itemsize == 2 else "fp32", optimizer="none", quantize=quantize)
        sizes = measure_model(self.config, method)
        fixed = number_or_auto("budget_tokens", self.options.budget_tokens)
        budgets = (fixed,) if fixed else tuple(reversed(CHUNK_SIZES[self.options.device]))
        name = {"4bit": "4 bits", "8bit": "8 bits"}.get(quantize or "", str(dtype).removeprefix("torch."))
        counts = ScoringCounts(self.config, sizes, self.workload.scored, method.dtype, self.options.device)
        streams = self.options.stream_weights
        ways = [(tokens, False) for tokens in budgets if streams != "on"]
        ways += [(budgets[-1], True)] if streams != "off" else []
        left = list(self.cards)
        for tokens, is_streamed in ways:
            parts = counts.streamed(tokens) if is_streamed else counts.resident(tokens)
            need, host = self._device_need(parts), PROCESS_BYTES + (sizes.weights if is_streamed else 0)
            cards = [card for card in left if card.fits(need, host)]
            left = [card for card in left if card not in cards]
            if cards or (tokens, is_streamed) == ways[-1]:
                chosen = {"quantize": quantize} if quantize else {}
                if tokens != budgets[0]:
                    chosen["budget_tokens"] = str(tokens)
                if is_streamed:
                    chosen["stream_weights"] = "on"
                yield PlannedScoring(
                    reference=name,
                    budget_tokens=tokens,
                    is_streamed=is_streamed,
                    device=parts,
                    device_bytes=need,
                    host_bytes=host,
                    seconds=self._scoring_s(method),
                    fits=[card.name for card in cards],
                    command=precompute_command(self.options, **chosen),
                )
            if not left:
                return

    def _scoring_s(self, method: Method) -> float:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = count_operations(build_fake(self.config, method.dtype))
        workload = self.workload
        targets = 2 * workload.num_pairs * workload.mean_answer
        context = (workload.mean_prompt + workload.mean_answer) / 2
        return self._second * forward_operations(found, workload.forest_tokens, targets, context)

    # -- needs ------------------------------------------------------------------------------------------

    def _device_need(self, parts: Parts) -> int:
        return device_need(parts) if self.is_gpu else parts.total

    def _assumptions(self) -> list[str]:
        data = self.workload
        found = [
            f"seconds: a run reaches {EFFICIENCY:.0%} of {self.tflops:,.3g} TFLOP/s of matrix products",
            f"host memory: {shown_bytes(PROCESS_BYTES)} for the process",
        ]
        if self.is_gpu:
            found.insert(
                0,
                f"device memory: {shown_bytes(CONTEXT_BYTES)} for the CUDA context, and {FRAGMENTATION:.0%} "
                "of activations, inputs and buffers for fragmentation",
            )
        if data.is_assumed:
            found.append(
                f"data: {data.num_pairs:,} pairs of typical length; give `dataset`, or `cache` and `pairs`"
            )
        return found


def _distinct(methods: Sequence[Method]) -> list[str | None]:
    return list(dict.fromkeys(method.quantize for method in methods))


def _cards(options: PlanOptions) -> list[_Card]:
    ram = _host_bytes(options)
    if options.device != "cuda":
        memory = ram if options.gpu is None else options.gpu_bytes()
        return [_Card(options.gpu or options.ram or "this machine", None, memory)]
    if options.gpu is not None:
        return [_Card(options.gpu, options.gpu_bytes(), ram)]
    return [_Card(f"{size}GiB", size * 2**30, ram) for size in CARDS]


def _host_bytes(options: PlanOptions) -> int | None:
    """The given memory of the host, else that of this machine; None for the host of a device that this
    machine does not have.
    """
    if options.ram is not None:
        return size_in_bytes("ram", options.ram)
    is_here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }[options.device]
    return total_host_bytes() if is_here else None


def _read_config(options: PlanOptions) -> PreTrainedConfig:
    parts = locate_checkpoint(options.model)
    if parts.adapter is not None:
        raise ModelError(
            f"{options.model} is an adapter, and a plan is made for a whole model.\n"
            f"Give its base: {parts.base}."
        )
    config = load_config(options.model, trust_remote_code=options.trust_remote_code)
    check_causal(config, options.model)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{options.model}: its weights were saved quantized, in a format whose memory is not known.\n"
            "Give the model that it was made from, with `quantize`."
        )
    return config


def _scoring_dtype(options: PlanOptions, config: PreTrainedConfig) -> torch.dtype:
    """The dtype by the rule of `choose_dtype`, for the kind of device that is planned for."""
    if options.dtype != "auto":
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    own = getattr(config, "dtype", None)
    is_known = isinstance(own, torch.dtype) and own in (torch.float32, torch.bfloat16, torch.float16)
    return own if is_known and options.device != "cpu" else torch.float32  # type: ignore[return-value]


def _speed(options: PlanOptions) -> tuple[float, str]:
    if options.tflops is not None:
        return options.tflops, "stated"
    device = choose_device()
    return measure_tflops(device), f"measured on this machine's {device.type}"
