"""`config.json` of a Hugging Face folder to `Model` and back, for Qwen3 and Llama.

What a config may switch on and our decoder does not have is refused by name. This file reads no
weights; it hands `Model`s to `models/hf.py` and `programs/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tw_jax import strict_json
from tw_jax.models.rope import Llama3Rope, Rope, YarnRope
from tw_jax.models.transformer import Dtype, Model

_FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    return read_json(Path(folder) / "config.json")


def read_model(folder: str | Path) -> Model:
    """The sizes that a folder's `config.json` says, in float32.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: a field is missing or of another type, or names another architecture or a feature
        that ours does not have; the sentence names it.
    """
    fields, file = read_config(folder), Path(folder) / "config.json"
    family = fields.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"{file}: model_type is {family!r}: want {' or '.join(_FAMILIES)} (Qwen3 dense; Llama "
            "2, 3.x, SmolLM2). Other architectures are not implemented."
        )
    _refuse_features(file, fields)
    heads, width = (
        _number(file, fields, "num_attention_heads"),
        _number(file, fields, "hidden_size"),
    )
    head = fields.get("head_dim") or (128 if family == "qwen3" else width // heads)
    kv_heads = fields.get("num_key_value_heads") or heads
    return Model(
        vocab_size=_number(file, fields, "vocab_size"),
        num_layers=_number(file, fields, "num_hidden_layers"),
        width=width,
        mlp_width=_number(file, fields, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=head,
        qk_norm=family == "qwen3",
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        rope=_read_rope(file, fields),
        norm_epsilon=float(fields.get("rms_norm_eps", 1e-6)),
    )


def _number(file: Path, fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{file}: {name} is {value!r}: want a whole number.")
    return value


def _refuse_features(file: Path, fields: Mapping[str, Any]) -> None:
    """What a config may switch on and our decoder does not have."""
    plain: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "pretraining_tp": (1, None),
        "partial_rotary_factor": (1, 1.0, None),
    }
    for name, allowed in plain.items():
        if fields.get(name) not in allowed:
            raise ValueError(
                f"{file}: {name} is {fields[name]!r}: want {allowed[0]!r}, for our decoder has "
                "nothing else. Give a checkpoint without it."
            )


def _read_rope(file: Path, fields: Mapping[str, Any]) -> Rope | Llama3Rope | YarnRope:
    # transformers 5 writes rope_parameters, 4 wrote rope_theta beside rope_scaling.
    given = {
        "rope_theta": fields.get("rope_theta", 10_000.0),
        **(fields.get("rope_scaling") or {}),
        **(fields.get("rope_parameters") or {}),
    }
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given["rope_theta"])
    original = given.get("original_max_position_embeddings")
    try:
        if kind == "default":
            return Rope(theta=theta)
        if kind == "llama3":
            return Llama3Rope(
                theta=theta,
                factor=float(given["factor"]),
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
                original_tokens=original or _number(file, fields, "max_position_embeddings"),
            )
        if kind == "yarn" and given.get("truncate", True) and not given.get("mscale"):
            factor = given.get("attention_factor")
            return YarnRope(
                theta=theta,
                factor=float(given["factor"]),
                original_tokens=original or _number(file, fields, "max_position_embeddings"),
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                attention_factor=None if factor is None else float(factor),
            )
    except KeyError as error:
        raise ValueError(
            f"{file}: a {kind} rope has no {error}; want it in rope_scaling."
        ) from None
    raise ValueError(
        f"{file}: the rope is {given}: want rope_type default, llama3 or yarn (truncated, without "
        "mscale). Other scalings are not implemented."
    )


def config_fields(model: Model, *, dtype: Dtype, base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json`, as transformers 4 and 5 and the engines read them.

    Args:
      model: sizes; `qk_norm` says Qwen3, none says Llama.
      dtype: of the tensors.
      base: fields to keep beneath the model's own.
    """
    family = family_of(model)
    kept = {k: v for k, v in base.items() if k not in ("rope_parameters", "dtype")}
    return {
        "max_position_embeddings": 32_768,
        **kept,
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope.theta,
        "rope_scaling": _rope_scaling(model.rope),
        "torch_dtype": dtype,
    }


def family_of(model: Model) -> str:
    """The `model_type` with this model's parts: Qwen3 norms queries and keys, Llama none."""
    return "qwen3" if model.qk_norm else "llama"


def _rope_scaling(rope: Rope | Llama3Rope | YarnRope) -> dict[str, Any] | None:
    match rope:
        case Llama3Rope():
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_tokens,
            }
        case YarnRope():
            fields = {
                "rope_type": "yarn",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_tokens,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
            }
            if rope.attention_factor is not None:
                fields["attention_factor"] = rope.attention_factor
            return fields
        case _:
            return None


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not JSON, or no object; or see `strict_json`.
    """
    try:
        found = strict_json.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: not there. Give a folder as the Hub has it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}). Copy or download it again.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}; want a JSON object.")
    return found
