"""Tables and figures of docs/performance.md, from the results of ``bench.performance``.

    python -m bench.plots results.json --page docs/performance.md

Figures go into a folder beside the page, named like it; tables go between the page's two marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
"""Text between these marks of a page is replaced."""

CAPTIONS = {
    "latency.png": "Latency of a request against total throughput",
    "context.png": "Time per token against context length and against queue length",
}
"""File and caption of each figure."""

Row = Mapping[str, Any]


def tables(results: Mapping[str, Any]) -> str:
    """Format all results as Markdown tables."""
    machine, limits, peer = results["machine"], results["ceilings"], results.get("peer", {})
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "cuda", "triton", "python") if name in machine)
    parts = [
        f"{machine['device']}, {machine['date']}; {versions}. Ceilings of the same run: "
        f"{limits['copy'] / 1e12:.2f} TB/s copy, {limits['read'] / 1e12:.2f} TB/s matrix-vector read, "
        f"{limits['product'] / 1e12:.0f} TFLOP/s."
    ]
    theirs = peer.get("name", "peer")
    if "decode" in results:
        parts.append(_decode_table(results["decode"], peer.get("decode", ()), theirs))
    if "prefill" in results:
        parts.append(_prefill_table(results["prefill"], peer.get("prefill", ()), theirs))
    if "video" in results:
        parts.append(_video_table(results["video"], peer.get("video"), theirs))
    if "throughput" in results:
        parts.append(_throughput_table(results["throughput"]))
    if "waiting" in results:
        rows = [(f"{row['waiting']:,}", f"{row['ms_per_step']:.2f}") for row in results["waiting"]]
        running = results["waiting"][0]["running"]
        parts.append(_markdown(("waiting requests", f"ms per step, {running} running"), rows))
    if "kernels" in results:
        parts.append(_kernels_table(results["kernels"], limits))
    failed = {**results.get("failed", {}), **peer.get("failed", {})}
    parts += [f"Failed: {part}: {problem}" for part, problem in failed.items()]
    return "\n\n".join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; an empty last column is left out."""
    if all(row[-1] == "-" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _decode_table(rows: Sequence[Row], peer: Sequence[Row], theirs: str) -> str:
    known = {(row["batch"], row["context"]): row for row in peer}
    cells = []
    for row in rows:
        other = known.get((row["batch"], row["context"]))
        rate = other["tokens_per_s"] if other else None
        cells.append(
            (
                f"batch {row['batch']}, context {row['context']:,}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ms_per_step']:.2f}",
                f"{row['floor_ms']:.2f}",
                f"{row['mbu']:.0%}",
                f"{row['experts_touched']:.1f}",
                f"{row['idle_share']:.1%}" if "idle_share" in row else "-",
                f"{rate:,.0f}" if rate else "-",
            )
        )
    header = (
        "decode",
        "tok/s",
        "ms per step",
        "floor, ms",
        "MBU",
        "experts touched",
        "idle between graphs",
        f"{theirs}, tok/s",
    )
    return _markdown(header, cells)


def _prefill_table(rows: Sequence[Row], peer: Sequence[Row], theirs: str) -> str:
    known = {row["name"]: row["ms"]["median"] for row in peer}
    cells = [
        (
            row["name"],
            f"{row['ms']['median']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['mfu']:.0%}",
            f"{known[row['name']]:.1f}" if row["name"] in known else "-",
        )
        for row in rows
    ]
    return _markdown(("time to first token; encoder with projector", "ms", "floor, ms", "MFU", f"{theirs}, ms"), cells)


def _video_table(row: Row, peer: Row | None, theirs: str) -> str:
    other = ("-", "-") if peer is None else (_middle(peer["first_token_ms"]), _middle(peer["tokens_per_s"]))
    cells = [
        ("time to first token, ms", _middle(row["first_token_ms"]), f"{row['floor_ms']:.0f}", other[0]),
        ("decode, tok/s", _middle(row["tokens_per_s"]), "-", other[1]),
    ]
    if row["peak_bytes"]:
        work = (row["peak_bytes"] - row["cache_bytes"]) / 1e9
        cells.append(("peak memory without KV cache, GB", f"{work:.1f}", "-", "-"))
    return _markdown((f"{row['frames']} frames of {row['side']} px", "aria", "floor", theirs), cells)


def _middle(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:,.0f}"


def _throughput_table(rows: Sequence[Row]) -> str:
    cells = [
        (
            f"{row['mix']}, {row['requests_per_s']:g}/s",
            f"{row['answer_tokens_per_s']:,.0f}",
            *(f"{row[name][share]:.0f}" for name in ("first_token_ms", "next_token_ms") for share in ("p50", "p99")),
        )
        for row in rows
    ]
    header = ("requests", "tok/s", "TTFT p50, ms", "p99", "time per token p50, ms", "p99")
    return _markdown(header, cells)


def _kernels_table(rows: Sequence[Row], limits: Mapping[str, float]) -> str:
    cells = [
        (
            row["name"],
            f"{row['error']:.0e}",
            f"{row['us']['median']:,.1f}",
            f"{row['floor_us']:,.1f}",
            f"{row['bytes_per_s'] / limits['read']:.0%}",
            f"{row['flops_per_s'] / limits['product']:.0%}",
            f"{row['library_us']['median']:,.1f}" if row["library_us"] else "-",
        )
        for row in rows
    ]
    return _markdown(("operation", "error", "us", "floor, us", "of memory", "of products", "PyTorch, us"), cells)


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the figures that there are results for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    wanted_by = (("throughput", _draw_latency), ("decode", _draw_context))
    for name, (wanted, paint) in zip(CAPTIONS, wanted_by, strict=True):
        if wanted in results:
            figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
            paint(axes, results)
            figure.savefig(folder / name)
            pyplot.close(figure)
            drawn.append(folder / name)
    return drawn


def _draw_latency(axes: Any, results: Mapping[str, Any]) -> None:
    rows = results["throughput"]
    for axis, name, title in (
        (axes[0], "first_token_ms", "time to first token"),
        (axes[1], "next_token_ms", "time per token"),
    ):
        for number, mix in enumerate(dict.fromkeys(row["mix"] for row in rows)):
            own = [row for row in rows if row["mix"] == mix]
            rates = [row["answer_tokens_per_s"] for row in own]
            for share, style in (("p50", "-o"), ("p99", "--s")):
                axis.plot(
                    rates, [row[name][share] for row in own], style, color=f"C{number}", ms=4, label=f"{mix}, {share}"
                )
        axis.set(title=title, xlabel="tokens per second, all requests", ylabel="ms", yscale="log", xlim=(0, None))
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.legend()


def _draw_context(axes: Any, results: Mapping[str, Any]) -> None:
    rows = results["decode"]
    alone = sorted((row for row in rows if row["batch"] == rows[0]["batch"]), key=lambda row: row["context"])
    contexts = [row["mean_context"] / 1000 for row in alone]
    axes[0].plot(contexts, [row["ms_per_step"] for row in alone], "-o", ms=4, label="aria")
    axes[0].plot(contexts, [row["floor_ms"] for row in alone], ":", color="gray", label="floor")
    axes[0].set(title=f"batch {rows[0]['batch']}", xlabel="context, thousands of tokens", ylabel="ms per token")
    waiting = results.get("waiting", ())
    axes[1].set_visible(bool(waiting))
    if waiting:
        running = waiting[0]["running"]
        axes[1].plot([row["waiting"] for row in waiting], [row["ms_per_step"] for row in waiting], "-o", ms=4)
        axes[1].set(title=f"{running} running requests", xlabel="waiting requests", ylabel="ms per step")
        axes[1].set_xscale("symlog", linthresh=10)
    for axis in axes:
        most = max((max(line.get_ydata()) for line in axis.get_lines()), default=1.0)
        axis.set_ylim(0, 1.15 * most)
    axes[0].legend()


def fill(page: Path, text: str) -> None:
    """Replace the text between a page's marks.

    Raises:
        ValueError: The page does not have both marks in order.
    """
    old = page.read_text(encoding="utf-8")
    before, mark, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page} should have {BEGIN} and, after it, {END}; results go between them")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files; later ones override earlier ones")
    parser.add_argument("--page", type=Path, help="page to fill (default: print the tables)")
    parser.add_argument(
        "--folder", type=Path, help="folder of the figures (default: named like the page, or this folder)"
    )
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {}
    for file in arguments.results:
        results |= json.loads(file.read_bytes().strip().split(b"\n")[-1])
    page: Path | None = arguments.page
    folder = arguments.folder or (page.with_suffix("") if page else Path())
    text = tables(results)
    for file in draw(results, folder):
        shown = file.relative_to(page.parent) if page and file.is_relative_to(page.parent) else file
        text += f"\n\n![{CAPTIONS[file.name]}]({shown.as_posix()})"
    if page is None:
        print(text)
    else:
        fill(page, text)


if __name__ == "__main__":
    main()
