"""Conversations as the chat template renders them, and notes on what it leaves out."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import tokenize_rows
from dpo_cache.data.examples import Example, RowProblem
from dpo_cache.data.render import HAS_BOS, Encoded, encode_examples
from dpo_cache.errors import ModelError
from tests.data.conftest import CHATML, assistant, make_byte_tokenizer, message, pair, user

# Thoughts as Qwen 3 renders them: those of earlier turns are cut, those of the answer are written in `<think>`.
QWEN = """\
{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '</tools>' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
# As DeepSeek R1: the thoughts of all answers are cut, and the arguments of calls are concatenated as text.
DEEPSEEK = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1] if '</think>' in message.content else message.content %}
        {{- '<|im_start|>assistant' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- elif message.role == 'user' or message.role == 'tool' %}
        {{- '<|im_start|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}
"""
# As Mistral 7B v0.3: the system message in the last turn, if that is the user's.
SYSTEM_LAST = (
    "{% for message in messages %}{% if message.role != 'system' %}[{{ message.role }}] "
    "{% if loop.last and message.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }} "
    "{% endif %}"
    "{{ message.content }}{% endif %}{% endfor %}"
)
IN_PYTHON = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.name ~ call.function.arguments }}"
    "{% endfor %}",
)
FIRST_CALL = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls[0].function | tojson }}{% endif %}",
)
CALL_WITHOUT_TEXT = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}",
)
ALL_FIELDS = "{% for message in messages %}{{ message | tojson }}{% endfor %}"
WITH_NAMES = CHATML.replace("{{ message['content'] }}", "{{ message.name or '' }}: {{ message.content }}")
SHORTENING = CHATML.replace("message['content']", "message['content'][:8]")
WITH_BOS = "<s>" + CHATML

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TOOLS_OUT = "the chat template leaves out its `tools`"
THOUGHTS_OUT = "the chat template leaves out the thoughts in its answers"
CALLS_OUT = "the chat template leaves its tool calls out; give one that writes them with `chat_template`"
CHANGED = "the chat template leaves out or changes a part of its answers"


def field_out(name: str) -> str:
    return f"the chat template leaves out the `{name}` of messages"


def text_out(role: str) -> str:
    return f"the chat template leaves out the text of messages from {role}"


def thinking(content: str, **thoughts: str) -> dict[str, str]:
    return {**assistant(content), **thoughts}


def calling(*arguments: Any, content: str = "", name: str = "look") -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": value}} for value in arguments]
    return {**assistant(content), "tool_calls": calls}


def example(*prompt: Any, chosen: Any = None, **options: Any) -> Example:
    """A conversation with an answer that is `chosen`, and one that is ordinary."""
    answers = ([chosen or assistant("Yes, it is.")], [assistant("No, never.")])
    return Example(list(prompt) or [user("Is it?")], answers, template_options=options)


def encode(template: str, *examples: Example) -> list[Encoded | RowProblem]:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    return encode_examples(examples, tokenizer)


def notes(template: str, one: Example) -> list[str] | str:
    """The notes on an example, or the problem with it."""
    (found,) = encode(template, one)
    return found.reason if isinstance(found, RowProblem) else list(found.notes)


OLD = [user("a"), assistant("<think>old thoughts</think>b"), user("c")]
OLD_FIELD = [user("a"), thinking("b", reasoning_content="old thoughts"), user("c")]

CASES: dict[str, tuple[str, Example, list[str] | str]] = {
    "nothing": (CHATML, example(message("system", "Be brief."), user("Is it?")), []),
    "spaces": (CHATML, example(user("  Is it?\n\n"), chosen=assistant("\n Yes ")), []),
    "trimmed": (CHATML.replace("message['content']", "message['content'] | trim"), example(user(" a ")), []),
    "system": (DEEPSEEK, example(message("system", "Be brief."), user("a")), [text_out("system")]),
    "developer": (DEEPSEEK, example(message("developer", "Be brief."), user("a")), [text_out("developer")]),
    "system, while no answer follows": (
        SYSTEM_LAST, example(message("system", "Be brief."), user("a")), [text_out("system")],
    ),
    "system, also when an answer follows": (
        SYSTEM_LAST.replace("loop.last and", ""),
        example(message("system", "Be brief."), user("a")),
        [],
    ),
    "a tool's result as JSON": (
        CHATML.replace("message['content']", "message['content'] | tojson"),
        example(user('say "é"\n'), chosen=assistant('"é"\n\\')),
        [],
    ),
    "a shortened answer": (SHORTENING, example(user("a"), chosen=assistant("Yes, it is, indeed.")), [CHANGED]),
    "thoughts in a field, written": (QWEN, example(chosen=thinking("Yes.", reasoning_content="I see.")), []),
    "thoughts in another field, written": (QWEN, example(chosen=thinking("Yes.", thinking="I see.")), []),
    "thoughts in a field, unknown": (
        CHATML,
        example(chosen=thinking("Yes.", reasoning_content="I see.")),
        [field_out("reasoning_content")],
    ),
    "thoughts that the answer repeats": (
        CHATML,
        example(chosen=thinking("I see.", reasoning="I see.")),
        [field_out("reasoning")],
    ),
    "thoughts in a field of the prompt, unknown": (
        CHATML, example(*OLD_FIELD), [field_out("reasoning_content")],
    ),
    "old thoughts in a field, cut": (QWEN, example(*OLD_FIELD), []),
    "old thoughts in text, cut": (QWEN, example(*OLD), []),
    "old thoughts in text, cut by a template that cuts all": (DEEPSEEK, example(*OLD), []),
    "thoughts in text, written": (QWEN, example(chosen=assistant("<think>\nI see.\n</think>\n\nYes.")), []),
    "thoughts in text, cut": (
        DEEPSEEK, example(chosen=assistant("<think>\nI see.\n</think>\n\nYes.")), [THOUGHTS_OUT],
    ),
    "no thoughts, cut": (DEEPSEEK, example(chosen=assistant("<think>\n\n</think>\n\nYes.")), []),
    "empty thoughts": (CHATML, example(chosen=thinking("Yes.", reasoning_content="")), []),
    "tools, written": (QWEN, example(tools=[TOOL]), []),
    "tools": (CHATML, example(user("look?"), tools=[TOOL]), [TOOLS_OUT]),
    "documents": (
        QWEN, example(documents=[{"title": "a", "text": "b"}]), ["the chat template leaves out its `documents`"],
    ),
    "an option of the template": (QWEN, example(enable_thinking=True), []),
    "an unknown option": (
        CHATML,
        example(enable_thinking=False),
        ["the chat template has no use for `enable_thinking` in its `chat_template_kwargs`"],
    ),
    "calls": (CHATML, example(chosen=calling({"a": 1})), CALLS_OUT),
    "calls of tools that are listed": (
        QWEN.replace("message.tool_calls or []", "[]"), example(chosen=calling({"a": 1}), tools=[TOOL]), CALLS_OUT,
    ),
    "the second call": (FIRST_CALL, example(chosen=calling({"a": 1}, {"a": 2})), CALLS_OUT),
    "both calls, written": (QWEN, example(chosen=calling({"a": 1}, {"a": 2})), []),
    "text next to calls": (
        CALL_WITHOUT_TEXT, example(chosen=calling({"a": 1}, content="Let me look.")), [text_out("assistant")],
    ),
    "a name": (CHATML, example({**user("a"), "name": "Ann"}), [field_out("name")]),
    "a name, written": (WITH_NAMES, example({**user("a"), "name": "Ann"}), []),
    "a name for tools only": (
        QWEN,
        example({**user("a"), "name": "Ann"}),
        [field_out("name")],
    ),
    "the name of a tool that has a result": (
        QWEN, example(user("a"), calling({}), {**message("tool", "b"), "name": "look"}), [],
    ),
    "an unknown field": (CHATML, example(chosen=thinking("Yes.", rationale="I see.")), [field_out("rationale")]),
    "any field, written": (ALL_FIELDS, example(chosen=thinking("Yes.", rationale="I see.")), []),
    "metadata": (
        CHATML,
        example({**user("a"), "id": 3, "timestamp": "now", "message_id": "x", "created_at": 5, "model": "m"}),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "one", "expected"), CASES.values(), ids=CASES)
def test_what_the_template_leaves_out_is_noted(
    template: str, one: Example, expected: list[str] | str
) -> None:
    assert notes(template, one) == expected


def test_ids_are_those_of_the_rendered_texts_whatever_is_noted() -> None:
    tokenizer = make_byte_tokenizer()
    for template, one, expected in CASES.values():
        if isinstance(expected, str) or one.template_options or "tool_calls" in str(one):
            continue
        tokenizer.chat_template = template
        (found,) = encode_examples([one], tokenizer)
        texts = [tokenizer.apply_chat_template(one.prompt, tokenize=False, add_generation_prompt=True)]
        texts += [
            tokenizer.apply_chat_template(one.prompt + answer, tokenize=False) for answer in one.answers
        ]
        assert isinstance(found, Encoded)
        assert found.ids == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_ordinary_rows_are_rendered_in_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = make_byte_tokenizer(), []
    render = tokenizer.apply_chat_template

    def apply_chat_template(conversation: Any, **options: Any) -> Any:
        calls.append(len(conversation))
        return render(conversation, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply_chat_template)
    rows = [example({**user(f"{number}?"), "id": number}) for number in range(50)]
    assert all(isinstance(found, Encoded) and not found.notes for found in encode_examples(rows, tokenizer))
    assert calls == [50, 100]


# -- the arguments of tool calls ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (QWEN, 'look {"city": "Århus", "is_new": true}</tool_call>'),
        (DEEPSEEK, 'look\n```json\n{"city": "Århus", "is_new": true}\n```'),
        (IN_PYTHON, 'look{"city": "Århus", "is_new": true}'),
        (ALL_FIELDS, '"arguments": {"city": "Århus", "is_new": true}'),
    ],
)
def test_arguments_are_objects_unless_the_template_needs_text(template: str, written: str) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    one = example(chosen=calling({"city": "Århus", "is_new": True}))
    (found,) = encode_examples([one], tokenizer)
    assert isinstance(found, Encoded)
    assert found.notes == ()
    assert written in tokenizer.decode(found.ids[1])


@pytest.mark.parametrize("template", [QWEN, DEEPSEEK, IN_PYTHON])
def test_no_arguments_are_an_empty_object(template: str) -> None:
    (found,) = encode(template, example(chosen=calling({})))
    assert isinstance(found, Encoded)
    assert "{}" in make_byte_tokenizer().decode(found.ids[1])


def test_a_template_that_refuses_calls_is_reported_with_its_own_words() -> None:
    template = CHATML.replace(
        "{% if add", "{{ raise_exception('no calls') if messages[-1].tool_calls }}{% if add"
    )
    assert notes(template, example(chosen=calling({}))) == "the chat template refuses it (no calls)"


# -- the BOS token ------------------------------------------------------------------------------------------


def test_text_that_begins_with_the_bos_token_gets_no_second_one(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizers["prefix space"]
    rendered, plain = encode_examples(
        [pair("<s>[INST] Hi [/INST]", " Yes", " No"), pair("[INST] Hi [/INST]", " Yes", " No")], tokenizer
    )
    assert isinstance(rendered, Encoded)
    assert isinstance(plain, Encoded)
    assert (rendered.notes, plain.notes) == ((HAS_BOS,), ())
    texts = [
        "<s>[INST] Hi [/INST]",
        *(f"<s>[INST] Hi [/INST] {answer}<|im_end|>" for answer in ("Yes", "No")),
    ]
    assert rendered.ids == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [ids.count(tokenizer.bos_token_id) for ids in [*rendered.ids, *plain.ids]] == [1] * 6


def test_a_tokenizer_that_adds_no_bos_token_keeps_that_of_the_text() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    (found,) = encode_examples([pair("<s>Hi", "a", "b")], tokenizer)
    assert isinstance(found, Encoded)
    assert found.notes == ()
    assert [ids.count(tokenizer.bos_token_id) for ids in found.ids] == [1] * 3


def test_a_template_that_writes_the_bos_token_gets_no_second_one(
    tokenizers: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["prefix space"]
    monkeypatch.setattr(tokenizer, "chat_template", WITH_BOS)
    (found,) = encode_examples([example()], tokenizer)
    assert isinstance(found, Encoded)
    assert [ids.count(tokenizer.bos_token_id) for ids in found.ids] == [1] * 3
    assert found.notes == ()


# -- answers that are the same once something is lost -------------------------------------------------------


def drop_reason(template: str, row: dict[str, Any], data_format: str = "conversation") -> str | None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    (found,) = tokenize_rows(Dataset.from_list([row]), data_format, tokenizer)
    assert found["chosen_ids"] == found["rejected_ids"]
    return found["dropped"]


ONLY = "chosen and rejected differ only in {}, which the chat template leaves out"
ANSWERS: dict[str, tuple[str, Any, Any, str | None]] = {
    "thoughts in a field": (
        CHATML,
        [thinking("Yes.", reasoning_content="a")],
        [thinking("Yes.", reasoning_content="b")],
        ONLY.format("reasoning_content"),
    ),
    "thoughts in text": (
        DEEPSEEK,
        [assistant("<think>a</think>Yes.")],
        [assistant("<think>b</think>Yes.")],
        ONLY.format("their thoughts"),
    ),
    "a weight": (
        CHATML, [{**assistant("Yes."), "weight": 0}], [{**assistant("Yes."), "weight": 1}], ONLY.format("weight"),
    ),
    "a part of the text": (
        SHORTENING, [assistant("Yes, it is.")], [assistant("Yes, it was.")], ONLY.format("a part of their text"),
    ),
    "spaces": (
        CHATML.replace("message['content']", "message['content'] | trim"),
        [assistant("Yes.")],
        [assistant("Yes. ")],
        "chosen and rejected differ only in spaces",
    ),
    "turns after the answer": (
        CHATML,
        [assistant("Yes."), user("Thanks.")],
        [assistant("Yes."), user("What?")],
        "chosen and rejected differ only in turns after the answer, which are left out",
    ),
    "images": (
        CHATML,
        [message("assistant", [{"type": "text", "text": "Yes."}, {"type": "image", "image": "a"}])],  # type: ignore[arg-type]
        [message("assistant", [{"type": "text", "text": "Yes."}, {"type": "image", "image": "b"}])],  # type: ignore[arg-type]
        "chosen and rejected differ only in images, which are left out, because only text is scored",
    ),
    "nothing": (CHATML, [assistant("Yes.")], [assistant("Yes.")], None),
}  # fmt: skip


@pytest.mark.parametrize(("template", "chosen", "rejected", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_answers_that_differ_only_in_what_is_lost_are_reported_as_that(
    template: str, chosen: Any, rejected: Any, reason: str | None
) -> None:
    row = {"prompt": [user("Is it?")], "chosen": chosen, "rejected": rejected}
    assert drop_reason(template, row) == reason


# -- several named templates -----------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("options", "written"),
    [({}, "default"), ({"tools": TOOLS}, "tool_use"), ({"chat_template": "rag"}, "rag")],
    ids=["default", "tools", "named"],
)
def test_the_template_of_a_row_is_chosen_by_its_tools_or_its_name(
    options: dict[str, Any], written: str
) -> None:
    tokenizer = make_byte_tokenizer()
    names = ("default", "tool_use", "rag")
    tokenizer.chat_template = {name: f"{name}{{{{ tools | tojson }}}}" + CHATML for name in names}
    example = Example([user("a")], ([assistant("b")], [assistant("c")]), template_options=options)
    (encoded,) = encode_examples([example], tokenizer)
    assert isinstance(encoded, Encoded)
    assert [tokenizer.decode(ids).startswith(written) for ids in encoded.ids] == [True] * 3


def test_templates_without_a_default_are_named() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ tools | tojson }}" + CHATML, "rag": CHATML}
    example = Example([user("a")], ([assistant("b")], [assistant("c")]))
    with_tools = Example(example.prompt, example.answers, template_options={"tools": TOOLS})
    (encoded,) = encode_examples([with_tools], tokenizer)
    assert isinstance(encoded, Encoded)
    with pytest.raises(ModelError) as caught:
        encode_examples([with_tools, example], tokenizer)
    assert str(caught.value) == (
        f"the tokenizer {tokenizer.name_or_path} has the chat templates rag, tool_use, and none of them is the "
        "default.\nChoose one with `chat_template` NAME."
    )


# -- templates of models for images and text, which take content in parts ----------------------------------------

ONLY_PARTS = CHATML.replace(
    "{{ message['content'] }}",
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
)
TEXT_OR_PARTS = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize("template", [ONLY_PARTS, TEXT_OR_PARTS], ids=["only parts", "text or parts"])
def test_templates_that_take_parts_give_the_ids_of_text(template: str) -> None:
    rows = [
        example(message("system", "Be brief."), user("Is it?")),
        example(user("a"), assistant("b"), user(" c "), chosen=assistant("é\n")),
    ]
    assert encode(template, *rows) == encode(CHATML, *rows)


def test_what_a_template_of_parts_leaves_out_is_noted() -> None:
    no_system = ONLY_PARTS.replace(
        "message['content'] %}", "message['content'] if message.role != 'system' %}"
    )
    assert notes(no_system, example(message("system", "Be brief."), user("Is it?"))) == [text_out("system")]


def test_a_special_token_that_the_tokenizer_lacks_is_written_as_nothing_or_reported() -> None:
    one = example(user("Is it?"))
    assert encode("{{ bos_token }}" + CHATML, one) == encode(CHATML, one)
    assert notes("{{ bos_token + 'a' }}" + CHATML, one) == (
        "the chat template refuses it ('bos_token' is undefined)"
    )
