"""A tokenizer for measuring texts, and a tiny engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compactor_vllm.evaluation.tasks.words import ADJECTIVES
from tests.tiny import save_tiny

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and pieces of words, about as long as those of a large vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [NOISE, "One of the special magic numbers for what is: mentioned in the provided text", *ADJECTIVES[:40]]
    backend.train_from_iterator(corpus * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=100)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-evaluation")
    save_tiny(directory)
    return directory
