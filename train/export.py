"""Weights for others: a trained model in the layout that its users' libraries load, and the proof that it is the same.

Owns: the exported directory (weights as sharded safetensors, config, tokenizer, chat template, generation config, model
card with the run's own numbers) and its receipt, `export.json`: the directory is loaded back by the library that its
users would use, and its logits are compared with the run's.

Does not own: putting the run's model together (`predict.py`), merging adapters into their base (`models/pretrained.py`,
which does it whenever a run is where weights come from).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import config, models
from train.predict import Trained, open_trained

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25, "fp16": 0.05}
"""Largest difference of logits between the run (fp32) and what is loaded back; rounding of the stored weights included."""


class ExportError(Exception):
    """The export was not made, or is not the model that the run trained."""


def export(run_dir: str | Path, to: str | Path, *, step: str | int = "best", merge: bool = False, dtype: str = "fp32",
           shard_size: str = "5GB", say: Callable[[str], None] = print) -> dict[str, Any]:  # fmt: skip
    """Write the model of a run into the directory `to`, load it back, compare, and return the receipt.

    merge: LoRA adapters are added to their base (QLoRA's to the full-precision base); without it they are exported alone,
    as peft loads them. dtype: of the stored weights. Raises ExportError, and what `open_trained` raises.
    """
    target = Path(to)
    if target.exists() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty. Give a new directory: --to DIR")
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    trained = open_trained(run_dir, step)
    adapters = trained.cfg.peft.name != "none"
    if merge and not adapters:
        say("nothing to merge: this run trained the weights themselves")
    target.mkdir(parents=True, exist_ok=True)
    if adapters and not merge:
        trained.model.save_pretrained(target, safe_serialization=True)
        form = "peft adapters"
    elif hasattr(trained.model, "save_pretrained") or adapters:
        whole = _whole(trained) if adapters else trained.model
        _save_transformers(whole, target, dtype, shard_size, trained)
        form = "transformers"
    else:
        _save_own(trained, target, dtype)
        form = "safetensors"
    if trained.run.tokenizer.is_dir():
        from train.data import tokenizer

        tokenizer.save(trained.run.tokenizer, target)
    receipt = {
        "run": trained.run.path.name,
        "step": trained.step,
        "form": form,
        "dtype": dtype,
        **{k: (trained.run.result() or {}).get(k) for k in ("math_hash", "state_hash")},
        **_compare(trained, target, form, dtype),
        "files": {f.name: _sha256(f) for f in sorted(target.glob("*.safetensors"))},
    }
    (target / "README.md").write_text(_card(trained, receipt), encoding="utf-8")
    (target / "export.json").write_text(json.dumps(receipt, indent=2) + "\n")
    say(f"{form} in {target}: loaded back, largest difference of logits {receipt['max_logits_difference']:.2e}")
    if trained.cfg.task.name == "causal_lm" and form == "transformers":
        say(f"serve it:  vllm serve {target}")
    return receipt


def _whole(trained: Trained) -> nn.Module:
    """The base in full precision with the adapters added, as a run is read that another starts from."""
    cfg = config.load(trained.run.path)
    cfg.model.path, cfg.model.gguf_file, cfg.model.revision = str(trained.run.path), None, None
    cfg.peft.name = "none"
    with models.parameters_on_meta():
        model = models.build(cfg, trained.prepared.info)
    return models.initialise(model, cfg.seed).eval()


def _save_transformers(model: Any, target: Path, dtype: str, shard_size: str, trained: Trained) -> None:
    import torch
    from transformers import GenerationConfig

    model = model.cpu().to(getattr(torch, DTYPES[dtype]))
    model.config.dtype = DTYPES[dtype]
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(target, safe_serialization=True, max_shard_size=shard_size)
    if trained.cfg.task.name == "causal_lm":
        from train.data.tokenizer import END_OF_TURN, Tokenizer

        speller = Tokenizer(trained.run.tokenizer)
        ends = {speller.eos, speller.backend.token_to_id(END_OF_TURN)} - {None}
        GenerationConfig(bos_token_id=speller.separator, eos_token_id=sorted(ends), max_new_tokens=256).save_pretrained(
            target
        )


def _save_own(trained: Trained, target: Path, dtype: str) -> None:
    """A vision model of ours: its tensors, and all that builds it again."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        n: t.detach().cpu().to(getattr(torch, DTYPES[dtype])).contiguous()
        for n, t in trained.model.state_dict().items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    info = {k: trained.prepared.info.get(k) for k in ("num_classes", "classes", "channels", "mean", "std")}
    content = {"model": config.to_dict(trained.cfg)["model"], "image_size": trained.cfg.data.image_size, "info": info}
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def load_own(directory: str | Path) -> nn.Module:
    """A vision model of ours from an exported directory, in evaluation mode, fp32."""
    from safetensors.torch import load_file

    source = Path(directory)
    content = json.loads((source / "config.json").read_text())
    cfg = config.Config()
    for key, value in content["model"].items():
        setattr(cfg.model, key, value)
    cfg.data.image_size = content["image_size"]
    model = models.initialise(models.build(cfg, content["info"]), 0)
    model.load_state_dict({n: t.float() for n, t in load_file(source / "model.safetensors").items()})
    return model.eval()


def _compare(trained: Trained, target: Path, form: str, dtype: str) -> dict[str, Any]:
    """Load `target` as its users would and compare logits with the run's model. Raises ExportError when they differ."""
    import torch

    trained.model.float().cpu()
    if trained.cfg.task.name == "causal_lm":
        prompt = {
            k: v for k, v in trained.task.encode([trained.cfg.eval.prompt, "import os\n"]).items() if k == "input_ids"
        }
        found = _logits(_reload(target, form, trained), **prompt)
        wanted = _logits(trained.model, **prompt)
    else:
        size, channels = trained.cfg.data.image_size, trained.prepared.info["channels"]
        image = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
        found, wanted = _logits(_reload(target, form, trained), image), _logits(trained.model, image)
    difference = float((found - wanted).abs().max())
    tied = getattr(getattr(trained.model, "config", None), "tie_word_embeddings", None)
    if not difference <= TOLERANCE[dtype]:
        raise ExportError(
            f"{target}: what is loaded back differs from the run by {difference:.3g} in its logits "
            f"({TOLERANCE[dtype]:g} at most). Do not use it."
        )
    return {"max_logits_difference": difference, "tied_embeddings": tied, "reloaded_with": form}


def _reload(target: Path, form: str, trained: Trained) -> nn.Module:
    import torch

    if form == "safetensors":
        return load_own(target)
    import transformers

    from train.models.pretrained import AUTO

    auto = getattr(transformers, AUTO[trained.cfg.task.name])
    if form == "transformers":
        return auto.from_pretrained(target, dtype=torch.float32, trust_remote_code=False).eval()
    import peft

    base = _base(trained)
    return peft.PeftModel.from_pretrained(base, str(target)).eval()


def _base(trained: Trained) -> nn.Module:
    """What the adapters were trained over, in full precision."""
    cfg = config.load(trained.run.path)
    cfg.peft.name = "none"
    with models.parameters_on_meta():
        model = models.build(cfg, trained.prepared.info)
    return models.initialise(model, cfg.seed).eval()


def _logits(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        out = model(*args, **kwargs)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(trained: Trained, receipt: dict[str, Any]) -> str:
    """The model card, with the run's real numbers and how to load it."""
    result, cfg = trained.run.result() or {}, trained.cfg
    numbers = {"steps": trained.step, "samples": result.get("samples"), "tokens": result.get("tokens"), "wall time, s": result.get("wall_s"),
               **(result.get("eval") or {})}  # fmt: skip
    rows = "\n".join(f"| {name} | {value} |" for name, value in numbers.items() if value is not None)
    engine = result.get("engine") or {}
    base = f"base_model: {cfg.model.path}\n" if cfg.model.path and not Path(cfg.model.path).exists() else ""
    if receipt["form"] == "safetensors":
        usage = (
            "from train.export import load_own  # github checkout of Gearshift, `pip install -e .`\n\n"
            'model = load_own(".")  # torch module: float32 [B, C, H, W], normalised by info.mean and info.std\n'
            "logits = model(image)"
        )
    elif receipt["form"] == "peft adapters":
        usage = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained(".")  # adapters over ' + str(cfg.model.path)
        )
    else:
        usage = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")'
        )
    return (
        f"---\nlibrary_name: {'peft' if receipt['form'].startswith('peft') else 'transformers'}\n{base}---\n\n"
        f"# {trained.run.path.name}\n\n"
        f"Experiment `{cfg.experiment}`, task `{cfg.task.name}`, trained with Gearshift under "
        f"{engine.get('strategy')} on {engine.get('world_size')} rank(s) in {engine.get('precision')}.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"Math hash `{receipt.get('math_hash')}`. Loaded back with {receipt['reloaded_with']}: largest difference of logits to the run "
        f"{receipt['max_logits_difference']:.2e} (`export.json`).\n\n```python\n{usage}\n```\n"
    )
