"""Text to token ids and back: tokenizer.json, SentencePiece, or GGUF metadata alone.

Whatever the source, special tokens are cut out here, by name, and only when asked: the
text between them goes to the model's encoder, which never sees a special token. So text
from a user cannot become `<|im_end|>`, whatever it spells.
"""

from __future__ import annotations

import codecs
import importlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mimo_edge.bpe import SYMBOL_BYTES, BytePairEncoder, token_bytes
from mimo_edge.errors import TokenizerError
from mimo_edge.sampling import Mask

# Generation stops on both whatever a config names (spec section 1.3).
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
_MAX_FILE_BYTES = 256 << 20


class Encoder(Protocol):
    """Encodes text that holds no special token; `first` marks the start of the input."""

    def encode(self, text: str, first: bool) -> list[int]: ...


class Tokenizer:
    """A vocabulary, its special tokens and an encoder for the text between them.

    `pieces` gives the bytes of every id that text can become; `special` the added tokens
    by text; `control` those among them that are markup and never shown (by id once made).
    """

    def __init__(
        self,
        encoder: Encoder,
        pieces: Mapping[int, bytes],
        special: Mapping[str, int],
        control: Iterable[str],
        *,
        normalize_nfc: bool = True,
        eos_ids: Iterable[int] = (),
        strip_first_space: bool = False,
    ) -> None:
        self._encoder = encoder
        self._pieces = dict(pieces)
        self.special = dict(special)
        self._pieces.update({id_: text.encode() for text, id_ in special.items()})
        self.control = frozenset(self.special[text] for text in control)
        self._nfc = normalize_nfc
        self._strip_first_space = strip_first_space
        by_length = sorted(self.special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, by_length))) if by_length else None
        named = {self.special[text] for text in EOS_TOKENS if text in self.special}
        self.eos_ids = frozenset(named | {id_ for id_ in eos_ids if id_ in self._pieces})

    # --- sources ------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json` (through the tokenizers library). Raises TokenizerError."""
        data = _read(Path(path))
        try:
            raw = json.loads(data)
            added = raw.pop("added_tokens", None) or []
            model_vocab = raw["model"]["vocab"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TokenizerError(f"{path} is not a tokenizer.json: {error!r}") from error
        if raw["model"].get("type", "BPE") != "BPE" or not isinstance(model_vocab, dict):
            raise TokenizerError(
                f"{path}: model {raw['model'].get('type')!r}, only BPE is supported"
            )
        if not _is_byte_level(raw):
            raise TokenizerError(f"{path} is not a byte-level tokenizer")
        special, control = _added_tokens(added, path)
        # A post-processor only adds tokens around the text: MiMo has none to add.
        raw["post_processor"] = raw["truncation"] = raw["padding"] = None
        try:
            encoder = _LibraryEncoder(json.dumps(raw))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: {error}") from error
        pieces = {
            id_: token_bytes(token) for token, id_ in model_vocab.items() if token not in special
        }
        # The library applies the normalizer of the file itself.
        return cls(encoder, pieces, special, control, normalize_nfc=False)

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> Tokenizer:
        """Read a SentencePiece `.model`. Raises TokenizerError."""
        data = _read(Path(path))
        encoder = _SentencePieceEncoder(data, str(path))
        return cls(
            encoder,
            encoder.pieces,
            encoder.special,
            encoder.control,
            normalize_nfc=False,
            eos_ids=encoder.eos_ids,
            strip_first_space=encoder.dummy_prefix,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF `tokenizer.ggml.*` values; needs no tokenizer library.

        Raises TokenizerError when they are missing, inconsistent or of another kind.
        """

        def value(key: str) -> Any:
            try:
                return metadata[f"tokenizer.ggml.{key}"]
            except KeyError:
                raise TokenizerError(f"the GGUF has no tokenizer.ggml.{key}") from None

        model, pre = value("model"), metadata.get("tokenizer.ggml.pre", "qwen2")
        if model != "gpt2":
            raise TokenizerError(
                f"GGUF tokenizer model {model!r} is not supported, only gpt2 (byte-level BPE)",
                "put the tokenizer.json of the model beside the file",
            )
        if pre not in ("qwen2", "mimo2"):
            raise TokenizerError(f"GGUF pre-tokenizer {pre!r} is not supported, only qwen2")
        tokens, types = list(value("tokens")), [int(t) for t in value("token_type")]
        if len(types) != len(tokens):
            raise TokenizerError(f"{len(tokens)} tokens but {len(types)} token types")
        merges = []
        for merge in value("merges"):
            left, found, right = merge.partition(" ")
            if not found or not left or not right or " " in right:
                raise TokenizerError(f"merge {merge!r} is not two tokens")
            merges.append((left, right))
        ids: dict[str, int] = {}
        special: dict[str, int] = {}
        for id_, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == _UNUSED:
                continue
            if kind not in (_NORMAL, _CONTROL, _USER_DEFINED):
                raise TokenizerError(f"token {id_} {token!r} has type {kind}, unknown to gpt2")
            table = ids if kind == _NORMAL else special
            if table.setdefault(token, id_) != id_:
                raise TokenizerError(f"token {token!r} has two ids, {table[token]} and {id_}")
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        return cls(
            _PlainEncoder(BytePairEncoder(ids, merges)),
            {id_: token_bytes(token) for token, id_ in ids.items()},
            special,
            [text for text, id_ in special.items() if types[id_] == _CONTROL],
            eos_ids=() if eos is None else (int(eos),),
        )

    # --- use ----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """One more than the highest id text can become."""
        return max(self._pieces) + 1

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Without `allow_special` no special token can come out.

        Raises TokenizerError on text that is not valid Unicode (a lone surrogate).
        """
        check_unicode(text)
        if not allow_special:
            return self._encode_plain(text, True)
        return self.encode_parts(self.split_special(text))

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of parts as `split_special` gives them: text becomes plain ids, ids stay."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                ids += self._encode_plain(part, index == 0)
            else:
                ids.append(part)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cut `text` at special tokens: the text between them, and the ids of the tokens."""
        parts: list[str | int] = []
        at = 0
        for match in self._cut.finditer(text) if self._cut is not None else ():
            if match.start() > at:
                parts.append(text[at : match.start()])
            parts.append(self.special[match[0]])
            at = match.end()
        return [*parts, text[at:]] if at < len(text) else parts

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, padding ids nothing.

        `skip_control` leaves markup such as `<|im_end|>` out.
        """
        decoder = self.stream_decoder(skip_control=skip_control)
        return decoder.feed(ids) + decoder.finish()

    def stream_decoder(self, *, skip_control: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive a few at a time."""
        return StreamDecoder(
            self._pieces, self.control if skip_control else frozenset(), self._strip_first_space
        )

    def token_bytes(self, id_: int) -> bytes:
        """Bytes of one id, empty for padding."""
        return self._pieces.get(id_, b"")

    def padding_mask(self, vocab_size: int) -> Mask:
        """bool [V]: ids of a model's vocabulary that stand for nothing and are never sampled.

        Raises TokenizerError when the tokenizer is larger than the model.
        """
        if self.size > vocab_size:
            raise TokenizerError(
                f"the tokenizer has ids up to {self.size - 1}, the model only {vocab_size}",
                "the tokenizer belongs to another model",
            )
        mask = np.ones(vocab_size, dtype=np.bool_)
        mask[list(self._pieces)] = False
        return mask

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        return self._encoder.encode(
            unicodedata.normalize("NFC", text) if self._nfc else text, first
        )


class StreamDecoder:
    """Ids to text as they come, holding back bytes of an unfinished character."""

    def __init__(
        self, pieces: Mapping[int, bytes], skip: frozenset[int], strip_first_space: bool
    ) -> None:
        self._pieces = pieces
        self._skip = skip
        self._strip = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Text that became certain with these ids."""
        data = b"".join(self._pieces.get(id_, b"") for id_ in ids if id_ not in self._skip)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def check_unicode(text: str) -> None:
    """Raises TokenizerError when `text` cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is half of a surrogate pair and no character",
            "the input was not valid UTF-8",
        ) from None


# --- encoders ---------------------------------------------------------------------------

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF token types


class _PlainEncoder:
    def __init__(self, bpe: BytePairEncoder) -> None:
        self._bpe = bpe

    def encode(self, text: str, first: bool) -> list[int]:
        return self._bpe.encode(text)


class _LibraryEncoder:
    """The tokenizers library on a tokenizer.json from which the added tokens were removed."""

    def __init__(self, definition: str) -> None:
        self._library = _library("tokenizers").Tokenizer.from_str(definition)

    def encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids


class _SentencePieceEncoder:
    """SentencePiece on plain text; only the start of the input gets the model's dummy prefix."""

    def __init__(self, data: bytes, path: str) -> None:
        processor = _library("sentencepiece").SentencePieceProcessor
        pieces, self.dummy_prefix = _read_sentencepiece(data, path)
        try:
            self._start = processor(model_proto=data)
            # Protobuf messages merge when concatenated: this appends to normalizer_spec (3)
            # add_dummy_prefix (3) = false and remove_extra_whitespaces (4) = false.
            inner = b"\x1a\x04\x18\x00\x20\x00"
            self._inner = processor(model_proto=data + inner)
        except Exception as error:  # the library raises RuntimeError and others
            raise TokenizerError(f"{path}: {error}") from error
        self.pieces: dict[int, bytes] = {}
        self.special: dict[str, int] = {}
        self.control: list[str] = []
        for id_, (text, kind) in enumerate(pieces):
            if kind in (_CONTROL, _USER_DEFINED):
                self.special[text] = id_
                if kind == _CONTROL:
                    self.control.append(text)
            elif kind == 6:  # BYTE, written <0xNN>
                self.pieces[id_] = bytes([int(text[3:5], 16)])
            elif kind == 2:  # UNKNOWN
                self.pieces[id_] = "\N{REPLACEMENT CHARACTER}".encode()
            elif kind == _NORMAL:
                self.pieces[id_] = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        self._forbidden = frozenset(self.special.values())
        eos = self._start.eos_id()
        self.eos_ids = (eos,) if eos >= 0 else ()

    def encode(self, text: str, first: bool) -> list[int]:
        encoder = self._start if first else self._inner
        ids: list[int] = encoder.encode(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        # SentencePiece matches user-defined symbols in any text; cutting each after its first
        # character leaves plain pieces only.
        parts = re.split(
            "|".join(
                f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in self.special if s[1:]
            ),
            text,
        )
        ids = []
        for part in parts:
            ids += (encoder if not ids else self._inner).encode(part)
        if not self._forbidden.isdisjoint(ids):
            raise TokenizerError("the text holds a one-character special token of the vocabulary")
        return ids


# --- reading ----------------------------------------------------------------------------


def _library(name: str) -> Any:
    """A tokenizer library. Raises TokenizerError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TokenizerError(
            f"this tokenizer file is read by the package {name}, which is not installed ({error})",
            f"pip install {name}; a bundle with a byte-level tokenizer works without it",
        ) from error


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {size} bytes, more than any tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from error


def _is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Whether the vocabulary is written in GPT-2's byte symbols."""
    vocab = raw["model"]["vocab"]
    return all(symbol in vocab for symbol in SYMBOL_BYTES)


def _added_tokens(added: Any, path: str | Path) -> tuple[dict[str, int], list[str]]:
    """(id by text, control texts) of a tokenizer.json's added tokens."""
    special: dict[str, int] = {}
    control = []
    for token in added:
        try:
            text, id_ = token["content"], token["id"]
        except (KeyError, TypeError):
            raise TokenizerError(f"{path}: added token {token!r} lacks content or id") from None
        if (
            not isinstance(text, str)
            or not text
            or isinstance(id_, bool)
            or not isinstance(id_, int)
        ):
            raise TokenizerError(f"{path}: added token {token!r} is malformed")
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise TokenizerError(f"{path}: added token {text!r} strips its surroundings")
        if special.setdefault(text, id_) != id_:
            raise TokenizerError(f"{path}: added token {text!r} has two ids")
        if token.get("special"):
            control.append(text)
    return special, control


def _read_sentencepiece(data: bytes, path: str) -> tuple[list[tuple[str, int]], bool]:
    """(text, type) of every piece and whether a dummy prefix is added, from a ModelProto.

    The library does not tell user-defined symbols from normal pieces; the file does.
    Source: google/sentencepiece:src/sentencepiece_model.proto.
    """
    pieces: list[tuple[str, int]] = []
    dummy_prefix = True
    try:
        for field, value in _protobuf(data):
            if field == 1 and isinstance(value, bytes):
                content = dict(_protobuf(value))
                text, kind = content[1], content.get(3, _NORMAL)
                if not isinstance(text, bytes) or not isinstance(kind, int):
                    raise ValueError("piece")
                pieces.append((text.decode(), kind))
            elif field == 3 and isinstance(value, bytes):
                dummy_prefix = bool(dict(_protobuf(value)).get(3, dummy_prefix))
    except (ValueError, KeyError, IndexError) as error:
        raise TokenizerError(f"{path} is not a SentencePiece model: {error!r}") from error
    if not pieces:
        raise TokenizerError(f"{path} holds no pieces")
    return pieces, dummy_prefix


def _protobuf(data: bytes) -> Iterable[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: varints as int, the rest as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("varint too long")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError(f"wire type {kind}")
            size = varint()
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size
