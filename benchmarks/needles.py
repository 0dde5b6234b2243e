"""Is the far context read? One number hidden in a long document, asked for at its end.

    python -m benchmarks.needles --task fact --length 16000 --method tokenselect

Greedy, raw completion, the first number of 8 new tokens counts. Every sample becomes a row of results/needles.csv.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich import print as show

from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig
from tokenselect.evals.needle import REPHRASED_WORDINGS, Sample, fact_grid, is_right, passkey_grid, raw_prompt
from tokenselect.evals.prefix import Prefix
from tokenselect.integrations.cache_name import CACHE
from tokenselect.methods import attach
from tokenselect.models import LoadedModel, load_model

_NEW_TOKENS = 8


def main(
    task: Annotated[str, typer.Option(help="fact (real text), rephrased, or passkey (repeated sentences)")] = "fact",
    length: Annotated[int, typer.Option(help="tokens of document and question")] = 16_000,
    method: Annotated[str, typer.Option(help="tokenselect, streaming or dense")] = "tokenselect",
    depths: Annotated[int, typer.Option(help="depths; each in two wordings")] = 10,
    limit: Annotated[int, typer.Option(help="only the first so many samples")] = 1_000,
    num_selected_tokens: Annotated[int, typer.Option(help="k; 0: the default")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads; 0: all")] = 0,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda")] = "cpu",
) -> None:
    """Ask every sample of a grid and append the answers to results/needles.csv."""
    if threads:
        torch.set_num_threads(threads)
    config = TokenSelectConfig()
    if num_selected_tokens:
        config = config.replace(num_selected_tokens=num_selected_tokens)
    loaded = load_model(device=device)
    grids = {
        "fact": fact_grid,
        "passkey": passkey_grid,
        "rephrased": partial(fact_grid, wordings=REPHRASED_WORDINGS),
    }
    samples = grids[task](loaded.tokenizer, length, depths)[:limit]
    samples.sort(key=lambda sample: -sample.depth)  # passkeys then share all that comes before the needle
    found = 0
    with attach(loaded.model, method, config, None):
        prefix = Prefix(loaded.model, config.block_size)
        for i, sample in enumerate(samples, 1):
            row = {"task": task, "length": length, "method": method, "k": config.num_selected_tokens}
            row |= ask(loaded, sample, prefix)
            append_rows("needles", [row], loaded.model.device)
            found += row["right"]
            show(f"{i}/{len(samples)} depth {sample.depth:.2f} {sample.wording}: {row['answer']!r} {found}/{i} right")


def ask(loaded: LoadedModel, sample: Sample, prefix: Prefix) -> dict[str, Any]:
    """One greedy answer, judged."""
    ids = loaded.tokenizer(raw_prompt(sample), return_tensors="pt", verbose=False).input_ids
    inputs = ids.to(loaded.model.device)
    out = loaded.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        **{CACHE: prefix.share_with(ids[0])},
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    text = loaded.tokenizer.decode(out[0, ids.shape[1] :])
    return {
        "depth": sample.depth,
        "wording": sample.wording,
        "expected": sample.answer,
        "answer": text,
        "right": int(is_right(text, sample)),
    }


if __name__ == "__main__":
    typer.run(main)
