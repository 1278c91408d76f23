"""What is generated from node.proto is what stands beside it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bpfrl

ROOT = Path(bpfrl.__file__).parents[1]
SOURCE = Path("bpfrl", "rpc", "node.proto")
GENERATED = ("node_pb2.py", "node_pb2.pyi", "node_pb2_grpc.py", "node_pb2_grpc.pyi")


def recipe() -> list[str]:
    """The command line behind make proto, without what the shell and make put in front."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"^proto:.*\n\t.*?(-m grpc_tools\.protoc .*)$", text, re.MULTILINE)
    assert found
    return shlex.split(found[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where make proto has written, had it been run elsewhere."""
    folder = tmp_path_factory.mktemp("proto")
    # The compiler takes names from where its source lies, so only the outputs go elsewhere.
    outputs = [re.sub(r"(_out=(?:quiet:)?)\.$", rf"\g<1>{folder}", argument) for argument in recipe()]
    assert sum(str(folder) in argument for argument in outputs) == len(GENERATED)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, *outputs], cwd=ROOT, env=environment, check=True, timeout=60)
    return folder


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_code_is_current(made: Path, name: str) -> None:
    own = (ROOT / SOURCE).with_name(name)
    assert (made / SOURCE).with_name(name).read_text() == own.read_text(), "node.proto has changed: make proto"


def test_nothing_else_is_generated(made: Path) -> None:
    assert sorted(path.name for path in made.rglob("*") if path.is_file()) == sorted(GENERATED)
