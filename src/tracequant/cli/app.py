"""The program `tracequant`: its commands, its exit codes, and how errors and warnings are printed."""

from __future__ import annotations

import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tracequant.cli import commands, deploy, examine, plan
from tracequant.cli.help import SettingsCommand
from tracequant.cli.options import with_settings
from tracequant.cli.printing import escape
from tracequant.cli.spelling import in_shell_words
from tracequant.core.errors import SettingsError, TracequantError
from tracequant.core.version import VERSION

INTERRUPTED = 130  # the shells' exit code for SIGINT

_errors = Console(stderr=True, highlight=False)

_COMMANDS: dict[str, Callable[..., None]] = {
    "run": commands.run,
    "demo": commands.demo,
    "analyze": commands.analyze,
    "plan": plan.plan,
    "quantize": commands.quantize,
    "finetune": commands.finetune,
    "pack": commands.pack,
    "evaluate": commands.evaluate,
    "report": examine.report,
    "export": deploy.export,
    "verify": deploy.verify,
    "inspect": deploy.inspect,
    "latency": deploy.latency,
    "check": examine.check,
    "compare": examine.compare,
    "spectrum": examine.spectrum,
    "figures": examine.figures,
    "presets": plan.presets,
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tracequant {VERSION}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """
    Choose the bit width of every layer from the curvature of the loss, then quantize, fine-tune, pack and report.

    To try it, run tracequant demo. For your own model, write a function that returns a tracequant.TaskSetup and pass
    --task path/to/file.py:function.
    """


def _program() -> typer.Typer:
    """All commands as one program."""
    program = typer.Typer(
        name="tracequant",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # the boxes cut long option names short
    )
    program.callback()(_main)
    for name, command in _COMMANDS.items():
        program.command(name, cls=SettingsCommand)(with_settings(command))
    return program


app = _program()


def main() -> None:
    """Run the program on the arguments of the shell, and exit."""
    sys.exit(run_guarded(app))


def run_guarded(command: Callable[[], Any]) -> int:
    """The exit code of a command after running it. An error that tracequant can explain is printed as one message.

    Any other error comes from the user's code, or is a defect: it is raised and has its traceback.
    """
    warnings.showwarning = _show_warning
    try:
        command()
    except TracequantError as error:
        _print_error(in_shell_words(str(error), error.argument if isinstance(error, SettingsError) else None))
        return 2
    except OSError as error:
        if not _is_ours(error):
            raise
        _print_error(str(error))  # a path that cannot be made or written, a full disk
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:  # typer has caught the interrupt
            return _interrupted()
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return 0


def _is_ours(error: OSError) -> bool:
    """Whether an operating system error arose in tracequant itself, and not in a user's task, loader or model.

    The last frame that is in no library decides: a user's dataset that opens a file by PIL is the user's. A worker of a
    DataLoader has no frames here, and the error that torch raises for it is the user's too.
    """
    package = Path(__file__).resolve().parents[1]
    libraries = [Path(path).resolve() for path in sysconfig.get_paths().values()]
    ours = True
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        in_library = not path.is_file() or any(library in path.parents for library in libraries)
        if package in path.parents:
            ours = True
        elif not in_library or "torch/utils/data" in path.as_posix():
            ours = False
    return ours


def _print_error(text: str) -> None:
    _errors.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def _interrupted() -> int:
    _errors.print("interrupted; finished stages are kept, run the same command to resume", style="yellow")
    return INTERRUPTED


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        _errors.print(f"[yellow]warning:[/] {escape(in_shell_words(str(message)))}", soft_wrap=True)
