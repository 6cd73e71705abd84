"""Tools for a model whose template knows none: a system message describes them, calls and results are text (Nous Hermes)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_BEHIND = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without calls and results of their own, the tools in the system message, which comes first."""
    written = [_plain(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if not written or written[0]["role"] not in ("system", "developer"):
            written.insert(0, {"role": "system", "content": ""})
        content = written[0]["content"]
        written[0] = {**written[0], "content": (f"{content}\n\n" if content else "") + _BEFORE + listed + _BEHIND}
    merged: list[dict[str, Any]] = []
    for message in written:
        is_result = message.pop("is_result", False)
        if is_result and merged and merged[-1].get("is_result"):
            merged[-1]["content"] += "\n" + message["content"]  # several results are one turn
        else:
            merged.append({**message, "is_result": is_result})
    return [{key: value for key, value in message.items() if key != "is_result"} for message in merged]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content, "is_result": True}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    lines = [f"<tool_call>\n{json.dumps(_named(call), ensure_ascii=False)}\n</tool_call>" for call in calls]
    content = "\n".join([*([message["content"]] if message["content"] else []), *lines])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _named(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": function["arguments"]}
