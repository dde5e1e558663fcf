"""Reading config.json: both spellings of every family, and a clear error for every kind of nonsense."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux.engine.layers.rope import inverse_frequencies
from inferflux.engine.layers.rope_spec import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling
from inferflux.engine.models.catalog import FAMILIES
from inferflux.engine.models.spec import read_spec, with_max_model_len
from inferflux.errors import ConfigError, ModelLoadError
from tests.support.models import FAMILIES as TINY_MODELS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SIZES = {key: value for key, value in LLAMA.items() if key != "architectures"}
EXPERTS = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


def write(folder: Path, config: object, generation: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("family", TINY_MODELS)
def test_counts_parameters_as_transformers_does(tiny_model, family):
    model = tiny_model(family)
    assert read_spec(model.folder).num_parameters == model.reference.num_parameters()


def rope_of(tmp_path: Path, **keys: object) -> RopeSpec:
    return read_spec(write(tmp_path, {**LLAMA, **keys})).ropes[0]


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, LinearScaling(2.0)),
        ({"rope_type": "default"}, None),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
             "original_max_position_embeddings": 256},
            Llama3Scaling(8.0, 1.0, 4.0, 256),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            YarnScaling(4.0, 256, 32.0, 1.0, True, pytest.approx(1.1386294)),  # 0.1 ln 4 + 1
        ),
        (
            {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
             "original_max_position_embeddings": 256},
            LongRopeScaling((1.0,) * 8, (2.0,) * 8, 256, 1.25**0.5, long=True),  # sqrt(1 + ln 4 / ln 256)
        ),
    ],
)  # fmt: skip
def test_old_and_new_spelling_of_rope_agree(tmp_path, scaling, expected):
    old = rope_of(tmp_path, rope_theta=5e5, rope_scaling=scaling)
    new = rope_of(tmp_path, rope_parameters={"rope_theta": 5e5, **scaling})
    assert old == new == RopeSpec(5e5, 16, expected)


def test_gemma3_of_transformers_4_has_two_ropes_and_a_pattern(tmp_path):
    config = {
        **SIZES,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "head_dim": 16,
    }
    spec = read_spec(write(tmp_path, config))
    assert [layer.window for layer in spec.layers] == [20, None, 20, None]
    ropes = [spec.ropes[layer.rope] for layer in spec.layers if layer.rope is not None]
    assert ropes == [RopeSpec(1e4, 16, None), RopeSpec(1e6, 16, LinearScaling(8.0))] * 2
    assert spec.tied_embeddings, "a Gemma config that does not say so has tied embeddings"


def test_gemma3_ropes_that_do_not_say_how_fast_they_turn(tmp_path):
    """transformers gives each kind of layer its own default."""
    config = {**SIZES, "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window_pattern": 2}
    linear = {"rope_type": "linear", "factor": 8.0}
    local, scaled = RopeSpec(1e4, 16, None), RopeSpec(1e6, 16, LinearScaling(8.0))
    for sliding in ({"sliding_attention": {"rope_type": "default"}}, {"sliding_attention": None}, {}):
        spec = read_spec(write(tmp_path, {**config, "rope_parameters": {"full_attention": linear, **sliding}}))
        assert [spec.ropes[layer.rope] for layer in spec.layers if layer.rope is not None] == [local, scaled] * 2


def test_two_spellings_of_rope_at_once_must_agree(tmp_path):
    """Who adds YaRN to a config as models' pages say it would else get none, in silence."""
    plain, yarn = {"rope_theta": 1e6, "rope_type": "default"}, {"type": "yarn", "factor": 4.0}
    with pytest.raises(ModelLoadError, match="rope_scaling: must be absent beside a rope_parameters that says other"):
        rope_of(tmp_path, rope_parameters=plain, rope_scaling=yarn)
    assert rope_of(tmp_path, rope_parameters=plain, rope_scaling=None) == RopeSpec(1e6, 16, None)
    same = rope_of(tmp_path, rope_parameters={**yarn, "rope_theta": 1e6}, rope_theta=1e6, rope_scaling=yarn)
    assert same == rope_of(tmp_path, rope_theta=1e6, rope_scaling=yarn)


def test_biases_of_queries_keys_and_values_that_qwen2_moe_may_lack(tmp_path):
    config = {**SIZES, **EXPERTS, "architectures": ["Qwen2MoeForCausalLM"]}
    assert read_spec(write(tmp_path, config)).qkv_bias
    assert not read_spec(write(tmp_path, {**config, "qkv_bias": False})).qkv_bias


@pytest.mark.parametrize(
    ("architecture", "keys", "windows"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 8}, [None] * 4),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
         [None, None, None, 8]),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8,
                              "layer_types": ["sliding_attention", "full_attention"] * 2}, [8, None, 8, None]),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("MistralForCausalLM", {}, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
         [None, 8, None, 8]),  # transformers takes it for a Ministral
        ("Qwen2MoeForCausalLM", {**EXPERTS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
         [8, None, None, None]),
        ("Phi3ForCausalLM", {"sliding_window": 8}, [8] * 4),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, [8, None, 8, None]),
        ("LlamaForCausalLM", {"sliding_window": 8}, [None] * 4),
    ],
)  # fmt: skip
def test_windows(tmp_path, architecture, keys, windows):
    spec = read_spec(write(tmp_path, {**SIZES, "architectures": [architecture], **keys}))
    assert [layer.window for layer in spec.layers] == windows


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": "x"}, 'hidden_size: must be an integer >= 1 and <= 131072 (got "x")'),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must be a divisor of num_attention_heads (4)"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads: must be a divisor of hidden_size"),
        ({"head_dim": 15}, "head_dim: must be even"),
        ({"intermediate_size": 2**40}, "intermediate_size"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act: must be one of silu"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": 3}, "rope_scaling: must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "type: must be one of default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling: factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor: must be a number"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "a list of 8 numbers"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"torch_dtype": "float8"}, "torch_dtype: must be one of float32"),
        ({"eos_token_id": "2"}, "eos_token_id: must be a token id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: must be a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints are not supported"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "only causal models"),
        ({"is_causal": False}, "is_causal: must be true: only causal models"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config: must be absent"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types: must be a list"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": [1]}, "text_config: must be an object"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, "no_rope_layers"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_file_and_key(tmp_path, keys, words):
    with pytest.raises(ModelLoadError) as caught:
        read_spec(write(tmp_path, {**LLAMA, **keys}))
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


NONSENSE = st.one_of(
    st.sampled_from([None, True, 0, 1, 2, -1, 10**40, 1e-9, 1e300, float("nan"), float("inf"), "", "yarn", "\ud800"]),
    st.lists(st.integers(-1, 5), max_size=5),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "short_factor",
                         "original_max_position_embeddings", "long_factor", "mscale", "beta_fast", "truncate"]),
        st.sampled_from(["yarn", "llama3", "longrope", "linear", 1, 2.0, 0, None, [1.0] * 8, {"factor": 2}]),
    ),
)  # fmt: skip
KEYS = [*SIZES, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types",
        "sliding_window", "use_sliding_window", "no_rope_layers", "query_pre_attn_scalar", "final_logit_softcapping",
        "original_max_position_embeddings", "eos_token_id", "dtype", "text_config", "rms_norm_eps"]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), NONSENSE, min_size=1, max_size=4))
def test_no_config_does_more_than_be_refused(tmp_path, architecture, keys):
    sizes = {"text_config": SIZES} if architecture == "Gemma3ForConditionalGeneration" else SIZES
    try:
        spec = read_spec(write(tmp_path, {**sizes, "architectures": [architecture], **keys}))
    except ModelLoadError as error:
        str(error).encode()
        return
    for rope in spec.ropes:
        frequencies, magnitude = inverse_frequencies(rope)
        assert frequencies.isfinite().all()
        assert math.isfinite(magnitude)


@pytest.mark.parametrize("key", [key for key in LLAMA if key not in ("num_key_value_heads", "max_position_embeddings")])
def test_missing_keys_are_named(tmp_path, key):
    with pytest.raises(ModelLoadError, match=f"{key}: must be .* \\(missing\\)"):
        read_spec(write(tmp_path, {name: value for name, value in LLAMA.items() if name != key}))


def test_unsupported_architecture_lists_the_supported_ones(tmp_path):
    with pytest.raises(ModelLoadError) as caught:
        read_spec(
            write(tmp_path, {**LLAMA, "architectures": ["Qwen3NextForCausalLM"], "auto_map": {"AutoModel": "x.y"}})
        )
    assert all(name in str(caught.value) for name in FAMILIES)
    assert 'did you mean "Qwen3ForCausalLM"?' in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ud800"])
def test_broken_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        read_spec(tmp_path)


def test_not_a_model_folder(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelLoadError, match="is not a model folder"):
            read_spec(path)


@pytest.mark.parametrize(
    ("config_ids", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5, 2], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"bos_token_id": 1}, (2,)),
        (None, None, ()),
        ([2, 128009], None, (2,)),  # cannot be sampled: the vocabulary ends before it
    ],
)
def test_eos_token_ids(tmp_path, config_ids, generation, expected):
    folder = write(tmp_path, {**LLAMA, "eos_token_id": config_ids}, generation)
    assert read_spec(folder).eos_token_ids == expected


def test_model_length_is_bounded_by_what_the_rope_is_made_for(tmp_path):
    plain = read_spec(write(tmp_path, LLAMA))
    assert plain.max_model_len == 1024
    assert with_max_model_len(plain, 100).max_model_len == 100
    for length in (0, 1025):
        with pytest.raises(ConfigError, match=r"max_model_len: must be >= 1 and <= 1024.*got"):
            with_max_model_len(plain, length)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    spec = read_spec(write(tmp_path, {**LLAMA, "rope_scaling": yarn}))
    assert with_max_model_len(spec, 4096).max_model_len == 4096


def test_longrope_takes_the_list_of_the_length_it_is_served_with(tmp_path):
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = {**LLAMA, "original_max_position_embeddings": 256, "rope_scaling": scaling}
    spec = read_spec(write(tmp_path, config))
    chosen = [with_max_model_len(spec, length).ropes[0].scaling.long for length in (256, 257, None)]
    assert chosen == [False, True, True]
