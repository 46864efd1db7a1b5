"""What holds for all six scripts: self-contained, in step with each other, every option documented and read."""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    "train_scan_diffusion",
    "train_text_encoder",
    "sample_outliers",
    "sample_sd_outliers",
    "train_classifier",
    "evaluate",
]
OWN_TO_EACH = {"main", "parse_args", "RECIPES"}
PACKAGE_OF = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where the import has another name


@pytest.fixture(scope="module")
def sources():
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def definitions(source):
    """Text of every function, class and upper-case constant at the top level, by name."""
    found, lines = defaultdict(str), source.splitlines()
    for node in ast.parse(source).body:
        names, first = [], node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names, first = [node.name], min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = (part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
            names = [name.id for name in named if name.id.isupper()]
        for name in names:
            found[name] += "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
    return found


def copies(sources):
    """{name: {script: text}} of what stands in two scripts or more."""
    found = defaultdict(dict)
    for script, source in sources.items():
        for name, text in definitions(source).items():
            found[name][script] = text
    return {name: texts for name, texts in found.items() if len(texts) > 1 and name not in OWN_TO_EACH}


def drifted(sources):
    return sorted(name for name, texts in copies(sources).items() if len(set(texts.values())) > 1)


def test_same_name_same_text(sources):
    assert len(copies(sources)["load_array"]) == len(SCRIPTS)
    assert drifted(sources) == []


@pytest.mark.parametrize(
    ("script", "old", "new", "name"),
    [
        ("evaluate", "os.replace(temporary, path)\n", "os.rename(temporary, path)\n", "save"),
        ("sample_sd_outliers", "(1 + w) * eps_c", "(1 - w) * eps_c", "guided_noise"),
        ("evaluate", "class Detector(nn.Module):\n", "@torch.no_grad\nclass Detector(nn.Module):\n", "Detector"),
    ],
)
def test_an_edited_copy_is_found(sources, script, old, new, name):
    assert old in sources[script]
    assert drifted(sources | {script: sources[script].replace(old, new, 1)}) == [name]


def test_an_edited_constant_is_found():
    assert drifted({"a": "LIMIT = 1\n", "b": "LIMIT = 2\n"}) == ["LIMIT"]
    assert drifted({"a": "LIMIT = 1\nRECIPES = {}\n", "b": "LIMIT = 1\nRECIPES = {1: 2}\n"}) == []


def test_copied_helpers_are_short(sources):
    for name, texts in copies(sources).items():
        for script, text in texts.items():
            assert len(text.splitlines()) <= (60 if name == "read_images" else 40), f"{script}.py: {name}"


def foreign_imports(source, requirements):
    """Imports that are neither of the standard library nor of requirements.txt, and imports by other means."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    packages = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines if line and line[0] != "-"}
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval"):
            found.append(node.id)
        for name in names:
            top = name.split(".")[0]
            package = PACKAGE_OF.get(top, top).lower().replace("_", "-")
            by_hand = top in ("importlib", "runpy", "imp")
            if by_hand or top in SCRIPTS or top not in sys.stdlib_module_names and package not in packages:
                found.append(name)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_are_required_packages(sources, script):
    assert foreign_imports(sources[script], (ROOT / "requirements.txt").read_text()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import pandas", ["pandas"]),
        ("from sample_outliers import pick", ["sample_outliers"]),
        ("from . import evaluate", ["."]),
        ("def f():\n    from sklearn.svm import SVC, LinearSVC", []),
        ("import PIL.Image, scipy.stats, json", ["scipy.stats"]),
        ("import importlib", ["importlib"]),
    ],
)
def test_a_foreign_import_is_found(sources, line, found):
    requirements = (
        "# for all\ntorch>=2.4\ntorchvision\ndiffusers\ntransformers\nnumpy\nscikit_learn  # metrics\nPillow\ntqdm\n"
    )
    source = sources["sample_outliers"]
    assert foreign_imports(source, requirements) == []
    assert foreign_imports(f"{source}\n{line}\n", requirements) == found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_where_it_is_its_own(sources, script):
    """What no other script has is at most 450 lines; the whole, with copied readers and training loop, under 950."""
    copied = sum(len(texts[script].splitlines()) + 2 for texts in copies(sources).values() if script in texts)
    assert len(sources[script].splitlines()) - copied <= 450
    assert len(sources[script].splitlines()) <= 950


class Caught(Exception):
    """Carries the parser out of parse_args()."""


@pytest.fixture(scope="module")
def options(load):
    """options(script): argparse's actions, --help left out."""

    def options(script):
        def stop(parser, *_):
            raise Caught(parser)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Caught) as caught:
                load(script).parse_args()
        return [action for action in caught.value.args[0]._actions if action.dest != "help"]

    return options


def unread(source, names):
    """Options that no function reads as args.NAME; parsing and checking them is no use of them."""
    tree, read = ast.parse(source), set()
    for part in tree.body:
        if getattr(part, "name", None) not in ("parse_recipe", "parse_args"):
            for node in ast.walk(part):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    if isinstance(node.value, ast.Name) and node.value.id == "args":
                        read.add(node.attr)
    return sorted(set(names) - read)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_read_and_explained(load, options, sources, script):
    actions, recipes = options(script), load(script).RECIPES
    names = {action.dest for action in actions}
    assert names >= {"dir", "device", "seed", "recipe", "batch_size"} and names >= set(recipes)
    assert unread(sources[script], names - {"recipe"}) == []  # that one picks the column of RECIPES
    for action in actions:
        assert action.help and len(action.help.strip()) > 8, action.dest
    for name, (text, *values) in recipes.items():
        assert text.strip() and len(values) == len(recipes["recipe"]) - 1, name
        assert len({type(value) for value in values}) == 1, f"{name} mixes types"


def test_an_option_nobody_reads_is_found(sources):
    source = sources["sample_sd_outliers"]
    assert unread(source, ["S", "w", "dead"]) == ["dead"]
    assert unread(source.replace("args.w", "2.0"), ["S", "w"]) == ["w"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(load, monkeypatch, tmp_path, capfd, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-option", "--help"])
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    path, environment, modules = list(sys.path), dict(os.environ), set(sys.modules)
    load.__wrapped__(script)  # not the module that other tests share
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), random[0]) and (np.random.get_state()[1] == random[1]).all()
    assert sys.path == path and os.environ == environment and (script in modules) == (script in sys.modules)


# First `--help` into a file, then the first steps on the real streams: one start of Python for both.
ALONE = """
import contextlib, runpy, sys
script, *args = sys.argv[1:]
sys.argv = [script, "--help"]
with open("help.txt", "w") as file, contextlib.redirect_stdout(file):
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
sys.argv = [script, *args]
runpy.run_path(script, run_name="__main__")
"""
TINY = "--data digits:0-1 --labels dataset --channels 16,16 --steps 2 --batch-size 8".split()
FIRST_STEPS = {  # options, file that is missing and script that makes it
    "train_scan_diffusion": (TINY, None, None),
    "train_text_encoder": ([], "runs/digits/diffusion", "train_scan_diffusion.py"),
    "sample_outliers": ([], "runs/digits/anchors.npy", "train_text_encoder.py"),
    "sample_sd_outliers": ([], "runs/digits/diffusion", "train_scan_diffusion.py"),
    "train_classifier": ([], "runs/digits/train.npy", "train_scan_diffusion.py"),
    "evaluate": ([], "classifier_*.pt", "train_classifier.py"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every script copied alone into an empty folder, with what it printed there: {script: (folder, process)}."""

    def start(script):
        folder = tmp_path_factory.mktemp(script)
        shutil.copy(ROOT / f"{script}.py", folder)
        command = [sys.executable, "-I", "-c", ALONE, f"{script}.py", *FIRST_STEPS[script][0]]
        return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SCRIPTS, pool.map(start, SCRIPTS), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_alone(alone, options, load, script):
    folder, process = alone[script]
    text = (folder / "help.txt").read_text() if (folder / "help.txt").exists() else process.stderr
    assert text.startswith("usage:") and load(script).__doc__.splitlines()[0] in text
    described = text.split("options:", 1)[1]
    for action in options(script):
        assert re.search(rf"^  .*{re.escape(action.option_strings[0])}\b", described, re.M), action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_first_steps_of_a_script_alone(alone, script):
    (folder, process), (_, missing, writer) = alone[script], FIRST_STEPS[script]
    if missing is None:
        assert process.returncode == 0, process.stderr
        assert {"train.npy", "pseudo_labels.npy", "diffusion"} <= {p.name for p in (folder / "runs/digits").iterdir()}
        return
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}.py: ") and missing in line and f"run {writer}" in line
    assert sorted(path.name for path in folder.iterdir()) == sorted(["help.txt", f"{script}.py"])


def code_map(text):
    """Rows of the table under "## Paper → code map" of a README, header left out, as lists of cells."""
    section = re.search(r"^## Paper → code map[ \t]*$(.*?)(?=^## |\Z)", text, re.M | re.S)
    lines = [line.strip() for line in section[1].splitlines() if line.strip().startswith("|")] if section else []
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return rows[2:]


def wrong_in_code_map(text, functions, flags):
    """What a README's map names and the scripts do not have. functions, flags: {script: names}."""
    wrong = []
    for row in code_map(text):
        if len(row) != 5:
            wrong.append(f"not five cells: {row}")
            continue
        scripts, named, options = (re.findall(r"`([^`]+)`", cell) for cell in row[2:])
        stems = [script.removesuffix(".py") for script in scripts]
        wrong += [script for script, stem in zip(scripts, stems, strict=True) if stem not in functions]
        known = [stem for stem in stems if stem in functions]
        given = [flag for option in options for flag in re.findall(r"--[A-Za-z][\w-]*", option)]
        wrong += [f"no script: {row}"] * (not scripts) + [f"no function: {row}"] * (not named)
        wrong += [name for name in named if not any(re.split(r"[.(]", name)[0] in functions[stem] for stem in known)]
        wrong += [flag for flag in given if not any(flag in flags[stem] for stem in known)]
        wrong += [f"not in backticks: {row}"] * ("--" in re.sub(r"`[^`]+`", "", row[4]))
    return wrong


@pytest.fixture(scope="module")
def names(sources, options):
    """Functions and flags of every script."""
    flags = {script: {flag for action in options(script) for flag in action.option_strings} for script in SCRIPTS}
    return {script: set(definitions(source)) for script, source in sources.items()}, flags


def test_code_map_of_the_readme(names):
    text = (ROOT / "README.md").read_text()
    assert len(code_map(text)) >= 15
    assert {script.removesuffix(".py") for row in code_map(text) for script in re.findall(r"`(\w+\.py)`", row[2])} == {
        *SCRIPTS
    }
    assert wrong_in_code_map(text, *names) == []


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("| A | energy regularisation | `train_classifier.py` | `dream_loss`, `energy` | `--beta` |", []),
        ("| B | \\|x\\| | `sample_sd_outliers.py` | `guided_noise()` | `--w`, `--sampler ddpm` |", []),
        ("| B | B5 | `evaluate.py` | `Detector.forward` | |", []),
        ("| A | energy regularisation | `train_classifier.py` | `dream_losses` | `--beta` |", ["dream_losses"]),
        ("| A | energy regularisation | `train_classifier.py` | `pick` | `--betas`, `--lam` |", ["pick", "--betas"]),
        ("| A | energy regularisation | `classifier.py` | | `--beta` |", ["classifier.py", "no function", "--beta"]),
        ("| A | energy regularisation | `train_classifier.py` | `energy` | --beta |", ["not in backticks"]),
    ],
)
def test_a_wrong_row_of_the_map_is_found(names, row, wrong):
    head = "# Title\n\n## Paper → code map\n\n| paper | step | script | function | flags |\n|---|---|---|---|---|\n"
    found = wrong_in_code_map(f"{head}{row}\n\n## Next\n\n| a | b |\n|---|---|\n| `x` | y |\n", *names)
    assert len(found) == len(wrong)
    for message, expected in zip(found, wrong, strict=True):
        assert message.startswith(expected)
