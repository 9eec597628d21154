"""Incremental text equals the text decoded at once, for tokenizers of several kinds and any stream of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compactor_vllm.core.detokenizer import MAX_WINDOW, IncrementalDetokenizer, StopStrings

CORPUS = [
    "The quick brown fox jumps over the lazy dog, then sleeps. It's 12:30 -- time for tea!",
    "Der schnelle Füchs springt über den faulen Hund; où est la bibliothèque? ¿Qué tal, señor?",
    "敏捷的棕色狐狸跳过了懒狗。今日は良い天気ですね。안녕하세요 세계, 반갑습니다.",
    "Съешь же ещё этих мягких французских булок. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 😀😃 smiles, 🇩🇪🇯🇵 flags, 👍🏽 ok, é combining, 𝔘𝔫𝔦 math, ￥ wide, \t tab\n\n newline",
] * 3
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
PLAIN_ADDED = [AddedToken("<tool>", special=False, normalized=False), AddedToken("né😀", special=False)]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(PLAIN_ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [*CORPUS, "literal \ufffd mark"],
        trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>"], show_progress=False),
    )
    return _wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As the tokenizers of the first two Llama generations."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        limit_alphabet=60,
        special_tokens=["<unk>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:2] * 3, trainer)
    # Byte tokens are ordinary entries of the vocabulary, not special ones.
    model = models.BPE(
        vocab=tokenizer.get_vocab(),
        merges=[tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    plain = Tokenizer(model)
    plain.normalizer, plain.decoder = tokenizer.normalizer, tokenizer.decoder
    return _wrap(plain)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=420, special_tokens=["[UNK]"], show_progress=False)
    )
    return _wrap(tokenizer)


KINDS = {f.__name__: f for f in (byte_level, metaspace, byte_fallback, word_piece)}
_built: dict[str, PreTrainedTokenizerFast] = {}


@pytest.fixture(params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return build(request.param)


def build(kind: str) -> PreTrainedTokenizerFast:
    if kind not in _built:
        _built[kind] = KINDS[kind]()
    return _built[kind]


def chunks(ids: list[int], sizes: list[int]) -> Iterator[list[int]]:
    position = 0
    while position < len(ids):
        size = sizes[position % len(sizes)]
        yield ids[position : position + size]
        position += size


def full_text(tokenizer, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def check_stream(tokenizer, ids: list[int], sizes: list[int], skip: bool = True) -> list[str]:
    """Joined pieces are a prefix of the whole text at any time, and the whole text in the end."""
    expected = full_text(tokenizer, ids, skip)
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces, text = [], ""
    for part in chunks(ids, sizes):
        pieces.append(stream.push(part))
        text += pieces[-1]
        assert expected.startswith(text)
    text += stream.finish()
    assert text == expected
    assert not stream.stopped and stream.finish() == ""
    return pieces


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), sizes=SIZES, skip=st.booleans())
def test_any_tokens(data, kind, sizes, skip):
    tokenizer = build(kind)
    # Some ids lie beyond the vocabulary, as those of a padded embedding.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    check_stream(tokenizer, ids, sizes, skip)


TEXT = st.text(st.one_of(st.sampled_from(sorted(set("".join(CORPUS)))), st.characters(codec="utf-8")), max_size=40)


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=TEXT, sizes=SIZES)
@example(kind="byte_level", text="a👩‍👩‍👧‍👦b", sizes=[1])
@example(kind="byte_fallback", text=" 👩‍👩‍👧‍👦  b ", sizes=[1])
@example(kind="metaspace", text="  two  spaces ", sizes=[1])
def test_encoded_text(kind, text, sizes):
    tokenizer = build(kind)
    pieces = check_stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), sizes)
    if kind in ("byte_level", "byte_fallback") and "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(["byte_level", "byte_fallback"]), raw=st.binary(max_size=200), sizes=SIZES)
@example(kind="byte_level", raw=b"\xf0\x9f\x98\xf0\x9f\x98\x80", sizes=[1])
@example(kind="byte_level", raw=b"\xf0\x9f\x98" * 60 + b"\x80ok\xe2\x82", sizes=[1])
@example(kind="byte_level", raw=b"\xff" * 150 + b"\xe2\x82\xac" + b"\x80" * 100, sizes=[1])
@example(kind="byte_fallback", raw=b"\xc3\xa9" * 100 + b"\xff", sizes=[1])
def test_any_bytes(kind, raw, sizes):
    """Streams of single bytes: unfinished, invalid and overlong sequences."""
    check_stream(build(kind), byte_ids(kind, raw), sizes)


@pytest.mark.parametrize("pattern", [b"\xf0\x9f\x98", b"\xe2\x82", b"\xf0\x90\x80\xc3"])
@pytest.mark.parametrize("shift", range(4))
def test_endless_unfinished_characters(pattern, shift):
    """Windows without a clean end are cut; where the cut lies in the sequences must not matter."""
    raw = b"\xff" * shift + pattern * 80 + "\u20ac".encode()
    check_stream(build("byte_level"), byte_ids("byte_level", raw), [1])


def byte_ids(kind: str, raw: bytes) -> list[int]:
    if kind == "byte_fallback":
        return [build(kind).convert_tokens_to_ids(f"<0x{b:02X}>") for b in raw]
    # The byte-level alphabet: printable bytes stand for themselves, the others follow from code point 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [build(kind).convert_tokens_to_ids(chr(b) if b in printable else chr(256 + others.index(b))) for b in raw]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["byte_level", "metaspace", "byte_fallback"]), sizes=SIZES)
def test_after_prompt(data, kind, sizes):
    """With a prompt, the text is what the output adds to it."""
    tokenizer = build(kind)
    prompt, output = (tokenizer.encode(data.draw(TEXT), add_special_tokens=False) for _ in range(2))
    before = full_text(tokenizer, prompt)
    stream = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    text = "".join(map(stream.push, chunks(output, sizes))) + stream.finish()
    closed = (
        before and not before.endswith("\ufffd") and not tokenizer.convert_ids_to_tokens(prompt[-1]).startswith("<0x")
    )
    if closed:
        assert before + text == full_text(tokenizer, prompt + output)
    else:
        assert text == full_text(tokenizer, output)


def test_leading_space_after_prompt():
    tokenizer = build("metaspace")
    prompt, output = (tokenizer.encode(t, add_special_tokens=False) for t in ("The quick", "brown fox"))
    assert IncrementalDetokenizer(tokenizer).push(output) == "brown fox"
    after = IncrementalDetokenizer(tokenizer, prompt_token_ids=[*prompt, tokenizer.eos_token_id])
    assert after.push(output) == " brown fox"


def test_prompt_that_ends_inside_a_character_is_no_context():
    ids = byte_ids("byte_level", "no\u20ac".encode())
    stream = IncrementalDetokenizer(build("byte_level"), prompt_token_ids=ids[:3])
    assert stream.push(ids[3:]) + stream.finish() == full_text(build("byte_level"), ids[3:])


def test_text_comes_as_soon_as_it_is_certain():
    ids = byte_ids("byte_level", "aé€😀".encode())
    stream = IncrementalDetokenizer(build("byte_level"))
    assert [stream.push([i]) for i in ids] == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    stream = IncrementalDetokenizer(build("byte_level"))
    # The invalid start is settled by the byte that follows it, and nothing makes 255 a character.
    assert [stream.push([i]) for i in byte_ids("byte_level", b"x\xf0\x9fy\xff")] == ["x", "", "", "\ufffdy", "\ufffd"]
    assert stream.finish() == ""


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int], **kwargs) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


STREAMS = {
    "plain": ("byte_level", lambda t: t.encode("The lazy 狐狸 sleeps 😀. " * 80)),
    "metaspace": ("metaspace", lambda t: t.encode("The lazy 狐狸 sleeps. " * 120)),
    "invalid": ("byte_level", lambda t: byte_ids("byte_level", b"\xf0\x9f" * 700)),
    "marks": ("metaspace", lambda t: [t.convert_tokens_to_ids("\ufffd")] * 900),
    "fallback": ("byte_fallback", lambda t: byte_ids("byte_fallback", "né€".encode() * 200)),
    "special": ("byte_level", lambda t: [t.eos_token_id, len(t) + 5] * 400),
}


@pytest.mark.parametrize("name", STREAMS)
def test_cost_per_token_is_bounded(name):
    kind, make = STREAMS[name]
    tokenizer = CountingTokenizer(build(kind))
    ids = make(tokenizer._tokenizer)
    assert len(ids) > 500 and None not in ids
    expected = full_text(tokenizer._tokenizer, ids)
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == expected
    assert tokenizer.decoded <= (MAX_WINDOW + 20) * len(ids)
    if name in ("plain", "metaspace", "fallback", "special"):
        assert tokenizer.decoded <= 20 * len(ids)


def first_stop(text: str, stop: list[str]) -> str | None:
    """Reads character by character and returns the text before the first complete stop string."""
    for end in range(len(text) + 1):
        found = [s for s in stop if s and text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abé", max_size=30),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
)
@example(text="aabaab", stop=["aab"], cuts=[1])
@example(text="xabcy", stop=["abc", "b"], cuts=[5])
@example(text="abab", stop=["ba", "aba"], cuts=[2])
def test_stop_strings(text, stop, cuts):
    expected = first_stop(text, stop)
    matcher, emitted = StopStrings(stop), ""
    for part in chunks(list(text), cuts):
        emitted += matcher.push("".join(part))
        assert (text if expected is None else expected).startswith(emitted)
    emitted += matcher.finish()
    assert emitted == (text if expected is None else expected)
    assert (matcher.matched is not None) == (expected is not None)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), sizes=SIZES)
def test_stop_strings_across_tokens(data, kind, sizes):
    tokenizer = build(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=40))
    text = full_text(tokenizer, ids)
    begin = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = [s for s in (text[begin : begin + 6], text[begin + 2 : begin + 3], "zz") if s]
    expected = first_stop(text, stop)
    stream, emitted = IncrementalDetokenizer(tokenizer, stop), ""
    for part in chunks(ids, sizes):
        emitted += stream.push(part)
        assert (text if expected is None else expected).startswith(emitted)
    emitted += stream.finish()
    assert emitted == (text if expected is None else expected)
    assert stream.stopped == (expected is not None)
    assert stream.push(ids) == "" or not stream.stopped


def test_stop_string_that_ends_in_held_text():
    """What only `finish` brings to light can complete a stop string."""
    ids = byte_ids("byte_level", b"ok\xff")
    stream = IncrementalDetokenizer(build("byte_level"), stop=["k\ufffd"])
    assert "".join(stream.push([i]) for i in ids) == "o"
    assert stream.finish() == "" and stream.matched_stop == "k\ufffd"


def test_special_tokens_are_shown_on_request(tokenizer):
    ids = [*tokenizer.encode("The dog", add_special_tokens=False), tokenizer.eos_token_id]
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(shown.push([i]) for i in ids).endswith("</s>")
    hidden = IncrementalDetokenizer(tokenizer)
    assert "</s>" not in "".join(hidden.push([i]) for i in ids)
