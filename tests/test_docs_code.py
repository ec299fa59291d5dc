"""Every code block and every command line of the README and of docs/ is run, or checked as RULES below says.

Blocks of a page run in order, in one folder of their own that holds the project's ``examples``, with one set of Python
variables. A block with a title is a file of that name. What a ``text`` block shows is what the block before it has to print.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import logging
import pydoc
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_step
from lightning_step.cli import main
from lightning_step.commands import COMMANDS
from lightning_step.reports.command import REPORT_COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = {"python", "yaml", "console", "text", "json"}
LIGHTNING_COMMANDS = {"fit", "validate", "test", "predict"}

# Code that is indented instead of fenced: a file format, worked out. test_specification.py holds it against real files.
INDENTED = {"packed-format.md"}
# Programs with a test that is called otherwise, and measurements of which the results are in the repository.
TESTED_TOGETHER = {"compare": "test_benchmark_tables.py", "bench": "test_benchmarks.py"}
TESTED_TOGETHER |= dict.fromkeys(("fabric_loop", "hf_trainer"), "test_beside_the_trainer.py")
RESULTS = ROOT / "examples" / "benchmarks" / "results"
# Text that is no output of the block before it: what `make demo` prints (see tests/examples/test_demo.py), and excerpts.
SHOWN = {"README.md"}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int  # of its first line of code, from 1 on
    kind: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, fences of three backticks or more at the beginning of a line."""
    blocks, fence, start, info, lines = [], "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence:
            if line.rstrip() == fence:
                title = re.search(r'title="([^"]+)"', info)
                kind = info.split()[0] if info else ""
                blocks.append(Block(page, start, kind, title[1] if title else None, "\n".join(lines) + "\n"))
                fence, lines = "", []
            else:
                lines.append(line)
        elif match := re.match(r"(`{3,})(.*)$", line):
            fence, info, start = match[1], match[2].strip(), number + 1
        elif re.match(r"\s*(`{3,}|~{3,})", line):
            raise ValueError(f"{page.name}:{number}: a fence that is indented or of tildes, which nobody would run")
    if fence:
        raise ValueError(f"{page.name}:{start}: a fence without end")
    return blocks


def prose(page: Path) -> str:
    """The text between the blocks."""
    return re.sub(r"^(`{3,}).*?^\1 *$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of a console block; one that ends in a backslash goes on in the next."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def check_make(words: list[str]) -> None:
    """Run by hand or by .ci/run: a target may take minutes. It exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(words[1:]) <= targets, words


def check_pip(words: list[str]) -> None:
    """Needs the network. It installs this package, and extras that exist."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^([a-z]+) = ", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
    assert words[1] == "install", words
    for word in words[2:]:
        asked = re.fullmatch(r"lightning-step(?:\[([a-z,]+)\])?", word)
        assert asked, words
        assert set(filter(None, (asked[1] or "").split(","))) <= set(extras), words


def check_python(words: list[str]) -> None:
    """Trains for minutes; a test of its own runs it shorter. It is there, and knows the options."""
    script = ROOT / words[1]
    options = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words
    tested = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert f"test_{script.stem}" in tested or script.stem in TESTED_TOGETHER or RESULTS.joinpath(script.stem).is_dir(), words


def check_tensorboard(words: list[str]) -> None:
    """Serves until it is stopped. It knows the arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that TensorBoard brings along
        from tensorboard import program

        program.TensorBoard().configure(argv=words)


def check_elsewhere(words: list[str]) -> None:
    """A program of somebody else's, for a machine of another kind."""
    assert words[0] in {"trtexec"}


def check_ours(words: list[str]) -> None:
    """A form, with placeholders: the command exists and knows the options."""
    if len(words) == 1 or words[1].startswith("-"):
        assert main(["--help"]) == 0
        return
    assert words[1] in COMMANDS.keys() | REPORT_COMMANDS.keys() | LIGHTNING_COMMANDS, words
    options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    if words[1] in LIGHTNING_COMMANDS:
        assert all(option == "--config" or re.match(r"--(trainer|model|data|\w+)\b", option) for option in options), words
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as caught:
        main([words[1], "--help"])
    assert caught.value.code == 0
    assert [option for option in options if option not in said.getvalue()] == [], words


# Not run in a test, for the reason in the docstring, and checked by the function.
RULES: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "tensorboard": check_tensorboard,
    "trtexec": check_elsewhere,
}


def run_ours(words: list[str]) -> None:
    """``lightning-step`` as in a shell; a fit takes just a few steps."""
    arguments = words[1:]
    if arguments and arguments[0] in LIGHTNING_COMMANDS:
        arguments += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
        arguments += ["--trainer.max_steps=6"] if arguments[0] == "fit" else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LightningCLI 2.6 calls what newer jsonargparse deprecates
        try:
            status = main(arguments)
        except SystemExit as ended:  # as `--help` and `--print_config` do
            status = ended.code if isinstance(ended.code, int) else 1
        assert status == 0, words


class Runner:
    """Runs the blocks of one page, and remembers what the last one printed.

    Args:
        folder: Where they run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.said: str | None = None  # None: it was not run

    def run(self, block: Block) -> None:
        """Run, write or compare a block."""
        if block.title is not None:
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
        if block.kind != "text":
            self.said = None
        getattr(self, f"_{block.kind}")(block)

    def _python(self, block: Block) -> None:
        # Line numbers of the page in tracebacks.
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        with self._listening():
            exec(code, self.names)

    def _console(self, block: Block) -> None:
        for command in commands(block.text):
            words = shlex.split(command, comments=True)
            if words[0] in RULES:
                RULES[words[0]](words)
                continue
            assert words[0] == "lightning-step", f"{block}: nobody knows how to run or check {command!r}"
            with self._listening():
                run_ours(words)

    def _yaml(self, block: Block) -> None:
        if block.title is not None:
            return  # a command of the page reads it; see below
        from lightning_step.cli import SparsityCLI

        (self.folder / "block.yaml").write_text(block.text, encoding="utf-8")
        quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.fast_dev_run=true"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments: list[Any] = ["--config=block.yaml", *quiet]
            cli = SparsityCLI(WithHead, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)
            cli.trainer.fit(cli.model)

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _text(self, block: Block) -> None:
        if block.page.name in SHOWN:
            return
        assert self.said is not None, f"{block}: text that nothing before it prints"
        missing = first_missing(block.text, self.said)
        assert missing is None, f"{block}: nothing printed {missing!r} there, but:\n{self.said}"

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        heard = io.StringIO(self.said or "")
        heard.seek(0, io.SEEK_END)
        handler, logger = logging.StreamHandler(heard), logging.getLogger("lightning.pytorch")
        logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(heard):
                yield
        finally:
            logger.removeHandler(handler)
            self.said = heard.getvalue()


class WithHead(BoringModel):
    """What a YAML block without a model of its own configures: one layer to mask, and one called ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).relu())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def first_missing(expected: str, said: str) -> str | None:
    """The first expected line that does not come, in order; ``...`` stands for anything."""
    printed = iter(line.rstrip() for line in said.splitlines())
    for line in expected.splitlines():
        pattern = re.compile(re.escape(line.rstrip()).replace(r"\.\.\.", ".*"))
        if line.strip() not in ("", "...") and not any(pattern.fullmatch(other) for other in printed):
            return line
    return None


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@every_page
def test_every_fence_is_of_a_kind_that_is_run_or_checked(page: Path) -> None:
    assert [f"{block}: {block.kind!r}" for block in read_blocks(page) if block.kind not in KINDS] == []


@every_page
def test_code_is_fenced_and_not_indented(page: Path) -> None:
    # Behind an empty line; what belongs to a list is indented, too, by less than four blanks.
    indented = re.findall(r"^\n {4,}(?![-*\d ])\S.*", prose(page), re.MULTILINE)
    assert bool(indented) == (page.name in INDENTED)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@every_page
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = read_blocks(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # what the working directory is to a user
    monkeypatch.setattr(sys, "argv", ["lightning-step"])
    before = set(sys.modules)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    runner = Runner(tmp_path)
    try:
        for block in blocks:
            runner.run(block)
    finally:
        for name in set(sys.modules) - before:
            if (tmp_path / f"{name}.py").exists():  # the next page may have a file of that name
                del sys.modules[name]
    titled = [block.title for block in blocks if block.kind == "yaml" and block.title]
    used = " ".join(command for block in blocks if block.kind == "console" for command in commands(block.text))
    assert [title for title in titled if title not in used] == []


@every_page
def test_what_stands_in_the_text_exists(page: Path) -> None:
    """Commands, calls and dotted names in backticks."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        words = code.split()
        if words[0] in RULES and len(words) > 1 and words[0] != "pip":
            RULES[words[0]](shlex.split(code))
        elif words[0] == "pip":
            check_pip(shlex.split(code))
        elif words[0] == "lightning-step" and len(words) > 1:
            check_ours(shlex.split(code))
        else:
            check_expression(code)


def check_expression(code: str) -> None:
    """Calls of public names take such arguments, and dotted names of the package lead somewhere."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return
    known = {name: getattr(lightning_step, name) for name in lightning_step.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            if any(isinstance(argument, ast.Constant) and argument.value is ... for argument in node.args):
                continue
            signature = inspect.signature(known[node.func.id])
            signature.bind_partial(*node.args, **{keyword.arg: None for keyword in node.keywords if keyword.arg})
    if re.fullmatch(r"lightning_step(\.\w+)+", code):
        assert pydoc.locate(code) is not None, code


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("make nothing", AssertionError),
        ("pip install lightning-step[nothing]", AssertionError),
        ("pip install torch", AssertionError),
        ("python examples/demo.py --nothing 3", AssertionError),
        ("python examples/nothing.py", FileNotFoundError),
        ("lightning-step nothing FILE", AssertionError),
        ("lightning-step convert FILE --into dense", AssertionError),
        ("STEP(nothing=3)", TypeError),
        ("lightning_step.nothing", AssertionError),
    ],
)
def test_what_does_not_exist_is_found(code: str, error: type[Exception], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Write `{code}` for it.\n")
    with pytest.raises(error):
        test_what_stands_in_the_text_exists(page)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("```python\nraise RuntimeError('a')\n```\n", RuntimeError, "a"),
        ("```python\nimport warnings\nwarnings.warn('b')\n```\n", UserWarning, "b"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2, 'c'\n```\n", AssertionError, "c"),
        ("```python\nprint('one\\ntwo')\n```\n\n```text\ntwo\none\n```\n", AssertionError, "nothing printed 'one'"),
        ("```text\nout of nowhere\n```\n", AssertionError, "text that nothing before it prints"),
        ("```console\ncurl example.org\n```\n", AssertionError, "nobody knows how to run or check 'curl"),
        ("```console\nlightning-step verify no.safetensors\n```\n", AssertionError, "verify"),
        ('```yaml title="a.yaml"\ntrainer: {}\n```\n', AssertionError, "a.yaml"),
        ("```yaml\ntrainer: {callbacks: [{class_path: lightning_step.Nobody}]}\n```\n", SystemExit, "2"),
        ("```json\n{a}\n```\n", ValueError, "Expecting"),
        ("```python\n1\n", ValueError, "a fence without end"),
        ("- a\n\n  ```python\n  1\n  ```\n", ValueError, "indented"),
    ],
)
def test_a_block_that_is_wrong_is_found(
    text: str, error: type[BaseException], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(error, match=message):
        test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch)


def test_a_page_that_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="mine.py"\nX = 3\nprint("a 1 b")\n```\n\n```text\na ... b\n```\n\n'
        "```python\nfrom mine import X\nassert X == 3\n```\n\n```console\nlightning-step --version\n```\n\n"
        f"```text\nlightning-step {lightning_step.__version__}\n```\n"
    )
    test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch)
