"""What embedding the engine needs: NumPy, Jinja and libggml, whoever brings the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimo_edge import export_bundle
from mimo_edge.bundle import Bundle
from mimo_edge.errors import TokenizerError
from mimo_edge.model_source import open_tokenizer
from mimo_edge.nano.commands import answer, calibration_text, checkpoint_dir, held_out
from mimo_edge.runtimes.ggml import library
from mimo_edge.tokenizer import Tokenizer

ABSENT = (
    "llama_cpp", "onnx", "onnxruntime", "gguf", "tokenizers", "sentencepiece", "typer", "rich",
    "torch", "llguidance",
)  # fmt: skip
ASK = """
import json
import mimo_edge as me
from mimo_edge.nano.commands import DEMO_TEXTS, DEMO_TOOLS
with me.Runtime.open({bundle!r}, threads=1) as runtime:
    session = runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
    reply = session.generate(DEMO_TEXTS[1], max_tokens=64, temperature=0)
    import sys
    from mimo_edge.runtimes.ggml.bindings import bindings
    loaded = sorted(name for name, module in sys.modules.items() if module is not None)
    print(json.dumps([list(reply.token_ids), str(bindings().cpu_path), loaded]))
"""
# An entry of None is what Python takes for a package that is not there.
BLOCK = "import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "bundle"
    export_bundle("mimo-nano", folder)
    return folder


def ask(code: str, more_path: Path | None = None) -> Any:
    env = dict(os.environ)
    if more_path is not None:
        env["PYTHONPATH"] = str(more_path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_engine_runs_without_the_other_packages(nano: Path, tmp_path: Path) -> None:
    """libggml comes from a package as a device kit has it; the answer is the same."""
    lib = tmp_path / "mimo_edge_libggml" / "lib"
    lib.mkdir(parents=True)
    (lib.parent / "__init__.py").touch()
    for path in library.library_folder().iterdir():
        if "ggml" in path.name or "gomp" in path.name:
            shutil.copy(path, lib)
    want, _, _ = ask(ASK.format(bundle=str(nano)))
    tokens, path, modules = ask(
        BLOCK.format(absent=ABSENT) + ASK.format(bundle=str(nano)), tmp_path
    )
    assert Path(path).parent == lib.resolve()
    assert tokens == want
    assert not {"asyncio", "mimo_edge.export.pipeline", *ABSENT} & set(modules)


def test_the_metadata_give_the_ids_of_the_file(nano: Path) -> None:
    with Bundle.open(nano) as bundle:
        plain = Tokenizer.from_gguf(bundle.metadata)
        assert bundle.tokenizer_path is not None
        library_one = open_tokenizer(bundle.tokenizer_path)
    records = held_out()
    texts = [record["text"] for record in records] + [answer(record) for record in records]
    for text in [*texts, *calibration_text().splitlines()]:
        ids = library_one.encode(text, allow_special=True)
        assert plain.encode(text, allow_special=True) == ids, text
        assert plain.decode(ids) == library_one.decode(ids)
    assert plain.special == library_one.special
    assert plain.eos_ids == library_one.eos_ids


def test_a_file_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="package tokenizers, which is not installed"):
        open_tokenizer(checkpoint_dir() / "tokenizer.json")
