from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from bpfrl.cli import cli
from bpfrl.master.annotations import KEYS
from tools import generated, man, manual
from tools.manual import EXAMPLES, EXIT_STATUS, FILES, VARIABLES, Page

PAGES = manual.pages()
SOURCES = generated.ROOT / "bpfrl"
READS_ENVIRONMENT = re.compile(r"""environ(?:\.get\(|\[)"(\w+)"|"(\w+)" (?:not )?in os\.environ""")


def rendered(page: Path, width: int = 200) -> str:
    """A page as man shows it at a terminal of some columns, without bold letters."""
    command = ["groff", "-man", "-Tutf8", "-ww", f"-rLL={width}n", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""
    return re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)


def test_what_is_generated_is_as_it_would_be_written_now() -> None:
    assert generated.stale() == [], "run: make generated"


def test_what_is_stale_missing_or_left_over_is_told_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generated.files()
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    assert generated.stale() == sorted(wanted)
    generated.write()
    assert generated.stale() == []

    stale, missing, left = Path("completions/bpfrl.bash"), Path("docs/reference.md"), Path("docs/man/bpfrl-old.1")
    (tmp_path / stale).write_text("complete -F old bpfrl\n")
    (tmp_path / missing).unlink()
    (tmp_path / left).touch()
    assert generated.stale() == [stale, left, missing]
    generated.write()
    assert {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == wanted


def test_every_command_has_a_page() -> None:
    def count(command: click.Command) -> int:
        return 1 + sum(map(count, command.commands.values())) if isinstance(command, click.Group) else 1

    assert len(PAGES) == count(cli)
    assert [page.name for page in PAGES[:3]] == ["bpfrl", "bpfrl attach", "bpfrl certs"]
    assert "bpfrl certs init" in {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.slug)
def test_a_page_is_drawn_without_a_warning_and_says_everything(page: Page) -> None:
    path = generated.ROOT / "docs" / "man" / f"{page.slug}.1"
    rendered(path, 78)
    text = rendered(path)
    headings = [line for line in text.splitlines() if re.fullmatch(r"[A-Z][A-Z ]+", line)]
    expected = ["NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS", EXIT_STATUS, "ENVIRONMENT", "FILES", EXAMPLES]
    assert [heading for heading in headings if heading in expected] == [
        heading
        for heading in expected
        if not (heading == "COMMANDS" and not page.commands)
        and not (heading == EXAMPLES and EXAMPLES not in page.sections)
    ]
    assert set(headings) == {*headings, *page.sections}
    assert headings[-1] == "SEE ALSO"
    for option in page.options:
        assert re.search(rf"^ +{re.escape(option.names)}(?: |$)", text, re.MULTILINE), option.names
        assert " ".join(option.full_text.split()) in " ".join(text.split())
    # What is to be copied stays what a shell takes: no typographer's hyphens and quotes.
    for heading, section in page.sections.items():
        assert heading == EXIT_STATUS or all(line in text for line in section.splitlines())


def test_what_roff_has_a_meaning_for_is_drawn_as_it_stands(tmp_path: Path) -> None:
    hard = r""".start 'quoted' -x --long-one `tick` ^ ~ \n C:\dir … ends."""
    page = Page(
        "bpfrl",
        "[OPTIONS]",
        hard,
        [manual.Block(hard), manual.Block(f"{hard}\n'{hard}", literal=True)],
        {EXIT_STATUS: "0 x"},
        [],
    )
    path = tmp_path / "bpfrl.1"
    path.write_text(man.page(page, [page]))
    text = rendered(path)
    assert text.count(hard) == 4
    assert f"'{hard}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.slug)
def test_every_command_shows_how_it_is_typed(page: Page) -> None:
    as_set = [*page.sections.values(), *(block.text for block in page.description if block.literal)]
    assert page.commands or any(re.search(rf"{page.name}\b", text) for text in as_set)


def test_every_variable_of_an_option_is_in_its_help_too() -> None:
    def told(command: click.Command) -> None:
        for option in command.params:
            if isinstance(option, click.Option):
                mentioned = re.findall(r"\[env: (\w+)\]", option.help or "")
                assert mentioned == ([option.envvar] if option.envvar else []), option.name
        for below in command.commands.values() if isinstance(command, click.Group) else ():
            told(below)

    told(cli)


def test_every_variable_that_the_product_reads_is_told_of() -> None:
    found = {
        name
        for source in SOURCES.rglob("*.py")
        for names in READS_ENVIRONMENT.findall(source.read_text())
        for name in names
        if name
    }
    assert {"KUBECONFIG", "XDG_CACHE_HOME"} <= found
    assert found <= {each.name for each in VARIABLES}


def test_a_fact_is_told_where_it_matters() -> None:
    pages = {page.name: page for page in PAGES}
    kubeconfig = next(each for each in FILES if each.name == "~/.kube/config")
    told = [name for name, page in pages.items() if page.concerns(kubeconfig)]
    assert {"bpfrl", "bpfrl serve-master"} <= set(told)
    assert {"bpfrl attach", "bpfrl certs init"}.isdisjoint(told)
    # Each has to do with something.
    for fact in (*FILES, *VARIABLES):
        assert any(page.concerns(fact) for page in PAGES[1:]), fact.name


def test_the_reference_has_every_command_option_and_key() -> None:
    text = (generated.ROOT / "docs" / "reference.md").read_text()
    for page in PAGES:
        assert f"\n### {page.name}\n" in text
        names = [option.names.replace("|", r"\|") for option in page.options if option.name != "--help"]
        assert [name for name in names if f"| `{name}` | " not in text] == []
    for key in KEYS:
        assert f"| {key.kind} | `{key.name}` | `{key.example}` | {key.meaning} |" in text


def test_an_option_is_told_of_with_all_that_click_knows() -> None:
    @click.command()
    @click.option("-n", "--number", type=click.IntRange(1, 5), default=3, show_default=True, help="How many.")
    @click.option("--least", type=click.IntRange(1), help="At least. [default: by rate]")
    @click.option("--most", type=click.FloatRange(max=9), required=True, help="At most.")
    @click.option("--place", envvar="PLACE", help="Where. [env: PLACE]")
    @click.option("-v", "--verbose", count=True, help="More.")
    def command() -> None:
        """One."""

    context = click.Context(command)
    options = {each.name: manual._option(each, context) for each in command.params if isinstance(each, click.Option)}
    assert options["number"].full_text == "How many. Range: 1 to 5. Default: 3."
    assert options["least"].full_text == "At least. Range: 1 or more. Default: by rate."
    assert options["most"].full_text == "At most. Required. Range: 9 at most."
    assert options["place"].full_text == "Where. Environment: PLACE."
    assert (options["verbose"].names, options["verbose"].full_text) == ("-v, --verbose", "More.")
    assert [each.name for each in options.values()] == ["--number", "--least", "--most", "--place", "--verbose"]


def test_a_hidden_option_is_not_forgotten_silently() -> None:
    hidden = click.Option(["--secret"], hidden=True, help="Nothing.")
    with pytest.raises(ValueError, match="secret is hidden"):
        manual._option(hidden, click.Context(click.Command("x")))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_what_their_shells_take(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not there")
    script = generated.ROOT / "completions" / generated.COMPLETIONS[shell]
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
