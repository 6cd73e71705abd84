"""The fields that clients send by habit: taken where their value changes nothing in the answer, refused where it would.

The classes below are the table. A field's type is the values that are neutral to this server; with any other one the request is
refused, and a field that is not here is unknown. Fields that do something are in ``schemas``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """No coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


def _check_empty(value: Any) -> Any:
    if value not in (None, [], {}):
        raise ValueError("this server does not have that; leave it out")
    return value


Nothing = Annotated[Any, AfterValidator(_check_empty)]
Text = Annotated[str, Field(max_length=1024)]
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[float, Field(ge=1, le=1)] | None


class Habits(Strict):
    """Of every request for text."""

    # Who asks, and how the vendor is to keep and to bill it.
    user: Text | None = None
    safety_identifier: Text | None = None
    request_id: Text | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    priority: Literal[0] | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    cache_prompt: bool | None = None  # llama.cpp's: prefixes are reused either way, and the text is the same
    # Ways to choose tokens that are switched off.
    use_beam_search: Literal[False] | None = None
    best_of: Literal[1] | None = None
    length_penalty: One = None
    early_stopping: Literal[False] | None = None
    typical_p: One = None
    tfs_z: One = None
    top_a: Zero = None
    mirostat: Literal[0] | None = None
    min_tokens: Literal[0] | None = None
    bad_words: Nothing = None
    allowed_token_ids: None = None
    stop_token_ids: Nothing = None
    logits_processors: Nothing = None
    # How texts are written: as this server does.
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    return_token_ids: Literal[False] | None = None
    truncate_prompt_tokens: None = None
    prompt_logprobs: None = None


class ChatHabits(Strict):
    """Of chats."""

    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: dict[str, Any] | None = None  # what the answer may be like: a hint for speed
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None  # of which there are none
    documents: Nothing = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    echo: Literal[False] | None = None
    mm_processor_kwargs: Nothing = None


class PartHabits(Strict):
    """Of a text part of a message."""

    cache_control: dict[str, Any] | None = None
    annotations: Nothing = None


class AnswerHabits(Strict):
    """Of an answer that comes back as history: what clients' objects hold beside it."""

    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing = None
    provider_specific_fields: Nothing = None
    parsed: Any = None  # the content once more, as the client read it


class StreamHabits(Strict):
    """Of stream_options."""

    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None
