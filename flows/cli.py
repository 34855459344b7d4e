"""The command line, ``tripoise``: which commands there are, and how each ends."""

import gc
import os
import signal
import sys
from typing import Final, NoReturn

import typer

from flows.commands import store
from flows.commands.bench import bench
from flows.commands.convert import convert
from flows.commands.deploy import deploy
from flows.commands.evaluate import evaluate
from flows.commands.extract_lora import extract_lora
from flows.commands.merge import merge
from flows.commands.plan import plan
from flows.commands.publish import publish
from flows.commands.reevaluate import reevaluate
from flows.commands.serve import serve
from flows.commands.sweep import sweep
from flows.commands.train import train
from flows.commands.trigger import trigger
from merging_core.errors import MergeError

# Heavy libraries are imported inside the commands that need them: `tripoise --help` stays instant.

app = typer.Typer(
    name="tripoise",
    help="Balance helpfulness, honesty and harmlessness of language models by merging experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    merge,
    evaluate,
    bench,
    sweep,
    train,
    reevaluate,
    plan,
    publish,
    convert,
    extract_lora,
    serve,
    deploy,
    trigger,
):
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(store.app, name="store")

_INTERRUPTED: Final = 130
# What a wrong command line raises; typer carries its own copy of click or uses the installed one, by release.
_UsageError: Final[type[Exception]] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run the command line; every error that Tripoise raises on purpose becomes one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Importing torch makes many objects and no garbage; looking for some takes a fifth of the start.
    gc.set_threshold(100_000)
    if not sys.stderr.isatty():
        # Read by tqdm and huggingface_hub when they are imported: no bars in a log file.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(standalone_mode=False)
    except MergeError as error:
        _fail(" ".join(str(error).split()))
    except _UsageError as error:
        if not str(error):
            sys.exit(2)  # there were no arguments, and the help has been printed
        message: str = error.format_message()  # type: ignore[attr-defined]
        _fail(f"{' '.join(message.split())} See tripoise --help.", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. Check the path, its permissions and the space on its disk.")
    except Exception as error:
        if os.environ.get("TRIPOISE_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        _fail(f"unexpected {type(error).__name__}: {text} Set TRIPOISE_TRACEBACK=1 to see where, and report it.", 70)
    if code == _INTERRUPTED:  # typer turns most interrupts into this code by itself
        _fail("interrupted; run the same command again to go on.", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"tripoise: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
