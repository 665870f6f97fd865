"""Text and command quality against brute-force recomputation and hand-made answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_tokenizer
from tiny import random_weights, tiny_config

from mimo_edge import evaluate
from mimo_edge.cancel import Cancel
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.config import MimoConfig
from mimo_edge.errors import GenerationError, TokenizerError, UsageError
from mimo_edge.evaluate import (
    Tally,
    TextChunk,
    answer_chunks,
    evaluate_commands,
    evaluate_text,
    kl_divergence,
    same_calls,
    split_chunks,
)
from mimo_edge.nano import commands as nano
from mimo_edge.runtimes.base import F32, Cache, ForwardResult, TokenIds
from mimo_edge.runtimes.reference import ReferenceBackend, full_logits
from mimo_edge.runtimes.weights import DictWeights
from mimo_edge.tokenizer import Tokenizer


def brute_force(p_logits: F32, q_logits: F32, targets: list[int]) -> dict[str, float]:
    """The same numbers token by token in plain Python: no shared code, no vectorisation."""
    nll_p = nll_q = 0.0
    kls, same = [], 0
    for p_row, q_row, target in zip(p_logits.tolist(), q_logits.tolist(), targets, strict=True):
        p_norm = math.log(sum(math.exp(v) for v in p_row))
        q_norm = math.log(sum(math.exp(v) for v in q_row))
        nll_p -= p_row[target] - p_norm
        nll_q -= q_row[target] - q_norm
        kls.append(
            sum(
                math.exp(a - p_norm) * ((a - p_norm) - (b - q_norm))
                for a, b in zip(p_row, q_row, strict=True)
            )
        )
        same += p_row.index(max(p_row)) == q_row.index(max(q_row))
    n = len(targets)
    return {
        "source_perplexity": math.exp(nll_p / n),
        "perplexity": math.exp(nll_q / n),
        "mean_kl": sum(kls) / n,
        "kl_p99": float(np.quantile(kls, 0.99)),
        "top1_agreement": same / n,
    }


def disturbed(weights: DictWeights, config: MimoConfig, amount: float) -> DictWeights:
    """A second model near the first, as quantisation makes it."""
    rng = np.random.default_rng(5)
    names = [n for n in weights._tensors if n.endswith("_exps.weight") or n == "output.weight"]
    tensors = dict(weights._tensors)
    for name in names:
        noise = rng.standard_normal(tensors[name].shape, dtype=np.float32)
        tensors[name] = tensors[name] + amount * tensors[name].std() * noise
    return DictWeights(config, tensors)


@pytest.mark.parametrize("segment_rows", [1, 7, 512])
@pytest.mark.parametrize("scored_from", [0, 1, 2, 17, 39])
def test_text_quality_equals_brute_force(
    monkeypatch: pytest.MonkeyPatch, segment_rows: int, scored_from: int
) -> None:
    monkeypatch.setattr(evaluate, "_MAX_SEGMENT_ROWS", segment_rows)
    config = tiny_config(num_mtp_layers=0)
    source = random_weights(config, seed=1)
    candidate = disturbed(source, config, 0.2)
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (40, 23)]
    p_rows, q_rows, targets = [], [], []
    for ids in chunks:
        start = max(1, scored_from)
        p_rows.append(full_logits(source, ids)[start - 1 : -1])
        q_rows.append(full_logits(candidate, ids)[start - 1 : -1])
        targets += ids[start:].tolist()
    want = brute_force(np.concatenate(p_rows), np.concatenate(q_rows), targets)

    got = evaluate_text(
        ReferenceBackend(source),
        ReferenceBackend(candidate),
        [TextChunk(ids, scored_from) for ids in chunks],
    )
    assert got.tokens == len(targets)
    assert got.chunks == sum(len(ids) > max(1, scored_from) for ids in chunks)
    # f32 forward passes of different batch shapes differ near 1e-6 relative.
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=2e-5), name


def test_a_model_against_itself_loses_nothing() -> None:
    config = tiny_config(num_mtp_layers=0)
    weights = random_weights(config)
    chunk = TextChunk(np.arange(30, dtype=np.int32))
    got = evaluate_text(ReferenceBackend(weights), ReferenceBackend(weights), [chunk])
    assert got.mean_kl == got.kl_p99 == 0
    assert got.top1_agreement == 1
    assert got.perplexity == got.source_perplexity


def test_without_a_source_there_is_only_perplexity() -> None:
    config = tiny_config(num_mtp_layers=0)
    weights = random_weights(config)
    chunk = TextChunk(np.arange(30, dtype=np.int32))
    both = evaluate_text(ReferenceBackend(weights), ReferenceBackend(weights), [chunk])
    alone = evaluate_text(None, ReferenceBackend(weights), [chunk])
    assert alone.perplexity == both.perplexity
    assert alone.source_perplexity is alone.mean_kl is alone.kl_p99 is None
    assert alone.top1_agreement is None


def test_kl_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    want = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx([want], rel=1e-12)


def test_progress_counts_every_row_once() -> None:
    config = tiny_config(num_mtp_layers=0)
    seen: list[tuple[int, int]] = []
    chunks = [TextChunk(np.arange(20, dtype=np.int32)), TextChunk(np.arange(9, dtype=np.int32), 4)]
    evaluate_text(
        None,
        ReferenceBackend(random_weights(config)),
        chunks,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (19 + 5, 19 + 5)
    assert all(total == 24 for _, total in seen)


@dataclass
class TableBackend:
    """Logits looked up by the last token: broken values on purpose."""

    config: MimoConfig
    table: F32
    name: str = "table"

    def new_cache(self, context: int, verify_rows: int = 4) -> Cache:
        return None  # type: ignore[return-value]

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        return ForwardResult(self.table[token_ids[-logits_rows:]], np.zeros((0, 1), np.float32))

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        raise NotImplementedError

    def close(self) -> None:
        pass


def table_backend(vocab: int = 97) -> TableBackend:
    config = tiny_config(vocab_size=vocab)
    return TableBackend(config, np.zeros((vocab, vocab), np.float32))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    chunk = TextChunk(np.arange(50, dtype=np.int32))
    assert evaluate_text(None, table_backend(), [chunk]).perplexity == pytest.approx(97, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    backend = table_backend()
    backend.table[3, 5] = value
    with pytest.raises(GenerationError, match="candidate produced logits that are not finite"):
        evaluate_text(None, backend, [TextChunk(np.arange(9, dtype=np.int32))])


def test_a_perplexity_beyond_numbers_is_an_error() -> None:
    backend = table_backend()
    backend.table[:, 0] = 1e5  # sure of a token that never comes
    with pytest.raises(GenerationError, match="100000 nats per token"):
        evaluate_text(None, backend, [TextChunk(np.arange(1, 9, dtype=np.int32))])


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(UsageError, match="97 tokens, the candidate 96"):
        evaluate_text(
            table_backend(97), table_backend(96), [TextChunk(np.arange(9, dtype=np.int32))]
        )


@pytest.mark.parametrize("bad", [-1, 97])
def test_foreign_token_ids_are_refused(bad: int) -> None:
    ids = np.array([0, bad, 1], np.int32)
    with pytest.raises(UsageError, match="vocabulary of 97"):
        evaluate_text(None, table_backend(), [TextChunk(ids)])


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate_text(None, table_backend(), [TextChunk(np.arange(3, dtype=np.int32), 3)])


def test_split_chunks_covers_the_text() -> None:
    chunks = split_chunks(list(range(21)), 10)
    assert [c.token_ids.tolist() for c in chunks] == [list(range(10)), list(range(10, 20))]
    assert [len(c.token_ids) for c in split_chunks(list(range(22)), 10)] == [10, 10, 2]
    assert [len(c.token_ids) for c in split_chunks(list(range(22)), 10, max_tokens=13)] == [10, 3]
    for ids, size in (([], 10), ([1], 10), ([1, 2], 1)):
        with pytest.raises(UsageError):
            split_chunks(ids, size)


# --- commands --------------------------------------------------------------------------------


@dataclass
class FakeCall:
    name: str
    arguments: dict[str, Any]


WANT: dict[str, Any] = {"name": "set_timer", "arguments": {"duration": 5, "unit": "minutes"}}


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"duration": 5, "unit": "minutes"}, True),
        ({"unit": "minutes", "duration": 5}, True),
        ({"duration": "5", "unit": "minutes"}, False),
        ({"duration": 5, "unit": "Minutes"}, False),
        ({"duration": 5}, False),
        ({"duration": 5, "unit": "minutes", "label": "tea"}, False),
        ({"duration": 5, "unit": None}, False),
    ],
)
def test_a_call_is_right_only_when_everything_is(arguments: dict[str, Any], right: bool) -> None:
    assert same_calls([FakeCall("set_timer", arguments)], [WANT]) is right


def test_values_compare_as_json() -> None:
    def same(a: Any, b: Any) -> bool:
        return same_calls([FakeCall("f", {"x": a})], [{"name": "f", "arguments": {"x": b}}])

    assert same(True, True)
    assert same(1, 1.0)
    assert same([1, {"a": "b"}], [1, {"a": "b"}])
    assert same(None, None)
    assert not same(True, 1)
    assert not same(1, True)
    assert not same([1], [True])
    assert not same({"a": 1}, {"a": "1"})
    assert not same("", None)


def test_order_number_and_name_of_calls_matter() -> None:
    other = {"name": "call_contact", "arguments": {"contact": "mom"}}
    first = FakeCall("set_timer", dict(WANT["arguments"]))
    second = FakeCall("call_contact", {"contact": "mom"})
    assert same_calls([first, second], [WANT, other])
    assert not same_calls([second, first], [WANT, other])
    assert not same_calls([first], [WANT, other])
    assert not same_calls([first, second], [WANT])
    assert not same_calls([FakeCall("timer", first.arguments)], [WANT])
    assert same_calls([], [])
    assert not same_calls([first], [])


@dataclass
class FakeStats:
    tokens: int
    verifies: int
    drafted_by_depth: list[int]
    accepted_by_depth: list[int]


@dataclass
class FakeReply:
    tool_calls: list[FakeCall]
    text: str = ""
    finish_reason: str = "tool_calls"
    malformed: list[str] = field(default_factory=list)
    stats: FakeStats = field(default_factory=lambda: FakeStats(9, 4, [4, 4, 4], [3, 1, 0]))


class FakeRuntime:
    """Answers from a table and notes what it was asked with which tools."""

    def __init__(self, replies: dict[str, FakeReply]) -> None:
        self.replies = replies
        self.asked: list[tuple[str, list[str], int, float]] = []

    def session(self, *, tools: Sequence[Mapping[str, Any]], enable_thinking: bool) -> FakeSession:
        assert not enable_thinking
        return FakeSession(self, [tool["function"]["name"] for tool in tools])


@dataclass
class FakeSession:
    runtime: FakeRuntime
    tools: list[str]

    def generate(self, prompt: str, *, max_tokens: int, temperature: float) -> FakeReply:
        self.runtime.asked.append((prompt, self.tools, max_tokens, temperature))
        return self.runtime.replies[prompt]


TOOLS = {name: {"function": {"name": name}} for name in ("set_timer", "call_contact", "lock_door")}
TIMER = FakeCall("set_timer", {"duration": 5, "unit": "minutes"})
CALL = FakeCall("call_contact", {"contact": "mom"})


def a_command(text: str, *calls: FakeCall, lang: str = "en", domain: str = "phone") -> Any:
    return {
        "id": f"id of {text}",
        "text": text,
        "lang": lang,
        "domain": domain,
        "tools": ["lock_door", "set_timer"],
        "calls": [{"name": c.name, "arguments": c.arguments} for c in calls],
    }


def test_commands_are_asked_as_a_user_would_and_counted() -> None:
    wrong = FakeCall("set_timer", {"duration": 6, "unit": "minutes"})
    runtime = FakeRuntime(
        {
            "right": FakeReply([TIMER]),
            "two": FakeReply([TIMER, CALL], stats=FakeStats(30, 8, [8, 8], [7, 5])),
            "wrong": FakeReply([wrong], text="hm"),
            "no": FakeReply([], "Sorry", "stop"),
            "must not": FakeReply([TIMER]),
            "begun": FakeReply([], malformed=["<tool_call>"], stats=FakeStats(5, 0, [], [])),
            "endless": FakeReply([TIMER], finish_reason="length"),
        }
    )
    commands = [
        a_command("right", TIMER),
        a_command("two", TIMER, CALL, lang="zh"),
        a_command("wrong", TIMER, domain="home"),
        a_command("no"),
        a_command("must not", lang="zh"),
        a_command("begun"),
        a_command("endless", TIMER),
    ]
    seen: list[tuple[int, int]] = []
    got = evaluate_commands(
        runtime, commands, TOOLS, max_tokens=77, progress=lambda *at: seen.append(at)
    )
    assert runtime.asked[0] == ("right", ["lock_door", "set_timer"], 77, 0)
    assert got.total == Tally(7, 3)
    assert got.by_language == {"en": Tally(5, 2), "zh": Tally(2, 1)}
    assert got.by_domain == {"phone": Tally(6, 3), "home": Tally(1, 0)}
    assert got.by_kind == {"single": Tally(3, 1), "double": Tally(1, 1), "refusal": Tally(3, 1)}
    assert [f.text for f in got.failures] == ["wrong", "must not", "begun", "endless"]
    assert got.failures[0].got == [{"name": wrong.name, "arguments": wrong.arguments}]
    assert got.failures[0].want == commands[2]["calls"]
    assert got.failures[0].answer == "hm"
    assert (got.tokens, got.verifies) == (9 * 5 + 30 + 5, 4 * 5 + 8)
    assert got.drafted_by_depth == [28, 28, 20]
    assert got.accepted_by_depth == [22, 10, 0]
    # Seven first tokens came from prefill.
    assert got.tokens_per_verify == pytest.approx((80 - 7) / 28)
    assert got.acceptance_by_depth == pytest.approx([22 / 28, 10 / 28, 0])
    assert seen == [(i, 7) for i in range(1, 8)]


def test_the_report_is_json() -> None:
    runtime = FakeRuntime({"right": FakeReply([TIMER]), "no": FakeReply([TIMER])})
    got = evaluate_commands(runtime, [a_command("right", TIMER), a_command("no")], TOOLS)
    raw = json.loads(json.dumps(got.to_dict()))
    assert raw["exact_rate"] == 0.5
    assert raw["by_kind"]["refusal"] == {"commands": 1, "exact": 0, "rate": 0.0}
    assert raw["failures"][0]["id"] == "id of no"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "'text' is missing or no str"),
        ({"tools": ["unlock"]}, r"unknown tools \['unlock'\]"),
        ({"calls": [{"name": "set_timer"}]}, "malformed call"),
        ({"calls": ["set_timer"]}, "malformed call"),
    ],
)
def test_malformed_commands_are_refused(change: dict[str, Any], message: str) -> None:
    command = a_command("right", TIMER) | change
    with pytest.raises(UsageError, match=message):
        evaluate_commands(FakeRuntime({}), [command], TOOLS)
    with pytest.raises(UsageError, match="no commands"):
        evaluate_commands(FakeRuntime({}), [], TOOLS)


# --- right answers as text -------------------------------------------------------------------


def test_only_the_right_answer_is_scored(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer, template = Tokenizer.from_file(tmp_path / "tokenizer.json"), ChatTemplate()
    commands = [
        a_command("turn on the light", TIMER, CALL),
        a_command("你好") | {"reply": "Sorry."},
    ]
    chunks = answer_chunks(tokenizer, template, commands, TOOLS)
    prompts = [tokenizer.decode(c.token_ids[: c.scored_from].tolist()) for c in chunks]
    answers = [tokenizer.decode(c.token_ids[c.scored_from :].tolist()) for c in chunks]
    assert all(p.endswith("<|im_start|>assistant\n<think></think>") for p in prompts)
    assert "<name>lock_door</name>" in prompts[0]
    assert "turn on the light<|im_end|>" in prompts[0]
    assert answers[0] == (
        "<tool_call>\n<function=set_timer>\n<parameter=duration>5</parameter>\n"
        "<parameter=unit>minutes</parameter>\n</function>\n</tool_call>"
        "<tool_call>\n<function=call_contact>\n<parameter=contact>mom</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    assert answers[1] == "Sorry.<|im_end|>"
    assert [c.rows for c in chunks] == [len(c.token_ids) - c.scored_from for c in chunks]


def test_a_template_that_rewrites_its_prompt_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    template = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TokenizerError, match="answer of command id of hi"):
        answer_chunks(tokenizer, template, [a_command("hi")], TOOLS)


def test_nano_answers_are_written_as_in_training() -> None:
    """The built-in tokenizer and template give the text the model was trained on, exactly."""
    folder = nano.checkpoint_dir()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    template = ChatTemplate((folder / "chat_template.jinja").read_text("utf-8"))
    commands = nano.held_out()[::40]
    for command, chunk in zip(
        commands, answer_chunks(tokenizer, template, commands, nano.TOOLS), strict=True
    ):
        answer = tokenizer.decode(chunk.token_ids[chunk.scored_from :].tolist())
        assert answer == nano.answer(command) + "<|im_end|>"
