"""The tokenizer inside a GGUF file, as a transformers tokenizer.

Two kinds of vocabulary exist in the supported families: byte-level BPE ("gpt2": Llama 3, Qwen, SmolLM), whose
pre-tokenizer the file names without describing it, and SentencePiece BPE ("llama": Llama 2), whose merges follow
from the tokens' scores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from compactor_vllm.errors import CheckpointError

logger = logging.getLogger(__name__)

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
"""GGUF token types that matter here; 1 is a normal token, 2 unknown, 5 unused."""

END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
"""Control tokens that end a generation even where the file's metadata names only one of them."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

PRE_TOKENIZERS = {
    "gpt-2": "gpt2",
    "default": "gpt2",
    "smollm": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
"""Values of tokenizer.ggml.pre, and how each cuts text into words."""


def build_tokenizer(name: str, metadata: Mapping[str, Any]) -> Any | None:
    """A fast transformers tokenizer with special tokens and chat template, or None where the file has no vocabulary.

    Raises:
        CheckpointError: a kind of vocabulary or pre-tokenizer that is not known, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        return None
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise CheckpointError(f"{name}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama")
    named = _named_tokens(name, metadata)
    backend = builders[kind](name, metadata)
    _add_special_tokens(backend, metadata)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **named,
    )


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: end of text, of turn and of message, by metadata and by well-known names."""
    fields = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids: set[int] = {metadata[key] for field in fields if (key := f"tokenizer.ggml.{field}") in metadata}
    types = metadata.get("tokenizer.ggml.token_type") or []
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    control = (i for i, kind in enumerate(types[: len(tokens)]) if kind == CONTROL)
    ids.update(i for i in control if tokens[i] in END_TOKENS)
    return tuple(sorted(ids))


def _byte_level_bpe(name: str, metadata: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"{name}: tokenizer.ggml.pre={pre!r} is not supported; supported: {known}")
    if pre == "default":
        logger.warning("%s does not name its pre-tokenizer; text is cut into words as for GPT-2", name)
    style = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=style == "llama3"))
    except Exception as error:
        raise CheckpointError(f"{name}: the vocabulary is damaged: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(style)
    if style == "qwen2":
        from tokenizers import normalizers

        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token", style == "llama3"):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def _pre_tokenizer(style: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if style == "gpt2":
        return ByteLevel(add_prefix_space=False)
    if style == "digits":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    pattern = LLAMA3_PATTERN if style == "llama3" else QWEN2_PATTERN
    words = Split(Regex(pattern), behavior="isolated")
    return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece_bpe(name: str, metadata: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{name}: tokenizer.ggml.scores must give one score per token")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = score_merges(vocab, scores)
    model = BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    if metadata.get("tokenizer.ggml.add_bos_token", True):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def score_merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that give SentencePiece's BPE: of all pairs that form a token, the best-scored token first."""
    merges = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _prepend_bos(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    index = metadata.get("tokenizer.ggml.bos_token_id")
    if index is None:
        return
    bos = metadata["tokenizer.ggml.tokens"][index]
    template = {"single": "$bos $A", "pair": "$bos $A $bos:1 $B:1"}
    template = {key: text.replace("$bos", bos) for key, text in template.items()}
    tokenizer.post_processor = TemplateProcessing(**template, special_tokens=[(bos, index)])


def _named_tokens(name: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    fields = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens, named = metadata["tokenizer.ggml.tokens"], {}
    for role, field in fields.items():
        index = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointError(f"{name}: tokenizer.ggml.{field}_token_id={index} is not in the vocabulary")
        named[role] = tokens[index]
    return named
