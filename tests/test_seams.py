"""Names of other libraries that they do not promise to keep: each that `train/` and `launch/` touch is asserted here.

After an upgrade this file says which seam has moved, and which of our files to mend, before a run finds out. That the
seams still *mean* the same is shown by the tests that train through them (`test_strategy.py`, `test_checkpoint.py`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "train").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])


def source(module: str, name: str | None = None) -> str:
    """Source of a module, or of a class in it: for attributes that only an instance has."""
    found = importlib.import_module(module)
    return inspect.getsource(getattr(found, name) if name else found)


def has(module: str, path: str) -> bool:
    """Whether `module` has the dotted name `path`."""
    found = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def sets(module: str, name: str, attribute: str) -> bool:
    """Whether class `name` sets `self.attribute`."""
    return f"self.{attribute} = " in source(module, name)


ZERO12 = "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"
ENGINE = "deepspeed.runtime.engine", "DeepSpeedEngine"
PARTITION = "deepspeed.runtime.zero.partition_parameters"

PRIVATE: dict[str, Callable[[], bool]] = {
    # torch
    "_parameters": lambda: has("torch.nn", "Module.register_parameter") and "_parameters" in vars(_module()),
    "_buffers": lambda: "_buffers" in vars(_module()),
    "_non_persistent_buffers_set": lambda: "_non_persistent_buffers_set" in vars(_module()),
    "_modules": lambda: "_modules" in vars(_module()),
    "_ConvNd": lambda: has("torch.nn.modules.conv", "_ConvNd"),
    "_foreach_norm": lambda: has("torch", "_foreach_norm"),
    "_foreach_mul_": lambda: has("torch", "_foreach_mul_"),
    "_foreach_add_": lambda: has("torch", "_foreach_add_"),
    "_foreach_lerp_": lambda: has("torch", "_foreach_lerp_"),
    "_is_avx512_bf16_supported": lambda: has("torch.cpu", "_is_avx512_bf16_supported"),
    "_is_amx_tile_supported": lambda: has("torch.cpu", "_is_amx_tile_supported"),
    "_BatchNorm": lambda: has("torch.nn.modules.batchnorm", "_BatchNorm"),
    "_schema": lambda: has("torch", "ops.aten.mm.default._schema"),
    "_subclasses": lambda: has("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "_python_dispatch": lambda: has("torch.utils._python_dispatch", "TorchDispatchMode"),
    "_pytree": lambda: has("torch.utils._pytree", "tree_map"),
    "_utils": lambda: has("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset"),
    "_get_fsdp_state": lambda: has("torch.distributed.fsdp", "FSDPModule._get_fsdp_state"),
    "_fsdp_param_group": lambda: has("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._fsdp_param_group"),
    # DeepSpeed
    "_hp_mapping": lambda: "lp_param._hp_mapping = " in source("deepspeed.utils.mixed_precision_linkage"),
    "_hp_optimizer_states_linked": lambda: sets(*ZERO12, "_hp_optimizer_states_linked"),
    "_lazy_init_hp_params_optimizer_state": lambda: has(ZERO12[0], f"{ZERO12[1]}._lazy_init_hp_params_optimizer_state"),
    "_unflatten_partitioned_parameters": lambda: has(ZERO3[0], f"{ZERO3[1]}._unflatten_partitioned_parameters"),
    "_convert_to_zero_parameters": lambda: has(PARTITION, "Init._convert_to_zero_parameters"),
    # transformers
    "_keys_to_ignore_on_load_unexpected": lambda: has(
        "transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected"
    ),
    "_is_stateful": lambda: has("transformers", "MambaForCausalLM._is_stateful"),
    "_model_mapping": lambda: has("transformers", "AutoModelForImageClassification._model_mapping"),
    "_attn_implementation": lambda: has("transformers", "PreTrainedConfig._attn_implementation"),
    # Hydra
    "_internal": lambda: has("hydra._internal.core_plugins.basic_sweeper", "BasicSweeper"),
    "_target_": lambda: "_target_" in source("hydra.types"),
    # the standard library
    "_exit": lambda: has("os", "_exit"),
    "_current_frames": lambda: has("sys", "_current_frames"),
}
"""Private name -> whether the library still has it."""

UNDOCUMENTED: dict[str, Callable[[], bool]] = {
    # train/strategy/zero.py
    "zero.single_partition_of_fp32_groups": lambda: sets(*ZERO12, "single_partition_of_fp32_groups"),
    "zero.update_lp_params": lambda: has(ZERO12[0], f"{ZERO12[1]}.update_lp_params"),
    "zero.overflow": lambda: sets(*ZERO12, "overflow") and "self.overflow" in source(*ZERO3),
    "zero.optimizer": lambda: sets(*ZERO12, "optimizer") and sets(*ZERO3, "optimizer"),
    "zero.fp32_partitioned_groups_flat": lambda: "self.fp32_partitioned_groups_flat" in source(*ZERO3),
    "zero.fp16_partitioned_groups_flat": lambda: "self.fp16_partitioned_groups_flat" in source(*ZERO3),
    "zero.persistent_parameters": lambda: "self.persistent_parameters" in source(*ZERO3),
    "zero.communication_data_type": lambda: (
        sets(*ZERO12, "communication_data_type") and sets(*ZERO3, "communication_data_type")
    ),
    "zero.gradient_accumulation_dtype": lambda: (
        sets(*ZERO12, "gradient_accumulation_dtype") and sets(*ZERO3, "gradient_accumulation_dtype")
    ),
    "zero.grad_acc_dtype": lambda: sets("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", "grad_acc_dtype"),
    "fragment.lp_fragment_address": lambda: "lp_fragment_address" in source("deepspeed.utils.tensor_fragment"),
    "fragment.get_hp_fragment": lambda: has("deepspeed.utils.tensor_fragment", "tensor_fragment.get_hp_fragment"),
    "fragment.get_optim_state_fragment": lambda: has(
        "deepspeed.utils.tensor_fragment", "tensor_fragment.get_optim_state_fragment"
    ),
    "parameter.ds_numel": lambda: "param.ds_numel = " in source(PARTITION),
    "parameter.ds_shape": lambda: "param.ds_shape = " in source(PARTITION),
    "parameter.ds_tensor": lambda: "param.ds_tensor = " in source(PARTITION),
    "parameter.partition_numel": lambda: "param.partition_numel = " in source(PARTITION),
    "parameter.all_gather": lambda: "param.all_gather = " in source(PARTITION),
    "parameter.partition": lambda: "param.partition = " in source(PARTITION),
    "safe_get_local_fp32_param": lambda: has("deepspeed.utils", "safe_get_local_fp32_param"),
    "safe_get_local_optimizer_state": lambda: has("deepspeed.utils", "safe_get_local_optimizer_state"),
    "safe_set_local_fp32_param": lambda: has("deepspeed.utils", "safe_set_local_fp32_param"),
    "safe_set_local_optimizer_state": lambda: has("deepspeed.utils", "safe_set_local_optimizer_state"),
    "engine.backward(scale_wrt_gas=)": lambda: "scale_wrt_gas" in source(*ENGINE),
    "engine.dp_world_size": lambda: sets(*ENGINE, "dp_world_size"),
    **{
        f"engine.{name}": lambda name=name: has(ENGINE[0], f"{ENGINE[1]}.{name}")
        for name in (
            *("set_gradient_accumulation_boundary", "get_global_grad_norm", "zero_optimization_stage"),
            *("zero_offload_optimizer", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"),
            *("gradient_clipping", "communication_data_type"),
        )
    },
    # train/strategy: a missing clip means 1.0 there, so ours is always written
    "clipping defaults to something": lambda: has("deepspeed.runtime.constants", "GRADIENT_CLIPPING_DEFAULT"),
    # train/models/pretrained.py: evaluation on a CPU with AVX512-BF16 repacks 4-bit weights unless this is False
    "Linear4bit.support_avx512bf16_for_cpu": lambda: (
        "support_avx512bf16_for_cpu" in source("bitsandbytes.nn", "Linear4bit")
    ),
    # train/strategy/eight_bit.py
    **{
        f"AdamW8bit state[{key}]": lambda key=key: f'state["{key}"] = ' in source("bitsandbytes.optim.optimizer")
        for key in ("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    },
    "Params4bit.quant_state": lambda: "quant_state" in source("bitsandbytes.nn", "Params4bit"),
    # train/plan/trace.py
    "saved_tensors_hooks": lambda: has("torch.autograd.graph", "saved_tensors_hooks"),
    # train/compose.py
    "OverridesParser": lambda: has("hydra.core.override_parser.overrides_parser", "OverridesParser.create"),
    "hydra.runtime.choices": lambda: "choices" in source("hydra.conf", "RuntimeConf"),
    # launch/local.py
    "accelerate.commands.launch": lambda: has("accelerate.commands.launch", "launch_command_parser"),
    "PET_SIGNALS_TO_HANDLE": lambda: "signals-to-handle" in source("torch.distributed.run"),
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": lambda: "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in source("torch.distributed.run"),
    "TORCHELASTIC_USE_AGENT_STORE": lambda: "TORCHELASTIC_USE_AGENT_STORE" in _elastic(),
    "TORCHELASTIC_RESTART_COUNT": lambda: "TORCHELASTIC_RESTART_COUNT" in _elastic(),
}
"""Names without an underscore that no reference of their library lists."""


def _module() -> object:
    from torch import nn

    return nn.Module()


def _elastic() -> str:
    return source("torch.distributed.elastic.agent.server.local_elastic_agent")


def private_names() -> Iterator[tuple[str, str]]:
    """(name, file) of every private name of something that is not ours."""
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    ours = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                ours.add(node.attr)
    for file, tree in trees.items():
        words: list[str] = []
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(attr=name):
                    words.append(name)
                case ast.ImportFrom(module=str(module), names=aliases):
                    words += [*module.split("."), *(alias.name for alias in aliases)]
                case ast.Import(names=aliases):
                    words += [word for alias in aliases for word in alias.name.split(".")]
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
                ):
                    words.append(name)
        for word in words:
            if word.startswith("_") and not word.startswith("__") and word not in ours:
                yield word, str(file.relative_to(ROOT))


def test_every_private_name_that_we_touch_is_in_the_table() -> None:
    unknown = {name: file for name, file in private_names() if name not in PRIVATE}
    assert not unknown, "add a check to PRIVATE, or do without the name"
    assert not set(PRIVATE) - {name for name, _ in private_names()}, "nothing touches these any more"


@pytest.mark.parametrize("name", [*PRIVATE, *UNDOCUMENTED])
def test_the_library_still_has(name: str) -> None:
    assert {**PRIVATE, **UNDOCUMENTED}[name]()


def test_a_seam_that_moved_is_seen() -> None:
    assert not has("torch", "_foreach_norm_of_tomorrow")
    assert not has("torch.nn", "Module.named_parameters.inside")
    assert not sets(*ZERO12, "single_partition_of_fp64_groups")
