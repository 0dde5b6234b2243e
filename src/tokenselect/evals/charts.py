"""Figures of an evaluation: the score by length and depth of the needle, and by length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenselect.evals.cells import Cell, Name
from tokenselect.evals.question import NUM_DEPTHS


def draw(cells: Mapping[Name, Cell], folder: Path, depth_tasks: set[str]) -> list[Path]:
    """Write one heat map for each task with a needle, and one figure of scores by length.

    Args:
        cells: the results.
        folder: where to.
        depth_tasks: tasks whose samples have a depth.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    files = []
    for task in dict.fromkeys(name.task for name in cells):
        of_task = {name: cell for name, cell in cells.items() if name.task == task}
        if task in depth_tasks:
            figure = Figure(figsize=(1.2 + 2.6 * len(_methods(of_task)), 3.2), layout="constrained")
            heat_map(figure, of_task, task)
            files.append(_save(figure, folder / f"{task}_by_depth.png"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    _lines(figure, cells)
    files.append(_save(figure, folder / "score_by_length.png"))
    return files


def _methods(cells: Mapping[Name, Cell]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((name.method, name.settings) for name in cells))


def heat_map(figure: Any, cells: Mapping[Name, Cell], task: str) -> None:
    """Draw the score of a task by tokens and depth into a matplotlib figure, a panel for each method."""
    methods, lengths = _methods(cells), sorted({name.length for name in cells})
    axes = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axis, (method, settings) in zip(axes, methods, strict=True):
        grid = [[float("nan")] * len(lengths) for _ in range(NUM_DEPTHS)]
        for column, length in enumerate(lengths):
            cell = cells.get(Name(task, length, method, settings))
            for depth, score in (cell.by_depth() if cell else {}).items():
                grid[int(depth * NUM_DEPTHS)][column] = score
        image = axis.imshow(
            grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", extent=(-0.5, len(lengths) - 0.5, 1, 0)
        )
        axis.set_xticks(range(len(lengths)), [f"{length // 1000}K" for length in lengths])
        axis.set_title(f"{method}\n{settings}" if settings else method, fontsize=9)
    axes[0].set_ylabel("depth of the needle")
    figure.suptitle(f"{task}: score by tokens and depth", fontsize=10)
    figure.colorbar(image, ax=list(axes))


def _lines(figure: Any, cells: Mapping[Name, Cell]) -> None:
    axis = figure.subplots()
    for method, settings in _methods(cells):
        by_length: dict[int, list[float]] = {}
        for name, cell in cells.items():
            if (name.method, name.settings) == (method, settings):
                by_length.setdefault(name.length, []).append(cell.score)
        points = sorted((length, sum(scores) / len(scores)) for length, scores in by_length.items())
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{method} {settings}".strip())
    axis.set(xlabel="tokens", ylabel="mean score of the tasks", ylim=(-0.02, 1.02))
    if min(name.length for name in cells) > 0:
        axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    return file
