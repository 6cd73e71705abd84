"""Chat templates as models bring them: where a folder keeps them, how Jinja reads them, and which token ends their turns.

A folder's templates are ``chat_template.jinja``, those under ``additional_chat_templates/`` (``chat_template.NAME.jinja`` in a
bundle), and ``chat_template`` of ``tokenizer_config.json``: one text, or several by name. The first place that has a name
counts. Templates see what Hugging Face's do (transformers, ``chat_template_utils.py``): ``tojson`` that escapes nothing,
``raise_exception``, ``strftime_now``, loop controls, and ``{% generation %}``, which marks the answers for training and
changes nothing here.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import BundleError

DEFAULT = "default"  # the template that is used where none is named
MAIN_FILE = "chat_template.jinja"
_MORE, _PREFIX, _SUFFIX = "additional_chat_templates", "chat_template.", ".jinja"


@dataclass(frozen=True)
class ChatSources:
    """The templates of a folder by name, and its special tokens' texts by what they are called (``bos_token``, ...)."""

    templates: dict[str, str]
    special: dict[str, str]


def additional_files(folder: Path) -> dict[str, Path]:
    """The named templates beside the main one: the name of the file in a bundle -> the file."""
    paths = [*sorted((folder / _MORE).glob(f"*{_SUFFIX}")), *sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))]
    names = ((path.name if path.parent == folder else f"{_PREFIX}{path.name}", path) for path in paths)
    return {name: path for name, path in names if name != MAIN_FILE}


def read_sources(folder: Path) -> ChatSources:
    """The templates of a checkpoint's or a bundle's folder. Raises BundleError for files that cannot be read."""
    settings = folder / "tokenizer_config.json"
    try:
        config: Any = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except ValueError as error:
        raise BundleError(f"{settings} is not valid JSON ({error}); make the bundle anew with bilevel export") from None
    if not isinstance(config, dict):
        raise BundleError(f"{settings} is no JSON object; make the bundle anew with bilevel export")
    listed = config.get("chat_template")
    named = listed if isinstance(listed, list) else [{"name": DEFAULT, "template": listed}]
    found = {each.get("name"): each.get("template") for each in named if isinstance(each, dict)}
    files = {file.removeprefix(_PREFIX).removesuffix(_SUFFIX): path for file, path in additional_files(folder).items()}
    if (folder / MAIN_FILE).is_file():
        files[DEFAULT] = folder / MAIN_FILE
    found |= {name: _read_text(path) for name, path in files.items()}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    special = {name: value for name, value in tokens.items() if name.endswith("_token") and isinstance(value, str)}
    templates = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
    return ChatSources(templates, special)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not UTF-8; write it anew and export again") from None


def compile_template(source: str, refuse: Callable[[str], None]) -> Any:
    """A ``jinja2.Template``, in a sandbox. refuse: called by a template that does not take the messages.

    Templates come from anywhere: they see what they are given, and Python's insides are closed. Raises BundleError.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what is in it, as it is."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"the chat template is not valid ({error}); mend it and export again") from None


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else tuple(separators),
        sort_keys=sort_keys,
    )


def turn_end(sources: ChatSources, names: Iterable[str]) -> str | None:
    """The special token that the default template writes behind an answer, None where it writes none.

    names: texts of the special tokens.
    """
    source = sources.templates.get(DEFAULT)
    if source is None:
        return None
    question, answer = "zqquestionqz", "zqanswerqz"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        template = compile_template(source, lambda message: None)
        text = template.render(messages=messages, add_generation_prompt=False, tools=None, **sources.special)
    except Exception:  # noqa: BLE001 - a template may raise anything, and this one is only asked
        return None
    _, _, rest = text.rpartition(answer)
    ends = [name for name in names if name and rest.lstrip().startswith(name)]
    return max(ends, key=len, default=None) if answer in text else None
