"""How near every method's attention is to dense attention, and its next-token distributions to dense ones.

    python -m benchmarks.fidelity --length 4096 --length 8192 --minutes 20

Rows of results/fidelity.csv: one per text, length, method and phase, over all layers; those of single layers go to the
file beside it whose name ends in `_layers.csv`.
"""

from __future__ import annotations

import csv
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
from tokenselect.evals.fidelity import NUM_STEPS, NUM_TAIL, PHASES, Candidate, Found, Sums, measure_fidelity
from tokenselect.methods import METHODS, attach, choice
from tokenselect.models import LoadedModel, load_model

_COMPARED = 512  # last tokens, whose next-token distributions are compared
_SELECT = TokenSelectConfig(num_dense_tokens=0)  # within the window too: there is the truth


def main(
    lengths: Annotated[list[int], typer.Option("--length", help="tokens of the text")] = [4096, 8192],  # noqa: B006
    texts: Annotated[list[str], typer.Option("--text", help=", ".join(TEXTS))] = list(TEXTS),  # noqa: B006
    block_step: Annotated[int, typer.Option(help="of a prompt's blocks only every so many are compared")] = 1,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    minutes: Annotated[float, typer.Option(help="nothing is begun after so many minutes")] = 600.0,
    output: Annotated[Path, typer.Option(help="file that is written, or gone on with")] = RESULTS / "fidelity.csv",
) -> None:
    """Compare all methods that choose cached tokens; longest texts first."""
    loaded = load_model(device=device, dtype=dtype)
    rows = Rows(output, ("text", "length"), loaded.model.device, minutes)
    for length in sorted(lengths, reverse=True):
        for text in texts:
            if rows.wants(text=text, length=length):
                measure(loaded, rows, text, length, block_step)


def measure(loaded: LoadedModel, rows: Rows, text: str, length: int, block_step: int) -> None:
    """One text at one length: attention, then distributions."""
    ids = text_ids(loaded, text, length)
    candidates = candidates_of(METHODS)
    found = measure_fidelity(loaded, ids, candidates, block_step)
    truth = distributions(loaded, ids, "dense")
    divergence = {}
    for candidate in candidates:
        theirs = distributions(loaded, ids, candidate.name)
        divergence[candidate.name] = {phase: compare(truth[phase], theirs[phase]) for phase in PHASES}
    new = []
    for (method, phase), sums in over_layers(found).items():
        kl, agreement = divergence.get(method, {}).get(phase, (None, None))
        row = {"text": text, "length": length, "method": method, "phase": phase, **sums.figures()}
        new.append(row | {"kl": kl, "same_top_token": agreement})
        show(new[-1])
    rows.add(new)
    _add_layers(rows.path.with_name(f"{rows.path.stem}_layers.csv"), text, length, found)


def candidates_of(methods: tuple[str, ...]) -> list[Candidate]:
    """Those that choose cached tokens, selecting within the window too; ours comes first."""
    chosen = {method: choice(method) for method in methods}
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
        read = model(ids[:, :prompt], past_key_values=cache, logits_to_keep=_COMPARED - NUM_STEPS).logits[0]
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits[0] for at in range(prompt, ids.shape[1])]
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
    ]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    typer.run(main)
