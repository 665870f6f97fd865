"""A picture of a plan: tokens per second against memory and against flash rate, devices marked.

One curve and one mark per plan. The picture is a list of lines, dots and texts; SVG is written by
hand, PNG needs Pillow, which is optional (`pip install 'mimo-edge[plot]'`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

from mimo_edge.atomic_file import writing
from mimo_edge.devices.profile import DeviceProfile, ReadRate
from mimo_edge.errors import BackendError, UsageError
from mimo_edge.planner.planning import PRACTICAL_TPS, USABLE_TPS, Plan, evaluate

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 460, 300, 60, 60, 80
_STEPS = 25
_SCALE = 2  # pixels of a PNG per unit
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
_GIB = 1 << 30


@dataclass(frozen=True)
class _Curve:
    label: str
    colour: str
    points: tuple[tuple[float, float], ...]  # x, tok/s
    mark: tuple[float, float] | None  # the device itself; None where it does not fit


@dataclass(frozen=True)
class _Line:
    """Joined points."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1
    dashed: bool = False


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    colour: str
    radius: float = 5


@dataclass(frozen=True)
class _Text:
    """`anchor` is where in the text (x, baseline) lies: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    size: int = 12


_Shape = _Line | _Dot | _Text


@dataclass(frozen=True)
class _Picture:
    width: int
    height: int
    shapes: tuple[_Shape, ...]


def check_path(path: Path) -> None:
    """Raises UsageError for a picture of another kind, BackendError when PNG cannot be drawn."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path}", "name a file that ends in .svg or .png")
    if path.suffix == ".png":
        _pillow()


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Write the picture of one or more plans. Raises as `check_path`."""
    check_path(path)
    made = _picture(plans)
    try:
        drawn = _svg(made).encode() if path.suffix == ".svg" else _png(made)
        with writing(path, sync=False, mode=0o644) as file:
            file.write(drawn)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _picture(plans: Sequence[Plan]) -> _Picture:
    left, right = [], []
    for number, plan in enumerate(plans):
        colour = _COLOURS[number % len(_COLOURS)]
        label = f"{plan.profile.name}, {plan.model.recipe}"
        ram, rate = plan.settings.ram / _GIB, plan.profile.reads[-1].bytes_per_s / 1e9
        by_ram = by_flash = None
        if plan.forecast is not None:
            tps = plan.forecast.decode.tps
            by_ram, by_flash = (ram, tps), (rate, tps)
        left.append(_Curve(label, colour, _over_ram(plan), by_ram))
        right.append(_Curve(label, colour, _over_flash(plan), by_flash))
    legend = _TOP + _HEIGHT + 60
    width = 2 * (_LEFT + _WIDTH) + _GAP
    shapes: list[_Shape] = [
        _Text(width / 2, 24, f"{plans[0].model.name}: forecast of decoding", "middle", 16),
        *_panel(_LEFT, left, "memory the process may hold, GiB"),
        *_panel(2 * _LEFT + _WIDTH + _GAP / 2, right, "flash rate at the largest reads, GB/s"),
    ]
    for number, curve in enumerate(left):
        y = legend + 18 * number
        fits = "" if curve.mark is not None else " (does not fit)"
        shapes += [
            _Line(((_LEFT, y - 4), (_LEFT + 24, y - 4)), curve.colour, 2),
            _Text(_LEFT + 32, y, curve.label + fits),
        ]
    return _Picture(width, legend + 18 * len(plans) + 10, tuple(shapes))


def _over_ram(plan: Plan) -> tuple[tuple[float, float], ...]:
    """tok/s from the least memory that does to where everything is resident."""
    device = _with_room(plan)
    whole = evaluate(plan.model, device, replace(plan.settings, ram=device.ram_bytes << 12))
    assert whole.budget is not None
    top = max(whole.budget.nbytes, plan.settings.ram)
    least = evaluate(plan.model, device, replace(plan.settings, ram=1)).need_bytes or top
    points = []
    for size in _log_steps(least * 1.05, top * 1.02):
        made = evaluate(plan.model, device, replace(plan.settings, ram=int(size)))
        if made.forecast is not None:
            points.append((size / _GIB, made.forecast.decode.tps))
    return tuple(points)


def _over_flash(plan: Plan) -> tuple[tuple[float, float], ...]:
    """tok/s at other flash rates, the shape of the device's rates kept."""
    device = _with_room(plan)
    own = device.reads[-1].bytes_per_s / 1e9
    points = []
    for rate in _log_steps(min(0.1, own), max(10.0, own)):
        reads = tuple(ReadRate(r.block_bytes, r.bytes_per_s * rate / own) for r in device.reads)
        made = evaluate(plan.model, replace(device, reads=reads), plan.settings)
        if made.forecast is not None:
            points.append((rate, made.forecast.decode.tps))
    return tuple(points)


def _with_room(plan: Plan) -> DeviceProfile:
    """The device with flash enough: the picture is about speed."""
    return replace(
        plan.profile, storage_bytes=max(plan.profile.storage_bytes, plan.model.bundle_bytes)
    )


def _log_steps(low: float, high: float) -> list[float]:
    high = max(high, low * 1.01)
    return [low * (high / low) ** (i / (_STEPS - 1)) for i in range(_STEPS)]


def _panel(x0: float, curves: Sequence[_Curve], title: str) -> list[_Shape]:
    """Axes with logarithmic scales, the curves and the marks."""
    found = [p for c in curves for p in (*c.points, *([c.mark] if c.mark else []))]
    bottom, right = _TOP + _HEIGHT, x0 + _WIDTH
    frame = ((x0, _TOP), (right, _TOP), (right, bottom), (x0, bottom), (x0, _TOP))
    shapes: list[_Shape] = [
        _Line(frame, "#888888"),
        _Text(x0 + _WIDTH / 2, bottom + 36, title, "middle"),
        _Text(x0, _TOP - 10, "tok/s"),
    ]
    if not found:
        return [*shapes, _Text(x0 + _WIDTH / 2, _TOP + _HEIGHT / 2, "it fits nowhere", "middle")]
    lo_x, hi_x = _bounds([p[0] for p in found])
    lo_y, hi_y = _bounds([p[1] for p in found])

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / lo_x) / math.log(hi_x / lo_x)
        up = math.log(y / lo_y) / math.log(hi_y / lo_y)
        return x0 + across * _WIDTH, bottom - up * _HEIGHT

    for value in _ticks(lo_x, hi_x):
        x, _ = place(value, lo_y)
        shapes += [
            _Line(((x, bottom), (x, _TOP)), "#dddddd"),
            _Text(x, bottom + 16, f"{value:g}", "middle"),
        ]
    for value in _ticks(lo_y, hi_y):
        _, y = place(lo_x, value)
        shapes += [
            _Line(((x0, y), (right, y)), "#dddddd"),
            _Text(x0 - 6, y + 4, f"{value:g}", "end"),
        ]
    for value, word in ((PRACTICAL_TPS, "practical"), (USABLE_TPS, "usable")):
        if lo_y < value < hi_y:
            _, y = place(lo_x, value)
            shapes += [
                _Line(((x0, y), (right, y)), "#555555", dashed=True),
                _Text(right - 4, y - 4, f"{word} from {value:g}", "end"),
            ]
    for curve in curves:
        if curve.points:
            shapes.append(_Line(tuple(place(*p) for p in curve.points), curve.colour, 2))
        if curve.mark is not None:
            shapes.append(_Dot(*place(*curve.mark), curve.colour))
    return shapes


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside the bounds, thinned where there are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) <= 2 else (1,)
    return [round(m * 10.0**e, 12) for e in exponents for m in steps if low < m * 10.0**e < high]


def _svg(picture: _Picture) -> str:
    width, height = picture.width, picture.height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for shape in picture.shapes:
        if isinstance(shape, _Line):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            dash = ' stroke-dasharray="4 4"' if shape.dashed else ""
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{shape.width:g}"{dash}/>'
            )
        elif isinstance(shape, _Dot):
            parts.append(
                f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}" '
                f'fill="{shape.colour}"/>'
            )
        else:
            parts.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" '
                f'font-size="{shape.size}">{escape(shape.text)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise BackendError(
            "PNG pictures need Pillow", "pip install 'mimo-edge[plot]', or name a .svg file"
        ) from None
    return Image, ImageDraw, ImageFont


def _png(picture: _Picture) -> bytes:
    image_module, draw_module, font_module = _pillow()
    size = (picture.width * _SCALE, picture.height * _SCALE)
    image = image_module.new("RGB", size, "white")
    pen = draw_module.Draw(image)
    for shape in picture.shapes:
        if isinstance(shape, _Line):
            points = [(x * _SCALE, y * _SCALE) for x, y in shape.points]
            for start, end in _dashes(points) if shape.dashed else pairwise(points):
                pen.line([start, end], fill=shape.colour, width=round(shape.width * _SCALE))
        elif isinstance(shape, _Dot):
            x, y, r = shape.x * _SCALE, shape.y * _SCALE, shape.radius * _SCALE
            pen.ellipse([x - r, y - r, x + r, y + r], fill=shape.colour)
        else:
            font = font_module.load_default(shape.size * _SCALE)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            place = (shape.x * _SCALE, shape.y * _SCALE)
            pen.text(place, shape.text, fill="black", font=font, anchor=anchor)
    drawn = io.BytesIO()
    image.save(drawn, format="PNG")
    return drawn.getvalue()


_Point = tuple[float, float]


def _dashes(points: Sequence[_Point]) -> Iterator[tuple[_Point, _Point]]:
    """Every other piece of a straight line; Pillow draws none itself."""
    (x1, y1), (x2, y2) = points[0], points[-1]
    count = max(1, round(math.hypot(x2 - x1, y2 - y1) / (4 * _SCALE)))
    for i in range(0, count, 2):
        a, b = i / count, min(1.0, (i + 1) / count)
        yield (
            (x1 + (x2 - x1) * a, y1 + (y2 - y1) * a),
            (x1 + (x2 - x1) * b, y1 + (y2 - y1) * b),
        )
