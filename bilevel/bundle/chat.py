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
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bilevel.bundle.confined import Confined, Overrun, WorkError
from bilevel.errors import BundleError
from bilevel.folders import read_json, read_text

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


def read_sources(folder: Path, files: Collection[str] | None = None) -> ChatSources:
    """The templates of a checkpoint's or a bundle's folder.

    files: names of those that may be read, as a bundle's manifest lists them (None: all that are there). Raises BundleError for
    files that cannot be read.
    """

    def is_there(path: Path) -> bool:
        return path.is_file() and (files is None or path.relative_to(folder).as_posix() in files)

    settings = folder / "tokenizer_config.json"
    try:
        config = read_json(settings) if is_there(settings) else {}
    except ValueError as error:
        raise BundleError(f"{settings} {error}; make the bundle anew with bilevel export") from None
    if not isinstance(config, dict):
        raise BundleError(f"{settings} is no JSON object; make the bundle anew with bilevel export")
    listed = config.get("chat_template")
    named = listed if isinstance(listed, list) else [{"name": DEFAULT, "template": listed}]
    found = {
        each["name"]: each.get("template") for each in named if isinstance(each, dict) and isinstance(each.get("name"), str)
    }
    named_files = {
        file.removeprefix(_PREFIX).removesuffix(_SUFFIX): path
        for file, path in additional_files(folder).items()
        if is_there(path)
    }
    if is_there(folder / MAIN_FILE):
        named_files[DEFAULT] = folder / MAIN_FILE
    found |= {name: _read_text(path) for name, path in named_files.items()}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    special = {name: value for name, value in tokens.items() if name.endswith("_token") and isinstance(value, str)}
    templates = {name: text for name, text in found.items() if isinstance(text, str)}
    return ChatSources(templates, special)


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise BundleError(f"{path} {error}; write it anew and export again") from None


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
    """The special token that the default template writes behind an answer, None where it writes none, or takes too long.

    names: texts of the special tokens.
    """
    if DEFAULT not in sources.templates:
        return None
    question = {"source": sources.templates[DEFAULT], "special": sources.special, "names": list(names)}
    try:
        with closing(Confined("bilevel.bundle.chat:answer_turn_end")) as worker:
            return cast("str | None", worker.ask(question))
    except (Overrun, WorkError):
        return None


def answer_turn_end(_: None) -> Callable[[dict[str, Any]], str | None]:
    """What ``turn_end`` asks of a confined process."""
    return lambda asked: _turn_end(asked["source"], asked["special"], asked["names"])


def _turn_end(source: str, special: dict[str, str], names: list[str]) -> str | None:
    question, answer = "zqquestionqz", "zqanswerqz"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    template = compile_template(source, lambda message: None)
    text = template.render(messages=messages, add_generation_prompt=False, tools=None, **special)
    _, _, rest = text.rpartition(answer)
    ends = [name for name in names if name and rest.lstrip().startswith(name)]
    return max(ends, key=len, default=None) if answer in text else None
