"""`tokenselect info`: what is installed, what can run, and what a context will take."""

import json
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tokenselect
from tokenselect.cli.display import Display
from tokenselect.cli.flags import ModelOptions
from tokenselect.cli.session import load
from tokenselect.config import TokenSelectConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenselect.models import LoadedModel


def info(
    model: ModelOptions,
    config: TokenSelectConfig,
    context: Annotated[
        list[int] | None, typer.Option("--context", help="tokens of a context to plan for; may be repeated")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Show versions, backends, the model's facts, and the budget and memory that a context takes."""
    for tokens in context or ():
        if not 0 < tokens < 2**31:
            raise ValueError(f"--context must be between 1 and {2**31 - 1}, got {tokens}")
    loaded = load(model, Display(quiet))
    config = config.for_window(loaded.trained_window)
    facts = {
        "versions": _versions(),
        "backends": _backends(loaded),
        "model": _model_facts(loaded),
        "selection": _selection(loaded, config),
        "contexts": [_plan(loaded, config, tokens) for tokens in context or ()],
    }
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))
    config.check_window(loaded.trained_window)


def _versions() -> dict[str, Any]:
    import torch

    return {
        "tokenselect": tokenselect.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
    }


def _backends(loaded: "LoadedModel") -> dict[str, str]:
    """ "ready", or why not, by name; for native code on a CPU also which instructions it uses."""
    from tokenselect.ops import BACKENDS, cpu

    model, head_dim = loaded.model, _head_dim(loaded)
    found = {name: module.why_not(model.device, model.dtype, head_dim) or "ready" for name, module in BACKENDS.items()}
    if found[cpu.NAME] == "ready":
        found[cpu.NAME] = f"ready ({cpu.instruction_set()})"
    return found


def _model_facts(loaded: "LoadedModel") -> dict[str, Any]:
    text = loaded.model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "name": loaded.name,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(weight.numel() for weight in loaded.model.parameters()),
        "layers": text.num_hidden_layers,
        "query heads": heads,
        "key/value heads": getattr(text, "num_key_value_heads", None) or heads,
        "head size": _head_dim(loaded),
        "trained window": loaded.trained_window,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
    }


def _selection(loaded: "LoadedModel", config: TokenSelectConfig) -> dict[str, Any]:
    """Where selection begins, its budget, and whether the model can be served."""
    from tokenselect.methods import attach

    supported = "yes"
    try:
        attach(loaded.model, "tokenselect", config)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        supported = f"no: {error}"
    return {"attended whole up to": config.num_dense_tokens, "budget": config.budget, "supported": supported}


def _plan(loaded: "LoadedModel", config: TokenSelectConfig, tokens: int) -> dict[str, Any]:
    from tokenselect.memory import available_memory, context_bytes, fits, kv_bytes

    model = loaded.model
    attended = config.num_attended(tokens)
    return {
        "tokens": tokens,
        "attended": attended,
        "share": attended / tokens,
        "kv_bytes": kv_bytes(model.config, tokens, model.dtype),
        "bytes": context_bytes(model.config, tokens, model.dtype, config),
        "available_bytes": available_memory(model.device),
        "fits": fits(model.config, tokens, model.dtype, model.device, config),
    }


def _head_dim(loaded: "LoadedModel") -> int:
    text = loaded.model.config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _lines(facts: dict[str, Any]) -> "Iterator[str]":
    from tokenselect.memory import readable

    for title in ("versions", "backends", "model", "selection"):
        yield f"{title}:"
        for name, value in facts[title].items():
            yield f"  {name}: {f'{value:,}' if isinstance(value, int) else value}"
    for plan in facts["contexts"]:
        yield (
            f"a context of {plan['tokens']:,} tokens: each token attends at most {plan['attended']:,} "
            f"({plan['share']:.0%}); keys and values take {readable(plan['kv_bytes'])}, "
            f"with what scoring reads {readable(plan['bytes'])}, "
            f"of {readable(plan['available_bytes'])} free memory{'' if plan['fits'] else ': too much'}"
        )
