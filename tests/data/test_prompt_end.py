from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import tokenize_rows, tokenized_windows
from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.prompt_end import (
    BEGINS_EARLIER,
    ENDS_ANSWERED,
    ENDS_LATER,
    HELD_ANSWER,
    INSIDE,
    IS_RENDERED,
    REPEATED,
    REPEATED_SHORT,
    end_prompt,
)
from tests.data.conftest import assistant, message, user

SIDES = ("chosen", "rejected")
P, A, Q, B, R = user("Hi."), assistant("Hello."), user("Well?"), assistant("Hm."), user("Now?")
X, Y = assistant("Yes."), assistant("No.")
BRIEF, KIND = message("system", "Be brief."), message("system", "Be kind.")
WELL = user("  Well?\n")
CALL = {**assistant(""), "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
FEEL = {**assistant(""), "tool_calls": [{"type": "function", "function": {"name": "feel", "arguments": {}}}]}
SEEN = message("tool", "blue")


def parted(roles: str) -> str:
    return f"its dialogues differ before their last turn, so turns from {roles} are scored as parts of its answers"


# prompt, answers -> prompt, answers, notes
MESSAGES: dict[str, tuple[list[Any], list[list[Any]], list[Any], list[list[Any]], list[str]]] = {
    "answers only": ([P], [[X], [Y]], [P], [[X], [Y]], []),
    "answers that repeat the prompt": ([P], [[P, X], [P, Y]], [P], [[X], [Y]], []),
    "one answer that repeats the prompt": ([P], [[P, X], [Y]], [P], [[X], [Y]], []),
    "first message": ([P], [[P, A, Q, X], [P, A, Q, Y]], [P, A, Q], [[X], [Y]], [ENDS_LATER]),
    "first message, not repeated": ([P], [[A, Q, X], [A, Q, Y]], [P, A, Q], [[X], [Y]], [ENDS_LATER]),
    "last message": ([Q], [[P, A, Q, X], [P, A, Q, Y]], [P, A, Q], [[X], [Y]], [BEGINS_EARLIER]),
    "message in the middle": (
        [Q],
        [[P, A, Q, B, R, X], [P, A, Q, B, R, Y]],
        [P, A, Q, B, R],
        [[X], [Y]],
        [BEGINS_EARLIER, ENDS_LATER],
    ),
    "the same message first and last": (
        [P],
        [[P, A, P, X], [P, A, P, Y]],
        [P, A, P],
        [[X], [Y]],
        [ENDS_LATER],
    ),
    "a user who repeats the prompt": ([P], [[A, P, X], [Y]], [P], [[A, P, X], [Y]], [parted("user")]),
    "whole dialogues": ([], [[P, A, Q, X], [P, A, Q, Y]], [P, A, Q], [[X], [Y]], []),
    "equal dialogues": ([], [[P, A, Q, X], [P, A, Q, X]], [P, A, Q], [[X], [X]], []),
    "a dialogue that goes on": ([], [[P, A, Q, X], [P, A]], [P], [[A, Q, X], [A]], [parted("user")]),
    "equal answers of one turn": ([P], [[X], [X]], [P], [[X], [X]], []),
    "equal answers of several turns": ([P], [[A, Q, X], [A, Q, X]], [P, A, Q], [[X], [X]], [ENDS_LATER]),
    "spaces around shared turns": (
        [Q],
        [[WELL, A, P, X], [Q, A, user("Hi. "), Y]],
        [Q, A, P],
        [[X], [Y]],
        [ENDS_LATER],
    ),
    "answers that differ in spaces": ([P], [[X], [assistant("Yes. ")]], [P], [[X], [assistant("Yes. ")]], []),
    "dialogues that part": (
        [P],
        [[P, A, Q, X], [P, B, Q, Y]],
        [P],
        [[A, Q, X], [B, Q, Y]],
        [parted("user")],
    ),
    "dialogues that part after a while": (
        [],
        [[P, A, Q, B, R, X], [P, A, Q, A, R, Y]],
        [P, A, Q],
        [[B, R, X], [A, R, Y]],
        [parted("user")],
    ),
    "dialogues that part at the user": (
        [P],
        [[P, A, Q, X], [P, A, R, Y]],
        [P],
        [[A, Q, X], [A, R, Y]],
        [parted("user")],
    ),
    "last message of dialogues that part": (
        [R],
        [[P, A, R, X], [P, B, R, Y]],
        [P],
        [[A, R, X], [B, R, Y]],
        [parted("user")],
    ),
    "shared call": ([P], [[CALL, SEEN, X], [CALL, SEEN, Y]], [P, CALL, SEEN], [[X], [Y]], [ENDS_LATER]),
    "different calls": ([P], [[CALL, SEEN, X], [FEEL, SEEN, Y]], [P], [[CALL, SEEN, X], [FEEL, SEEN, Y]],
                        [parted("tool")]),
    "shared turn before different calls": ([P], [[A, CALL], [A, FEEL]], [P, A], [[CALL], [FEEL]], [ENDS_LATER]),
    "different results of a call": (
        [P],
        [[CALL, SEEN, X], [CALL, message("tool", "red"), Y]],
        [P],
        [[CALL, SEEN, X], [CALL, message("tool", "red"), Y]],
        [parted("tool")],
    ),
    "system message of the dialogues": ([P], [[BRIEF, P, X], [BRIEF, P, Y]], [BRIEF, P], [[X], [Y]],
                                        [BEGINS_EARLIER]),
    "system message and earlier turns": (
        [Q],
        [[BRIEF, P, A, Q, X], [BRIEF, P, A, Q, Y]],
        [BRIEF, P, A, Q],
        [[X], [Y]],
        [BEGINS_EARLIER],
    ),
    "system message of the prompt": ([BRIEF, P], [[P, X], [P, Y]], [BRIEF, P], [[X], [Y]], []),
    "system message of the prompt and earlier turns": (
        [BRIEF, Q],
        [[P, A, Q, X], [P, A, Q, Y]],
        [BRIEF, P, A, Q],
        [[X], [Y]],
        [BEGINS_EARLIER],
    ),
    "system message of the prompt and one dialogue": (
        [BRIEF, P],
        [[BRIEF, P, X], [P, Y]],
        [BRIEF, P],
        [[X], [Y]],
        [],
    ),
    "system message only": ([BRIEF], [[P, X], [P, Y]], [BRIEF, P], [[X], [Y]], []),
    "rendered text of the dialogue": (
        [user("<|user|>Hi.<|assistant|>Hello.<|user|>Well?<|assistant|>")],
        [[P, A, Q, X], [P, A, Q, Y]],
        [P, A, Q],
        [[X], [Y]],
        [IS_RENDERED],
    ),
    "a prompt that ends with an answer": ([P, X], [[X], [Y]], [P], [[X], [Y]], [HELD_ANSWER]),
    "a prompt that ends with the rejected answer": ([P, Y], [[X], [Y]], [P], [[X], [Y]], [HELD_ANSWER]),
    "a prompt that is the chosen dialogue": ([P, A, Q, X], [[P, A, Q, X], [P, A, Q, Y]], [P, A, Q], [[X], [Y]],
                                             [HELD_ANSWER]),
    "its system message, too": ([BRIEF, P, X], [[P, X], [P, Y]], [BRIEF, P], [[X], [Y]], [HELD_ANSWER]),
    "an answer of several turns": ([P, CALL, SEEN, X], [[CALL, SEEN, X], [Y]], [P], [[CALL, SEEN, X], [Y]],
                                   [HELD_ANSWER, parted("tool")]),
    "a prompt that ends with another answer": ([P, A], [[X], [Y]], [P, A], [[X], [Y]], [ENDS_ANSWERED]),
    "a dialogue that repeats it": ([P, A], [[P, A, X], [P, A, Y]], [P, A], [[X], [Y]], [ENDS_ANSWERED]),
    "a prompt that the user goes on with": ([P, A], [[Q, A], [Q, Y]], [P, A, Q], [[A], [Y]], [ENDS_LATER]),
    "a prompt that ends with a call": ([P, CALL], [[SEEN, X], [SEEN, Y]], [P, CALL, SEEN], [[X], [Y]],
                                       [ENDS_LATER]),
    "a greeting first": ([], [[A, P, X], [A, P, Y]], [A, P], [[X], [Y]], []),
    "three answers": (
        [P],
        [[P, A, Q, X], [P, A, Q, Y], [P, A, Q, B]],
        [P, A, Q],
        [[X], [Y], [B]],
        [ENDS_LATER],
    ),
    "three answers of which two share more": (
        [P],
        [[A, Q, X], [A, Q, Y], [B]],
        [P],
        [[A, Q, X], [A, Q, Y], [B]],
        [parted("user")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "answers", "expected", "ends", "notes"), MESSAGES.values(), ids=MESSAGES)
def test_turns_that_all_answers_share_belong_to_the_prompt(
    prompt: list[Any], answers: list[list[Any]], expected: list[Any], ends: list[list[Any]], notes: list[str]
) -> None:
    names = SIDES if len(answers) == 2 else ("responses",) * len(answers)
    assert end_prompt(prompt, tuple(answers), names) == (expected, tuple(ends), tuple(notes))


OTHER_SYSTEM = "`chosen` and `rejected` begin with different system messages, or only one of them has one, expected one prompt for all answers"
PROBLEMS: dict[str, tuple[list[Any] | None, list[Any], list[Any], str]] = {
    "a system message in one dialogue": (None, [BRIEF, P, X], [P, Y], OTHER_SYSTEM),
    "two system messages": (None, [BRIEF, P, X], [KIND, P, Y], OTHER_SYSTEM),
    "a system message in one dialogue, with a prompt": ([P], [P, X], [BRIEF, P, Y], OTHER_SYSTEM),
    "another system message than the prompt": (
        [BRIEF, P],
        [KIND, P, X],
        [KIND, P, Y],
        "`chosen` and `rejected` begin with another system message than the prompt",
    ),
    "different prompts": (
        None,
        [P, X],
        [Q, Y],
        "`chosen` and `rejected` share no prompt: they differ before the first answer",
    ),
    "different prompts after a system message": (
        None,
        [BRIEF, P, X],
        [BRIEF, Q, Y],
        "`chosen` and `rejected` share no prompt: they differ before the first answer",
    ),
    "answers to something else": (
        [R],
        [P, X],
        [P, Y],
        "`chosen` starts with a message from user, expected the answer, or the whole prompt before it",
    ),
    "an answer that is the prompt": ([P], [P], [X], "`chosen` is empty"),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_answers_to_different_prompts_are_refused(
    prompt: list[Any] | None, chosen: list[Any], rejected: list[Any], reason: str
) -> None:
    row = {"chosen": chosen, "rejected": rejected, **({"prompt": prompt} if prompt else {})}
    assert parse_row(row, "conversation" if prompt else "implicit") == RowProblem(reason)


QUESTION = "\n\nHuman: What is it?\n\nAssistant:"
TEXTS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...], list[str]]] = {
    "answers only": ("What is it?", (" A cat", " A dog"), "What is it?", (" A cat", " A dog"), []),
    "repeated": (QUESTION, (QUESTION + " A cat", QUESTION + " A dog"), QUESTION, (" A cat", " A dog"), [REPEATED]),
    "repeated by ranked answers": (QUESTION, tuple(QUESTION + end for end in "abc"), QUESTION,
                                   ("a", "b", "c"), [REPEATED]),
    "stripped in the prompt": (QUESTION.strip(), (QUESTION + " A cat", QUESTION + " A dog"), QUESTION,
                               (" A cat", " A dog"), [REPEATED]),
    "stripped in the answers": (QUESTION + "\n", (QUESTION.strip() + " A cat", QUESTION.strip() + " A dog"),
                                QUESTION.strip(), (" A cat", " A dog"), [REPEATED]),
    "space at the end of the prompt": (QUESTION + " ", (QUESTION + " A cat", QUESTION + " A dog"), QUESTION + " ",
                                       ("A cat", "A dog"), [REPEATED]),
    "one answer that repeats it": (QUESTION, (QUESTION + " A cat", " A dog"), QUESTION,
                                   (QUESTION + " A cat", " A dog"), []),
    "an answer that is the prompt": ("It is a cat", ("It is a cat", "It is a cat!"), "It is a cat",
                                     ("It is a cat", "It is a cat!"), []),
    "a greeting": ("Hi", ("Hi there", "Hi!"), "Hi", ("Hi there", "Hi!"), [REPEATED_SHORT]),
    "question inside": ("What is it?", (QUESTION + " A cat", QUESTION + " A dog"), "What is it?",
                        (QUESTION + " A cat", QUESTION + " A dog"), [INSIDE]),
    "question that both quote": ("What is it?", ("You ask: What is it?", "What is it? A dog"), "What is it?",
                                 ("You ask: What is it?", "What is it? A dog"), []),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "answers", "expected", "ends", "notes"), TEXTS.values(), ids=TEXTS)
def test_a_text_prompt_that_all_answers_repeat_is_used_once(
    prompt: str, answers: tuple[str, ...], expected: str, ends: tuple[str, ...], notes: list[str]
) -> None:
    names = SIDES if len(answers) == 2 else ("responses",) * len(answers)
    assert end_prompt(prompt, answers, names) == (expected, ends, tuple(notes))


def turn(sender: str, value: str) -> dict[str, str]:
    return {"from": sender, "value": value}


# One dialogue in every format that can hold it.
CLEAN = {"prompt": [P, A, Q], "chosen": [X], "rejected": [Y]}
WHOLE = {"chosen": [P, A, Q, X], "rejected": [P, A, Q, Y]}
SAME_ROW: dict[str, tuple[str, dict[str, Any]]] = {
    "clean": ("conversation", CLEAN),
    "first message": ("conversation", {"prompt": [P], **WHOLE}),
    "first message as text": ("conversation", {"prompt": "Hi.", **WHOLE}),
    "first message, not repeated": ("conversation", {"prompt": "Hi.", "chosen": [A, Q, X], "rejected": [A, Q, Y]}),
    "last message as text": ("conversation", {"prompt": "Well?", **WHOLE}),
    "whole prompt repeated": ("conversation", {"prompt": [P, A, Q], **WHOLE}),
    "no prompt": ("implicit", WHOLE),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [turn("human", "Hi."), turn("gpt", "Hello."), turn("human", "Well?")],
            "chosen": turn("gpt", "Yes."),
            "rejected": turn("gpt", "No."),
        },
    ),
    "sharegpt, first message and whole dialogues": (
        "sharegpt",
        {
            "conversations": [turn("human", "Hi.")],
            **{
                side: [turn("human", "Hi."), turn("gpt", "Hello."), turn("human", "Well?"), turn("gpt", answer)]
                for side, answer in (("chosen", "Yes."), ("rejected", "No."))
            },
        },
    ),
    "messages": ("messages", {"messages": [P], **WHOLE}),
    "openai": (
        "openai",
        {"input": {"messages": [P]}, "preferred_output": [A, Q, X], "non_preferred_output": [A, Q, Y]},
    ),
    "swift": ("swift", {"messages": [P, A, Q, X], "rejected_messages": [P, A, Q, Y]}),
    "output": ("output", {"instruction": "Hi.", "output": [[P, A, Q, X], [P, A, Q, Y]]}),
    "completions": (
        "completions",
        {
            "context": [P],
            "completions": [{"rank": 1, "completion": [A, Q, Y]}, {"rank": 0, "completion": [A, Q, X]}],
        },
    ),
    "compared": (
        "compared",
        {"prompt": "Hi.", "response_a": [P, A, Q, Y], "response_b": [P, A, Q, X], "winner": "b"},
    ),
    "alpaca": (
        "alpaca",
        {"history": [["Hi.", "Hello."]], "instruction": "Well?", "chosen": "Yes.", "rejected": "No."},
    ),
    "question": ("question", {"question": "Hi.", "chosen": [P, A, Q, X], "rejected": [P, A, Q, Y]}),
    "ranked": ("ranked", {"prompt": "Hi.", "responses": [[P, A, Q, Y], [P, A, Q, X]], "scores": [1, 2]}),
    "ranked, three": (
        "ranked",
        {"prompt": [P], "responses": [[A, Q, Y], [A, Q, X], [A, Q, Y]], "scores": [1, 2, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data_format", "row"), SAME_ROW.values(), ids=SAME_ROW)
def test_every_format_of_a_dialogue_gives_the_ids_of_its_clean_form_whole_and_streamed(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, data_format: str, row: dict[str, Any]
) -> None:
    tokenizer = tokenizers["byte-level BPE"]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    (clean,) = tokenize_rows(Dataset.from_list([CLEAN]), "conversation", tokenizer).select_columns(columns)
    assert tokenizer.decode(clean["chosen_ids"]) == "Yes.<|im_end|>\n"
    table = Dataset.from_list([row])
    whole = tokenize_rows(table, data_format, tokenizer).select_columns(columns)
    assert whole[0] == clean
    (window,) = tokenized_windows(
        table.to_iterable_dataset(), data_format, tokenizer, window_rows=4, spool=tmp_path, place="here"
    )
    assert window.select_columns(columns)[:] == whole[:]


def test_notes_reach_the_tokenized_rows(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    rows = [{"prompt": [P], **WHOLE}, {"prompt": [P], "chosen": [P, A, Q, X], "rejected": [P, B, Q, Y]}]
    tokenized = tokenize_rows(Dataset.from_list(rows), "conversation", tokenizers["byte-level BPE"])
    assert tokenized["notes"][:] == [[ENDS_LATER], [parted("user")]]


def test_a_row_that_is_right_keeps_its_parts() -> None:
    row = {"prompt": [WELL], "chosen": [Q, X], "rejected": [Y]}
    assert parse_row(row, "conversation") == Example([WELL], ([X], [Y]))
