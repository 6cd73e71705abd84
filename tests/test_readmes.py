"""The READMEs say what is there: links lead somewhere, commands, options, targets and programs exist, README is one page."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bilevel.runtime.cli.main import COMMANDS, main
from tests import ROOT

READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in READMES]
MOST_WORDS = 1100
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def prose(text: str) -> str:
    """Markdown without its fenced code."""
    return FENCE.sub("", text)


def commands(text: str) -> list[str]:
    """Every line of fenced code and every code span, without comments, variables in front, and a prompt's ``$``."""
    lines = [line for fence in FENCE.findall(text) for line in fence.splitlines()]
    spans = [" ".join(span.split()) for span in SPAN.findall(prose(text))]
    return [re.sub(r"^(\$ )?(\w+=\S+ )*", "", re.sub(r"\s+#.*", "", line.strip())) for line in [*lines, *spans]]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a file's headings."""
    names: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in names:
            number += 1
        names.add(name)
    return names


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a file in ``folder`` that lead to no file, or to no heading of one."""
    broken = []
    for groups in LINK.findall(SPAN.sub("", prose(text))):
        target = "".join(groups)
        if re.match(r"[a-z]+:", target):
            continue  # another site's
        name, _, anchor = target.partition("#")
        path = folder / name
        headings = text if not name else path.read_text(encoding="utf-8") if anchor and path.is_file() else ""
        if not path.exists() or not path.resolve().is_relative_to(ROOT) or (anchor and anchor not in anchors(headings)):
            broken.append(target)
    return broken


@functools.cache
def help_of(command: str) -> str:
    """What ``bilevel COMMAND --help`` prints; "" names no command."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return output.getvalue()


def wrong_commands(text: str) -> list[str]:
    """``bilevel`` command lines whose command, sub-command or option does not exist."""
    wrong = []
    for line in commands(text):
        if not line.startswith("bilevel "):
            continue
        words = line.split()[1:]
        command = "" if words[0].startswith("-") else words[0]
        if command and command not in COMMANDS:
            wrong.append(line)
            continue
        text_of_help = help_of(command)
        choices = re.search(r"^  \{([\w,]+)\} ", text_of_help, re.MULTILINE)  # a sub-command, as argparse lists it
        is_unknown = choices is not None and len(words) > 1 and words[1] not in choices[1].split(",")
        if is_unknown or not set(OPTION.findall(line)) <= set(OPTION.findall(text_of_help)):
            wrong.append(line)
    return wrong


def wrong_targets(text: str) -> list[str]:
    """``make`` targets that the Makefile does not have."""
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [line.split()[1:] for line in commands(text) if line.startswith("make ")]
    return [word for words in lines for word in words if re.fullmatch(r"[a-z][a-z-]*", word) and word not in known]


def wrong_programs(text: str) -> list[str]:
    """Programs and test files that are run but do not exist, and options of programs that their source does not name."""
    wrong = []
    for line in commands(text):
        if run := re.match(r"(?:\S*/)?python3? (examples/\S+\.py)(.*)", line):
            path = ROOT / run[1]
            source = path.read_text(encoding="utf-8") if path.is_file() else ""
            if not source or any(f'"{option}"' not in source for option in OPTION.findall(run[2])):
                wrong.append(line)
        elif run := re.match(r"(?:\S*/python -m )?pytest (\S+)", line):
            wrong += [] if (ROOT / run[1]).exists() else [line]
        elif run := re.match(r"(?:\S*/)?python3? -m bilevel\.(\S+)", line):
            wrong += [] if (ROOT / "bilevel" / f"{run[1].replace('.', '/')}.py").is_file() else [line]
    return wrong


def wrong_files(text: str, folder: Path) -> list[str]:
    """Python files that a code span names by a path, from the root or from the README's folder, but that do not exist."""
    spans = [span for span in SPAN.findall(prose(text)) if re.fullmatch(r"[\w./]+/\w+\.py", span)]
    return [span for span in spans if not any((place / span).is_file() for place in (ROOT, folder))]


def wrong_extras(text: str) -> list[str]:
    """Extras that a ``pip install`` asks for and pyproject.toml does not have."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = [
        extras for line in commands(text) if line.startswith("pip install") for extras in re.findall(r"\[([\w,]+)\]", line)
    ]
    return [extra for extras in asked for extra in extras.split(",") if f"\n{extra} = [" not in pyproject]


@pytest.fixture(params=READMES, ids=NAMES)
def readme(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_folder_has_its_readme() -> None:
    assert {f"{folder}/README.md" for folder in ("bilevel", "export", "plugins", "runtime", "examples", "tests")} < set(NAMES)


def test_links_lead_somewhere(readme: Path) -> None:
    assert broken_links(readme.read_text(encoding="utf-8"), readme.parent) == []


def test_what_can_be_typed_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert wrong_commands(text) == []
    assert wrong_targets(text) == []
    assert wrong_programs(text) == []
    assert wrong_files(text, readme.parent) == []
    assert wrong_extras(text) == []


def test_every_command_is_in_a_readme_and_has_a_help() -> None:
    lines = [line for path in READMES for line in commands(path.read_text(encoding="utf-8"))]
    for command in COMMANDS:
        assert any(line.startswith(f"bilevel {command}") for line in lines), f"no README shows bilevel {command}"
        assert f"usage: bilevel {command}" in help_of(command)


def test_readme_is_one_page() -> None:
    """Everything counts: prose, code, tables."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_readme_says_that_no_gpu_has_run_the_gpu_path() -> None:
    """On the first page, in its own words, for as long as it is so: tests/README.md holds the evidence."""
    assert "No GPU has run the GPU path." in (ROOT / "README.md").read_text(encoding="utf-8")
    evidence = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert "| any kernel or engine on a GPU, `make gpu-test`, `make gpu-bench`, any Jetson | not executed | | |" in evidence


def test_picture_needs_nothing_from_elsewhere() -> None:
    path = ROOT / "examples" / "two_levels.svg"
    assert f'src="{path.relative_to(ROOT).as_posix()}"' in (ROOT / "README.md").read_text(encoding="utf-8")
    picture = path.read_text(encoding="utf-8")
    elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()}
    assert not elements & {"script", "image", "foreignObject", "use"} and {"title", "desc", "style"} <= elements
    assert "href" not in picture and "@import" not in picture and "prefers-color-scheme: dark" in picture
    assert set(re.findall(r"url\(([^)]*)\)", picture)) == {"#arc-tip", "#down-tip"}


def test_wrong_links_are_noticed() -> None:
    text = "# Here `it` is\n[a](README.md) [b](#here-it-is) [c](none.md) [d](README.md#none) [e](../../etc) `[f](none)`"
    assert broken_links(text, ROOT) == ["none.md", "README.md#none", "../../etc"]
    assert broken_links('<img src="none.svg"> [g](https://example.org/none)\n```\n[h](none)\n```\n', ROOT) == ["none.svg"]
    assert anchors("# A b, c!\n## A b, c!\n```\n# no heading\n```\n") == {"a-b-c", "a-b-c-1"}


@pytest.mark.parametrize(
    "line, is_right",
    [
        ("bilevel run my-bundle 'a -- b' --max-tokens 3", True),
        ("A=b bilevel kernels build --geometry my-bundle   # --none", True),
        ("bilevel --version", True),
        ("bilevel kernels make --geometry my-bundle", False),
        ("bilevel run my-bundle --max-token 3", False),
        ("bilevel walk my-bundle", False),
        ("make -j2 train gpu-bench GPU_PYTHON=none", True),
        ("make tea", False),
        ("python examples/train.py out --steps 3", True),
        ("python examples/train.py out --step 3", False),
        ("python examples/none.py", False),
        (".venv/bin/python -m pytest tests/test_readmes.py", True),
        ("pytest tests/none.py", False),
        ("python -m bilevel.plugins.library.sweep", True),
        ("python -m bilevel.plugins.none", False),
        ("pip install '.[cpu,export]' numpy", True),
        ("pip install '.[cpu,none]'", False),
    ],
)
def test_what_cannot_be_typed_is_noticed(line: str, is_right: bool) -> None:
    for text in (f"```\n{line}\n```\n", f"Type `{line.partition('   #')[0]}` here."):
        wrong = [*wrong_commands(text), *wrong_targets(text), *wrong_programs(text), *wrong_extras(text)]
        assert (not wrong) == is_right, wrong


def test_wrong_files_are_noticed() -> None:
    assert wrong_files("`export/check/judge.py`, `check/judge.py`, `check/none.py`", ROOT / "export") == ["check/none.py"]
