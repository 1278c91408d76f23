"""Everything in this repository that is written by a program, and written again by ``make generated``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bpfrl.cli import cli
from bpfrl.commands import completing
from tools import man, manifests, metrics_page
from tools.manual import pages
from tools.reference import reference

ROOT: Final = Path(__file__).resolve().parent.parent
COMPLETIONS: Final = {"bash": "bpfrl.bash", "zsh": "_bpfrl", "fish": "bpfrl.fish"}
# Whatever else is in these is left over.
FOLDERS: Final = (Path("completions"), Path("docs/man"))


def files() -> dict[Path, str]:
    """What each generated file, by its path in the repository, is to contain."""
    commands = pages()
    return {
        **{Path("completions", name): completing.script(cli, shell) for shell, name in COMPLETIONS.items()},
        **{Path("docs/man", f"{each.slug}.1"): man.page(each, commands) for each in commands},
        Path("docs/reference.md"): reference(commands),
        manifests.MANIFESTS: manifests.manifests(),
        metrics_page.PAGE: metrics_page.page((metrics_page.ROOT / metrics_page.PAGE).read_text()),
    }


def stale() -> list[Path]:
    """The files, by their paths in the repository, that are not there, not as they should be, or left over."""
    wanted = files()
    present = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*")}
    changed = {path for path, text in wanted.items() if not (ROOT / path).exists() or (ROOT / path).read_text() != text}
    return sorted(changed | (present - wanted.keys()))


def write() -> None:
    """Make all of them so."""
    wanted = files()
    for path in stale():
        if path in wanted:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(wanted[path])
        else:
            (ROOT / path).unlink()


if __name__ == "__main__":
    write()
