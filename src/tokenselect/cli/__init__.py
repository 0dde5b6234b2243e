"""The command line: `tokenselect generate | chat | inspect | info | bench | demo | eval | serve`.

Heavy libraries are imported by the commands that need them, so that help and completion are quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import tokenselect
from tokenselect.cli import bench, chat, demo, eval, generate, info, inspect, serve
from tokenselect.cli.errors import failure
from tokenselect.cli.flags import command

app = typer.Typer(
    name="tokenselect",
    help="Read contexts far beyond a language model's trained window, fast and without training.",
    rich_markup_mode=None,  # its tables cut the names of long flags
    pretty_exceptions_enable=False,
)
app.command("generate")(command(generate.generate))
app.command("chat")(command(chat.chat))
app.command("inspect")(command(inspect.inspect))
app.command("info")(command(info.info))
app.command("bench")(command(bench.bench))
app.command("demo")(command(demo.demo))
app.command("eval")(command(eval.evaluate))
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command(serve.serve))


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False,
) -> None:
    if version:
        print(f"tokenselect {tokenselect.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line; ends the process.

    Exit codes: 0; 2 after a mistake of the caller, told in one sentence on stderr; 130 after Ctrl-C; 1 when
    the reader of stdout has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows "?"
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here a reader who has gone can be noticed in peace
        sys.exit(code or 0)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(failure(error))
