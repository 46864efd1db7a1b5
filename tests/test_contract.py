"""What holds for all six scripts: alone, in step with each other, in one order, small to read."""

import argparse
import ast
import builtins
import io
import itertools
import os
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
TOKENS = {"train_scan_diffusion": 8000, "train_classifier": 6000, "evaluate": 7700}  # else 5000
OWN = {"main", "parse_args", "RECIPES"}  # of each script
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # imported by another name
PLUMBING = "# ---- plumbing: not the paper's method; same name, same text in every script ----"
ORDER = ["Expr", "Import", "Assign", "Def", "parse_args", "main", "plumbing", "If"]
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
    for source in sources:
        for name, node in definitions(source).items():
            decorators = [part.lineno for part in getattr(node, "decorator_list", [])]
            lines = source.splitlines()[min([node.lineno, *decorators]) - 1 : node.end_lineno]
            if name not in OWN and first.setdefault(name, lines) is not lines:
                copied += len(code_tokens("\n".join(lines[len(decorators) :])))
                drifted += [name] * (lines != first[name])
    return drifted, copied


def test_same_name_same_text_and_size_of_all():
    assert len(SCRIPTS) == 6
    drifted, copied = copies(SOURCES.values())
    assert drifted == []
    assert copied <= 9_000
    assert sum(len(code_tokens(source)) for source in SOURCES.values()) <= 35_000


def packed(source):
    """Number of tuple-packed assignments, walruses, comprehensions, conditional expressions."""
    kinds = [ast.NamedExpr, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp]
    number = 0
    for node in ast.walk(ast.parse(source)):
        number += type(node) in kinds
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            number += isinstance(node.targets[0], ast.Tuple)
    return number


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
def test_inline_metadata_names_what_the_script_imports(script):
    """PEP 723: what `uv run` installs for a copied file."""
    block = re.search(r"^# /// script\n((?:# .*\n|#\n)+?)# ///\n\Z", SOURCES[script], re.M)
    dependencies = re.findall(r'^#     "(.*)",$', block[1], re.M)
    assert set(dependencies) <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert unwanted(SOURCES[script], "\n".join(dependencies)) == []
    has_pipeline = "StableDiffusionPipeline" in SOURCES[script]  # which imports transformers
    assert not has_pipeline or "transformers" in block[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_order_size_density_and_imports(script):
    source = SOURCES[script]
    assert order(source) == ORDER
    assert source.splitlines().count(PLUMBING) == 1
    assert '\n\n\nif __name__ == "__main__":\n    main()\n\n# /// script\n' in source
    tokens = code_tokens(source)
    code_lines = len(set(tokens))
    assert len(tokens) <= min(TOKENS.get(script, 5000), 12 * code_lines)
    assert packed(source) <= 0.09 * code_lines
    assert max(len(line) for line in source.splitlines()) <= 100
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 45
    assert unwanted(source, (ROOT / "requirements.txt").read_text()) == []


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


def wrong_in_map(table, options):
    """What its rows name and their script has not, or has as plumbing that is not in BELOW."""
    wrong = []
    for row in re.findall(r"^\|(.*)\|[ \t]*$", table, re.M)[2:]:
        _, _, script, functions, flags = re.split(r"(?<!\\)\|", row)
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


def unknown_in(text, options):
    """Functions called f(...) in backticks, and flags in commands, that no script has."""
    names = {name for source in SOURCES.values() for name in definitions(source)} | {*dir(builtins)}
    spans = " ".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
    wrong = [name for name in re.findall(r"(?<![\w.])(\w+)\(", spans) if name not in names]
    for script, rest in re.findall(r"(\w+)\.py\b([^`\n|;&#]*)", text.replace("\\\n", " ")):
        given = re.findall(r"(?<!\S)--[\w-]+", rest)
        wrong += [flag for flag in given if flag not in options.get(script, given)]
    return wrong


def test_readme(options):
    assert len(README) <= 18_000
    table = README.partition("\n## Paper → code map\n")[2].partition("\n## ")[0]
    assert {*re.findall(r"\| `(\w+)\.py` \|", table)} == {*SCRIPTS}
    assert wrong_in_map(table, options) == []
    assert unknown_in(README, options) == []
    (tests,) = set(re.findall(r"python -m pytest.*", README))
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def unread(source, names):
    """Options that nothing but the parsers reads as args.NAME, or as args.REST of METHOD_REST."""
    others = re.sub(r"(?ms)^def (recipe_parser|parse_args)\(.*?(?=^\S)", "", source)
    read = set(re.findall(r"\bargs\.(\w+)\b(?! = )", others))
    return [name for name in names if not read & {name, re.sub("^(dream|sd|frozen)_", "", name)}]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_read_and_explained(load, main, options, monkeypatch, capsys, script):
    names = {action.dest for action in options[script].values()} - {"help"}
    assert {"dir", "device", "seed", "recipe", "batch_size", *load(script).RECIPES} <= names
    assert unread(SOURCES[script], names - {"recipe"}) == []  # that one picks the column
    assert [flag for flag, a in options[script].items() if not a.help] in ([], ["--help"])
    rows = {}
    for name, (value, _, *choices) in load(script).RECIPES.items():
        row = value if isinstance(value, tuple) else (value,) * len(load(script).COLUMNS)
        assert len(row) == len(load(script).COLUMNS), name
        assert {type(value) for value in row} in ({int}, {float}, {str}), name
        assert not choices or set(row) <= set(choices), name
        rows[name.replace("_", "-")] = row
    monkeypatch.setenv("COLUMNS", "999")
    for column, recipe in enumerate(load(script).COLUMNS):
        with pytest.raises(SystemExit) as end:
            main(script, "--dir", "none", "--recipe", recipe, "--help")
        assert not end.value.code
        text = re.sub(r"\n {9,}", "  ", capsys.readouterr().out)
        shown = dict(re.findall(r"^  --(\S+) .*\(default: (.*)\)$", text, re.M))
        assert shown == {name: str(row[column]) for name, row in rows.items()}


def test_only_evaluate_opens_ood_data(options):
    read = {"evaluate": {"spec"}, "train_scan_diffusion": {"args.data", "str(path.resolve())"}}
    for script, source in SOURCES.items():
        assert ("--ood-data" in options[script]) == (script == "evaluate")
        assert set(re.findall(r"(?<!def )read_dataset\((.*?), ", source)) == read.get(script, set())
        assert bool(re.search(r"\bdatasets\b", source)) == (script in read)


REQUIRED = "# all\nnumpy>=1.26\nscikit_learn  # svm\nPillow\n"
IMPORTS = """import json, numpy.linalg, pandas, importlib.util\nfrom PIL import Image
from sample_outliers import pick\nfrom . import a\nfrom sklearn.svm import SVC
def f():\n    from scipy.stats import x"""
OPENED = """import pickle\nnp.load(path, allow_pickle=True)\nexec('net.eval()')
torch.load(p)\nnumpy.load(p)\ntorch.load(p, weights_only=True)"""
ORDERED = f"'A'\nimport a\nR = 1\ndef f(): 1\ndef parse_args(): 1\ndef main(): 1\n{PLUMBING}\n"
FLAGS = {"train_classifier": {"--beta"}, "evaluate": {"--k"}}
MAP = """| paper | step | script | functions | flags |\n|---|---|---|---|---|
| A | \\|x\\| | `train_classifier.py` | `dream_loss`, `energy` | `--beta` |
| A | energy | `train_classifier.py` | `dream_losses`, `energy` | `--betas 1` |
| A | energy | `classifier.py` | `energy` | |\n| A | energy | `evaluate.py` | | |
| A | images | `evaluate.py` | `save`, `knn` | |"""
TEXT = """`pick(d_K)`, `peck()`, `np.load(x)`, `len(x)`; `train_classifier.py --beta 1 --lamb 2`
```sh\npython evaluate.py --k 1 \\\n  --kk 2 | tee --append log\n```"""
READ = "def parse_args():\n    return args.a\n\n\nargs.b = x.c\nargs.w + args.lr"


@pytest.mark.parametrize(
    ("check", "given", "found"),
    [
        (copies, [["def f():\n    1", 'X = 0\ndef f():\n    "Doc."\n    1']], (["f"], 5)),
        (copies, [["class A:\n    1", "@no\nclass A:\n    1  # one"]], (["A"], 3)),
        (copies, [["X = 1\ndef main(): 1", "X: int = 1\ndef main(): 2"]], (["X"], 5)),
        (copies, [["def f():\n    Y", "X = 0\ndef f():\n    Y"]], ([], 6)),
        (code_tokens, ["'''Doc.\n'''\ndef f(x):\n    'Doc.'\n    -1.5  # a"], [3] * 6 + [5] * 2),
        (code_tokens, ["x = f'''{a}\n{f(c)!r}''' f''\ny = 'd'\n"], [1, 1, 1, 2, 3, 3, 3]),
        (packed, ["a, b = 1, 2\nc, d = f()\nif (x := f()):\n    y = 1 if x else 2"], 3),
        (packed, ["x = [i for i in {j for j in y}]\nz = sum(i for i in {i: 1 for i in x})"], 4),
        (order, [f"{ORDERED}K = 1\nclass G: 1\nif 1: 1"], ORDER),
        (order, [f"import a\n{ORDERED}if 1: 1\nK = 1"], ["Import", *ORDER[:6], "If", "plumbing"]),
        (unwanted, [IMPORTS, REQUIRED], ["pandas", "importlib", "sample_outliers", "", "scipy"]),
        (unwanted, [OPENED, REQUIRED], ["pickle", "allow_pickle", "exec(", "torch.load(p)"]),
        (wrong_in_map, [MAP, FLAGS], ["dream_losses", "--betas", "classifier", "evaluate", "save"]),
        (unknown_in, [TEXT, FLAGS], ["peck", "--lamb", "--kk"]),
        (unread, [READ, ["w", "sd_lr", "sd_d", "a", "b", "c"]], ["sd_d", "a", "b", "c"]),
    ],
)
def test_what_is_wrong_is_found(check, given, found):
    assert check(*given) == found


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(load, monkeypatch, tmp_path, capfd, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-option", "--help"])
    torch_state = torch.get_rng_state()
    before = [*np.random.get_state()[1], *sys.path]
    load.__wrapped__(script)  # not the module that other tests share
    assert [*np.random.get_state()[1], *sys.path] == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


RUNS = """train_scan_diffusion train.npy test.npy
--clusters 2 --pretext-epochs 2 --scan-epochs 4 --selflabel-epochs 1 --channels 32,32 --steps 2
train_text_encoder train.npy test.npy pseudo_labels.npy test_pseudo_labels.npy diffusion
--epochs 1
sample_outliers anchors.npy id_embeddings.npy id_labels.npy train.npy diffusion
--K 4 --boundary 4 --draw 2 --candidates 8 --per-class 6 --steps 2
sample_sd_outliers train.npy pseudo_labels.npy diffusion
--steps 2
train_classifier train.npy train.labels.npy outliers.npy
--method ce dream --epochs 1 --dream-epochs 1
evaluate id.npy ood.npy
--scores mine/id.npy mine/ood.npy --bootstrap 9""".splitlines()  # files brought, options


def test_each_script_runs_alone_with_files_made_by_hand(tmp_path):
    """40 dark and bright grey images of 8 px, what belongs to them, a diffusion model."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int64) % 2
    images = (190 * labels[:, None, None, None] + rng.integers(0, 60, (40, 8, 8, 1))).repeat(3, 3)
    arrays = dict.fromkeys(["train", "test"], images.astype(np.uint8))
    arrays["outliers"] = rng.integers(0, 256, images.shape, dtype=np.uint8)
    names = ["train.labels", "pseudo_labels", "test_pseudo_labels", "id_labels"]
    arrays |= dict.fromkeys(names, labels)
    sizes = {"layers_per_block": 1, "block_out_channels": [32] * 4, "num_class_embeds": 3}
    unet = UNet2DModel(8, 1, 1, **sizes)
    unet.save_pretrained(tmp_path / "made" / "diffusion" / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "made" / "diffusion" / "scheduler")
    anchors = unet.class_embedding.weight[:-1].detach().numpy()
    embeddings = anchors[labels] + rng.normal(0, 0.1, (40, anchors.shape[1]))
    arrays |= {"anchors": anchors, "id_embeddings": embeddings.astype(np.float32)}
    arrays |= {"id": rng.normal(0, 1, 30), "ood": rng.normal(1, 1, 20)}
    for name, array in arrays.items():
        np.save(tmp_path / "made" / f"{name}.npy", array)

    def start(inputs, options):
        script, *files = inputs.split()
        folder = tmp_path / script
        others = {*os.listdir(tmp_path / "made")} - {*files}
        ignore = shutil.ignore_patterns(*others)
        shutil.copytree(tmp_path / "made", folder / "mine", ignore=ignore)
        shutil.copy(ROOT / f"{script}.py", folder)
        command = [sys.executable, "-I", f"{script}.py", "--dir", "mine", *options.split()]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        made = {*os.listdir(folder / "mine")} - {*files}
        assert made and not [name for name in made if name.startswith(".")]  # all finished
        assert {*os.listdir(folder)} == {f"{script}.py", "mine"}

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(start, RUNS[::2], RUNS[1::2]))) == len(SCRIPTS)
