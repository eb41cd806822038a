"""The one table of fields that would change the answer: OpenAI's own, and those of other servers' dialects.

What an endpoint supports are the fields of its request (`requests.py`); of the others in this table it takes what asks
for nothing (null, something empty, or the values listed here) and refuses the rest. A program that sends `guided_json`
relies on it: it is told, instead of getting a free answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from glm4lite.base.errors import shown
from glm4lite.server.errors import ApiError

_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


def _named(names: str, neutral: tuple[Any, ...] = _NOTHING) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), neutral)


# name -> the values that ask for nothing
_FIELDS: dict[str, tuple[Any, ...]] = {
    # a grammar or a schema that binds the answer
    **_named(
        "guided_json guided_choice guided_regex guided_grammar guided_whitespace_pattern structured_outputs "
        "structural_tag grammar grammar_string json_schema regex ebnf format guided_decoding response_schema "
        "regex_pattern json_mode force_words_ids constraints extra_body nvext"
    ),
    # which tokens may come, and when the answer ends
    **_named(
        "min_tokens min_new_tokens min_length ignore_eos ban_eos_token stop_token_ids stop_regex no_stop_trim stop_at "
        "include_stop_str_in_output allowed_token_ids bad_words bad_words_ids custom_token_bans logits_processors "
        "logits_processor_args no_repeat_ngram_size encoder_repetition_penalty suppress_tokens begin_suppress_tokens "
        "sequence_bias banned_tokens banned_strings forced_bos_token_id forced_eos_token_id "
        "exponential_decay_length_penalty eos_token_id stop_sequences stop_strings stop_words allowed_tokens stop"
    ),
    # how a token is drawn
    **_named(
        "presence_penalty frequency_penalty top_a tfs mirostat mirostat_mode dry_multiplier xtc_probability "
        "dynatemp_range dynamic_temperature epsilon_cutoff eta_cutoff smoothing_factor logit_bias "
        "diversity_penalty penalty_alpha negative_prompt samplers sampler_priority watermark sampler_order "
        "logits_bias repetition_penalty_range rep_pen_range penalize_nl"
    ),
    **_named(
        "typical_p typical tfs_z repeat_penalty rep_pen repetition_penalty length_penalty guidance_scale", (None, 1)
    ),
    "verbosity": (None, "medium"),
    **_named("do_sample", (None, True)),
    "top_n_sigma": (None, -1, 0),
    # more answers than one, or an answer that is searched for
    **_named("n best_of num_beams num_return_sequences", (None, 1)),
    **_named("models route fallbacks"),
    **_named("use_beam_search early_stopping"),
    # what the prompt is made of
    **_named(
        "echo suffix continue_final_message chat_template truncate_prompt_tokens documents raw template context "
        "lora lora_path mm_processor_kwargs options system images chat_template_kwargs messages prompt prompts input "
        "instructions transforms plugins truncate previous_response_id conversation context_management"
    ),
    **_named("add_generation_prompt add_special_tokens", (None, True)),
    # what the answer consists of
    **_named("prompt_logprobs n_probs top_logprobs logprobs return_token_ids return_tokens_as_token_ids audio"),
    **_named(
        "skip_special_tokens spaces_between_special_tokens detokenize include_reasoning separate_reasoning",
        (None, True),
    ),
    **_named("include output_config mcp_servers container background moderation"),
    "text": (*_NOTHING, {"format": {"type": "text"}}),
    "truncation": (*_NOTHING, "disabled"),
    "modalities": (None, [], ["text"]),
    "web_search_options": (None,),
    # tools, where there is no conversation
    "tools": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    # the thought, where there is none
    **_named("thinking_budget thinking_token_budget thinking_budget_tokens reasoning_budget_tokens", (None, 0, -1)),
    "thinking": (None, {}, {"type": "disabled"}),
    **_named("enable_thinking", (None, False)),
    "reasoning_effort": (None, "none"),
    "reasoning": _NOTHING,
    # tools in the form before `tools`, and lengths in other words
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    **_named(
        "max_new_tokens max_length max_tokens_to_sample max_completion_tokens max_output_tokens max_time", (None,)
    ),
    "n_predict": (None, -1),
    "num_predict": (None, -1),
}
_INSTEAD = {
    "reasoning": "reasoning_effort",
    "min_new_tokens": "min_tokens",
    "rep_pen": "repetition_penalty",
    "logits_bias": "logit_bias",
    "eos_token_id": "stop_token_ids",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "instructions": "a message of the role system",
    "functions": "tools",
    "function_call": "tool_choice",
    "repeat_penalty": "repetition_penalty",
    "do_sample": "temperature",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_tokens_to_sample": "max_tokens",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "system": "a message of the role system",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
}

_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "function_call": (None,),  # a call in the form before `tool_calls`: without it the conversation is another one
    "audio": (None,),
    "prefix": _NOTHING,  # "go on with this message"
    "partial": _NOTHING,
}

# Fields that change nothing here: who asks, what is stored or billed, how an answer comes to be faster.
_HARMLESS = _named(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction "
    "cache_prompt cache_salt id_slot request_id priority guided_decoding_backend keep_alive max_tool_calls"
)


def refuse_unsupported(body: Mapping[str, Any], supported: Collection[str] = ()) -> None:
    """Raises ApiError for the first field that asks for what is not there; `supported` are an endpoint's fields."""
    for name, value in body.items():
        if name in _FIELDS and name not in supported:
            _check(value, _FIELDS[name], name, name)


def refuse_in_message(message: Mapping[str, Any], at: str) -> None:
    """The same for one message."""
    for name, neutral in _IN_MESSAGES.items():
        _check(message.get(name), neutral, name, f"{at}.{name}")


def ignored(body: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Names in the body that mean nothing to this server, for its answer to say."""
    return [name for name in body if name not in known and name not in _FIELDS and name not in _HARMLESS]


def _check(value: Any, neutral: tuple[Any, ...], name: str, param: str) -> None:
    if not any(_same(value, one) for one in neutral):
        instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise ApiError(f"{param}: {shown(value)} is not supported{instead}", param=param, code="unsupported_value")


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is no 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
