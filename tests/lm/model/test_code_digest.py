"""A checkpoint's own code is a part of its identity, with all that it imports from its folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.class_code import class_code_digest
from dpo_cache.lm.model.code_digest import uses_remote_code
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.loaded import identify_loaded
from dpo_cache.lm.model.unchanged import one_checkpoint
from tests.conftest import make_completions, make_llama, naive_token_logps

MODELING = """
from transformers import LlamaForCausalLM
from .factors import FACTOR

class ScaledLlama(LlamaForCausalLM):
    def forward(self, *given, **options):
        found = super().forward(*given, **options)
        found.logits = found.logits * FACTOR
        return found
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    folder = tmp_path / "custom"
    make_llama().save_pretrained(folder)
    path = folder / "config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_scaled.ScaledLlama"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    write(folder, {"modeling_scaled.py": MODELING, "factors.py": "FACTOR = 2.0\n", "other.py": "X = 1\n"})
    return folder


def identify(folder: Path, trust_remote_code: bool = True) -> dict:
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    return reference_identity(str(folder), config, torch.float32, trust_remote_code=trust_remote_code)


def copy(folder: Path, name: str, files: dict[str, str]) -> Path:
    shutil.copytree(folder, folder.parent / name)
    write(folder.parent / name, files)
    return folder.parent / name


def logps(folder: Path, trust_remote_code: bool = True) -> torch.Tensor:
    model = load_model(
        str(folder), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trust_remote_code
    )
    return naive_token_logps(model, make_completions()[0])


def test_other_code_is_another_reference(custom: Path) -> None:
    other = copy(custom, "other", {"modeling_scaled.py": MODELING.replace("* FACTOR", "* FACTOR * 2")})
    one, two = identify(custom), identify(other)
    assert {**one, "code": two["code"]} == two and one != two
    assert not torch.equal(logps(custom), logps(other))


def test_what_the_code_imports_counts_too(custom: Path) -> None:
    other = copy(custom, "other", {"factors.py": "FACTOR = 3.0\n"})
    assert identify(custom)["code"] != identify(other)["code"]
    assert not torch.equal(logps(custom), logps(other))


def test_a_file_that_nothing_imports_does_not_count(custom: Path) -> None:
    other = copy(custom, "other", {"other.py": "X = 2\n", "new.py": "", "sub/factors.py": "FACTOR = 3\n"})
    assert identify(custom) == identify(other)
    assert torch.equal(logps(custom), logps(other))


@pytest.mark.parametrize(
    ("statement", "file"),
    [
        ("from .a import X", "a.py"),
        ("from . import a", "a.py"),
        ("from .sub import a", "sub/a.py"),
        ("from .sub.a import X", "sub/a.py"),
        ("from .sub import X", "sub/__init__.py"),
        ("try:\n    from .a import X\nexcept ImportError:\n    X = 0", "a.py"),
        ("def later():\n    from .a import X", "a.py"),
        ("from .a import (\n    X,\n    Y,\n)", "a.py"),
    ],
)
def test_every_way_to_import_from_the_folder_is_followed(custom: Path, statement: str, file: str) -> None:
    files = {"factors.py": f"{statement}\nFACTOR = 2.0\n", file: "X = Y = 1\n"}
    one, other = (copy(custom, name, {**files, file: f"X = Y = {name}\n"}) for name in ("1", "2"))
    assert identify(one)["code"] != identify(other)["code"] != identify(custom)["code"]


def test_imports_in_a_circle_end(custom: Path) -> None:
    write(
        custom,
        {"factors.py": "from .back import X\nFACTOR = 2.0\n", "back.py": "from . import factors\nX = 1\n"},
    )
    assert len(identify(custom)["code"]) == 64


def test_without_trust_the_code_of_transformers_runs_and_counts(custom: Path) -> None:
    other = copy(custom, "other", {"modeling_scaled.py": MODELING.replace("* FACTOR", "* 7")})
    assert identify(custom, False) == identify(other, False) and "code" not in identify(custom, False)
    assert torch.equal(logps(custom, False), logps(other, False))
    assert not uses_remote_code(load_config(str(custom)), False)


def test_the_name_of_the_folder_does_not_count(custom: Path) -> None:
    assert identify(custom) == identify(copy(custom, "elsewhere", {}))


def test_a_missing_file_is_named(custom: Path) -> None:
    (custom / "modeling_scaled.py").unlink()
    with pytest.raises(
        ModelError, match=r"modeling_scaled.py, which auto_map in its config.json names, is missing"
    ):
        identify(custom)


OUTER = """
from transformers import AutoModel, LlamaForCausalLM

class Outer(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config, trust_remote_code=True)
        self.post_init()
"""
INNER = """
from transformers import LlamaModel
from .factors import FACTOR

class Inner(LlamaModel):
    def forward(self, *given, **options):
        found = super().forward(*given, **options)
        found.last_hidden_state = found.last_hidden_state * FACTOR
        return found
"""


def set_config(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_code_of_a_part_that_the_causal_lm_makes_by_automodel_counts(custom: Path) -> None:
    write(custom, {"outer.py": OUTER, "inner.py": INNER})
    set_config(custom, auto_map={"AutoModelForCausalLM": "outer.Outer", "AutoModel": "inner.Inner"})
    others = [
        copy(custom, "inner", {"inner.py": INNER.replace("* FACTOR", "* 3")}),
        copy(custom, "factors", {"factors.py": "FACTOR = 5.0\n"}),
    ]
    assert len({identify(folder)["code"] for folder in (custom, *others)}) == 3
    assert not torch.equal(logps(custom), logps(others[0]))
    model = load_model(str(custom), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=True)
    assert identify_loaded(model, trust_remote_code=True) == (identify(custom), None)
    write(custom, {"inner.py": INNER.replace("* FACTOR", "* 3")})
    assert identify_loaded(model, trust_remote_code=True)[1] == "its code is not that of the checkpoint"


def test_code_that_a_config_inside_names_counts(custom: Path) -> None:
    write(custom, {"inner.py": INNER})
    set_config(custom, part={"auto_map": {"AutoModel": "inner.Inner"}})
    other = copy(custom, "other", {"inner.py": INNER.replace("* FACTOR", "* 3")})
    assert identify(custom)["code"] != identify(other)["code"]


def test_code_for_a_tokenizer_does_not_count_nor_need_to_be_there(custom: Path) -> None:
    before = identify(custom)
    entries = {"AutoModelForCausalLM": "modeling_scaled.ScaledLlama"}
    more = {"AutoTokenizer": ["tokens.Own", None], "AutoProcessor": "processing.Own"}
    set_config(custom, auto_map={**entries, **more})
    assert identify(custom) == before


def test_the_name_of_the_file_that_auto_map_names_does_not_count(custom: Path) -> None:
    other = copy(custom, "renamed", {"mine.py": MODELING})
    (other / "modeling_scaled.py").unlink()
    set_config(other, auto_map={"AutoModelForCausalLM": "mine.ScaledLlama"})
    assert identify(custom) == identify(other)
    assert torch.equal(logps(custom), logps(other))


def test_another_class_of_the_same_file_counts(custom: Path) -> None:
    write(custom, {"modeling_scaled.py": f"{MODELING}\nclass Other(LlamaForCausalLM):\n    pass\n"})
    other = set_config(copy(custom, "other", {}), auto_map={"AutoModelForCausalLM": "modeling_scaled.Other"})
    assert identify(custom)["code"] != identify(other)["code"]


@pytest.mark.parametrize(
    "auto_map", [{"AutoModelForCausalLM": "m.M"}, {"AutoModelForCausalLM": "org/repo--m.M"}, {}]
)
def test_a_map_of_code_that_does_not_run_does_not_count(custom: Path, auto_map: dict) -> None:
    plain = copy(custom, "plain", {})
    fields = json.loads((plain / "config.json").read_text())
    del fields["auto_map"]
    (plain / "config.json").write_text(json.dumps(fields))
    assert identify(set_config(custom, auto_map=auto_map), False) == identify(plain, False)


EXTRA = """
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

class WithExtra(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **options):
        options.pop("logits_to_keep", None)
        hidden = self.model(input_ids=input_ids, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(self.extra(hidden)))
"""


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_an_adapter_on_a_layer_that_only_the_own_code_has(custom: Path, tmp_path: Path) -> None:
    write(custom, {"modeling_extra.py": EXTRA})
    set_config(custom, auto_map={"AutoModelForCausalLM": "modeling_extra.WithExtra"})
    tensors = load_file(custom / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.eye(32)}, custom / "model.safetensors", {"format": "pt"})
    found = []
    for targets in (["q_proj", "extra"], ["q_proj"]):
        folder = tmp_path / f"adapter of {len(targets)}"
        model = AutoModelForCausalLM.from_pretrained(custom, trust_remote_code=True)
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
        found.append(identify(folder)["adapter"])
    assert [adapter["modules"] for adapter in found] == [3, 2]
    assert torch.isfinite(logps(tmp_path / "adapter of 2")).all()


def test_code_that_changes_between_hashing_and_loading_is_refused(custom: Path) -> None:
    for name in ("modeling_scaled.py", "factors.py"):
        with one_checkpoint():
            identify(custom)
            (custom / name).write_text((custom / name).read_text() + "\n# more\n")
            with pytest.raises(ModelError, match=f"{name} was changed while the model was read"):
                logps(custom)


# -- models in memory --------------------------------------------------------------------------------------


def test_a_loaded_model_with_the_code_of_its_checkpoint_is_that_checkpoint(custom: Path) -> None:
    model = load_model(str(custom), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=True)
    assert identify_loaded(model, trust_remote_code=True) == (identify(custom), None)
    write(custom, {"factors.py": "FACTOR = 9.0\n"})
    identity, difference = identify_loaded(model, trust_remote_code=True)
    assert difference == "its code is not that of the checkpoint"
    assert identity["weights_of"] == "memory" and len(identity["code"]) == 64


def test_a_class_of_the_caller_has_its_source_in_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, factor in enumerate(("2.0", "3.0")):
        module = f"mine_{number}"
        text = MODELING.replace("from .factors import FACTOR", f"FACTOR = {factor}")
        write(tmp_path, {f"{module}.py": text})
        kind = __import__(module).ScaledLlama
        found.append(class_code_digest({kind}))
        monkeypatch.delitem(sys.modules, module)
    assert None not in found and found[0] != found[1]
    assert class_code_digest({type(make_llama())}) is None
