"""`gearshift verify`: clean for honest runs wherever they were copied, and the gap by name for all others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from tests import ranks, trained
from train import checkpoint, ledger, rundir
from train.rundir import RunDir

pytestmark = pytest.mark.timeout(300)

COMMON = [*trained.COMMON, "train.max_steps=6", "strategy.micro_batch_size=2", *trained.LANGUAGE]
WRONG_SAMPLE = """
from train import stop
from train.data import loader
from train.order import Samples
plan, begin, runs = loader.Loader._plan, stop.Stop.__init__, []
def begun(self, cfg, *files, **words):
    runs.append(cfg.run.name)
    begin(self, cfg, *files, **words)
stop.Stop.__init__ = begun
def wrong(self, step):
    if runs[-1] != "wrong-sample":
        return plan(self, step)
    ids = self.order.ids
    self.order.ids = lambda s: Samples(ids(s).source, (ids(s).index + (s == 3)) % self.order.sizes[0], ids(s).epoch)
    try:
        return plan(self, step)
    finally:
        self.order.ids = ids
loader.Loader._plan = wrong
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: `chain` (2 ranks, then 1), `lora` (over `base`, stopped and copied)."""
    root = tmp_path_factory.mktemp("verify")
    (root / "text").mkdir()
    for number in range(8):
        (root / "text" / f"{number}.py").write_text("\n".join(f"x_{number}_{i} = {i * number}" for i in range(60)))
    chats = [[("user", f"{n} + 1?"), ("assistant", f"{n + 1}.")] for n in range(40)]
    messages = [{"messages": [{"role": who, "content": text} for who, text in chat]} for chat in chats]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in messages))
    trained._base(root / "base")

    text = ["experiment=lm_stdlib", f"data.path={root}/text", "data.tokenizer=bytes", *trained.NETWORK]
    chat = ["experiment=finetune_lora", "peft.r=4"]

    def job(name: str, *words: str) -> list[str]:
        return [*COMMON, *words, f"run.root={root}/runs", f"run.name={name}"]

    ranks.run_jobs(2, [
        job("chain", *text, "run.stop_at=2", "strategy=zero2"),
        job("lora", *chat, f"data.path={root}/chats.jsonl", f"model.path={root}/base", "run.stop_at=3"),
    ])  # fmt: skip

    # The copy: config, the jsonl files and the newest checkpoint; data and base model at other paths; the old ones gone.
    here, there = root / "runs" / "lora", root / "elsewhere" / "lora"
    there.mkdir(parents=True)
    for file in ["config.yaml", *(f.name for f in here.glob("*.jsonl"))]:
        shutil.copy(here / file, there / file)
    shutil.copytree(here / "checkpoints" / "step-00000003", there / "checkpoints" / "step-00000003")
    (root / "lora-first.json").write_text((here / "result.json").read_text())
    shutil.move(root / "base", root / "other_base")
    (root / "moved").mkdir()
    shutil.move(root / "chats.jsonl", root / "moved" / "chats.jsonl")
    moved = [f"data.path={root}/moved/chats.jsonl", f"model.path={root}/other_base", f"run.root={root}/elsewhere"]
    jobs = [job("chain", *text), [*job("lora", *chat), *moved], job("wrong-sample", *text)]
    ranks.run_jobs(1, jobs, setup=WRONG_SAMPLE)
    return root


def verify(run: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["verify", str(run), *words])
    return done.exit_code, done.output


@pytest.mark.ranks
def test_a_run_over_several_sizes_is_clean(root: Path) -> None:
    code, said = verify(root / "runs" / "chain", "--json")
    found = json.loads(said)
    assert (code, found["clean"], found["problems"]) == (0, True, [])
    assert (found["steps"], found["positions"], found["redone"]) == (6, 24, 0)
    assert (found["attempts"], found["ranks"], found["checkpoints"]) == ([1, 2], [1, 2], [2, 4, 6])
    code, said = verify(root / "runs" / "chain")
    assert code == 0
    assert "24 positions of 6 steps, each used exactly once" in said


@pytest.mark.ranks
def test_one_wrong_sample_in_the_model_is_found(root: Path) -> None:
    code, said = verify(root / "runs" / "wrong-sample")
    assert code == 1
    assert "step 4: other samples went into the model" in said
    assert "1 problems" in said


@pytest.mark.ranks
def test_a_copy_with_data_and_base_model_elsewhere_goes_on_and_is_clean(root: Path) -> None:
    first, last = json.loads((root / "lora-first.json").read_text()), ranks.result(root / "elsewhere" / "lora")
    assert (first["status"], first["steps"], last["status"], last["steps"]) == ("stopped", 3, "finished", 6)
    assert first["math_hash"] == last["math_hash"]
    assert last["attempt"] == 2
    assert verify(root / "elsewhere" / "lora")[0] == 0


# ------------------------------------------------------------------------------------------------- what must be found


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(root / "runs" / "chain", tmp_path / "chain"))


def edited(run: RunDir, change: Callable[[list[dict]], object]) -> str:
    records = rundir.read_jsonl(run.ledger)
    change(records)
    run.ledger.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, said = verify(run.path)
    assert code == 1
    return said


def test_lines_that_are_lost_repeated_or_wrong_are_named(copy: RunDir) -> None:
    before = copy.ledger.read_text()
    cases: dict[str, Callable[[list[dict]], object]] = {
        "steps 2 to 3: no line; positions 4 to 11 are not accounted for": lambda lines: lines.__delitem__(slice(1, 3)),
        "step 6: no line; positions 20 to 23": lambda lines: lines.pop(),
        "step 2: done 2 times in attempt 1; positions 4 to 7 are repeated": lambda lines: lines.append(lines[1]),
        "step 5: positions 16 to 18, expected 16 to 19": lambda lines: lines[4].update(last=18),
        "step 1: other samples": lambda lines: lines[0].update(digest=lines[1]["digest"]),
        "a line lacks 'ranks'": lambda lines: lines[3].pop("ranks"),
        "step 3: no line": lambda lines: lines[2].update(attempt=1),
    }
    for expected, change in cases.items():
        copy.ledger.write_text(before)
        assert expected in edited(copy, change)
    copy.ledger.write_text(before)
    assert verify(copy.path)[0] == 0


def test_steps_done_again_after_a_kill_are_attempts_and_not_repeats(copy: RunDir) -> None:
    """Attempt 1 had gone on to step 4 without a save when it was killed; attempt 2 began at 2."""
    records = rundir.read_jsonl(copy.ledger)
    lost = [{**line, "attempt": 1} for line in records[2:4]]
    copy.ledger.write_text("".join(json.dumps(line) + "\n" for line in [*records[:2], *lost, *records[2:]]))
    found = ledger.verify(copy)
    assert (found["problems"], found["redone"]) == ([], 2)
    events = [event for event in rundir.read_jsonl(copy.events) if event.get("attempt") != 1]
    copy.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert any("attempt 1 has no beginning" in problem for problem in ledger.verify(copy)["problems"])


def test_damaged_checkpoints_are_named(copy: RunDir) -> None:
    def damage(file: Path, change: Callable[[bytes], bytes], expected: str) -> None:
        content = file.read_bytes()
        file.write_bytes(change(content))
        code, said = verify(copy.path)
        assert code == 1
        assert file.parent.name in said
        assert expected in said
        file.write_bytes(content)

    for step in (2, 4, 6):
        weights = sorted(copy.checkpoint(step).glob("*.safetensors"))[-1]
        damage(weights, lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "sha256 differs")
        damage(weights, lambda content: content[:-4], "bytes")
        damage(copy.checkpoint(step) / "manifest.json", lambda content: content[:-9], "manifest.json")
        damage(
            copy.checkpoint(step) / "manifest.json",
            lambda content: content.replace(b'"samples"', b'"sample"', 1),
            "does not hash to what it says",
        )
    assert verify(copy.path)[0] == 0
    shutil.rmtree(copy.checkpoint(6))
    assert "result.json is of step 6, the newest checkpoint that is whole of 4" in verify(copy.path)[1]


def test_a_manifest_that_covers_too_little_is_refused_though_it_hashes(copy: RunDir) -> None:
    file = copy.checkpoint(6) / "manifest.json"
    manifest = json.loads(file.read_bytes())

    def rewritten(change: Callable[[dict], object]) -> str:
        changed = json.loads(file.read_bytes())
        change(changed)
        changed["manifest_sha256"] = checkpoint._manifest_hash(changed)
        file.write_text(json.dumps(changed))
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.Reader(file.parent).verify()
        file.write_text(json.dumps(manifest))
        return str(error.value)

    assert "ends at element 0" in rewritten(lambda m: m["files"][0]["ranges"].pop(1))
    assert "gap or an overlap" in rewritten(lambda m: m["files"][0]["ranges"].append([0, 1, 1]))
    assert "the checkpoint" in rewritten(lambda m: m["files"][0]["kinds"].remove("exp_avg"))
    assert "its header" in rewritten(lambda m: [f["kinds"].remove("exp_avg") for f in [m, *m["files"]]])
    assert "leads elsewhere" in rewritten(lambda m: m["files"][0].update(name="../rank-00000.safetensors"))
    assert "KeyError" in rewritten(lambda m: m.pop("tensors"))
    assert "TypeError" in rewritten(lambda m: m["files"][0].update(ranges=None))
    checkpoint.Reader(file.parent).verify()


def test_a_run_without_a_checkpoint_has_nothing_to_prove_and_a_directory_without_a_run_is_refused(
    copy: RunDir, tmp_path: Path
) -> None:
    shutil.rmtree(copy.checkpoints)
    copy.result_file.unlink()
    assert verify(copy.path)[0] == 0
    assert verify(tmp_path)[0] == 2
