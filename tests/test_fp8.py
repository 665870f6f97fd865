"""FP8 e4m3fn: codes and rounding against torch, fused qkv against llama.cpp's converter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import CheckpointError, QuantError
from mimo_edge.export import fp8


def test_codes_follow_the_formula() -> None:
    assert fp8.E4M3FN[0x00] == 0
    assert fp8.E4M3FN[0x01] == 2.0**-9
    assert fp8.E4M3FN[0x07] == 7 * 2.0**-9
    assert fp8.E4M3FN[0x08] == 2.0**-6
    assert fp8.E4M3FN[0x38] == 1.0
    assert fp8.E4M3FN[0x7E] == 448.0
    assert np.array_equal(fp8.E4M3FN[0x80:0xFF], -fp8.E4M3FN[:0x7F])
    assert np.isnan(fp8.E4M3FN[[0x7F, 0xFF]]).all()
    assert np.isnan(fp8.E4M3FN).sum() == 2


@pytest.mark.oracle
def test_all_codes_equal_torch() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(fp8.decode(codes), theirs, equal_nan=True)
    signs = ~np.isnan(theirs)  # torch gives both NaN codes one sign
    assert np.array_equal(np.signbit(fp8.decode(codes))[signs], np.signbit(theirs)[signs])


@pytest.mark.oracle
def test_rounding_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    finite = np.sort(np.delete(fp8.E4M3FN, [0x7F, 0xFF]).astype(np.float64))
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)  # every tie
    around = [np.nextafter(middles, np.float32(s * np.inf)) for s in (1, -1)]
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(200_000) * np.exp(rng.uniform(-16, 6, 200_000))
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 2.0**-10, 463.99997, -463.99997])
    values = np.concatenate([finite, middles, *around, np.clip(spread, -463, 463), tiny])
    values = values.astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(fp8.encode(values), theirs)


@pytest.mark.parametrize("bad", [464.0, -464.0, 1e30, np.inf, -np.inf, np.nan])
def test_encoder_refuses_what_does_not_fit(bad: float) -> None:
    with pytest.raises(QuantError, match="e4m3fn"):
        fp8.encode(np.array([1.0, bad], dtype=np.float32))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    first=st.integers(0, 69),
)
def test_blocks_of_any_shape(
    rows: int, columns: int, block: tuple[int, int], seed: int, first: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns), dtype=np.float32)
    weight[rng.random((rows, columns)) < 0.1] = 0
    codes, scale = fp8.quantise(weight, block)
    assert scale.shape == (-(-rows // block[0]), -(-columns // block[1]))
    naive = np.empty_like(weight)
    for r in range(rows):
        for c in range(columns):
            naive[r, c] = fp8.E4M3FN[codes[r, c]] * scale[r // block[0], c // block[1]]
    whole = fp8.decode(codes)
    fp8.apply_scales(whole, scale, block)
    assert np.array_equal(whole, naive)
    first = min(first, rows - 1)  # a row range gets the same scales
    part = fp8.decode(codes[first:])
    fp8.apply_scales(part, scale, block, first)
    assert np.array_equal(part, naive[first:])
    # 3 mantissa bits: at most 1/16 of the value, or half a subnormal step of the block.
    bound = np.maximum(np.abs(weight) / 16, np.repeat(np.repeat(
        scale, block[0], 0), block[1], 1)[:rows, :columns] * 2.0**-10)  # fmt: skip
    assert (np.abs(naive - weight) <= bound * (1 + 1e-5)).all()


def test_zero_block_and_tiny_block() -> None:
    weight = np.zeros((4, 4), dtype=np.float32)
    weight[2:, 2:] = 1e-42  # a subnormal: absmax / 448 would be 0
    codes, scale = fp8.quantise(weight, (2, 2))
    assert scale[0, 0] == 1.0
    assert (scale > 0).all()
    fp8.check_scales(scale, "w")
    assert not codes[:2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 3e38])
def test_bad_scale_names_tensor_and_block(bad: float) -> None:
    scale = np.ones((3, 5), dtype=np.float32)
    scale[1, 4] = bad
    with pytest.raises(CheckpointError, match=r"blk\.w: scale of block \[1, 4\]"):
        fp8.check_scales(scale, "blk.w")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_code_names_the_place(code: int) -> None:
    codes = np.zeros((3, 5), dtype=np.uint8)
    codes[2, 3] = code
    with pytest.raises(CheckpointError, match=rf"w: element \[102, 3\].*0x{code:02X}"):
        fp8.check_codes(codes, "w", first_row=100)


# --- Fused qkv ----------------------------------------------------------------------------

# (query heads, kv heads, scale rows) at head dims 192/128 and 128-row blocks -> possible T.
REAL = [
    (64, 4, 108, [4]),  # V2.5 global layer
    (64, 8, 116, [1, 2, 4]),  # V2.5 sliding layer: cannot tell
    (64, 4, 106, [1, 2]),  # plain [Q | K | V] of the same size
    (128, 8, 216, [8]),  # Pro
    (64, 4, 107, []),
]


@pytest.mark.parametrize(("heads", "kv", "rows", "expected"), REAL)
def test_possible_shards_of_the_real_models(
    heads: int, kv: int, rows: int, expected: list[int]
) -> None:
    assert fp8.possible_shards(heads, kv, 192, 128, rows, 128) == expected


def test_agreement_on_the_shard_count() -> None:
    agree = fp8.agree_on_shards
    assert agree([("a", [4]), ("b", [2, 4])], None) == 4
    assert agree([("a", [1, 2])], 2) == 2
    assert agree([], 4) == 4
    with pytest.raises(CheckpointError, match="no tensor-parallel shard count explains"):
        agree([("a", [])], None)
    with pytest.raises(CheckpointError, match=r"b is stored in \[8\] shards.*\[4\]"):
        agree([("a", [4]), ("b", [8])], None)
    with pytest.raises(CheckpointError, match=r"shard counts \[1, 2\]"):
        agree([("a", [1, 2])], None)
    with pytest.raises(CheckpointError, match="no shard count"):
        agree([], None)
    with pytest.raises(CheckpointError, match="tp_size 8, but a is stored in 4 shards"):
        agree([("a", [4])], 8)


def tp_aware_qkv_dequant(
    weight: Any, scale_inv: Any, n_q: int, n_kv: int, hd: int, vhd: int, bs: int = 128
) -> Any:
    """The oracle: llama.cpp conversion/mimo.py MimoV2Model._tp_aware_qkv_dequant (MIT licence,
    the ggml authors), its arithmetic unchanged."""
    import torch

    q_size, k_size, v_size = n_q * hd, n_kv * hd, n_kv * vhd
    total_rows = q_size + k_size + v_size
    tp = None
    for cand in (8, 4):
        if total_rows % cand != 0:
            continue
        rpr = total_rows // cand
        bpr = (rpr + bs - 1) // bs
        if scale_inv.shape[0] == cand * bpr:
            tp = cand
            break
    assert tp is not None
    q_per, k_per, v_per = q_size // tp, k_size // tp, v_size // tp
    rows_per_rank = q_per + k_per + v_per
    blocks_per_rank = (rows_per_rank + bs - 1) // bs
    scale_inv = scale_inv.float()
    row_idx = torch.arange(total_rows)
    rr, rank = row_idx % rows_per_rank, row_idx // rows_per_rank
    scale_full = scale_inv[rank * blocks_per_rank + (rr // bs)].repeat_interleave(bs, dim=1)
    dequant = weight.float() * scale_full[:, : weight.shape[1]]
    qs, ks, vs = [], [], []
    for r in range(tp):
        base = r * rows_per_rank
        qs.append(dequant[base : base + q_per])
        ks.append(dequant[base + q_per : base + q_per + k_per])
        vs.append(dequant[base + q_per + k_per : base + rows_per_rank])
    return torch.cat(qs + ks + vs, dim=0)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("heads", "kv", "shards", "width"),
    [(64, 4, 4, 200), (64, 8, 4, 130), (128, 8, 8, 64)],
    ids=["v25-global", "v25-sliding", "pro"],
)
def test_fused_layout_equals_llama_cpp(heads: int, kv: int, shards: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    layout = fp8.QkvLayout(shards, heads * 192, kv * 192, kv * 128)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7F, (layout.rows, width), dtype=np.uint8)
    codes |= rng.integers(0, 2, codes.shape, dtype=np.uint8) << 7
    scale_rows, scale_columns = layout.scale_rows(128), -(-width // 128)
    scale = rng.uniform(0.5, 2, (scale_rows, scale_columns)).astype(np.float32)
    theirs = tp_aware_qkv_dequant(
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
        torch.from_numpy(scale),
        heads,
        kv,
        192,
        128,
    ).numpy()
    values = fp8.decode(codes)
    fp8.apply_scales(values, scale, (128, 128), 0, layout.shard_rows)
    ours = np.concatenate([values[start:stop] for start, stop in layout.regrouped()])
    assert np.array_equal(ours, theirs)
    plain = fp8.decode(codes)  # the wrong reading differs, so this test can fail
    fp8.apply_scales(plain, scale[: -(-layout.rows // 128)], (128, 128))
    assert not np.array_equal(plain, theirs)
