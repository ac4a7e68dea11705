"""The command line: what it prints, and one clear line with exit code 2 for each of a user's mistakes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from tyro.conf import arg

from modeclip import __main__ as entry
from modeclip.__main__ import _interrupt
from modeclip.commands import COMMANDS, PIPE_CLOSED, load_command, main, read_summaries
from modeclip.curation.curating import METHODS
from modeclip.errors import in_one_line
from modeclip.system.console import log, print_json, print_lines, print_table
from modeclip.system.options import call
from support import plain_png, write_pairs

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def heart(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real picture of a heart, as a file."""
    from modeclip.data.catalog import Catalog

    catalog = Catalog.open(small_run / "catalog.lance")
    [row, *_] = catalog.select(caption="heart")
    path = tmp_path_factory.mktemp("picture") / "heart.png"
    path.write_bytes(catalog.read(["image"], rows=[row] if isinstance(row, int) else row.reshape(1))["image"][0])
    return path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail; return its one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("modeclip: error: ")
    return line


def test_the_reference_has_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    told = re.findall(r"<!-- help: (.+) -->", page)
    methods = [f"curate {name}" for name in (*METHODS, "compare")]
    assert set(told) == {"modeclip", *COMMANDS, *methods, "search build", "search add", "search remove"}
    assert re.findall(r"^## (.+)", page, re.MULTILINE) == list(dict.fromkeys(name.split()[0] for name in told[1:]))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_each_option_means(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: modeclip {command} " in shown
    assert inspect.getdoc(load_command(command)) == read_summaries()[command]
    assert "``" not in shown
    options = re.split(r"^. (?=--?[a-z])", shown, flags=re.MULTILINE)[1:]
    for option in options:
        text = re.sub(r"[│╭╮╰╯─]", " ", option.partition("\n\n")[0])
        words = [word for word in text.split() if not word.startswith(("-", "(", "[", "{")) and not word.isupper()]
        assert len(words) > 2, option


def test_help_lists_all_commands_without_importing_one() -> None:
    code = (
        "import sys\n"
        "from modeclip.commands import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print(sorted(name for name in sys.modules if name.startswith(('modeclip.', 'numpy', 'torch'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, imported = done.stdout.splitlines()
    listed = re.findall(r"^. +• ([a-z-]+) +[A-Z]", "\n".join(shown), flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    assert not {name.split(".")[1] for name in ast.literal_eval(imported)} - {"commands", "errors", "system"}


def test_configs_and_help_of_commands_need_no_large_library() -> None:
    code = (
        "import sys\n"
        "from modeclip.commands import COMMANDS, load_command\n"
        "for name in COMMANDS:\n    load_command(name)\n"
        "print(sorted({'torch', 'lance', 'open_clip', 'sentence_transformers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_shell_completes_the_options_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", "bash"])
    assert {"--sweep-experts", "--mask-same-captions"} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_an_unknown_command_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["clustre"])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search("unknown command 'clustre'; nearest: cluster, .*modeclip --help", line)


WORDS_THAT_DO_NOT_FIT = {
    "cluster x --expert 4": r"unknown option '--expert'; nearest: --experts, .*modeclip cluster --help",
    "cluster x --expert=4": r"unknown option '--expert'; nearest: --experts, ",
    "status a b": "unexpected 'b'.*modeclip status --help",
    "finetune a": "missing CATALOG and --out",
    "train-experts a --order ranges": "value of --order 'ranges'; known: index, range, size",
    "finetune a b --out c --epochs many": "--epochs: expected a whole number, got 'many'",
    "finetune a b --out c --epochs=1.5": "--epochs: expected a whole number, got '1.5'",
    "uids a --expert none": "--expert: expected a whole number or None, got 'none'",
    "train a --weight-decay": "--weight-decay: expected a number, got none",
    "train a --micro-batch most": "--micro-batch: expected a whole number or auto, got 'most'",
    "train a --batch_size many": "--batch-size: expected a whole number, got 'many'",
    "train-experts a --only one": "--only: expected a whole number each, got 'one'",
    "search remove x --where caption=bird --where key<'020'": "--where: given 2 times, expected once; .* one --where",
    "uids x --out y --where=a --where b": "--where: given 2 times",
    "evaluate x --tasks a --tasks b": "--tasks: given 2 times",
    "evaluate x --tasks a --rule eq6 --rule paper --rule=top1": "--rule: given 3 times",
    "classify x y --template {} --template a": "--template: given 2 times",
    "bundle x --put expert-0=a --put expert-1=b": "--put: given 2 times",
    "search x --not a --not b": "--not: given 2 times",
    "train-experts x --only 1 --only 2": "--only: given 2 times",
    "--verbose": "unknown option '--verbose'; known: --help, --version",
}


@pytest.mark.parametrize("words", WORDS_THAT_DO_NOT_FIT)
def test_words_that_fit_no_option_are_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(WORDS_THAT_DO_NOT_FIT[words], line), line


SETTINGS_OF_COMMANDS = {
    "train x --batch-size 1": "--batch-size must be at least 2",
    "train x --seed-parts 99": r"--seed-parts must lie in 1 to 31 \(--total-parts - 1\)",
    "train x --save-every often": "--save-every must be",
    "cluster x --experts 0": "--experts: expected 1 or more",
    "cluster x --fine 2 --experts 4": "--experts: expected at most --fine, which is 2",
    "index x --holdout-fraction 2": "--holdout-fraction: expected",
    "evaluate x --tasks y --batch-size 0": "--batch-size: expected",
    "evaluate x --tasks y --probe-c 0": "--probe-c: expected",
    "finetune x y --out z --tolerance 2": "--tolerance",
    "finetune x y --out z --holdout imag": "--holdout: expected image,.* got 'imag'",
    "finetune x y --out z --holdout-fraction 1": "--holdout-fraction",
    "merge x y --out z --batch-size 0": "--batch-size",
    "scaling x --num-resamples 0": "--num-resamples",
}


@pytest.mark.parametrize("words", SETTINGS_OF_COMMANDS)
def test_a_command_calls_its_settings_by_its_options(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(SETTINGS_OF_COMMANDS[words], fails(capsys, *words.split()))


def test_a_field_of_a_recipe_keeps_its_name_in_a_path_and_in_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'train.samples'" in fails(capsys, "train", "train.samples")
    assert "/data.tasks" in fails(capsys, "train", tmp_path / "data.tasks")
    recipe = write_recipe(tmp_path, "data: {source: icons}\ntrain: {batch_size: 1}")
    assert "train.batch_size must" in fails(capsys, "run", recipe, "--out", tmp_path / "run")


def test_what_a_command_prints_calls_settings_by_its_options_and_json_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(samples: Annotated[int, arg(name="pairs")] = 1, batch_size: int = 2) -> None:  # noqa: ARG001
        log(f"raise train.samples ({samples})")
        print_lines("train.batch_size or batch_size")
        print_table("t", ["a"], [["in (train.samples)"], ["'train.samples'"], ["x/train.samples"], ["train.seed"]])
        print_json({"train.samples": "train.samples"})

    call(command, [])
    out, err = capsys.readouterr()
    assert err == "raise --pairs (1)\n"
    for text in (
        "--batch-size or batch_size",
        " in (--pairs) ",
        " 'train.samples' ",
        " x/train.samples ",
        " train.seed ",
    ):
        assert text in out
    assert '{\n "train.samples": "train.samples"\n}' in out
    log("train.samples")
    assert capsys.readouterr().err == "train.samples\n"


def test_the_version_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert re.fullmatch(r"modeclip \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_one_of_several_processes_prints_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main(["train", "nowhere"])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_classify_prints_table_and_json(
    small_run: Path, heart: Path, tmp_path: Path, modeclip_command: Command
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("heart\narrow left\nbell\n")
    done = modeclip_command("classify", small_run / "bundle", heart, "--classes", classes)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("heart", "arrow left", "bell", "probability"))
    done = modeclip_command("classify", small_run / "bundle", heart, "--classes", "heart,arrow left,bell", "--json")
    [picture] = json.loads(done.stdout)
    assert sum(entry["probability"] for entry in picture["classes"]) == pytest.approx(1, abs=1e-5)


def test_route_prints_weights_clusters_and_entropy(small_run: Path, modeclip_command: Command) -> None:
    words = ("route", small_run / "bundle", "--classes", "heart,arrow left", "--rule", "eq6")
    done = modeclip_command(*words)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("heart", "expert-0", "expert-1", "rule eq6", "entropy", "distance"))
    content = json.loads(modeclip_command(*words, "--json").stdout)
    assert sum(content["weights"]) == pytest.approx(1)
    assert content["rule"] == "eq6"
    assert content["classes"][0]["clusters"][0]["captions"]


def write_recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


RECIPE_MISTAKES = {
    "data: {source: nowhere}": "nowhere",
    "data: {source: icons, train_sets: [emoji]}": "icon set 'emoji'.*known: ",
    "data: {sauce: icons}": r"field 'data\.sauce'.*known: source, ",
    "dota: {source: icons}": "field 'dota'.*known: name, data, ",
    "train: {samples: 4096}": "data: .*required",
    "data: {source: icons}\ndata: {source: there}": "line 2: 'data' stands twice, first in line 1",
    "data: {source: icons}\ntrain:\n  samples: 4096\n  seed: 1\n  samples: 8192": "line 5: 'samples' .*in line 3",
    "data: {source: icons, source: there}": "'source' stands twice",
    "data: {source: icons}\ntrain: {samples: many}": r"train\.samples: .*integer.*'many'",
    "data: {source: icons}\ntrain: {batch_size: 1}": r"train\.batch_size.*at least 2",
    "data: {source: icons}\nexperts: {budget: free}": r"experts\.budget: .*'paper' or 'matched'.*'free'",
    "data: {source: icons}\nevaluate: {rule: best}": "rule 'best'.*known: paper, eq6",
    "data: {source: icons}\nembed: {encoder: bert}": "encoder 'bert'.*known: auto, minilm",
    "data: {source: icons}\ntrain: {model: ViT-Z}": "model 'ViT-Z'.*known: modeclip-icon, modeclip-icon-s",
    "- a list": "expected .*`data:`.*got a list",
    "data: {source: [": "no valid YAML",
}


@pytest.mark.parametrize(("text", "message"), RECIPE_MISTAKES.items())
def test_mistakes_in_a_recipe(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "run", write_recipe(tmp_path, text), "--out", tmp_path / "run")
    assert re.search(message, line)


def test_more_clusters_than_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    text = f"data: {{source: {own_folder}}}\ncluster: {{num_fine: 100}}\ntrain: {{samples: 512, batch_size: 16}}"
    line = fails(capsys, "run", write_recipe(tmp_path, text), "--out", tmp_path / "run")
    assert "num_fine" in line
    assert "100" in line


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Twenty pairs in a folder."""
    images = [plain_png((12 * i, 0, 99), (32, 32)) for i in range(20)]
    return write_pairs(tmp_path / "pairs", images, [f"colour {i}" for i in range(20)])


def test_mistakes_in_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    """Each kind of source, with what users get wrong in it."""
    (tmp_path / "pairs.csv").write_text("picture,words\npairs/000.png,colour\n")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for picture in own_folder.glob("*.png"):
            tar.add(picture, picture.name)
    mistakes = {
        "none": "none",
        "none.csv": r"none\.csv",
        "pairs.csv": r"no image column 'filepath'.*picture, words.*set data\.image_column",
        "0.tar": r"0\.tar",
    }
    for source, message in mistakes.items():
        line = fails(capsys, "run", write_recipe(tmp_path, f"data: {{source: {source}}}"), "--out", tmp_path / "run")
        assert re.search(message, line)
        assert not (tmp_path / "run" / "catalog.lance").exists()
    for i in range(5):
        (own_folder / f"{i:03d}.png").write_bytes(b"")
    line = fails(capsys, "run", write_recipe(tmp_path, f"data: {{source: {own_folder}}}"), "--out", tmp_path / "run")
    assert "image is empty (0 bytes)" in line


@pytest.mark.parametrize("command", ["scaling", "evaluate"])
@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--out", "file", "folder is needed where a file is.*another path"),
        ("--out", "file/below", "folder is needed where a file is.*another path"),
        ("--out", "n" * 300, "name too long.*shorter name"),
        ("--cache", "file", "folder is needed where a file is.*another path"),
    ],
)
def test_a_place_that_cannot_be_written_to(
    command: str, option: str, place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "scaling" and option == "--cache":
        return
    (tmp_path / "file").write_text("kept")
    rows = [{"name": "s", "family": "dense", "compute": 10.0**n, "error": 0.9 / n} for n in (1, 2, 3)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task" / "cat").mkdir(parents=True)
    (tmp_path / "task" / "cat" / "1.png").write_bytes(b"never opened")
    given: dict[str, list[object]] = {
        "scaling": [tmp_path / "results.jsonl", "--num-resamples", 9],
        "evaluate": ["modeclip-icon", "--random-weights", "--tasks", tmp_path / "task"],
    }
    line = fails(capsys, command, *given[command], option, tmp_path / place)
    assert re.search(f"{tmp_path / place}.*{message}$", line)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "x"), "x: permission denied.*another path"),
        (IsADirectoryError(21, "Is a directory", "x"), "x: is a directory.*file is needed.*another path"),
        (OSError(28, "No space left on device"), "no space left on device.*free some space"),
        (IsADirectoryError(21, "Is a directory", "x.part", None, "x"), r"x\.part -> x: is a directory.*file is needed"),
        (OSError("the\nHub is silent"), "the Hub is silent"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: OSError, line: str) -> None:
    assert re.match(line, in_one_line(error))


@pytest.mark.parametrize("words", [("index", "--help"), ("scaling", "results.jsonl", "--json")])
def test_a_reader_that_has_seen_enough_is_no_error(words: tuple[str, ...], tmp_path: Path) -> None:
    rows = [{"name": "s", "family": "dense", "compute": 10.0**n, "error": 0.9 / n} for n in (1, 2, 3)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "modeclip", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


@pytest.fixture(scope="module")
def foreign_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog whose captions are not in ASCII."""
    folder = tmp_path_factory.mktemp("foreign")
    write_pairs(folder / "pairs", [plain_png(grey) for grey in range(3)], ["猫", "café", "猫"])
    main(["index", str(folder / "pairs"), "--out", str(folder / "catalog")])
    return folder / "catalog"


def test_output_that_is_not_utf8_shows_escapes(foreign_catalog: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}

    def check(*words: str) -> str:
        command = [sys.executable, "-m", "modeclip", "check", str(foreign_catalog), "--out", str(tmp_path), *words]
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        return done.stdout.decode("ascii")

    assert "'\\u732b', 2 times" in check()
    first = [finding["first"] for finding in json.loads(check("--json"))["findings"]]
    assert any("'猫', 2 times" in place for place in first)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_nothing(closed: str, foreign_catalog: Path, tmp_path: Path) -> None:
    command = f'"$0" -m modeclip check "$1" --out "$2" {closed}'
    subprocess.run(["sh", "-c", command, sys.executable, str(foreign_catalog), str(tmp_path)], check=True)
    assert "猫" in (tmp_path / "check.html").read_text(encoding="utf-8")


def test_output_to_a_full_disk_is_one_line(foreign_catalog: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modeclip", "check", str(foreign_catalog), "--out", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert subprocess.run(command, stderr=full, stdout=subprocess.PIPE, check=False).returncode == 2
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("modeclip: error: no space left")
    assert "Traceback" not in done.stderr


def test_arguments_that_are_not_utf8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["route", "x", "--classes", "caf\udce9,dog"], ["index", "x", "--out", "o\udce9"], ["\udce9"]):
        assert re.search(r"\\udce9.*: expected UTF-8", fails(capsys, *words))


def test_ctrl_c_during_an_import(tmp_path: Path) -> None:
    """The process ends at once, with one line; a package that the command line imports presses the key."""
    (tmp_path / "tyro.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "modeclip", "index", "--help"]
    # As in a terminal: in a shell's background Ctrl-C is ignored, and a new process inherits that.
    as_in_a_terminal = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    started = [sys.executable, "-c", as_in_a_terminal, *command]
    done = subprocess.run(started, capture_output=True, env=environment, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "modeclip: interrupted\n")


def test_ctrl_c_otherwise_is_left_to_the_command() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupt(2, sys._getframe())


def test_mistakes_in_other_arguments(
    small_run: Path, heart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_run / "bundle"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "model").mkdir()
    (tmp_path / "task" / "cat").mkdir(parents=True)
    (tmp_path / "task" / "cat" / "1.png").write_bytes(b"never opened")
    on_task = ("--tasks", tmp_path / "task", "--out", tmp_path / "out")
    (tmp_path / "model" / "open_clip_config.json").write_text("{")
    (tmp_path / "model" / "open_clip_model.safetensors").write_bytes(b"")
    mistakes = {
        ("run", tmp_path / "none.yaml"): r"none\.yaml: no such file",
        ("route", tmp_path, "--classes", "a,b"): r"no bundle.*mode\.json is missing",
        ("route", bundle, "--classes", tmp_path / "none.txt"): r"none\.txt: no such file",
        ("route", bundle, "--classes", "a,b", "--rule", "best"): "rule 'best'.*known: paper, eq6",
        ("route", bundle, "--classes", "a,b", "--rule", "eq6", "--temperature", "0"): "temperature: expected.*got 0",
        ("classify", bundle, tmp_path / "none.png", "--classes", "a,b"): r"none\.png: no such file",
        ("classify", bundle, tmp_path / "text.png", "--classes", "a,b"): "does not decode",
        ("classify", bundle, heart, "--classes", "a,b", "--template", "x"): r"template 'x' has no \{\}",
        ("classify", bundle, heart, "--classes", "a,b", "--top", "0"): "top: expected 1 .*got 0",
        ("classify", bundle, heart, "--classes", "a,b", "--top", "-1"): "top: expected 1 .*got -1",
        ("route", bundle, "--classes", "a,b", "--max-memory", "nan"): "--max-memory: .*GB above 0.*got nan",
        ("route", bundle, "--classes", "a,b", "--max-memory", "inf"): "--max-memory: .*GB above 0.*got inf",
        ("evaluate", "", *on_task): "model '' is empty.*give a bundle",
        ("evaluate", "x=", *on_task): "model 'x' is empty.*give a ",
        ("evaluate", "/", *on_task): r"open_clip_config\.json is missing",
        (
            "evaluate",
            "modeclip-icon",
            "--random-weights",
            "--tasks",
            f"{'t' * 240}={tmp_path}/task",
            *on_task[2:],
        ): "1 problem, named above",
        ("evaluate", tmp_path / "model", *on_task): r"no JSON \(Expecting",
        ("evaluate", bundle, "--tasks", "pets", "--batch-size", "0"): "batch-size: expected 1 .*got 0",
        ("report", tmp_path): r"no results\.json in",
        ("train", tmp_path / "job.json"): r"job\.json: no such file",
    }
    for words, message in mistakes.items():
        assert re.search(message, fails(capsys, *words))


def test_threads_wait_briefly_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeclip.commands.main", lambda: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    entry.main()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    entry.main()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    entry.main()
    assert os.environ["GOMP_SPINCOUNT"] == entry.SPINS
