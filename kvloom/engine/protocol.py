"""What clients send: OpenAI's requests, with vLLM's fields beyond them. A field that isn't known is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["Asked", "Chat", "Completion", "Detokenize", "Failure", "Message", "Tokenize"]

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = list[Token]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """No field but these, no numbers but finite ones."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Usage(Strict):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded


class Schema(Strict):
    """A form by name."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class Format(Strict):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Structured(Strict):
    """vLLM's way to ask for a form; one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Asked(Strict):
    """What chats and completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: Usage | None = None
    # how tokens are chosen
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # where an answer ends
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[Tokens, Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Whole = 0
    skip_special_tokens: bool = True
    # its form
    response_format: Format | None = None
    structured_outputs: Structured | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # the cache
    cache: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    # for the sender's own books; they change nothing
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def forms(self) -> list[tuple[str, Any]]:
        """(kind, form) of what the answer is to be, as `Guides.make` takes them."""
        s, found = self.structured_outputs or Structured.model_validate({}), list[tuple[str, Any]]()
        if self.response_format is not None and self.response_format.type != "text":
            held = self.response_format.json_schema
            if self.response_format.type == "json_object":
                found.append(("json_object", None))
            else:
                found.append(("json", None if held is None else held.schema_))
        if s.json_object:
            found.append(("json_object", None))
        for kind, forms in (
            ("json", (s.json_, self.guided_json)),
            ("regex", (s.regex, self.guided_regex)),
            ("choice", (s.choice, self.guided_choice)),
            ("grammar", (s.grammar, self.guided_grammar)),
        ):
            found += [(kind, form) for form in forms if form is not None]
        return found

    def stops(self) -> list[str]:
        """Strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a chat. What else it holds is the chat template's business."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: content as one text."""
        found = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            found["content"] = "\n".join(part.text or "" for part in self.content)
        return found


class Talk(Strict):
    """What makes a prompt of a chat."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("messages")
    @classmethod
    def _text_alone(cls, messages: list[Message]) -> list[Message]:
        for message in messages:
            for part in message.content if isinstance(message.content, list) else ():
                if part.type not in ("text", "refusal"):
                    raise ValueError(f"content of type {part.type!r} can't be read; there is text alone")
        return messages


class Chat(Talk, Asked):
    """Body of /v1/chat/completions."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None


class Completion(Asked):
    """Body of /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Whole | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True
    best_of: int | None = None
    suffix: None = None


class Tokenize(Strict):
    """Body of /tokenize: a prompt, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Detokenize(Strict):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Tokens


class Cause(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """What comes instead of an answer."""

    error: Cause
