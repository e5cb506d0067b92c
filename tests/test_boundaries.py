"""The shape of the tree: which way imports point, what is said where, how large it may become.

Each rule is a function of a module's source, so each has a negative control: a line that it must refuse.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("train", "launch")
    for file in sorted((ROOT / package).rglob("*.py"))
}
SOURCES = {name: file.read_text() for name, file in MODULES.items()}

CODE_LINES = 13_000  # of code: without blank lines, comments and docstrings
MAIN_LINES = 200

ARROWS = {
    "config": {"compose"},
    "compose": set(),
    "order": set(),
    "rundir": {"config", "compose"},
    "describe": {"config", "rundir"},
    "optim": {"config", "rundir"},
    "metrics": {"config", "rundir", "describe"},
    "trackers": {"config", "rundir", "describe"},
    "stop": {"config", "rundir"},
    "ledger": {"config", "rundir", "order", "data", "checkpoint"},
    "checkpoint": {"config", "rundir"},
    "strategy": {"config", "rundir"},
    "data": {"config", "rundir", "order"},
    "models": {"config", "rundir", "data", "checkpoint"},
    "tasks": {"config", "rundir", "data", "models"},
    "export": {"config", "rundir", "describe", "checkpoint", "data", "models", "tasks", "predict"},
    "predict": {"config", "rundir", "describe", "order", "checkpoint", "data", "models", "tasks"},
    "plan": {"config", "compose", "rundir", "data", "models", "tasks", "strategy", "optim"},
    "launch": {"config", "compose", "rundir", "describe", "order", "ledger", "data", "models", "plan", "checkpoint", "export",
               "predict"},
}  # fmt: skip
"""Part -> the parts of `train` that it may import, besides itself. What is missing here may import everything:"""
ENDS = {"main", "lifecycle", "__main__"}
"""the script, where siblings meet, and its two ends."""

ENVIRONMENT = {
    "train.strategy": "the ranks that a launcher laid out, and the variables of the engines",
    "train.rundir": "who owns a run: host, process, Slurm job",
    "train.describe": "what `env.json` says, without its secrets",
    "train.__main__": "the rank that speaks, the plug-in, OpenMP",
    "train.lifecycle": "whether a launcher has cleared old requests",
    "train.stop": "the launcher whose death is noticed",
    "train.trackers": "settings of the trackers' own libraries",
    "train.data.cache": "where caches lie by convention",
    "train.data.hub": "the hub's own switches",
    "launch": "the environment of what it starts",
}
"""Modules that touch `os.environ`, and for what. No setting of ours comes from there."""

TORCH_FREE = [
    *(f"train.{name}" for name in ("config", "compose", "rundir", "describe", "order", "ledger", "stop", "__main__")),
    *(
        f"train.{name}"
        for name in ("checkpoint", "trackers", "tasks", "data", "data.cache", "data.hub", "data.documents")
    ),
    *("train.data.text", *(name for name in MODULES if name.split(".")[0] == "launch" and name != "launch.__main__")),
]
"""Modules that a command imports before it knows that it will train."""
HEAVY = ("torch", "transformers", "accelerate", "deepspeed", "peft", "wandb")


def part(module: str) -> str:
    """`train.data.text` -> `data`; all of `launch` is one part."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "train" else package


def imports(source: str, *, types: bool = False) -> Iterator[str]:
    """Dotted names that are imported anywhere in `source`; those under `TYPE_CHECKING` only with `types`."""
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            stack += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        stack += ast.iter_child_nodes(node)


def said(source: str) -> Iterator[str]:
    """What code says: identifiers, imported names and strings; not comments and docstrings."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.keyword(arg=str(text)):
                yield text
            case ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                yield text
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield text
    yield from imports(source, types=True)


# -------------------------------------------------------------------------------------------------------------- rules


def wrong_arrows(module: str, source: str) -> list[str]:
    here = part(module)
    if here in ENDS:
        return []
    allowed = ARROWS.get(here, set()) | {here}
    ours = {name for name in imports(source) if name.split(".")[0] in ("train", "launch")}
    return [name for name in ours if part(name) not in allowed and name not in ("train.plan", "train.data")]


def environment(module: str, source: str) -> list[str]:
    if any(module == known or module.startswith(f"{known}.") for known in ENVIRONMENT):
        return []
    return [text for text in said(source) if text in ("environ", "getenv", "putenv")]


def executes(module: str, source: str) -> list[str]:
    """Ways in which text or a file that was loaded could run."""
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "code"}
    found = [name for name in imports(source) if name.split(".")[0] in banned]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        if call in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "torch.load",
            "torch.save",
            "yaml.unsafe_load",
            "os.system",
        ):
            found.append(call)
        if call.endswith("instantiate") or (call == "yaml.load" and "Loader" not in ast.unparse(node)):
            found.append(call)
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                found.append(f"{call}({keyword.arg})")
    return found


def engines(module: str, source: str) -> list[str]:
    """FSDP and DeepSpeed, by name: for the strategies, and the planner that knows what they hold."""
    if part(module) in ("strategy", "plan"):
        return []
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [name for name in (*names, *imports(source)) if re.search("fsdp|deepspeed|fully_shard", name, re.IGNORECASE)]


def tracker(module: str, source: str) -> list[str]:
    return [] if module == "train.trackers" else [n for n in imports(source) if n.split(".")[0] in ("wandb", "mlflow")]


def scheduler(module: str, source: str) -> list[str]:
    """Slurm's commands: for the one file that calls them. The doctor asks whether they are there and answer."""
    if module in ("launch.slurm", "launch.doctor"):
        return []
    commands = re.compile(r"(sbatch|squeue|scontrol|sacct|scancel|srun|sinfo)( .*)?")
    nodes = list(ast.walk(ast.parse(source)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant) and id(node) not in prose]
    return [text for text in texts if commands.fullmatch(text)]


RULES = {
    wrong_arrows: ("train.order", "from train import config"),
    environment: ("train.optim", "import os\nhome = os.environ['HOME']"),
    executes: ("train.export", "import torch\nstate = torch.load(path)"),
    engines: ("train.main", "from torch.distributed.fsdp import fully_shard"),
    tracker: ("train.main", "import wandb"),
    scheduler: ("launch.local", "subprocess.run(['sbatch', script])"),
}
"""Rule -> a module with a line that breaks it."""

ALSO_WRONG = [
    (wrong_arrows, "train.strategy.ddp", "from train.tasks import TASKS"),
    (wrong_arrows, "train.config", "def f():\n    from train import rundir"),
    (wrong_arrows, "launch.cli", "from train.main import train"),
    (wrong_arrows, "train.checkpoint", "from train import strategy"),
    (executes, "train.config", "x = eval(text)"),
    (executes, "train.data.text", "import pickle"),
    (executes, "train.data.text", "np.load(file, allow_pickle=True)"),
    (executes, "launch.local", "subprocess.run(line, shell=True)"),
]


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule) -> None:
    broken = {name: found for name, source in SOURCES.items() if (found := rule(name, source))}
    assert not broken


@pytest.mark.parametrize(("rule", "module", "source"), [*((r, *line) for r, line in RULES.items()), *ALSO_WRONG])
def test_a_line_that_breaks_the_rule_is_seen(rule, module: str, source: str) -> None:
    assert rule(module, source)
    assert not rule(module, "import json")


def test_every_part_is_in_the_table_of_arrows() -> None:
    parts = {part(name) for name in MODULES} - ENDS - {""}
    assert parts - set(ARROWS) == set()


def test_torch_free_modules_import_nothing_heavy() -> None:
    """The libraries are made impossible to import, so a module that reaches for one fails by its own name."""
    code = (
        f"import sys, importlib\nfor name in {HEAVY}: sys.modules[name] = None\n"
        f"for name in {[n for n in TORCH_FREE if n in MODULES]}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    control = code + "import train.main\n"
    assert subprocess.run([sys.executable, "-c", control], cwd=ROOT, capture_output=True, check=False).returncode != 0


def test_help_a_config_error_and_status_load_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
for name in {HEAVY}: sys.modules[name] = None
from launch import cli
from train.__main__ import main
sys.argv = ["gearshift", *sys.argv[1:]]
if sys.argv[1] == "train":
    sys.exit(main(sys.argv[2:]))
cli.main()
"""
    ends = {
        ("--help",): 0,
        ("run", "optim.lrr=1"): 2,
        ("status", str(tmp_path)): 1,
        ("train", "--help"): 0,
        ("train", "--cfg"): 0,
        ("train", "optim.lrr=1"): 2,
    }
    for words, expected in ends.items():
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == expected, (words, done.stderr)
        assert "Traceback" not in done.stderr


def test_the_script_is_a_page_and_the_tree_within_its_budget() -> None:
    assert SOURCES["train.main"].count("\n") <= MAIN_LINES
    assert sum(_code_lines(source) for source in SOURCES.values()) < CODE_LINES


def _code_lines(source: str) -> int:
    """Lines that hold code: a budget that counted prose would be met by deleting the prose."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    spoken = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
    return len(code - spoken)


def test_every_module_says_what_it_owns() -> None:
    silent = {name for name, source in SOURCES.items() if source.strip() and not ast.get_docstring(ast.parse(source))}
    assert not silent
    eager = {n for n, s in SOURCES.items() if "def " in s and "from __future__ import annotations" not in s}
    assert not eager


def test_no_module_hides_a_dependency_or_the_standard_library() -> None:
    """Started by path, `train/` and `launch/` come first on the search path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in words}
    distributions = metadata.packages_distributions().items()
    theirs = {name for name, dists in distributions if {d.lower().replace("_", "-") for d in dists} & wanted}
    theirs |= {"datasets", "torch", "wandb"}
    tops = {name.partition(".")[2] for name in MODULES if name.count(".") == 1} - {"__main__"}
    assert not tops & (theirs | set(sys.stdlib_module_names))
    assert not {name.rpartition(".")[2] for name in MODULES} & (theirs - {"train", "launch", "conf"})


def test_no_grab_bags() -> None:
    assert not {name for name in MODULES if re.search(r"\b(utils?|common|helpers?|misc|base)$", name)}
