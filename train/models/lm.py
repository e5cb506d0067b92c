"""Language models from scratch: Llama and GPT-2 as transformers has them, weight for weight.

Owns: the way from `ModelConfig` to transformers' configs, and residual dropout for Llama, which has none of its own.

Does not own: starting values and dropout itself (`train/models/__init__.py`), the loss (`train/tasks/causal_lm.py`).

State dict names, shapes and mathematics are those of `LlamaForCausalLM` and `GPT2LMHeadModel`, so an export needs no
conversion. Attention is `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from train.models import KeyedDropout, ModelError

if TYPE_CHECKING:
    from train.config import Config


def llama(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    """`LlamaForCausalLM` of `cfg.model`. Raises ModelError for a vocabulary that is too small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m = cfg.model
    config = LlamaConfig(
        vocab_size=_vocab_size(cfg, info),
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size or _round_up(8 * m.hidden_size / 3),
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads or m.num_heads,
        max_position_embeddings=m.max_position_embeddings or cfg.data.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        rms_norm_eps=m.norm_eps,
        tie_word_embeddings=m.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if m.dropout > 0:
        for layer in model.model.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.dropout = KeyedDropout(m.dropout)
                branch.register_forward_hook(_drop)
    return model


def gpt2(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    """`GPT2LMHeadModel` of `cfg.model`. Raises ModelError for a vocabulary that is too small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    m = cfg.model
    config = GPT2Config(
        vocab_size=_vocab_size(cfg, info),
        n_embd=m.hidden_size,
        n_inner=m.intermediate_size,
        n_layer=m.num_layers,
        n_head=m.num_heads,
        n_positions=m.max_position_embeddings or cfg.data.seq_len,
        layer_norm_epsilon=m.norm_eps,
        resid_pdrop=m.dropout,
        embd_pdrop=m.dropout,
        attn_pdrop=0.0,
        tie_word_embeddings=m.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def _drop(branch: Any, inputs: Any, output: Tensor) -> Tensor:
    return branch.dropout(output)


def _vocab_size(cfg: Config, info: Mapping[str, Any]) -> int:
    """As set, or the tokenizer's rounded up: matrix products like multiples of 64."""
    tokens = int(info["vocab_size"])
    if cfg.model.vocab_size is None:
        return _round_up(tokens)
    if cfg.model.vocab_size < tokens:
        raise ModelError(
            f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {tokens} entries. "
            "Leave model.vocab_size null, or set at least that."
        )
    return cfg.model.vocab_size


def _round_up(value: float, multiple: int = 64) -> int:
    return math.ceil(value / multiple) * multiple
