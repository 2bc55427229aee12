"""Whatever changes the numbers changes the identity, and nothing else does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
    RobertaConfig,
    RobertaForCausalLM,
)

from dpo_cache.errors import DpoCacheError
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.architecture import check_causal
from dpo_cache.lm.model.former_identity import former_identity
from dpo_cache.lm.model.identity import identity_as_recorded, reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.store.format.documents import digest_json
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.lm.families import make_model

WEIGHTS = "model.safetensors"

# A dozen families of other code: plain, tied, experts, soft caps, windows, learned positions, latent attention,
# state
SOME = (
    "llama", "gemma2", "qwen3_moe", "gpt2", "opt", "gpt_neox", "falcon", "bloom", "cohere2", "deepseek_v3",
    "granite", "mamba2", "starcoder2",
)  # fmt: skip

# The others take a minute.
QUICK = ("llama", "gemma2", "gpt2", "mamba2")
BOTH = [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in SOME]

# The ids that these checkpoints have had since the first version.
IDS = {
    "llama": "f7550a0b8ad16b9377fbac8caf2f5e574fa835c5b48b8fe68785e250a718792b",
    "gemma2": "d46326023893e52e66aa5451f8d97fb04baa6ffda415edbd776607cc43c65b31",
    "qwen3_moe": "be2c509a3095e77e099220f929c922d42de11979fcfe5201b175d1f3c1ed31b9",
    "gpt2": "bb72151250c6a0ac928f7954cb02879882ee571af8cad65f3b57a7123ad108b2",
    "opt": "483e72604873a67e069635bc869471e5b71cbf4292803e31e34f556a38397141",
    "gpt_neox": "7ab19762bd07caee88c71776153ce0c8b388611de77b01e0ba4244ea4adb3074",
    "falcon": "ca8dfb91beb0c7f534779c9ad82d27188aa0726f1e1f32ae521f4a7f8541533f",
    "bloom": "208491126a31cc656e1739dfdd0ccac01c77c413dede938afe42ab8fc0032225",
    "cohere2": "d13825732843adeef896989f8a7962810e4ff140c0bdb2c1d24d5ee393ee4b11",
    "deepseek_v3": "0e971b531957186b8883349cad686d2bbffd86a892aac17ac5d0b2c8a17f8c9b",
    "granite": "62b56f14bf393a99b09f502f1c0aaff658db0851484f04c8ef3b72dbf6f80952",
    "mamba2": "9f7dbc695b0e4af604db53e7f785f2bf1f217d285b3d9eb372a5147449465093",
    "starcoder2": "8d6d7085cecc559725f2632d632ee1546536477f4f9c04267da15f5964c50a22",
}

Change = Callable[[Path], None]


def identify(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    config = load_config(str(folder))
    check_causal(config, str(folder))
    return reference_identity(str(folder), config, dtype, **options)


def logps(folder: Path) -> torch.Tensor:
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    return naive_token_logps(model, make_completions()[3])


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models of some families."""
    folder = tmp_path_factory.mktemp("families")
    for family in SOME:
        make_model(family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# -- ids that must not change ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_the_id_of_a_plain_checkpoint_is_what_it_was(families: Path, family: str) -> None:
    folder = families / family
    assert digest_json(identify(folder)) == IDS[family]
    config, parts = load_config(str(folder)), locate_checkpoint(str(folder))
    assert former_identity(parts, config, torch.float32, "none") == identify(folder)


def test_the_ids_of_one_model_in_several_forms_are_what_they_were(tmp_path: Path) -> None:
    plain = "644cd33e60535815871eca25fdcbd2b7d51db09897b03ff3d7b73e8f4865fbae"
    make_llama().save_pretrained(tmp_path / "plain")
    make_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    make_llama().bfloat16().save_pretrained(tmp_path / "bfloat16")
    make_llama().half().save_pretrained(tmp_path / "float16")
    assert digest_json(identify(tmp_path / "plain")) == digest_json(identify(tmp_path / "sharded")) == plain
    found = {
        "plain, in bfloat16": digest_json(identify(tmp_path / "plain", torch.bfloat16)),
        "bfloat16": digest_json(identify(tmp_path / "bfloat16")),
        "bfloat16, in bfloat16": digest_json(identify(tmp_path / "bfloat16", torch.bfloat16)),
        "float16": digest_json(identify(tmp_path / "float16")),
    }
    assert found == {
        "plain, in bfloat16": "a2f48469936fca4ab39bd8cf60903de6c24d48750681828ba8f0fd0dd5dc07c6",
        "bfloat16": "e391bc4148e3d7415936e95792e33269619c92c048142fbb305ba7a915f0c2e5",
        "bfloat16, in bfloat16": "20731ed99f7b6fe2bd5a5a7bb8bdb406daadfb361a08682fcdb678c3f58bd521",
        "float16": "5a0fbbd7628f6c6df160ad164846c5c8f54dca67de6c067c94791895d6f701ae",
    }


def test_the_id_of_a_model_in_4_bits_is_what_it_was(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_llama().save_pretrained(tmp_path)
    found = digest_json(identify(tmp_path, quantize="4bit"))
    assert found == "622c3d94f781bb051755c85711fcc791d6e9cfc700273bae661c6035ca1b3cf0"


# -- what changes an id, and what does not -----------------------------------------------------------------


def other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.25]
    if isinstance(value, str):
        return [f"{value}x"]
    if isinstance(value, list):
        return [value[::-1], value[:1]]
    return [{}] if isinstance(value, dict) else [1, True]


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", BOTH)
@pytest.mark.filterwarnings("ignore")  # transformers', of values that do not go together
def test_any_field_of_a_config_gives_another_id_or_a_refusal_or_the_same_log_probs(
    families: Path, tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(families / family, folder)
    written = json.loads((folder / "config.json").read_text())
    known = json.loads(json.dumps(load_config(str(folder)).to_dict(), default=str))
    before, expected, outcomes = identify(folder), logps(folder), {}
    for name, value in {**known, **written}.items():
        for other in other_values(value):
            (folder / "config.json").write_text(json.dumps({**written, name: other}))
            try:
                is_same = identify(folder) == before
                found = logps(folder) if is_same else expected
            except DpoCacheError:
                outcomes[name] = "refused"
                continue
            assert torch.equal(found, expected), (name, other)
            outcomes[name] = "the same" if is_same else "another id"
    assert {"another id", "the same"} <= set(outcomes.values()) and len(outcomes) > 20


def change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("family", BOTH)
def test_any_file_of_a_checkpoint_gives_another_id_or_a_refusal_or_the_same_log_probs(
    families: Path, tmp_path: Path, family: str
) -> None:
    before, expected = identify(families / family), logps(families / family)
    for name in sorted(path.name for path in (families / family).iterdir()):
        for change in (change_one_byte, Path.unlink, lambda path: path.write_text("{}")):
            folder = tmp_path / "changed"
            shutil.copytree(families / family, folder)
            change(folder / name)
            try:
                is_same = identify(folder) == before
                assert not is_same or torch.equal(logps(folder), expected), name
            except DpoCacheError:
                pass
            shutil.rmtree(folder)


def reshard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


def rename_files(folder: Path) -> None:
    reshard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"part{number}.safetensors")
        content["weight_map"] = {
            name: f"part{number}.safetensors" if file == path.name else file
            for name, file in content["weight_map"].items()
        }
    index.write_text(json.dumps(content))


def save_again(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def add_tensors(folder: Path) -> None:
    more = {"extra.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(folder, lambda tensors: {**tensors, **more})


def add_a_layer(folder: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {name: one for name, one in tensors.items() if "layers.1." in name or ".h.1." in name}
        return tensors | {name.replace(".1.", ".2.", 1): one + 1 for name, one in last.items()}

    rewrite(folder, repeat)


KEPT: dict[str, Change] = {
    "resharding": reshard,
    "names of files": rename_files,
    "saving again": save_again,
    "unused tensors": add_tensors,
    "layers that the config does not have": add_a_layer,
    "attention_dropout": lambda folder: edit(folder, attention_dropout=0.5),
    "an unknown rate of dropout": lambda folder: edit(folder, attention_dropout=0.5, hidden_dropout_prob=0.2),
    "use_cache": lambda folder: edit(folder, use_cache=False),
    "_name_or_path": lambda folder: edit(folder, _name_or_path="elsewhere"),
    "dtype": lambda folder: edit(folder, dtype="bfloat16", torch_dtype="float16"),
    "return_dict": lambda folder: edit(folder, return_dict=False),
    "transformers_version": lambda folder: edit(folder, transformers_version="4.0.0"),
    "other files": lambda folder: (folder / "notes.txt").write_text("new") and None,
}


@pytest.mark.rotating(5)
@pytest.mark.parametrize("change", KEPT)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_what_keeps_the_id_keeps_the_log_probs(
    families: Path, tmp_path: Path, family: str, change: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(families / family, folder)
    KEPT[change](folder)
    assert identify(folder) == identify(families / family)
    assert torch.equal(logps(folder), logps(families / family))


@pytest.mark.parametrize("forward", [torch.float32, torch.bfloat16])
def test_the_dtype_of_storage_does_not_count_if_the_values_are_the_same(
    tmp_path: Path, forward: torch.dtype
) -> None:
    model = make_llama().bfloat16()
    model.save_pretrained(tmp_path / "bfloat16")
    model.float().save_pretrained(tmp_path / "float32")
    assert identify(tmp_path / "bfloat16", forward) == identify(tmp_path / "float32", forward)
    assert torch.equal(logps(tmp_path / "bfloat16"), logps(tmp_path / "float32"))


def test_a_copy_in_float64_keeps_the_id(saved: Path, tmp_path: Path) -> None:
    before, expected = identify(saved), logps(saved)
    rewrite(saved, lambda tensors: {name: one.double() for name, one in tensors.items()})
    assert identify(saved) == before and torch.equal(logps(saved), expected)
    rewrite(saved, lambda tensors: {name: one + 1e-12 for name, one in tensors.items()})
    assert identify(saved) != before


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
def test_names_of_older_checkpoints_count_as_the_saved_ones(
    families: Path, tmp_path: Path, family: str
) -> None:
    """Checkpoints of the decoder without its prefix, and with a copy of tied embeddings."""
    folder = tmp_path / "older"
    shutil.copytree(families / family, folder)
    prefix = "transformer." if family == "gpt2" else "model."
    rewrite(folder, lambda tensors: {name.removeprefix(prefix): one for name, one in tensors.items()})
    if family != "llama":
        embeddings = "wte.weight" if family == "gpt2" else "embed_tokens.weight"
        rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[embeddings].clone()})
    assert identify(folder) == identify(families / family)
    assert torch.equal(logps(folder), logps(families / family))


def test_a_head_that_differs_from_its_tied_embeddings_counts(families: Path, tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    shutil.copytree(families / "gemma2", folder)
    rewrite(
        folder,
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 1.5},
    )
    assert identify(folder) != identify(families / "gemma2")
    assert not torch.equal(logps(folder), logps(families / "gemma2"))


def test_only_what_changes_the_computation_is_in_the_identity(saved: Path) -> None:
    config = load_config(str(saved))
    base = reference_identity(str(saved), config, torch.float32)
    config.use_cache, config.bos_token_id, config.attention_dropout = False, 7, 0.5
    assert reference_identity(str(saved), config, torch.float32) == base
    assert reference_identity(str(saved), config, torch.bfloat16) != base
    config.rms_norm_eps = 1e-3
    assert reference_identity(str(saved), config, torch.float32) != base


def test_quantization_is_part_of_the_identity(saved: Path) -> None:
    config = load_config(str(saved))
    base = reference_identity(str(saved), config, torch.float32)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert reference_identity(str(saved), config, torch.float32) == {
        **base,
        "quantization": config.quantization_config,
    }


def test_an_identity_is_compared_in_the_form_in_which_it_was_recorded(saved: Path) -> None:
    add_tensors(saved)
    config, location = load_config(str(saved)), str(saved)
    former = former_identity(locate_checkpoint(location), config, torch.float32, "none")
    live = reference_identity(location, config, torch.float32)
    assert former != live
    assert identity_as_recorded(former, location, config, torch.float32) == former
    assert identity_as_recorded(live, location, config, torch.float32) == live
    assert identity_as_recorded({**former, "weights": "other"}, location, config, torch.float32) == live


@pytest.mark.parametrize(("pad_token_id", "is_same"), [(1, True), (0, False), (5, False)])
def test_the_id_of_the_padding_token_counts_where_positions_are_counted_from_it(
    tmp_path: Path, pad_token_id: int, is_same: bool
) -> None:
    fields = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**fields, **sizes, is_decoder=True))  # its padding token is 1
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
    edit(tmp_path / "other", pad_token_id=pad_token_id)
    assert (identify(tmp_path / "one") == identify(tmp_path / "other")) is is_same
    assert torch.equal(logps(tmp_path / "one"), logps(tmp_path / "other")) is is_same


def test_architectures_without_a_causal_head_are_refused() -> None:
    with pytest.raises(DpoCacheError, match="T5ForConditionalGeneration, an encoder-decoder"):
        check_causal(make_llama().config.__class__(architectures=["T5ForConditionalGeneration"]), "here")
    check_causal(PreTrainedConfig(architectures=["GPT2LMHeadModel"]), "here")


def test_a_tower_for_images_does_not_count_and_the_text_does(tmp_path: Path) -> None:
    text = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    images = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {
        "image_token_index": 263,
        "boi_token_index": 262,
        "eoi_token_index": 261,
        "mm_tokens_per_image": 4,
    }
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=images, **tokens))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    before, expected, written = identify(folder), logps(folder), (folder / "config.json").read_text()

    def shift(part: str) -> None:
        rewrite(folder, lambda tensors: {name: one + (part in name) for name, one in tensors.items()})

    for part in ("vision", "projector"):
        shift(part)
        assert identify(folder) == before and torch.equal(logps(folder), expected)
    edit(folder, vision_config={**json.loads(written)["vision_config"], "hidden_act": "relu"})
    assert identify(folder) == before and torch.equal(logps(folder), expected)
    save_again(folder)
    assert identify(folder) == before
    edit(folder, text_config={**json.loads(written)["text_config"], "rms_norm_eps": 0.1})
    assert identify(folder) != before
    edit(folder, text_config=json.loads(written)["text_config"])
    shift("layers.1.")
    assert identify(folder) != before
