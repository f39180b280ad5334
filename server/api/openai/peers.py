"""Fields of other servers' bodies, taken when they ask for nothing. Whatever else they ask is refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from server.api.messages import NO_TOOLS, TEMPLATE_PEERS
from server.api.validation import EMPTY, NO_EFFECT, Peers


def _defaults(**values: object) -> Mapping[str, Peers]:
    return {name: Peers((value,)) for name, value in values.items()}


# Bookkeeping of OpenAI's own, and what proxies add for themselves.
WITHOUT_EFFECT = dict.fromkeys(
    (
        *("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "store"),
        *("service_tier", "max_retries"),
    ),
    NO_EFFECT,
)
VLLM: Mapping[str, Peers] = {
    **_defaults(use_beam_search=False, length_penalty=1, skip_special_tokens=True, spaces_between_special_tokens=True),
    **_defaults(truncation_side="left", thinking_token_budget=-1, watermarking=False, routed_experts_prompt_start=0),
    **_defaults(return_tokens_as_token_ids=False, return_token_offsets=False, return_prompt_text=False),
    **_defaults(return_mm_kwargs=True),
    **dict.fromkeys(
        ("bad_words", "logits_processors", "kv_transfer_params", "ec_transfer_params", "vllm_xargs"), Peers(EMPTY)
    ),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids", "prompt_embeds", "repetition_detection"), Peers()),
    "stream_interval": Peers((1,), "each step's tokens are sent at once"),
}
SGLANG: Mapping[str, Peers] = {
    **_defaults(no_stop_trim=False, return_hidden_states=False, return_routed_experts=False),
    **_defaults(routed_experts_start_len=0, return_cached_tokens_details=False),
    **dict.fromkeys(("stop_regex", "session_params", "custom_params", "custom_labels"), Peers(EMPTY)),
    "lora_path": Peers((), "this server has no adapters"),
}
LLAMA_CPP: Mapping[str, Peers] = {
    **_defaults(cache_prompt=True, mirostat=0, mirostat_tau=5, mirostat_eta=0.1, dynatemp_range=0, dynatemp_exponent=1),
    **_defaults(xtc_probability=0, xtc_threshold=0.1, repeat_penalty=1, repeat_last_n=64, top_n_sigma=-1),
    **_defaults(dry_multiplier=0, dry_base=1.75, dry_allowed_length=2, dry_penalty_last_n=-1, tfs_z=1),
    **_defaults(n_probs=0, n_keep=0, n_discard=0, n_indent=0, id_slot=-1, t_max_predict_ms=0),
    **_defaults(timings_per_token=False, return_progress=False, post_sampling_probs=False, return_tokens=False),
}
SHARED: Mapping[str, Peers] = {**LLAMA_CPP, **SGLANG, **VLLM, **WITHOUT_EFFECT}

COMPLETION: Mapping[str, Peers] = {**SHARED, "suffix": Peers(("",), "this server continues texts only")}
CHAT: Mapping[str, Peers] = {
    **SHARED,
    **TEMPLATE_PEERS,
    **_defaults(echo=False, add_special_tokens=False),
    **dict.fromkeys(("audio", "prediction", "web_search_options"), Peers(EMPTY)),
    "modalities": Peers((["text"], []), "this server writes texts only"),
    "functions": Peers(EMPTY, NO_TOOLS),
    "function_call": Peers(("none", "auto", ""), NO_TOOLS),
    "tool_choice": Peers(("none", "auto", ""), NO_TOOLS),
    "tool_prompt": Peers(("",), NO_TOOLS),
    "parallel_tool_calls": NO_EFFECT,
    "guideline": Peers(("",)),
    # A model that does not reason, and has one length of answers.
    "reasoning_effort": Peers(("none", "")),
    "verbosity": Peers(("medium", "")),
    **dict.fromkeys(("include_reasoning", "separate_reasoning", "stream_reasoning"), Peers((True, False))),
    "reasoning_format": Peers(("auto", "none")),
}
