"""The planner against measurements that other people published.

    python benchmarks/plan_vs_published.py [--data DIR] [--json | --markdown] [--fit] [--rows]

Reads memory.csv, throughput.csv, fits.csv and gpu_hours.csv of a folder (those that are there), predicts every row that
is in scope with nothing but the inputs that the row names, and reports per source and in all, with the sign:

    memory        error of the allocated (or reserved) peak
    throughput    error of tokens per second and device
    fits          rows known to fit that are predicted to, rows known to fail that are predicted to
    gpu hours     error of a training run's total

A row is out of scope (counted by reason) when its layout, method, model family or precision is none of this project's, or
when its figure is not a measurement to trust (trust C and D). A row in scope that cannot be predicted is listed with the
reason, one whose figure has no known unit with the prediction. `--fit` fits the constants of time and memory again, on all
sources and with each left out, and reports the errors of both.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from published_models import Spec, hashed  # noqa: E402

from train.plan import constants, memory, timing  # noqa: E402
from train.plan.memory import GIB, Layout  # noqa: E402
from train.plan.shapes import Trace  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "published"
CACHE = Path.home() / ".cache" / "gearshift" / "published-traces"
Row = dict[str, str]


class OutOfScope(Exception):
    """This project does not lay out, train or store models that way."""


class Unpredictable(Exception):
    """The row is in scope, but does not say enough."""


# --------------------------------------------------------------------------------------------------------------------
# From a row to a model, a layout and a machine
# --------------------------------------------------------------------------------------------------------------------

# What the name of a model says about its architecture; dimensions come from the row. First match wins.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    (r"moe|mixtral|a\d+b\b|deepseek-?v[23]|dbrx|gpt-oss|scout|maverick", {}),
    (r"mamba|jamba|rwkv|t5\b|bert|whisper|-vl|vision|llava|chatglm|qwen3\.5|qwen3-next|rlhf", {}),
    (r"mpt", {"norm": "layer", "gated": False, "tied": True, "rotary": 0.0, "learned": True}),
    (
        r"pythia|neox|stablelm-?.*alpha|stablelm alpha|dolly|redpajama",
        {"norm": "layer", "gated": False, "bias": True, "parallel": True, "rotary": 0.25},
    ),
    (
        r"phi-?[12](\.5)?|phi-1",
        {"norm": "layer", "gated": False, "bias": True, "parallel": True, "shared_norm": True, "rotary": 0.5},
    ),
    (r"falcon-?\s?7b", {"norm": "layer", "gated": False, "parallel": True, "shared_norm": True, "tied": True}),
    (r"falcon", {"norm": "layer", "gated": False, "parallel": True, "tied": True}),
    (r"gpt-j", {"norm": "layer", "gated": False, "bias": True, "parallel": True, "shared_norm": True, "rotary": 0.25}),
    (r"bloom", {"norm": "layer", "gated": False, "bias": True, "tied": True, "rotary": 0.0}),
    (r"gemma", {"tied": True, "head_dim": 256}),
    (
        r"gpt-?2|nanogpt|cerebras-gpt|starcoder(base)?\b",
        {"norm": "layer", "gated": False, "bias": True, "tied": True, "rotary": 0.0, "learned": True},
    ),
    (r"opt-", {"norm": "layer", "gated": False, "bias": True, "tied": True, "rotary": 0.0, "learned": True}),
    (
        r"llama|mistral|vicuna|alpaca|yi-|qwen|phi-[34]|smollm|olmo|internlm|granite|baichuan|danube|zephyr|solar|minicpm"
        r"|deepseek-(llm|coder|math)",
        {},
    ),
]
NOT_OURS = FAMILIES[:2]
TIED = r"llama-?3\.2-?(1|3)b|qwen2(\.5)?-?(0\.5|1\.5|3)b|smollm"


def number(row: Row, name: str) -> float | None:
    try:
        return float(row.get(name) or "")
    except ValueError:
        return None


def whole(row: Row, name: str) -> int:
    value = number(row, name)
    if value is None:
        raise Unpredictable(f"no {name}")
    return int(value)


def style(row: Row) -> str:
    """Whose code ran."""
    framework = row.get("framework", "").lower()
    for key, name in (
        ("litgpt", "litgpt"),
        ("lit-gpt", "litgpt"),
        ("torchtune", "torchtune"),
        ("foundry", "llmfoundry"),
        ("torchtitan", "torchtitan"),
        ("llm.c", "llmfoundry"),
    ):
        if key in framework:
            return name
    return "transformers"


def check_scope(row: Row) -> None:
    """Raises OutOfScope."""
    if row.get("trust") not in ("A", "B"):
        raise OutOfScope(f"trust {row.get('trust')}")
    for name in ("tp", "pp", "cp", "ep"):
        if (number(row, name) or 1) > 1:
            raise OutOfScope("tensor, pipeline, context or expert parallelism")
    if row.get("subset", "").startswith("simumax"):
        raise OutOfScope("tensor, pipeline, context or expert parallelism")
    if row.get("domain") != "lm":
        raise OutOfScope(f"{row.get('domain')} models of other families")
    if re.search(
        r"fp8|nvfp4|int8|hqq|gptq|awq|8bit$", " ".join(row.get(k, "") for k in ("precision", "precision_n", "quant"))
    ) and ("8bit states" not in row.get("precision", "")):
        raise OutOfScope("FP8 and other 8-bit weights")
    if row.get("method_n") not in ("", "full", "lora", "qlora", None):
        raise OutOfScope(f"method {row.get('method') or row['method_n']}")
    optimizer = f"{row.get('optimizer_n', '')} {row.get('optimizer', '')}".lower()
    if re.search(r"galore|apollo|lomo|muon|lion|lamb|adafactor|soap|shampoo", optimizer):
        raise OutOfScope("optimizers this project does not have")
    gpu = (row.get("gpu_n") or row.get("gpu_type") or "").upper()
    if re.search(r"TPU|^MI\d|GAUDI|ASCEND|XPU|RX ", gpu):
        raise OutOfScope("devices other than NVIDIA's")
    if re.search(
        r"infinity|superoffload|zenflow|unsloth|deepcompile",
        f"{row.get('sharding', '')} {row.get('framework', '')}".lower(),
    ):
        raise OutOfScope("engines this project does not have")
    if row.get("component") not in ("peak training", "", None):
        raise OutOfScope(f"component: {row['component']}")
    family(row)


def family(row: Row) -> dict[str, Any]:
    text = f"{row.get('model', '')} {row.get('hf_id', '')}".lower()
    for pattern, facts in FAMILIES:
        if re.search(pattern, text):
            if (pattern, facts) in NOT_OURS:
                break
            return facts
    raise OutOfScope("other model families")


def spec(row: Row) -> tuple[Spec, int]:
    """The decoder of a row, and the tokens of a sample."""
    facts = dict(family(row))
    text = f"{row.get('model', '')} {row.get('hf_id', '')}".lower()
    rows = whole(row, "seq_len")
    method, kind = row.get("method_n") or "full", style(row)
    if facts.pop("learned", False):
        facts["positions"] = rows
    if re.search(TIED, text.replace(" ", "-")):
        facts["tied"] = True
    heads = whole(row, "heads")
    notes = f"{row.get('notes', '')} {row.get('framework', '')}".lower()
    adapters: dict[str, Any] = {}
    if method in ("lora", "qlora"):
        targets = row.get("lora_targets", "").lower()
        names = tuple(
            n
            for n, pattern in (
                ("q", r"\bq\b|all|default"),
                ("k", r"\bk\b|all"),
                ("v", r"\bv\b|all|default"),
                ("o", r"\bo\b|all|default"),
                ("mlp", r"mlp|all|default"),
            )
            if re.search(pattern, targets)
        )
        rank = number(row, "lora_rank")
        adapters = {"lora": names or ("q", "v"), "rank": int(rank or 8)}  # where unsaid, the projects' default
        adapters["dropout"] = 0.05 if kind == "litgpt" else 0.0
    chunks: dict[str, int] = {}
    if kind == "litgpt" and method != "full":
        chunks["head_chunk"] = 128
    if kind == "torchtune" and (
        re.search("chunked", notes) or (row.get("compile") == "yes" and not row["subset"].endswith("ablation"))
    ):
        chunks["chunks"] = 8
    if method == "qlora" and kind == "litgpt" and row.get("source_date", "9999") < "2024":
        adapters["quantised"] = True
    if (
        "foundry" in row.get("framework", "").lower()
    ):  # its kernels of then did not skip the masked half, which its own FLOPs formula counts too
        facts["causal"] = False
    made = Spec(
        whole(row, "layers"),
        whole(row, "hidden"),
        heads,
        int(number(row, "kv_heads") or heads),
        whole(row, "ffn"),
        whole(row, "vocab"),
        style="torchtune" if kind == "torchtitan" else kind,
        **facts,
        **adapters,
        **chunks,
    )
    return made, rows


def layout(row: Row) -> Layout:
    """How the row laid out its step."""
    ranks, micro = whole(row, "gpus"), whole(row, "micro_batch")
    accumulation = number(row, "grad_accum")
    if accumulation is None:
        batch = number(row, "global_batch")
        accumulation = max(1, round(batch / micro / ranks)) if batch else 1
    text = row.get("sharding", "").lower()
    stage = row.get("zero_n") or "0"
    if ranks == 1 and "zero" not in text:
        name = "single"
    elif "zero" in text or "deepspeed" in text or "zero" in row.get("framework", "").lower():
        name = f"zero{stage}" if stage in "123" else "ddp"
    elif stage in ("2", "3", "3h") or "fsdp" in text or "shard" in text:
        name = "fsdp2"
    else:
        name = {"1": "zero1", "2": "zero2", "3": "zero3"}.get(stage, "ddp")
    saved = row.get("act_ckpt_n")
    if not saved:
        raise Unpredictable("no act_ckpt_n")
    if saved.startswith("selective") and re.search(r"\bops?\b|operator", row.get("act_ckpt", "").lower()):
        raise OutOfScope("recomputation of single operators")
    offload = row.get("offload", "").lower()
    precision, kind = row.get("precision", "").lower(), style(row)
    optimizer = {"adamw8bit": "adamw_8bit", "sgd": "sgd"}.get(row.get("optimizer_n", ""), "adamw")
    pure = (
        (bool(re.search(r"true|bf16 params|pure", precision)) and kind != "llmfoundry")
        or kind == "torchtune"
        or "llm.c" in row.get("framework", "")
    )
    notes = f"{row.get('notes', '')} {row.get('optimizer', '')}".lower()
    chunked = "chunked" in notes or not row["subset"].endswith("ablation")
    return Layout(
        strategy=name,
        ranks=ranks,
        micro_batch=micro,
        accumulation=int(accumulation),
        checkpointing={"none": 0, "full": 1, "selective": 2}[saved.split("+")[0]],
        offload="paged" if "paged" in offload else "cpu" if re.search(r"optimizer|cpu offload", offload) else "none",
        activation_offload="activation" in offload,
        compile=("all" if chunked and kind != "torchtitan" else "blocks") if row.get("compile") == "yes" else "none",
        optimizer=optimizer,
        foreach="fused" not in notes and kind == "transformers",
        quantised=row.get("method_n") == "qlora",
        single_quantisation="dq" not in row.get("quant", "") and kind == "litgpt",
        pure=pure,
        step_in_backward="optimizer_in_bwd" in notes,
        gathered_twice=stage == "3",
        flat=kind == "litgpt" and name == "fsdp2",
    )


def card(row: Row) -> constants.Card:
    name = (row.get("gpu_n") or row.get("gpu_type") or "").lower().replace(" ", "")
    for text in (name, re.sub(r"-\d+gb$", "", name), name.split("-")[0]):
        if text in constants.CARDS:
            return constants.CARDS[text]
    if name == "a100":
        return constants.CARDS["a100-80gb"]
    raise Unpredictable(f"no data sheet of {name or 'an unnamed device'}")


def machine(row: Row, ranks: int) -> timing.Machine:
    device, links = card(row), row.get("interconnect", "")
    nodes = -(-ranks // 8)
    ports = re.findall(r"(?:\b(\d+) ?x [^|;,+]*?)?\b(\d+) ?Gb(?:ps|its?\b|/s)", links)  # Gb is a network, GB is NVLink
    inter = max((int(n or 1) * int(gbits) / 8 for n, gbits in ports), default=0.0)
    inter = inter or constants.DEFAULT_INTER_GB_S[device.generation]
    intra = 25.0 if re.search("pcie", links.lower()) and "nvlink" not in links.lower() else device.link_gb_s
    return timing.Machine(
        device, "cuda", max(1, ranks // nodes), nodes, device.memory_gib * GIB, intra * 1e9, inter * 1e9
    )


@lru_cache(maxsize=4096)
def traced(made: Spec, rows: int, precision: str, mode: str) -> Trace:
    """The trace of a decoder, kept on disk by everything that it depends on."""
    path = CACHE / f"{hashed(made, rows, precision, mode)}.json"
    if path.exists():
        return Trace.from_dict(json.loads(path.read_text()))
    import published_models

    from train.plan.trace import trace

    made_trace = trace(
        lambda: published_models.Decoder(made),
        lambda m: list(m.blocks),
        published_models.batch(rows),
        published_models.loss,
        precision=precision,
        mode=mode,
        tokens=rows,
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made_trace.to_dict()))
    return made_trace


def trace_of(row: Row, laid: Layout) -> Trace:
    made, rows = spec(row)
    if not row.get("precision_n"):
        raise Unpredictable("no precision_n")
    precision = row["precision_n"]
    precision = {"tf32": "fp32"}.get(precision, precision)
    autocast = laid.strategy in ("single", "ddp") and not laid.pure and "true" not in row.get("precision", "")
    return traced(made, rows, precision, "autocast" if autocast else "weights")


# --------------------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------------------


class Incomparable(Exception):
    """The row was predicted, but its figure cannot be compared: `args` are the prediction and why."""


def predict_memory(row: Row) -> tuple[float, float]:
    """(predicted, measured) GiB of one device."""
    laid = layout(row)
    held = memory.holds(trace_of(row, laid), laid).allocated
    metric = row.get("mem_metric", "").lower()
    if "reserved" in metric:
        held *= 1 + constants.RESERVE_FRACTION
    elif re.search("nvidia-smi|nvml|device", metric):
        held += sum(memory.device_overhead(held, laid.ranks, "cuda").values())
    if re.search("sum|total|all gpus", row.get("mem_scope", "").lower()):
        held *= laid.ranks
    measured = number(row, "peak_mem_gib")
    if measured is None:
        raise Incomparable(f"{held / GIB:.1f} GiB", "no peak in a known unit")
    if padded(row):
        raise Incomparable(f"{held / GIB:.1f} GiB", "padded: the tokens of a batch are not known")
    return held / GIB, measured


def padded(row: Row) -> bool:
    return "not packed" in row.get("notes", "").lower()


def predict_throughput(row: Row, speed: timing.Speed = constants.SPEED) -> tuple[float, float]:
    """(predicted, measured) tokens per second and device."""
    laid = layout(row)
    made_trace = trace_of(row, laid)
    tokens = laid.micro_batch * laid.accumulation * made_trace.tokens
    predicted = tokens / timing.step_time(made_trace, laid, machine(row, laid.ranks), speed).seconds
    if padded(row):
        raise Incomparable(f"{predicted:,.0f} tokens/s", "padded: the tokens of a batch are not known")
    if measured := number(row, "tokens_per_s_per_gpu"):
        return predicted, measured
    if measured := number(row, "tokens_per_s_total"):
        return predicted, measured / laid.ranks
    if measured := number(row, "samples_per_s"):
        return predicted, measured * made_trace.tokens / laid.ranks
    if seconds := number(row, "step_time_s"):
        return predicted, tokens / seconds
    raise Incomparable(f"{predicted:,.0f} tokens/s", "no tokens or samples per second, no step time")


def predict_fit(row: Row) -> tuple[bool, bool, float]:
    """(predicted to fit, known to fit, predicted share of the device)."""
    if row.get("fits") not in ("yes", "no"):
        raise OutOfScope("neither known to fit nor to fail")
    laid = layout(row)
    held = memory.holds(trace_of(row, laid), laid).allocated
    total = held + sum(memory.device_overhead(held, laid.ranks, "cuda").values())
    share = total / GIB / card(row).memory_gib
    return share <= 1.0, row["fits"] == "yes", share


# What a pretraining run is assumed to use where its row is silent, the same for every row: a batch of 4M tokens, on as
# many devices as get 4,096 tokens each.
ASSUMED_TOKENS, ASSUMED_TOKENS_EACH = 2**22, 4096


def predict_hours(row: Row, speed: timing.Speed = constants.SPEED) -> tuple[float, float]:
    """(predicted, stated) GPU-hours of a training run: the fastest layout of this project's that fits its cluster."""
    stated = number(row, "gpu_hours_stated") or number(row, "gpu_hours_derived")
    tokens = number(row, "tokens_trained")
    if stated is None or not stated:
        raise Unpredictable("no GPU-hours stated")
    if tokens is None:
        raise Unpredictable("no tokens_trained")
    if "padding" in row.get("scope", "") or "not re-predictable" in row.get("scope", ""):
        raise OutOfScope("not a training run from a config")
    if row["subset"].startswith("mlperf"):
        raise OutOfScope("time to a quality, evaluation included")
    made, rows = spec(row)
    batch = number(row, "global_batch") or round((number(row, "global_batch_tokens") or ASSUMED_TOKENS) / rows)
    ranks = int(number(row, "gpus") or min(batch, max(1, batch * rows // ASSUMED_TOKENS_EACH)))
    precision = row.get("precision_n") or "bf16"
    best = math.inf
    place = machine(row, ranks)
    for laid, mode in layouts(ranks, int(batch)):
        made_trace = traced(made, rows, precision, mode)
        held = memory.holds(made_trace, laid).allocated
        if held + sum(memory.device_overhead(held, ranks, "cuda").values()) > place.memory_bytes:
            continue
        seconds = timing.step_time(made_trace, laid, place, speed).seconds
        done = laid.micro_batch * laid.accumulation * ranks * rows
        best = min(best, seconds / done)
    if best == math.inf:
        raise Unpredictable("no layout of this project's fits the cluster")
    productive = 1.0 if "step time" in row.get("scope", "") else timing.productive(place)
    return tokens * best * ranks / 3600 / productive, stated


def layouts(ranks: int, batch: int) -> Iterator[tuple[Layout, str]]:
    share = max(1, batch // ranks)
    for micro in sorted({m for m in (1, 2, 4, 8, 16, 32) if m <= share} | {share if share <= 32 else 32}):
        for checkpointing in (0, 1):
            for name, mode in (("ddp", "autocast"), ("fsdp2", "weights"), ("zero1", "weights"), ("zero3", "weights")):
                yield Layout(name, ranks, micro, -(-share // micro), checkpointing), mode


# --------------------------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Results of one kind of figure."""

    errors: dict[str, list[tuple[str, float]]]  # source -> (row, signed relative error)
    out: Counter[str]
    unpredictable: list[tuple[str, str]]  # row, why
    incomparable: list[tuple[str, str, str]]  # row, prediction, why

    def all(self) -> list[float]:
        return [e for rows in self.errors.values() for _, e in rows]


def judged(rows: list[Row], predict: Callable[[Row], tuple[float, float]]) -> Scores:
    scores = Scores(defaultdict(list), Counter(), [], [])
    for row in rows:
        try:
            check_scope(row)
            predicted, measured = predict(row)
        except OutOfScope as reason:
            scores.out[str(reason)] += 1
        except Incomparable as reason:
            scores.incomparable.append((row["id"], *reason.args))
        except Unpredictable as reason:
            scores.unpredictable.append((row["id"], str(reason)))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # a row like none before
            scores.unpredictable.append((row["id"], f"{type(error).__name__}: {error}"))
        else:
            scores.errors[row["subset"]].append((row["id"], predicted / measured - 1))
    return scores


def summary(errors: list[float]) -> dict[str, float]:
    size = sorted(abs(e) for e in errors)
    return {
        "rows": len(errors),
        "median_abs": statistics.median(size),
        "mean_abs": statistics.fmean(size),
        "max_abs": size[-1],
        "mean_signed": statistics.fmean(errors),
        "under": sum(e < 0 for e in errors) / len(errors),
    }


def read(folder: Path, name: str) -> list[Row]:
    path = folder / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"data": str(folder.name)}
    kinds = (("memory", predict_memory), ("throughput", predict_throughput), ("gpu_hours", predict_hours))
    for name, predict in kinds:
        rows = read(folder, f"{name}.csv")
        if not rows:
            continue
        scores = judged(rows, predict)
        found[name] = {
            "sources": {source: summary([e for _, e in rows]) for source, rows in sorted(scores.errors.items())},
            "all": summary(scores.all()) if scores.all() else None,
            "out_of_scope": dict(scores.out.most_common()),
            "unpredictable": scores.unpredictable,
            "incomparable": scores.incomparable,
            "rows": {row: error for rows in scores.errors.values() for row, error in rows},
        }
    rows = read(folder, "fits.csv")
    if rows:
        mirrored = {row["id"]: row for row in read(folder, "memory.csv")}
        found["fits"] = confusion([_with_source(row, mirrored) for row in rows])
    return found


def _with_source(row: Row, mirrored: dict[str, Row]) -> Row:
    """A row that only repeats one of memory.csv has the inputs of that one."""
    source = re.search(r"mirror of memory.csv (\S+)", row.get("notes", ""))
    original = mirrored.get(source[1], {}) if source else {}
    return {**original, **{key: value for key, value in row.items() if value or key not in original}}


def confusion(rows: list[Row]) -> dict[str, Any]:
    out: Counter[str] = Counter()
    unpredictable: list[tuple[str, str]] = []
    cells: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[tuple[str, str, float]] = []
    rates: dict[str, list[bool]] = defaultdict(list)  # known to fit or to fail -> rightly predicted
    for row in rows:
        try:
            check_scope(row)
            predicted, known, share = predict_fit(row)
        except OutOfScope as reason:
            out[str(reason)] += 1
            continue
        except Unpredictable as reason:
            unpredictable.append((row["id"], str(reason)))
            continue
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            unpredictable.append((row["id"], f"{type(error).__name__}: {error}"))
            continue
        known_to = rates["fit" if known else "fail" if not row.get("missing_inputs") else "fail, inputs missing"]
        known_to.append(predicted == known)
        cell = f"{'fits' if known else 'fails'}, predicted to {'fit' if predicted else 'fail'}"
        cells[row["subset"]][cell] += 1
        cells["all"][cell] += 1
        if predicted != known:
            wrong.append((row["id"], cell, round(share, 3)))
    return {
        "cells": {k: dict(v) for k, v in cells.items()},
        "rates": {k: {"rows": len(v), "right": statistics.fmean(v)} for k, v in rates.items()},
        "wrong": wrong,
        "out_of_scope": dict(out.most_common()),
        "unpredictable": unpredictable,
    }


# --------------------------------------------------------------------------------------------------------------------
# Fitting
# --------------------------------------------------------------------------------------------------------------------

FITTED = ("matmul", "matmul_hopper", "narrow", "bandwidth", "overlap", "link")
Judge = Callable[[Row], tuple[float, float]]


def loss(rows: list[Row], predict: Judge) -> float:
    """The sum of absolute log errors, a source weighing by the root of its rows."""
    sources = Counter(row["subset"] for row in rows)
    errors = ((row, *predict(row)) for row in rows)
    return sum(abs(math.log(p / m)) / sources[row["subset"]] ** 0.5 for row, p, m in errors)


def fit_speed(rows: list[Row], start: timing.Speed) -> timing.Speed:
    """The constants of time with the smallest loss, one coordinate after the other."""

    def of(speed: timing.Speed) -> float:
        return loss(rows, lambda row: predict_throughput(row, speed))

    best, lowest = start, of(start)
    for factor in (1.08, 1.02):
        improved = True
        while improved:
            improved = False
            for name in FITTED:
                for times in (factor, 1 / factor):
                    value = getattr(best, name) * times
                    if name != "narrow" and value > 1:
                        continue
                    tried = dataclasses.replace(best, **{name: value})
                    if (found := of(tried)) < lowest - 1e-9:
                        best, lowest, improved = tried, found, True
    return best


def with_rounding(fraction: float) -> Judge:
    def predict(row: Row) -> tuple[float, float]:
        kept, constants.ROUNDING_FRACTION = constants.ROUNDING_FRACTION, fraction
        try:
            return predict_memory(row)
        finally:
            constants.ROUNDING_FRACTION = kept

    return predict


def fit_rounding(rows: list[Row]) -> float:
    """The one fitted constant of memory."""
    return min((i / 100 for i in range(21)), key=lambda fraction: loss(rows, with_rounding(fraction)))


def fitted(folder: Path) -> dict[str, Any]:
    """The constants on all sources, and the errors on each source of those fitted without it."""
    rows, held = (
        comparable(read(folder, "throughput.csv"), predict_throughput),
        comparable(read(folder, "memory.csv"), predict_memory),
    )
    speed, rounding = fit_speed(rows, constants.SPEED), fit_rounding(held)
    found: dict[str, Any] = {
        "fitted": {**{name: round(getattr(speed, name), 3) for name in FITTED}, "rounding": rounding},
        "left_out": {"memory": {}, "throughput": {}},
    }
    for name, mine, made in (
        ("memory", held, lambda others: with_rounding(fit_rounding(others))),
        ("throughput", rows, lambda others: _with_speed(fit_speed(others, speed))),
    ):
        for source in sorted({row["subset"] for row in mine}):
            others = [row for row in mine if row["subset"] != source]
            if not others:
                continue
            judge = made(others)
            pairs = [judge(row) for row in mine if row["subset"] == source]
            found["left_out"][name][source] = summary([p / m - 1 for p, m in pairs])
    return found


def _with_speed(speed: timing.Speed) -> Judge:
    return lambda row: predict_throughput(row, speed)


def comparable(rows: list[Row], predict: Judge) -> list[Row]:
    judged_rows = judged(rows, predict).errors
    known = {name for found in judged_rows.values() for name, _ in found}
    return [row for row in rows if row["id"] in known]


# --------------------------------------------------------------------------------------------------------------------


def line(name: str, s: dict[str, float] | None) -> str:
    if s is None:
        return f"  {name:28s} no rows"
    return (
        f"  {name:28s} {s['rows']:4.0f} rows   median {s['median_abs']:6.1%}   mean {s['mean_abs']:6.1%}   "
        f"max {s['max_abs']:6.1%}   signed {s['mean_signed']:+6.1%}   low in {s['under']:4.0%}"
    )


def show(found: dict[str, Any], *, rows: bool) -> None:
    for name in ("memory", "throughput", "gpu_hours"):
        if name not in found:
            continue
        part = found[name]
        print(f"{name}: predicted against published, relative error")
        for source, s in part["sources"].items():
            print(line(source, s))
        print(line("all", part["all"]))
        if rows:
            for row, error in part["rows"].items():
                print(f"      {row:32s} {error:+7.1%}")
        tail(part)
    if "fits" in found:
        print("fits: known against predicted")
        for source, cells in found["fits"]["cells"].items():
            print(f"  {source:28s} " + "   ".join(f"{cell}: {count}" for cell, count in sorted(cells.items())))
        for known, rate in found["fits"]["rates"].items():
            print(f"  known to {known}: {rate['right']:.1%} of {rate['rows']} rows predicted to")
        for row, cell, share in found["fits"]["wrong"]:
            print(f"      {row:32s} {cell} ({share:.0%} of the device)")
        tail(found["fits"])


def tail(part: dict[str, Any]) -> None:
    total = sum(part["out_of_scope"].values())
    print(
        f"  out of scope: {total} rows"
        + (": " if total else "")
        + "; ".join(f"{n} {why}" for why, n in part["out_of_scope"].items())
    )
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, why in part["unpredictable"]:
        reasons[why].append(row)
    for row, predicted, why in part.get("incomparable", ()):
        print(f"  predicted without a figure to compare: {row} {predicted} ({why})")
    print(f"  cannot be predicted: {len(part['unpredictable'])} rows")
    for why, names in reasons.items():
        print(f"      {why}: {', '.join(names)}")


def page(found: dict[str, Any], fit: dict[str, Any] | None) -> str:
    """The report as a page."""
    table = "| source | rows | median | mean | highest | mean with its sign | too low |\n|---|---|---|---|---|---|---|"

    def cells(source: str, s: dict[str, float]) -> str:
        share = " | ".join(f"{s[k]:.1%}" for k in ("median_abs", "mean_abs", "max_abs"))
        return f"| {source} | {s['rows']} | {share} | {s['mean_signed']:+.1%} | {s['under']:.0%} |"

    out = []
    titles = {"memory": "Peak memory", "throughput": "Throughput", "gpu_hours": "GPU-hours of whole runs"}
    for name, title in titles.items():
        if name not in found or found[name]["all"] is None:
            continue
        part = found[name]
        out += [
            f"## {title}",
            "",
            table,
            *(cells(k, v) for k, v in part["sources"].items()),
            cells("**all**", part["all"]),
        ]
        if name == "gpu_hours":
            out += ["", "; ".join(f"{row} {error:+.1%}" for row, error in part["rows"].items()) + "."]
        left = fit["left_out"].get(name) if fit else None
        if left:
            out += ["", "Each source predicted with constants fitted on the others alone:", "", table]
            out += [cells(k, v) for k, v in left.items()]
        out += ["", *_leftovers(part), ""]
    if "fits" in found:
        part = found["fits"]
        out += ["## Fits or fails", "", "| source | known, predicted | rows |", "|---|---|---|"]
        out += [f"| {k} | {cell} | {n} |" for k, v in part["cells"].items() for cell, n in sorted(v.items())]
        out += [
            "",
            *(f"Known to {k}: {v['right']:.1%} of {v['rows']} predicted to.\n" for k, v in part["rates"].items()),
        ]
        out += [
            *(f"- {row}: {cell} ({share:.0%} of the device)" for row, cell, share in part["wrong"]),
            *_leftovers(part),
        ]
    if fit:
        out += ["", "## Fitted", "", ", ".join(f"`{k}` {v}" for k, v in fit["fitted"].items()) + "."]
    return "\n".join(out)


def _leftovers(part: dict[str, Any]) -> list[str]:
    lines = [f"Out of scope: {'; '.join(f'{n} {why}' for why, n in part['out_of_scope'].items())}."]
    for row, predicted, why in part.get("incomparable", ()):
        lines.append(f"- predicted, nothing to compare with: {row}, {predicted}: {why}")
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, why in part["unpredictable"]:
        reasons[why].append(row)
    lines += [f"- cannot be predicted, {why}: {', '.join(names)}" for why, names in reasons.items()]
    return [lines[0], "", *lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four CSV files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print a page")
    parser.add_argument("--rows", action="store_true", help="print the error of every row")
    parser.add_argument("--fit", action="store_true", help="fit the constants again, also with each source left out")
    options = parser.parse_args()
    names = [f"{name}.csv" for name in ("memory", "throughput", "gpu_hours", "fits")]
    if not any((options.data / name).is_file() for name in names):
        parser.error(f"--data {options.data}: holds none of {', '.join(names)}")
    found, fit = report(options.data), fitted(options.data) if options.fit else None
    if options.markdown:
        print(page(found, fit))
        return
    if fit:
        found["fit"] = fit
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, rows=options.rows)
        if fit:
            print(json.dumps(fit, indent=2))


if __name__ == "__main__":
    main()
