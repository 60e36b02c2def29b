"""YAML by the core schema of YAML 1.2: read by one guarded reader, written so that every reader agrees."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml
from places import ROOT

from tlx.base.parsing import from_word, from_yaml, from_yaml_file, to_yaml

TLX = ROOT / "tlx"


# By hand from the tables of https://yaml.org/spec/1.2.2/#1032-tag-resolution
SCALARS = {
    "010": 10, "-012": -12, "0o10": 8, "0x1F": 31, "+7": 7, "08": 8,
    "1e-3": 0.001, "1E3": 1000.0, ".5": 0.5, "1.": 1.0, "-1.5e+3": -1500.0, ".inf": float("inf"),
    "true": True, "False": False, "~": None, "null": None, "": None,
    "12:30": "12:30", "1:30:00": "1:30:00", "yes": "yes", "no": "no", "on": "on", "Off": "Off", "y": "y",
    "2001-01-01": "2001-01-01", "2001-99-99": "2001-99-99", "1_000": "1_000", "0b11": "0b11", "=": "=", "1e": "1e",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_the_same_in_a_file_in_a_list_and_as_a_word(text):
    meant = SCALARS[text]
    values = [from_yaml(f"a: {text}")["a"], from_word(text), from_word(f"[{text or '~'}]")[0]]
    values += [from_word(f"{{a: {{b: [{text or '~'}]}}}}")["a"]["b"][0], from_word(f"  {text} ") if text else None]
    for value in values[:4]:
        assert value == meant
        assert type(value) is type(meant)
    assert (values[4] if not isinstance(meant, str) else values[4].strip()) == meant


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("runs/exp #3", "runs/exp #3"),
        ("a: b", "a: b"),
        ("- x", "- x"),
        ("*all", "*all"),
        ("&x y", "&x y"),
        ("!!int 3", "!!int 3"),
        ("| x", "| x"),
        ("it's", "it's"),
        ("é", "é"),
        ('"010"', "010"),
        ("'it''s # whole'", "it's # whole"),
        ("{name: step, every: 7ep}", {"name": "step", "every": "7ep"}),
        ("[1e-3, {a: [b]}]", [0.001, {"a": ["b"]}]),
    ],
)
def test_a_word_is_taken_whole_unless_it_opens_as_yaml(word, value):
    assert from_word(word) == value


@pytest.mark.parametrize(
    "word", ["[a", "{a: 1", "[1] # 2", '"a" b', '"a": 1', "{a: 1, a: 2}", "[a #b]", "'x", "a\0b", "caf\udce9", "a\x07"]
)
def test_a_word_that_opens_as_yaml_and_is_none_is_refused(word):
    with pytest.raises(ValueError, match=r"line|follows"):
        from_word(word)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phases:\n  a: 1\nrun: x\nphases:\n  b: 2", 'line 4: the key "phases" was said in line 1 already'),
        ("a:\n  - {x: 1, y: 2, x: 3}", 'line 2: the key "x" was said in line 2 already'),
        ("1: a\n0x1: b", 'line 2: the key "1" was said in line 1'),
        ("a:\n\t- 1", "line 2, column 1: a tab; YAML is indented by spaces alone"),
        ("a: b: c", 'line 1, column 5: a second ": " on a line; put the text that holds it in quotes'),
        ("a: 1\nb: x\0y", "line 2, column 5: the control character U+0000"),
        ("a: 1\nb: x\x07y", "line 2, column 5: the control character U+0007"),
        ('a: 1\nb: "x\\0y"', "line 2: a text with a NUL character"),
        ('a: "\\ud800"', "line 1: a text with half of a character (a lone surrogate)"),
        ("a: 1\n\ufeffb: 2", "line 2, column 1: a byte order mark U+FEFF"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but found another"),
        ("a: 99999999999999999999", "line 1: a number of more than 64 bits"),
        ("a: !!timestamp 2001-01-01", "line 1: the tag !!timestamp has no meaning here"),
        ("a: !!int x", "line 1: the tag !!int cannot be 'x'"),
        ("x: 1\n[1]: 2", "line 2: a key that is a list or a mapping"),
        ("a: &a [*a]", "line 1: an alias in it stands for what it is in"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        from_yaml(text)


def test_merge_keys_and_tags_of_plain_data_are_known():
    assert from_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: !!str 010\nd: {<<: [{p: 1}, {p: 2, q: 3}]}") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": "010", "d": {"p": 1, "q": 3},
    }  # fmt: skip


def test_files_that_are_no_utf8_say_so(tmp_path):
    file = tmp_path / "c.yaml"
    for content, said in (
        (b"a: 1\nb: caf\xe9", "line 2: the byte 0xe9 is not UTF-8"),
        ("a: 1".encode("utf-16"), "its text is UTF-16"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            from_yaml_file(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1")  # as Windows editors begin a file
    assert from_yaml_file(file) == {"a": 1}
    with pytest.raises(OSError, match="no file can have this name"):
        from_yaml_file(Path("a\0b"))


def test_what_is_written_is_read_back_by_every_reader():
    """By ours and by YAML 1.1's, which earlier versions of tlx have; in a file and as a word."""
    rng = random.Random(1)
    letters = "019.eE+-_:xob~ #'\"{}[],&*!|>%@`\n\t\r\x85\u2028é\x07?yn<=/\\"
    texts = [*SCALARS, *("".join(rng.choices(letters, k=rng.randrange(7))) for _ in range(300))]
    for text in texts:
        value = {"k": [text, {text: 1e-05}, 1e20, 3, True, None]}
        assert from_yaml(to_yaml(value)) == yaml.safe_load(to_yaml(value)) == value
        word = to_yaml(value, flow=True)
        assert "\n" not in word
        assert from_word(word) == value
        assert from_word(to_yaml(text, flow=True)) == text


def test_nothing_else_in_tlx_reads_or_writes_yaml():
    beside = [
        path.relative_to(TLX).as_posix()
        for path in TLX.rglob("*.py")
        if re.search(r"^\s*(import yaml|from yaml)|safe_load|safe_dump", path.read_text(), re.MULTILINE)
    ]
    assert beside == ["base/parsing.py"]
