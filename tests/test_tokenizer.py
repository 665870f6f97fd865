from __future__ import annotations

import json
import random
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_made as made
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import TokenizerError
from mimo_edge.pretokenizer import split_words
from mimo_edge.tokenizer import Tokenizer

# Characters assigned in Unicode 3.2: every Unicode table in use agrees on them, so a difference
# is ours and not one between the versions of two libraries.
OLD = [c for c in map(chr, range(0x110000)) if unicodedata.ucd_3_2_0.category(c)[0] != "C"]
OLD_LETTERS = [c for c in OLD if ord(c) < 0x3000 or 0x4E00 <= ord(c) < 0x4F00]
POOLS = [
    OLD,
    OLD_LETTERS,
    list("abc'sStTrReEvVmMlLdDſK"),
    ["'s", "'LL", "'re", "'Ve", " '", "'ſ"],
    list(" \n\r\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u3000\u2028\u2003  "),
    list("0123456789٣४½Ⅷ²"),
    list("把客厅的灯调暗一点，。！？「」🎉💡"),
    list("<|im_end|>/\\.,-_'\"()[]{}"),
    list("éeàÀö\u0301\u0308ñ한국어ไทยم"),
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randint(1, 40)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def library() -> Any:
    from tokenizers import Tokenizer as LibraryTokenizer

    return LibraryTokenizer.from_str(made.library_json())


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(made.write_json(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def from_gguf() -> Tokenizer:
    return Tokenizer.from_gguf(made.gguf_metadata(padding=9))


def test_both_sources_equal_the_library(
    library: Any, from_file: Tokenizer, from_gguf: Tokenizer
) -> None:
    for text in [*random_texts(4000, seed=1), *made.CORPUS, "", "'", "a" * 3000]:
        want = library.encode(text, add_special_tokens=False).ids
        assert from_file.encode(text, allow_special=True) == want, text
        assert from_gguf.encode(text, allow_special=True) == want, text
        assert from_gguf.decode(want) == unicodedata.normalize("NFC", text)


def test_words_are_cut_where_the_regex_engine_cuts() -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    split = Split(Regex(made.PATTERN), "isolated")
    for text in random_texts(6000, seed=2):
        assert split_words(text) == [word for word, _ in split.pre_tokenize_str(text)], text


def test_special_tokens_only_when_asked(from_file: Tokenizer, from_gguf: Tokenizer) -> None:
    text = "a<|im_end|>b<think></think><|im_start|>"
    for tokenizer in (from_file, from_gguf):
        special = set(tokenizer.special.values())
        ids = tokenizer.encode(text, allow_special=True)
        assert [i for i in ids if i in special] == [
            tokenizer.special[t] for t in ("<|im_end|>", "<think>", "</think>", "<|im_start|>")
        ]
        plain = tokenizer.encode(text)
        assert not special & set(plain)
        assert tokenizer.decode(plain) == tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_control=True) == "ab<think></think>"


def test_stop_ids_by_name_and_by_config(from_gguf: Tokenizer) -> None:
    metadata = made.gguf_metadata()
    assert from_gguf.eos_ids == {
        from_gguf.special["<|im_end|>"],
        from_gguf.special["<|endoftext|>"],
    }
    metadata["tokenizer.ggml.eos_token_id"] = 5
    assert 5 in Tokenizer.from_gguf(metadata).eos_ids


def test_padding_ids(from_file: Tokenizer, from_gguf: Tokenizer) -> None:
    for tokenizer in (from_file, from_gguf):
        mask = tokenizer.padding_mask(tokenizer.size + 30)
        assert mask.sum() == 30
        assert not mask[: tokenizer.size].any()
        with pytest.raises(TokenizerError, match="another model"):
            tokenizer.padding_mask(tokenizer.size - 1)
    assert from_gguf.decode([from_gguf.size + 2]) == ""
    assert np.array_equal(from_file.padding_mask(500), from_gguf.padding_mask(500))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.randoms(use_true_random=False))
def test_streamed_decoding_never_splits_a_character(text: str, rng: random.Random) -> None:
    tokenizer = Tokenizer.from_gguf(GGUF)
    try:
        ids = tokenizer.encode(text)
    except TokenizerError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in text)
        return
    decoder = tokenizer.stream_decoder()
    pieces = []
    at = 0
    while at < len(ids):
        size = rng.randint(1, 3)
        pieces.append(decoder.feed(ids[at : at + size]))
        at += size
    pieces.append(decoder.finish())
    assert "".join(pieces) == unicodedata.normalize("NFC", text)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


GGUF = made.gguf_metadata()


def test_bytes_that_are_no_text_become_replacement_characters(from_gguf: Tokenizer) -> None:
    first = from_gguf.encode("灯")[0]
    halves = [i for i in range(256) if from_gguf.token_bytes(i) == "灯".encode()[:1]]
    assert from_gguf.decode([halves[0]]) == "\N{REPLACEMENT CHARACTER}"
    assert from_gguf.decode([halves[0], *from_gguf.encode("a")]) == "\N{REPLACEMENT CHARACTER}a"
    assert first >= 0


def test_lone_surrogates_are_refused(from_file: Tokenizer, from_gguf: Tokenizer) -> None:
    bad = b"caf\xe9".decode("utf-8", "surrogateescape")
    for tokenizer in (from_file, from_gguf):
        with pytest.raises(TokenizerError, match="U\\+DCE9 at character 3"):
            tokenizer.encode(bad)


def test_long_words_take_no_quadratic_time(from_gguf: Tokenizer) -> None:
    start = time.perf_counter()
    from_gguf.encode("ab" * 50_000)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "only gpt2"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "only qwen2"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "not in the vocabulary"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "two ids"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [9]}, "type 9"),
        (
            {
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.token_type": [1],
                "tokenizer.ggml.merges": [],
            },
            "255 of 256 bytes",
        ),
    ],
)
def test_damaged_gguf_tokenizers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf({**GGUF, **change})


def test_missing_gguf_keys() -> None:
    for key in GGUF:
        if key.endswith((".pre", "eos_token_id")):
            continue
        with pytest.raises(TokenizerError, match=r"no tokenizer\.ggml"):
            Tokenizer.from_gguf({k: v for k, v in GGUF.items() if k != key})


def _write(path: Path, change: Any) -> Path:
    raw = json.loads(made.library_json())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("model"),
        lambda raw: raw["model"].update(type="Unigram"),
        lambda raw: raw["model"].update(vocab={"a": 0}),
        lambda raw: raw["model"].update(merges=[["zz", "qq"]]),
        lambda raw: raw["added_tokens"][0].pop("content"),
        lambda raw: raw["added_tokens"][0].update(lstrip=True),
        lambda raw: raw["added_tokens"].append({"content": "<think>", "id": 3}),
        lambda raw: raw.update(pre_tokenizer={"type": "Nonsense"}),
    ],
)
def test_damaged_tokenizer_files(tmp_path: Path, change: Any) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer.from_file(_write(tmp_path / "tokenizer.json", change))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_tokenizer(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(TokenizerError):
        Tokenizer.from_file(path)
    with pytest.raises(TokenizerError):
        Tokenizer.from_sentencepiece(path)
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.from_file(tmp_path / "absent.json")


# --- SentencePiece ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    lines = [line for text in made.CORPUS for line in text.splitlines() if line.strip()]
    corpus.write_text("\n".join(lines * 10), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=440,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece_equals_the_library_and_guards_specials(sentencepiece_model: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = Tokenizer.from_sentencepiece(sentencepiece_model)
    for text in [*made.CORPUS, "把灯 💡 turn on", "x"]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)
    text = "light<|im_end|>dark <|im_start|>"
    special = {tokenizer.special["<|im_end|>"], tokenizer.special["<|im_start|>"]}
    plain = tokenizer.encode(text)
    assert not special & set(plain)
    assert tokenizer.decode(plain).split() == text.split()
    ids = tokenizer.encode(text, allow_special=True)
    assert [i for i in ids if i in special] == [
        tokenizer.special["<|im_end|>"],
        tokenizer.special["<|im_start|>"],
    ]
    assert tokenizer.decode(ids).split() == text.split()
    assert {
        tokenizer.special["<|im_end|>"],
        tokenizer.special["<|endoftext|>"],
    } <= tokenizer.eos_ids
