"""The tokenizer of a checkpoint as GGUF metadata.

Byte-level BPE (tokenizer.json) becomes model `gpt2` with pre-tokenizer `qwen2`, SentencePiece
(tokenizer.model) becomes model `llama`. Ids the tokenizer leaves free, up to the model's
vocabulary, are "[PADn]" of type UNUSED.

Source: spec sections 1.3 and 5; llama.cpp:conversion/base.py get_vocab_base,
_set_vocab_sentencepiece.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_edge.errors import TokenizerError
from mimo_edge.gguf_meta import Value, boolean, f32s, i32s, text, texts, u32
from mimo_edge.text_file import read_json, read_whole
from mimo_edge.tokenizer import _read_sentencepiece as read_sentencepiece

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PADDING_TOKEN = "<|endoftext|>"
# What `pre = qwen2` means to every reader. A tokenizer that cuts text otherwise would be read
# wrongly by all of them, so it is refused. Source: llama.cpp:src/llama-vocab.cpp.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_BYTES = 256 << 20


def tokenizer_metadata(
    files: Mapping[str, Path], vocab_size: int, eos_ids: tuple[int, ...], chat_template: str | None
) -> dict[str, Value]:
    """`tokenizer.*` keys for the tokenizer files of a checkpoint (by name).

    Without any tokenizer file the model is "none": it works on token ids, in llama.cpp too.
    Raises TokenizerError when the tokenizer is damaged, of another kind, or larger than the
    model's vocabulary.
    """
    if "tokenizer.json" in files:
        keys = _byte_level_bpe(_read(files["tokenizer.json"]), files["tokenizer.json"], vocab_size)
    elif "tokenizer.model" in files:
        keys = _sentencepiece(files["tokenizer.model"], vocab_size)
    elif "vocab.json" in files:
        raise TokenizerError(
            f"{files['vocab.json'].parent} has vocab.json but no tokenizer.json",
            "save it once with transformers' fast tokenizer, which writes tokenizer.json",
        )
    else:
        keys = {"model": text("none")}
    if eos_ids:
        keys["eos_token_id"] = u32(eos_ids[0])
    if len(eos_ids) > 1:
        keys["eot_token_id"] = u32(eos_ids[1])
    result = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if chat_template is not None:
        result["tokenizer.chat_template"] = text(chat_template)
    return result


def _byte_level_bpe(raw: Any, path: Path, vocab_size: int) -> dict[str, Value]:
    try:
        model = raw["model"]
        vocab: dict[str, int] = model["vocab"]
        merges = [_merge(merge, path) for merge in model["merges"]]
        added = raw.get("added_tokens") or []
        if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict):
            raise TokenizerError(f"{path}: only byte-level BPE tokenizers are supported")
        _check_pattern(raw.get("pre_tokenizer"), path)
        entries = [(_id(id_), token, NORMAL) for token, id_ in vocab.items()]
        for token in added:
            kind = CONTROL if token.get("special") else USER_DEFINED
            entries.append((_id(token["id"]), str(token["content"]), kind))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TokenizerError(f"{path} is not a tokenizer.json: {error!r}") from error
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for id_, token, kind in entries:
        if not 0 <= id_ < vocab_size:
            raise TokenizerError(
                f"{path}: token {token!r} has id {id_}, the model has {vocab_size} tokens",
                "the tokenizer belongs to another model",
            )
        if kinds[id_] != UNUSED and tokens[id_] != token:
            raise TokenizerError(f"{path}: {tokens[id_]!r} and {token!r} share id {id_}")
        tokens[id_], kinds[id_] = token, kind
    keys = {
        "model": text("gpt2"),
        "pre": text("qwen2"),
        "tokens": texts(tokens),
        "token_type": i32s(kinds),
        "merges": texts(merges),
        "add_bos_token": boolean(False),
    }
    padding = {token: id_ for id_, token, _ in entries}.get(PADDING_TOKEN)
    if padding is not None:
        keys["padding_token_id"] = u32(padding)
    return keys


def _id(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no token id")
    return value


def _merge(merge: Any, path: Path) -> str:
    """Merges come as "a b" or as ["a", "b"]; byte-level tokens hold no spaces."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or any(not isinstance(p, str) or not p or " " in p for p in pair):
        raise TokenizerError(f"{path}: merge {merge!r} is not two tokens")
    return f"{pair[0]} {pair[1]}"


def _check_pattern(pre: Any, path: Path) -> None:
    steps = [pre] if not isinstance(pre, dict) else pre.get("pretokenizers", [pre])
    patterns = [
        step["pattern"].get("Regex")
        for step in steps
        if isinstance(step, dict) and step.get("type") == "Split"
    ]
    if patterns != [QWEN2_PATTERN]:
        raise TokenizerError(
            f"{path} splits text by {patterns}, not by Qwen2's pattern",
            "every MiMo release uses Qwen2's; another one needs support in GGUF readers first",
        )


def _sentencepiece(path: Path, vocab_size: int) -> dict[str, Value]:
    """Pieces and types as the file states them, scores through the library."""
    from sentencepiece import SentencePieceProcessor

    data = path.read_bytes()
    pieces, dummy_prefix = read_sentencepiece(data, str(path))
    try:
        model = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # the library raises RuntimeError and others
        raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
    if len(pieces) > vocab_size:
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces, the model has {vocab_size} tokens",
            "the tokenizer belongs to another model",
        )
    free = range(len(pieces), vocab_size)
    keys = {
        "model": text("llama"),
        "pre": text("default"),
        "tokens": texts([piece for piece, _ in pieces] + [f"[PAD{i}]" for i in free]),
        "scores": f32s([model.get_score(i) for i in range(len(pieces))] + [-10000.0] * len(free)),
        "token_type": i32s([kind for _, kind in pieces] + [UNUSED] * len(free)),
        "add_bos_token": boolean(False),
        "add_eos_token": boolean(False),
        "add_space_prefix": boolean(dummy_prefix),
    }
    if model.unk_id() >= 0:
        keys["unknown_token_id"] = u32(model.unk_id())
    return keys


def read_chat_template(files: Mapping[str, Path], template: Path | None) -> str | None:
    """The chat template's text: its own file, or the key of tokenizer_config.json."""
    if template is not None and template.suffix == ".jinja":
        return read_whole(template, _MAX_BYTES, TokenizerError)
    path = template or files.get("tokenizer_config.json")
    if path is None:
        return None
    raw = _read(path)
    value = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(value, list):  # named templates: [{"name": ..., "template": ...}]
        templates = [t for t in value if isinstance(t, dict)]
        default = [t.get("template") for t in templates if t.get("name") == "default"]
        if len(default) != 1:
            raise TokenizerError(
                f"{path} has {len(value)} named chat templates, {len(default)} of them 'default'",
                "put the one to use into chat_template.jinja",
            )
        value = default[0]
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template is a {type(value).__name__}")
    return value


def _read(path: Path) -> Any:
    return read_json(path, _MAX_BYTES, TokenizerError)
