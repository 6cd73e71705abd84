"""How families of models write tool calls, each told by what its chat template says."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One family's way to write calls; special tokens stand by their names.

    A call is ``head[0]``, the tool's name, ``head[1]``, its arguments as JSON. The first one follows ``opener`` and ``lead``,
    further ones ``separator`` (None: there is only one), ``last`` ends them. opener: "" where a text that begins like a call is
    one. id_length: characters of a call's id, where the family's template counts them.
    """

    name: str
    opener: str
    lead: str
    separator: str | None
    last: str
    head: tuple[str, str] = ('{"name": "', '", "arguments": ')
    id_length: int | None = None

    def head_of(self, tool: str) -> str:
        """What stands between ``lead`` or ``separator`` and a call's arguments."""
        return tool.join(self.head)


# Nous Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4, Ling and Ring.
HERMES = Layout("hermes", "<tool_call>", "\n", "}\n</tool_call>\n<tool_call>\n", "}\n</tool_call>")
# SmolLM2.
HERMES_LIST = Layout("hermes_list", "<tool_call>", "[", "}, ", "}]</tool_call>")
# Llama 3.1 to 3.3: one call, which is the whole answer.
LLAMA = Layout("llama", "", "", None, "}", ('{"name": "', '", "parameters": '))
# Mistral's tokenizers v3 to v7; the templates want ids of 9 characters.
MISTRAL = Layout("mistral", "[TOOL_CALLS]", "[", "}, ", "}]", id_length=9)
# Mistral's tokenizer v13.
MISTRAL_NAMED = Layout("mistral_named", "[TOOL_CALLS]", "", "[TOOL_CALLS]", "", ("", "[ARGS]"), id_length=9)
# Granite 3.
GRANITE = Layout("granite", "<|tool_call|>", "[", "}, ", "}]")
# Phi-4-mini.
PHI = Layout("phi", "<|tool_call|>", "[", "}, ", "}]<|/tool_call|>")

LAYOUTS = (HERMES, HERMES_LIST, LLAMA, MISTRAL, MISTRAL_NAMED, GRANITE, PHI)


def find_layout(source: str) -> Layout | None:
    """The layout that a chat template's source speaks of; None where it takes no tools, or writes calls in another way."""
    if not re.search(r"\btools\b", source) or "<arg_key>" in source or "<function=" in source:
        return None  # the latter two are GLM's and Qwen3-Coder's: arguments that are no JSON
    if "[TOOL_CALLS]" in source:
        return MISTRAL_NAMED if "[ARGS]" in source else MISTRAL
    if "<|/tool_call|>" in source or "<|/tool|>" in source:
        return PHI
    if "<|tool_call|>" in source:
        return GRANITE
    if "<tool_call>" in source:
        return HERMES_LIST if "<tool_call>[" in source else HERMES
    return LLAMA if '"parameters"' in source else None
