"""Draw the loss curves of a run as an SVG, without a plotting library.

python training/plot.py training/runs/nano docs/mimo-nano-loss.svg
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 380, 60, 45, 30, 60
CURVES = (
    ("loss", "trunk", "#1f77b4"),
    ("mtp0", "MTP 0", "#ff7f0e"),
    ("mtp1", "MTP 1", "#2ca02c"),
    ("mtp2", "MTP 2", "#9467bd"),
)


def smooth(values: list[float], span: int = 15) -> list[float]:
    """Mean over the last `span` values, in the log domain."""
    out = []
    for i in range(len(values)):
        part = values[max(0, i - span + 1) : i + 1]
        out.append(math.exp(sum(map(math.log, part)) / len(part)))
    return out


def main() -> None:
    """Entry point."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("run", type=Path)
    ap.add_argument("out", type=Path)
    a = ap.parse_args()
    rows = list(csv.DictReader((a.run / "log.csv").open()))
    evals = [r for r in csv.DictReader((a.run / "eval.csv").open()) if r["stored"] == "0"]
    end = max(int(r["tokens"]) for r in rows) / 1e6
    low, high = 1e-3, 10.0

    def x(millions: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * millions / end

    def y(loss: float) -> float:
        share = math.log(max(loss, low) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    def y_exact(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(-3, 2):
        at = y(10.0**power)
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
        )
        out.append(
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for percent in range(0, 101, 25):
        at = y_exact(percent / 100)
        out.append(
            f'<text x="{WIDTH - RIGHT + 6}" y="{at + 4:.1f}" fill="#d62728">{percent} %</text>'
        )
    for million in range(0, int(end) + 1):
        out.append(
            f'<text x="{x(million):.1f}" y="{HEIGHT - 27}" text-anchor="middle">{million}</text>'
        )
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">million tokens</text>')
    for n, (key, label, colour) in enumerate(CURVES):
        seen = [(int(r["tokens"]) / 1e6, float(r[key])) for r in rows if r[key]]
        points = zip([m for m, _ in seen], smooth([v for _, v in seen]), strict=True)
        path = " ".join(f"{x(m):.1f},{y(v):.1f}" for m, v in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(f'<text x="{LEFT + 10 + 75 * n}" y="{TOP - 10}" fill="{colour}">{label}</text>')
    path = " ".join(
        f"{x(int(r['tokens']) / 1e6):.1f},{y_exact(float(r['exact'])):.1f}" for r in evals
    )
    out.append(f'<polyline points="{path}" fill="none" stroke="#d62728" stroke-dasharray="5 3"/>')
    out.append(f'<text x="{LEFT + 320}" y="{TOP - 10}" fill="#d62728">held-out exact match</text>')
    a.out.write_text("\n".join(out) + "\n</svg>\n", "utf-8")


if __name__ == "__main__":
    main()
