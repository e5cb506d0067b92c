"""What is planned: the experiment's own model and loss, traced once and kept.

Owns: from a config to a trace (which model, which batch, which loss), what is assumed where data is not prepared, and the
files in which traces are kept, because taking one needs torch and the model's library, and reading one needs neither.

Does not own: how a trace is taken (`trace.py`), what is done with it (`search.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache as cache_once
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.compose import ConfigError
from train.data import cache
from train.plan.shapes import Trace

if TYPE_CHECKING:
    from train.config import Config

VERSION = 1  # of what a trace counts; a trace of another version is taken again
SHIPPED = Path(__file__).with_name("traces.json")
"""Traces of the experiments that a newcomer starts with. Kept right by a test."""
DIGITS = {"digits": (10, 1), "digit_scenes": (11, 1)}
"""Classes and channels of the pictures that need no files."""


class NoTrace(Exception):
    """There is no trace at hand, and none was to be taken."""


@dataclass
class Subject:
    """An experiment, and what is known of its data (`Prepared.info`; may be empty)."""

    cfg: Config
    info: Mapping[str, Any] = field(default_factory=dict)
    take: bool = True
    """Whether the first trace may be taken if it is not at hand. Others are needed only where memory is short."""
    _traces: dict[tuple[str, str, bool, str], Trace] = field(default_factory=dict, repr=False)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`info`, or what the config lets one assume: a vocabulary, classes, channels."""
        cfg, known = self.cfg, dict(self.info)
        if cfg.data.kind in ("text", "chat"):
            spelled = {"bytes": 260, "bpe": cfg.data.tokenizer_vocab_size}.get(cfg.data.tokenizer)
            known.setdefault("vocab_size", cfg.model.vocab_size or spelled or 32_000)
            known.setdefault("tokenizer", None)
        else:
            classes, channels = DIGITS.get(cfg.data.kind, (cfg.data.num_classes or 10, 3))
            known.setdefault("num_classes", cfg.data.num_classes or classes)
            known.setdefault("channels", channels)
            known.setdefault("classes", [str(i) for i in range(known["num_classes"])])
            known.setdefault("class_counts", [1] * known["num_classes"])
        return known

    @property
    def tokens(self) -> int:
        """Per sample: tokens of a row, 1 for a picture."""
        return self.cfg.data.seq_len if self.cfg.data.kind in ("text", "chat") else 1

    def trace(self, *, precision: str, mode: str, chunked: bool, device: str) -> Trace:
        """The trace of this experiment: shipped, kept, or taken now. Raises NoTrace, or ConfigError for a model that cannot be
        had."""
        if precision == "fp32":
            mode = "autocast"  # both modes are the same
        asked = (precision, mode, chunked, device)
        if asked in self._traces:
            return self._traces[asked]
        key = self._key(*asked)
        kept = cache.cache_root(self.cfg) / "traces" / f"{key}.json"
        found = _shipped().get(key) or _read(kept)
        if found is None:
            if not self.take and not self._traces:
                raise NoTrace(key)
            found = self._take(*asked)
            _write(kept, found)
        self._traces[asked] = found
        return found

    def _key(self, precision: str, mode: str, chunked: bool, device: str) -> str:
        """A name that changes with everything that a trace depends on."""
        cfg = self.cfg
        usual = vars(type(cfg.model)())  # what is left at its default is not named: a new setting renames no trace
        shape = {k: v for k, v in vars(cfg.model).items() if v != usual[k] and k not in ("rope_theta", "norm_eps")}
        if cfg.model.path is not None:
            config = Path(cfg.model.path) / "config.json"
            shape = {"path": cfg.model.path, "revision": cfg.model.revision, "gguf_file": cfg.model.gguf_file}
            if config.is_file():
                shape["path"] = hashlib.sha256(config.read_bytes()).hexdigest()
        rows = (cfg.data.kind, cfg.data.seq_len, cfg.data.image_size, cfg.data.pack)
        facts = {k: self.facts[k] for k in ("vocab_size", "num_classes", "channels") if k in self.facts}
        peft = (
            (cfg.peft.name != "none", cfg.peft.r, cfg.peft.dropout, cfg.peft.target_modules, *cfg.peft.quant_exclude)
            if cfg.peft.name != "none"
            else ()
        )
        task = (cfg.task.name, cfg.task.class_weights is None, cfg.task.dice_weight > 0, cfg.task.label_smoothing > 0)
        everything = [VERSION, _versions(), task, shape, rows, facts, peft, precision, mode, chunked, device]
        return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _take(self, precision: str, mode: str, chunked: bool, device: str) -> Trace:
        from train import models, tasks
        from train.data import Prepared
        from train.plan.trace import trace

        cfg = copy.deepcopy(self.cfg)
        cfg.strategy.chunked_loss = chunked
        cfg.train.precision = precision  # type: ignore[assignment]  # of the frozen weights
        if cfg.peft.name == "qlora":
            cfg.peft.name = "lora"  # packing is arithmetic on the frozen weights; the packed ones cannot be faked
        task = tasks.TASKS[cfg.task.name](cfg, Prepared(cfg.data.kind, Path(), {}, self.facts))

        def loss(module: Any, batch: dict[str, Any]) -> Any:
            with models.keyed(module, batch, cfg.seed):
                return task.loss(module, batch)[0]

        try:
            return trace(
                task.build_model, models.blocks, self.batch, loss,
                precision=precision, mode=mode, tokens=self.tokens, device=device,
            )  # fmt: skip
        except models.ModelError as error:
            raise ConfigError([str(error)]) from error

    def batch(self, size: int) -> dict[str, Any]:
        """A micro-batch of the shapes that the loader makes; only shapes count."""
        import torch

        cfg = self.cfg
        batch = {
            "weight": torch.ones(size),
            **{k: torch.zeros(size, dtype=torch.long) for k in ("sample", "epoch", "index")},
        }
        if cfg.data.kind in ("text", "chat"):
            row = (size, cfg.data.seq_len)
            batch |= {k: torch.zeros(row, dtype=torch.long) for k in ("input_ids", "labels")}
            if cfg.data.kind == "chat" and cfg.data.pack:
                batch["position_ids"] = torch.zeros(row, dtype=torch.long)
                batch["document"] = torch.zeros(row, dtype=torch.int32)
            return batch
        side = cfg.data.image_size
        batch["image"] = torch.zeros(size, self.facts["channels"], side, side)
        if cfg.task.name == "segment":
            batch["mask"] = torch.zeros(size, side, side, dtype=torch.long)
        else:
            batch["label"] = torch.zeros(size, dtype=torch.long)
        return batch


# ---- Files -----------------------------------------------------------------------------------------------------------


@cache_once
def _versions() -> list[str]:
    """Of the libraries whose code a trace is of, without the last number."""
    return [metadata.version(name).rpartition(".")[0] for name in ("torch", "transformers", "peft")]


@cache_once
def _shipped() -> dict[str, Trace]:
    data = json.loads(SHIPPED.read_text()) if SHIPPED.is_file() else {}
    return {key: Trace.from_dict(value) for key, value in data.items()}


def _read(path: Path) -> Trace | None:
    """None where there is no readable trace: it is then taken again."""
    try:
        return Trace.from_dict(json.loads(path.read_text()))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, trace: Trace) -> None:
    from train.rundir import atomic_write

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(trace.to_dict()))
    except OSError:  # a cache that cannot be written costs seconds, not the plan
        return


def ship() -> dict[str, Any]:
    """What `traces.json` should hold: the traces with which a newcomer's first plan on a CPU needs no torch."""
    from train import config

    made = {}
    for experiment in ("lm_stdlib", "classify_digits", "segment_digits"):
        subject = Subject(config.compose([f"experiment={experiment}", "hardware=cpu"]))
        for precision in ("fp32", "bf16"):
            for chunked in (False, True) if subject.cfg.task.name == "causal_lm" else (False,):
                asked = (precision, "autocast", chunked, "cpu")
                made[subject._key(*asked)] = subject._take(*asked).to_dict()
    return made
