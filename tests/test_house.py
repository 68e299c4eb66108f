"""The house rules: which file imports which, what an import does, and where Algorithm 1 is called."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "training/**/*.py", "pruners/**/*.py", "data/**/*.py", "eval/**/*.py", "reproduce/**/*.py")
    for path in ROOT.glob(pattern)
)
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
OURS = {name.partition(".")[0] for name in MODULES}
# Run as `python FILE` or `python -m MODULE`; data/tiny/make.py makes the embedded model, so it imports more than data/.
SCRIPTS = {name for name, path in MODULES.items() if '\nif __name__ == "__main__":\n' in (ROOT / path).read_text()}
MAY_IMPORT = {  # the first entry that a module's name begins with counts; modules or packages
    "qtuning": (),
    "training.ranks": (),
    "training.files": (),
    "training.model_folder": ("training.files",),
    "model": ("training.files", "training.model_folder"),
    "training": ("model", "qtuning", "data", "training"),
    "data.tiny.make": ("model", "data"),
    "data": ("qtuning", "data", "training.files"),
    "pruners": ("qtuning", "model", "training", "data", "pruners"),
    "train": ("qtuning", "model", "training", "data", "pruners", "eval.during"),
    "eval": ("model", "training", "data", "qtuning", "eval"),
    "reproduce": ("qtuning", "model", "training", "data", "pruners", "train", "eval", "reproduce"),
}


def under(name, package):
    return name == package or name.startswith(package + ".")


def imports(tree):
    """The modules that a file imports, in functions too; `from training import head` imports training.head."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def our_imports(path):
    return {name for name in imports(TREES[path]) if name.partition(".")[0] in OURS}


def strings(tree):
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# ------------------------------------------------------------------------------------------ who imports whom


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_what_its_room_may(path):
    room = next(room for room in MAY_IMPORT if under(module_name(path), room))
    refused = {name for name in our_imports(path) if not any(under(name, allowed) for allowed in MAY_IMPORT[room])}
    assert not refused


def test_every_room_has_its_rule_and_every_rule_its_room():
    assert {room.partition(".")[0] for room in MAY_IMPORT} == OURS
    for room in MAY_IMPORT:
        assert any(under(name, room) for name in MODULES)


def test_nothing_but_reproduce_imports_train_or_another_script():
    assert {"train", "pruners.score_rows", "data.download", "eval.arc"} <= SCRIPTS
    for name, path in MODULES.items():
        if not under(name, "reproduce"):
            assert not our_imports(path) & SCRIPTS, name


def test_the_packages_needed_are_torch_and_the_few_that_requirements_name():
    needed = {}
    for path, tree in TREES.items():
        for name in imports(tree):
            needed.setdefault(name.partition(".")[0], set()).add(path)
    third_party = needed.keys() - OURS - sys.stdlib_module_names
    expected = {"torch", "numpy", "safetensors", "tokenizers", "tqdm", "huggingface_hub", "jinja2", "matplotlib"}
    assert third_party == expected
    assert {path.parts[0] for path in needed["matplotlib"]} == {"reproduce"}  # the extra `plot`
    of_method = {name.partition(".")[0] for name in imports(TREES[Path("qtuning.py")])}
    assert of_method - sys.stdlib_module_names == {"torch"}


IMPORT_ALL = """
import argparse, json, os, random, sys
import huggingface_hub, jinja2.sandbox, numpy, safetensors.torch, tokenizers, torch.distributed, tqdm
import torch.nn.attention, torch.utils.checkpoint

try:
    import matplotlib.pyplot
except ImportError:
    pass
watching, written = True, []

def watch(event, args):
    if not watching:
        return
    if event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.chdir", "socket.connect", "subprocess.Popen"):
        written.append(f"{event} {args}")

def refuse(*_):
    raise AssertionError("a module parsed arguments when it was imported")

def state():
    tensors = torch.get_rng_state().tolist()
    kept = (sys.argv, sys.path, dict(os.environ), os.getcwd(), torch.get_num_threads(), torch.get_default_dtype())
    return [*map(str, kept), str(tensors), str(random.getstate()), str(numpy.random.get_state())]

sys.addaudithook(watch)
argparse.ArgumentParser.parse_known_args = refuse
modules, ours = json.loads(sys.argv[1]), json.loads(sys.argv[2])
before = state()
for name in modules:  # each one first, so that no order of imports is needed
    for known in list(sys.modules):
        if known.partition(".")[0] in ours:
            del sys.modules[known]
    __import__(name)
    assert state() == before, f"importing {name} changed what others see"
watching = False
print(json.dumps(written))
"""


def test_importing_a_module_has_no_side_effect(tmp_path):
    """No file, folder, process or connection; no argument parsed, nothing printed, no generator moved."""
    optional = set() if find_spec("matplotlib") else {"matplotlib"}
    modules = [
        name for name, path in MODULES.items() if not {n.partition(".")[0] for n in imports(TREES[path])} & optional
    ]
    command = [sys.executable, "-B", "-c", IMPORT_ALL, json.dumps(modules), json.dumps(sorted(OURS))]
    # Few variables: this process has imported the modules already, and what they had set would not be noticed.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout) == []
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- one Algorithm 1


def functions(tree):
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def calls(tree):
    """The names of the functions that a piece of code calls, in the order of its lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [node.func.id for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def test_the_loop_runs_the_two_stages_and_masks_with_qtunings_own_function():
    tree = TREES[Path("train.py")]
    stages = ["choose_samples", "choose_tokens", "token_mask", "kept_batches"]
    assert [name for name in calls(functions(tree)["train_on"]) if name in stages] == stages
    origin = {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert [origin[name] for name in stages] == ["pruners", "pruners", "qtuning", "training.scoring"]


def test_the_stages_of_the_method_are_qtunings_own_functions():
    tree = TREES[Path("pruners/__init__.py")]
    defined = functions(tree)
    assert "prune_samples" in calls(defined["qtuning_samples"]) and "prune_tokens" in calls(defined["qtuning_tokens"])
    origin = {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert origin["prune_samples"] == origin["prune_tokens"] == "qtuning"


def test_no_other_file_defines_a_function_of_qtuning_again():
    own = {name for name in functions(TREES[Path("qtuning.py")]) if not name.startswith("_")}
    assert {"prune_batch", "token_mask", "bisect_thresholds"} <= own
    for path, tree in TREES.items():
        if path != Path("qtuning.py"):
            assert not own & functions(tree).keys(), path


def test_train_names_no_pruner_but_the_two_defaults():
    tree = TREES[Path("train.py")]
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    defaults = [node for node in config.body if isinstance(node, ast.AnnAssign) and node.target.id.endswith("_pruner")]
    assert [(node.target.id, node.value.args[0].value) for node in defaults] == [
        ("sample_pruner", "qtuning"),
        ("token_pruner", "qtuning"),
    ]
    named = [text for text in strings(tree) if text in {*SAMPLE_PRUNERS, *TOKEN_PRUNERS}]
    assert named == ["qtuning", "qtuning"]


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in ("training", "model.py")], ids=str)
def test_the_model_and_training_name_no_pruner(path):
    names = {*SAMPLE_PRUNERS, *TOKEN_PRUNERS} - {"none"}  # a word of other tables too
    assert not names & {*strings(TREES[path])}
