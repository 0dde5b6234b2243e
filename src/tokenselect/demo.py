"""Facts hidden in long real documents: the methods side by side on the same prompts, every answer shown."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenselect.cli.display import Display, Reading
from tokenselect.evals import Sample, demo_samples, is_right, raw_prompt
from tokenselect.llm import LLM
from tokenselect.memory import readable, settled_memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenselect.config import TokenSelectConfig
    from tokenselect.models import LoadedModel
    from tokenselect.stats import Stats

TITLES = {"tokenselect": "TokenSelect", "streaming": "sinks + local", "dense": "dense"}
_NOTE = (
    "Memory: peak resident memory of the process while the method ran, less that just before it (weights, "
    "Python, torch). Times and rates are medians. Dense attention is slow: it gets the first document only."
)


@dataclass(frozen=True, slots=True)
class Result:
    """One answer."""

    method: str
    depth: float
    expected: str
    answer: str
    right: bool
    stats: Stats


@dataclass(slots=True)
class Demo:
    """Runs the methods and keeps every answer.

    Args:
        loaded: the model, shared by the methods.
        config: the settings of the selection.
        display: where progress goes.
        to_stdout: print answers as they come.
    """

    loaded: LoadedModel
    config: TokenSelectConfig
    display: Display
    to_stdout: bool = True
    results: list[Result] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def run(self, num_tokens: int, num_questions: int, max_new_tokens: int, seed: int = 0) -> bool:
        """Ask everything.

        Args:
            num_tokens: tokens of each document with its question.
            num_questions: documents, each with one fact at another depth.
            max_new_tokens: most tokens of an answer.
            seed: other documents and numbers.

        Returns:
            False if Ctrl-C ended it; what was answered until then is kept.

        Raises:
            ValueError: no room for a fact in `num_tokens`, budget larger than the window, or no memory.
            ImportError: the package with the documents is not installed.
        """
        llms = {method: LLM(self.loaded, method, self.config) for method in TITLES}
        with self.display.waiting("Hiding facts in State of the Union addresses"):
            samples = demo_samples(self.loaded.tokenizer, num_tokens, num_questions, seed)
        self._print(self._intro(samples))
        try:
            # Weights become resident when they are first used: not to be counted as the first method's memory.
            llms["dense"].generate("Warm up.", max_new_tokens=2)
            for method, llm in llms.items():
                self._run_method(llm, samples[:1] if method == "dense" else samples, max_new_tokens)
        except KeyboardInterrupt:
            return False
        return True

    def _run_method(self, llm: LLM, samples: list[Sample], max_new_tokens: int) -> None:
        before, peak = settled_memory(), 0
        for number, sample in enumerate(samples, 1):
            result = self._ask(llm, sample, f"{TITLES[llm.method]} {number}/{len(samples)}", max_new_tokens)
            peak = max(peak, result.stats.peak_memory_bytes)
            self.memory[llm.method] = max(0, peak - before)
            self.results.append(result)
            self._print(_verdict(result, number, len(samples)))

    def _ask(self, llm: LLM, sample: Sample, label: str, max_new_tokens: int) -> Result:
        if llm.method == "dense":
            label += f" (slow: every token attends all {sample.num_tokens:,}, may take minutes)"
            if not self.display.console.is_terminal:
                self.display.note(label)
        with Reading(self.display, label) as reading:
            answer = llm.generate(raw_prompt(sample), max_new_tokens=max_new_tokens, on_prefill=reading.update)
        if answer.interrupted:
            raise KeyboardInterrupt
        right = is_right(answer.text, sample)
        return Result(llm.method, sample.depth, sample.answer, answer.text, right, answer.stats)

    def _intro(self, samples: list[Sample]) -> str:
        return (
            f"{escape(self.loaded.name)}, trained on {self.loaded.trained_window:,} tokens, reads "
            f"{_count(len(samples), 'document')} of about {samples[0].num_tokens:,} tokens (State of the Union "
            f"addresses), each with one hidden fact. Budget: {self.config.budget:,} tokens."
        )

    def _print(self, text: str) -> None:
        if self.to_stdout:
            Console(highlight=False).print(text, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """Every answer, and the table's numbers by method."""
        return {
            "results": [asdict(result) for result in self.results],
            "summary": {method: self.summary(method) for method in self.memory},
        }

    def summary(self, method: str) -> dict[str, Any]:
        """One row of the table as numbers; None where nothing was measured."""
        results = [result for result in self.results if result.method == method]
        stats = [result.stats for result in results]
        return {
            "facts_found": sum(result.right for result in results),
            "facts_asked": len(results),
            "ttft_s": _median(one.ttft_s for one in stats),
            "prefill_tokens_per_s": _median(one.prefill_tokens_per_s for one in stats),
            "decode_tokens_per_s": _median(one.decode_tokens_per_s for one in stats),
            "peak_memory_beyond_start_bytes": self.memory[method],
            "kv_bytes": max(one.kv_bytes for one in stats),
            "attended_share": _median(one.attended_share for one in stats),
        }

    def print_table(self) -> None:
        """The methods side by side, on stdout."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=_NOTE, caption_justify="left")
        table.add_column("method", no_wrap=True)
        for title in ("facts\nfound", "first\ntoken, s", "prefill\ntok/s", "decode\ntok/s", "memory"):
            table.add_column(title, justify="right")
        table.add_column("of it\nKV", justify="right")
        table.add_column("attended", justify="right")
        for method in self.memory:
            table.add_row(TITLES[method], *_cells(self.summary(method)))
        Console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    def number(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:,.1f}"

    return [
        f"{row['facts_found']} of {row['facts_asked']}",
        number("ttft_s"),
        number("prefill_tokens_per_s"),
        number("decode_tokens_per_s"),
        readable(row["peak_memory_beyond_start_bytes"]),
        readable(row["kv_bytes"]),
        f"{row['attended_share']:.0%}",
    ]


def _verdict(result: Result, number: int, total: int) -> str:
    verdict = "[green]right[/]" if result.right else f"[red]wrong[/], it is {result.expected}"
    return (
        f"{TITLES[result.method]} {number}/{total}, fact at {result.depth:.0%}: {escape(repr(result.answer))} {verdict}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
