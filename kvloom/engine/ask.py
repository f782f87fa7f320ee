"""From what a client sends to what the engine is asked: prompts, settings, names; and the reasons to refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvloom.engine.guide import Guides
from kvloom.engine.protocol import Asked, Chat, Completion, Message, Tokenize
from kvloom.engine.request import Guide, Request, Sampling
from kvloom.engine.text import Vocabulary
from kvloom.errors import unknown

__all__ = ["Desk", "Order", "Problem", "Served"]

LONG = 20_000  # letters of a prompt from which on it is tokenized beside the event loop
COOLEST = 0.01  # less divides logits into infinity


class Problem(Exception):
    """A request that is answered by an error. `param`: the field that is to blame."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


@dataclass(frozen=True)
class Served:
    """What a server offers.

    Args:
        names: of the model; the first is told to clients.
        tokenizer: of transformers.
        vocabulary, context: of the model, in tokens.
        ends: tokens that end an answer.
        recipe: of caches, unless a request asks for one of `allowed`.
        adapters: names of LoRA adapters, and where each is from.
    """

    names: Sequence[str]
    tokenizer: Any
    vocabulary: int
    context: int
    ends: Collection[int] = ()
    recipe: str = "full"
    allowed: Sequence[str] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What is asked of the engine for one call, and how answers are to be told: `requests` are its choices in their order."""

    requests: list[Request]
    model: str
    prompt_tokens: int
    stops: Sequence[str]
    include_stop: bool
    skip_special: bool
    logprobs: bool
    echo: Sequence[str] = ()  # of each choice; the text that stands before its answer


class Desk:
    """Turns bodies into orders."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.words = Vocabulary(served.tokenizer, served.vocabulary)
        self.guides = Guides(served.tokenizer, served.vocabulary, served.ends)
        self.recipes = {_canonical(recipe): recipe for recipe in (*served.allowed, served.recipe)}

    async def chat(self, body: Chat) -> Order:
        """Raises Problem or RequestError."""
        adapter = self.adapter(body.model)
        if body.top_logprobs and not body.logprobs:
            raise Problem("top_logprobs needs logprobs: true.", param="top_logprobs")
        if (
            body.max_tokens is not None
            and body.max_completion_tokens is not None
            and body.max_tokens != body.max_completion_tokens
        ):
            raise Problem("max_tokens is the old name of max_completion_tokens; give one of them.", param="max_tokens")
        tools = None if body.tool_choice == "none" else body.tools
        options = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            options.setdefault("reasoning_effort", body.reasoning_effort)
        text = self.render(body.messages, tools, body.add_generation_prompt, body.continue_final_message, options)
        prompt = await self.tokens(text, special=False)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling = await self._sampling(body, most, (body.top_logprobs or 0) if body.logprobs else None)
        return self._order(body, adapter, [prompt], sampling)

    async def completion(self, body: Completion) -> Order:
        """Raises Problem or RequestError."""
        adapter = self.adapter(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise Problem("best_of must equal n: all answers are returned.", param="best_of")
        if body.echo and body.logprobs is not None:
            raise Problem("log-probabilities of a prompt aren't computed; leave echo or logprobs out.", param="echo")
        if body.max_tokens == 0 and not body.echo:
            raise Problem("max_tokens must be at least 1, unless echo is asked for.", param="max_tokens")
        given = body.prompt
        many: list[Any] = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else list(given)
        if len(many) * (body.n or 1) > 128:
            raise Problem(
                f"{len(many)} prompts with n={body.n or 1} are more than 128 answers; send several requests.",
                param="prompt",
            )
        prompts = [await self.tokens(x, body.add_special_tokens) if isinstance(x, str) else list(x) for x in many]
        sampling = await self._sampling(body, body.max_tokens, body.logprobs)
        order = self._order(body, adapter, prompts, sampling)
        if not body.echo:
            return order
        texts = [x if isinstance(x, str) else self.words.decode(x) for x in many]
        return replace(order, echo=[text for text in texts for _ in range(body.n or 1)])

    async def tokenize(self, body: Tokenize) -> list[int]:
        """Tokens of a prompt, or of a chat."""
        self.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Problem("give either prompt or messages.", param="prompt")
        if body.prompt is not None:
            return await self.tokens(body.prompt, True if body.add_special_tokens is None else body.add_special_tokens)
        options = dict(body.chat_template_kwargs or {})
        text = self.render(
            body.messages or [], body.tools, body.add_generation_prompt, body.continue_final_message, options
        )
        return await self.tokens(text, bool(body.add_special_tokens))

    def adapter(self, name: str | None) -> str:
        """The adapter that a model's name stands for; "" is the model alone."""
        if name is None or name in self.served.names:
            return ""
        if name in self.served.adapters:
            return name
        shown = (*self.served.names, *self.served.adapters)[:20]
        raise Problem(unknown("model", name[:200], shown), 404, "model", "model_not_found")

    def render(
        self, messages: Sequence[Message], tools: Any, begin: bool, go_on: bool, options: Mapping[str, Any]
    ) -> str:
        """The text of a chat by the model's template."""
        if self.served.tokenizer.chat_template is None:
            raise Problem("this model has no chat template; use /v1/completions.", param="messages")
        if begin and go_on:
            begin = False
        taken = {"conversation", "messages", "tools", "documents", "tokenize", "chat_template", "tokenizer"} & set(
            options
        )
        if taken or any(name.startswith(("return_", "add_", "continue_")) for name in options):
            raise Problem(
                f"chat_template_kwargs are the template's own options, not {sorted(options)}.",
                param="chat_template_kwargs",
            )
        turns = [_turn(message) for message in messages]
        try:
            return str(
                self.served.tokenizer.apply_chat_template(
                    turns, tools=tools or None, tokenize=False, add_generation_prompt=begin, continue_final_message=go_on, **options
                )
            )  # fmt: skip
        except Exception as error:  # templates are programs: they fail in their own ways on what they don't expect
            first = " ".join(str(error).split())[:300]
            raise Problem(f"the model's chat template can't take these messages: {first}", param="messages") from error

    async def tokens(self, text: str, special: bool) -> list[int]:
        """Tokens of a text."""
        encode: Callable[[], list[int]] = lambda: list(self.served.tokenizer.encode(text, add_special_tokens=special))  # noqa: E731
        try:
            return await asyncio.to_thread(encode) if len(text) > LONG else encode()
        except (UnicodeError, TypeError) as error:
            raise Problem(f"the text can't be encoded: {error}", param="prompt") from error

    async def _sampling(self, body: Asked, most: int | None, logprobs: int | None) -> Sampling:
        heat = 1.0 if body.temperature is None else body.temperature
        stop = set(body.stop_token_ids or ())
        if not body.ignore_eos:
            stop |= set(self.served.ends)
        return Sampling(
            max_tokens=most,
            temperature=max(heat, COOLEST) if heat else 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            seed=body.seed,
            presence=body.presence_penalty or 0.0,
            frequency=body.frequency_penalty or 0.0,
            repetition=body.repetition_penalty or 1.0,
            bias=self._bias(body.logit_bias or {}),
            stop=frozenset(token for token in stop if token < self.served.vocabulary),
            min_tokens=body.min_tokens,
            logprobs=logprobs,
            guide=await self._guide(body),
        )

    def _bias(self, given: Mapping[str, float]) -> dict[int, float]:
        for name in given:
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < self.served.vocabulary):
                raise Problem(
                    f"logit_bias has {name[:40]!r}, which is no token of {self.served.vocabulary}.", param="logit_bias"
                )
        return {int(name): value for name, value in given.items()}

    async def _guide(self, body: Asked) -> Callable[[], Guide] | None:
        forms = body.forms()
        if not forms:
            return None
        if len(forms) > 1:
            raise Problem(
                f"{len(forms)} forms of the answer are asked for ({', '.join(kind for kind, _ in forms)}); give one.",
                param="response_format",
            )
        if body.min_tokens:
            raise Problem(
                "an answer of a given form ends when it is complete; leave min_tokens out.", param="min_tokens"
            )
        return await asyncio.to_thread(self.guides.make, *forms[0])

    def _order(self, body: Asked, adapter: str, prompts: list[list[int]], sampling: Sampling) -> Order:
        for prompt in prompts:
            self._fits(prompt, sampling)
        n = body.n or 1
        recipe = self._recipe(body.cache)
        requests = [
            Request(
                tokens=prompt,
                sampling=sampling
                if sampling.seed is None or n == 1
                else replace(sampling, seed=(sampling.seed + i) % 2**63),
                recipe=recipe,
                adapter=adapter,
                salt=body.cache_salt or "",
                priority=body.priority,
            )
            for prompt in prompts
            for i in range(n)
        ]
        return Order(
            requests=requests,
            model=adapter or self.served.names[0],
            prompt_tokens=sum(map(len, prompts)),
            stops=body.stops(),
            include_stop=body.include_stop_str_in_output,
            skip_special=body.skip_special_tokens,
            logprobs=sampling.logprobs is not None,
        )

    def _fits(self, prompt: list[int], sampling: Sampling) -> None:
        context = self.served.context
        if not prompt:
            raise Problem("the prompt is empty; it must have at least one token.", param="prompt")
        if max(prompt) >= self.served.vocabulary:
            raise Problem(f"token {max(prompt)} is not one of {self.served.vocabulary}.", param="prompt")
        least = 1 if sampling.max_tokens is None else sampling.max_tokens
        if len(prompt) + least > context:
            asked = "" if sampling.max_tokens is None else f" and {least} of the answer"
            message = f"the model's context is {context} tokens; the prompt has {len(prompt)}{asked}. Shorten it, or ask for fewer."
            raise Problem(message, param="messages", code="context_length_exceeded")
        if sampling.min_tokens > (
            context - len(prompt) if sampling.max_tokens is None else max(1, sampling.max_tokens)
        ):
            raise Problem("min_tokens is more than the answer may have.", param="min_tokens")

    def _recipe(self, asked: str | None) -> str:
        if asked is None:
            return ""
        found = self.recipes.get(_canonical(asked))
        if found is None:
            shown = ", ".join(map(repr, self.recipes.values()))
            raise Problem(f"cache {asked!r} is not offered; this server offers {shown}.", param="cache")
        return "" if found == self.served.recipe else found


def _canonical(recipe: str) -> str:
    """Spaces don't matter. What clients send is never parsed: recipes may name files."""
    return "".join(recipe.split())


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls as objects, which OpenAI sends as text."""
    found = message.plain()
    for call in found.get("tool_calls") or ():
        held = call.get("function") if isinstance(call, dict) else None
        if isinstance(held, dict) and isinstance(held.get("arguments"), str):
            try:
                held["arguments"] = json.loads(held["arguments"])
            except ValueError as error:
                raise Problem(f"arguments of a tool call are no JSON: {error}", param="messages") from error
    return found
