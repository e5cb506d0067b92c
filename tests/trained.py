"""Small runs of every kind, for the tests of what is done with a trained model; made by the script, in one launch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests import ranks

COMMON = [
    *("hardware=cpu", "train.precision=fp32", "tracker=none", "log.every=1", "eval.every=2", "eval.samples=0"),
    *("train.global_batch_size=4", "train.max_steps=4", "optim.warmup_steps=0", "optim.lr=3e-3", "checkpoint.every=2"),
    *("data.workers=1", "checkpoint.keep=9", "strategy.micro_batch_size=3"),
]
LANGUAGE = ["data.seq_len=48", "eval.sample_tokens=8", "eval.max_samples=10"]
NETWORK = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2", "model.num_heads=2"]


def make(root: Path) -> Path:
    """Run directories in `root`: lm, gpt2 (text); lora, qlora, alone (chats; over lm, lm and the directory `root/base`);
    classes, backbone (over the directory `root/resnet`), masks (pictures). What they learn from lies in `root/data`."""
    data = root / "data"
    for folder in ("text", "train/images", "train/masks", "held/images", "held/masks"):
        (data / folder).mkdir(parents=True)
    for number in range(12):
        lines = (f"def f_{number}_{line}(x):\n    return x + {line * number}\n" for line in range(20))
        (data / "text" / f"{number}.py").write_text("\n".join(lines))
    chats = (
        {
            "messages": [
                {"role": "user", "content": f"{n} + 1?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(60)
    )
    (data / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    _pictures(data)
    _base(root / "base")
    _resnet(root / "resnet")

    def job(name: str, experiment: str, *overrides: str) -> list[str]:
        return [f"experiment={experiment}", *COMMON, f"run.root={root}", f"run.name={name}", *overrides]

    text = [*LANGUAGE, *NETWORK, f"data.path={data}/text", "data.tokenizer=bytes"]
    chat = [*LANGUAGE, f"data.path={data}/chats.jsonl", "peft.r=4", "eval.prompt=3 + 1?", "optim.lr=1e-2"]
    ranks.run_jobs(
        1,
        [
            job("lm", "lm_stdlib", *text, "model.tie_embeddings=true"),
            job("gpt2", "lm_stdlib", *text, "model=gpt2", "model.dropout=0.1", "optim.ema=0.5"),
            job("lora", "finetune_lora", *chat, f"model.path={root}/lm"),
            job("qlora", "finetune_qlora", *chat, f"model.path={root}/lm"),
            job("alone", "finetune_lora", *chat, f"model.path={root}/base"),
            job("classes", "classify", f"data.path={data}/classes", "data.image_size=16", "data.resize=true",
                "data.val_fraction=0.3", "model.channels=8", "model.num_layers=2", "optim.ema=0.5"),
            job("backbone", "classify", f"data.path={data}/classes", "data.image_size=32", "data.val_fraction=0.3",
                "model=pretrained", f"model.path={root}/resnet"),
            job("masks", "segment", f"data.path={data}/train", f"data.val_path={data}/held", "data.image_size=32",
                "model.channels=8", "model.num_layers=2"),
        ],
    )  # fmt: skip
    return root


def _pictures(data: Path) -> None:
    """Bright squares on noise: their masks, and as classes whether they lie left or right."""
    draw = np.random.default_rng(0)
    for number in range(16):
        height, width = 33 + 5 * (number % 3), 47 + number
        pixels = draw.integers(0, 120, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        left = number % 2 == 0
        mask[8:24, 4:20] = left
        mask[8:24, width - 20 : width - 4] = not left
        pixels[mask > 0] += 120
        part = data / ("held" if number % 4 == 0 else "train")
        Image.fromarray(pixels).save(part / "images" / f"{number}.png")
        Image.fromarray(mask).save(part / "masks" / f"{number}.png")
        folder = data / "classes" / ("left" if left else "right")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def _base(directory: Path) -> None:
    """A random Llama with a tokenizer, as it would come from the hub."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.config import Config
    from train.data import tokenizer

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(directory)
    tokenizer.make(tokenizer.Origin("", "bytes"), directory, lambda: iter(()), 0, Config())


def _resnet(directory: Path) -> None:
    """A random ResNet with BatchNorm statistics, as it would come from the hub."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(shape)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.01, 0.1)
    model.save_pretrained(directory)
    settings = {"image_processor_type": "ConvNextImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
