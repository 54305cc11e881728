"""For every test: memory that nobody wrote holds NaN, and a slow machine fails no property."""

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.card_linears import CARD_LINEARS

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """torch.empty gives NaN, and the largest integer, as long as torch is told to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_plan_of_the_user(monkeypatch, tmp_path_factory):
    """No test writes into a home, or finds there what another has measured."""
    monkeypatch.setattr("sparsekern.plan.user_cache", lambda: tmp_path_factory.mktemp("cache"))


@pytest.fixture
def one_thread():
    """The models of tiny_models.py are too small for two threads, which would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_no_card(monkeypatch):
    """The linear ops of a card take tensors of the CPU, whose index is none of a card's, and launch on stream 5."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda card: 5, raising=False)
    library = torch.library.Library("sparsekern", "IMPL")
    for name, op in CARD_LINEARS.items():
        library.impl(name, op.dispatched, "CPU")
    yield
    library._destroy()


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "the", "cat", "sat"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
