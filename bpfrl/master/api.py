"""The cluster's API server, as raw HTTP.

The ``kubernetes`` client finds the server, holds the credentials and keeps them fresh. What it makes of answers is left
alone: turning a pod into its models takes 80 times as long as reading the five fields that are wanted.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config.kube_config import KubeConfigMerger

from bpfrl.errors import ApiError, ClusterError

_HOME_KUBECONFIG: Final = Path("~/.kube/config")
_CALL: Final = aiohttp.ClientTimeout(total=30)
_ERROR_STATUS: Final = 400
_LONGEST_REASON: Final = 300


class _Failure(msgspec.Struct):
    """What is read of a Kubernetes Status."""

    message: str = ""


async def connect(
    kubeconfig: Path | None, context: str | None, advice: str = "--kubeconfig names one, --manifests does without"
) -> ApiClient:
    """A client for the cluster that the arguments, the environment or the pod around this process name.

    In this order: the arguments; KUBECONFIG; the service account of the pod; ~/.kube/config.

    Args:
        kubeconfig: the file that tells it.
        context: which of its contexts; None: its current one.
        advice: what to say to who has named none.

    Raises:
        ClusterError: none of them names one.
    """
    configuration = Configuration()
    try:
        told = kubeconfig or context or os.environ.get("KUBECONFIG")
        if told or "KUBERNETES_SERVICE_HOST" not in os.environ:
            file = _files(kubeconfig)
            _check_is_there(file)
            loader = await config.load_kube_config(file, context, configuration, persist_config=False)  # type: ignore[no-untyped-call]
            _keep_fresh(configuration, loader)
        else:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        return ApiClient(configuration)
    except Exception as error:  # what the client makes of a malformed kubeconfig may be anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"no cluster to watch: {reason} ({advice})") from error


def namespace_of(kubeconfig: Path | None, context: str | None) -> str:
    """The namespace that the same kubeconfig and context name, as with kubectl: "default" where they name none.

    Raises:
        ClusterError: it cannot be told.
    """
    try:
        _check_is_there(_files(kubeconfig))
        contexts, current = config.list_kube_config_contexts(_files(kubeconfig))  # type: ignore[no-untyped-call]
        [named] = [each for each in contexts if each["name"] == context] if context else [current]
        return str(named["context"].get("namespace") or "default")
    except Exception as error:  # as above
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"no namespace: {reason} (-n names one, -A is all of them)") from error


def contexts(kubeconfig: Path | None) -> list[str]:
    """The names of a kubeconfig's contexts, or of those that the environment names.

    Raises:
        ClusterError: it is not there, or is none.
    """
    try:
        files = _files(kubeconfig)
        _check_is_there(files)
        # Not list_kube_config_contexts(): it wants a current one.
        found = KubeConfigMerger(files).config["contexts"].value  # type: ignore[no-untyped-call]
        return [str(context["name"]) for context in found]
    except Exception as error:  # what the client makes of a malformed kubeconfig may be anything
        raise ClusterError(f"no contexts: {' '.join(str(error).split()) or type(error).__name__}") from error


class Api:
    """Requests to the API server."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        timeout: aiohttp.ClientTimeout = _CALL,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, whose answer may be read while the context lasts.

        Raises:
            ApiError: no answer, not all of it, or a refusal.
        """
        headers = {"Accept": accept, "Content-Type": content_type}
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer: Any = await self._client.call_api(*request, _request_timeout=timeout)
            async with answer.response as response:
                if response.status >= _ERROR_STATUS:
                    raise await _refusal(response)
                yield response
        except config.ConfigException as error:
            raise ApiError(f"no credentials for the API server: {error}") from error
        except TimeoutError as error:
            raise ApiError("the API server does not answer") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(f"no connection to the API server: {error or type(error).__name__}") from error


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    text = await response.read()
    try:
        message = msgspec.json.decode(text, type=_Failure).message
    except msgspec.MsgspecError:
        message = ""
    wait = response.headers.get("Retry-After", "")
    return ApiError(
        f"the API server answers {response.status} {response.reason}: {message[:_LONGEST_REASON]}".rstrip(": "),
        response.status,
        float(wait) if wait.isdecimal() else 0.0,
    )


def _files(kubeconfig: Path | None) -> str:
    """The kubeconfig, or the several that are merged, as the client takes them."""
    return str(kubeconfig or os.environ.get("KUBECONFIG") or _HOME_KUBECONFIG.expanduser())


def _check_is_there(files: str) -> None:
    """The client's own error is about something else."""
    if not any(Path(file).is_file() for file in files.split(os.pathsep)):
        raise ClusterError(f"{files} is not there")


def _keep_fresh(configuration: Configuration, loader: Any) -> None:
    """Let a command's credentials be asked for again when they have expired: the client does so only for a pod's."""
    if "exec" not in loader._user:  # noqa: SLF001 - as the client's own refresh_token()
        return

    async def refresh(configuration: Configuration) -> None:
        # Without a time of its own, a credential is good until it is not.
        if hasattr(loader, "exec_plugin_expiry"):
            await loader.load_from_exec_plugin()
            configuration.api_key["BearerToken"] = loader.token

    configuration.refresh_api_key_hook = refresh  # type: ignore[assignment]
