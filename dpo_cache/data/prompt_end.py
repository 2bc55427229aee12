"""Where the prompt of a row ends: turns that all its answers share belong to it, and the last is the answer.

A column `prompt` may hold less than that. In many data sets it is the first message, the last one, or the
dialogue without its system message, and the answers are whole dialogues. Let `p`, `q` be turns of the user
and `a`, `x`, `y` of the assistant:

    prompt    chosen    rejected    prompt, answers
    p         x         y           p        | x | y
    p         p x       p y         p        | x | y          the answers repeat the prompt
    p         p a q x   p a q y     p a q    | x | y          the prompt is the first message
    q         p a q x   p a q y     p a q    | x | y          the prompt is the last message
              p a q x   p a q y     p a q    | x | y          no prompt: what the answers share
    p         a q x     a q y       p a q    | x | y          the answers continue after the prompt
    p a       q x       q y         p a q    | x | y
    p x       x         y           p        | x | y          the prompt ends with an answer: noted
    p         p a q x   p x q y     p        | a q x | x q y  the dialogues differ before the last turn: noted

Text has no turns, so only a prompt that all answers repeat at their start is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cache.data.messages import BadRow, Message

Dialogue = list[Message]
Contents = tuple[Any, ...]  # all text, or all messages
Notes = tuple[str, ...]

SYSTEM_ROLES = ("system", "developer")
OPENING_ROLES = ("user", *SYSTEM_ROLES)  # begin a dialogue, never an answer
OTHERS = (*OPENING_ROLES, "tool", "function", "ipython")  # all roles but that of the model
# a shorter text prompt may be the beginning of an answer by chance, and not its repeated prompt
MIN_WORDS = 3

ENDS_LATER = "turns that its answers share are part of the prompt"
BEGINS_EARLIER = "messages that its answers have before the prompt are part of it"
IS_RENDERED = "its prompt is the text of messages that its answers repeat, and the messages are used"
REPEATED = "its answers repeat the text of the prompt, which is used once"
REPEATED_SHORT = "its answers begin with the text of the prompt, which stays in them because it is short"
HELD_ANSWER = "its prompt ends with one of its answers, which is not part of the prompt"
ENDS_ANSWERED = "its prompt ends with a message from the assistant, and its answers are the next ones"
INSIDE = "its answers hold the text of the prompt, so the model reads it twice"


def end_prompt(
    prompt: str | Dialogue, answers: Contents, names: Sequence[str]
) -> tuple[str | Dialogue, Contents, Notes]:
    """The prompt with all turns that the answers share, the answers from there on, and notes.

    `names` are the answers' columns. Messages that differ only in spaces around their content are the same.
    Raises `BadRow` for answers to different prompts.
    """
    if isinstance(prompt, str):
        return _without_repeated_text(prompt, answers)
    if prompt and prompt[-1]["role"] != "assistant" and all(map(_is_one_turn, answers)):
        return prompt, answers, ()  # most rows
    prompt, notes_before = _without_answer(prompt, answers)
    own_system, turns = _split_system(prompt)
    split = [_split_system(answer) for answer in answers]
    system = own_system or _shared_system(split, names, has_prompt=bool(turns))
    if any(found and not _equal(found, system) for found, _ in split):
        raise BadRow(f"{_listed(names)} begin with another system message than the prompt")
    context, rests, notes = _after_prompt(turns, [dialogue for _, dialogue in split])
    if turns and len(system) > len(own_system):
        notes = (BEGINS_EARLIER,)
    if turns and turns[-1]["role"] == "assistant":
        begins_again = any(rest and rest[0]["role"] == "assistant" for rest in rests)
        notes += (ENDS_ANSWERED,) if begins_again else ()
    elif context:
        _check_starts(rests, names)
    shared = _num_shared_turns(rests)
    if context and shared:
        notes += (ENDS_LATER,)
    context, rests = context + rests[0][:shared], [rest[shared:] for rest in rests]
    if any(map(_opens, rests)):
        raise BadRow(f"{_listed(names)} share no prompt: they differ before the first answer")
    return system + context, tuple(rests), notes_before + notes + _note_parted(rests)


def _without_answer(prompt: Dialogue, answers: Contents) -> tuple[Dialogue, Notes]:
    """The prompt without the answer that it ends with, and a note if there is one."""
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt, ()
    for answer in answers:
        start = len(prompt) - len(answer)
        if answer and start >= 0 and _equal(prompt[start:], answer):
            return prompt[:start], (HELD_ANSWER,)
    return prompt, ()


def _after_prompt(turns: Dialogue, dialogues: list[Dialogue]) -> tuple[Dialogue, list[Dialogue], Notes]:
    """The prompt with the turns that the answers have before it, and the answers after it.

    The prompt is empty where it has to be found as the turns that the answers share.
    """
    if not turns:
        return [], dialogues, ()
    ends = [_end_in(dialogue, turns) for dialogue in dialogues]
    contexts = [dialogue[:end] for dialogue, end in zip(dialogues, ends, strict=True) if end]
    rests = [dialogue[end:] for dialogue, end in zip(dialogues, ends, strict=True)]
    if all(_equal(context, turns) for context in contexts):
        if not contexts and _is_text_of(turns, dialogues):
            return [], dialogues, (IS_RENDERED,)
        return turns, rests, ()
    if all(_equal(context, contexts[0]) for context in contexts):
        return contexts[0], rests, (BEGINS_EARLIER,)
    return ([], dialogues, ()) if all(map(_opens, dialogues)) else (turns, dialogues, ())


def _end_in(dialogue: Dialogue, turns: Dialogue) -> int:
    """The position after the prompt's turns in a dialogue, 0 if it has them nowhere.

    Turns before them are looked for only in a dialogue that begins as no answer can.
    """
    ends = range(len(turns), len(dialogue) + 1 if _opens(dialogue) else len(turns) + 1)
    return next((end for end in ends if _equal(dialogue[end - len(turns) : end], turns)), 0)


def _shared_system(
    split: Sequence[tuple[Dialogue, Dialogue]], names: Sequence[str], *, has_prompt: bool
) -> Dialogue:
    """The system messages of the dialogues, of which those that are no more than an answer have none.

    Raises `BadRow` if they differ.
    """
    systems = [system for system, dialogue in split if system or not has_prompt or _opens(dialogue)]
    if not all(_equal(system, systems[0]) for system in systems):
        raise BadRow(
            f"{_listed(names)} begin with different system messages, or only one of them has one, expected "
            "one prompt for all answers"
        )
    return systems[0] if systems else []


def _num_shared_turns(answers: Sequence[Dialogue]) -> int:
    """Number of turns at the start of all answers that belong to the prompt: never the last turn of one, and
    none after which an answer would begin with a turn that is not the model's.
    """
    most = min(map(len, answers)) - 1
    differing = (
        place
        for place in range(most)
        if not all(_equal([answer[place]], [answers[0][place]]) for answer in answers[1:])
    )
    shared = next(differing, max(most, 0))
    while shared and any(answer[shared]["role"] in OTHERS for answer in answers):
        shared -= 1
    return shared


def _check_starts(answers: Sequence[Dialogue], names: Sequence[str]) -> None:
    """Raise `BadRow` for an answer after the prompt that begins with a turn that no answer begins with."""
    for answer, name in zip(answers, names, strict=True):
        if _opens(answer):
            raise BadRow(
                f"`{name}` starts with a message from {answer[0]['role']}, expected the answer, or the "
                "whole prompt before it"
            )


def _note_parted(answers: Sequence[Dialogue]) -> Notes:
    """A note if the answers hold turns of others than the model."""
    roles = {message["role"] for answer in answers for message in answer} & {*OTHERS}
    if not roles:
        return ()
    return (
        f"its dialogues differ before their last turn, so turns from {' and '.join(sorted(roles))} are "
        "scored as parts of its answers",
    )


def _is_one_turn(answer: Dialogue) -> bool:
    return len(answer) == 1 and answer[0]["role"] == "assistant"


def _opens(dialogue: Dialogue) -> bool:
    """Return whether it begins with a turn that no answer begins with."""
    return bool(dialogue) and dialogue[0]["role"] in OPENING_ROLES


def _is_text_of(turns: Dialogue, dialogues: Sequence[Dialogue]) -> bool:
    """Return whether the prompt is one message, whose text holds that of the dialogues' shared turns in
    order.
    """
    if len(turns) != 1 or not all(map(_opens, dialogues)):
        return False
    text, place = turns[0]["content"], 0
    shared = [turn["content"].strip() for turn in dialogues[0][: _num_shared_turns(dialogues)]]
    for content in shared:
        place = text.find(content, place)
        if place < 0:
            return False
        place += len(content)
    return bool(shared)


def _split_system(messages: Dialogue) -> tuple[Dialogue, Dialogue]:
    """The messages at the start that only instruct, and the others."""
    end = 0
    while end < len(messages) and messages[end]["role"] in SYSTEM_ROLES:
        end += 1
    return messages[:end], messages[end:]


def _equal(one: Dialogue, other: Dialogue) -> bool:
    """Return whether the messages are the same but for spaces around their content."""
    return len(one) == len(other) and all(
        left == right or _stripped(left) == _stripped(right) for left, right in zip(one, other, strict=True)
    )


def _stripped(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def _listed(names: Sequence[str]) -> str:
    """The names of the answers' columns, each once: `chosen` and `rejected`."""
    return " and ".join(f"`{name}`" for name in dict.fromkeys(names))


def _without_repeated_text(prompt: str, answers: Contents) -> tuple[str, Contents, Notes]:
    """The prompt, the answers without the prompt if all of them begin with it, and notes.

    Spaces around the prompt may differ from those in the answers, which count then.
    """
    bare = prompt.strip()
    parts = [text.partition(bare) for text in answers if bare and bare in text]
    if len(parts) < len(answers):
        return prompt, answers, ()
    heads, rests = {head for head, _, _ in parts}, [rest for _, _, rest in parts]
    is_short = len(bare.split()) < MIN_WORDS
    if any(head.strip() for head in heads):
        return prompt, answers, (INSIDE,) if len(heads) == 1 and not is_short else ()
    if not all(map(str.strip, rests)):  # an answer that is the prompt is one that repeats words
        return prompt, answers, ()
    if is_short:
        return prompt, answers, (REPEATED_SHORT,)
    tail = prompt[len(prompt.rstrip()) :]
    if not all(rest.startswith(tail) for rest in rests):
        tail = ""
    head = heads.pop() if len(heads) == 1 else prompt[: len(prompt) - len(prompt.lstrip())]
    return head + bare + tail, tuple(rest[len(tail) :] for rest in rests), (REPEATED,)
