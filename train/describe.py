"""What is told about a run: its result as text, and the environment it ran in.

Owns: the text that ends a run, and that a finished run shows again; what `env.json` holds; how secrets are taken out of
what is written down. Torch-free.

Does not own: the files it reads (`rundir.py`); the report (`launch/report`).
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from train import config
from train.config import Config
from train.rundir import RunDir, alive, holder, last_record, read_jsonl
from train.rundir import describe as describe_owner

_SECRET = r"(?:token|secret|passwd|password|passphrase|api_?key|credential|private_?key)(?!s\b|iz)"
"""Part of the name of a secret; `tokenizer` and `max_tokens` are none."""
_BASELINES = {
    "ngram2_bpb": ("byte n-gram", "two bytes of context, counted on the training files"),
    "xz9_bpb": ("xz -9", "a small model does not beat it"),
}
"""Names of the data's baselines, in bits per byte, as a person reads them."""
_PACKAGES = [
    *("torch", "accelerate", "deepspeed", "hydra-core", "transformers", "peft", "wandb", "safetensors", "tokenizers"),
    *("numpy", "bitsandbytes"),
]


def show_result(run: RunDir) -> str:
    """What a person sees at the end of a run, and again whenever it is asked for. Reads only the directory."""
    result = run.result() or {}
    status, evaluation = result.get("status", "not started"), result.get("eval") or {}
    lines = [f"{run.path.name}: {status}" + (f" ({result['reason']})" if result.get("reason") else "")]

    def row(name: str, value: Any, note: str = "") -> None:
        if value is not None:
            lines.append(
                f"  {name:<22}{value:,.4g}{note}" if isinstance(value, float) else f"  {name:<22}{value}{note}"
            )

    counted = [f"{result[key]:,} {key}" for key in ("steps", "samples", "tokens") if result.get(key)]
    if result.get("wall_s"):
        counted.append(f"{result['wall_s']:.0f} s")
    row("trained", ", ".join(counted) or None)
    row(f"best {result.get('metric', 'objective')}", result.get("objective"))
    for name, value in evaluation.items():
        row(name, value)
    for name, value in (result.get("baselines") or {}).items():
        label, note = _BASELINES.get(name, (name, ""))
        row(f"  {label}", value, f"  on the same held-out files; {note}" if note else "")
    engine = result.get("engine") or {}
    if engine:
        row("ran as", f"{engine.get('strategy')}, {engine.get('world_size')} rank(s), {engine.get('precision')}")
    predicted, measured = result.get("predicted") or {}, result.get("measured") or {}
    for name, value in measured.items():
        row(name, value, f"  (predicted {predicted[name]:,.4g})" if predicted.get(name) else "")
    row("run directory", _shown(run.path))
    offline = sorted(run.path.glob("wandb/offline-run-*"))
    if offline:  # one a W&B run for each attempt
        row(
            "W&B, offline",
            f"wandb sync {_shown(offline[0] if len(offline) == 1 else run.path / 'wandb' / 'offline-run-*')}",
        )
    if samples := sorted(run.samples.glob("step-*")):
        row("samples", _shown(samples[-1]))
    if result.get("sample"):
        lines += ["", str(result["sample"]).rstrip()]
    return "\n".join([*lines, "", *_next_steps(run, result)])


def planned(plan: dict[str, Any]) -> str:
    """A plan in a line, or why there is none."""
    if "strategy" not in plan:
        return plan.get("note") or "nothing"
    host = f", of the host {sum(plan['host_gib'].values()):.0f} GiB" if plan["host_gib"] else ""
    fits = "" if plan["fits"] else f"; does not fit: {plan['reason']}"
    return (
        f"{plan['strategy']}, {plan['peak_memory_gib']:.3g} of {plan['limit_gib']:.3g} GiB a device{host}, "
        f"{plan['step_s']:.3g} s a step{fits}"
    )


def out_of_memory(plan: dict[str, Any], held_gib: float, error: str) -> str:
    """What is told where memory ran out: the breakdown that was predicted, what was held, what would need less."""
    lines = [
        f"out of memory, {error}",
        f"  held at the most       {held_gib:.2f} GiB",
        f"  planned                {planned(plan)}",
    ]
    parts = sorted(plan.get("memory_gib", {}).items(), key=lambda part: -part[1])
    lines += [f"    {name:<30}{gib:9.3f} GiB" for name, gib in parts]
    if lighter := plan.get("lighter"):
        lines += [
            "  These need less; --on-oom=replan takes the first by itself:",
            *(f"    {' '.join(words)}" for words in lighter),
        ]
    else:
        lines.append(
            "  No other layout was found that needs less: shorter rows, smaller images, LoRA, or more devices do."
        )
    return "\n".join(lines)


def standing(run: RunDir) -> dict[str, Any]:
    """How a run stands at this moment, for `gearshift status`: the result, the newest step, and whether it lives.

    `state` is the result's status; or `died`, where an attempt is on record as running but its process is gone; or
    `new`, where nothing has run yet.
    """
    result, owner = run.result(), holder(run)
    state = result["status"] if result else "new"
    if state == "running" and alive(owner) is False:
        state = "died"
    last = last_record(run.metrics) or {}
    newest = {key: last.get(key) for key in ("step", "loss", "step_s", "tokens_per_s", "samples_per_s")}
    starts = [event for event in read_jsonl(run.events) if event["kind"] in ("start", "resume")]
    total = starts[-1].get("total_steps") if starts else None
    left = None
    if state == "running" and total and newest["step"] and newest["step_s"]:
        left = (total - newest["step"]) * newest["step_s"]
    return {
        "run": str(run.path),
        "state": state,
        "total_steps": total,
        "eta_s": left,
        "owner": owner and describe_owner(owner),
        "newest": newest,
        "result": result,
    }


def standing_text(row: dict[str, Any]) -> list[str]:
    """One line of `gearshift status`, in columns."""
    result, newest = row["result"] or {}, row["newest"]
    step = newest["step"] if newest["step"] is not None else result.get("steps")
    total = f"/{row['total_steps']}" if row["total_steps"] else ""
    goes_on = row["state"] in ("stopped", "died", "failed")
    return [
        f"{_shown(Path(row['run'])):<40}",
        f"{row['state']:<9}",
        "" if step is None else f"step {step}{total}",
        "" if row["eta_s"] is None else f"eta {datetime.timedelta(seconds=round(row['eta_s']))}",
        "" if newest["loss"] is None else f"loss {newest['loss']:.4f}",
        "" if result.get("objective") is None else f"best {result['objective']:.4f}",
        (row["owner"] or "") if row["state"] in ("running", "queued") else "",
        result.get("reason") or "",
        f"gearshift resume {_shown(Path(row['run']))}" if goes_on else "",
    ]


def _next_steps(run: RunDir, result: dict[str, Any]) -> list[str]:
    path, steps = _shown(run.path), result.get("steps") or 0
    if result.get("status") == "finished":
        return [
            "What next:",
            f"  gearshift resume {path} train.max_steps={2 * steps} --accept    train it longer",
            "  gearshift run optim.lr=1e-3                another learning rate, beside this run",
            "  gearshift run data.path=YOUR/FILES         your own data",
        ]
    if result.get("status") == "failed":
        return [
            f"The reason is at the end of {_shown(run.logs)}/rank-0.log. After the repair:  gearshift resume {path}"
        ]
    return [f"Go on:  gearshift resume {path}"]


def _shown(path: Path) -> str:
    """Relative where that is shorter, quoted for a shell."""
    with suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


def env_info() -> dict[str, Any]:
    """What `env.json` holds: command, code, packages, devices; secrets taken out. Imports nothing heavy."""
    from importlib import metadata

    packages = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "command": [scrub(word) for word in sys.argv],
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git(Path(__file__).resolve().parent.parent),
        "packages": packages,
        "devices": {
            "cpu": next(iter(re.findall(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))), platform.processor()),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpus": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        },
    }


def scrub(text: str) -> str:
    """`text` without values of secret-looking environment variables and settings, tokens, passwords in URLs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(f"(?i){_SECRET}", name) and not os.path.exists(value):
            text = text.replace(value, "***")
    text = re.sub(rf"(?i)({_SECRET}[\w.-]*[\"']?\s*[=:]\s*)[^\s,&]+", r"\1***", text)
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[a-z]-|AKIA|glpat-)[\w-]{12,}", "***", text)


def refuse_secrets(cfg: Config) -> None:
    """Raises ConfigError for settings that hold a secret: `config.yaml` has them all, and needs them for a resume."""
    found = [
        key for key, value in config.items(config.to_dict(cfg)) if isinstance(value, str) and scrub(value) != value
    ]
    if found:
        raise config.ConfigError(
            f"{key}: its value looks like a secret, and every setting is written to config.yaml. Give it another way: in the "
            "environment (HF_TOKEN, WANDB_API_KEY, ...), in ~/.netrc, or in a file that only you can read."
            for key in found
        )


def _git(checkout: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the code, if it lies in a checkout of its own."""
    git = ("git", "-C", str(checkout))
    if _output(*git, "rev-parse", "--show-toplevel") != [str(checkout)]:
        return None
    diff = "\n".join(_output(*git, "diff", "HEAD"))
    sha256 = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    commit = _output(*git, "rev-parse", "HEAD")
    return {"commit": commit[0] if commit else None, "diff_sha256": sha256, "diff": scrub(diff)[:200_000] or None}


def _output(*command: str) -> list[str]:
    """Lines that a small program prints; none if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace", check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
