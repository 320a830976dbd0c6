"""What a client is answered: completions, parts of them, and errors, in the shapes that OpenAI has published."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.serving.chat import ApiError
from mmedit_cli.serving.desk import Done

LAST_EVENT = "data: [DONE]\n\n"


class Reply:
    """One completion of the model `name`, as a whole or in parts with one id."""

    def __init__(self, name: str) -> None:
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, done: Done) -> dict[str, Any]:
        """Return the completion."""
        message = {
            "role": "assistant",
            "content": done.spoken.text,
            "refusal": None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": done.spoken.finish,
        }
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(done),
        }

    def part(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """Return a chunk with the next words (or the role, which comes first, or nothing, at the end)."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish,
        }
        return self._chunk([choice])

    def counted(self, done: Done) -> dict[str, Any]:
        """Return the chunk that says how many tokens it took."""
        return {**self._chunk([]), "usage": usage(done)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}


def usage(done: Done) -> dict[str, int]:
    """Return the numbers of tokens of question and answer."""
    said = done.spoken.tokens
    return {
        "prompt_tokens": done.asked,
        "completion_tokens": said,
        "total_tokens": done.asked + said,
    }


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error: its own, 400 for what the client can mend, else 500."""
    if isinstance(error, ApiError):
        return error.status
    return 400 if isinstance(error, UserError) else 500


def described(error: Exception) -> dict[str, Any]:
    """Return an error as JSON; of one that nobody expected only the terminal of the server says more."""
    message = "the server failed; its terminal says why"
    if isinstance(error, MmeditError):
        message = "; ".join(error.problems)
    mendable = status_of(error) < 500
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if mendable else "server_error",
            "param": None,
            "code": error.code if isinstance(error, ApiError) else None,
        }
    }


def event(data: dict[str, Any]) -> str:
    """Return data as one server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
