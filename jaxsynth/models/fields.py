"""Reading a config.json strictly: what a network cannot honour must not pass silently.

A field that changes the computation and that the network does not implement has one allowed value
(`only`); fields that never change it are named (`ignored`); any other unknown field is an error.
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any

from jaxsynth.core.config import convert
from jaxsynth.core.errors import quoted, shown

# Fields of transformers' config.json that do not change what a network computes.
_NOTES = """
    add_cross_attention architectures attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache
"""
TRANSFORMERS_NOTES = frozenset(_NOTES.split())
# Positive by default, and no count.
_MAY_BE_ZERO = {"downsample_padding", "eos_token_id", "freq_shift", "head_layers"}
_MOST, _LONGEST = 1 << 31, 1000


# What diffusers' EMAModel adds to the config.json of the network whose average it saves.
EMA_NOTES = frozenset(
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


def known_fields(
    cls: type,
    config: Mapping[str, Any],
    *,
    only: Mapping[str, Collection[Any]] | None = None,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """The entries of `config` that are fields of the dataclass `cls`, lists turned into tuples.

    Keys that start with "_" (diffusers' own notes) and those in `ignored` are dropped. Raises
    ValueError naming the class, the field and what was expected for an unknown field, for a value
    of another type than the field's or out of its range, or for a value of a field in `only` that
    is not among those allowed.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{cls.__name__}: {shown(config)}, expected an object")
    names = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        value = _frozen(value)
        if only and key in only:
            if value not in only[key]:
                allowed = " or ".join(repr(option) for option in only[key])
                raise ValueError(f"{cls.__name__}.{key}: expected {allowed}, got {quoted(value)}")
        elif key in names:
            known[key] = convert(names[key], value, f"{cls.__name__}.{key}")
            _check_range(f"{cls.__name__}.{key}", known[key], _least(cls, key))
        else:
            raise ValueError(
                f"{cls.__name__}: unknown field {quoted(key)} (value {quoted(value)}); "
                f"expected some of {sorted(names)}"
            )
    return known


def _least(cls: type, name: str) -> int:
    """The least integer of a field: what is positive by default counts or measures something."""
    default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
    first = default[0] if isinstance(default, tuple) and default else default
    positive = type(first) is int and first > 0
    return int((positive or first is dataclasses.MISSING) and name not in _MAY_BE_ZERO)


def _check_range(name: str, value: Any, least: int) -> None:
    """ValueError for an integer below `least` or too large for a shape."""
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) is int and not least <= number < _MOST:
            raise ValueError(f"{name}: {quoted(number)}, expected {least} to {_MOST - 1}")
        if isinstance(number, str) and len(number) > _LONGEST:
            raise ValueError(f"{name}: a text of {len(number)} letters")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def check_blocks(owner: str, block_types: Mapping[str, tuple[str, ...]], levels: int) -> None:
    """One block type per level in each list of `block_types` (field to types), else ValueError."""
    for field, types in block_types.items():
        if len(types) != levels:
            raise ValueError(
                f"{owner}.{field}: expected {levels} entries as in block_out_channels, "
                f"got {len(types)}: {list(types)}"
            )


def check_groups(owner: str, groups: int, channels: tuple[int, ...]) -> None:
    """Every channel count must be a multiple of the number of groups, else ValueError."""
    for count in channels:
        if count % groups:
            raise ValueError(
                f"{owner}.norm_num_groups: {groups} does not divide {count} of "
                f"block_out_channels {list(channels)}"
            )


def unused_fields(names: str) -> frozenset[str]:
    """Fields of a classifier's config.json that its forward pass does not read.

    `names` are those of its own, beside transformers' notes, training's rates of dropout, and what
    describes a backbone's feature maps.
    """
    own = f"{_NOT_READ} {names}".split()
    return (TRANSFORMERS_NOTES | frozenset(own)) - {"model_type"}


_NOT_READ = """
    attention_probs_dropout_prob drop_path_rate hidden_dropout_prob out_features out_indices
    stage_names
"""


def square_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with 224 for [224, 224] in image_size and patch_size; ValueError if not square."""
    config = dict(config)
    for name in ("image_size", "patch_size"):
        value = config.get(name)
        if isinstance(value, list | tuple):
            if not value or any(side != value[0] for side in value):
                raise ValueError(f"{name}: {shown(value)}, expected a square")
            config[name] = value[0]
    return config
