"""Messages to a prompt: the chat template of the bundle's tokenizer files, in Jinja's sandbox."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bilevel.errors import BundleError
from bilevel.runtime.serve.errors import ApiError


class _Refusal(TemplateError):
    """Raised by a template that does not take these messages."""


def _refuse(message: str) -> None:
    raise _Refusal(message)


class ChatTemplate:
    """How a model wants its turns written. Raises BundleError when the template is no valid Jinja.

    Templates come with models, from anywhere: they see the messages and the special tokens, and Python's insides are closed.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the chat template is not valid ({error}); mend it and export again") from None
        self._special = special

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that these messages make. Raises ApiError: 400 where the template refuses them, 500 where it fails."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **self._special)
        except _Refusal as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", param="messages") from None
        except SecurityError:
            raise ApiError(500, "the model's chat template reaches for what it may not have, and was stopped") from None
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise ApiError(500, f"the model's chat template failed on these messages ({type(error).__name__})") from None


def find_template(folder: Path) -> ChatTemplate | None:
    """The template among a bundle's tokenizer files (chat_template.jinja, or in tokenizer_config.json), or None."""
    settings = folder / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except ValueError as error:
        raise BundleError(f"{settings} is not valid JSON ({error}); make the bundle anew with bilevel export") from None
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    special = {name: value for name, value in tokens.items() if name.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(source, special)
