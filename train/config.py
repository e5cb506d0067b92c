"""Every setting of a run: the schema, its documentation, and the rules that join settings.

Owns: the dataclasses below (one per config group) with the docstring under each field, from which `docs/config.md` is
made (`python -m train.config > docs/config.md`); what each field may hold, in its annotation; the rules between fields
(`validate`); `compose` and `load`; the two hashes. Torch-free, so that a config error costs less than a second.

Does not own: what a setting does, or how text becomes a typed tree (`compose.py`, which knows no setting). No module
reads the environment for a setting; they read `Config`.

The groups fall on three sides. Only `WHAT` may change the loss curve, so only `WHAT` enters the math hash:

    WHAT     task model data optim peft train seed          what is learned
    WHERE    hardware slurm                                  the machine
    HOW      strategy numerics                               the layout on it
    WATCHED  run log eval checkpoint tracker                 what is looked at, in no hash
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from train.compose import (
    PLUGINS,
    ConfigError,
    Count,
    Natural,
    NonNegative,
    OneLine,
    OpenShare,
    Positive,
    Rule,
    Share,
    ShareBelow1,
    assign,
    build,
    compose_files,
    find_options,
    import_plugin,
    items,
    leaves,
    nearest,
    pattern,
    read_yaml,
    request,
    resolve,
    shown,
    words,
)

CONF = Path(__file__).resolve().parent.parent / "conf"
"""The groups that ship."""
LOCAL = CONF / "local" / "default.yaml"
"""This machine's own settings, in no repository."""

WHAT = ("task", "model", "data", "optim", "peft", "train", "seed")
WHERE = ("hardware", "slurm")
HOW = ("strategy", "numerics")
WATCHED = ("run", "log", "eval", "checkpoint", "tracker")

BY_CONTENT = (
    "data.path data.sources.path data.val_path data.chat_template data.tokenizer model.path model.revision model.gguf_file"
).split()
"""What names content: in the math hash stand the fingerprints of the content instead."""
UNHASHED = [*BY_CONTENT, "data.cache_dir", "data.workers", "train.resolved_precision", "hardware.nvme_path"]
ALTERNATIVES = (
    ("train.max_steps", "train.max_epochs", "train.max_tokens"),
    ("data.path", "data.sources"),
    ("data.val_path", "data.fold"),
)
"""Settings of which one holds: an override of one clears the others of its row."""

FileName = Annotated[
    str,
    pattern(
        "letters, digits and . _ -, beginning with a letter or digit, at most 96, without ..",
        r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
    ),
]
Seed = Annotated[int, Rule("0 to 2^63 - 1", lambda v: 0 <= v < 2**63)]
Nodes = Annotated[str, Rule("a number such as 2, or a range such as 2-8", lambda v: not raises(node_range, v))]
Duration = Annotated[str, Rule("such as 90, 15m, 1.5h, 2d or HH:MM:SS", lambda v: not raises(seconds, v))]
SlurmTime = Annotated[str, pattern("such as 90 (minutes), 12:00:00 or 2-00:00:00", r"(\d+-)?\d+(:\d\d?){0,2}")]
SlurmSize = Annotated[str, pattern("such as 64G", r"\d+[KMGT]?")]
SlurmOption = Annotated[str, pattern("beginning with --, on one line", r"--[a-z][^\x00-\x1f\x7f]*")]


def node_range(nodes: str) -> tuple[int, int]:
    """`hardware.nodes` as (fewest, most). Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", nodes)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{nodes!r} is not a number of nodes: use 2, or 2-8")
    return int(match[1]), int(match[2] or match[1])


def seconds(text: str) -> float:
    """`90`, `15m`, `1.5h`, `2d` or `[D-]HH:MM:SS` in seconds. Raises ValueError."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{1,2}):(\d{1,2})", text):
        days, h, m, s = (int(x or 0) for x in match.groups())
        return days * 86400.0 + h * 3600 + m * 60 + s
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text):
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    raise ValueError(f"{text!r} is not a time: use 90, 15m, 1.5h, 2d or HH:MM:SS")


def raises(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return True
    return False


@dataclass
class TaskConfig:
    """What is predicted, and by which loss."""

    name: str = "causal_lm"
    """`causal_lm`, `classify`, `segment`, or a task that a plug-in adds."""
    class_weights: Literal["balanced"] | list[Positive] | None = None
    """Weights of the classes in the loss: `null`, `balanced`, or one number per class (classify, segment)."""
    dice_weight: NonNegative = 1.0
    """Weight of the per-sample Dice term beside cross-entropy (segment). 0 is off."""
    label_smoothing: ShareBelow1 = 0.0
    """Label smoothing of the cross-entropy, in [0, 1) (classify)."""


@dataclass
class ModelConfig:
    """The network. With `path`, its weights and shape come from there and the shape fields below are not read."""

    name: str = "llama"
    """`llama`, `gpt2`, `vit`, `convnet`, `unet`, `pretrained`, or a model that a plug-in adds."""
    path: str | None = None
    """Where weights come from: a Hugging Face directory, a hub id, or a run directory. `null` starts from scratch."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, for models that ship as one."""
    vocab_size: Count | None = None
    """Entries of the embedding. `null` takes the tokenizer's, rounded up to a multiple of 64."""
    hidden_size: Count = 128
    """Width of the residual stream."""
    intermediate_size: Count | None = None
    """Width inside the MLP. `null` is 4 x `hidden_size` (GPT-2, ViT) or 8/3 x, rounded up to 64 (Llama)."""
    num_layers: Count = 4
    """Transformer blocks, or stages of a convolutional net."""
    num_heads: Count = 4
    """Attention heads."""
    num_kv_heads: Count | None = None
    """Key and value heads (grouped-query attention, Llama). `null` is `num_heads`."""
    max_position_embeddings: Count | None = None
    """Longest row the model can see. `null` is `data.seq_len`."""
    rope_theta: Positive = 10000.0
    """Base of the rotary embedding (Llama)."""
    norm_eps: Positive = 1e-5
    """Epsilon of the normalisation layers."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    dropout: ShareBelow1 = 0.0
    """Dropout of residual branches; a function of (seed, epoch, sample id, module, element). Attention dropout is refused."""
    patch_size: Count = 4
    """Side of a patch in pixels (ViT)."""
    channels: Count = 32
    """Channels of the first stage (U-Net, ConvNet)."""


@dataclass
class SourceConfig:
    """One of several weighted sources."""

    path: str = ""
    """File, directory, or hub id."""
    weight: Positive = 1.0
    """Share of the positions, relative to the other sources."""


@dataclass
class DataConfig:
    """What is read, and how it becomes samples."""

    kind: str = "text"
    """`text`, `chat`, `images`, `digits`, `digit_scenes`, or a source that a plug-in adds."""
    path: str | None = None
    """File, directory, or hub id. The word `stdlib` is the source of this Python's standard library. Never hashed: content is."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources with weights, instead of `path`."""
    val_path: str | None = None
    """Validation data. `null` holds out `val_fraction` of the documents or images."""
    val_fraction: ShareBelow1 = 0.1
    """Share held out by a hash of each document's name, when there is neither `val_path` nor `fold`."""
    folds: Annotated[int, Rule("2 or more", lambda v: v >= 2)] = 5
    """Number of folds that `fold` counts in."""
    fold: Natural | None = None
    """Hold out this fold (0 to `folds` - 1) instead of `val_fraction`."""
    name: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    text_field: str = "text"
    """Field (or column) that holds the text in .jsonl, .parquet, .csv and datasets."""
    glob: str | None = None
    """Pattern of the files taken from a directory, e.g. `**/*.py`. `null` takes every readable text or image file."""
    tokenizer: str = "bpe"
    """`bytes`, `bpe` (byte-level, trained on the training split), or a Hugging Face tokenizer (directory or hub id). With `model.path`, `bpe` means the model's."""
    tokenizer_vocab_size: Annotated[int, Rule("260 or more (256 bytes and the special tokens)", lambda v: v >= 260)] = 1024
    """Vocabulary of a trained `bpe`, special tokens included."""
    seq_len: Annotated[int, Rule("2 or more", lambda v: v >= 2)] = 256
    """Tokens in a row; a row is one sample."""
    pack: bool = True
    """Pack several chats into a row (attention never crosses documents). Plain text is always packed."""
    chat_template: str | None = None
    """File with a Jinja chat template. `null` takes the tokenizer's, or the default one."""
    image_size: Count = 64
    """Side in pixels of the square that training sees; evaluation sees whole images by tiles."""
    resize: bool = False
    """Resize images to `image_size` instead of cropping."""
    num_classes: Count | None = None
    """Number of classes. `null` counts them in the data."""
    ignore_index: int = 255
    """Mask value that carries no loss."""
    augment: list[Literal["flip", "crop", "scale", "color", "shift"]] = field(default_factory=list)
    """Augmentations, each keyed by sample id: `flip`, `crop`, `scale`, `color`, `shift`."""
    max_bad_fraction: Share = 0.01
    """Share of unreadable rows or files above which preparation stops. Each is quarantined with file, line and reason."""
    max_row_bytes: Count = 8_000_000
    """A row (a line, a file's text) longer than this is bad."""
    cache_dir: str | None = None
    """Where prepared data lies; several users may share it. `null` is `$XDG_CACHE_HOME/gearshift` (or `~/.cache/gearshift`)."""
    workers: Natural = 2
    """Threads that read and augment samples ahead of the step, per rank."""


@dataclass
class OptimConfig:
    """The optimizer and the learning rate as a function of the step."""

    name: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """`adamw`, `sgd`, or `adamw_8bit` (single and ddp only)."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: Annotated[list[ShareBelow1], Rule("two of them", lambda v: len(v) == 2)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment (AdamW)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment (AdamW)."""
    momentum: ShareBelow1 = 0.9
    """Momentum (SGD)."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; vectors (biases, norms) have none."""
    clip: Positive | None = 1.0
    """Largest gradient norm over all parameters; `null` is off."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """`cosine`, `linear`, `constant`, or `wsd` (warm-up, stable, decay)."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up from 0."""
    final_lr_fraction: Share = 0.1
    """The schedule ends at this fraction of `lr`."""
    decay_fraction: Annotated[float, Rule("above 0, at most 1", lambda v: 0 < v <= 1)] = 0.2
    """Last share of the run in which `wsd` decays."""
    ema: OpenShare | None = None
    """Decay of an exponential moving average of the weights, e.g. 0.999; evaluated and exported when set. `null` is off."""


@dataclass
class PeftConfig:
    """Which parameters are trained."""

    name: Literal["none", "lora", "qlora"] = "none"
    """`none` (all), `lora`, or `qlora` (LoRA over a 4-bit base)."""
    r: Count = 8
    """Rank of the adapters."""
    alpha: Positive = 16.0
    """Scale of the adapters is `alpha / r`."""
    dropout: ShareBelow1 = 0.0
    """Dropout before the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters, or `all-linear`."""
    quant_storage: Literal["uint8", "bf16", "fp32"] = "uint8"
    """Dtype in which 4-bit weights are stored: `uint8`, `bf16`, `fp32` (qlora; FSDP2 shards any of them)."""


@dataclass
class TrainConfig:
    """How long, on how much at once, in which precision. Exactly one duration is set."""

    global_batch_size: Count = 16
    """Samples in a step over all ranks. The planner splits it; it never changes with the hardware."""
    max_steps: Count | None = None
    """Duration in optimizer steps."""
    max_epochs: Positive | None = None
    """Duration in passes over the training data."""
    max_tokens: Positive | None = None
    """Duration in tokens (rows x `data.seq_len`)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` (bf16 where the device has it natively, else fp32; frozen at the first start), `fp32`, `bf16`, `fp16`."""
    resolved_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """What `precision=auto` became. Written by the first start and compared by every later one; nobody sets it, and no hash holds it."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient, agreed by all ranks before the update: `stop`, or `skip` the step."""
    nonfinite_cap: Count = 10
    """With `skip`: stop after so many skipped steps in a row."""


@dataclass
class HardwareConfig:
    """The machine. Read by the planner and the launcher; `auto` fields are looked up on this machine."""

    name: str = "auto"
    """Name of the tier, for people."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto`, `cpu`, `cuda` or `mps`."""
    nodes: Nodes = "1"
    """Number of nodes, or a range such as `2-8` (Slurm grants what it can)."""
    devices_per_node: Count | None = None
    """Devices (or CPU processes) per node. `null` takes all GPUs, or one process on a CPU."""
    gpu: str | None = None
    """Name of the card, a key of the planner's table of peaks."""
    memory_gib: Positive | None = None
    """Memory of one device in GiB; on a bigger card the process is capped to it. `null` is the device's own."""
    intra_node_gb_s: Positive | None = None
    """Bandwidth between devices of a node, one direction, GB/s."""
    inter_node_gb_s: Positive | None = None
    """Bandwidth of a node to the others, one direction, GB/s."""
    host_ram_gib: Positive | None = None
    """Memory of the host in GiB, for offload."""
    nvme_gb_s: Positive | None = None
    """Bandwidth of local NVMe, GB/s, for offload."""
    nvme_path: str | None = None
    """Directory on local NVMe, for offload."""
    usd_per_device_h: NonNegative | None = None
    """Price of one device for one hour."""
    watts_per_device: NonNegative | None = None
    """Power of one device under load, its share of the host included."""


@dataclass
class SlurmConfig:
    """How a job is submitted. Names are sbatch's long options."""

    name: Literal["none", "cluster", "devcluster"] = "none"
    """`none` starts here, `cluster` submits with sbatch, `devcluster` submits to the throwaway cluster of `slurm/devcluster`."""
    partition: OneLine | None = None
    """sbatch --partition."""
    account: OneLine | None = None
    """sbatch --account."""
    qos: OneLine | None = None
    """sbatch --qos."""
    constraint: OneLine | None = None
    """sbatch --constraint."""
    time: SlurmTime = "1-00:00:00"
    """sbatch --time: limit of one allocation; a run may take several."""
    cpus_per_task: Count | None = None
    """sbatch --cpus-per-task. `null` leaves it to the cluster."""
    mem: SlurmSize | None = None
    """sbatch --mem."""
    gpus_per_node: OneLine | None = None
    """sbatch --gpus-per-node, e.g. `a100:4`. `null` asks for `hardware.devices_per_node` on CUDA tiers."""
    signal_s: Annotated[int, Rule("1 to 65535", lambda v: 1 <= v <= 65535)] = 300
    """Seconds of notice before the limit, in which the run saves and leaves."""
    max_requeues: Natural = 100
    """Time-outs after which a run is not requeued any more; preemptions do not count."""
    array_cap: Count | None = None
    """Array tasks of a sweep that run at once."""
    setup: list[OneLine] = field(default_factory=list)
    """Shell lines run before the job: modules, conda, container."""
    extra: list[SlurmOption] = field(default_factory=list)
    """More `#SBATCH` options, e.g. `--exclusive`."""


@dataclass
class StrategyConfig:
    """The layout on the machine. Nothing here may change the loss curve beyond rounding."""

    name: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """`auto`, `single`, `ddp`, `fsdp2`, `zero1`, `zero2`, `zero3`."""
    micro_batch_size: Count | None = None
    """Samples in one forward on one rank. `null` is planned; accumulation follows from it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """`none`, `cpu` (zero2, zero3) or `nvme` (zero3): where the optimizer state lies."""
    offload_parameters: bool = False
    """Offload the parameters too (zero3)."""
    activation_checkpointing: Natural = 0
    """0 keeps all activations; n recomputes every n-th block in the backward pass (1 is every block)."""
    activation_offload: bool = False
    """Keep saved activations in host memory."""
    chunked_loss: bool | None = None
    """Compute the output layer and the cross-entropy in chunks, never holding all logits. `null` is planned (off until then)."""
    compile: bool = False
    """torch.compile. Worth it for long runs only."""
    fused_optimizer: bool | None = None
    """Fused AdamW. `null` is on where the device has it and numerics allow it."""
    bucket_mb: Positive = 25.0
    """Size of a gradient bucket of DDP and ZeRO, in MB."""
    persistence_threshold: Natural = 100_000
    """ZeRO-3 keeps parameters with fewer elements whole on every rank."""


@dataclass
class RunConfig:
    """The run's name and limits. In no hash."""

    name: FileName | None = None
    """Name of the run directory. `null` is `<experiment>-<first 8 of the math hash>`."""
    root: str = "runs"
    """Where run directories lie."""
    stop_at: Count | None = None
    """Stop and save after this step; holds for one command."""
    max_time: Duration | None = None
    """Stop and save after this time (`90`, `15m`, `1.5h`, `2d`, or `HH:MM:SS`); holds for one command."""
    fit: Literal["error", "warn"] = "error"
    """`error` refuses a plan that does not fit, `warn` starts all the same."""
    max_restarts: Natural = 0
    """Restarts inside a job after an unexplained death of a rank."""
    step_timeout_s: Positive = 1800.0
    """A step that takes longer is taken for hung: stacks go to the logs and the rank behind is named."""
    startup_timeout_s: Positive = 3600.0
    """The same for the time before the first step."""


@dataclass
class LogConfig:
    """How often values are fetched and written."""

    every: Count = 10
    """Steps between fetches of the metrics from the device; every step gets its line all the same."""


@dataclass
class EvalConfig:
    """Evaluation on the validation data."""

    every: Count | None = None
    """Steps between evaluations; the end of the run is always evaluated. `null` is only the end."""
    metric: Annotated[str, pattern("the name of a metric, such as eval_loss", r"eval_\w+")] | None = None
    """Metric that is the objective, e.g. `eval_loss`. `null` is the task's; its direction is fixed by the task."""
    patience: Count | None = None
    """Stop after so many evaluations without a better objective. `null` is off."""
    max_samples: Count | None = None
    """Evaluate on the first so many validation samples. `null` is all."""
    samples: Natural = 1
    """Predictions written under `samples/` at each evaluation: continued texts, overlays."""
    sample_tokens: Count = 160
    """Tokens of a continued text."""
    prompt: str = "def "
    """Beginning of a continued text."""


@dataclass
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: Count | None = None
    """Steps between checkpoints; the end and every stop are always saved. `null` is only those."""
    keep: Count = 2
    """How many of the newest are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best objective too."""
    keep_every: Count | None = None
    """Keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Write in the background; the loop waits only for the copy."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a save fails: `continue` the run (the old checkpoints stay) or `stop`."""


@dataclass
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`, which is the truth."""

    wandb: bool = False
    """Weights & Biases."""
    mlflow: bool = False
    """MLflow, into `mlruns` of the run root unless MLFLOW_TRACKING_URI is set."""
    tensorboard: bool = False
    """TensorBoard event files in the run directory."""
    project: str = "gearshift"
    """Project (W&B) or experiment (MLflow)."""
    entity: str | None = None
    """W&B entity."""
    mode: Literal["offline", "online"] = "offline"
    """W&B mode: `offline` or `online`."""


@dataclass
class Config:
    """One run. `experiment` picks the what, `hardware` the where; the rest follows or is set by name."""

    experiment: FileName = "lm_stdlib"
    """The experiment's name; also the beginning of the run's default name."""
    seed: Seed = 0
    """Seed of initial weights, order, dropout and augmentation."""
    numerics: Literal["fast", "exact"] = "fast"
    """`fast`, or `exact`: the same bits on any number of ranks (single and ddp; slower)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


# --------------------------------------------------------------------------------------------- rules between settings

BUILT_IN = {
    "task.name": ("causal_lm", "classify", "segment"),
    "model.name": ("llama", "gpt2", "vit", "convnet", "unet", "pretrained"),
    "data.kind": ("text", "chat", "images", "digits", "digit_scenes"),
}
"""Names that need no plug-in."""
GOES_WITH = {
    "causal_lm": ({"llama", "gpt2", "pretrained"}, {"text", "chat"}),
    "classify": ({"vit", "convnet", "pretrained"}, {"images", "digits"}),
    "segment": ({"unet", "pretrained"}, {"images", "digit_scenes"}),
}
"""Task -> the models and kinds of data it works on."""


def validate(cfg: Config) -> list[str]:
    """What is wrong between settings, each text with what was given, what is required, and what to type."""
    return [*_names(cfg), *_shape(cfg), *_data(cfg), *_duration(cfg), *_layout(cfg), *_watched(cfg)]


def _names(cfg: Config) -> Iterator[str]:
    plain = {key: value for key, value in items(to_dict(cfg)) if key in BUILT_IN}
    if not PLUGINS:
        for key, name in plain.items():
            if name not in BUILT_IN[key]:
                close = nearest(name, BUILT_IN[key])
                meant = f" Did you mean {key}={close}?" if close else ""
                known = f"one of {', '.join(BUILT_IN[key])}, or what a plug-in adds (--plugin my_package)"
                yield f"{key}={shown(name)}: must be {known}.{meant}"
    if all(name in BUILT_IN[key] for key, name in plain.items()):
        models, kinds = GOES_WITH[cfg.task.name]
        if cfg.model.name not in models and cfg.model.path is None:
            yield f"model={cfg.model.name}: task={cfg.task.name} needs model={' or '.join(sorted(models))}."
        if cfg.data.kind not in kinds:
            yield f"data={cfg.data.kind}: task={cfg.task.name} needs data={' or '.join(sorted(kinds))}."


def _shape(cfg: Config) -> Iterator[str]:
    m, d = cfg.model, cfg.data
    if m.name == "pretrained" and m.path is None:
        yield "model=pretrained: needs weights; set model.path to a Hugging Face directory, a hub id or a run directory."
    if m.gguf_file is not None and m.path is None:
        yield f"model.gguf_file={m.gguf_file}: is a file inside model.path, which is null; set model.path."
    if cfg.peft.name != "none" and m.path is None:
        yield f"peft={cfg.peft.name}: adapts a pretrained model; set model.path, or peft=none to train from scratch."
    if m.path is not None or m.name not in ("llama", "gpt2", "vit"):
        return
    if m.hidden_size % m.num_heads:
        yield f"model.hidden_size={m.hidden_size}: must be a multiple of model.num_heads={m.num_heads}; change either."
    elif m.name == "llama" and m.hidden_size // m.num_heads % 2:
        each = f"{m.hidden_size // m.num_heads} for each of model.num_heads={m.num_heads}"
        yield f"model.hidden_size={m.hidden_size}: rotary embeddings need an even number per head, not {each}."
    if m.num_kv_heads is not None and m.name != "llama":
        yield f"model.num_kv_heads={m.num_kv_heads}: only model=llama groups its heads; set model.num_kv_heads=null."
    elif m.num_kv_heads is not None and m.num_heads % m.num_kv_heads:
        yield f"model.num_kv_heads={m.num_kv_heads}: must divide model.num_heads={m.num_heads}; change either."
    if m.name == "vit":
        if d.image_size % m.patch_size:
            yield f"model.patch_size={m.patch_size}: must divide data.image_size={d.image_size}; change either."
        return
    longest = m.max_position_embeddings
    if longest is not None and longest < d.seq_len:
        yield f"data.seq_len={d.seq_len}: longer than model.max_position_embeddings={longest}; raise that, or set it to null."
    if m.vocab_size is not None and d.tokenizer == "bpe" and m.vocab_size < d.tokenizer_vocab_size:
        least = f"at least data.tokenizer_vocab_size={d.tokenizer_vocab_size}"
        yield f"model.vocab_size={m.vocab_size}: must be {least}, or null to follow it."


def _data(cfg: Config) -> Iterator[str]:
    d, t = cfg.data, cfg.task
    if d.path is not None and d.sources:
        yield f"data.path={d.path}: data.sources is set too; one of them holds: set data.path=null or data.sources=[]."
    if d.fold is not None and d.fold >= d.folds:
        yield f"data.fold={d.fold}: must be below data.folds={d.folds}; folds count from 0."
    if d.fold is not None and d.val_path is not None:
        yield f"data.fold={d.fold}: data.val_path is set too; one of them holds: set data.fold=null or data.val_path=null."
    if d.augment and d.kind in ("text", "chat"):
        yield f"data.augment={shown(d.augment)}: augments images, and data.kind is {d.kind}; set data.augment=[]."
    if isinstance(t.class_weights, list) and d.num_classes not in (None, len(t.class_weights)):
        yield f"task.class_weights={shown(t.class_weights)}: has {len(t.class_weights)} numbers for data.num_classes={d.num_classes}."
    if t.class_weights is not None and t.name == "causal_lm":
        yield f"task.class_weights={shown(t.class_weights)}: tokens have no class weights; set task.class_weights=null."


def _duration(cfg: Config) -> Iterator[str]:
    keys = ALTERNATIVES[0]
    given = {key: value for key, value in items(to_dict(cfg)) if key in keys and value is not None}
    if len(given) != 1:
        pairs = " ".join(f"{key}={shown(value)}" for key, value in given.items()) or "no duration"
        yield f"{pairs}: exactly one of {', '.join(keys)} must be set, such as train.max_steps=1000; set the others to null."
    if cfg.train.max_tokens is not None and cfg.data.kind in ("images", "digits", "digit_scenes"):
        yield f"train.max_tokens={shown(cfg.train.max_tokens)}: images have no tokens; set train.max_epochs or train.max_steps."
    if cfg.train.precision not in ("auto", cfg.train.resolved_precision) and cfg.train.resolved_precision is not None:
        frozen = cfg.train.resolved_precision
        yield f"train.precision={cfg.train.precision}: this run began in {frozen} and keeps it; start another run.name."


def _layout(cfg: Config) -> Iterator[str]:
    s, t, name = cfg.strategy, cfg.train, cfg.strategy.name
    if cfg.numerics == "exact":
        exact = "numerics=exact: the same bits on any number of ranks"
        if name not in ("auto", "single", "ddp"):
            yield f"{exact} exist for strategy=single and ddp, not {name}; set strategy=ddp or numerics=fast."
        if t.precision == "fp16":
            yield f"{exact} need fp32 or bf16, not train.precision=fp16."
        if s.compile:
            yield f"{exact} need strategy.compile=false."
        if s.fused_optimizer:
            yield f"{exact} need strategy.fused_optimizer=null or false."
    if t.precision == "fp16" and cfg.hardware.device == "cpu":
        yield "train.precision=fp16: a CPU does not train in fp16; set train.precision=bf16 or fp32."
    if s.offload == "cpu" and name not in ("zero2", "zero3"):
        yield f"strategy.offload=cpu: needs strategy=zero2 or zero3, not {name}."
    if s.offload == "nvme" and name != "zero3":
        why = " (with zero1 and zero2, DeepSpeed would offload to the CPU and not say so)" if name in ("zero1", "zero2") else ""
        yield f"strategy.offload=nvme: needs strategy=zero3, not {name}{why}."
    if s.offload == "nvme" and cfg.hardware.nvme_path is None:
        yield "strategy.offload=nvme: set hardware.nvme_path to a directory on local NVMe."
    if s.offload != "none" and cfg.optim.name != "adamw":
        yield f"strategy.offload={s.offload}: the update then runs on the CPU, where only AdamW is fast; set optim=adamw."
    if s.offload_parameters and (name != "zero3" or s.offload == "none"):
        yield "strategy.offload_parameters=true: needs strategy=zero3 and strategy.offload=cpu or nvme."
    if cfg.optim.name == "adamw_8bit" and name not in ("auto", "single", "ddp"):
        yield f"optim=adamw_8bit: its blocks cannot follow shards; set strategy=ddp, or optim=adamw with strategy={name}."
    if cfg.peft.name == "qlora" and name not in ("auto", "single", "ddp", "fsdp2"):
        yield f"peft=qlora: 4-bit weights run under single, ddp and fsdp2, not {name}; set strategy=fsdp2 or peft=lora."
    if s.chunked_loss and cfg.task.name in ("classify", "segment"):
        yield f"strategy.chunked_loss=true: chunks the vocabulary of a language model; task={cfg.task.name} has none."
    if s.micro_batch_size is not None and s.micro_batch_size > t.global_batch_size:
        yield f"strategy.micro_batch_size={s.micro_batch_size}: must be at most train.global_batch_size={t.global_batch_size}."
    ranks = most_ranks(cfg)
    if ranks is None:
        return
    where = f"{ranks} devices (hardware.nodes={cfg.hardware.nodes} x hardware.devices_per_node={cfg.hardware.devices_per_node})"
    if ranks > t.global_batch_size:
        yield f"train.global_batch_size={t.global_batch_size}: too few samples for {where}; each needs at least one."
    if name == "single" and ranks > 1:
        one = "hardware.nodes=1 hardware.devices_per_node=1"
        yield f"strategy=single: runs on one device, and there are {where}; set strategy=ddp, or {one}."
    if cfg.hardware.device == "mps" and ranks > 1:
        yield f"hardware.device=mps: a Mac runs one process, not {ranks}; set hardware.devices_per_node=1 hardware.nodes=1."


def most_ranks(cfg: Config) -> int | None:
    """The most ranks that `hardware` may give, where it says so."""
    each = cfg.hardware.devices_per_node
    return None if each is None else each * node_range(cfg.hardware.nodes)[1]


def _watched(cfg: Config) -> Iterator[str]:
    if cfg.eval.patience is not None and cfg.eval.every is None:
        yield f"eval.patience={cfg.eval.patience}: counts evaluations; set eval.every to a number of steps."


def missing_inputs(cfg: Config) -> list[str]:
    """What a run still needs though its config is sound: a plan can do without data, training cannot."""
    if cfg.data.kind in ("text", "chat", "images") and cfg.data.path is None and not cfg.data.sources:
        what = {"text": "text files", "chat": "chats", "images": "a folder of images"}[cfg.data.kind]
        return [f"data.path=null: experiment={cfg.experiment} reads your own {what}; set data.path=PATH, or data.sources=[...]."]
    return []


# ------------------------------------------------------------------------------------------------ from text to a Config

SYNONYMS = {
    "learning_rate": "It is optim.lr.",
    "batch_size": "It is train.global_batch_size, the samples of a step over all ranks.",
    "per_device_train_batch_size": "Over all ranks it is train.global_batch_size; on one it is strategy.micro_batch_size.",
    "gradient_accumulation_steps": "It follows from train.global_batch_size, strategy.micro_batch_size and the ranks.",
    "epochs": "It is train.max_epochs.",
    "num_train_epochs": "It is train.max_epochs.",
    "steps": "It is train.max_steps.",
    "mixed_precision": "It is train.precision.",
    "dtype": "It is train.precision.",
    "bf16": "It is train.precision=bf16.",
    "fp16": "It is train.precision=fp16.",
    "gradient_checkpointing": "It is strategy.activation_checkpointing=1.",
    "max_grad_norm": "It is optim.clip.",
    "grad_clip": "It is optim.clip.",
    "scheduler": "It is optim.schedule.",
    "optimizer": "It is optim=adamw, and optim.lr and so on.",
    "dataset": "It is data.path.",
    "max_length": "It is data.seq_len.",
    "block_size": "It is data.seq_len.",
    "output_dir": "It is run.root and run.name.",
    "num_workers": "It is data.workers.",
    "num_gpus": "It is hardware.devices_per_node.",
    "gpus": "It is hardware.devices_per_node.",
    "report_to": "It is tracker=wandb, mlflow, tensorboard or none.",
    "wandb": "It is tracker=wandb.",
}
"""What the settings are called elsewhere."""


def compose(overrides: Sequence[str], *, config_dir: str | None = None, plugin: str | None = None) -> Config:
    """`conf/` with the chosen options, this machine's `conf/local`, then the overrides: one checked Config.

    config_dir: a directory of more groups and options, laid out as `conf/`. plugin: see `compose.import_plugin`.
    Raises ConfigError, which holds everything that is wrong at once.
    """
    if plugin is not None:
        import_plugin(plugin)
    extra = Path(config_dir).resolve() if config_dir is not None else None
    if extra is not None and not extra.is_dir():
        raise ConfigError([f"--config-dir {shown(config_dir)}: must be a directory of groups, as conf/ is."])
    options = find_options([CONF, extra] if extra else [CONF])
    options.pop("local", None)
    asked = request(overrides, leaves(Config), options, several=["tracker"], synonyms=SYNONYMS)
    data, chosen = compose_files(CONF / "config.yaml", to_dict(Config()), asked.choices, extra)
    data["experiment"] = chosen["experiment"]
    files = [options[group][option] for group, option in chosen.items() if option in options.get(group, {})]
    problems = [
        *asked.problems,
        *_overreach(options["experiment"][chosen["experiment"]], {*WHAT, *WATCHED} - {"run"}, "says what is learned"),
        *(_overreach(LOCAL, {*WHERE, *HOW, *WATCHED, "data.cache_dir"}, "says what this machine is") if LOCAL.exists() else []),
    ]
    return _checked(data, asked.values, problems, files)


def load(run_dir: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The frozen `config.yaml` of a run directory (or that file), with overrides: single values, or options of where, how and watched.

    The file is read as plain data and need not be trusted. Raises ConfigError, which holds everything that is wrong.
    """
    path = Path(run_dir)
    path = path / "config.yaml" if path.is_dir() else path
    data = read_yaml(path)
    options = find_options([CONF])
    asked = request(overrides, leaves(Config), options, several=["tracker"], synonyms=SYNONYMS)
    for group in [g for g in asked.choices if g not in (*WHERE, *HOW, *WATCHED)]:
        option = asked.choices.pop(group)
        asked.problems.append(
            f"{group}={shown(option)}: a run keeps the {group} it began with; change single settings, or start another run."
        )
    if asked.choices:
        composed, _ = compose_files(CONF / "config.yaml", to_dict(Config()), asked.choices)
        data |= {group: composed[group] for group in asked.choices}
    return _checked(data, asked.values, asked.problems, [path], references=bool(overrides))


def _overreach(path: Path, allowed: set[str], role: str) -> list[str]:
    """What a file sets or selects beyond its role: an experiment no machine, a machine no experiment."""
    data = read_yaml(path)
    defaults = data.pop("defaults", None) or []
    selected = [str(key) for entry in defaults if isinstance(entry, Mapping) for key in entry]
    selected = [key.split("/")[-1].split("@")[0] for key in selected if "/" in key]
    beyond = [key for key, _ in items(data) if key not in allowed and key.split(".")[0].split("[")[0] not in allowed]
    return [
        f"{path}: sets {key}, but this file {role}; set it elsewhere or on the command line."
        for key in [*beyond, *(group for group in selected if group not in allowed)]
        if key
    ]


def _checked(
    data: dict[str, Any], values: Mapping[str, Any], problems: list[str], files: Sequence[Path], references: bool = True
) -> Config:
    """`data` with the overrides' `values` as a Config, or ConfigError with `problems` and all others."""
    for row in ALTERNATIVES:
        set_now = [key for key in row if values.get(key) not in (None, [])]
        if len(set_now) > 1:
            pairs = " ".join(f"{key}={shown(values[key])}" for key in set_now)
            problems.append(f"{pairs}: one of {', '.join(row)} can be set; leave the others out.")
        for key in row if set_now else ():
            assign(data, key, leaves(Config)[key].default)
        values = {key: value for key, value in values.items() if key not in row or key in set_now[:1] or not set_now}
    for key, value in values.items():
        assign(data, key, value)
    unresolved: list[tuple[str, str]] = []
    if references:
        data, unresolved = resolve(data)
    cfg, wrong = build(Config, data)
    for key, text in [*unresolved, *wrong]:
        origin = "" if key in values else next((f" ({file})" for file in files if _mentions(file, key)), "")
        problems.append(text + origin)
    problems += validate(cfg)
    if problems:
        raise ConfigError(problems)
    return cfg


def _mentions(file: Path, key: str) -> bool:
    """Whether `file` sets `key`, itself or as the option of a group."""
    return any(own in (key, key.split(".", 1)[-1]) for own, _ in items(read_yaml(file)))


# ---------------------------------------------------------------------------------------- plain data, hashes, differences


def to_dict(cfg: Config) -> dict[str, Any]:
    return asdict(cfg)


def to_yaml(cfg: Config) -> str:
    """The whole config as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def math_dict(cfg: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Everything in *what*, with content in place of what names it; equal exactly where the math is.

    fingerprints: sha256 of the content, by name; `data` always, `model` with `model.path`. Raises ValueError without.
    """
    for name, needed in (("data", True), ("model", cfg.model.path is not None)):
        if needed and not fingerprints.get(name):
            raise ValueError(f"the math hash needs the fingerprint of the {name}, which `prepare` makes")
    what = _without({group: value for group, value in to_dict(cfg).items() if group in WHAT}, UNHASHED)
    if cfg.data.tokenizer in ("bytes", "bpe"):
        what["data"]["tokenizer"] = cfg.data.tokenizer
    what["content"] = dict(fingerprints)
    if PLUGINS:
        what["plugins"] = sorted(PLUGINS.values())
    return what


def math_hash(cfg: Config, fingerprints: Mapping[str, str]) -> str:
    """sha256 of `math_dict`: what is learned, and nothing of where and how."""
    return _sha256(math_dict(cfg, fingerprints))


def exec_hash(cfg: Config) -> str:
    """sha256 of where and how."""
    return _sha256(_without({group: value for group, value in to_dict(cfg).items() if group in (*WHERE, *HOW)}, UNHASHED))


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts, as `train.max_steps: 100 -> 200`, in the order of `new`."""
    before, after = dict(items(old)), dict(items(new))
    gone = object()
    return [
        f"{key}: {'(none)' if (was := before.get(key, gone)) is gone else shown(was)} -> "
        f"{'(none)' if (now := after.get(key, gone)) is gone else shown(now)}"
        for key in {**after, **before}
        if before.get(key, gone) != after.get(key, gone)
    ]


def _without(data: Any, keys: Sequence[str], prefix: str = "") -> Any:
    """Nested plain data without `keys`; a list's items have the list's key."""
    if isinstance(data, list):
        return [_without(item, keys, prefix) for item in data]
    if not isinstance(data, Mapping):
        return data
    return {name: _without(value, keys, f"{prefix}{name}.") for name, value in data.items() if prefix + name not in keys}


def _sha256(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- the reference


def reference() -> str:
    """`docs/config.md`: every setting with its default, what it may be and its docstring; every option that ships."""
    tree = ast.parse(Path(__file__).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    options = find_options([CONF])
    sides = {group: side for side, groups in zip(("what", "where", "how", "watched"), (WHAT, WHERE, HOW, WATCHED)) for group in groups}
    lines = [
        "# Every setting",
        "",
        "Made from `train/config.py` by `python -m train.config > docs/config.md`. A setting is given as `key=value`, an option",
        "of a group as `group=option`. *What* is learned may change the loss curve and is in the math hash; *where* it runs",
        "and *how* it is laid out never may; what is *watched* is in no hash.",
        "",
        "## What a run is",
        "",
        f"`experiment={options and ' | '.join(options['experiment'])}`",
    ]
    top = [(name, leaf) for name, leaf in leaves(Config).items() if "." not in name]
    lines += _table(classes["Config"], top)
    for group in to_dict(Config()):
        if group not in sides or group in dict(top):
            continue
        cls = type(getattr(Config(), group)).__name__
        lines += ["", f"## {group}", "", f"*{sides[group]}*. {ast.get_docstring(classes[cls])}"]
        if group in options:
            lines += ["", f"`{group}={' | '.join(options[group])}`"]
        lines += _table(classes[cls], [(k, leaf) for k, leaf in leaves(Config).items() if k.startswith(group + ".")])
    return "\n".join(lines) + "\n"


def _table(cls: ast.ClassDef, settings: Sequence[tuple[str, Any]]) -> list[str]:
    """Rows of a Markdown table; a field's docstring is the text right under it."""
    texts = {
        above.target.id: below.value.value
        for above, below in zip(cls.body, cls.body[1:])
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
    rows = ["", "| setting | default | may be | meaning |", "|---|---|---|---|"]
    for key, leaf in settings:
        cells = (f"`{key}`", f"`{shown(leaf.default)}`", words(leaf.hint), str(texts[key.split(".")[-1]]))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    print(reference(), end="")
