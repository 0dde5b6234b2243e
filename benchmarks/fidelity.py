"""How near every method's attention is to dense attention, and its next-token distributions to dense ones.

    python -m benchmarks.fidelity --length 4096 --length 8192 --minutes 20

Stage "attention" writes results/fidelity.csv, one row per text, length, method and phase, over all layers (those of
single layers go to the file beside it whose name ends in `_layers.csv`); stage "distributions" writes the file that
ends in `_kl.csv`. Few methods at once, which share the truth, so rows come early; plain definitions that loop are last.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import print as show
from torch import Tensor
from transformers import DynamicCache

from benchmarks.plain_texts import TEXTS, text_ids
from benchmarks.report import RESULTS
from benchmarks.rows import Rows
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.fidelity import NUM_STEPS, NUM_TAIL, ORACLES, PHASES, Candidate, Found, Sums, measure_fidelity
from tokenselect.integrations.cache_name import CACHE
from tokenselect.methods import METHODS, attach, choice
from tokenselect.models import LoadedModel, load_model

_COMPARED = 512  # last tokens, whose next-token distributions are compared
_AT_ONCE = 4  # methods that share the truth
_SLOW = ("published", "infllm", "quest")  # plain definitions
_STAGES = ("attention", "distributions")
_SELECT = TokenSelectConfig(num_dense_tokens=0)  # within the window too: there is the truth


def main(
    lengths: Annotated[list[int], typer.Option("--length", help="tokens of the text")] = [4096, 8192],  # noqa: B006
    texts: Annotated[list[str], typer.Option("--text", help=", ".join(TEXTS))] = list(TEXTS),  # noqa: B006
    stages: Annotated[list[str], typer.Option("--stage", help=", ".join(_STAGES))] = list(_STAGES),  # noqa: B006
    block_step: Annotated[int, typer.Option(help="of a prompt's blocks only every so many are compared")] = 1,
    layer_step: Annotated[int, typer.Option(help="only every so many layers are compared")] = 1,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    minutes: Annotated[float, typer.Option(help="nothing is begun after so many minutes")] = 600.0,
    output: Annotated[Path, typer.Option(help="file that is written, or gone on with")] = RESULTS / "fidelity.csv",
) -> None:
    """Compare all methods that choose cached tokens; longest texts first."""
    loaded = load_model(device=device, dtype=dtype)
    key, end = ("text", "length", "method"), time.monotonic() + 60 * minutes
    for stage in stages:
        path = output if stage == "attention" else output.with_name(f"{output.stem}_kl.csv")
        rows = Rows(path, key, loaded.model.device, (end - time.monotonic()) / 60)
        for length in sorted(lengths, reverse=True):
            if stage == "attention":
                _attention(loaded, rows, texts, length, (block_step, layer_step))
            else:
                _distributions(loaded, rows, texts, length)


def _attention(loaded: LoadedModel, rows: Rows, texts: list[str], length: int, steps: tuple[int, int]) -> None:
    """All texts with a few methods, then with the next ones; of blocks and layers every so many."""
    candidates = candidates_of(METHODS)
    for begin in range(0, len(candidates), _AT_ONCE):
        for text in texts:
            part = candidates[begin : begin + _AT_ONCE]
            part = [one for one in part if rows.wants(text=text, length=length, method=one.name)]
            if part:
                _measure(loaded, rows, text, length, steps, part, candidates[0])


def _measure(
    loaded: LoadedModel,
    rows: Rows,
    text: str,
    length: int,
    steps: tuple[int, int],
    part: list[Candidate],
    ours: Candidate,
) -> None:
    """Some methods on one text; ours, which the oracles follow, is always measured."""
    oracles = rows.wants(text=text, length=length, method=ORACLES[0])
    ids, measured = text_ids(loaded, text, length), part if ours in part else [ours, *part]
    found = measure_fidelity(loaded, ids, measured, steps[0], oracles, steps[1])
    found = {key: sums for key, sums in found.items() if ours in part or key[0] != ours.name}
    new = []
    for (method, phase), sums in over_layers(found).items():
        if not sums.total:
            show(f"{method}, {phase}: its budget covers the text of {length} tokens; left out")
            continue
        which = {"text": text, "length": length, "method": method, "phase": phase}
        new.append(which | {"block_step": steps[0], "layer_step": steps[1]} | sums.figures())
        show(new[-1])
    if new:
        rows.add(new)
        _add_layers(rows.path.with_name(f"{rows.path.stem}_layers.csv"), text, length, found)


def _distributions(loaded: LoadedModel, rows: Rows, texts: list[str], length: int) -> None:
    """Next-token distributions, method by method."""
    for text in texts:
        ids, truth = text_ids(loaded, text, length), None
        for candidate in candidates_of(METHODS):
            config = candidate.choice.settings(candidate.asked)
            if config.covers(length, length - 1):
                show(f"{candidate.name}: its budget covers the text of {length} tokens; left out")
            elif rows.wants(text=text, length=length, method=candidate.name):
                truth = truth or distributions(loaded, ids, "dense")
                theirs = distributions(loaded, ids, candidate.name)
                rows.add([_row(text, length, candidate.name, phase, truth, theirs) for phase in PHASES])


def _row(
    text: str, length: int, method: str, phase: str, truth: dict[str, Tensor], theirs: dict[str, Tensor]
) -> dict[str, Any]:
    kl, agreement = compare(truth[phase], theirs[phase])
    row = {"text": text, "length": length, "method": method, "phase": phase, "kl": kl, "same_top_token": agreement}
    show(row)
    return row


def candidates_of(methods: tuple[str, ...]) -> list[Candidate]:
    """Those that choose cached tokens, selecting within the window too; ours comes first, slow ones last."""
    chosen = {method: choice(method) for method in sorted(methods, key=lambda one: one in _SLOW)}
    return [Candidate(name, found, _SELECT) for name, found in chosen.items() if found is not None]


def over_layers(found: Found) -> dict[tuple[str, str], Sums]:
    """Sums of all layers, by method and phase."""
    whole: dict[tuple[str, str], Sums] = {}
    for (method, phase, _), sums in found.items():
        whole.setdefault((method, phase), Sums()).__iadd__(sums)
    return whole


@torch.no_grad()
def distributions(loaded: LoadedModel, ids: Tensor, method: str) -> dict[str, Tensor]:
    """Logarithms of next-token probabilities [tokens, vocabulary], by phase."""
    model, prompt = loaded.model, ids.shape[1] - NUM_STEPS
    cache = DynamicCache(config=model.config)
    with attach(model, method, _SELECT):
        read = model(ids[:, :prompt], **{CACHE: cache}, logits_to_keep=_COMPARED - NUM_STEPS).logits[0]
        steps = [model(ids[:, at : at + 1], **{CACHE: cache}).logits[0] for at in range(prompt, ids.shape[1])]
    parts = {"prefill": read[:-NUM_TAIL], "tail": read[-NUM_TAIL:], "decode": torch.cat(steps)}
    return {phase: logits.float().log_softmax(-1) for phase, logits in parts.items()}


def compare(truth: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean divergence KL(truth, other) in nats, and how often the most likely token is the same."""
    kl = (truth.exp() * (truth - other)).sum(-1).mean()
    same = (truth.argmax(-1) == other.argmax(-1)).float().mean()
    return round(float(kl), 5), round(float(same), 4)


def _add_layers(path: Path, text: str, length: int, found: Found) -> None:
    """Layer by layer; device, versions and command are those of the rows over all layers."""
    lines: list[dict[str, Any]] = [
        {"text": text, "length": length, "method": method, "phase": phase, "layer": layer, **sums.figures()}
        for (method, phase, layer), sums in found.items()
        if sums.total
    ]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    typer.run(main)
