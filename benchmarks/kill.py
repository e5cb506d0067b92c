"""What a run survives: kill -9 at random moments, and requests to stop at random moments.

    python benchmarks/kill.py --points 500            kills; each is followed by a resume
    python benchmarks/kill.py --stops 100             requests to stop
    python benchmarks/kill.py --points 60 --append    in pieces: adds to the file of raw results, rewrites the table

A small language model (two layers, dropout, two micro-batches a step, evaluations) is trained by the script's own
entry point, `train.__main__.main`, in processes forked from one that has imported torch, because a start costs five seconds
of imports and nothing else in it matters here. The command line, the run directory, the signals and the death are
real. Runs differ in `checkpoint.keep` (1, 2), `checkpoint.asynchronous` and `checkpoint.keep_every`.

Kills are drawn in two ways, one as often as the other:

    time         SIGKILL from outside, after a delay drawn uniformly over the length of an unbroken run. Most of these fall
                 into computing, as most real ones would.
    operation    the process kills itself at a file system operation on the run directory. A census of an unbroken and a
                 resumed run lists them by kind (`rename checkpoints/.step-#.#.tmp`, `unlink lock/#.json`, `write
                 checkpoints/.step-#.#.tmp/rank-#.safetensors`, ...). A kind is drawn uniformly, every other time
                 from those below `checkpoints/`, so that the rare ones, the commit and the rotation, are hit as
                 often as the frequent ones; then one of its occurrences; then before it, after it, or halfway
                 through for a write.

What was written and not flushed survives here, as it does when a process dies. A power cut is another matter, and this
is no test of it.

After each kill every committed checkpoint must verify, the newest must not be older than the newest before it, `gearshift
verify` must be clean, and the next start must go on from it. At the end of each run its state hash and the losses of all
steps must be those of the unbroken run, bit for bit, and `gearshift verify` must be clean. The control is a saver that
makes room and then writes in place; it must fail.

Requests to stop (SIGTERM, SIGUSR1, SIGINT, a STOP file) come at a random time, or at a named moment: while importing, in the
first step, between two micro-batches, in an evaluation, in a save, in the last step. Those that say `gearshift` start
the command line cold, on one rank or two, and ask for exit code 75. No step may be lost or done twice, nothing may be
left running.
"""

from __future__ import annotations

import argparse
import builtins
import datetime
import functools
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

STEPS, EVERY = 20, 3
RUN = [
    *("experiment=lm_stdlib", "hardware=cpu", "strategy=single", "train.precision=fp32", "tracker=none"),
    *("model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2", "model.num_heads=2", "model.dropout=0.1"),
    *("data.tokenizer=bytes", "data.seq_len=32", "train.global_batch_size=4", "strategy.micro_batch_size=2"),
    *(f"train.max_steps={STEPS}", f"checkpoint.every={EVERY}", "optim.warmup_steps=2", "optim.lr=3e-3"),
    *("eval.every=5", "eval.max_samples=4", "eval.samples=0", "log.every=4"),
]  # fmt: skip
VARIANTS = [
    ["checkpoint.keep=1"],
    ["checkpoint.keep=1", "checkpoint.keep_best=false"],
    ["checkpoint.keep=2", "checkpoint.asynchronous=false"],
    ["checkpoint.keep=1", "checkpoint.keep_every=6", "checkpoint.asynchronous=false"],
]
REQUESTS = ("SIGTERM", "SIGUSR1", "SIGINT", "STOP")
MOMENTS = ("importing", "first step", "micro-batch", "evaluation", "save", "last step")
PATIENCE_S = 180.0


# -- processes ---------------------------------------------------------------------------------------------------------


def start(arguments: list[str], output: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Fork a process that runs the script in a session of its own; its id. prepare: done in it before the first import."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        prepare()
        from train.__main__ import main

        os._exit(main(arguments))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def outcome(pid: int, after_s: float = 0.0, act: Callable[[int], object] | None = None) -> int:
    """Exit code of a process, negative for a signal. act: done to it after a delay, if it still runs then."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if act is not None and time.monotonic() >= began + after_s:
            act(pid)
            act = None
        if time.monotonic() >= began + PATIENCE_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} still ran after {PATIENCE_S:.0f} s")
        time.sleep(0.002)


class Operations:
    """In a process to be killed: counts its file system operations on the run directory, and dies at a chosen one."""

    NAMES = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "fsync", "truncate", "write")

    def __init__(self, run: Path, kill_at: tuple[str, int, str] | None, census: Path | None) -> None:
        """kill_at: kind, which occurrence of it (from 1), and `before`, `halfway` or `after`. census: gets every kind."""
        self.run, self.kill_at, self.census = str(run), kill_at, census
        self.seen: Counter[str] = Counter()
        self.real = {name: getattr(os, name) for name in self.NAMES}
        for name, function in self.real.items():
            setattr(os, name, self._counted(name, function))
        self.open = builtins.open
        builtins.open = self._open  # type: ignore[assignment]

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(target: Any, *arguments: Any, **keywords: Any) -> Any:
            path = self._path(target, keywords.get("dir_fd"))
            if not path.startswith(self.run + "/"):
                return function(target, *arguments, **keywords)
            half = (lambda: function(target, arguments[0][: len(arguments[0]) // 2])) if name == "write" else None
            return self._at(name, path, lambda: function(target, *arguments, **keywords), half)

        return counted

    def _path(self, target: Any, directory: int | None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        above = "" if directory is None else os.readlink(f"/proc/self/fd/{directory}")
        return os.path.join(above, os.fspath(target))

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **keywords: Any) -> Any:
        """`open` whose writes are counted, for the binary files that the product writes through descriptors."""
        if not isinstance(file, int) or mode != "wb":
            return self.open(file, mode, buffering, *rest, **keywords)
        operations, path = self, self._path(file, None)

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                return operations._at(
                    "write",
                    path,
                    lambda: io.FileIO.write(self, view),
                    lambda: io.FileIO.write(self, view[: len(view) // 2]),
                )

        raw = Raw(file, "w")
        return raw if buffering == 0 else io.BufferedWriter(raw)

    def _at(self, name: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        where = re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", path[len(self.run) + 1 :])
        kind = f"{name} {re.sub(r'[0-9]+', '#', where)}"
        self.seen[kind] += 1
        if self.census is not None:
            with self.open(self.census, "a") as file:
                file.write(kind + "\n")
        if self.kill_at is not None and (kind, self.seen[kind]) == self.kill_at[:2]:
            when = self.kill_at[2]
            if when == "halfway" and half is not None:
                half()
            elif when == "after":
                act()
            os.kill(os.getpid(), signal.SIGKILL)
        return act()


def _prepare(run: Path, control: bool, kill_at: tuple[str, int, str] | None, census: Path | None) -> None:
    """What a forked process does before it runs the script."""
    if control:
        from train import checkpoint

        checkpoint.Checkpointer.save = save_in_place  # type: ignore[method-assign]
    if kill_at is not None or census is not None:
        Operations(run, kill_at, census)


def save_in_place(self: Any, step: int, counters: dict[str, Any]) -> None:
    """The control, in place of `Checkpointer.save`: makes room, then writes where the checkpoint is to be."""
    from train import checkpoint, rundir

    if step == self.saved_step:
        return
    self.saved_step = step
    ranges, flat = self._copy()
    header, table = checkpoint._header(ranges, {n: i for i, n in enumerate(self.strategy.shapes)})
    for old in rundir.committed(self.run):
        shutil.rmtree(self.run.checkpoint(old))
    final = rundir.make_directory(self.run.checkpoint(step))
    receipt = checkpoint._write_file(final, 0, header, flat, table)
    manifest = self._manifest(step, dict(counters), {0: receipt})
    with open(os.open(final / "manifest.json", os.O_WRONLY | os.O_CREAT, 0o640), "wb") as file:
        file.write(json.dumps(manifest).encode())
    self.run.event("commit", step=step, attempt=self.attempt)


# -- what is true of a run directory -----------------------------------------------------------------------------------


def jsonl(file: Path) -> list[dict[str, Any]]:
    """Whole lines; a killed writer may have left a torn one at the end."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def newest(run: Path) -> tuple[int, list[str]]:
    """The newest step with a checkpoint (0: none), and what is wrong with any of them."""
    from train import checkpoint, rundir

    directory, problems = rundir.RunDir(run), []
    steps = rundir.committed(directory)
    for step in steps:
        try:
            checkpoint.Reader(directory.checkpoint(step)).verify()
        except checkpoint.CheckpointError as error:
            problems.append(f"looks committed, and is not: {error}")
    return max(steps, default=0), problems


def verified(run: Path) -> list[str]:
    """What `gearshift verify` finds wrong."""
    from train import ledger, rundir

    return ledger.verify(rundir.RunDir(run))["problems"]


def last_attempt(run: Path) -> int:
    from train import rundir

    return rundir.RunDir(run).last_attempt()


def gone_on_from(run: Path, since: int, before: int) -> list[str]:
    """What is wrong with where the attempts after `since` began, when step `before` had been saved."""
    events = (e for e in jsonl(run / "events.jsonl") if e["kind"] in ("start", "resume") and e["attempt"] > since)
    first = next(events, {"step": before})
    return (
        [] if first["step"] == before else [f"attempt {first['attempt']} began from step {first['step']}, not {before}"]
    )


def truth(run: Path) -> tuple[str | None, list[str]]:
    """State hash, and the loss of every step as the latest attempt has it."""
    rows = {row["step"]: row["loss_hex"] for row in jsonl(run / "metrics.jsonl")}
    return json.loads((run / "result.json").read_text())["state_hash"], [f"{s} {rows[s]}" for s in sorted(rows)]


def left_running(session: int) -> list[str]:
    """Processes of a session, as `id command`; none may be left when its leader has ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(f"{stat.parent.name} {(stat.parent / 'cmdline').read_text()[:80]!r}")
        except (OSError, IndexError):
            continue
    return found


# -- the campaigns -----------------------------------------------------------------------------------------------------


class Campaign:
    """One unbroken run, a census of its operations, and broken runs to compare with it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        text = root / "text"
        text.mkdir()
        for number in range(12):
            lines = (f"def f_{number}_{line}(x):\n    return x + {line * number}\n" for line in range(20))
            (text / f"{number}.py").write_text("\n".join(lines))
        self.number = 0
        for attempt in range(2):  # the first prepares the data and fills caches
            began = time.monotonic()
            code = outcome(start(self.command(f"unbroken-{attempt}"), root / "log"))
            if code:
                raise RuntimeError((root / "log").read_text()[-3000:])
            self.length_s = time.monotonic() - began
        self.unbroken = truth(root / "unbroken-1")
        self.kinds = self._census(control=False)
        self.control_kinds = {k: n for k, n in self._census(control=True).items() if " checkpoints/" in k}

    def command(self, name: str, *overrides: str) -> list[str]:
        where = [f"data.path={self.root}/text", f"data.cache_dir={self.root}/cache", f"run.root={self.root}"]
        return [*RUN, *where, f"run.name={name}", *overrides]

    def _census(self, control: bool) -> Counter[str]:
        """Kinds of operation with how often each occurs in a run: in one that meets the remains of a killed one, too."""
        kinds: Counter[str] = Counter()
        kill = ("write ledger.jsonl", 8, "after") if control else ("rename checkpoints/.step-#.#.tmp", 3, "before")
        file, run = self.root / "census", self.root / f"census-{control}"
        for kill_at in (kill, None):
            file.write_text("")
            prepare = functools.partial(_prepare, run, control, kill_at, file)
            outcome(start(self.command(run.name, *VARIANTS[0]), self.root / "log", prepare))
            kinds |= Counter(file.read_text().splitlines())
        return kinds

    def kill(self, points: int, *, control: bool = False) -> None:
        """Kill until `points` kills are done, each resumed; the run that is under way is then finished."""
        done = 0
        while done < points:
            self.number += 1
            run, variant = self.root / f"run-{self.number}", VARIANTS[self.number % len(VARIANTS)]
            rows, finished = [], False
            while not finished and done < points and len(rows) < 12:
                row = self._kill_once(run, variant, control)
                finished = row["exit"] == 0
                if not finished:
                    rows.append(row)
                    done += 1
                if row["problem"]:
                    break
            self.rows += rows
            if rows:
                self._finish(run, variant, rows, control)
            shutil.rmtree(run, ignore_errors=True)

    def _kill_once(self, run: Path, variant: list[str], control: bool) -> dict[str, Any]:
        before = newest(run)[0] if run.exists() else 0
        since = last_attempt(run)
        left = 1 - before / STEPS
        delay, kill_at, act, where = 0.0, None, None, "time"
        kinds = self.control_kinds if control else self.kinds
        if not control and self.draw.random() < 0.5:
            delay, act = self.draw.uniform(0, self.length_s), lambda pid: os.kill(pid, signal.SIGKILL)
        else:
            ours = [kind for kind in sorted(kinds) if " checkpoints/" in kind]
            kind = self.draw.choice(ours if self.draw.random() < 0.5 else sorted(kinds))
            times = 1 + int(self.draw.random() * kinds[kind] * left)
            when = self.draw.choice(["before", "halfway" if kind.startswith("write ") else "before", "after"])
            kill_at, where = (kind, times, when), f"{when} {kind}"

        prepare = functools.partial(_prepare, run, control, kill_at, None)
        code = outcome(start(self.command(run.name, *variant), self.root / "log", prepare), delay, act)
        after, problems = newest(run)
        if code not in (0, -signal.SIGKILL):
            problems.append(f"the start failed ({code}): {(self.root / 'log').read_text()[-300:]}")
        if after < before:
            problems.append(f"step {before} had been saved; {after or 'nothing'} is left")
        problems += gone_on_from(run, since, before)
        if after:
            problems += verified(run)
        reached = max((line["step"] for line in jsonl(run / "ledger.jsonl")), default=0)
        return {"what": "control" if control else "kill", "where": where, "variant": variant, "run": self.number, "exit": code,
                "saved": after, "redone": max(0, reached - after), "problem": "; ".join(problems) or None}  # fmt: skip

    def _finish(self, run: Path, variant: list[str], rows: list[dict[str, Any]], control: bool) -> None:
        """Let it run to its end; what is wrong then is held against the last kill."""
        before = newest(run)[0]
        since = last_attempt(run)
        code = outcome(start(self.command(run.name, *variant), self.root / "log"))
        problems = gone_on_from(run, since, before)
        if code:
            problems.append(f"the last start failed ({code}): {(self.root / 'log').read_text()[-300:]}")
        else:
            if truth(run) != self.unbroken:
                problems.append("differs from the unbroken run")
            problems += verified(run)
        rows[-1]["problem"] = rows[-1]["problem"] or "; ".join(problems) or None
        rows[-1]["ended"] = True

    # -- requests to stop

    def stop(self, points: int, cold: int) -> None:
        """`points` requests, `cold` of them to a `gearshift run` that is just starting or training."""
        for _ in range(cold):
            self._stop_cold()
        done = cold
        while done < points:
            self.number += 1
            run, rows, finished = self.root / f"stop-{self.number}", [], False
            while not finished and done < points:
                row = self._stop_once(run, VARIANTS[self.number % len(VARIANTS)])
                finished = row.pop("finished")
                if row["asked"]:
                    rows.append(row)
                    done += 1
                if row["problem"]:
                    break
            if not finished:
                outcome(start(self.command(run.name), self.root / "log"))
            if rows:
                self.rows += rows
                rows[-1]["problem"] = rows[-1]["problem"] or self._ledger_of_stops(run)
            shutil.rmtree(run, ignore_errors=True)

    def _ledger_of_stops(self, run: Path) -> str | None:
        """Every step was done once in the life of the run, which is more than what the ledger's own check asks."""
        lines = [line["step"] for line in jsonl(run / "ledger.jsonl")]
        if lines != list(range(1, STEPS + 1)):
            return f"steps were done as {lines}"
        if truth(run) != self.unbroken:
            return "differs from the unbroken run"
        return "; ".join(verified(run)) or None

    def _stop_once(self, run: Path, variant: list[str]) -> dict[str, Any]:
        request, moment = self.draw.choice(REQUESTS), self.draw.choice(["time", *MOMENTS])
        if request == "STOP" and not run.exists():
            moment = "micro-batch"  # there is no directory yet to put it into
        asked = self.root / "asked"
        asked.unlink(missing_ok=True)

        def ask(pid: int) -> None:
            if moment == "time" and not (run / "lock").exists():
                return  # not yet a run: whoever is told to leave then just leaves
            asked.touch()
            if request == "STOP":
                (run / "STOP").touch()
            else:
                os.kill(pid, getattr(signal, request))

        countdown, delay = self.draw.randrange(1, 12), self.draw.uniform(0.3 * self.length_s, self.length_s)
        pid = start(self.command(run.name, *variant), self.root / "log",
                    lambda: _ask_at(moment, countdown, lambda: ask(os.getpid())))  # fmt: skip
        code = outcome(pid, delay, ask if moment == "time" else None)
        problem = self._judge_stop(run, code, pid, asked.exists())
        status = json.loads((run / "result.json").read_text())["status"] if (run / "result.json").exists() else None
        return {"what": "stop", "where": f"{request}, {moment}", "asked": asked.exists(), "problem": problem,
                "finished": status == "finished"}  # fmt: skip

    def _judge_stop(self, run: Path, code: int, session: int, asked: bool) -> str | None:
        problems = [] if code == 0 else [f"exit code {code}: {(self.root / 'log').read_text()[-300:]}"]
        if orphans := left_running(session):
            problems.append(f"left running: {orphans}")
        if not problems:
            result = json.loads((run / "result.json").read_text())
            saved, more = newest(run)
            done = max((line["step"] for line in jsonl(run / "ledger.jsonl")), default=0)
            problems += more
            if result["status"] not in (("stopped", "finished") if asked else ("finished",)):
                problems.append(f"status {result['status']}")
            if not saved == result["steps"] == done:
                problems.append(f"{done} steps were done, {result['steps']} are reported, {saved} are saved")
        return "; ".join(problems) or None

    def _stop_cold(self) -> None:
        """`gearshift run`, one signal to it at a random moment of its life, exit code 75; then on to the end."""
        self.number += 1
        run, request = self.root / f"cold-{self.number}", self.draw.choice(REQUESTS[:3])
        ranks = self.draw.choice([1, 1, 2])
        arguments = [each for each in self.command(run.name) if each != "strategy=single"]
        arguments += [f"hardware.devices_per_node={ranks}", f"strategy={'single' if ranks == 1 else 'ddp'}"]
        command = [sys.executable, "-m", "launch", "run", *arguments, "train.max_steps=2000", "checkpoint.every=500"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self.root / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None and len(processes_with(run.name)) < 2:  # until it has started the ranks
                time.sleep(0.05)
            time.sleep(self.draw.uniform(0, 12))
            process.send_signal(getattr(signal, request))
            try:
                code = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        problems = [] if code == 75 else [f"exit code {code}: {(self.root / 'log').read_text()[-300:]}"]
        if code == 75:
            result, saved = json.loads((run / "result.json").read_text()), newest(run)[0]
            done = [line["step"] for line in jsonl(run / "ledger.jsonl")]
            if not saved == result["steps"] == len(done) or done != list(range(1, saved + 1)):
                problems.append(f"{len(done)} steps were done, {result['steps']} are reported, {saved} are saved")
        if orphans := processes_with(f"run.name={run.name}") + processes_with(str(run)):
            problems.append(f"left running: {orphans}")
        self.rows.append({"what": "stop", "where": f"{request}, gearshift, {ranks} rank(s)", "asked": True,
                          "problem": "; ".join(problems) or None})  # fmt: skip
        shutil.rmtree(run, ignore_errors=True)


def processes_with(word: str) -> list[str]:
    """Processes with a word in their command line, other than this one."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in file.read_text().replace("\0", " ") and int(file.parent.name) != os.getpid():
                found.append(file.parent.name)
        except OSError:
            continue
    return found


def _ask_at(moment: str, countdown: int, ask: Callable[[], None]) -> None:
    """In the process to be stopped: ask at a named moment, the countdown-th of its kind."""
    from train import checkpoint, main
    from train.data.loader import Loader
    from train.tasks.causal_lm import CausalLM

    def before(owner: Any, name: str, due: Callable[..., bool]) -> None:
        real, seen = getattr(owner, name), [0]

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            seen[0] += 1
            if due(seen[0], arguments):
                ask()
            return real(*arguments, **keywords)

        setattr(owner, name, wrapped)

    if moment == "importing":  # noted from `catch_early` on; the run directory is not there yet
        before(main.strategy, "start", lambda n, _: n == 1)
    elif moment == "first step":
        before(Loader, "micro_batches", lambda n, _: n == 1)
    elif moment == "micro-batch":
        before(CausalLM, "loss", lambda n, _: n == 2 * countdown)
    elif moment == "evaluation":
        before(CausalLM, "evaluate", lambda n, _: n == 1)
    elif moment == "save":
        before(checkpoint, "_write_file", lambda n, _: n == 1 + countdown // 4)
    elif moment == "last step":
        before(Loader, "micro_batches", lambda _, arguments: arguments[1] == STEPS - 1)


# -- the report --------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows so far."""

    def part(name: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["what"] == name]

    lines = [f"# Kills and stops, {datetime.date.today()}", ""]
    lines.append(
        f"`python benchmarks/kill.py`, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. "
        "What is done, and what counts as failed, is in the script's first lines."
    )
    lines += ["", "| | points | unresumable or wrong | runs finished and compared bit for bit |", "|---|---|---|---|"]
    for name, title in (
        ("kill", "kill -9"),
        ("control", "kill -9, saver that writes in place (control)"),
        ("stop", "stop"),
    ):
        found = part(name)
        if found:
            ended = str(sum(bool(r.get("ended")) for r in found)) if name != "stop" else "each"
            lines.append(f"| {title} | {len(found)} | {sum(r['problem'] is not None for r in found)} | {ended} |")
    kills = part("kill")
    if kills:
        redone = sorted(row["redone"] for row in kills)
        lines += ["", f"Steps done again after a kill, with a checkpoint every {EVERY}: median {redone[len(redone) // 2]}, "
                  f"at most {redone[-1]}. `checkpoint.keep=1` in {sum('checkpoint.keep=1' in r['variant'] for r in kills)} "
                  "of the kills."]  # fmt: skip
        lines += ["", "| moment of the kill | points | failed |", "|---|---|---|"]
        for where, group in _grouped(kills, lambda r: re.sub(r"^(before|halfway|after) ", "", r["where"])).items():
            lines.append(f"| {where} | {len(group)} | {sum(r['problem'] is not None for r in group)} |")
    if stops := part("stop"):
        lines += ["", "| request, moment | points | failed |", "|---|---|---|"]
        for where, group in _grouped(stops, lambda r: r["where"]).items():
            lines.append(f"| {where} | {len(group)} | {sum(r['problem'] is not None for r in group)} |")
    wrong = [row for row in rows if row["problem"] and row["what"] != "control"]
    lines += ["", *(f"- **{r['what']}** {r['where']}: {r['problem']}" for r in wrong)] if wrong else []
    return "\n".join(lines) + "\n"


def _grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=key):
        groups.setdefault(key(row), []).append(row)
    return groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=0, help="kills")
    parser.add_argument("--control", type=int, default=0, help="kills of the saver that writes in place")
    parser.add_argument("--stops", type=int, default=0, help="requests to stop")
    parser.add_argument("--cold", type=int, default=0, help="how many of the stops go to a cold `gearshift run`")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; printed, and new where it is not given")
    parser.add_argument("--append", action="store_true", help="add to today's raw results, and rewrite the table")
    parser.add_argument("--raw", type=Path, default=ROOT / "runs" / f"kill_{datetime.date.today()}.jsonl")
    parser.add_argument("--to", type=Path, default=RESULTS / f"kill_{datetime.date.today()}.md", help="the table")
    options = parser.parse_args()
    if not (options.points or options.stops or options.control):
        options.points, options.control, options.stops, options.cold = 500, 40, 100, 20
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    print(f"seed {seed}", flush=True)

    from transformers import LlamaForCausalLM  # noqa: F401  what is forked has torch and the model's code

    import train.main  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="kill-") as root:
        campaign = Campaign(Path(root), seed)
        print(f"an unbroken run takes {campaign.length_s:.1f} s; {len(campaign.kinds)} kinds of operation", flush=True)
        try:
            campaign.kill(options.points)
            campaign.kill(options.control, control=True)
            campaign.stop(options.stops, options.cold)
        finally:
            options.raw.parent.mkdir(exist_ok=True)
            with options.raw.open("a" if options.append else "w") as file:
                file.writelines(json.dumps({**row, "seed": seed}) + "\n" for row in campaign.rows)
    options.to.write_text(table(jsonl(options.raw)))
    ours = [row for row in campaign.rows if row["what"] != "control"]
    failed = [row for row in ours if row["problem"]]
    control = [row for row in campaign.rows if row["what"] == "control"]
    for row in failed:
        print(f"FAILED {row['what']} {row['where']}: {row['problem']}")
    print(
        f"{len(ours)} points, {len(failed)} failed; control: {sum(r['problem'] is not None for r in control)} of {len(control)}"
    )
    if control and not any(row["problem"] for row in control):
        print("the control passes: this benchmark is broken")
        return 1
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
