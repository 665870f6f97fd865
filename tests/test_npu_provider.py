"""Choosing an execution provider, by name, library or itself; and that nothing runs elsewhere."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx_models import make_bundle

from mimo_edge.api import Runtime
from mimo_edge.cli.options import provider
from mimo_edge.devices.profile import load_profile
from mimo_edge.errors import ProviderError, UsageError
from mimo_edge.provider_request import ProviderRequest
from mimo_edge.runtimes.onnx import plugin, qnn
from mimo_edge.runtimes.onnx.plugin import Plugin
from mimo_edge.runtimes.onnx.providers import OnCpu, OnNpu, choose, open_chosen
from mimo_edge.runtimes.onnx.qnn_targets import target


@pytest.mark.parametrize(
    ("system", "machine", "libc", "reason"),
    [
        ("Linux", "x86_64", ("glibc", "2.36"), r"not installed.*mimo-edge\[npu\]"),
        ("Linux", "x86_64", ("glibc", "2.31"), "needs glibc 2.35, this system has 2.31"),
        ("Linux", "aarch64", ("glibc", "2.34"), "not installed"),
        ("Linux", "aarch64", ("", ""), "musl"),
        ("Linux", "riscv64", ("glibc", "2.40"), "no build we use for Linux riscv64"),
        ("Darwin", "arm64", ("", ""), "no build we use for Darwin arm64"),
    ],
)
def test_a_missing_provider_says_why(
    system: str,
    machine: str,
    libc: tuple[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(ProviderError, match=reason):
        choose(ProviderRequest("qnn"), ["v73"])
    with pytest.raises(ProviderError, match=reason):
        qnn.Qnn().open_session(b"", None)
    automatic = choose(ProviderRequest(), ["v73"])
    assert isinstance(automatic, OnCpu)
    assert re.search(reason, automatic.reason)


def test_a_library_of_the_device_s_own_takes_the_place_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    library = tmp_path / "libonnxruntime_providers_qnn.so"
    options = {"vtcm_mb": "4", "htp_arch": "75"}
    found = choose(ProviderRequest("qnn:v73", library, options), ["v73", "v79"])
    assert isinstance(found, OnNpu)
    assert found.target == "v73"
    plugin = found.qnn.plugin(target("v73"))
    assert (plugin.name, plugin.library) == (qnn.PROVIDER, library)
    assert plugin.options["backend_path"] == str(tmp_path / "libQnnHtp.so")
    assert plugin.options["soc_model"] == "43"
    assert plugin.options["htp_arch"] == "75"  # what was asked for wins
    with pytest.raises(ProviderError, match="there is no file"):
        found.qnn.open_session(b"", target("v73"))


@pytest.mark.parametrize(
    ("ep", "library", "options", "message"),
    [
        ("", None, {}, "execution provider ''"),
        ("npu", None, {}, "give its --ep-library"),
        ("qnn:", None, {}, "execution provider 'qnn:'"),
        ("cpu:v73", None, {}, "execution provider 'cpu:v73'"),
        ("auto", Path("x.so"), {}, "a library .* without one"),
        ("cpu", None, {"a": "b"}, "options .* without one"),
    ],
)
def test_requests_that_mean_nothing(
    ep: str, library: Path | None, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ProviderRequest(ep, library, options)


@pytest.mark.parametrize(
    ("compiled", "targets", "emulated", "found"),
    [
        ([], (), False, "the bundle has no graphs for an NPU"),
        (["v73"], (), True, "the only NPU here is an emulator"),
        (["v73"], (), False, None),  # the only one: which is not found out by loading it only
        (["v73", "v79"], (), False, "no device profile says which"),
        (["v73", "v79"], ("sm8750", "v79"), False, "v79"),
        (["sa8255"], ("sm8750", "v79"), False, "graphs for sa8255, the device profile names"),
    ],
)
def test_auto_takes_the_device_s_npu_or_says_why_not(
    compiled: list[str],
    targets: tuple[str, ...],
    emulated: bool,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qnn, "why_unavailable", lambda: "")
    monkeypatch.setattr(qnn, "emulated", lambda: emulated)
    request = ProviderRequest(targets=targets, profile_options={"htp_performance_mode": "burst"})
    choice = choose(request, compiled)
    if isinstance(choice, OnNpu):
        assert choice.target == found
        assert choice.qnn.options == {"htp_performance_mode": "burst"}
    else:
        assert isinstance(choice, OnCpu)
        assert found is not None
        assert found in choice.reason


def test_auto_gives_way_to_the_cpu_aloud_and_a_name_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(qnn, "why_unavailable", lambda: "")
    monkeypatch.setattr(qnn, "emulated", lambda: False)
    monkeypatch.setattr(qnn.Qnn, "plugin", lambda *_: None)

    def opened(choice: object) -> str:
        if isinstance(choice, OnCpu):
            return f"cpu: {choice.reason}"
        raise ProviderError("layers_00 is refused")

    assert open_chosen(ProviderRequest(), ["v73"], opened) == "cpu: layers_00 is refused"
    assert "the CPU runs this model" in caplog.text
    assert "layers_00 is refused" in caplog.text
    with pytest.raises(ProviderError, match="layers_00 is refused"):
        open_chosen(ProviderRequest("qnn"), ["v73"], opened)


def test_a_profile_names_the_npu_and_its_options() -> None:
    profile = load_profile("car-8255")
    request = ProviderRequest(
        "qnn",
        Path("libonnxruntime_providers_qnn.so"),
        {"vtcm_mb": "8"},
        profile_options=profile.npu_options,
        targets=profile.npu_targets,
    )
    found = choose(request, ["v68", "v73"])
    assert isinstance(found, OnNpu)
    assert found.target == "v73"
    mode = {"htp_performance_mode": "sustained_high_performance"}
    assert found.qnn.options == {**mode, "vtcm_mb": "8"}


def session(*parts: tuple[str, list[tuple[str, str]]]) -> Any:
    """A session whose nodes (name, operator) are assigned as given."""
    made = [
        SimpleNamespace(
            ep_name=ep,
            get_nodes=lambda nodes=nodes: [SimpleNamespace(name=n, op_type=o) for n, o in nodes],
        )
        for ep, nodes in parts
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: made)


PLUGIN = Plugin("SomeProvider", Path("some.so"))


def test_nodes_elsewhere_are_named() -> None:
    ours = ("SomeProvider", [("a", "MatMul")])
    assert PLUGIN.assert_assigned(session(ours)) == 1
    cpu = ("CPUExecutionProvider", [("L3.router.best", "TopK"), ("", "Cast")])
    with pytest.raises(ProviderError, match=r"not run L3\.router\.best \(TopK\), Cast \(Cast\)"):
        PLUGIN.assert_assigned(session(ours, cpu))
    many = ("CPUExecutionProvider", [(f"n{i}", "Add") for i in range(11)])
    with pytest.raises(ProviderError, match=r"n7 \(Add\) and 3 more"):
        PLUGIN.assert_assigned(session(ours, many))


def test_a_session_without_the_provider_is_an_error() -> None:
    """As when its library did not load: everything runs on the CPU, and nothing says so."""
    with pytest.raises(ProviderError, match="no node at all"):
        PLUGIN.assert_assigned(session())


class FakeRuntime:
    """ONNX Runtime with a library `library` whose provider calls itself `provider`. It refuses
    nodes when the CPU is forbidden, and logs why to standard error as a C++ library does."""

    def __init__(self, provider: str, devices: int) -> None:
        self.provider = provider
        self.devices = devices
        self.loaded: list[str] = []
        self.opened: list[dict[str, str]] = []

    def get_ep_devices(self) -> list[Any]:
        found = [SimpleNamespace(ep_name="CPUExecutionProvider")]
        if self.loaded:
            found += [SimpleNamespace(ep_name=self.provider)] * self.devices
        return found

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if not Path(path).read_bytes():
            raise RuntimeError("invalid ELF header")
        self.loaded.append(name)

    def unregister_execution_provider_library(self, name: str) -> None:
        self.loaded.remove(name)

    def SessionOptions(self) -> Any:
        entries: dict[str, str] = {}
        given: dict[str, str] = {}
        return SimpleNamespace(
            entries=entries,
            given=given,
            add_session_config_entry=entries.__setitem__,
            add_provider_for_devices=lambda devices, options: given.update(options),
        )

    def InferenceSession(self, model: object, options: Any) -> Any:
        self.opened.append(options.given)
        if options.entries.get("session.disable_cpu_ep_fallback"):
            raise RuntimeError("[ONNXRuntimeError] : fallback to CPU EP has been disabled")
        os.write(2, b"\tOperator type: Erf Node name: err Node index: 1\n\tREASON : no Erf here\n")
        return session((self.provider, [("m", "MatMul")]), ("CPU", [("err", "Erf"), ("x", "Add")]))


def test_a_plug_in_is_loaded_by_its_path_and_says_why_it_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "ep.so"
    library.write_bytes(b"\x7fELF")
    runtime = FakeRuntime("SomeProvider", 1)
    monkeypatch.setattr(plugin, "onnxruntime", lambda: runtime)
    made = Plugin("SomeProvider", library, {"device": "NPU"})
    refused = r"SomeProvider was asked for and does not run err \(Erf\): no Erf here, x \(Add\)"
    with pytest.raises(ProviderError, match=refused):
        made.session(b"model", runtime.SessionOptions())
    assert runtime.opened == [{"device": "NPU"}] * 2
    assert runtime.loaded == ["SomeProvider"]
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"


@pytest.mark.parametrize(
    ("content", "provider", "devices", "message"),
    [
        (None, "SomeProvider", 1, "there is no file"),
        (b"", "SomeProvider", 1, "does not load: invalid ELF header"),
        (b"x", "Another", 1, "is the provider Another, not SomeProvider"),
        (b"x", "SomeProvider", 0, "finds no device"),
    ],
)
def test_a_library_that_cannot_be_used(
    content: bytes | None,
    provider: str,
    devices: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    library = tmp_path / "ep.so"
    if content is not None:
        library.write_bytes(content)
    runtime = FakeRuntime(provider, devices)
    monkeypatch.setattr(plugin, "onnxruntime", lambda: runtime)
    with pytest.raises(ProviderError, match=message):
        Plugin("SomeProvider", library).session(b"model", runtime.SessionOptions())
    assert runtime.loaded == []


def test_a_file_that_is_no_library_is_an_error_for_the_real_onnxruntime(tmp_path: Path) -> None:
    library = tmp_path / "ep.so"
    library.write_bytes(b"not an ELF file")
    with pytest.raises(ProviderError, match="does not load"):
        Plugin("NoSuchProvider", library).devices()


def test_a_plug_in_that_does_not_load_ends_the_opening_of_a_model(tmp_path: Path) -> None:
    """Through the public call, and nothing runs on the CPU instead."""
    path, _ = make_bundle(tmp_path)
    library = tmp_path / "ep.so"
    library.write_bytes(b"not an ELF file")
    with pytest.raises(ProviderError, match=r"SomeProvider: .* does not load"):
        Runtime.open(path, backend="onnx", ep="SomeProvider", ep_library=library)
    with Runtime.open(path, backend="onnx", context=64) as runtime:
        found = runtime.stats()["provider"]
        assert found["provider"] == "CPUExecutionProvider"
        assert found["reason"] == "the bundle has no graphs for an NPU"
    with Runtime.open(path, backend="onnx", context=64, ep="cpu") as runtime:
        assert runtime.stats()["provider"]["reason"] == ""
    with pytest.raises(UsageError, match="no execution provider qnn"):
        Runtime.open(path, backend="ggml", ep="qnn")


def test_options_of_the_command_line() -> None:
    given = provider("qnn", Path("a.so"), ["x=1", "y=a=b"])
    want = {"ep": "qnn", "ep_library": "a.so", "ep_options": {"x": "1", "y": "a=b"}}
    assert given == want
    for wrong in ("x", "=1"):
        with pytest.raises(UsageError, match="write KEY=VALUE"):
            provider("qnn", None, [wrong])
