"""What a row holds that is not scored."""

from typing import Any

import pytest

from dpo_cache.data.lost import (
    TURNS_AFTER,
    column_notes,
    differing_media,
    media_notes,
    media_of,
    media_of_part,
    row_notes,
    weight_notes,
    without_turns_after,
)
from tests.data.conftest import assistant, user

IMAGES = "its images are left out, because only text is scored"
VIDEOS = "its videos are left out, because only text is scored"
AUDIO = "its audio is left out, because only text is scored"
FILES = "its files are left out, because only text is scored"
MARKS = "its text has marks in place of {}, which are scored as text"


@pytest.mark.parametrize(
    ("medium", "names"),
    [
        ("image", "image images image_path image_paths image_url images_urls img img_path image_bytes "
                  "input_image pixel_values image_0 chosen_image image_chosen photo imageUrl IMAGE image_file_name "
                  "screenshot jpg png page_image query_image_url"),
        ("video", "video videos video_path video_paths video_url input_video"),
        ("audio", "audio audios audio_path input_audio audio_url wav waveform"),
        (None, "prompt chosen imagery image_caption image_id imagination audience audiobook_title videogame "
               "text type content frame speech"),
    ],
)  # fmt: skip
def test_media_are_known_by_the_names_of_their_columns(medium: str | None, names: str) -> None:
    assert {name: media_of(name) for name in names.split()} == dict.fromkeys(names.split(), medium)


@pytest.mark.parametrize(
    ("part", "medium"),
    [
        ({"type": "image"}, "image"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image"),
        ({"type": "input_image", "image_url": "a.png"}, "image"),
        ({"image": "a.png"}, "image"),
        ({"type": "video", "video": "a.mp4"}, "video"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "audio"),
        ({"type": "file", "file": {"file_id": "1"}}, "file"),
        ({"type": "text", "text": "a"}, None),
        ({"type": "text", "text": "a", "image_url": None}, None),
        ({"text": "a", "image": None}, None),
        ({"type": "refusal", "refusal": "no"}, None),
    ],
)
def test_media_of_a_content_part(part: dict[str, Any], medium: str | None) -> None:
    assert media_of_part(part) == medium


PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
TEXT_PARTS = [{"role": "user", "content": [{"type": "text", "text": "What?", "image_url": None}]}]
TOOL = {"type": "function", "function": {"name": "draw", "parameters": {"image": {"type": "image"}}}}
CALL = {"function": {"name": "draw", "arguments": {"image": "a.png"}}}


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"prompt": "a", "images": ["a.png"]}, [IMAGES]),
        ({"prompt": "a", "images": [{"bytes": b"x", "path": None}]}, [IMAGES]),
        ({"prompt": "a", "image": {"bytes": None, "path": None}}, []),
        ({"prompt": "a", "images": []}, []),
        ({"prompt": "a", "images": None, "video_path": "", "audio": float("nan")}, []),
        ({"prompt": "a", "video_path": "a.mp4", "audio": {"array": [0.0, 0.5]}}, [VIDEOS, AUDIO]),
        ({"prompt": PARTS}, [IMAGES]),
        ({"prompt": PARTS, "images": ["a.png"]}, [IMAGES]),
        ({"prompt": TEXT_PARTS}, []),
        ({"prompt": [{"role": "user", "content": "a", "images": ["a.png"]}]}, [IMAGES]),
        ({"conversations": [{"from": "human", "value": "a", "video": "a.mp4"}]}, [VIDEOS]),
        ({"prompt": "a", "shot": {"bytes": b"x", "path": "a.png"}}, [IMAGES]),
        ({"prompt": "a", "shots": [{"bytes": None, "path": "a.mp4"}]}, [VIDEOS]),
        ({"prompt": "a", "shot": {"bytes": b"x", "path": None}}, [FILES]),
        ({"prompt": "a", "shot": {"bytes": None, "path": None}}, []),
        ({"prompt": "a", "tools": [TOOL]}, []),
        ({"prompt": [{"role": "tool", "content": {"image": "nginx", "up": True}}]}, []),
        ({"prompt": [{"role": "tool", "content": [{"type": "image", "image": "a.png"}]}]}, [IMAGES]),
        ({"prompt": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]}, []),
    ],
)
def test_media_that_are_left_out_are_noted_once_a_row(row: dict[str, Any], notes: list[str]) -> None:
    assert media_notes(row) == notes


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("<image>\nWhat?", ["images"]),
        ("What? <image_1> and <image_2>", ["images"]),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", ["images"]),
        ("<|image_1|>", ["images"]),
        ("<start_of_image>", ["images"]),
        ("<|begin_of_image|>", ["images"]),
        ("[IMG][IMG_END]", ["images"]),
        ("<ImageHere>", ["images"]),
        ("<IMG_CONTEXT>", ["images"]),
        ("<img>a.png</img>", ["images"]),
        ("<video> and <audio>", ["videos", "audio"]),
        ("<|AUDIO|>", ["audio"]),
        ("<|video_pad|>", ["videos"]),
        ('<video>\n  <source src="a.mp4">\n</video>', []),
        ('<img src="a.png"> <imagine> <images_of_x> <|im_start|> <audiobook>', []),
        ("an image, a < b", []),
    ],
)
def test_marks_of_media_in_the_text_are_noted(text: str, nouns: list[str]) -> None:
    assert media_notes({}, [text, "b"]) == [MARKS.format(noun) for noun in nouns]


def test_answers_that_differ_in_their_media() -> None:
    one, other = ([{"role": "assistant", "content": [{"type": "image", "image": name}]}] for name in "ab")
    assert differing_media(one, other) == "images"
    assert differing_media(one, one) is None
    assert differing_media([assistant("a")], [assistant("b")]) is None


@pytest.mark.parametrize(
    ("field", "value", "is_noted"),
    [
        ("weight", 0, True),
        ("weight", 0.5, True),
        ("weight", 1, False),
        ("weight", 1.0, False),
        ("weight", None, False),
        ("train", False, True),
        ("train", True, False),
        ("loss_weight", 0.0, True),
        ("loss", False, True),
        ("loss_mask", 0, True),
        ("mask", 1, True),
        ("mask", 0, True),
    ],
)
def test_weights_of_messages_that_are_not_used_are_noted(field: str, value: Any, is_noted: bool) -> None:
    note = f"the `{field}` of its messages is not used: each token of an answer is scored"
    answers = [[assistant("a")], [{**assistant("b"), field: value}]]
    assert weight_notes(answers) == [note] * is_noted


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"reasoning_content": "Hm."}, ["reasoning_content"]),
        ({"chosen_reasoning": "Hm.", "rejected_reasoning": ""}, ["chosen_reasoning"]),
        ({"reasoning": "The second is better."}, []),
        ({"weight": 0.5, "loss_weight": 0}, ["weight", "loss_weight"]),
        ({"weight": 1.0, "loss_weight": None, "sample_weight": float("nan")}, []),
        ({"documents": [{"text": "a"}], "enable_thinking": False}, ["documents", "enable_thinking"]),
        ({"available_tools": [TOOL]}, ["available_tools"]),
        ({"margin": 1, "source": "a"}, []),
    ],
)
def test_columns_that_no_format_reads_are_noted(row: dict[str, Any], columns: list[str]) -> None:
    notes = column_notes(row)
    assert [note.partition(" is not used: ")[0] for note in notes] == [
        f"its column `{name}`" for name in columns
    ]
    assert row_notes({"prompt": "a", **row}, ["a", "b", "c"]) == notes


def test_turns_after_the_answer_are_cut() -> None:
    both = [assistant("a"), user("b"), assistant("c")]
    cut = without_turns_after(([*both, user("d"), {"role": "tool", "content": "e"}], both))
    assert cut == ((both, both), (TURNS_AFTER,))
    assert without_turns_after((both, [user("d")], "a")) == ((both, [user("d")], "a"), ())
