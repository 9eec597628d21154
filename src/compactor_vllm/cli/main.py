"""`compactor-vllm`: the application that joins the commands, and the entry point of the installed script."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from compactor_vllm.cli import bench, calibrate, chat, contexts, demo, env, evaluate, generate, models, serve
from compactor_vllm.cli.console import fail
from compactor_vllm.cli.many_values import ManyValues
from compactor_vllm.errors import CompactorError

app = typer.Typer(
    name="compactor-vllm",
    help="Run language models with a compressed KV cache: what matters stays, the memory of the rest is freed.",
    epilog="Start with `compactor-vllm demo`, which needs no account and no GPU. "
    "`compactor-vllm generate --help` shows how to ask about a document of your own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("generate", epilog=generate.EPILOG)(generate.generate)
app.command("chat", epilog=chat.EPILOG)(chat.chat)
app.command("compress", epilog=contexts.COMPRESS_EPILOG)(contexts.compress)
app.command("ask", epilog=contexts.ASK_EPILOG)(contexts.ask)
app.command("serve", epilog=serve.EPILOG, context_settings=serve.CONTEXT_SETTINGS)(serve.serve)
app.add_typer(evaluate.app, name="eval")
app.command("calibrate", cls=ManyValues, epilog=calibrate.EPILOG)(calibrate.calibrate)
app.add_typer(bench.app, name="bench")
app.command("models", epilog=models.EPILOG)(models.models)
app.command("env")(env.env)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"compactor-vllm {version('compactor-vllm')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line (the process's own if None) and leaves with its exit code.

    0: done; 1: the demo's full cache answered wrong; 2: something that the user can mend, said in one line on
    standard error.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="compactor-vllm")
    except CompactorError as error:
        fail(error)
