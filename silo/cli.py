"""The ``silo`` command: finds its subcommands when they are called, and turns errors into one line.

Subcommands are named by import strings, so that ``silo --help`` loads neither torch nor a JVM, and so that this
package, the lowest layer, imports none of those above it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click

from silo.errors import SiloError

COMMANDS = {
    "corpus": ("silo.corpus_cli:corpus", "Collect licensed text and audit it."),
    "train": ("training.cli:train", "Train a model on permissively licensed text."),
    "datastore": ("datastore.cli:datastore", "Build, change and verify a store of restricted text."),
    "eval": ("eval.cli:evaluate", "Measure perplexity with and without the store."),
    "generate": ("datastore.generate_cli:generate", "Write text, and say which documents it comes from."),
    "quickstart": ("eval.quickstart_cli:quickstart", "Run the whole of SILO on real packages, in minutes."),
}
"""Name → (where it lives, what ``silo --help`` says of it)."""

LOAD = "datastore.loading:load"
"""What ``silo.load`` is."""

STORE_TEXTS = "datastore.texts:documents_of_store"
"""Reads a store's documents, for commands of this layer that are given one."""


class LazyGroup(click.Group):
    """A group whose commands are imported only when one of them is called, and whose errors are one line each."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and leave with the exit status; wrong use says in one line what is wrong and where help is."""
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # no name is lost because a terminal lacks a letter
        try:
            with _warnings_of_one_line():
                status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else self.name
            fail(f"{error.format_message().rstrip('.')}; see `{path} --help`", error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except click.Abort:
            fail("interrupted", 1)
        except OSError as error:  # of --help; commands catch their own
            unsaid(error, None)
        sys.exit(status if isinstance(status, int) else 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        return named(COMMANDS[cmd_name][0])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group("silo", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="silo-lm")
def main() -> None:
    """A language model whose legal risk lives in files that can be deleted.

    The weights learn only from permissively licensed text; everything else lives in a store beside the model, one
    shard per rights holder, read at inference time and gone when the holder says so.
    """


class Finite(click.FloatRange):
    """A number in a range that is neither nan, which no range refuses, nor without end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the number."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, ctx)
        return found


def named(target: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def reports(render: Callable[[Any], None]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a function that returns a JSON value into a command body with ``--json``.

    With ``--json`` the value is printed as one JSON document on stdout; else ``render`` shows it to a person.
    A :class:`SiloError` becomes one line on stderr and the exit status that its class carries.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
        @functools.wraps(function)
        def command(*args: Any, as_json: bool, **kwargs: Any) -> None:
            try:
                value = function(*args, **kwargs)
            except SiloError as error:
                fail(str(error), error.exit_code)
            except OSError as error:
                fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
            try:
                click.echo(json_line(value)) if as_json else render(value)
            except OSError as error:
                if error.errno == errno.EPIPE:  # who read it wants no more: click leaves without a word
                    raise
                unsaid(error, value)

        return command

    return decorate


def json_line(value: Any) -> str:
    """A value as JSON, with escapes if stdout's encoding lacks one of its letters."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def unsaid(error: OSError, value: Any) -> None:
    """Leave because a result cannot be written, and say what has become of what was asked for."""
    receipt = value.get("receipt") if isinstance(value, dict) else None
    done = "" if value is None else "; what was asked for is done, and only its report is missing"
    if receipt:
        done = f"; the change is committed, with the receipt {receipt}"
    with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())  # Python writes what is left when it ends, and would fail anew
    fail(f"standard output: {error.strerror or error}{done}", 1)


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Let a warning be as long as an error is, without the line of code that it comes from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def fail(message: str, exit_code: int) -> None:
    """Say what is wrong in one line on stderr and leave."""
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
