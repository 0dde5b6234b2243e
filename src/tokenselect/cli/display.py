"""What people see while they wait, on stderr: stdout belongs to the answer."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenselect.stats import Stats


class Display:
    """Notes, a bar and numbers on stderr; the bar on terminals only, nothing at all if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, message: str) -> None:
        """One line."""
        self.console.print(escape(message), style="dim", soft_wrap=True)

    @contextmanager
    def waiting(self, message: str) -> Iterator[None]:
        """A spinner."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(message):
            yield

    def numbers(self, stats: Stats) -> None:
        """The numbers of one answer, on one line."""
        self.note(" · ".join(describe(stats)))


class Reading:
    """A bar with tokens per second and time left, while a prompt is read.

    Args:
        display: where to.
        label: what is read.
    """

    def __init__(self, display: Display, label: str = "Reading") -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Pace(),
            console=display.console,
            transient=True,
            disable=display.console.quiet or not display.console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)  # moves without a measure until the first chunk is read

    def update(self, done: int, total: int) -> None:
        """To be passed as `on_prefill`."""
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Take the bar away; the answer begins."""
        self._bar.stop()

    def __enter__(self) -> Reading:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Pace(ProgressColumn):
    """Tokens read, tokens per second and time left, from the mean pace: rich's own needs many small steps."""

    def render(self, task: Task) -> Text:
        """One line; empty until the first chunk is read."""
        seconds = task.finished_time or task.elapsed
        if not task.total or not task.completed or not seconds:
            return Text("")
        pace = task.completed / seconds
        left = timedelta(seconds=round((task.total - task.completed) / pace))
        return Text(f"{task.completed:,.0f} of {task.total:,.0f} tokens, {pace:,.0f} tokens/s, {left} left", "dim")


def describe(stats: Stats) -> Iterator[str]:
    """The numbers of one answer, in words."""
    from tokenselect.memory import readable

    read = stats.prompt_tokens - stats.cached_tokens
    kept = f" (+ {stats.cached_tokens:,} kept)" if stats.cached_tokens else ""
    if stats.ttft_s is None:
        yield f"stopped while reading {read:,} tokens{kept}"
    else:
        yield f"read {read:,} tokens{kept}{_at(stats.prefill_tokens_per_s)}"
        yield f"first token after {stats.ttft_s:.2f} s"
    yield f"wrote {stats.new_tokens:,}{_at(stats.decode_tokens_per_s)}"
    budget = "" if stats.budget is None else f", budget {stats.budget:,}"
    yield f"{stats.method}{budget}: attended {stats.attended_share:.0%}"
    if stats.reuse_hit_rate is not None:
        yield f"Selection Cache {stats.reuse_hit_rate:.0%}"
    yield f"KV {readable(stats.kv_bytes)}"
    yield f"peak memory {readable(stats.peak_memory_bytes)}"


def _at(speed: float | None) -> str:
    return "" if speed is None else f" at {speed:,.0f}/s"
