"""Recipes: which format, why, and never a fallback that is not said."""

from __future__ import annotations

import json

import gguf
import pytest

from mimo_edge.errors import ConfigError, QuantError, UsageError
from mimo_edge.quant.base import FORMATS, get_format
from mimo_edge.quant.recipe import FALLBACKS, Recipe, recipe_names
from mimo_edge.quant.roles import UNQUANTISED, Role

MATRICES = [role for role in Role if role not in UNQUANTISED]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_keeps_what_must_stay_f32(name: str) -> None:
    recipe = Recipe.named(name)
    for role in UNQUANTISED:
        choice = recipe.format_for(role, 7)
        assert choice.format.name == "F32"
        assert not choice.fallback


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_takes_every_width(name: str) -> None:
    """Widths of the real models, of tiny ones, and odd ones: always a format that fits."""
    for family in ("mimo_v2", "mimo"):
        recipe = Recipe.named(name, family=family)
        for role in Role:
            for cols in (4096, 8192, 2048, 16384, 11008, 256, 96, 64, 32, 33, 1):
                choice = recipe.format_for(role, cols)
                assert choice.format.supports(cols)
                assert choice.fallback == (choice.format.name != choice.wanted)
                if choice.fallback:
                    assert choice.wanted in choice.reason
                    assert choice.format.name in choice.reason
                    assert str(cols) in choice.reason


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_recipes_apply_to_every_matrix(name: str) -> None:
    recipe = Recipe.named(name)
    assert {recipe.formats[role] for role in MATRICES} == {name.upper()}


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "mxfp4", "q3_k", "q2_k", "iq4_nl", "Q4_K"])
def test_quantised_recipes_keep_8_bits_outside_the_experts(name: str) -> None:
    formats = Recipe.named(name).formats
    assert formats[Role.EXPERT] == name.upper()
    assert formats[Role.HEAD] == "Q6_K"
    for role in (Role.ATTENTION, Role.DENSE_FFN, Role.MTP, Role.EMBEDDING):
        assert formats[role] == "Q8_0"


def test_q8_0_is_q8_0_throughout() -> None:
    formats = Recipe.named("q8_0").formats
    assert {formats[role] for role in MATRICES} == {"Q8_0"}


def test_the_dense_family_puts_its_bulk_in_the_format() -> None:
    formats = Recipe.named("q4_0", family="mimo").formats
    assert formats[Role.ATTENTION] == formats[Role.DENSE_FFN] == "Q4_0"
    assert formats[Role.MTP] == formats[Role.EMBEDDING] == "Q8_0"


def test_fallbacks_end_and_lose_no_bits() -> None:
    for name in FORMATS:
        seen = [name]
        while seen[-1] in FALLBACKS:
            seen.append(FALLBACKS[seen[-1]])
            assert FORMATS[seen[-1]].block_size < FORMATS[seen[-2]].block_size or (
                FORMATS[seen[-1]].name == "F16"
            )
            assert FORMATS[seen[-1]].bits_per_weight >= FORMATS[seen[-2]].bits_per_weight
        assert FORMATS[seen[-1]].block_size == 1


def test_a_fallback_names_the_numbers() -> None:
    choice = Recipe.named("q4_k").format_for(Role.EXPERT, 96)
    assert (choice.format.name, choice.wanted, choice.fallback) == ("IQ4_NL", "Q4_K", True)
    assert "Q4_K needs a multiple of 256 columns and there are 96: IQ4_NL" in choice.reason
    head = Recipe.named("q4_0").format_for(Role.HEAD, 64)
    assert (head.format.name, head.fallback) == ("Q8_0", True)
    odd = Recipe.named("q4_0").format_for(Role.EXPERT, 33)
    assert (odd.format.name, odd.fallback) == ("F16", True)


def test_unknown_names_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"'q7'.*q4_0"):
        Recipe.named("q7")
    with pytest.raises(UsageError, match=r"override of 'blk\.\*' to the unknown format 'Q9'"):
        Recipe.named("q4_0").with_overrides([("blk.*", "Q9")])


def test_overrides_by_glob_first_match_wins() -> None:
    recipe = Recipe.named("q4_0").with_overrides(
        [("blk.0.*_exps.weight", "q8_0"), ("blk.?.ffn_down_exps.weight", "q6_k")]
    )
    down0 = recipe.format_for(Role.EXPERT, 512, "blk.0.ffn_down_exps.weight")
    assert down0.format.name == "Q8_0"
    assert down0.reason == "override blk.0.*_exps.weight=Q8_0"
    assert recipe.format_for(Role.EXPERT, 512, "blk.1.ffn_down_exps.weight").format.name == "Q6_K"
    assert recipe.format_for(Role.EXPERT, 512, "blk.1.ffn_up_exps.weight").format.name == "Q4_0"
    assert recipe.format_for(Role.EXPERT, 512).format.name == "Q4_0"
    narrow = recipe.format_for(Role.EXPERT, 32, "blk.1.ffn_down_exps.weight")
    assert (narrow.format.name, narrow.wanted, narrow.fallback) == ("Q8_0", "Q6_K", True)


def test_later_overrides_win_over_earlier_calls() -> None:
    recipe = Recipe.named("q4_0").with_overrides([("a", "q8_0")]).with_overrides([("a", "f16")])
    assert recipe.format_for(Role.EXPERT, 256, "a").format.name == "F16"


def test_overrides_cannot_quantise_what_must_stay_f32() -> None:
    recipe = Recipe.named("q4_0").with_overrides([("blk.0.*", "q8_0"), ("output_norm.*", "f32")])
    assert recipe.format_for(Role.NORM, 64, "blk.0.attn_norm.weight").format.name == "F32"
    assert recipe.format_for(Role.NORM, 64, "output_norm.weight").format.name == "F32"
    exact = Recipe.named("q4_0").with_overrides([("blk.0.attn_norm.weight", "q8_0")])
    with pytest.raises(UsageError, match=r"blk\.0\.attn_norm\.weight \(norm\) must stay F32"):
        exact.format_for(Role.NORM, 64, "blk.0.attn_norm.weight")


def test_overrides_that_match_nothing_are_found() -> None:
    recipe = Recipe.named("q4_0").with_overrides([("blk.9.*", "q8_0"), ("blk.0.*", "q8_0")])
    assert recipe.unused_overrides(["blk.0.attn_q.weight"]) == ["blk.9.*"]


def test_importance_requirement_and_file_type() -> None:
    assert Recipe.named("iq2_xxs").requires_importance
    assert not Recipe.named("q4_k").requires_importance
    assert Recipe.named("q4_k").with_overrides([("x", "iq2_xxs")]).requires_importance
    for name in recipe_names():
        # general.file_type: the values of llama.h through gguf-py.
        kind = Recipe.named(name).file_type
        label = gguf.LlamaFileType(kind).name
        assert get_format(name).name in label.replace("ALL_F32", "F32")


@pytest.mark.parametrize("name", recipe_names())
def test_json_round_trip(name: str) -> None:
    recipe = Recipe.named(name).with_overrides([("blk.*.ffn_down*", "q8_0")])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_malformed_json_is_an_error() -> None:
    good = Recipe.named("q4_0").to_dict()
    formats = good["formats"]
    for change, error in (
        ({"name": None, "formats": None}, ConfigError),
        ({"formats": {}}, ConfigError),
        ({"formats": formats | {"nonsense": "F32"}}, ConfigError),
        ({"formats": formats | {"norm": "Q8_0"}}, ConfigError),
        ({"formats": formats | {"expert": "Q99"}}, QuantError),
        ({"overrides": [["a"]]}, ConfigError),
        ({"overrides": None}, ConfigError),
        ({"extra": 1}, ConfigError),
    ):
        with pytest.raises(error):
            Recipe.from_dict(good | change)
    with pytest.raises(ConfigError, match="bulk"):
        Recipe.from_dict({k: v for k, v in good.items() if k != "bulk"})
