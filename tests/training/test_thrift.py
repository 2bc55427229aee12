"""What a run changes so that its steps fit."""

import pytest
import torch

from dpo_cache.lm.engine import choose_attention
from dpo_cache.lm.policy import completion_logps
from dpo_cache.training.thrift import Thrift
from tests.conftest import make_llama
from tests.lm.families import make_model
from tests.lm.test_recomputation import COMPLETIONS, gradients


def test_a_model_that_changes_what_is_kept_recomputes_in_full() -> None:
    model, remarks = make_model("gpt_oss"), []
    chosen = choose_attention(model, max_length=64)
    expected = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    thrift = Thrift(model, 1000, "selective", remarks.append)
    with pytest.raises(RuntimeError) as caught:
        gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    thrift.save_more(caught.value)
    assert thrift.mode == "full" and thrift.micro_tokens == 1000 and "does not suit this model" in remarks[0]
    found = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_mps_says_is_passed_on() -> None:
    remarks: list[str] = []
    thrift = Thrift(make_llama(), 1000, "none", remarks.append)
    thrift._device = torch.device("mps")
    thrift.save_more(RuntimeError("MPS backend is tired\nand more"))
    assert thrift.micro_tokens == 500 and remarks[0].startswith("MPS backend is tired; the step is taken again")
