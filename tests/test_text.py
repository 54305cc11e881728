"""Text read, tokenised once and cut into windows; what cannot be read is refused in one line."""

import sys
import types

import pytest
import torch

from sparsekern import text


def test_a_local_file_is_read_as_utf8(tmp_path):
    (tmp_path / "a b.txt").write_text("grüße\n\nzwei", encoding="utf-8")
    assert text.read_text(tmp_path / "a b.txt") == text.read_text(str(tmp_path / "a b.txt")) == "grüße\n\nzwei"


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    for source, message in (
        (tmp_path / "missing", "no such file: '/"),
        ("missing.txt", r"no such file: 'missing\.txt'"),
        (tmp_path, "is not a file"),
        (tmp_path / "empty.txt", "holds no text"),
        (tmp_path / "binary.txt", "is not UTF-8 text: invalid start byte at byte 2"),
    ):
        with pytest.raises(ValueError, match=message):
            text.read_text(source)


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the datasets library that records what it was asked for."""
    asked = []

    class Rows(dict):
        column_names = property(lambda self: list(self))

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist on the Hub or cannot be accessed.")
        return Rows(label=[1, 2]) if name == "labels" else Rows(text=["one", "two"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_datasets_rows_are_joined_by_blank_lines(datasets):
    assert text.read_text("org/wiki:small:test") == "one\n\ntwo"
    assert text.read_text("wiki") == "one\n\ntwo"
    assert datasets == [("org/wiki", "small", "test"), ("wiki", None, "train")]


def test_a_dataset_that_cannot_be_used_is_refused_in_one_line(datasets):
    with pytest.raises(
        ValueError, match="^cannot load dataset 'missing': Dataset 'missing' doesn't exist .*; give a local"
    ):
        text.read_text("missing")
    with pytest.raises(ValueError, match="^dataset 'labels' has no column \"text\", only label$"):
        text.read_text("labels")


def test_without_the_datasets_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="^'wiki' is no local file, and .* pip install datasets$"):
        text.read_text("wiki")


def test_the_whole_text_becomes_one_row_of_tokens():
    tokens = text.tokenize(lambda text, verbose: {"input_ids": [ord(letter) for letter in text]}, "abc")
    assert torch.equal(tokens, torch.tensor([97, 98, 99]))
    assert tokens.dtype == torch.long


def starts(tokens, *args, **kwargs):
    batches = text.windows(tokens, *args, **kwargs)
    for batch in batches:
        assert torch.equal(batch, tokens[batch[0, 0] :][: batch.shape[1]][None])
    return [int(batch[0, 0]) for batch in batches]


@pytest.mark.parametrize("count", [None, 1, 7, 14])
def test_windows_do_not_overlap_as_long_as_they_fit_side_by_side(count):
    drawn = starts(torch.arange(100), 7, count)
    assert len(drawn) == (count or 14)
    assert all(abs(a - b) >= 7 for a in drawn for b in drawn if a is not b and a != b)
    assert len(set(drawn)) == len(drawn)


def test_more_windows_than_fit_side_by_side_each_start_elsewhere():
    assert sorted(starts(torch.arange(100), 90, 11)) == list(range(11))


def test_the_seed_decides_what_is_drawn():
    tokens = torch.arange(1000)
    assert starts(tokens, 10, 20, seed=1) == starts(tokens, 10, 20, seed=1)
    assert starts(tokens, 10, 20, seed=1) != starts(tokens, 10, 20, seed=2)


def test_every_token_of_a_text_of_one_window_is_used():
    assert starts(torch.arange(8), 8) == [0]


@pytest.mark.parametrize(
    ("seqlen", "count", "message"),
    [
        (0, None, "seqlen must be at least 1, got 0"),
        (4, 0, "count must be at least 1, got 0"),
        (11, None, "a window needs 11 tokens, the text has 10"),
        (10, 2, "10 tokens hold 1 windows of 10, not 2"),
    ],
)
def test_windows_that_cannot_be_drawn_are_refused(seqlen, count, message):
    with pytest.raises(ValueError, match=message):
        text.windows(torch.arange(10), seqlen, count)
