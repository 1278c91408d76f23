from __future__ import annotations

import base64
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from cryptography import x509

from bpfrl.cli import cli
from bpfrl.rpc import tls

pytestmark = pytest.mark.usefixtures("logs")


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(cli, ["certs", *map(str, arguments)], prog_name="bpfrl")


def success(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def failure(result: Result, code: int) -> str:
    """The one line that a failed command has said, without its end."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.isprintable(), result.stderr
    assert line.startswith("bpfrl")
    return line


def lines(folder: Path, authority: str, *roles: str) -> str:
    told = {"ca.crt": authority} | {
        f"{name}/tls.crt": role for name, role in zip(("node", "master", "operator"), roles, strict=True)
    }
    return "".join(f"{folder}/{name} {what}\n" for name, what in told.items())


@pytest.mark.parametrize("command", [(), ("init",), ("secrets",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    text = success(run(*command, "--help"))
    assert text.startswith(f"Usage: bpfrl certs {' '.join(command)}".rstrip())
    assert max(map(len, text.splitlines())) <= 100


def test_init_tells_what_was_made_and_what_was_kept(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    assert success(run("init", folder)) == lines(folder, "made", "made", "made", "made")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert success(run("init", folder)) == lines(folder, "kept", "kept", "kept", "kept")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "node" / "tls.crt").unlink()
    assert success(run("init", folder)) == lines(folder, "kept", "made", "kept", "kept")
    assert success(run("init", "--renew", folder)) == lines(folder, "kept", "made", "made", "made")
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(("options", "days"), [((), 365), (("--days", "1"), 1), (("--days", "36500"), 36_500)])
def test_certificates_are_good_as_long_as_asked_for(tmp_path: Path, options: tuple[str, ...], days: int) -> None:
    success(run("init", *options, tmp_path))
    for name, role in (("node", tls.NODE), ("master", tls.MASTER), ("operator", tls.OPERATOR)):
        pem = tls.Certificates(tmp_path / name, role).current().certificate
        certificate = x509.load_pem_x509_certificate(pem)
        assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == days


def test_secrets_are_for_kubectl_apply(tmp_path: Path) -> None:
    success(run("init", tmp_path))
    for options, namespace in (((), "bpfrl"), (("-n", "limits"), "limits"), (("--namespace", "x"), "x")):
        text = success(run("secrets", *options, tmp_path))
        documents = list(yaml.safe_load_all(text))
        named = [(document["kind"], *document["metadata"].values()) for document in documents]
        assert named == [("Secret", "bpfrl-node", namespace), ("Secret", "bpfrl-master", namespace)]
        for document, name in zip(documents, ("node", "master"), strict=True):
            key = base64.b64decode(document["data"]["tls.key"])
            assert key == (tmp_path / name / "tls.key").read_bytes()
        assert (tmp_path / "ca.key").read_text().splitlines()[1] not in text
        assert base64.b64encode((tmp_path / "ca.key").read_bytes()).decode() not in text


USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "init: nowhere": (("init",), "Missing argument 'DIR'"),
    "init: no days": (("init", "--days", "0", "x"), "'--days': 0 is not in the range 1<=x<=36500"),
    "init: too many days": (("init", "--days", "36501", "x"), "36501 is not in the range"),
    "init: not a number": (("init", "--days", "year", "x"), "'year' is not a valid integer"),
    "init: two places": (("init", "x", "y"), "unexpected extra argument"),
    "secrets: nowhere": (("secrets",), "Missing argument 'DIR'"),
    "secrets: no namespace": (("secrets", "x", "-n"), "'-n' requires an argument"),
    "no such command": (("show",), "No such command 'show'"),
}


@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert advice in failure(run(*arguments), 2)
    assert list(tmp_path.iterdir()) == []


def test_init_in_a_place_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "pki", "Not a directory")):
        assert failure(run("init", place), 1) == f"bpfrl: {place}: {reason}"


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no key": (lambda folder: (folder / "ca.key").unlink(), "ca.key: No such file or directory"),
    "an empty certificate": (lambda folder: (folder / "ca.crt").write_bytes(b""), "the authority's files are damaged"),
    "another key": (
        lambda folder: (folder / "ca.key").write_bytes((folder / "node" / "tls.key").read_bytes()),
        "ca.key is not the key of ca.crt",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_init_leaves_a_damaged_authority_and_says_so_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    success(run("init", tmp_path))
    spoil(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = failure(run("init", tmp_path), 1)
    assert str(tmp_path) in line
    assert reason in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_secrets_of_nothing_is_one_line_that_says_how_to_make_some(tmp_path: Path) -> None:
    line = failure(run("secrets", tmp_path), 1)
    told = f"bpfrl: {tmp_path}/node/ca.crt: No such file or directory: bpfrl certs init DIR makes certificates"
    assert line == told
