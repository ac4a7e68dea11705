"""The command line: each command parses, calls one function and prints what it returns; no logic of its own.

A user's mistake is one line on standard error and exit code 2. Results go to standard output, as a table or with
``--json``; progress goes to standard error.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from modeclip.commands.adapting import finetune, merge
from modeclip.commands.data import check, cluster, embed, index, uids
from modeclip.commands.evaluating import evaluate
from modeclip.commands.extending import assign, bundle, extend
from modeclip.commands.interchange import compare
from modeclip.commands.routing import classify, route
from modeclip.commands.scaling import scaling
from modeclip.commands.training import status, train, train_experts
from modeclip.errors import ModeclipError, in_one_line
from modeclip.system.console import console, log, print_json, print_table

PIPE_CLOSED = 128 + 13
"""Exit code of a command whose reader has gone (SIGPIPE is 13), as shells give it."""
Json = Annotated[bool, arg(name="json", help="Print JSON for machines instead of a table.")]


def demo(out: Annotated[Path, arg(help="Folder of the run.")] = Path("runs/demo"), *, as_json: Json = False) -> None:
    """Run the whole method on real icons and open the report: `modeclip run` of a recipe that ships with modeclip."""
    from modeclip.pipeline import demo_recipe

    run(demo_recipe(), out, as_json=as_json)
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
        webbrowser.open((out / "report.html").resolve().as_uri())


def run(
    recipe: Positional[Annotated[Path, arg(help="Recipe (YAML); docs/own-data.md has every field.")]],
    out: Annotated[Path | None, arg(help="Folder of the run; default: runs/NAME.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages, leaving out what is already done; a killed run continues where it was."""
    from modeclip import pipeline

    loaded = pipeline.load_recipe(recipe)
    result = pipeline.run(loaded, out or Path("runs") / loaded.name)
    if as_json:
        print_json(result.results)
        return
    _print_results(result.results)
    print(f"bundle: {result.bundle}\nreport: {result.report}")


def report(
    folder: Positional[Annotated[Path, arg(help="Folder of a run.")]],
    out: Annotated[Path | None, arg(help="The HTML file; default: report.html in the folder.")] = None,
) -> None:
    """Write the report of a run again."""
    from modeclip.pages.run_report import write_report

    if not (folder / "results.json").is_file():
        raise ModeclipError(f"{folder} is no finished run: results.json is missing; `modeclip run` makes it")
    print(write_report(folder, out))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the ``modeclip`` command calls."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    functions: list[Any] = [demo, run, index, check, uids, embed, cluster, train, train_experts, status, route]
    functions += [classify, evaluate, compare, scaling, report, assign, extend, bundle, finetune, merge]
    commands: dict[str, Any] = {function.__name__.replace("_", "-"): function for function in functions}
    description = "CLIP data experts: cluster, train, route, evaluate."
    try:
        try:
            tyro.extras.subcommand_cli_from_dict(commands, prog="modeclip", description=description, args=arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is still ours to handle
    except ModeclipError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        _fail(in_one_line(error))
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to continue")
        raise SystemExit(130) from None


def _fail(message: str) -> None:
    print(f"modeclip: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _print_results(results: dict[str, Any]) -> None:
    """Print the result table: a row a model, accuracies in percent."""
    tasks = [task["name"] for task in results["tasks"]]
    if not tasks:
        log("no held-out tasks in the recipe (data.tasks or data.holdout_fraction): nothing was evaluated")
        return
    rows = []
    for model in results["models"]:
        name = f"{model['name']}, {model['rule']}" if model["rule"] else model["name"]
        low, high = model["interval"]
        entropy = f"{sum(model['entropy'].values()) / len(tasks):.2f}" if model["entropy"] else ""
        rows.append(
            (
                f"{name} *" if model["default"] else name,
                f"{model['samples']:,}",
                f"{100 * model['average']:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                *(f"{100 * model['accuracy'][task]:.1f}" for task in tasks),
                entropy,
            )
        )
    title = (
        f"{results['name']}: zero-shot accuracy in % on held-out tasks, seed {results['seed']} (95 %: bootstrap over "
        "the images; *: default rule; best single and oracle look at the labels)"
    )
    print_table(title, ["model", "samples", "average", "95 %", *tasks, "entropy"], rows)


if __name__ == "__main__":
    main()
