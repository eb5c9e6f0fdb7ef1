#!/usr/bin/env python3
"""Draws the results of step.py: tests/benchmarks/step_plot.py step.jsonl step.png"""

import json
import sys
from pathlib import Path
from typing import Any

MIB = 2**20


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draws speed and peak memory of each row, with two panels for each size and hardware."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {}
    for row in rows:
        groups.setdefault((row["size"], row["hardware"]), []).append(row)
    heights = [len(group) + 2 for group in groups.values()]
    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 0.5 + 0.34 * sum(heights)), squeeze=False, sharey="row",
                                layout="constrained", height_ratios=heights)
    for ((size, hardware), group), (left, right) in zip(groups.items(), axes, strict=True):
        labels = [f"{row['implementation']}  {row['precision']}" for row in group]
        colors = ["#0072B2" if row["implementation"].startswith("ours") else "#999999" for row in group]
        for ax, key, unit in ((left, "imagesPerSecond", 1), (right, "peak", MIB)):
            values = [row.get(key, 0) / unit for row in group]
            ax.barh(range(len(group)), values, color=colors)
            for y, (row, value) in enumerate(zip(group, values, strict=True)):
                ax.annotate(row.get("error", "")[:40] or f"{value:,.0f}", (value, y), xytext=(4, 0), fontsize=8,
                            textcoords="offset points", va="center")
            ax.set_xlim(0, 1.18 * max(values) or 1)
            ax.spines[["top", "right"]].set_visible(False)
        left.set_yticks(range(len(group)), labels, fontsize=9)
        left.invert_yaxis()
        on_cpu = group[0]["device"] == "cpu"
        left.set(xlabel=f"images/s{' (on a CPU: ratios only)' if on_cpu else ''}", title=f"{size}, training step")
        right.set(xlabel="MiB peak memory", title=hardware)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()], sys.argv[2])
