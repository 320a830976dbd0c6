"""What a client may ask for: the body of `POST /v1/chat/completions`, read and checked."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmedit_cli.errors import DataError, UserError
from mmedit_cli.in_hand import in_data_url
from mmedit_cli.pictures import check_decodes
from mmedit_cli.reading import Record, parse_json_object, shorten

_PLACE = "the request"
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_READ = (
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
)
# Answers are greedy, so these change nothing; those of the second line say nothing about the answer.
_IGNORED = (
    *("temperature", "top_p", "seed", "reasoning_effort", "verbosity"),
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
# Other answers than ours are asked for, unless they have one of these values.
_NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


class ApiError(UserError):
    """A request that is not answered, with its HTTP status and the code that clients know it by."""

    def __init__(self, status: int, problem: str, code: str | None = None) -> None:
        super().__init__(problem)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class ChatRequest:
    """The question that a client asks, and how it wants the answer.

    `picture` is an image file, checked. `limit` is in tokens, None where the client says nothing. `alone` is false if
    the conversation holds more than the question, which no model is told.
    """

    text: str
    picture: bytes | None
    limit: int | None
    stream: bool
    with_usage: bool
    alone: bool


def read_request(body: bytes, served: str) -> ChatRequest:
    """Return what a body asks of the model `served`.

    Raises ApiError for another model, DataError for what is wrong or not supported.
    """
    record = _without_nulls(parse_json_object(body, _PLACE))
    record.only(*_READ, *_IGNORED, *_NOT_SUPPORTED)
    model = record.text("model")
    if model != served:
        problem = f"the model {shorten(model)!r} is not served here; {served!r} is"
        raise ApiError(404, problem, "model_not_found")
    _check_supported(record)
    messages = record.records("messages")
    text, picture = _question(messages)
    options = _without_nulls(record.record("stream_options", {}))
    return ChatRequest(
        text=text,
        picture=picture,
        limit=_limit(record),
        stream=record.flag("stream", False),
        with_usage=options.flag("include_usage", False),
        alone=len(messages) == 1,
    )


def _without_nulls(record: Record) -> Record:
    """Return a record without the keys that are null: clients send them for what they leave open."""
    given = {key: value for key, value in record.values.items() if value is not None}
    return Record(given, record.place, key=record.key)


def _check_supported(record: Record) -> None:
    for key, harmless in _NOT_SUPPORTED.items():
        if key not in record:
            continue
        value = record.values[key]
        if value not in harmless:
            record.fail(key, "is not supported; leave it out")


def _limit(record: Record) -> int | None:
    """Return how many tokens the answer may have, by the new name of the option or the old one."""
    old = record.integer("max_tokens", None, low=1)
    return record.integer("max_completion_tokens", old, low=1)


def _question(messages: list[Record]) -> tuple[str, bytes | None]:
    """Return the text of the last message, and the picture of the last message of the user that has one."""
    if not messages:
        raise DataError(f"{_PLACE}: messages: is empty")
    for message in messages:
        if message.text("role") not in _ROLES:
            message.fail("role", f"must be one of {', '.join(_ROLES)}")
    last = messages[-1]
    if last.text("role") != "user":
        last.fail("role", "the last message must be the user's")
    text, picture = _content(last)
    if not text.strip():
        last.fail("content", "the question is empty")
    earlier = reversed(messages[:-1])
    for message in earlier:
        if picture is None and message.text("role") == "user":
            _, picture = _content(message)
    return text, picture


def _content(message: Record) -> tuple[str, bytes | None]:
    """Return the text and the picture of a message of the user: a text, or parts."""
    if isinstance(message.values.get("content"), str):
        return message.text("content"), None
    texts: list[str] = []
    pictures: list[bytes] = []
    for part in message.records("content"):
        kind = part.text("type")
        if kind == "text":
            texts.append(part.text("text"))
        elif kind == "image_url":
            pictures.append(_picture(part.record("image_url")))
        else:
            part.fail("type", "only text and image_url are read")
    if len(pictures) > 1:
        message.fail("content", "a question has one picture")
    picture = pictures[0] if pictures else None
    return "\n".join(texts), picture


def _picture(part: Record) -> bytes:
    """Return the image file of a data URL; raise DataError if it is none, or no picture that is opened here."""
    url = part.text("url")
    data = None
    try:
        data = in_data_url(url)
    except ValueError as error:
        part.fail("url", str(error))
    if data is None:
        part.fail(
            "url",
            "must be data:image/...;base64,...: the server fetches nothing from the web, nor from its own disk",
        )
    check_decodes(io.BytesIO(data), f"{_PLACE}: {part.key}")
    return data
