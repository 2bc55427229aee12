"""Weights in 4 and 8 bits: the same forest, gradients that flow, an identity of their own, and never
twice.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dpo_cache
from dpo_cache.errors import ModelError
from dpo_cache.lm.check_logps import TOLERANCES
from dpo_cache.lm.kernels.onednn_linear import use_fast_linear
from dpo_cache.lm.memory.recompute import Recomputation, activation_bytes
from dpo_cache.lm.model import quantization
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.parts import has_plain_head
from dpo_cache.lm.model.quantization import rounding_dtype
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.precomputing.rescore import rescore
from dpo_cache.store.upkeep.commands import precompute_line
from dpo_cache.types import QUANTIZATION_FIELDS, TOKEN_TOLERANCES, quantization_name
from tests.conftest import chat_rows, make_completions, make_llama, naive_token_logps, write_rows
from tests.lm.test_families import scores

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("quantize", ["4bit", "8bit"])


def load(folder: str, quantize: str, **changes: object) -> torch.nn.Module:
    return load_model(folder, dtype=torch.float32, device=CPU, quantize=quantize, **changes)


@pytest.mark.rotating(2)
@BOTH
def test_a_quantized_model_has_the_same_log_probs_in_the_forest_as_in_rows(
    model_folder: str, quantize: str
) -> None:
    model, completions = load(model_folder, quantize), make_completions()
    plain = [scores(model, [completion], AttentionChoice("rows", ""), 4096)[0] for completion in completions]
    attention = choose_attention(model, max_length=64)
    largest, mean = TOLERANCES[rounding_dtype(model)]
    assert attention.name == "forest" and attention.has_plain_head
    for budget in (13, 4096):
        gaps = np.concatenate(
            [
                np.abs(one - other)
                for one, other in zip(scores(model, completions, attention, budget), plain, strict=True)
            ]
        )
        assert gaps.max() <= largest and gaps.mean() <= mean
    whole = np.concatenate(scores(make_llama(), completions, AttentionChoice("rows", ""), 4096))
    # it is another model
    assert np.abs(np.concatenate(plain) - whole).mean() > {"4bit": 0.1, "8bit": 0.01}[quantize]


@BOTH
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_linear_layers_of_the_decoder_are_quantized_and_frozen_the_head_is_not(
    tmp_path: Path, quantize: str, family: str
) -> None:
    make_llama(tie_word_embeddings=family == "tied").save_pretrained(tmp_path)
    model = load(str(tmp_path), quantize)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {{"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantize]}
    assert (
        type(model.lm_head) is torch.nn.Linear
        and model.lm_head.weight.dtype == torch.float32
        and has_plain_head(model)
    )
    projections = [parameter for name, parameter in model.named_parameters() if "_proj" in name]
    assert projections and not any(
        parameter.requires_grad or parameter.is_floating_point() for parameter in projections
    )
    assert not model.training and model.device == CPU
    assert activation_bytes(model, 10, "none") == activation_bytes(make_llama(), 10, "none")
    assert use_fast_linear(model, trains=True) == "torch"  # nothing of a size that tells anything


@BOTH
def test_gradients_flow_through_quantized_layers_and_recomputation_changes_none(
    model_folder: str, quantize: str
) -> None:
    model, completions = load(model_folder, quantize), make_completions()
    attention = choose_attention(model, max_length=64)
    recomputation, found = Recomputation(model), {}
    for mode in ("none", "selective", "full"):
        recomputation.mode = mode
        model.zero_grad(set_to_none=True)
        completion_logps(model, completions, attention).sums().sum().backward()
        found[mode] = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found["none"].keys() == names and all(
        gradient.abs().sum() > 0 for gradient in found["none"].values()
    )
    for mode in ("selective", "full"):
        assert all(torch.equal(gradient, found["none"][name]) for name, gradient in found[mode].items())


def test_the_gradient_of_a_4_bit_model_is_that_of_its_dequantized_weights(model_folder: str) -> None:
    model, completions = load(model_folder, "4bit"), make_completions()
    plain = load(model_folder, "4bit").dequantize().float()
    found = []
    for one in (model, plain):
        completion_logps(one, completions, choose_attention(one, max_length=64)).sums().sum().backward()
        found.append(
            {name: parameter.grad for name, parameter in one.named_parameters() if "_proj" not in name}
        )
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-4 * found[1][name].abs().max(), name


def test_an_identity_names_the_quantization_and_nothing_else_changes(model_folder: str) -> None:
    config = load_config(model_folder)
    plain = reference_identity(model_folder, config, torch.float32)
    assert (
        plain == reference_identity(model_folder, config, torch.float32, quantize="none")
        and "quantization" not in plain
    )
    assert quantization_name(plain) == "none"
    for name, fields in QUANTIZATION_FIELDS.items():
        identity = reference_identity(model_folder, config, torch.float32, quantize=name)
        assert identity == {**plain, "quantization": fields} and quantization_name(identity) == name
    assert QUANTIZATION_FIELDS["4bit"] == {  # golden: another value is another reference
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    assert QUANTIZATION_FIELDS["8bit"] == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 0.0,
    }


@BOTH
def test_a_checkpoint_that_was_saved_quantized_is_loaded_but_not_quantized_again(
    model_folder: str, tmp_path: Path, quantize: str
) -> None:
    first = load(model_folder, quantize)
    first.save_pretrained(tmp_path)
    again, completions = load(str(tmp_path), "none"), make_completions()[:4]
    for one, other in zip(
        *(scores(model, completions, AttentionChoice("rows", ""), 4096) for model in (first, again)),
        strict=True,
    ):
        assert np.array_equal(one, other)
    config = load_config(str(tmp_path))
    assert (
        reference_identity(str(tmp_path), config, torch.float32)["quantization"]["quant_method"]
        == "bitsandbytes"
    )
    message = (
        "were saved quantized \\(bitsandbytes\\), and `quantize` 4bit would quantize them again.\n"
        "Leave `quantize` out"
    )
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path), "4bit")
    with pytest.raises(ModelError, match=message):
        reference_identity(str(tmp_path), config, torch.float32, quantize="4bit")


def test_missing_packages_are_named(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(
        ModelError,
        match=r"needs bitsandbytes, which is not installed.\nRun `pip install 'dpo-cache\[quantize\]'`",
    ):
        load(model_folder, "4bit")


@pytest.mark.rotating(2)
@BOTH
def test_a_fresh_quantized_base_repeats_what_precompute_cached_of_it(
    model_folder: str, tmp_path: Path, quantize: str
) -> None:
    data, remarks = write_rows(tmp_path / "pairs.jsonl", chat_rows(9)), []
    options = {"name": "pairs", "log": remarks.append}
    report = dpo_cache.precompute(model_folder, data, tmp_path / "cache", quantize=quantize, **options)
    plain = dpo_cache.precompute(model_folder, data, tmp_path / "plain", **options)
    assert (
        report.attention == "forest"
        and report.reference != plain.reference
        and report.scored_now == plain.scored_now
    )
    pairs = list(dpo_cache.open_cache(tmp_path / "cache").pairs("pairs"))
    model = load(model_folder, quantize)
    completions = [scored.pair.chosen for scored in pairs] + [scored.pair.rejected for scored in pairs]
    cached = torch.tensor(
        [scored.ref_chosen.logps for scored in pairs] + [scored.ref_rejected.logps for scored in pairs]
    )
    found = completion_logps(model, completions, choose_attention(model, max_length=1024)).sums()
    lengths = torch.tensor([completion.num_tokens for completion in completions])
    assert ((found - cached).abs() <= TOLERANCES[rounding_dtype(model)][1] * lengths).all()
    again = rescore(tmp_path / "cache", model_folder, 100)
    assert [entry.reference for entry in again] == [report.reference] and again[0].agrees
    with pytest.raises(ModelError, match="quantization.load_in"):
        dpo_cache.precompute(
            model_folder, data, tmp_path / "cache", reference=report.reference[:12], **options
        )


def test_the_command_that_makes_a_pair_set_again_quantizes_too(model_folder: str, tmp_path: Path) -> None:
    report = dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(3)), tmp_path / "cache", quantize="8bit"
    )
    cache = dpo_cache.open_cache(tmp_path / "cache")
    line = precompute_line("elsewhere", cache.pairs("pairs").manifest, cache.read_reference(report.reference))
    assert "--quantize 8bit" in line


# -- checkpoints as people download them -------------------------------------------------------------------


def pack_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 32 by 32 in 8-bit floats, each with its scale."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale_inv": scale}


def unpack_fp8(weight: torch.Tensor) -> torch.Tensor:
    packed, scale = pack_fp8(weight).values()
    rows, columns = weight.shape
    blocks = packed.float().reshape(rows // 32, 32, columns // 32, 32)
    return (blocks * scale[:, None, :, None]).reshape(rows, columns)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values from 0 to 15 [columns, rows], where 8 is zero, and a scale for each group of 64 columns."""
    groups = weight.t().reshape(weight.shape[1] // 64, 64, -1)
    scale = groups.abs().amax(1) / 7
    values = (groups / scale[:, None]).round().clamp(-8, 7) + 8
    return values.reshape(weight.shape[1], -1).to(torch.int32), scale


def unpack_rows(weight: torch.Tensor) -> torch.Tensor:
    values, scale = quantize_rows(weight)
    groups = (values - 8).reshape(len(scale), 64, -1) * scale.half()[:, None].float()
    return groups.reshape(values.shape).t()


def pack_gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = quantize_rows(weight)
    columns, rows = values.shape
    eights = values.reshape(columns // 8, 8, rows)
    packed = sum((eights[:, place] << (4 * place)) for place in range(8))
    zeros = torch.full((len(scale), rows // 8), 0x77777777, dtype=torch.int32)  # one less, in this format
    groups = (torch.arange(columns) // 64).to(torch.int32)
    return {"qweight": packed.to(torch.int32), "qzeros": zeros, "scales": scale.half(), "g_idx": groups}


def pack_awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = quantize_rows(weight)
    eights = values.reshape(len(values), -1, 8)
    packed = sum(
        (eights[:, :, source] << (4 * place)) for place, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7))
    )
    zeros = torch.full((len(scale), eights.shape[1]), 0x88888888 - 2**32).to(torch.int32)
    return {"qweight": packed.to(torch.int32), "qzeros": zeros, "scales": scale.half()}


FORMATS = {
    "fp8": (pack_fp8, unpack_fp8, {"activation_scheme": "dynamic", "weight_block_size": [32, 32]}),
    "gptq": (pack_gptq, unpack_rows, {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}),
    "awq": (pack_awq, unpack_rows, {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
}


def save_packed(folder: Path, method: str) -> Path:
    """A tiny checkpoint as it is published in this format."""
    pack, _, fields = FORMATS[method]
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            layer = name.removesuffix("weight")
            tensors |= {f"{layer}{part}": value.contiguous() for part, value in pack(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.filterwarnings("ignore")  # of the packages that read them
def test_a_checkpoint_that_is_published_quantized_is_loaded_and_identified(
    tmp_path: Path, method: str
) -> None:
    if method != "fp8":
        pytest.importorskip("gptqmodel")
    folder = save_packed(tmp_path / "packed", method)
    completion, unpacked = make_completions()[0], make_llama(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in unpacked.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(FORMATS[method][1](parameter))
    found, expected = (
        naive_token_logps(model, completion) for model in (load(str(folder), "none"), unpacked)
    )
    dtype = "float32" if method == "fp8" else "float16"  # in which gptqmodel multiplies
    assert (found - expected).abs().max() <= TOKEN_TOLERANCES[dtype][0]
    config = load_config(str(folder))
    identity = reference_identity(str(folder), config, torch.float32)
    assert identity["quantization"]["quant_method"] == method
    assert quantization_name(identity) == "none"  # as it is loaded: not quantized again
    other = make_llama(hidden_size=64, intermediate_size=128)
    other.save_pretrained(tmp_path / "plain")
    assert (
        identity["weights"]
        != reference_identity(str(tmp_path / "plain"), load_config(str(tmp_path / "plain")), torch.float32)[
            "weights"
        ]
    )
    tensors = load_file(folder / "model.safetensors")
    scale = next(name for name in tensors if "scale" in name)
    save_file({**tensors, scale: tensors[scale] * 1.5}, folder / "model.safetensors", {"format": "pt"})
    assert reference_identity(str(folder), config, torch.float32) != identity


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("torchao", "torchao"),
        ("hqq", "hqq"), ("quanto", "optimum-quanto"), ("mxfp4", "kernels"), ("bitsandbytes", "bitsandbytes"),
    ],
)  # fmt: skip
def test_a_quantized_checkpoint_names_the_packages_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, packages: str
) -> None:
    make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(quantization, "_is_installed", lambda package: package == "accelerate")
    names = " and ".join(packages.split())
    message = rf"its weights are quantized \({method}\), and {names} (is|are) not installed.\nRun `pip install {packages}`"
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path), "none")
