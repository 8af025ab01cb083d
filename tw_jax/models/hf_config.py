"""Converts `config.json` of a Hugging Face folder to `Model` and back, for Qwen3 and Llama.

A config that enables a feature that our decoder does not have is refused, and the message names the
feature.
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
      FileNotFoundError: If there is none.
      ValueError: If it is not a JSON object.
    """
    return read_json(Path(folder) / "config.json")


def read_model(folder: str | Path) -> Model:
    """The model that a folder's `config.json` describes, with dtypes float32.

    Raises:
      FileNotFoundError: If there is no `config.json`.
      ValueError: If a field is missing or has another type, or if the config names another
        architecture or a feature that our decoder does not have. The message names the field.
    """
    # A field that is null has its default value.
    file = Path(folder) / "config.json"
    fields = _known(read_config(folder))
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(
            f"{file}: model_type is {family!r} and must be {' or '.join(_FAMILIES)} (Qwen3 dense; "
            "Llama 2, 3.x, SmolLM2). Other architectures are not implemented."
        )
    _refuse_features(file, fields)
    heads, width = (
        _number(file, fields, "num_attention_heads"),
        _number(file, fields, "hidden_size"),
    )
    head = 128 if family == "qwen3" else width // heads
    if "head_dim" in fields:
        head = _number(file, fields, "head_dim")
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{file}: tie_word_embeddings is {tied!r}, and must be true or false.")
    return Model(
        vocab_size=_number(file, fields, "vocab_size"),
        num_layers=_number(file, fields, "num_hidden_layers"),
        width=width,
        mlp_width=_number(file, fields, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=_number(file, {"num_key_value_heads": heads} | fields, "num_key_value_heads"),
        head_width=head,
        qk_norm=family == "qwen3",
        tie_embeddings=tied,
        rope=_read_rope(file, fields),
        norm_epsilon=_float(file, {"rms_norm_eps": 1e-6} | fields, "rms_norm_eps"),
    )


def _number(file: Path, fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {name} is {value!r}, and must be a whole number above 0.")
    return value


def _float(file: Path, fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise ValueError(f"{file}: {name} is {value!r}, and must be a number above 0.")
    return float(value)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_features(file: Path, fields: Mapping[str, Any]) -> None:
    """Raises ValueError if a config enables a feature that our decoder does not have."""
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
                f"{file}: {name} is {fields[name]!r} and must be {allowed[0]!r}, because our "
                "decoder supports nothing else. Give a checkpoint without it."
            )


def _read_rope(file: Path, fields: Mapping[str, Any]) -> Rope | Llama3Rope | YarnRope:
    # transformers 5 writes rope_parameters; version 4 wrote rope_theta and rope_scaling.
    given: dict[str, Any] = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.get(name, {})
        if not isinstance(part, dict):
            raise ValueError(f"{file}: {name} is {part!r}, and must be an object.")
        given |= _known(part)
    kind = given.get("rope_type", given.get("type", "default"))
    theta = _float(file, given, "rope_theta")
    longest = {"original_max_position_embeddings": fields.get("max_position_embeddings")} | given
    try:
        if kind == "default":
            return Rope(theta=theta)
        if kind == "llama3":
            return Llama3Rope(
                theta=theta,
                factor=_float(file, given, "factor"),
                low_freq_factor=_float(file, given, "low_freq_factor"),
                high_freq_factor=_float(file, given, "high_freq_factor"),
                original_tokens=_number(file, longest, "original_max_position_embeddings"),
            )
        if kind == "yarn" and given.get("truncate", True) and not given.get("mscale"):
            given = {"beta_fast": 32, "beta_slow": 1} | given
            is_given = "attention_factor" in given
            return YarnRope(
                theta=theta,
                factor=_float(file, given, "factor"),
                original_tokens=_number(file, longest, "original_max_position_embeddings"),
                beta_fast=_float(file, given, "beta_fast"),
                beta_slow=_float(file, given, "beta_slow"),
                attention_factor=_float(file, given, "attention_factor") if is_given else None,
            )
    except KeyError as error:
        raise ValueError(f"{file}: a {kind} rope has no {error}. Add it to rope_scaling.") from None
    raise ValueError(
        f"{file}: the rope is {given}, and its rope_type must be default, llama3 or yarn "
        "(truncated, without mscale). Other scalings are not implemented."
    )


def config_fields(model: Model, *, dtype: Dtype, base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that transformers 4 and 5 and inference engines can read.

    Args:
      model: The model; it is a Qwen3 if `qk_norm` is set, and otherwise a Llama.
      dtype: Dtype of the tensors.
      base: Fields to keep. Fields that the model determines are replaced.
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
    """The `model_type` of this model: Qwen3 normalises queries and keys, Llama does not."""
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
    """The object in a JSON file.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If it is not JSON or not an object; see also `strict_json`.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: not there. Give a folder as on the Hub.") from None
    return json_object(content, file)


def json_object(content: bytes, file: str | Path) -> dict[str, Any]:
    """The object that the content of a JSON file holds.

    Args:
      content: UTF-8.
      file: what errors call it.

    Raises:
      ValueError: it is not JSON, or no object; or see `strict_json`.
    """
    try:
        found = strict_json.parse(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}). Copy or download it again.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__} and must hold a JSON object.")
    return found
