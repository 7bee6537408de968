"""The built-in caption corpus and the reader of caption files."""

from __future__ import annotations

import hashlib
import itertools
import re

import pytest

from perfusion.captions import RULES, WORDS, everyday_captions, everyday_source, plural, read_captions


def test_the_corpus_is_pinned():
    """Stored covariances are found by the corpus's name: whoever changes the captions must change `everyday_source`."""
    digest = hashlib.sha256("\n".join(everyday_captions()).encode()).hexdigest()[:16]
    assert (everyday_source(), digest) == ("everyday-20000-seed0", "acb0092cbc01f578")


def test_a_longer_corpus_begins_with_the_shorter_one_and_seeds_differ():
    assert list(everyday_captions(50)) == list(itertools.islice(everyday_captions(5000), 50))
    assert list(everyday_captions(50)) != list(everyday_captions(50, seed=1))


def test_a_hundred_thousand_distinct_captions():
    captions = list(everyday_captions(100_000))
    assert len(set(captions)) == 100_000


def test_every_word_of_the_tables_is_used_and_lengths_vary():
    captions = list(everyday_captions())
    words = set(re.findall(r"[^\s,:!?]+", " ".join(captions)))
    listed = {word for words in WORDS.values() for word in re.findall(r"[^\s,]+", words)}
    assert len(listed) > 1700 and listed <= words
    lengths = sorted(len(caption.split()) for caption in captions)
    assert lengths[0] == 1 and lengths[len(lengths) // 20] <= 2 and 20 <= lengths[-len(lengths) // 20] and lengths[-1] <= 60


def test_the_tables_are_sound():
    """No symbol without a table, no table without a use, no choice twice in a list of words, no left-over markup."""
    symbols = set(re.findall(r"\{(\w+)", " ".join(RULES.values())))
    assert symbols | {"caption"} == set(WORDS) | set(RULES) and not set(WORDS) & set(RULES)
    for name, words in WORDS.items():
        choices = [" ".join(word.split()) for word in words.split(",")]
        assert len(set(choices)) == len(choices) and all(choices), name
    assert not any(set("{}") & set(caption) or "  " in caption for caption in everyday_captions(5000))


def test_grammar_details():
    text = " ".join(everyday_captions(5000)) + " "
    assert not re.search(r"\ba (?:apple|old|umbrella|elephant) ", text) and not re.search(r"\ban (?:red|unicorn|cat) ", text)
    assert [plural(noun) for noun in ("cat", "cherry", "toy train", "snow fox", "old man", "monkey", "bench")] == [
        "cats", "cherries", "toy trains", "snow foxes", "old men", "monkeys", "benches",
    ]  # fmt: skip


def test_count_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        everyday_captions(0)


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.txt", "a red cat\r\n\n  two  dogs \n"),
        ("c.txt", "\ufeffa red cat\ntwo dogs"),
        ("c.jsonl", '{"text": "a red cat", "id": 1}\n\n{"caption": "two dogs"}\n'),
        ("c.csv", "id,Caption\n1,a red cat\n2,\n3,two dogs\n"),
        ("c.csv", '\ufefftext,url\n"a red\ncat",x\ntwo dogs,y\n'),
    ],
)
def test_read_captions(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert list(read_captions(path)) == ["a red cat", "two dogs"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.txt", b" \n\n", "holds no caption"),
        ("c.txt", b"fine\nna\xefve\n", r"line 2 is not UTF-8 text \(byte 3 of the line is 0xef\)"),
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("c.jsonl", b'{"title": "a"}\n', 'line 1 has no string under "text" or "caption"'),
        ("c.jsonl", b"[1]\n", "line 1 has no string"),
        ("c.csv", b"id,url\n1,x\n", r'no column "caption" or "text", only \[\'id\', \'url\'\]'),
        ("c.csv", b"", 'no column "caption"'),
        ("c.csv", b'caption\n"open', "line 2|unexpected end"),
        ("c.parquet", b"", r"not one of \.txt, \.jsonl, \.csv"),
    ],
)
def test_read_captions_refuses(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_captions(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_captions(tmp_path / "nowhere.txt")


def test_files_are_streamed(tmp_path):
    """A bad line far down must not keep the captions above it from coming."""
    path = tmp_path / "c.txt"
    path.write_bytes(b"good\n" * 10 + b"\xff\n")
    assert list(itertools.islice(read_captions(path), 10)) == ["good"] * 10
