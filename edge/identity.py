"""Which weights a model has: a name for them that two devices agree on.

What was computed with one set of weights means nothing with another. A bundle's manifest holds the
checksum of every byte, so its hash names them. A bare GGUF file or a checkpoint has no checksums
and may have hundreds of gigabytes: of those the sizes, the headers and samples all over the files
are hashed, which tells apart everything but files altered on purpose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError
from mimo_edge.manifest import Manifest
from mimo_edge.tokenizer import Tokenizer

_HEADER_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def manifest_identity(manifest: Manifest) -> str:
    """The identity of a bundle, hex."""
    return hashlib.sha256(manifest.to_bytes()).hexdigest()


def files_identity(config: MimoConfig, files: Iterable[Path]) -> str:
    """The identity of weights in `files`, given in an order of their own, hex. Raises BundleError
    when one cannot be read."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path in files:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(size.to_bytes(8, "little"))
                file.seek(0)
                digest.update(file.read(_HEADER_BYTES))
                for number in range(_SAMPLES):
                    file.seek(size * number // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def vocabulary_identity(tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """What token ids mean: equal for models whose ids stand for the same bytes, hex."""
    digest = hashlib.sha256(vocab_size.to_bytes(8, "little"))
    if tokenizer is not None:
        for token in range(tokenizer.size):
            piece = tokenizer.token_bytes(token)
            digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()
