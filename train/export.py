"""Weights for others: a trained model in the layout that its users' libraries load, and the proof that it is the same.

Owns: the exported directory (weights as sharded safetensors, config, tokenizer, chat template, generation config, model
card with the run's own numbers) and its receipt, `export.json`: the directory is loaded back by the library that its
users would use, and what it computes is compared with the run. A directory that does not pass is not left behind.

Does not own: putting the run's model together (`predict.py`), networks (`train/models`).

Three forms: `transformers` (language models, and networks that came from transformers), `peft` (adapters alone), and
`gearshift` (networks of ours or of a plug-in, which `load` opens).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train import checkpoint, config, data, models, rundir, tasks
from train.predict import Trained, open_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = 1e-4
"""Largest difference of logits, for logits up to 10; of larger ones in proportion, as fp32 has no more digits."""

_SEEN_AS = ("image_size", "resize", "ignore_index")  # settings of `data` that say how a picture reaches the network
_PROBE_TOKENS = 64
_ANSWER_TOKENS = 32
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be


class ExportError(rundir.RunError):
    """The export was not made; the message says why, and what to type instead."""


def export(
    run_dir: str | Path,
    to: str | Path,
    *,
    step: str | int = "best",
    merge: bool = False,
    dtype: str = "fp32",
    shard_size: str = "5GB",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the model of a run into the new directory `to`, load it back, compare, and return the receipt.

    merge: add adapters to their base; without it they are exported alone. QLoRA's base is the one in full precision,
    here and in the comparison; how far the 4-bit model is from that is in the receipt. dtype: of the stored weights.
    shard_size: of the largest file. Raises ExportError, and what `open_trained` raises.
    """
    target = Path(to).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not empty. Give a new directory: --to DIR")
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}.")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", shard_size):
        raise ExportError(f"--shard-size {shard_size}: must be a size such as 500MB or 5GB.")
    trained = open_trained(run_dir, step, overrides=overrides, full_precision=True, say=say)
    form, probe, result = _form(trained, merge), _probe(trained), trained.run.result() or {}
    how = config.load(trained.run.path).peft.name  # what `full_precision` hides
    as_run = _computed(trained.model, probe)
    receipt: dict[str, Any] = {
        "run": trained.run.path.name,
        "step": trained.step,
        "math_hash": result.get("math_hash"),
        "state_hash": result.get("state_hash") if trained.step == result.get("steps") else None,
        "peft": how,
        "form": form,
        "merged": merge,
        "dtype": dtype,
        "compared": "logits" if probe else "sums of tensors",
    }
    if how == "qlora":
        quantised = open_trained(run_dir, step, overrides=overrides, say=say)
        with quantised.autocast():
            receipt["max_difference_to_4_bits"] = _difference(_computed(quantised.model, probe), as_run)
        del quantised
    if merge:
        trained.model = trained.model.merge_and_unload()  # type: ignore[operator]  # a peft model
        _same(_computed(trained.model.eval(), probe), as_run, "The merged weights compute something else than the run")
    making = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    making.mkdir(parents=True)
    try:
        written = _write(trained, making, form, DTYPES[dtype], shard_size, probe)
        receipt["max_difference"] = _difference(written, as_run)
        receipt |= _load_back(trained, making, form, probe, written)
        receipt["files"] = {file.name: _sha256(file) for file in sorted(making.glob("*.safetensors"))}
        (making / "README.md").write_text(_card(trained, receipt), encoding="utf-8")
        (making / "export.json").write_text(rundir.to_json(receipt, indent=2) + "\n")
        if target.exists():
            target.rmdir()
        making.rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    say(
        f"{target}: step {trained.step} in {dtype}, loaded back with {form}; largest difference of "
        f"{receipt['compared']} to the run {receipt['max_difference']:.1e}"
    )
    if "answer" in receipt:
        rank = next((r for r in _VLLM_RANKS if r >= trained.cfg.peft.r), trained.cfg.peft.r)
        adapters = f"--enable-lora --max-lora-rank {rank} --lora-modules {trained.run.path.name}={target}"
        if form == "peft" and trained.cfg.model.gguf_file:
            say("to serve it, export again and add --merge: vllm puts no adapters on a GGUF file")
        else:
            say(f"serve it:  vllm serve {f'{trained.cfg.model.path} {adapters}' if form == 'peft' else target}")
    return receipt


def load(directory: str | Path) -> nn.Module:
    """A network in the form `gearshift`, in evaluation mode, fp32, on the CPU.

    It takes normalised images, float32 [B, C, H, W]; `config.json` holds mean and std, and `classes`. A plug-in's network
    needs the plug-in imported first. Raises ExportError, ModelError.
    """
    from huggingface_hub import load_torch_model

    source = Path(directory)
    cfg, info = _described(source)
    model = models.initialise(models.build(cfg, info), 0)
    load_torch_model(model, source, strict=True, safe=True)
    return model.float().eval()


def predict(directory: str | Path, source: str | Path, to: str | Path) -> dict[str, float]:
    """What `gearshift predict` writes of pictures into the directory `to`, by a network in the form `gearshift`.

    `source` is a picture or a folder. Returns metrics where there are answers. Raises ExportError, ModelError, DataError.
    """
    cfg, info = _described(Path(directory))
    task = tasks.TASKS[cfg.task.name](cfg, data.Prepared("images", Path(directory), {}, info))
    return task.predict_files(load(directory), Path(source).expanduser(), Path(to))


def _described(source: Path) -> tuple[config.Config, dict[str, Any]]:
    """The settings and the facts about data of an export in the form `gearshift`. Raises ExportError."""
    cfg = config.Config()
    try:
        content = json.loads((source / "config.json").read_text())
        shape, info, cfg.task.name = content["model"], content["info"], content["task"]
        for name in _SEEN_AS:
            setattr(cfg.data, name, content["data"][name])
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{source}/config.json is not that of an export: {type(error).__name__}: {error}") from None
    known = vars(cfg.model).keys() - {"path"}
    cfg.model = replace(cfg.model, **{key: value for key, value in shape.items() if key in known})
    return cfg, info


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _form(trained: Trained, merge: bool) -> str:
    """The form in which a run is exported. Raises ExportError where adapters cannot stand alone."""
    model: Any = trained.model
    if trained.cfg.peft.name == "none":
        if merge:
            raise ExportError("--merge: this run has no adapters, it trained the weights themselves. Leave it out.")
        return "transformers" if hasattr(model, "save_pretrained") else "gearshift"
    if merge:
        return "transformers"
    path = Path(str(trained.cfg.model.path)).expanduser()
    if fresh := sorted({name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}):
        raise ExportError(f"Adapters alone would lack what this run trained beside them: {fresh[:3]}. Add --merge.")
    if (path / "checkpoints").is_dir():
        raise ExportError(
            f"Adapters alone are of use over a model that others can load, and {path} is a run directory. Add --merge."
        )
    return "peft"


def _write(
    trained: Trained, target: Path, form: str, dtype: torch.dtype, shard_size: str, probe: dict[str, Tensor]
) -> Tensor:
    """Write weights and all that goes with them; what exactly the weights that were written compute."""
    model: Any = trained.model
    stored = [p for p in model.parameters() if form != "peft" or p.requires_grad]
    for parameter in stored:
        parameter.data = parameter.data.to(dtype)
    if form == "transformers":
        _write_transformers(model, trained, target, shard_size)
    elif form == "peft":
        adapters = model.peft_config["default"]
        adapters.base_model_name_or_path, adapters.revision = str(trained.cfg.model.path), trained.cfg.model.revision
        if not isinstance(adapters.target_modules, str):  # names of layers, as others write them: a set has no order
            adapters.target_modules = sorted({name.rpartition(".")[2] for name in adapters.target_modules})
        model.save_pretrained(target, save_embedding_layers=False)
    else:
        _write_own(model, trained, target, shard_size)
    if trained.run.tokenizer.is_dir():
        from train.data import tokenizer

        tokenizer.save(trained.run.tokenizer, target)
    for parameter in stored:
        parameter.data = parameter.data.float()
    return _computed(model, probe)


def _write_transformers(model: Any, trained: Trained, target: Path, shard_size: str) -> None:
    base = _base_directory(trained)
    if trained.cfg.task.name == "causal_lm":
        _say_where_texts_end(model, trained, base)
    elif classes := trained.prepared.info.get("classes"):
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: index for index, name in enumerate(classes)}
        if base is not None and (base / "preprocessor_config.json").is_file():
            shutil.copyfile(base / "preprocessor_config.json", target / "preprocessor_config.json")
        else:
            (target / "preprocessor_config.json").write_text(rundir.to_json(_preprocessor(trained), indent=2) + "\n")
    model.save_pretrained(target, max_shard_size=shard_size)


def _preprocessor(trained: Trained) -> dict[str, Any]:
    """How pictures are scaled and normalised, in the words of transformers."""
    size, info = trained.cfg.data.image_size, trained.prepared.info
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": info["mean"],
        "image_std": info["std"],
    }


def _say_where_texts_end(model: Any, trained: Trained, base: Path | None) -> None:
    """Generation as the base model has it, or else by the words of the tokenizer."""
    from transformers import GenerationConfig

    from train.data.tokenizer import END_OF_TURN, Tokenizer

    model.config.use_cache = True  # which training has no use for
    if base is not None and (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base)
        return
    speller = Tokenizer(trained.run.tokenizer)
    ends = sorted({speller.eos, speller.backend.token_to_id(END_OF_TURN)} - {None})  # type: ignore[type-var]
    words = {"bos_token_id": speller.separator, "eos_token_id": ends, "pad_token_id": speller.eos}
    model.generation_config = GenerationConfig(**words)
    for name, value in words.items():
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, value)


def _base_directory(trained: Trained) -> Path | None:
    """Where the model of others lies that the run began from, itself or through other runs."""
    from train.models import pretrained

    cfg = trained.cfg
    while cfg.model.path is not None:
        directory = pretrained.locate(cfg)
        if not (directory / "checkpoints").is_dir():
            return directory
        cfg = config.load(directory)
    return None


def _write_own(model: nn.Module, trained: Trained, target: Path, shard_size: str) -> None:
    from huggingface_hub import save_torch_model

    save_torch_model(model, target, max_shard_size=shard_size, metadata={"format": "pt"})
    shape = {
        key: value for key, value in vars(trained.cfg.model).items() if key not in ("path", "revision", "gguf_file")
    }
    info = {k: v for k, v in trained.prepared.info.items() if k in ("classes", "values") or _is_numeric(v)}  # no paths
    seen_as = {name: getattr(trained.cfg.data, name) for name in _SEEN_AS}
    content = {"task": trained.cfg.task.name, "model": shape, "data": seen_as, "info": info}
    (target / "config.json").write_text(rundir.to_json(content, indent=2) + "\n")


def _is_numeric(value: Any) -> bool:
    return all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value]))


# ---- Comparing -------------------------------------------------------------------------------------------------------


def _probe(trained: Trained) -> dict[str, Tensor]:
    """An input that both models are given, by the name of its argument: no data is needed. Empty where none is known."""
    draw, info = torch.Generator().manual_seed(0), trained.prepared.info
    if trained.cfg.task.name == "causal_lm":
        length = min(trained.cfg.data.seq_len, _PROBE_TOKENS)
        ids = torch.randint(int(info["vocab_size"]), (2, length), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if trained.cfg.task.name in ("classify", "segment"):
        size = trained.cfg.data.image_size
        return {"image": torch.randn(2, info["channels"], size, size, generator=draw)}
    return {}


def _computed(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Logits, float32 on the CPU; where no probe is known, the sum of each tensor of the model."""
    with torch.no_grad():
        if not probe:
            return torch.stack([tensor.double().sum() for tensor in model.state_dict().values()])
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in probe.items()}
        out = model(inputs["image"]) if "image" in inputs else model(**inputs, use_cache=False)
    return (out if isinstance(out, Tensor) else out.logits).float().cpu()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _same(found: Tensor, wanted: Tensor, otherwise: str) -> float:
    """The largest difference. Raises ExportError where rounding does not explain it."""
    difference, limit = _difference(found, wanted), TOLERANCE * max(1.0, float(wanted.abs().max()) / 10)
    if not difference <= limit:
        raise ExportError(f"{otherwise}: {difference:.3g} apart, where {limit:.1g} is rounding. Please report it.")
    return difference


def _load_back(trained: Trained, target: Path, form: str, probe: dict[str, Tensor], written: Tensor) -> dict[str, Any]:
    """What the library of the model's users makes of the directory. Raises ExportError when that is another model."""
    model: Any = load(target) if form == "gearshift" else _by_transformers(trained, target, form)
    found = _same(_computed(model, probe), written, f"{form} makes another model of what was written")
    said: dict[str, Any] = {"loaded_with": form, "max_difference_loaded": found}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        said["tied_embeddings"] = head.weight is model.get_input_embeddings().weight
    if trained.cfg.task.name == "causal_lm":
        said["answer"] = _answer(trained, target, model)
    return said


def _by_transformers(trained: Trained, target: Path, form: str) -> Any:
    """The model as transformers (and peft) load it. Raises ExportError when tensors are missing or left over."""
    import transformers

    from train.models.pretrained import AUTO

    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, AUTO.get(trained.cfg.task.name, "AutoModel"))
    settings: dict[str, Any] = dict(dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    if form == "peft":
        import peft

        base = auto.from_pretrained(_base_directory(trained), gguf_file=trained.cfg.model.gguf_file, **settings)
        return peft.PeftModel.from_pretrained(base, str(target)).eval()
    model, found = auto.from_pretrained(target, output_loading_info=True, **settings)
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}:
        raise ExportError(f"transformers does not find all it needs in what was written: {wrong}. Please report it.")
    return model.eval()


def _answer(trained: Trained, target: Path, model: Any) -> dict[str, str]:
    """A prompt and what the loaded model says to it, by the tokenizer that was exported."""
    from transformers import AutoTokenizer

    from train.data.chat import Template

    speller = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    prompt = trained.cfg.eval.prompt
    expected = trained.task.encode([prompt])["input_ids"][0].tolist()  # type: ignore[attr-defined]
    if trained.cfg.data.kind == "chat":
        ids = speller.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=Template(target).source,
            add_generation_prompt=True,
            return_dict=False,
        )
    else:
        ids = [expected[0], *speller.encode(prompt, add_special_tokens=False)]
    if ids != expected:
        raise ExportError(f"The exported tokenizer reads {prompt!r} as {ids}, the run as {expected}. Please report it.")
    room = trained.cfg.data.seq_len - len(ids)
    new = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=max(1, min(_ANSWER_TOKENS, room)),
        do_sample=False,
    )
    return {"prompt": prompt, "text": str(speller.decode(new[0, len(ids) :], skip_special_tokens=True))}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- The model card --------------------------------------------------------------------------------------------------

_USAGE = {
    "transformers": """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")""",
    "peft": """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base}), "DIR")""",
    "pictures": """import torch
from PIL import Image
from transformers import {auto}, AutoImageProcessor

model = {auto}.from_pretrained("DIR")
processor = AutoImageProcessor.from_pretrained("DIR")
with torch.no_grad():
    logits = model(**processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")).logits
print([model.config.id2label[int(i)] for i in logits.argmax(1).unique()])""",
    "gearshift": """# in a checkout of Gearshift (`pip install -e .`)
from train.export import load, predict

model = load("DIR")  # a torch module over normalised images; config.json has mean and std
print(predict("DIR", "picture.png", to="answers"))  # or a folder: the files of `gearshift predict`""",
}
"""How each form is used."""


def _card(trained: Trained, receipt: Mapping[str, Any]) -> str:
    """The model card: the run's real numbers, how it was proved, and how to use it."""
    from train.models.pretrained import AUTO

    cfg, form = trained.cfg, receipt["form"]
    result = trained.run.result() or {}
    engine = result.get("engine") or {}
    newest = {row["step"]: row for row in rundir.read_jsonl(trained.run.metrics)}.get(trained.step, {})
    samples = checkpoint.Reader(trained.run.checkpoint(trained.step)).manifest["counters"]["samples"]
    numbers = {
        "steps": trained.step,
        "samples": samples,
        **({"tokens": samples * cfg.data.seq_len} if cfg.task.name == "causal_lm" else {}),
        **{key: value for key, value in newest.items() if key.startswith("eval_")},
    }
    rows = [f"| {name} | {value:.5g} |" if isinstance(value, float) else f"| {name} | {value:,} |"
            for name, value in numbers.items()]  # fmt: skip
    base = str(cfg.model.path) if cfg.model.path and not Path(cfg.model.path).expanduser().exists() else None
    pictures = form == "transformers" and cfg.task.name != "causal_lm"
    usage = _USAGE["pictures" if pictures else form].format(
        auto=AUTO.get(cfg.task.name, "AutoModel"),
        base=repr(base or "BASE") + (f", gguf_file={cfg.model.gguf_file!r}" if cfg.model.gguf_file else ""),
    )
    head = {"library_name": form, "base_model": base, "pipeline_tag": _PIPELINES.get(cfg.task.name)}
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in head.items() if value),
        "---",
        f"\n# {trained.run.path.name}\n",
        f"Experiment `{cfg.experiment}`, task `{cfg.task.name}`"
        + (f", {receipt['peft']} with r={cfg.peft.r}, alpha={cfg.peft.alpha:g}" if cfg.peft.name != "none" else "")
        + f". Trained with Gearshift under {engine.get('strategy')} on {engine.get('world_size')} rank(s) in "
        f"{engine.get('precision')}; math hash `{receipt['math_hash']}`.\n",
        "| at this step | |",
        "|---|---|",
        *rows,
        f"\nStored in {receipt['dtype']} and loaded back with {form}: {receipt['compared']} differ by at most "
        f"{receipt['max_difference']:.1e} from the run in fp32, and by {receipt['max_difference_loaded']:.1e} from what "
        "was written (`export.json`).\n",
        "## Use\n",
        f"```python\n{usage}\n```",
    ]
    if pictures and not cfg.data.resize:
        size = cfg.data.image_size
        lines.append(
            f"\nIt was trained on squares of {size} pixels cut out of whole pictures (`data.resize=false`): give it such."
        )
    if "answer" in receipt:
        text = "\n".join(f"    {line}" for line in receipt["answer"]["text"].splitlines())
        lines += [f"\n`{receipt['answer']['prompt']}` is answered (the likeliest words) with\n", text]
    return "\n".join(lines) + "\n"


_PIPELINES = {"causal_lm": "text-generation", "classify": "image-classification", "segment": "image-segmentation"}
