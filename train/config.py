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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from train.compose import (
    PLUGINS,
    Asked,
    Count,
    Natural,
    NonNegative,
    OneLine,
    Positive,
    Rule,
    Share,
    ShareBelow1,
    assign,
    build,
    compose_files,
    find_options,
    items,
    leaves,
    matches,
    nearest,
    parses,
    read_overrides,
    read_yaml,
    resolve,
    shown,
    words,
)
from train.compose import (
    ConfigError as ConfigError,
)
from train.compose import (
    import_plugin as import_plugin,
)

CONF = Path(__file__).resolve().parent.parent / "conf"
"""The groups that ship."""
LOCAL = CONF / "local" / "default.yaml"
"""This machine's own settings, in no repository."""

WHAT = ("task", "model", "data", "optim", "peft", "train", "seed")
WHERE = ("hardware", "slurm")
HOW = ("strategy", "numerics")
WATCHED = ("run", "log", "eval", "checkpoint", "tracker")

UNHASHED = {
    "data.path", "data.sources.path", "data.val_path", "data.chat_template", "data.tokenizer", "data.cache_dir",
    "data.workers", "model.path", "model.revision", "model.gguf_file", "hardware.nvme_path",
}  # fmt: skip
"""Paths, and what only names content: the math hash has the fingerprints of the content instead."""
ADDED: dict[str, Any] = {"peft.quant_exclude": []}
"""Settings that came later, with the value that says what was true before: with it they are in no hash, so that runs that
were begun without them go on."""
ALTERNATIVES = (
    ("train.max_steps", "train.max_epochs", "train.max_tokens"),
    ("data.path", "data.sources"),
    ("data.val_path", "data.fold"),
)
"""Settings of which one holds: an override of one clears the others of its row."""


def node_range(nodes: str) -> tuple[int, int]:
    """`hardware.nodes` as (fewest, most). Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", nodes)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{nodes!r} is not a number of nodes: use 2, or 2-8")
    return int(match[1]), int(match[2] or match[1])


def check_step(word: str) -> None:
    """Raises ConfigError unless `word` can name a checkpoint on a command line."""
    if word not in ("best", "last") and not word.isdecimal():
        raise ConfigError([f"--step {word}: must be best, last or the number of a step."])


def seconds(text: str) -> float:
    """`90`, `15m`, `1.5h`, `2d` or `[D-]HH:MM:SS` in seconds. Raises ValueError."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{1,2}):(\d{1,2})", text):
        days, h, m, s = (int(x or 0) for x in match.groups())
        return days * 86400.0 + h * 3600 + m * 60 + s
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text):
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    raise ValueError(f"{text!r} is not a time: use 90, 15m, 1.5h, 2d or HH:MM:SS")


AtLeast2 = Annotated[int, Rule("2 or more", lambda v: v >= 2)]
VocabSize = Annotated[int, Rule("260 or more (256 bytes and the special tokens)", lambda v: v >= 260)]
Betas = Annotated[list[ShareBelow1], Rule("two of them", lambda v: len(v) == 2)]
Fraction = Annotated[float, Rule("above 0, at most 1", lambda v: 0 < v <= 1)]
Decay = Annotated[float, Rule("between 0 and 1", lambda v: 0 < v < 1)]
Seed = Annotated[int, Rule("0 to 2^63 - 1", lambda v: 0 <= v < 2**63)]
Augmentation = Literal["flip", "crop", "scale", "color", "shift"]
Metric = Annotated[str, matches("such as eval_loss", r"eval_\w+")]
FileName = Annotated[
    str,
    matches(
        "of letters, digits and . _ - that begins with a letter or digit, at most 96 long, without ..",
        r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
    ),
]
Nodes = Annotated[str, parses("such as 2 or 2-8", node_range)]
Duration = Annotated[str, parses("such as 90, 15m, 1.5h, 2d or HH:MM:SS", seconds)]
SlurmTime = Annotated[str, matches("such as 90 (minutes), 12:00:00 or 2-00:00:00", r"(\d+-)?\d+(:\d\d?){0,2}")]
SlurmSize = Annotated[str, matches("such as 64G", r"\d+[KMGT]?")]
SlurmOption = Annotated[str, matches("beginning with --, on one line", r"--[a-z][^\x00-\x1f\x7f]*")]
SignalS = Annotated[int, Rule("1 to 65535", lambda v: 1 <= v <= 65535)]


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
    """Dropout of residual branches, a function of (seed, epoch, sample id, module, element). Attention has none."""
    patch_size: Count = 4
    """Side of a patch in pixels: a token of ViT, the first stage of U-Net and ConvNet."""
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
    """File, directory, or hub id. `stdlib` is the source of this Python's standard library. Hashed by content."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources with weights, instead of `path`."""
    val_path: str | None = None
    """Validation data. `null` holds out `val_fraction` of the documents or images."""
    val_fraction: ShareBelow1 = 0.1
    """Share held out by a hash of each document's name, when there is neither `val_path` nor `fold`."""
    folds: AtLeast2 = 5
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
    """`bytes`, `bpe` (byte-level, trained on the training split), or a Hugging Face tokenizer (directory or hub id).
    With `model.path`, `bpe` means the model's."""
    tokenizer_vocab_size: VocabSize = 1024
    """Vocabulary of a trained `bpe`, special tokens included."""
    seq_len: AtLeast2 = 256
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
    augment: list[Augmentation] = field(default_factory=list)
    """Augmentations, each keyed by sample id: `flip`, `crop`, `scale`, `color`, `shift`."""
    max_bad_fraction: Share = 0.01
    """Share of unreadable rows or files above which preparation stops. Each is listed with file, line and reason."""
    max_row_bytes: Count = 8_000_000
    """A row (a line, a file's text) longer than this is bad."""
    cache_dir: str | None = None
    """Where prepared data lies, for one user or several. `null` is `gearshift` in `$XDG_CACHE_HOME` or `~/.cache`."""
    workers: Natural = 2
    """Threads that read and augment samples ahead of the step, per rank."""


@dataclass
class OptimConfig:
    """The optimizer and the learning rate as a function of the step."""

    name: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """`adamw`, `sgd`, or `adamw_8bit` (single and ddp only; saved as fp32, and going on rounds its moments again)."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.95])
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
    decay_fraction: Fraction = 0.2
    """Last share of the run in which `wsd` decays."""
    ema: Decay | None = None
    """Decay of a moving average of the weights, e.g. 0.999; evaluated and exported when set. `null` is off."""


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
    quant_exclude: list[str] = field(default_factory=list)
    """Layers that stay in the run's precision (qlora), by any part of their name: `[k_proj, v_proj]`, `[self_attn]`."""


@dataclass
class TrainConfig:
    """How long, on how much at once, in which precision. Exactly one duration is set."""

    global_batch_size: Count = 16
    """Samples in a step over all ranks. The planner splits it; it never changes with the hardware."""
    max_steps: Count | None = None
    """Duration in optimizer steps."""
    max_epochs: Positive | None = None
    """Duration in passes over the training data; with `data.sources`, over the first of them."""
    max_tokens: Positive | None = None
    """Duration in tokens (rows x `data.seq_len`)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` (bf16 where the device has it natively, else fp32; frozen at the first start), `fp32`, `bf16`, `fp16`."""
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
    """`none` starts here, `cluster` submits with sbatch, `devcluster` to the throwaway one of `slurm/devcluster`."""
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
    signal_s: SignalS = 300
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
    """Keep what blocks save for the backward pass in host memory meanwhile."""
    chunked_loss: bool | None = None
    """Output layer and cross-entropy in chunks, never holding all logits. `null` is planned."""
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
    preflight: bool | None = None
    """Before the first step, run one that changes nothing, so that running out of memory comes first. `null` is on CUDA,
    and under DDP on three ranks or more, which lays out its buckets then: a resume would do so later, and end in other bits."""
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
    metric: Metric | None = None
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

GOES_WITH = {
    "causal_lm": (("llama", "gpt2", "pretrained"), ("text", "chat")),
    "classify": (("vit", "convnet", "pretrained"), ("images", "digits")),
    "segment": (("unet", "pretrained"), ("images", "digit_scenes")),
}
"""Built-in task -> the built-in models and kinds of data that it works on."""
MODELS = ("llama", "gpt2", "vit", "convnet", "unet", "pretrained")
KINDS = ("text", "chat", "images", "digits", "digit_scenes")


def validate(cfg: Config) -> list[str]:
    """What is wrong between settings; each text says what was given, what is required, and what to type."""
    return [*_what_goes_together(cfg), *_model(cfg), *_data(cfg), *_duration(cfg), *_layout(cfg), *_ranks(cfg)]


def _what_goes_together(cfg: Config) -> Iterator[str]:
    task, model, kind = cfg.task.name, cfg.model.name, cfg.data.kind
    named = (("task.name", task, tuple(GOES_WITH)), ("model.name", model, MODELS), ("data.kind", kind, KINDS))
    ours = [name in known for _, name, known in named]
    for key, name, known in named if not PLUGINS else ():
        if name not in known:
            meant = f"Did you mean {key}={close}?" if (close := nearest(name, known)) else "--plugin adds others."
            yield f"{key}={shown(name)}: must be one of {', '.join(known)}. {meant}"
    if not all(ours):
        return
    models, kinds = GOES_WITH[task]
    if model not in models and cfg.model.path is None:
        yield f"model={model}: does not go with task={task}; set model={' or model='.join(models)}"
    if kind not in kinds:
        yield f"data={kind}: does not go with task={task}; set data={' or data='.join(kinds)}"


def _model(cfg: Config) -> Iterator[str]:
    m, d = cfg.model, cfg.data
    if m.path is None:
        if m.name == "pretrained":
            yield "model=pretrained: needs weights; set model.path to a Hugging Face directory, a hub id, or a run."
        if m.gguf_file is not None:
            yield f"model.gguf_file={m.gguf_file}: is a file in model.path, which is null; set model.path."
        if cfg.peft.name != "none":
            yield f"peft={cfg.peft.name}: adapts a pretrained model; set model.path, or peft=none for all from scratch."
    if m.path is not None or m.name not in ("llama", "gpt2", "vit"):
        return  # the shape comes from elsewhere
    if m.hidden_size % m.num_heads:
        yield f"model.hidden_size={m.hidden_size}: must be a multiple of model.num_heads={m.num_heads}; change either."
    elif m.name == "llama" and m.hidden_size // m.num_heads % 2:
        each = f"{m.hidden_size // m.num_heads} for each of model.num_heads={m.num_heads}"
        yield f"model.hidden_size={m.hidden_size}: rotary embeddings need an even number per head, and it is {each}."
    if m.num_kv_heads is not None and m.name != "llama":
        yield f"model.num_kv_heads={m.num_kv_heads}: only model=llama groups its heads; set model.num_kv_heads=null."
    elif m.num_kv_heads is not None and m.num_heads % m.num_kv_heads:
        yield f"model.num_kv_heads={m.num_kv_heads}: must divide model.num_heads={m.num_heads}; change either."
    if m.name == "vit":
        if d.image_size % m.patch_size:
            yield f"model.patch_size={m.patch_size}: must divide data.image_size={d.image_size}; change either."
        return
    if m.max_position_embeddings is not None and m.max_position_embeddings < d.seq_len:
        longest = f"model.max_position_embeddings={m.max_position_embeddings}"
        yield f"data.seq_len={d.seq_len}: must be at most {longest}; raise that, or set it to null."
    if m.vocab_size is not None and d.tokenizer == "bpe" and m.vocab_size < d.tokenizer_vocab_size:
        least = f"data.tokenizer_vocab_size={d.tokenizer_vocab_size}"
        yield f"model.vocab_size={m.vocab_size}: must be at least {least}, or null to follow it."


def _data(cfg: Config) -> Iterator[str]:
    d, weights = cfg.data, cfg.task.class_weights
    if d.path is not None and d.sources:
        yield f"data.path={d.path}: data.sources is set too, and one holds; set data.path=null or data.sources=[]."
    if d.fold is not None and d.fold >= d.folds:
        yield f"data.fold={d.fold}: must be below data.folds={d.folds}; folds count from 0."
    if d.fold is not None and d.val_path is not None:
        yield f"data.fold={d.fold}: data.val_path is set too, and one holds; set data.fold=null or data.val_path=null."
    if d.augment and d.kind in ("text", "chat"):
        yield f"data.augment={shown(d.augment)}: is for images, and data.kind is {d.kind}; set data.augment=[]."
    if weights is not None and cfg.task.name == "causal_lm":
        yield f"task.class_weights={shown(weights)}: tokens have no class weights; set task.class_weights=null."
    elif isinstance(weights, list) and d.num_classes not in (None, len(weights)):
        yield f"task.class_weights={shown(weights)}: must be one for each of data.num_classes={d.num_classes}."
    if cfg.eval.patience is not None and cfg.eval.every is None:
        yield f"eval.patience={cfg.eval.patience}: counts evaluations; set eval.every to a number of steps."


def _duration(cfg: Config) -> Iterator[str]:
    t = cfg.train
    durations = dict(zip(ALTERNATIVES[0], (t.max_steps, t.max_epochs, t.max_tokens)))
    given = " ".join(f"{key}={shown(value)}" for key, value in durations.items() if value is not None)
    if not given:
        yield f"train: has no duration; set one of {', '.join(durations)}, such as train.max_steps=1000"
    elif " " in given:
        yield f"{given}: exactly one of {', '.join(durations)} must be set; set the others to null."
    if t.max_tokens is not None and cfg.data.kind in ("images", "digits", "digit_scenes"):
        yield f"train.max_tokens={shown(t.max_tokens)}: images have no tokens; set train.max_epochs or train.max_steps."


def _layout(cfg: Config) -> Iterator[str]:
    s, name, precision = cfg.strategy, cfg.strategy.name, cfg.train.precision
    if cfg.numerics == "exact":
        exact = "numerics=exact: the same bits on any number of ranks"
        if name not in ("auto", "single", "ddp"):
            yield f"{exact} are to be had under single and ddp, not {name}; set strategy=ddp or numerics=fast."
        if precision == "fp16":
            yield f"{exact} need train.precision=fp32 or bf16, not fp16."
        if s.compile:
            yield f"{exact} need strategy.compile=false."
        if s.fused_optimizer:
            yield f"{exact} need strategy.fused_optimizer=null or false."
    if precision == "fp16" and cfg.hardware.device == "cpu":
        yield "train.precision=fp16: a CPU does not train in fp16; set train.precision=bf16 or fp32."
    elif precision == "fp16":
        yield "train.precision=fp16: needs a loss scale, which is not there yet; set train.precision=bf16 or fp32."
    if s.offload == "cpu" and name not in ("zero2", "zero3"):
        yield f"strategy.offload=cpu: needs strategy=zero2 or zero3, not {name}."
    if s.offload == "nvme" and name != "zero3":
        why = " (under zero1 and zero2, DeepSpeed offloads to the CPU instead and does not say so)"
        yield f"strategy.offload=nvme: needs strategy=zero3, not {name}{why if name.startswith('zero') else ''}."
    if s.offload == "nvme" and cfg.hardware.nvme_path is None:
        yield "strategy.offload=nvme: set hardware.nvme_path to a directory on a local NVMe disk."
    if s.offload != "none" and cfg.optim.name != "adamw":
        yield f"strategy.offload={s.offload}: the update runs on the CPU, which knows AdamW only; set optim=adamw."
    if s.activation_offload and s.compile:
        yield "strategy.activation_offload=true: what a compiled block saves cannot be moved; set strategy.compile=false."
    if s.offload_parameters and (name != "zero3" or s.offload == "none"):
        yield "strategy.offload_parameters=true: needs strategy=zero3 and strategy.offload=cpu or nvme."
    if cfg.optim.name == "adamw_8bit" and name not in ("auto", "single", "ddp"):
        yield f"optim=adamw_8bit: its blocks cannot follow the shards of {name}; set strategy=ddp, or optim=adamw."
    if cfg.peft.name == "qlora" and name not in ("auto", "single", "ddp", "fsdp2"):
        yield f"peft=qlora: 4-bit weights go with single, ddp and fsdp2, not {name}; set strategy=fsdp2 or peft=lora."
    if s.chunked_loss and cfg.task.name in ("classify", "segment"):
        yield f"strategy.chunked_loss=true: is for vocabularies, and task={cfg.task.name} has none; set it to null."


def _ranks(cfg: Config) -> Iterator[str]:
    size, micro, ranks = cfg.train.global_batch_size, cfg.strategy.micro_batch_size, most_ranks(cfg)
    if micro is not None and micro > size:
        yield f"strategy.micro_batch_size={micro}: must be at most train.global_batch_size={size}; lower it."
    if ranks is None or ranks == 1:
        return
    h = cfg.hardware
    there = f"{ranks} devices (hardware.nodes={h.nodes} x hardware.devices_per_node={h.devices_per_node})"
    if cfg.strategy.name == "single":
        one = "hardware.nodes=1 hardware.devices_per_node=1"
        yield f"strategy=single: runs on one device, and there are {there}; set strategy=ddp, or {one}"
    if h.device == "mps":
        yield f"hardware.device=mps: a Mac runs one process, and there are {there}."


def most_ranks(cfg: Config) -> int | None:
    """The most ranks that `hardware` can give, where it says so."""
    each = cfg.hardware.devices_per_node
    return None if each is None else each * node_range(cfg.hardware.nodes)[1]


def missing_inputs(cfg: Config) -> list[str]:
    """What a sound config still needs before it can run, as texts: a plan can do without data, training cannot."""
    if cfg.data.kind not in ("text", "chat", "images") or cfg.data.path is not None or cfg.data.sources:
        return []
    return [
        f"data.path=null: experiment={cfg.experiment} reads data of yours; set data.path=PATH, or data.sources=[...]"
    ]


# ---------------------------------------------------------------------------------------------- from text to a Config

SYNONYMS = {
    "learning_rate": "optim.lr", "optimizer": "optim", "max_grad_norm": "optim.clip", "scheduler": "optim.schedule",
    "batch_size": "train.global_batch_size (samples of a step over all ranks)", "mixed_precision": "train.precision",
    "per_device_train_batch_size": "strategy.micro_batch_size on one rank, train.global_batch_size over all",
    "gradient_accumulation_steps": "what follows from train.global_batch_size, strategy.micro_batch_size and the ranks",
    "gradient_checkpointing": "strategy.activation_checkpointing", "bf16": "train.precision=bf16",
    "dtype": "train.precision", "epochs": "train.max_epochs", "num_train_epochs": "train.max_epochs",
    "steps": "train.max_steps", "dataset": "data.path", "max_length": "data.seq_len", "block_size": "data.seq_len",
    "num_workers": "data.workers", "output_dir": "run.root and run.name", "gpus": "hardware.devices_per_node",
    "report_to": "tracker",
}  # fmt: skip
"""What settings are called elsewhere."""


def compose(overrides: Sequence[str], *, config_dir: str | None = None, plugin: str | None = None) -> Config:
    """`conf/` with the chosen options, then this machine's `conf/local`, then the overrides: one checked Config.

    config_dir: a directory of more groups and options, laid out as `conf/`. plugin: a module, for `import_plugin`.
    Raises ConfigError, which says everything that is wrong at once.
    """
    if plugin is not None:
        import_plugin(plugin)
    extra = None if config_dir is None else Path(config_dir).resolve()
    if extra is not None and not extra.is_dir():
        raise ConfigError([f"--config-dir {shown(config_dir)}: must be a directory of groups, laid out as conf/."])
    options = find_options(CONF, *([extra] if extra else []))
    asked = _asked(overrides, options)
    try:
        data, chosen = compose_files(CONF / "config.yaml", to_dict(Config()), asked.choices, extra)
    except ConfigError as error:
        raise ConfigError([*asked.problems, *error.problems]) from error
    data["experiment"] = chosen["experiment"]
    files = {group: options[group][name] for group, name in chosen.items() if name in options.get(group, {})}
    problems = [*asked.problems, *_overreach(files["experiment"], {*WHAT, *WATCHED} - {"run"}, "what is learned")]
    if LOCAL.exists():
        files["local"] = LOCAL
        problems += _overreach(LOCAL, {*WHERE, *HOW, *WATCHED, "data.cache_dir"}, "what this machine is")
    return _checked(data, asked.values, problems, list(files.values()))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """A frozen config (a run directory or its `config.yaml`) with overrides: settings, or options of where and how.

    The file need not be trusted: it is plain data, and nothing it names is run. Raises ConfigError, which says
    everything that is wrong at once.
    """
    path = Path(path)
    path = path / "config.yaml" if path.is_dir() else path
    data = read_yaml(path)
    asked = _asked(overrides, find_options(CONF))
    for group in [group for group in asked.choices if group not in (*WHERE, *HOW, *WATCHED)]:
        given = f"{group}={shown(asked.choices.pop(group))}"
        asked.problems.append(f"{given}: a run keeps the {group} it began with; set single settings, or begin another.")
    if asked.choices:
        composed, _ = compose_files(CONF / "config.yaml", to_dict(Config()), asked.choices)
        data |= {group: composed[group] for group in asked.choices}
    return _checked(data, asked.values, asked.problems, [path], references=asked.values)


def _asked(overrides: Sequence[str], options: dict[str, dict[str, Path]]) -> Asked:
    options.pop("local", None)  # of this machine; nobody chooses it
    return read_overrides(overrides, leaves(Config), options, several=["tracker"], synonyms=SYNONYMS)


def _overreach(path: Path, allowed: set[str], role: str) -> list[str]:
    """What a file sets or selects though another side owns it: an experiment a machine, a machine an experiment."""
    data = read_yaml(path)
    defaults = [str(key) for entry in data.pop("defaults", None) or [] if isinstance(entry, Mapping) for key in entry]
    selected = [key.partition("/")[2].partition("@")[0] for key in defaults if "/" in key]
    keys = [key for key, _ in items(data) if key and not {key, re.split(r"[.\[]", key)[0]} & allowed]
    keys += [group for group in selected if group not in allowed]
    return [f"{path}: sets {key}, and this file says {role}; set {key} elsewhere." for key in keys]


def _checked(
    data: dict[str, Any],
    values: Mapping[str, Any],
    problems: list[str],
    files: Sequence[Path],
    references: Iterable[str] | None = None,
) -> Config:
    """`data` with the overrides' `values`, as a Config; or a ConfigError with `problems` and all others.

    references: the settings that may hold a `${reference}`, all if None. files: where `data` came from.
    """
    for row in ALTERNATIVES:
        given = [key for key in row if values.get(key) not in (None, [])]
        for key in row if given else ():
            assign(data, key, leaves(Config)[key].default)
        if len(given) > 1:
            pairs = " ".join(f"{key}={shown(values[key])}" for key in given)
            problems.append(f"{pairs}: only one of {', '.join(row)} can hold; leave the others out.")
            values = {key: value for key, value in values.items() if key not in given[1:]}
    for key, value in values.items():
        assign(data, key, value)
    wrong = resolve(data, references)
    cfg, misfits = build(Config, data)
    for key, text in [*wrong, *misfits]:
        own = {key, key.partition(".")[2]}
        origin = next((file for file in files if own & {k for k, _ in items(read_yaml(file))}), None)
        problems.append(text if origin is None or key in values else f"{text} (in {origin})")
    problems += validate(cfg)
    if problems:
        raise ConfigError(problems)
    return cfg


# -------------------------------------------------------------------------------------- plain data, hashes, differences


def to_dict(cfg: Config) -> dict[str, Any]:
    return asdict(cfg)


def to_yaml(cfg: Config) -> str:
    """The whole config as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def math_dict(cfg: Config, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """All of *what*, with content in place of its names; equal exactly where the same is learned.

    fingerprints: sha256 of content, by name: `data`, with `model.path` also `model`, and whatever else `prepare` found.
    Raises ValueError when one of those two is missing.
    """
    for name, needed in (("data", True), ("model", cfg.model.path is not None)):
        if needed and not fingerprints.get(name):
            raise ValueError(f"the math hash needs the fingerprint {name!r}, which `prepare` makes")
    math = _hashed(cfg, WHAT)
    if cfg.data.tokenizer in ("bytes", "bpe"):
        math["data"]["tokenizer"] = cfg.data.tokenizer
    math["content"] = dict(fingerprints)
    if PLUGINS:
        math["plugins"] = sorted(PLUGINS.values())
    return math


def math_hash(cfg: Config, fingerprints: Mapping[str, str]) -> str:
    """sha256 of `math_dict`: moves with what is learned, and with nothing of where, how and paths."""
    return _sha256(math_dict(cfg, fingerprints))


def exec_hash(cfg: Config) -> str:
    """sha256 of where and how."""
    return _sha256(_hashed(cfg, (*WHERE, *HOW)))


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts, as `train.max_steps: 100 -> 200`."""
    before, after, absent = dict(items(old)), dict(items(new)), object()

    def told(value: Any) -> str:
        return "(absent)" if value is absent else shown(value)

    pairs = {key: (before.get(key, absent), after.get(key, absent)) for key in {**before, **after}}
    return [f"{key}: {told(was)} -> {told(now)}" for key, (was, now) in pairs.items() if was != now]


def _hashed(cfg: Config, groups: Sequence[str]) -> dict[str, Any]:
    def kept(data: Any, prefix: str) -> Any:
        if isinstance(data, list):
            return [kept(item, prefix) for item in data]
        if not isinstance(data, Mapping):
            return data
        return {
            name: kept(value, f"{prefix}{name}.")
            for name, value in data.items()
            if prefix + name not in UNHASHED and ADDED.get(prefix + name, ...) != value
        }

    return kept({group: value for group, value in to_dict(cfg).items() if group in groups}, "")


def _sha256(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- the reference


def reference() -> str:
    """`docs/config.md`: every setting with its default, what it may be and its docstring; every option that ships."""
    source = ast.parse(Path(__file__).read_text())
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    options = find_options(CONF)
    sides = {"what": WHAT, "where": WHERE, "how": HOW, "watched": WATCHED}
    page = [
        "# Every setting\n",
        "Made from `train/config.py` by `python -m train.config > docs/config.md`.\n",
        "A setting is given as `key=value`, an option of a group as `group=option`. *What* is learned may change the",
        "loss curve and makes the math hash; *where* it runs and *how* it is laid out never may, and make the exec",
        "hash; what is *watched* is in no hash.",
    ]
    for group in ("", *(name for name, value in to_dict(Config()).items() if isinstance(value, dict))):
        node = classes[type(getattr(Config(), group)).__name__ if group else "Config"]
        texts = {
            ast.unparse(above.target): " ".join(str(ast.literal_eval(below.value)).split())
            for above, below in zip(node.body, node.body[1:])
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr)
        }
        side = "".join(f"*{side}.* " for side, groups in sides.items() if group in groups)
        page += [f"\n## {group or 'the run as a whole'}\n", f"{side}{ast.get_docstring(node)}\n"]
        for name, file in options.get(group or "experiment", {}).items():
            comments = [line[2:] for line in file.read_text().splitlines() if re.match("# [^@]", line)]
            page.append(f"- `{group or 'experiment'}={name}`" + f": {' '.join(comments)}" * bool(comments))
        page += ["", "| setting | default | may be | meaning |", "|---|---|---|---|"]
        for key, leaf in leaves(Config).items():
            if key.rpartition(".")[0] == group:
                cells = f"`{key}`", f"`{shown(leaf.default)}`", words(leaf.hint), texts[key.rpartition(".")[2]]
                page.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
