"""Whether a graph gives rows computed together the bits each gets alone; asked of the graph itself.

Drafting may not change an answer, so a verify of several tokens has to give, to the bit, what
passes of one token give. Kernels for several rows may sum in another order, and which do differs
between processors and versions. So each kind of graph is tried once on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from mimo_edge.onnx_io import MASKED
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.onnx.library import Array, Io, Session

# Columns of keys in a try: as many as the first block of a growing cache.
_COLUMNS = 64


def rows_together(session: Session) -> int:
    """The most rows, up to VERIFY_ROWS, for which every output of a layer or head graph has the
    bits it has when its row runs alone."""
    rng = np.random.default_rng(0)
    inputs = {io.name: _values(io, rng) for io in session.inputs}
    alone: list[dict[str, Array]] = []
    caches = {name: values.copy() for name, values in inputs.items() if _is_cache(name)}
    for row in range(VERIFY_ROWS):
        given = {name: _rows(name, values, row, row + 1) for name, values in inputs.items()}
        alone.append(_run(session, given | caches))
        caches = {name: alone[-1]["c" + name[1:]] for name in caches}
    for count in range(VERIFY_ROWS, 1, -1):
        given = {name: _rows(name, values, 0, count) for name, values in inputs.items()}
        given |= {name: values.copy() for name, values in inputs.items() if _is_cache(name)}
        if _same(_run(session, given), alone[:count]):
            return count
    return 1


def _is_cache(name: str) -> bool:
    return name.startswith(("pk_", "pv_"))


def _values(io: Io, rng: np.random.Generator) -> Array:
    """Random values for VERIFY_ROWS rows of an input: row r sees the rows before it, itself, and
    what was cached, except some columns."""
    if io.name.startswith("at_"):
        return np.array([_COLUMNS - 2 * VERIFY_ROWS], np.int64)
    if io.name == "norm":
        return np.array([0], np.int64)
    if io.name.startswith("mask_"):
        first = _COLUMNS - 2 * VERIFY_ROWS
        seen = np.arange(_COLUMNS) <= first + np.arange(VERIFY_ROWS)[:, None]
        seen[:, :3] = False
        return np.where(seen, 0, MASKED).astype(np.float32)
    row_axis = {"h": 0, "cos": 1, "sin": 1}.get(io.name.split("_")[0])
    free = _COLUMNS if row_axis is None else VERIFY_ROWS
    shape = [d if isinstance(d, int) else free for d in io.shape]
    values: Array = rng.standard_normal(shape).astype(np.float32)
    return values


def _rows(name: str, values: Array, start: int, stop: int) -> Array:
    """What rows start..stop of a pass are given: slots count on, caches stay whole."""
    if name.startswith("at_"):
        return values + start
    if name == "norm" or _is_cache(name):
        return values
    part = values[:, start:stop] if name.startswith(("cos_", "sin_")) else values[start:stop]
    return np.ascontiguousarray(part)


def _run(session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of a run; caches are copies of what is given, written in place."""
    count = len(inputs["h"])
    arrays = dict(inputs)
    for io in session.outputs:
        if io.name[:3] in ("ck_", "cv_"):
            arrays[io.name] = arrays["p" + io.name[1:]]
        else:
            assert io.dtype is not None
            shape = [d if isinstance(d, int) else count for d in io.shape]
            arrays[io.name] = np.zeros(shape, io.dtype)
    session.bind(arrays).run()
    return {io.name: arrays[io.name] for io in session.outputs}


def _same(together: Mapping[str, Array], alone: list[dict[str, Array]]) -> bool:
    """Whether a run of several rows gave the bits of runs of one: rows one by one, and the caches
    as the last run left them."""
    for name, values in together.items():
        if name[:3] in ("ck_", "cv_"):
            first = _COLUMNS - 2 * VERIFY_ROWS
            found = values[:, :, first : first + len(alone)]
            want = np.concatenate(
                [one[name][:, :, first + row : first + row + 1] for row, one in enumerate(alone)],
                axis=2,
            )
        else:
            found, want = values, np.concatenate([one[name] for one in alone])
        if found.tobytes() != want.tobytes():
            return False
    return True


def signature(session: Session, structure: Iterable[object]) -> tuple[object, ...]:
    """What sessions must share to be tried once: names are of no account, shapes and order are."""
    shapes = tuple(io.shape for io in (*session.inputs, *session.outputs))
    return (*structure, shapes)
