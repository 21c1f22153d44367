"""The program `dopsd`: registers the commands, which are plain functions in the files beside this.

Importing it loads no torch; a command imports what it needs when it is called.
"""

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from dopsd.cli import adapter, compare, data, evaluate, generate, share, tools, train
from dopsd.cli.console import say
from dopsd.cli.options import OnceCommand, guarded, unwrapped

HELP = """Tune few-step text-to-image models without losing the few steps.

Exit codes: 0 success; 1 a bug in dopsd, with its traceback; 2 the input cannot be used, or memory
ran out; 3 training stopped because the model lost its few-step health; 130 or 143 stopped by Ctrl-C
or SIGTERM."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=unwrapped(HELP)
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"dopsd {installed_version('dopsd')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for name, command in {
    "init": tools.init,
    "check": train.check,
    "preflight": train.preflight,
    "train": train.train,
    "sample": generate.sample,
    "fuse": generate.fuse,
    "export": share.export,
    "upload": share.upload,
    "compare": compare.compare,
    "evaluate": evaluate.evaluate,
    "prompts": evaluate.prompts,
    "import": data.import_,
    "caption": data.caption,
    "inspect": tools.inspect,
    "list": tools.list_methods,
    "schema": tools.schema,
    "doctor": tools.doctor,
    "demo": compare.demo,
}.items():
    app.command(name, cls=OnceCommand)(guarded(command))

group = typer.Typer(no_args_is_help=True, help=adapter.HELP)
group.callback()(adapter.group)
group.command("train", cls=OnceCommand)(guarded(adapter.train_adapter))
app.add_typer(group, name="adapter")
