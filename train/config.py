"""Every setting of a run: the schema, its documentation, and the rules that join settings.

Owns: the dataclasses below (one per config group), the docstring under each field (from which `docs/config.md` is
made), the checks on values, the composition of `conf/` with overrides, and the two hashes. Torch-free, so that a config
error costs less than a second.

Does not own: what a setting does. No module reads the environment for a setting; they read `Config`.

The groups fall on three sides (`docs/DESIGN` calls them what, where, how). Only `WHAT` may change the loss curve, so only
`WHAT` enters the math hash:

    WHAT     task model data optim peft train seed          what is learned
    WHERE    hardware slurm                                  the machine
    HOW      strategy numerics                               the layout on it
    WATCHED  run log eval checkpoint tracker                 what is looked at, in no hash
"""

from __future__ import annotations

from dataclasses import dataclass, field

WHAT = ("task", "model", "data", "optim", "peft", "train", "seed")
WHERE = ("hardware", "slurm")
HOW = ("strategy", "numerics")
WATCHED = ("run", "log", "eval", "checkpoint", "tracker")


@dataclass
class TaskConfig:
    """What is predicted, and by which loss."""

    name: str = "causal_lm"
    """`causal_lm`, `classify`, `segment`, or a task that a plug-in adds."""
    class_weights: str | list[float] | None = None
    """Weights of the classes in the loss: `null`, `balanced`, or one number per class (classify, segment)."""
    dice_weight: float = 1.0
    """Weight of the per-sample Dice term beside cross-entropy (segment). 0 is off."""
    label_smoothing: float = 0.0
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
    vocab_size: int | None = None
    """Entries of the embedding. `null` takes the tokenizer's, rounded up to a multiple of 64."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width inside the MLP. `null` is 4 x `hidden_size` (GPT-2, ViT) or 8/3 x, rounded up to 64 (Llama)."""
    num_layers: int = 4
    """Transformer blocks, or stages of a convolutional net."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention, Llama). `null` is `num_heads`."""
    max_position_embeddings: int | None = None
    """Longest row the model can see. `null` is `data.seq_len`."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding (Llama)."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation layers."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    dropout: float = 0.0
    """Dropout of residual branches; a function of (seed, epoch, sample id, module, element). Attention dropout is refused."""
    patch_size: int = 4
    """Side of a patch in pixels (ViT)."""
    channels: int = 32
    """Channels of the first stage (U-Net, ConvNet)."""


@dataclass
class SourceConfig:
    """One of several weighted sources."""

    path: str = ""
    """File, directory, or hub id."""
    weight: float = 1.0
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
    val_fraction: float = 0.1
    """Share held out by a hash of each document's name, when there is neither `val_path` nor `fold`."""
    folds: int = 5
    """Number of folds that `fold` counts in."""
    fold: int | None = None
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
    tokenizer_vocab_size: int = 1024
    """Vocabulary of a trained `bpe`, special tokens included."""
    seq_len: int = 256
    """Tokens in a row; a row is one sample."""
    pack: bool = True
    """Pack several chats into a row (attention never crosses documents). Plain text is always packed."""
    chat_template: str | None = None
    """File with a Jinja chat template. `null` takes the tokenizer's, or the default one."""
    image_size: int = 64
    """Side in pixels of the square that training sees; evaluation sees whole images by tiles."""
    resize: bool = False
    """Resize images to `image_size` instead of cropping."""
    num_classes: int | None = None
    """Number of classes. `null` counts them in the data."""
    ignore_index: int = 255
    """Mask value that carries no loss."""
    augment: list[str] = field(default_factory=list)
    """Augmentations, each keyed by sample id: `flip`, `crop`, `scale`, `color`, `shift`."""
    max_bad_fraction: float = 0.01
    """Share of unreadable rows or files above which preparation stops. Each is quarantined with file, line and reason."""
    max_row_bytes: int = 8_000_000
    """A row (a line, a file's text) longer than this is bad."""
    cache_dir: str | None = None
    """Where prepared data lies; several users may share it. `null` is `$XDG_CACHE_HOME/gearshift` (or `~/.cache/gearshift`)."""
    workers: int = 2
    """Threads that read and augment samples ahead of the step, per rank."""


@dataclass
class OptimConfig:
    """The optimizer and the learning rate as a function of the step."""

    name: str = "adamw"
    """`adamw`, `sgd`, or `adamw_8bit` (single and ddp only)."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment (AdamW)."""
    eps: float = 1e-8
    """Added to the root of the second moment (AdamW)."""
    momentum: float = 0.9
    """Momentum (SGD)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (biases, norms) have none."""
    clip: float | None = 1.0
    """Largest gradient norm over all parameters; `null` is off."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `constant`, or `wsd` (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final_lr_fraction: float = 0.1
    """The schedule ends at this fraction of `lr`."""
    decay_fraction: float = 0.2
    """Last share of the run in which `wsd` decays."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, e.g. 0.999; evaluated and exported when set. `null` is off."""


@dataclass
class PeftConfig:
    """Which parameters are trained."""

    name: str = "none"
    """`none` (all), `lora`, or `qlora` (LoRA over a 4-bit base)."""
    r: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Scale of the adapters is `alpha / r`."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters, or `all-linear`."""
    quant_storage: str = "uint8"
    """Dtype in which 4-bit weights are stored: `uint8`, `bf16`, `fp32` (qlora; FSDP2 shards any of them)."""


@dataclass
class TrainConfig:
    """How long, on how much at once, in which precision. Exactly one duration is set."""

    global_batch_size: int = 16
    """Samples in a step over all ranks. The planner splits it; it never changes with the hardware."""
    max_steps: int | None = None
    """Duration in optimizer steps."""
    max_epochs: float | None = None
    """Duration in passes over the training data."""
    max_tokens: float | None = None
    """Duration in tokens (rows x `data.seq_len`)."""
    precision: str = "auto"
    """`auto` (bf16 where the device has it natively, else fp32; frozen at the first start), `fp32`, `bf16`, `fp16`."""
    nonfinite: str = "stop"
    """On a non-finite loss or gradient, agreed by all ranks before the update: `stop`, or `skip` the step."""
    nonfinite_cap: int = 10
    """With `skip`: stop after so many skipped steps in a row."""


@dataclass
class HardwareConfig:
    """The machine. Read by the planner and the launcher; `auto` fields are looked up on this machine."""

    name: str = "auto"
    """Name of the tier, for people."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`."""
    nodes: str = "1"
    """Number of nodes, or a range such as `2-8` (Slurm grants what it can)."""
    devices_per_node: int | None = None
    """Devices (or CPU processes) per node. `null` takes all GPUs, or one process on a CPU."""
    gpu: str | None = None
    """Name of the card, a key of the planner's table of peaks."""
    memory_gib: float | None = None
    """Memory of one device in GiB; on a bigger card the process is capped to it. `null` is the device's own."""
    intra_node_gb_s: float | None = None
    """Bandwidth between devices of a node, one direction, GB/s."""
    inter_node_gb_s: float | None = None
    """Bandwidth of a node to the others, one direction, GB/s."""
    host_ram_gib: float | None = None
    """Memory of the host in GiB, for offload."""
    nvme_gb_s: float | None = None
    """Bandwidth of local NVMe, GB/s, for offload."""
    nvme_path: str | None = None
    """Directory on local NVMe, for offload."""
    usd_per_device_h: float | None = None
    """Price of one device for one hour."""
    watts_per_device: float | None = None
    """Power of one device under load, its share of the host included."""


@dataclass
class SlurmConfig:
    """How a job is submitted. Names are sbatch's long options."""

    name: str = "none"
    """`none` starts here, `cluster` submits with sbatch, `devcluster` submits to the throwaway cluster of `slurm/devcluster`."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    constraint: str | None = None
    """sbatch --constraint."""
    time: str = "1-00:00:00"
    """sbatch --time: limit of one allocation; a run may take several."""
    cpus_per_task: int | None = None
    """sbatch --cpus-per-task. `null` leaves it to the cluster."""
    mem: str | None = None
    """sbatch --mem."""
    gpus_per_node: str | None = None
    """sbatch --gpus-per-node, e.g. `a100:4`. `null` asks for `hardware.devices_per_node` on CUDA tiers."""
    signal_s: int = 300
    """Seconds of notice before the limit, in which the run saves and leaves."""
    max_requeues: int = 100
    """Time-outs after which a run is not requeued any more; preemptions do not count."""
    array_cap: int | None = None
    """Array tasks of a sweep that run at once."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before the job: modules, conda, container."""
    extra: list[str] = field(default_factory=list)
    """More `#SBATCH` options, e.g. `--exclusive`."""


@dataclass
class StrategyConfig:
    """The layout on the machine. Nothing here may change the loss curve beyond rounding."""

    name: str = "auto"
    """`auto`, `single`, `ddp`, `fsdp2`, `zero1`, `zero2`, `zero3`."""
    micro_batch_size: int | None = None
    """Samples in one forward on one rank. `null` is planned; accumulation follows from it."""
    offload: str = "none"
    """`none`, `cpu` (zero2, zero3) or `nvme` (zero3): where the optimizer state lies."""
    offload_parameters: bool = False
    """Offload the parameters too (zero3)."""
    activation_checkpointing: int = 0
    """0 keeps all activations; n recomputes every n-th block in the backward pass (1 is every block)."""
    activation_offload: bool = False
    """Keep saved activations in host memory."""
    chunked_loss: bool | None = None
    """Compute the output layer and the cross-entropy in chunks, never holding all logits. `null` is planned (off until then)."""
    compile: bool = False
    """torch.compile. Worth it for long runs only."""
    fused_optimizer: bool | None = None
    """Fused AdamW. `null` is on where the device has it and numerics allow it."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket of DDP and ZeRO, in MB."""
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters with fewer elements whole on every rank."""


@dataclass
class RunConfig:
    """The run's name and limits. In no hash."""

    name: str | None = None
    """Name of the run directory. `null` is `<experiment>-<first 8 of the math hash>`."""
    root: str = "runs"
    """Where run directories lie."""
    stop_at: int | None = None
    """Stop and save after this step; holds for one command."""
    max_time: str | None = None
    """Stop and save after this time (`90`, `15m`, `1.5h`, `2d`, or `HH:MM:SS`); holds for one command."""
    fit: str = "error"
    """`error` refuses a plan that does not fit, `warn` starts all the same."""
    max_restarts: int = 0
    """Restarts inside a job after an unexplained death of a rank."""
    step_timeout_s: float = 1800.0
    """A step that takes longer is taken for hung: stacks go to the logs and the rank behind is named."""
    startup_timeout_s: float = 3600.0
    """The same for the time before the first step."""


@dataclass
class LogConfig:
    """How often values are fetched and written."""

    every: int = 10
    """Steps between fetches of the metrics from the device; every step gets its line all the same."""


@dataclass
class EvalConfig:
    """Evaluation on the validation data."""

    every: int | None = None
    """Steps between evaluations; the end of the run is always evaluated. `null` is only the end."""
    metric: str | None = None
    """Metric that is the objective, e.g. `eval_loss`. `null` is the task's; its direction is fixed by the task."""
    patience: int | None = None
    """Stop after so many evaluations without a better objective. `null` is off."""
    max_samples: int | None = None
    """Evaluate on the first so many validation samples. `null` is all."""
    samples: int = 1
    """Predictions written under `samples/` at each evaluation: continued texts, overlays."""
    sample_tokens: int = 160
    """Tokens of a continued text."""
    prompt: str = "def "
    """Beginning of a continued text."""


@dataclass
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: int | None = None
    """Steps between checkpoints; the end and every stop are always saved. `null` is only those."""
    keep: int = 2
    """How many of the newest are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best objective too."""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True
    """Write in the background; the loop waits only for the copy."""
    on_error: str = "continue"
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
    mode: str = "offline"
    """W&B mode: `offline` or `online`."""


@dataclass
class Config:
    """One run. `experiment` picks the what, `hardware` the where; the rest follows or is set by name."""

    experiment: str = "lm_stdlib"
    """The experiment's name; also the beginning of the run's default name."""
    seed: int = 0
    """Seed of initial weights, order, dropout and augmentation."""
    numerics: str = "fast"
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
