"""Where a checkpoint is: a local folder, or a Hugging Face Hub id to be downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from mimo_edge.errors import BackendError, CheckpointError

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)

# What a text model needs: nothing from sub-folders (the audio tokenizer), no remote code.
_ALLOW = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")
_IGNORE = ("*/*",)


def resolve(source: str | Path) -> Path:
    """Folder of a checkpoint given as a local path or as "owner/name" or "owner/name@revision".

    A folder that exists always wins; only something that looks like a Hub id is downloaded (or
    taken from the Hub cache). Raises BackendError when huggingface_hub is not installed and
    CheckpointError when there is neither a folder nor a download.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file", "give the checkpoint's folder")
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        raise CheckpointError(
            f"no folder {source}", "give a checkpoint folder or a Hub id such as owner/name"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise BackendError(
            f"{source} is no local folder, and downloading it needs huggingface_hub",
            "pip install 'mimo-edge[hub]'",
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=list(_ALLOW),
            ignore_patterns=list(_IGNORE),
        )
    except Exception as error:  # the client raises HTTP, OS, validation and its own errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no folder {source}, and downloading it from the Hub failed: {reason[0]}",
            "check the path, or the Hub id and the network",
        ) from error
    return Path(folder)
