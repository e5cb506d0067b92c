"""`train/export.py`: each form as its users' libraries load it, compared here once more, and a wrong one refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import ranks
from train import export as exporting
from train.export import ExportError, export
from train.predict import open_trained, predict

IDS = torch.arange(80).view(2, 40) * 3 % 250


def quiet(*_: Any) -> None:
    pass


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device), use_cache=False).logits.float()


def of_the_run(run: Path, step: str = "best", **kwargs: Any) -> Tensor:
    return logits(open_trained(run, step, **kwargs).model)


def plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("name", ["lm", "gpt2"])
def test_a_language_model_in_plain_transformers(trained: Path, tmp_path: Path, name: str) -> None:
    receipt = export(trained / name, tmp_path / "out", say=quiet)
    model = plain(tmp_path / "out")
    assert (logits(model) - of_the_run(trained / name)).abs().max() < 1e-4
    assert receipt["max_difference"] < 1e-4
    assert receipt["tied_embeddings"] is (model.lm_head.weight is model.get_input_embeddings().weight) is True
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == [256, 259]
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == receipt
    text = "".join(file.read_text() for suffix in ("json", "md") for file in (tmp_path / "out").glob(f"*.{suffix}"))
    assert str(trained) not in text  # nothing of this machine travels
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_shards_of_a_size_in_half_precision(trained: Path, tmp_path: Path) -> None:
    receipt = export(trained / "lm", tmp_path / "out", dtype="bf16", shard_size="20KB", say=quiet)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert [file.name for file in files] == list(receipt["files"])
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    away = (logits(plain(tmp_path / "out")) - of_the_run(trained / "lm")).abs().max()
    assert 1e-4 < away < 0.05  # rounding, and no more than that
    assert receipt["max_difference_loaded"] < 1e-4 < receipt["max_difference"]


def test_a_step_is_the_step_that_was_asked_for(trained: Path, tmp_path: Path) -> None:
    receipt = export(trained / "lora", tmp_path / "two", step="2", merge=True, say=quiet)
    assert (receipt["step"], receipt["state_hash"]) == (2, None)
    two = logits(plain(tmp_path / "two"))
    assert (two - of_the_run(trained / "lora", "2")).abs().max() < 1e-4
    assert (two - of_the_run(trained / "lora", "4")).abs().max() > 1e-3
    card = (tmp_path / "two" / "README.md").read_text()
    row = next(row for row in ranks.metrics(trained / "lora") if row["step"] == 2)
    assert f"| eval_loss | {row['eval_loss']:.5g} |" in card
    assert "| samples | 8 |" in card


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_adapters_are_merged_into_the_base_in_full_precision(trained: Path, tmp_path: Path, name: str) -> None:
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    receipt = export(trained / name, tmp_path / "out", merge=True, say=quiet)
    merged = plain(tmp_path / "out")
    whole = open_trained(trained / name, full_precision=True).model
    assert (logits(merged) - logits(whole)).abs().max() < 1e-4
    assert not any("lora" in key for key in merged.state_dict())
    assert (logits(merged) - logits(plain_base(trained))).abs().max() > 1e-3  # the adapters are in it
    if name == "qlora":
        quantised = of_the_run(trained / name)
        assert (logits(merged) - quantised).abs().max() > 1e-3
        assert receipt["max_difference_to_4_bits"] > 1e-3 > receipt["max_difference"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 1?"}], add_generation_prompt=True, tokenize=False
    )
    assert said == "<|im_start|>user\n3 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert receipt["answer"]["prompt"] == "3 + 1?"


def plain_base(trained: Path) -> Any:
    return open_trained(trained / "lm").model


def test_adapters_alone_as_peft_loads_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft

    export(trained / "alone", tmp_path / "out")
    served = f"vllm serve {trained}/base --enable-lora --max-lora-rank 8 --lora-modules alone={tmp_path}/out"
    assert served in capsys.readouterr().out
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(model) - of_the_run(trained / "alone")).abs().max() < 1e-4
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapters = {n: p for n, p in open_trained(trained / "alone").model.named_parameters() if p.requires_grad}
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in adapters.values())
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_backbone_of_transformers_goes_back_to_it(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    export(trained / "backbone", tmp_path / "out", say=quiet)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "left", 1: "right"}
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        away = (model(image).logits - open_trained(trained / "backbone").model(image).logits).abs().max()
    assert away < 1e-4


@pytest.mark.parametrize(("name", "dtype"), [("classes", "fp32"), ("masks", "fp16")])
def test_networks_of_ours_with_a_loader(trained: Path, tmp_path: Path, name: str, dtype: str) -> None:
    export(trained / name, tmp_path / "out", dtype=dtype, say=quiet)
    model, theirs = exporting.load(tmp_path / "out"), open_trained(trained / name).model
    image = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        assert (model(image) - theirs(image)).abs().max() < (1e-4 if dtype == "fp32" else 2e-2)


def card(directory: Path, picture: Path, answers: Path) -> str:
    """What the lines of the card print, as they stand but for the places."""
    code = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("DIR", str(directory)).replace("picture.png", str(picture)).replace("answers", str(answers))
    done = subprocess.run([sys.executable, "-c", code], cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A picture of a size and a kind of its own: no square, with transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 47, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    return tmp_path / "odd.png"


def test_the_lines_of_a_card_say_what_predict_says(trained: Path, tmp_path: Path, odd: Path) -> None:
    export(trained / "classes", tmp_path / "out", say=quiet)
    card(tmp_path / "out", odd, tmp_path / "a")
    predict(trained / "classes", odd, tmp_path / "b", say=quiet)
    assert (tmp_path / "a" / "classes.csv").read_text() == (tmp_path / "b" / "classes.csv").read_text()


def test_the_lines_of_a_backbones_card_run_without_the_preprocessor_of_a_base(
    trained: Path, tmp_path: Path, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_base_directory", lambda trained: None)
    export(trained / "backbone", tmp_path / "out", say=quiet)
    info = json.loads((trained / "backbone" / "data.json").read_text())["info"]
    said = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (said["image_mean"], said["image_std"]) == (info["mean"], info["std"])
    assert card(tmp_path / "out", odd, tmp_path / "a") in ("['left']", "['right']")


# ---- Wrong ones ------------------------------------------------------------------------------------------------------


def spoil(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if "down_proj" in name)
    return tensors | {name: tensors[name] * 1.5}


def shortened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "1.mlp.down_proj" not in name}


@pytest.mark.parametrize(
    ("change", "said"), [(scaled, "makes another model"), (shortened, "does not find all it needs")]
)
def test_a_directory_that_is_another_model_is_not_left_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable, said: str
) -> None:
    """The negative control: the comparison sees one changed and one missing matrix."""
    honest = exporting._write

    def wrong(run: Any, target: Path, *rest: Any) -> Tensor:
        found = honest(run, target, *rest)
        spoil(target / "model.safetensors", change)
        return found

    monkeypatch.setattr(exporting, "_write", wrong)
    with pytest.raises(ExportError, match=said):
        export(trained / "lm", tmp_path / "out", say=quiet)
    assert not list(tmp_path.iterdir())


def test_a_merge_that_goes_wrong_is_seen(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, *_: self.unload())
    with pytest.raises(ExportError, match="The merged weights compute something else"):
        export(trained / "lora", tmp_path / "out", merge=True, say=quiet)


def test_refusals_say_what_to_type(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for run, kwargs, said in (
        ("lm", {"to": tmp_path / "full"}, "is not empty"),
        ("lm", {"dtype": "int8"}, "must be one of fp32, bf16, fp16"),
        ("lm", {"shard_size": "5 apples"}, "such as 500MB or 5GB"),
        ("lm", {"merge": True}, "has no adapters"),
        ("lora", {}, "Add --merge"),
    ):
        with pytest.raises(ExportError, match=said):
            export(trained / run, **{"to": tmp_path / "out", "say": quiet, **kwargs})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.pulse
def test_the_command(trained: Path, tmp_path: Path) -> None:
    words = ["export", trained / "qlora", "--to", tmp_path / "out", "--merge", "--step", "last", "--dtype", "bf16"]
    command = [sys.executable, "-m", "launch", *map(str, words)]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"serve it:  vllm serve {tmp_path}/out"
    again = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "is not empty" in again.stderr
