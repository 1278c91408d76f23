"""deploy/Dockerfile, which no test here can build: what can be said of it without."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def test_hadolint_has_nothing_to_say_of_it() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    patterns = IGNORED.read_text().split()
    assert patterns[0] == "*"
    assert {f"!{source}" for source in copied} == {pattern for pattern in patterns if pattern.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    # Nothing that was made here goes into the image.
    assert any(fnmatch.fnmatch("bpfrl/bpf/compiled", pattern) for pattern in patterns[1:])


def test_both_stages_are_of_the_release_whose_interpreter_bcc_is_for() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert bases == ["debian:12-slim"] * 2


def test_the_compiler_stays_in_its_stage() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "apt-get install" in rest]
    assert len(installs) == 2
    assert "clang" in installs[0]
    assert not re.search(r"clang|llvm|libbpf-dev|pip", installs[1])
    assert "python3-bpfcc" in installs[1]


def test_it_runs_the_command_as_nobody() -> None:
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["bpfrl"]'
    assert last["USER"] == "65532:65532"
