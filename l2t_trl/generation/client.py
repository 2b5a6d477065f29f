"""TRL's client of a vLLM server, which also looks at what it is connected to, and outlives the server's restart."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient

from l2t_trl.errors import RolloutError
from l2t_trl.generation.weight_folder import WeightFolder
from l2t_trl.generation.worker import MODEL_SIZES


logger = logging.getLogger(__name__)

_CONNECTIONS = 64  # as many as TRL keeps
_ENGINE_DEAD = 503


class ServerError(RuntimeError):
    """The server has answered, with an error."""


class RolloutClient(VLLMClient):
    """
    Client of a vLLM server that `l2t serve` has started.

    Where weights go through a folder, a server that has gone is waited for and given the last weights again. What
    cannot be mended so within `connection_timeout` becomes a [`RolloutError`].

    Args:
        base_url (`str`): e.g. `http://localhost:8000`.
        group_port (`int`): port of the NCCL group.
        connection_timeout (`float`): seconds that the server may take to come up, or to come back.
        weight_folder ([`WeightFolder`], *optional*): where weights go instead of by NCCL.

    Raises:
        ConnectionError: if no vLLM server answers within that time.
    """

    def __init__(
        self, base_url: str, group_port: int, connection_timeout: float, weight_folder: WeightFolder | None = None
    ):
        self.timeout, self.weight_folder = connection_timeout, weight_folder
        self._version: str | None = None  # of the weights that the server has been given
        self._failure: RolloutError | None = None
        super().__init__(base_url=base_url, group_port=group_port, connection_timeout=connection_timeout)
        # Without TRL's retries: here a server that came back is first given its weights.
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0):
        """
        Wait until the server answers.

        Raises:
            ConnectionError: if it does not within `total_timeout` seconds, or something else answers.
        """
        deadline, has_told = time.monotonic() + total_timeout, False
        while (status := self._health()) in (None, _ENGINE_DEAD):
            if time.monotonic() >= deadline:
                raise requests.exceptions.ConnectionError(
                    f"No vLLM server answered at {self.base_url} within {total_timeout:.0f} seconds "
                    "(vllm_server_timeout). Start one: l2t serve --model MODEL --port PORT."
                )
            if not has_told:
                logger.warning("Waiting for a vLLM server at %s, up to %.0f s ...", self.base_url, total_timeout)
                has_told = True
            time.sleep(retry_interval)
        if status != requests.codes.ok or not self._lists_models():
            raise requests.exceptions.ConnectionError(
                f"What answers at {self.base_url} is no vLLM server. Set vllm_server_base_url, or vllm_server_host and "
                "vllm_server_port."
            )

    def _health(self) -> int | None:
        """Status code of the server's health, `None` if nothing answers."""
        try:
            return requests.get(f"{self.base_url}/health", timeout=10).status_code
        except requests.exceptions.RequestException:
            return None

    def _lists_models(self) -> bool:
        try:
            return bool(requests.get(f"{self.base_url}/v1/models", timeout=10).json()["data"])
        except (requests.exceptions.RequestException, ValueError, LookupError, TypeError):
            return False

    def check_model(self, config, name: str) -> None:
        """
        Check that the server holds the trainer's model and can take its weights.

        Args:
            config: the trainer's text configuration.
            name (`str`): the trainer's model.

        Raises:
            ValueError: if not.
        """
        start_it = f"Start it with `l2t serve --model {name}`"
        try:
            info = self.get_server_info()
        except RuntimeError as error:
            raise ValueError(f"{error} {start_it}, which does so.") from error
        self._dtype = getattr(torch, str(info["model_config"]["dtype"]).removeprefix("torch."))
        if not info["parallel_config"].get("worker_extension_cls"):
            if self.weight_folder is not None:
                raise ValueError(
                    f"The vLLM server at {self.base_url} was not started to load weights from a folder. {start_it}."
                )
            return  # started by hand for NCCL, which TRL checks
        theirs = self._call_workers("describe_model")[0]
        ours = {size: getattr(config, size, None) for size in MODEL_SIZES}
        if theirs != ours:
            differences = [
                f"{size} {theirs.get(size)} instead of {value}"
                for size, value in ours.items()
                if theirs.get(size) != value
            ]
            raise ValueError(
                f"The vLLM server at {self.base_url} serves another model, {self.model}: {', '.join(differences)}. "
                f"{start_it}, or set another vllm_server_port."
            )

    def check_alive(self) -> None:
        """
        Check that the server still answers.

        Raises:
            RolloutError: if not.
        """
        self._persistently(lambda: self._get(f"{self.base_url}/v1/models"))

    def start_weights(self) -> None:
        """Begin to take a new set of weights."""
        self.weight_folder.start()

    def add_weights(self, name: str, value: torch.Tensor) -> None:
        """Take one tensor, in the server's precision: it would convert it in any case."""
        self.weight_folder.add(name, value.to(self._dtype) if value.is_floating_point() else value)

    def send_weights(self) -> None:
        """
        Let the server load the set of weights.

        Raises:
            RolloutError: if it cannot, or does not answer within the time-out.
        """
        folder = self.weight_folder.finish()
        self._persistently(lambda: self._load(folder))
        self.weight_folder.drop_others()

    def _load(self, folder: Path) -> None:
        self._call_workers("load_weight_folder", str(folder))
        self.reset_prefix_cache()
        self._post(f"{self.base_url}/update_weight_version", json={"new_version": folder.name})
        self._version = folder.name

    def generate(self, *args, **kwargs) -> dict:
        """As TRL's; a failure is kept for [`raise_failure`], since other ranks wait for what this returns."""
        generate = super().generate

        def generate_with_current_weights() -> dict:
            if self._version is not None and self._version != self._held_version():
                logger.warning("The vLLM server at %s has been started anew: it gets the weights.", self.base_url)
                self._load(self.weight_folder.current)
            return generate(*args, **kwargs)

        try:
            return self._persistently(generate_with_current_weights)
        except RolloutError as error:
            self._failure = error
            return {"prompt_ids": [], "completion_ids": [], "logprobs": None, "logprob_token_ids": None}

    def raise_failure(self) -> None:
        """Raise what the last generation has failed with, if anything."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _held_version(self) -> str:
        return self._get(f"{self.base_url}/weight_info")["weight_version"]

    def _persistently(self, request: Callable[[], Any]) -> Any:
        """What `request` returns; if the server has gone, it is waited for and asked once more."""
        try:
            return request()
        except (requests.exceptions.RequestException, ServerError) as error:
            failure = error
        if isinstance(failure, ServerError) and self._health() == requests.codes.ok:
            raise RolloutError(f"The vLLM server at {self.base_url} refused: {failure}") from failure
        if self.weight_folder is None:
            raise RolloutError(
                f"The vLLM server at {self.base_url} has gone ({failure}). Start it again; with NCCL the trainer, too, has "
                "to be started anew."
            ) from failure
        logger.warning("The vLLM server at %s has gone.", self.base_url)
        try:
            self.check_server(self.timeout)
            return request()
        except (requests.exceptions.RequestException, ServerError) as error:
            raise RolloutError(f"The vLLM server has gone. {error}") from error

    def _call_workers(self, method: str, *args: str) -> list:
        return self._post(f"{self.base_url}/collective_rpc", json={"method": method, "args": list(args)})["results"]

    def _get(self, url: str, **kwargs) -> dict:
        return _answer(self.session.get(url, **kwargs))

    def _post(self, url: str, **kwargs) -> dict:
        return _answer(self.session.post(url, **kwargs))


def _answer(response: requests.Response) -> dict:
    if response.status_code == requests.codes.ok:
        return response.json() if response.content else {}
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text
    raise ServerError(f"{message} (status {response.status_code})")
