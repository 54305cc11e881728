"""Text as tokens and windows of them; what cannot be read is refused in one line."""

import pytest
import torch

from sparsekern import text


class Letters:
    """A tokenizer whose tokens are letters, and 0 for the start and 1 for the end."""

    chat_template = "set"

    def __call__(self, text, verbose, add_special_tokens=True):
        letters = [ord(letter) for letter in text]
        return {"input_ids": [0, *letters, 1] if add_special_tokens else letters}

    def apply_chat_template(self, chat, tokenize):
        assert tokenize is False
        return "".join(f"<{message['content']}>" for message in chat)


def spelled(tokens):
    return "".join(chr(token) if token > 1 else "^$"[token] for token in tokens.tolist())


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text('\n{"text": " "}\n')
    for source in (tmp_path / "empty.txt", str(tmp_path / "empty.jsonl")):
        with pytest.raises(ValueError, match="empty.* holds no text$"):
            text.read_text(source)
        with pytest.raises(ValueError, match="empty.* holds no text$"):
            text.read_tokens(source, Letters())
    with pytest.raises(ValueError, match="^calibration holds no text$"):
        text.read_tokens([], Letters())


def test_a_short_text_is_tokenised_in_one_piece():
    assert spelled(text.read_tokens(["one", "two"], Letters())) == "^one\n\ntwo$"


def test_a_long_text_is_cut_at_lines_or_words_and_only_its_beginning_gets_special_tokens(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 8)
    seen = []
    tokens = text.read_tokens(["a b\nc d\ne fghi", "jkl mnopqrstuvwxyz", "."], Letters(), progress=seen.append)
    assert spelled(tokens) == "^a b\nc d\n$e fghi\n\njkl mnopqrstuvwxyz\n\n."
    assert seen == sorted(seen)
    assert seen[-1] == len(tokens)
    assert len(seen) > 3


def test_chats_have_their_special_tokens_already():
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert spelled(text.read_tokens(chats, Letters())) == "<a><b>"


def test_a_tokenizer_without_a_chat_template_reads_no_chats():
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="holds a chat, and the tokenizer has no chat template"):
        text.read_tokens([[{"role": "user", "content": "a"}]], tokenizer)


def test_no_more_is_read_than_the_tokens_asked_for(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 8)
    asked = []

    def endless():
        while True:
            asked.append("abcdef")
            yield "abcdef"

    assert len(text.read_tokens(endless(), Letters(), at_most=20)) == 20
    assert len(asked) < 9


def test_calibration_is_windows_of_a_sources_tokens():
    texts = ["".join(chr(100 + number) for number in range(100))]
    batches = text.read_calibration(texts, Letters(), samples=5, seqlen=7, seed=3)
    assert [batch.shape for batch in batches] == [(1, 7)] * 5
    tokens = text.read_tokens(texts, Letters())
    want = text.windows(tokens, 7, 5, seed=3)
    assert all(torch.equal(batch, other) for batch, other in zip(batches, want, strict=True))


def test_the_whole_text_becomes_one_row_of_tokens():
    tokens = text.tokenize(Letters(), "abc")
    assert torch.equal(tokens, torch.tensor([0, 97, 98, 99, 1]))
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
