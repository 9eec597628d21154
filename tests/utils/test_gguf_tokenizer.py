"""Tokenizers rebuilt from GGUF metadata, against trained originals and a plain SentencePiece merge loop."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils.gguf_tokenizer import build_tokenizer, eos_token_ids

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6

TEXTS = [
    "Hello  world!\n\tdef f(x): return 12345",
    "It's 2024; don't they'LL say 3.14159?  naïve café",
    "日本語テキスト 🎉🎉 — “quotes”\r\n\r\n  end   ",
    "",
    " ",
    "a<|im_end|>b <think>x</think>",
]

ORIGINALS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def trained(pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str, **fields: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|im_end|>",
    }
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in fields.items()}}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_equals_the_original(pre: str) -> None:
    original = trained(ORIGINALS[pre])
    rebuilt = build_tokenizer("m", metadata_of(original, pre))
    assert rebuilt is not None
    assert len(rebuilt) == original.get_vocab_size()
    for text in TEXTS:
        ids = rebuilt(text).input_ids
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids) == text
    assert rebuilt("<|im_end|>").input_ids == [2]
    assert rebuilt.decode([2], skip_special_tokens=True) == ""


def test_special_tokens_and_chat_template() -> None:
    metadata = metadata_of(trained(ORIGINALS["gpt-2"]), "gpt-2", bos_token_id=1, padding_token_id=0)
    tokenizer = build_tokenizer("m", metadata)
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.unk_token is None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "hi<|im_end|>"
    assert tokenizer(text).input_ids[-1] == 2


def test_user_defined_tokens_are_whole_but_not_special() -> None:
    original = trained(ORIGINALS["gpt-2"])
    metadata = metadata_of(original, "gpt-2")
    index = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append("<think>")
    metadata["tokenizer.ggml.token_type"].append(USER_DEFINED)
    tokenizer = build_tokenizer("m", metadata)
    assert tokenizer is not None
    assert index in tokenizer("a<think>b").input_ids
    assert tokenizer.decode([index], skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm 12345 x", ["I", "'m", " 12345", " x"]),
        ("smollm", "I'm 123 x", ["I", "'m", " ", "1", "2", "3", " x"]),
        ("llama-bpe", "I'M 12345 x", ["I", "'M", " ", "123", "45", " x"]),
        ("qwen2", "I'M 123 x", ["I", "'M", " ", "1", "2", "3", " x"]),
        ("llama-bpe", "a!\n\n  b", ["a", "!\n\n", " ", " b"]),
        ("gpt-2", "a!\n\n  b", ["a", "!", "\n\n ", " b"]),
        ("qwen2", "(x) _y", ["(x", ")", " _", "y"]),
    ],
)
def test_how_text_is_cut_into_words(pre: str, text: str, words: list[str]) -> None:
    tokenizer = build_tokenizer("m", metadata_of(trained(ORIGINALS["gpt-2"]), pre))
    assert tokenizer is not None
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*offsets)] for _, offsets in pieces] == words


def test_a_token_that_is_a_whole_word_needs_no_merges() -> None:
    """Llama 3 takes words that are in the vocabulary as they are."""
    original = trained(ORIGINALS["gpt-2"])
    metadata = metadata_of(original, "llama-bpe", bos_token_id=1)
    metadata["tokenizer.ggml.tokens"].append("zyxwv")
    tokenizer = build_tokenizer("m", metadata)
    assert tokenizer is not None
    assert tokenizer("zyxwv").input_ids == [1, len(metadata["tokenizer.ggml.tokens"]) - 1]
    assert tokenizer("zyxwv", add_special_tokens=False).input_ids == tokenizer("zyxwv").input_ids[1:]


@pytest.mark.parametrize(("add", "expected"), [(True, [1]), (False, [])])
def test_beginning_of_text(add: bool, expected: list[int]) -> None:
    metadata = metadata_of(trained(ORIGINALS["gpt-2"]), "gpt-2", bos_token_id=1, add_bos_token=add)
    tokenizer = build_tokenizer("m", metadata)
    assert tokenizer is not None
    assert tokenizer("").input_ids == expected


def sentencepiece_metadata() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = ["▁", "a", "b", "c", "d", "▁a", "ab", "abc", "▁ab", "cd", "bc", "▁▁", "abcd", "▁abc", "da", "dab"]
    scores = [0.0, -9.0, -9.5, -10.0, -10.5, -4.0, -1.0, -7.0, -2.0, -3.0, -0.5, -6.0, -8.0, -5.0, -2.5, -1.5]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + bytes_ + words,
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def merge_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE: the best-scored neighbouring pair that is a token is joined, leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    ids = []
    for part in parts:
        known = [part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [tokens.index(piece) for piece in known]
    return ids


def test_sentencepiece_equals_a_merge_loop() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer("m", metadata)
    assert tokenizer is not None
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice(["a", "b", "c", "d", " ", "é"]) for _ in range(draw.randint(1, 12)))
        ids = tokenizer(text).input_ids
        assert ids == [1, *merge_by_score(text, metadata)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ids_that_end_a_generation() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["x", "<|im_end|>", "<|eot_id|>", "y", "<|endoftext|>"],
        "tokenizer.ggml.token_type": [NORMAL, CONTROL, NORMAL, CONTROL, CONTROL],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eom_token_id": 0,
    }
    assert eos_token_ids(metadata) == (0, 1, 3, 4)
    assert eos_token_ids({}) == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "wordpiece"}, "tokenizer.ggml.model='wordpiece' is not supported; supported: gpt2, llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not supported; supported: gpt-2, default, smollm"),
        ({"merges": ["un known"]}, "vocabulary is damaged"),
        ({"eos_token_id": 10**6}, "eos_token_id=1000000 is not in the vocabulary"),
        ({"model": "llama"}, "one score per token"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    metadata = metadata_of(trained(ORIGINALS["gpt-2"]), "gpt-2")
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer("m", metadata)


def test_no_vocabulary() -> None:
    assert build_tokenizer("m", {}) is None


def test_llama3_pattern_of_the_reference_implementation() -> None:
    """The pattern as Meta published it, on random text."""
    published = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(published), behavior="isolated")
    tokenizer = build_tokenizer("m", metadata_of(trained(ORIGINALS["gpt-2"]), "llama-bpe", bos_token_id=1))
    assert tokenizer is not None
    draw = random.Random(1)
    for _ in range(100):
        text = "".join(draw.choice("aB1 \n\r\t'.sé日!_") for _ in range(30))
        ours = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [offsets for _, offsets in ours] == [offsets for _, offsets in split.pre_tokenize_str(text)]
