"""Tokenizers with the chat templates of known families, each as a folder such as a checkpoint has.

The templates in templates/ were written for these tests; each behaves as its family's does in what matters for
ids: what it adds, trims, moves, drops and refuses.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.data.conftest import assistant, byte_rules, message, user

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """The special tokens that a family's template writes, and the name of the template."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    rows: tuple[str, ...] = ()  # of `ROWS`, besides those that every family gets
    writes_calls: bool = True
    needs_text: bool = False  # the arguments of calls as JSON, not as an object


CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama": Family(
        "llama.jinja",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("day",),
    ),
    "qwen-2": Family("qwen-2.jinja", CHATML, "<|im_end|>"),
    "qwen-3": Family(
        "qwen-3.jinja", CHATML, "<|im_end|>", rows=("field of thoughts", "no thinking", "thinking on")
    ),
    "gemma-2": Family(
        "gemma-2.jinja", ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", writes_calls=False
    ),
    "gemma-3": Family(
        "gemma-3.jinja", ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", writes_calls=False
    ),
    "mistral": Family(
        "mistral.jinja", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), "</s>", "<s>"
    ),
    "deepseek-r1": Family(
        "deepseek-r1.jinja",
        ("<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        needs_text=True,
    ),
    "gpt-oss": Family(
        "gpt-oss.jinja",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        "<|return|>",
        "<|startoftext|>",
        ("thinking", "effort"),
    ),
    "phi": Family(
        "phi.jinja",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        writes_calls=False,
    ),
    "command-r": Family(
        "command-r",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        ("documents",),
    ),
    "smol": Family("smol.jinja", CHATML, "<|im_end|>", writes_calls=False),
}


def save_checkpoint(family: str, folder: Path) -> str:
    """A tokenizer of bytes and the family's special tokens, with its template in the files that transformers
    reads: chat_template.jinja, and named ones in additional_chat_templates.
    """
    made = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_rules(), eos_token=made.eos, bos_token=made.bos, pad_token=made.eos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(made.special)})
    tokenizer.save_pretrained(folder)
    source = TEMPLATES / made.template
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        shutil.copy(source, folder / "chat_template.jinja")
    return str(folder)


SYSTEM = message("system", "Be brief.")
TURNS = [user("Hi"), assistant("Hello."), user("And now?")]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


def call(city: str, *, id: str = "call00001", **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city, "days": 2}}
    return {
        "role": "assistant", "content": "",
        "tool_calls": [{"id": id, "type": "function", "function": function}], **fields,
    }  # fmt: skip


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call00001", "name": "weather"}


def row(prompt: list[Any], chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    sides = [[assistant(side)] if isinstance(side, str) else [side] for side in (chosen, rejected)]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **columns}


THOUGHT = "<think>\nIt is even.\n</think>\n\nTwo."
ROWS = {
    "one turn": row([user("Hi")], "Yes.", "No."),
    "turns": row(TURNS, "Yes, now.", "Yes, not now."),
    "system": row([SYSTEM, user("Hi")], "Yes.", "No."),
    "system and turns": row([SYSTEM, *TURNS], "Yes.", "No."),
    "spaces": row([message("system", " Be brief.\n"), user("\n Hi  ")], " Yes.\n", "No \n\n"),
    "answer that begins as the other": row([user("é🙂 {{ x }}")], "Yes", "Yes."),
    "thoughts": row([user("1+1?")], THOUGHT, "<think>\nOdd?\n</think>\n\nThree."),
    "thoughts in one answer": row([user("1+1?")], THOUGHT, "Three."),
    "earlier thoughts": row([user("1+1?"), assistant(THOUGHT), user("Sure?")], "Yes.", "No."),
    "field of thoughts": row(
        [user("1+1?")],
        {**assistant("Two."), "reasoning_content": "Even."},
        {**assistant("Three."), "reasoning_content": "Odd."},
    ),
    "thinking": row(
        [user("1+1?")],
        {**assistant("Two."), "thinking": "Even."},
        {**assistant("Three."), "thinking": "Odd."},
    ),
    "no thinking": row([user("Hi")], "Yes.", "No.", chat_template_kwargs={"enable_thinking": False}),
    "thinking on": row(TURNS, "Yes.", "No.", chat_template_kwargs={"enable_thinking": True}),
    "effort": row([SYSTEM, user("Hi")], "Yes.", "No.", chat_template_kwargs={"reasoning_effort": "high"}),
    "day": row([user("Hi")], "Yes.", "No.", chat_template_kwargs={"date_string": "1 May 2020"}),
    "tools": row([user("Hot in Oslo?")], "Let me see.", "No.", tools=[WEATHER]),
    "calls": row([SYSTEM, user("Hot in Oslo?")], call("Oslo"), call("Rome"), tools=[WEATHER]),
    "call or text": row([user("Hot in Oslo?")], call("Oslo"), "No.", tools=[WEATHER]),
    "results": row(
        [user("Hot in Oslo?"), call("Oslo"), result('{"t": 30}')], "Yes, it is.", "No.", tools=[WEATHER]
    ),
    "two assistants": row([user("Hi"), assistant("Hm.")], "Yes.", "No."),
    "developer": row([message("developer", "Be brief."), user("Hi")], "Yes.", "No."),
    "documents": row(
        [user("Who?")],
        "Ann.",
        "Ben.",
        chat_template_kwargs={"chat_template": "rag", "documents": [{"title": "a", "text": "It was Ann."}]},
    ),
}  # fmt: skip

ONLY_SOME = {name for family in FAMILIES.values() for name in family.rows}


def rows_of(family: str) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in ROWS.items() if name not in ONLY_SOME or name in FAMILIES[family].rows}
