"""What comes from elsewhere executes nothing, leaves no directory, and takes no secret with it.

Checkpoints, run directories, models, data, configs and names are not trusted; the code and the command line are. The
corpora: hostile pickles in every file that is ever read, `_target_` in every place that a config comes from, names that
are paths or commands, secrets in the environment and in settings, and the permissions of what is written.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from tests import ranks
from train import checkpoint, config, describe, rundir
from train.config import Config, ConfigError
from train.rundir import RunDir, RunError

# ------------------------------------------------------------------------------------------------- pickles, everywhere


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


def plain(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary), protocol=2)


def zipped(canary: Path, tmp_path: Path) -> bytes:
    """As `torch.save` writes it."""
    file = tmp_path / "payload.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", plain(canary))
        archive.writestr("archive/version", "3\n")
    return file.read_bytes()


def array(canary: Path) -> bytes:
    """As `np.save` writes an array of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + plain(canary)


KINDS: dict[str, Callable[[Path, Path], bytes]] = {
    "pickle": lambda canary, _: plain(canary),
    "torch": zipped,
    "numpy": lambda canary, _: array(canary),
}
IN_A_RUN = [
    *("config.yaml", "math.json", "data.json", "result.json", "plan.json", "env.json"),
    *("events.jsonl", "metrics.jsonl", "ledger.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("checkpoints/step-00000004/manifest.json", "checkpoints/step-00000004/rank-00000.safetensors"),
    *("lock/00000009.json", "STOP", "SAVE"),
]
"""Every file of a run directory that something reads."""
BESIDE = [
    *(
        "model.pt",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.bin",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "scaler.pt",
    ),
    *("training_args.bin", "pytorch_model.bin", "adapter_model.bin", ".metadata", "__0_0.distcp", "latest"),
    *("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "custom_checkpoint_0.pkl"),
    *("loader_state.pkl", "dataset.pkl", "4711_submitted.pkl", "job.pickle"),
]
"""Files that others' checkpoints hold, put beside ours: nobody may look at them."""


def read_everything(run: RunDir, tmp_path: Path) -> list[str]:
    """Every way in which a run directory is read, but for training; the errors."""
    told = []
    cfg = Config(train=config.TrainConfig(max_steps=4))
    for read in (
        lambda: config.load(run.path),
        lambda: rundir.admit(cfg, run, {"data": "0"}),
        lambda: run.result(),
        lambda: run.last_attempt(),
        lambda: [rundir.read_jsonl(file) for file in (run.events, run.metrics, run.ledger)],
        lambda: describe.standing(run),
        lambda: describe.show_result(run),
        lambda: rundir.holder(run),
        lambda: checkpoint.read_masters(run.path, "last"),
        lambda: [CliRunner().invoke(cli.app, [verb, str(run.path)]) for verb in ("status", "verify")],
        lambda: CliRunner().invoke(cli.app, ["predict", str(run.path), "--to", str(tmp_path / "predicted")]),
        lambda: CliRunner().invoke(cli.app, ["export", str(run.path), "--to", str(tmp_path / "exported")]),
    ):
        try:
            read()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_in_a_run_directory_is_executed(kind: str, trained: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = KINDS[kind](canary, tmp_path)
    told = {}
    for name in IN_A_RUN:
        run = RunDir(tmp_path / "run")
        shutil.copytree(trained / "lm", run.path)
        file = run.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        for beside in BESIDE:
            (run.checkpoint(4) / beside).write_bytes(content)
            (run.path / beside).write_bytes(content)
        told[name] = read_everything(run, tmp_path)
        assert not canary.exists(), f"{name} was executed"
        shutil.rmtree(run.path)
        for made in ("predicted", "exported"):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
    assert any("manifest.json" in text for text in told["checkpoints/step-00000004/manifest.json"])
    assert any("rank-00000.safetensors" in text for text in told["checkpoints/step-00000004/rank-00000.safetensors"])
    assert any("config.yaml" in text for text in told["config.yaml"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_would_execute(kind: str, tmp_path: Path) -> None:
    """The control: what reads such a file with pickle leaves the canary."""
    import numpy as np
    import torch

    canary = tmp_path / "canary"
    file = tmp_path / "file"
    file.write_bytes(KINDS[kind](canary, tmp_path))
    assert not canary.exists()
    if kind == "torch":
        torch.load(file, weights_only=False)
    elif kind == "numpy":
        np.load(file, allow_pickle=True)
    else:
        pickle.loads(file.read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_in_a_model_or_in_data_is_executed(kind: str, trained: Path, tmp_path: Path) -> None:
    """A Hugging Face directory whose weights are a pickle or whose config names code, and data files that are pickles."""
    from train import data, models, tasks

    canary = tmp_path / "canary"
    content = KINDS[kind](canary, tmp_path)
    base = tmp_path / "base"
    shutil.copytree(trained / "base", base)
    for file in base.glob("*.safetensors"):
        file.unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.safetensors.index.json"):
        (base / name).write_bytes(content)
    settings = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}
    (base / "config.json").write_text(json.dumps({**settings, "auto_map": code}))
    (base / "hostile.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    chats = [f"data.path={trained}/data/chats.jsonl", "data.cache_dir=" + str(tmp_path / "cache")]
    common = ["hardware=cpu", "train.max_steps=1", "tracker=none"]
    cfg = config.compose(["experiment=finetune_lora", *common, *chats, f"model.path={base}"])
    with pytest.raises((data.DataError, models.ModelError)):
        prepared = data.prepare(cfg, lambda _: None)
        models.initial_values(tasks.TASKS["causal_lm"](cfg, prepared).build_model(), 0)
    folder = tmp_path / "data"
    for name in ("a/x.png", "a/y.npy", "b/z.jpg", "text.jsonl", "text.parquet", "rows.arrow", "t.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    for words in (["experiment=classify", f"data.path={folder}"], ["experiment=lm_stdlib", f"data.path={folder}"],
                  ["experiment=finetune_lora", f"data.path={folder}/text.jsonl", f"model.path={trained}/base"],
                  ["experiment=lm_stdlib", f"data.path={folder}/text.parquet", "data.tokenizer=bytes"]):  # fmt: skip
        try:
            cfg = config.compose([*words, *common, "data.cache_dir=" + str(tmp_path / "cache")])
            data.open_datasets(data.prepare(cfg, lambda _: None), cfg)
        except (data.DataError, ConfigError):
            pass
    assert not canary.exists()


NO_PICKLE = """
import pickle, torch
def refused(*arguments, **keywords):
    raise RuntimeError("something was unpickled")
class Refused(pickle.Unpickler):
    load = refused
pickle.load = pickle.loads = torch.load = torch.save = refused
pickle.Unpickler = Refused
"""


def test_a_run_saves_and_resumes_where_pickle_is_poisoned(trained: Path, tmp_path: Path) -> None:
    words = ["experiment=lm_stdlib", "hardware=cpu", "train.precision=fp32", "tracker=none", "train.max_steps=4",
             "train.global_batch_size=4", "eval.every=null", "eval.max_samples=4", "eval.samples=0", "data.seq_len=32",
             "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1", "model.num_heads=2",
             f"data.path={trained}/data/text", "data.tokenizer=bytes", f"run.root={tmp_path}", "run.name=run"]  # fmt: skip
    errors = ranks.run_jobs(1, [[*words, "run.stop_at=2"], words], setup=NO_PICKLE)
    assert errors == [None, None]
    assert ranks.result(tmp_path / "run")["attempt"] == 2


# ------------------------------------------------------------------------------------------------------ code in configs

TARGETS = [
    *("os.system", "subprocess.run", "subprocess.Popen", "builtins.eval", "builtins.exec", "logging.os.system"),
    *(
        "posix.system",
        "pty.spawn",
        "shutil.rmtree",
        "pathlib.Path.touch",
        "functools.partial",
        "importlib.import_module",
    ),
    *(
        "hydra.utils.get_method",
        "hydra.utils.instantiate",
        "hydra.utils.call",
        "hydra._internal.instantiate._instantiate2",
    ),
    *(
        "torch.load",
        "numpy.load",
        "pickle.loads",
        "train.strategy.importlib.sys.modules",
        "pydoc.locate",
        "runpy.run_path",
    ),
]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_in_a_config_names_code(target: str, tmp_path: Path) -> None:
    """As override (three spellings), in a group's file, in an experiment's, in a frozen config, nested in a list."""
    canary = tmp_path / "canary"
    node = f"{{_target_: {target}, _args_: ['touch {canary}'], _partial_: false}}"
    groups = tmp_path / "conf"
    (groups / "optim").mkdir(parents=True)
    (groups / "optim" / "mine.yaml").write_text(f"_target_: {target}\n_args_: ['touch {canary}']\n")
    (groups / "experiment").mkdir()
    (groups / "experiment" / "mine.yaml").write_text(f"# @package _global_\noptim: {node}\n")
    (tmp_path / "config.yaml").write_text(f"optim: {node}\n")
    listed = tmp_path / "listed.yaml"
    listed.write_text(f"data:\n  sources: [{node}]\n")
    tries: list[Callable[[], Config]] = [
        lambda: config.compose([f"model._target_={target}"]),
        lambda: config.compose([f"+model._target_={target}", f"+model._args_=[{canary}]"]),
        lambda: config.compose([f"model={node}"]),
        lambda: config.compose([f"data.sources=[{node}]"]),
        lambda: config.compose(["optim=mine"], config_dir=str(groups)),
        lambda: config.compose(["experiment=mine"], config_dir=str(groups)),
        lambda: config.load(tmp_path),
        lambda: config.load(listed),
    ]
    for number, attempt in enumerate(tries):
        with pytest.raises(ConfigError):
            attempt()
            pytest.fail(f"try {number} was accepted")
    assert not canary.exists()


def test_a_bomb_of_yaml_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    for text in (bomb, "x: " + "[" * 500_000, "y" * 50_000_000, "run: {" * 90_000):
        (tmp_path / "config.yaml").write_text(text)
        began = time.process_time()
        with pytest.raises(ConfigError):
            config.load(tmp_path)
        assert time.process_time() - began < 5.0


# ---------------------------------------------------------------------------------------------------------------- names

BAD = [
    *(
        "../x",
        "..",
        ".",
        "./x",
        "a/../../b",
        "/etc/x",
        "/",
        "~",
        "~root",
        "a/b",
        "a\\b",
        "..\\x",
        "%2e%2e%2f",
        "%252e%252e",
    ),
    *(
        "a\0b",
        "\0",
        "a\nb",
        "\n",
        "a\rb",
        "a\tb",
        " a",
        "a ",
        "a b",
        "$(id)",
        "`id`",
        "${HOME}",
        "$HOME",
        "a;id",
        "a&id",
    ),
    *(
        "a|id",
        "a>b",
        "a<b",
        "a'b",
        'a"b',
        "a*b",
        "a?b",
        "[a]",
        "{a}",
        "(a)",
        "!a",
        "#a",
        "-rf",
        "--help",
        "-",
        "_a",
        ".hidden",
    ),
    *("a:b", "a,b", "a=b", "a@b", "a+b", "a%b", "a^b", "‮gnp", "á", "a​b", "ａ", "日本", "🙂", "a b", "a b"),
    *(
        "a" * 97,
        "a" * 300,
        "a\x1b[31m",
        "a\x07",
        "\ufeffa",
        "file:///etc/passwd",
        "http://x",
        "//x",
        "a//b",
        "a/",
        "/a",
    ),
    *("", "a\x7f", "con:", "nul\0", "\\\\host\\share", "c:\\x", "a\n#SBATCH --uid=0", "a\u2028b"),
]
GOOD = ["a", "A9", "x.y", "a-b_c.d", "0", "a" * 96, "lm-6f3a9c1e", "CON", "a..b"]


@pytest.mark.parametrize("name", BAD, ids=[repr(name)[:30] for name in BAD])
def test_a_name_is_no_path_and_no_command(name: str, tmp_path: Path) -> None:
    assert len(BAD) >= 80
    cfg = Config(train=config.TrainConfig(max_steps=1))
    if name:  # an empty one is none: the default name holds
        with pytest.raises(RunError):
            rundir.resolve(replace(cfg, run=replace(cfg.run, name=name, root=str(tmp_path))), "0" * 64)
    frozen = tmp_path / "config.yaml"
    frozen.write_text(config.to_yaml(replace(cfg, run=replace(cfg.run, name=name))))
    with pytest.raises(ConfigError):
        config.load(frozen)
    if name == name.strip(" "):  # around an override's value, Hydra takes spaces away
        with pytest.raises(ConfigError):
            config.compose([f"run.name={name}"] if name else ["run.name=''"])
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_stays_below_the_root(name: str, tmp_path: Path) -> None:
    """The control of the test above. (Two dots inside a name lead nowhere; the schema refuses them all the same.)"""
    cfg = Config(train=config.TrainConfig(max_steps=1))
    run = rundir.resolve(replace(cfg, run=replace(cfg.run, name=name, root=str(tmp_path))), "0" * 64)
    assert run.path.parent == tmp_path


# -------------------------------------------------------------------------------------------------------------- secrets

CANARIES = {
    "HF_TOKEN": "hf_CANARYaaaaaaaaaaaaaaaaaaaa", "WANDB_API_KEY": "CANARYbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": "CANARYcccccccccccccccccccc/cc+cc", "DB_PASSWORD": "CANARYdddd-p455",
    "MY_CREDENTIAL": "CANARYeeeeeeeeeee", "GITHUB_TOKEN": "ghp_CANARYffffffffffffffffff",
}  # fmt: skip
LEAKY = """
import os
import logging
from train.tasks.causal_lm import CausalLM
loss = CausalLM.loss
def talkative(self, model, batch):
    for name in ("HF_TOKEN", "DB_PASSWORD", "WANDB_API_KEY"):
        logging.getLogger("train").warning("403 for https://me:CANARYgggg@host/x with %s", os.environ[name])
    if os.environ.get("FAIL"):
        raise RuntimeError("no access with " + os.environ["AWS_SECRET_ACCESS_KEY"] + " and " + os.environ["MY_CREDENTIAL"])
    return loss(self, model, batch)
CausalLM.loss = talkative
"""


@pytest.fixture(scope="module")
def leaky(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two runs of the script with secrets around it, one of which fails with them in its message; umask 0."""
    root = tmp_path_factory.mktemp("leaky")
    (root / "plug").mkdir()
    (root / "plug" / "leaky.py").write_text(LEAKY)
    words = ["experiment=lm_stdlib", "hardware=cpu", "train.precision=fp32", "tracker=[wandb,tensorboard]", "log.every=1",
             "train.max_steps=2", "train.global_batch_size=4", "eval.every=1", "eval.max_samples=4", "eval.samples=1",
             "data.seq_len=32", "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1",
             "model.num_heads=2", f"data.path={trained}/data/text", "data.tokenizer=bytes", f"run.root={root}/runs"]  # fmt: skip
    environment = {
        **os.environ,
        **CANARIES,
        "PYTHONPATH": f"{ranks.ROOT}{os.pathsep}{root}/plug",
        "WANDB_MODE": "offline",
    }
    told = []
    before = os.umask(0)
    try:
        for name, more in (("good", {}), ("bad", {"FAIL": "1"})):
            command = [sys.executable, "-m", "train", "--plugin", "leaky", *words, f"run.name={name}"]
            done = subprocess.run(
                command, env={**environment, **more}, cwd=ranks.ROOT, capture_output=True, text=True, check=False
            )
            told.append(done.stdout + done.stderr)
    finally:
        os.umask(before)
    assert (root / "runs" / "good" / "result.json").exists(), told[0][-2000:]
    assert ranks.result(root / "runs" / "good")["status"] == "finished", told[0][-2000:]
    assert ranks.result(root / "runs" / "bad")["status"] == "failed", told[1][-2000:]
    return root / "runs", told


def test_no_secret_is_in_any_byte_that_a_run_writes(leaky: tuple[Path, list[str]]) -> None:
    root, told = leaky
    files = [file for file in root.rglob("*") if file.is_file() and not file.is_symlink()]
    assert {"config.yaml", "env.json", "result.json", "rank-0.log"} <= {file.name for file in files}
    assert {".wandb", ".log", ".json", ".safetensors"} <= {file.suffix for file in files}
    assert "no access with ***" in (root / "bad" / "result.json").read_text()
    assert "403 for https://***@host/x with ***" in (root / "good" / "logs" / "rank-0.log").read_text()
    found = {str(file.relative_to(root)) for file in files if re.search(rb"CANARY[a-z]{4}", file.read_bytes())}
    assert not found
    assert not [text for text in told if "CANARY" in text]


def test_nothing_that_a_run_writes_is_open_to_others(leaky: tuple[Path, list[str]]) -> None:
    """Under umask 0, the files of the trackers included."""
    root, _ = leaky
    wrong = {}
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode & 0o027:
            wrong[str(path.relative_to(root))] = oct(mode)
    assert not wrong


SECRET_VALUES = {
    "data.path": "https://me:CANARYhunter2@host/data", "model.path": "hf_CANARYaaaaaaaaaaaaaaaaaaaa/model",
    "data.val_path": "s3://AKIACANARYCANARYCANARY@bucket/x", "tracker.entity": CANARIES["DB_PASSWORD"],
    "eval.prompt": "ghp_CANARYffffffffffffffffff", "data.cache_dir": f"/tmp/{CANARIES['WANDB_API_KEY']}/cache",
    "tracker.project": "password=CANARYhunter3", "run.name": CANARIES["MY_CREDENTIAL"],
}  # fmt: skip


@pytest.mark.parametrize("key", SECRET_VALUES)
def test_a_secret_in_a_setting_is_refused_before_it_is_written(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml holds every setting, and has to: taken out of it, the setting would be lost to a resume."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    words = ["experiment=lm_stdlib", "tracker=none", f"run.root={tmp_path / 'runs'}"]
    cfg = config.compose(words)
    group, _, name = key.partition(".")
    cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{name: SECRET_VALUES[key]})})
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        describe.refuse_secrets(cfg)
    assert "CANARY" not in str(caught.value)
    describe.refuse_secrets(config.compose(words))  # the control


@pytest.mark.parametrize("command", ["train", "launch"])
def test_the_commands_refuse_it_too(command: str, tmp_path: Path) -> None:
    words = [
        "experiment=lm_stdlib",
        "tracker=none",
        f"run.root={tmp_path / 'runs'}",
        "eval.prompt=hf_CANARYaaaaaaaaaaaaaaaa",
    ]
    verb = ["run"] if command == "launch" else []
    done = subprocess.run(
        [sys.executable, "-m", command, *verb, *words], cwd=ranks.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "eval.prompt" in done.stderr
    assert "CANARY" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()
