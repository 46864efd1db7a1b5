"""What holds for all six scripts: alone, in step with each other, in one order, small to read."""

import argparse
import ast
import builtins
import io
import itertools
import re
import shutil
import subprocess
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = list(SOURCES)
README = (ROOT / "README.md").read_text()
TOKENS = {"train_scan_diffusion": 8000, "train_classifier": 6000, "evaluate": 6500}  # else 5000
OWN = {"main", "parse_args", "RECIPES"}  # of each script
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # imported by another name
PLUMBING = "# ---- plumbing: not the paper's method; same name, same text in every script ----"
BELOW = "simclr_view strong_view knn training_steps distribute run_job VisionTransformer load_vit"


def code_tokens(source):
    """Lines of all names, operators, numbers and strings but docstrings; an f-string is one."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add((node.lineno, node.col_offset))
    opening = getattr(tokenize, "FSTRING_START", -1)  # from Python 3.12
    kinds = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING, opening}
    lines = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if depth == 0 and token.type in kinds and token.start not in docstrings:
            lines.append(token.start[0])
        depth += token.type == opening
        depth -= token.type == getattr(tokenize, "FSTRING_END", -1)
    return lines


def definitions(source):
    """{name: node} of functions, classes and constants at the top level."""
    found = {}
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        found[getattr(node, "name", getattr(targets[0], "id", None))] = node
    return {name: node for name, node in found.items() if name}


def copies(sources):
    """Names of what has another text in a later script, and tokens of all copies but the first."""
    first = {}
    drifted = []
    copied = 0
    for source in sources.values():
        tokens = code_tokens(source)
        for name, node in definitions(source).items():
            decorators = [ast.unparse(part) for part in getattr(node, "decorator_list", [])]
            text = [*decorators, *source.splitlines()[node.lineno - 1 : node.end_lineno]]
            if name not in OWN and first.setdefault(name, text) is not text:
                copied += sum(node.lineno <= line <= node.end_lineno for line in tokens)
                drifted += [name] * (text != first[name])
    return drifted, copied


def test_same_name_same_text_and_size_of_all():
    assert len(SCRIPTS) == 6
    drifted, copied = copies(SOURCES)
    assert drifted == []
    assert copied <= 9_000
    assert sum(len(code_tokens(source)) for source in SOURCES.values()) <= 33_000


def test_an_edited_copy_is_found():
    for one, two, names, tokens in (
        ("def f():\n    return 1\n", 'X = 0\n\n\ndef f():\n    "Doc."\n    return 1\n', ["f"], 7),
        ("def f():\n    return 1\n", "def f():\n    return 1  # one\n", ["f"], 7),
        ("class A:\n    pass\n", "@torch.no_grad\nclass A:\n    pass\n", ["A"], 4),
        ("LIMIT = 1\n", "LIMIT: int = 1\n", ["LIMIT"], 5),
        ("def f():\n    return Y\n", "X = 0\n\n\ndef f():\n    return Y\n", [], 7),
        ("RECIPES = 1\n\n\ndef main():\n    1\n", "RECIPES = 2\n\n\ndef main():\n    2\n", [], 0),
    ):
        assert copies({"a": one, "b": two, "c": "Y = 3\n"}) == (names, tokens)


def packed(source):
    """Number of tuple-packed assignments, walruses, comprehensions, conditional expressions."""
    kinds = [ast.NamedExpr, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp]
    number = 0
    for node in ast.walk(ast.parse(source)):
        number += type(node) in kinds
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            number += isinstance(node.targets[0], ast.Tuple)
    return number


ORDER = ["Expr", "Import", "Assign", "Def", "parse_args", "main", "plumbing", "If"]


def order(source):
    """Kinds of the top-level statements from top to bottom."""
    line = source.splitlines().index(PLUMBING) + 1
    kinds = []
    for node in ast.parse(source).body:
        kind = re.sub("From|Class|Function", "", type(node).__name__)
        if node.lineno > line and kind != "If":
            kind = "plumbing"
        elif getattr(node, "name", None) in OWN:
            kind = node.name
        kinds.append(kind)
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_order_size_and_density(script):
    source = SOURCES[script]
    assert order(source) == ORDER
    assert source.splitlines().count(PLUMBING) == 1
    assert source.endswith('\n\n\nif __name__ == "__main__":\n    main()\n')
    tokens = code_tokens(source)
    code_lines = len(set(tokens))
    assert len(tokens) <= min(TOKENS.get(script, 5000), 12 * code_lines)
    assert packed(source) <= 0.09 * code_lines
    assert max(len(line) for line in source.splitlines()) <= 100
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 45


def test_counting():
    for source, tokens, constructs in (
        ('"""Doc.\n\nMore."""\n\n\ndef f(x):\n    "Doc."\n    return x\n', [6] * 6 + [8] * 2, 0),
        ("x = f'{a + b} {f(c)!r}' f''\ny = 'd'  # a comment\n", [1] * 4 + [2] * 3, 0),
        ("x = f'''{a}\n{b}'''\ny = -1.5\n", [1] * 3 + [3] * 4, 0),
        ("a, b = 1, 2\nc, d = f()\n", [1] * 7 + [2] * 7, 1),
        ("if (x := f()):\n    y = 1 if x else 2\n", [1] * 9 + [2] * 7, 2),
        ("x = [i for i in {j for j in y}]\nz = sum(i for i in x)\n", [1] * 15 + [2] * 10, 3),
    ):
        assert code_tokens(source) == tokens
        assert packed(source) == constructs


def unwanted(source, requirements):
    """Imports of neither the standard library nor requirements.txt; what lets files run code."""
    required = re.findall(r"^[\w.-]+", requirements.lower().replace("_", "-"), re.M)
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    names = [name.partition(".")[0] for name in names]
    allowed = {*required, *sys.stdlib_module_names} - {"importlib", "runpy", "pickle"}
    wrong = [name for name in names if PACKAGES.get(name, name).lower() not in allowed]
    by_hand = r"\ballow_pickle\b|(?<![.\w])(?:exec|eval|__import__)\("
    return wrong + re.findall(rf"{by_hand}|torch\.load\((?![^)]*weights_only=True\)).*", source)


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_are_required_packages_and_files_run_no_code(script):
    assert unwanted(SOURCES[script], (ROOT / "requirements.txt").read_text()) == []


def test_an_unwanted_import_is_found():
    for source, found in (
        ("import json, numpy.linalg\nfrom PIL import Image\nfrom sklearn.svm import SVC", []),
        ("import numpy, pandas\n\n\ndef f():\n    from scipy.stats import x", ["pandas", "scipy"]),
        ("from sample_outliers import pick\nfrom . import a", ["sample_outliers", ""]),
        ("import importlib.util\nimport pickle\nexec('a')", ["importlib", "pickle", "exec("]),
        ("np.load(path, allow_pickle=True)\nnet.eval().to(device)", ["allow_pickle"]),
        ("torch.load(p)\ntorch.load(p, weights_only=True)", ["torch.load(p)"]),
    ):
        assert unwanted(source, "# all\nnumpy>=1.26\nscikit_learn  # svm\nPillow\n") == found


def test_another_order_is_found():
    parts = ['"""A."""', "import a", "RECIPES = {}", "def f(): 1", "def parse_args(): 2"]
    parts += ["def main(): 3", PLUMBING, "K = 4\ndef g(): 5", "if 6: 7"]
    assert order("\n".join(parts)) == ORDER
    for i in range(len(parts) - 1):
        swapped = [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]]
        assert order("\n".join(swapped)) != ORDER, parts[i]


@pytest.fixture(scope="module")
def options(load):
    """{script: {flag: argparse's action}}"""

    def stop(parser):
        raise InterruptedError(parser)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        for script in SCRIPTS:
            with pytest.raises(InterruptedError) as caught:
                load(script).parse_args()
            actions = caught.value.args[0]._actions
            found[script] = {action.option_strings[0]: action for action in actions}
    return found


def code_map(text):
    """Rows of the table under "## Paper → code map", without its head, as lists of cells."""
    section = re.search(r"^## Paper → code map[ \t]*$(.*?)(?=^## |\Z)", text, re.M | re.S)
    lines = re.findall(r"^\|(.*)\|[ \t]*$", section[1], re.M)
    return [re.split(r"(?<!\\)\|", line) for line in lines[2:]]


def wrong_in_map(text, options):
    """What the map names and its script has not, or has as plumbing that is not in BELOW."""
    wrong = []
    for _, _, script, functions, flags in code_map(text):
        script = script.strip(" `").removesuffix(".py")
        if script not in SOURCES or not functions.strip():
            wrong.append(script)
            continue
        known = definitions(SOURCES[script])
        line = SOURCES[script].splitlines().index(PLUMBING)
        for name in re.findall(r"\w+", functions):
            if name not in known or (known[name].lineno > line and name not in BELOW.split()):
                wrong.append(name)
        wrong += [flag for flag in re.findall(r"--[\w-]+", flags) if flag not in options[script]]
    return wrong


def test_a_wrong_row_of_the_map_is_found(options):
    for row, wrong in (
        ("| A | \\|x\\| | `train_classifier.py` | `dream_loss`, `energy` | `--beta` |", []),
        ("| A | energy | `train_classifier.py` | `dream_losses` | `--beta` |", ["dream_losses"]),
        ("| A | energy | `train_classifier.py` | `energy` | `--betas 1` |", ["--betas"]),
        ("| A | energy | `classifier.py` | `energy` | |", ["classifier"]),
        ("| A | energy | `evaluate.py` | | |", ["evaluate"]),
        ("| A | images | `evaluate.py` | `save`, `knn` | |", ["save"]),
    ):
        head = "# T\n\n## Paper → code map\n\n| p | step | s | f | flags |\n|---|---|---|---|---|\n"
        text = f"{head}{row}\n\n## Next\n\n| a | b | c | d | e |\n|---|---|---|---|---|\n| 1 |\n"
        assert wrong_in_map(text, options) == wrong


def unknown_in(text, options):
    """Functions called f(...) in backticks, and flags in commands, that no script has."""
    names = {name for source in SOURCES.values() for name in definitions(source)}
    spans = " ".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
    calls = re.findall(r"(?<![\w.])(\w+)\(", spans)
    wrong = [name for name in calls if name not in names and not hasattr(builtins, name)]
    for script, rest in re.findall(r"(\w+)\.py\b([^`\n|;&#]*)", text.replace("\\\n", " ")):
        given = re.findall(r"(?<!\S)--[\w-]+", rest)
        wrong += [flag for flag in given if flag not in options.get(script, given)]
    return wrong


def test_an_unknown_name_in_a_text_is_found(options):
    text = "`pick(d_K)`, `peck()`, `np.load(x)`, `len(x)`; `train_classifier.py --lam 1 --lamb 2`"
    text += "\n```sh\npython evaluate.py --k 1 \\\n  --kk 2 | tee --append log\n```\n"
    assert unknown_in(text, options) == ["peck", "--lamb", "--kk"]


def test_readme(options):
    assert len(README) <= 16_000
    assert {row[2].strip(" `") for row in code_map(README)} == {f"{name}.py" for name in SCRIPTS}
    assert wrong_in_map(README, options) == []
    assert unknown_in(README, options) == []
    (tests,) = set(re.findall(r"python -m pytest.*", README))
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def unread(source, names):
    """Options that nothing but the parsers reads as args.NAME, or as args.REST of METHOD_REST."""
    others = re.sub(r"(?ms)^def (recipe_parser|parse_args)\(.*?(?=^\S)", "", source)
    read = set(re.findall(r"\bargs\.(\w+)\b(?! = )", others))
    return [name for name in names if not read & {name, re.sub("^(dream|sd|frozen)_", "", name)}]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_read_and_explained(load, options, script):
    names = {action.dest for action in options[script].values()} - {"help"}
    assert {"dir", "device", "seed", "recipe", "batch_size", *load(script).RECIPES} <= names
    assert unread(SOURCES[script], names - {"recipe"}) == []  # that one picks the column
    assert [flag for flag, a in options[script].items() if not a.help] in ([], ["--help"])
    for name, (value, _, *choices) in load(script).RECIPES.items():
        values = value if isinstance(value, tuple) else (value,) * len(load(script).COLUMNS)
        assert len(values) == len(load(script).COLUMNS), name
        assert {type(value) for value in values} in ({int}, {float}, {str}), name
        assert not choices or set(values) <= set(choices), name


def test_only_evaluate_opens_ood_data(options):
    read = {"evaluate": {"spec"}, "train_scan_diffusion": {"args.data", "str(path.resolve())"}}
    for script, source in SOURCES.items():
        assert ("--ood-data" in options[script]) == (script == "evaluate")
        assert set(re.findall(r"(?<!def )read_dataset\((.*?), ", source)) == read.get(script, set())
        assert bool(re.search(r"\bdatasets\b", source)) == (script in read)


def test_an_option_nobody_reads_is_found():
    parser = "def parse_args():\n    return args.dead\n"
    method = "def f(args, other):\n    args.kept = other.lost\n    return args.w + args.lr\n"
    names = ["w", "sd_lr", "sd_dead", "dead", "kept", "lost"]
    assert unread(parser + method, names) == names[2:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_recipe(load, main, options, monkeypatch, capsys, tmp_path, script):
    monkeypatch.setenv("COLUMNS", "999")
    for column, recipe in enumerate(load(script).COLUMNS):
        with pytest.raises(SystemExit) as end:
            main(script, "--dir", tmp_path, "--recipe", recipe, "--help")
        assert not end.value.code
        text = re.sub(r"\n {9,}", "  ", capsys.readouterr().out)
        assert {*re.findall(r"^  (--\S+)", text.partition("options:")[2], re.M)} == {
            *options[script]
        }
        shown = dict(re.findall(r"^  --(\S+) .*\(default: (.*)\)$", text, re.M))
        for name, (value, *_) in load(script).RECIPES.items():
            expected = value[column] if isinstance(value, tuple) else value
            assert shown.pop(name.replace("_", "-")) == str(expected), name
        assert shown == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(load, monkeypatch, tmp_path, capfd, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-option", "--help"])
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), list(sys.path)
    load.__wrapped__(script)  # not the module that other tests share
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert sys.path == states[2]


RUNS = """train_scan_diffusion train.npy test.npy
--clusters 2 --pretext-epochs 2 --scan-epochs 4 --selflabel-epochs 1 --channels 32,32 --steps 2
data.json pseudo_labels.npy test_pseudo_labels.npy pseudo_confidence.npy scan.pt diffusion
train_text_encoder train.npy test.npy pseudo_labels.npy test_pseudo_labels.npy diffusion
--epochs 1
anchors.npy id_embeddings.npy id_labels.npy text_encoder.pt
sample_outliers anchors.npy id_embeddings.npy id_labels.npy train.npy diffusion
--K 4 --boundary 4 --draw 2 --candidates 8 --per-class 6 --steps 2
outliers.npy outliers.csv outliers.json outliers.png outlier_labels.npy outlier_embeddings.npy
sample_sd_outliers train.npy pseudo_labels.npy diffusion
--steps 2
sd_outliers.npy sd_outliers.csv sd_outliers.json sd_outliers.png
train_classifier train.npy train.labels.npy outliers.npy
--method ce dream --epochs 1 --dream-epochs 1
classifier_ce.pt classifier_dream.pt
evaluate id.npy ood.npy
--scores mine/id.npy mine/ood.npy --bootstrap 9
results.json results.md roc.png scores.png""".splitlines()  # files brought, options, files made


def bring_by_hand(folder):
    """Every file that RUNS bring: 40 dark and bright grey images of 8 px, a diffusion model."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int64) % 2
    images = (190 * labels[:, None, None, None] + rng.integers(0, 60, (40, 8, 8, 1))).repeat(3, 3)
    arrays = dict.fromkeys(["train", "test", "outliers"], images.astype(np.uint8))
    names = ["train.labels", "pseudo_labels", "test_pseudo_labels", "id_labels"]
    arrays |= dict.fromkeys(names, labels)
    sizes = {"layers_per_block": 1, "block_out_channels": [32] * 4, "num_class_embeds": 3}
    unet = UNet2DModel(8, 1, 1, **sizes)
    unet.save_pretrained(folder / "diffusion" / "unet")
    DDPMScheduler().save_pretrained(folder / "diffusion" / "scheduler")
    anchors = unet.class_embedding.weight[:-1].detach().numpy()
    embeddings = anchors[labels] + rng.normal(0, 0.1, (40, anchors.shape[1]))
    arrays |= {"anchors": anchors, "id_embeddings": embeddings.astype(np.float32)}
    arrays |= {"id": rng.normal(0, 1, 30), "ood": rng.normal(1, 1, 20)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """[(folder, process)] of RUNS, each script copied alone into a folder with its files."""
    made = tmp_path_factory.mktemp("made")
    bring_by_hand(made)

    def start(inputs, options):
        script, *files = inputs.split()
        folder = tmp_path_factory.mktemp(script)
        shutil.copy(ROOT / f"{script}.py", folder)
        others = {path.name for path in made.iterdir()} - {*files}
        shutil.copytree(made, folder / "mine", ignore=shutil.ignore_patterns(*others))
        command = [sys.executable, "-I", f"{script}.py", "--dir", "mine", *options.split()]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        return folder, process

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, RUNS[::3], RUNS[1::3]))


@pytest.mark.parametrize("i", range(6), ids=[inputs.split()[0] for inputs in RUNS[::3]])
def test_a_script_alone_runs(alone, i):
    folder, process = alone[i]
    assert process.returncode == 0, process.stderr
    names = {path.name for path in (folder / "mine").iterdir()}
    assert set(RUNS[3 * i + 2].split()) <= names
    assert not [name for name in names if name.startswith(".")]  # nothing unfinished
    assert {path.name for path in folder.iterdir()} == {RUNS[3 * i].split()[0] + ".py", "mine"}
