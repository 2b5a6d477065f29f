"""
Rollouts from vLLM: engines and servers here are real (`vllm_run.py` is what is run), on whatever the machine has.

Log-probabilities of engine and trainer agree to `TOLERANCE` in nats; those of an engine whose weights are one step old
are `STALE` off at least.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config
from trl import import_utils
from trl.import_utils import is_vllm_available

from conftest import write_qwen2
from l2t_trl import L2TTrainer
from l2t_trl.checkpoints import last_complete_checkpoint
from l2t_trl.cli import main
from l2t_trl.errors import RolloutError, UserError
from l2t_trl.generation.client import RolloutClient
from l2t_trl.generation.cpu import cache_bytes
from l2t_trl.generation.weight_folder import WeightFolder
from l2t_trl.generation.worker import weight_names
from l2t_trl.scripts import serve
from trainers import make_trainer


TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
TOLERANCE, STALE = 1e-4, 1e-2
needs_vllm = pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed (make install VLLM=1)")


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory, tiny_tokenizer):
    """A model with what is hard: its lm_head is the embedding. vLLM has no CPU kernel for heads narrower than 32."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    write_qwen2(folder, tiny_tokenizer, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return folder


def run(name: str, model: Path, output: Path, launcher: tuple[str, ...] = (), **settings) -> dict:
    """Run a training of `vllm_run.py` and return its record."""
    command = [sys.executable, *launcher, str(TESTS / "vllm_run.py"), name]
    command += ["--model", str(model), "--output", str(output), "--settings", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
    return json.loads((output / "record.json").read_text())


def differences(record: dict) -> list[float]:
    return [entry["sampling/sampling_logp_difference/max"] for entry in record["logs"]]


# In the trainer's process


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"lora": True}, {"correctness_estimator": "rollout"}], ids=["full", "lora", "rollout"]
)
def test_an_engine_in_the_process_has_the_trainers_weights(tied_folder, tmp_path, settings):
    record = run("colocate", tied_folder, tmp_path, max_prompt_length=64, num_continuations=2, **settings)
    assert len(record["logs"]) == 3 and max(differences(record)) < TOLERANCE
    assert record["stale"] > STALE
    # What the engine does to the process is undone: its memory policy and the number of its threads.
    assert record["memory_policy"] == "default" and record["threads"] == 1
    for entry in record["logs"]:
        assert entry["l2t/importance_masked/frac"] == entry["l2t/importance_truncated/frac"] == 0.0
        assert ("l2t/continuation_s" in entry) == ("correctness_estimator" in settings)


@needs_vllm
@pytest.mark.slow
@pytest.mark.distributed
def test_engines_of_two_processes_have_sharded_weights(tied_folder, tmp_path):
    config = TESTS.parent / "accelerate_configs" / "cpu_zero3.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launcher += ["--main_process_port", "0"]
    record = run("colocate", tied_folder, tmp_path, tuple(launcher), per_device_train_batch_size=4)
    assert len(record["logs"]) == 3 and max(differences(record)) < TOLERANCE
    assert record["stale"] > STALE


@needs_vllm
@pytest.mark.slow
def test_the_control_has_the_same_rollouts(tmp_path):
    # The embedded model by the command, as `make train VLLM=1 METHOD=grpo` does.
    settings = {"use_vllm": "true", "max_steps": 2, "train_size": 16, "per_device_train_batch_size": 8}
    settings |= {"eval_before_after": "false", "output_dir": tmp_path / "out", "save_strategy": "steps"}
    command = [
        sys.executable,
        "-m",
        "l2t_trl.cli",
        "train",
        "--config",
        str(RECIPES / "tiny" / "grpo" / "arithmetic.yaml"),
    ]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # None of vLLM's hundreds of lines, nor a complaint of its engine at the end.
    assert "INFO" not in finished.stdout + finished.stderr and "Traceback" not in finished.stderr
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["sampling/sampling_logp_difference/max"] < TOLERANCE for entry in log] == [True, True]


def test_cache_bytes_by_hand():
    config = Qwen2Config(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    # 130 tokens take two blocks of 128: 256 tokens x 3 layers x (key and value) x 2 heads x 16 numbers x 4 bytes.
    assert cache_bytes(config, 130, 4) == 256 * 3 * 2 * 2 * 16 * 4


# A server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`l2t serve` as a process group of its own."""

    def __init__(self, model: Path, log: Path):
        self.model, self.log, self.port, self.process = model, log, free_port(), None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "l2t_trl.cli", "serve", "--model", str(self.model), "--port", str(self.port)]
        command += ["--", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**27)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, timeout: float = 240):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.exceptions.RequestException:
                pass
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self):
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()


@pytest.fixture(scope="module")
def server(tied_folder, tmp_path_factory):
    server = Server(tied_folder, tmp_path_factory.mktemp("server") / "log.txt")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def connect(server, tmp_path):
    def connect(timeout: float = 120.0) -> RolloutClient:
        folder = WeightFolder(tmp_path / "sync")
        return RolloutClient(server.url, group_port=0, connection_timeout=timeout, weight_folder=folder)

    return connect


def server_settings(server: Server, sync: Path) -> dict:
    return {
        "vllm_server_base_url": server.url,
        "weight_sync_dir": str(sync),
        "save_strategy": "steps",
        "save_steps": 100,
    }


@needs_vllm
@pytest.mark.slow
def test_a_server_has_the_trainers_weights_through_a_folder(server, tied_folder, tmp_path):
    record = run("server", tied_folder, tmp_path / "out", **server_settings(server, tmp_path / "sync"))
    assert len(record["logs"]) == 3 and max(differences(record)) < TOLERANCE
    # Only the last set of weights is kept, for a server that is started anew.
    assert [entry.name for entry in (tmp_path / "sync").iterdir()] == ["l2t-weights-3"]


PROMPT = [5, 6, 7, 8]


def greedy(client: RolloutClient) -> tuple[list[int], torch.Tensor]:
    answer = client.generate([PROMPT], max_tokens=8, temperature=0.0, logprobs=0)
    client.raise_failure()
    return answer["completion_ids"][0], torch.tensor(answer["logprobs"][0]).flatten()


@torch.no_grad()
def log_probs(model, completion: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([PROMPT + completion])).logits[0]
    return logits.log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).flatten()


def send(client: RolloutClient, model) -> None:
    client.start_weights()
    for name, value in model.named_parameters():
        client.add_weights(name, value)
    client.send_weights()


@needs_vllm
@pytest.mark.slow
def test_a_server_that_is_started_anew_gets_the_last_weights(server, connect, tied_folder, caplog):
    model = AutoModelForCausalLM.from_pretrained(tied_folder)
    client = connect()
    client.check_model(model.config, "tied")
    for scale in (1.5, 0.7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        send(client, model)
        completion, theirs = greedy(client)
        assert (theirs - log_probs(model, completion)).abs().max() < TOLERANCE
    # Weights that it cannot see are refused, and those that it has stay.
    with pytest.raises(RolloutError, match="refused: .*/nowhere holds no"):
        client._persistently(lambda: client._load(Path("/nowhere")))
    assert greedy(client)[0] == completion

    server.kill()
    server.start()
    again, theirs = greedy(client)
    assert again == completion and (theirs - log_probs(model, completion)).abs().max() < TOLERANCE
    assert "has gone" in caplog.text and "started anew" in caplog.text


@needs_vllm
@pytest.mark.slow
def test_another_model_behind_the_port_is_refused(server, connect):
    with pytest.raises(ValueError) as error:
        connect().check_model(Qwen2Config(hidden_size=96, vocab_size=7), "Qwen/other")
    assert "serves another model" in str(error.value) and "hidden_size 64 instead of 96" in str(error.value)
    assert "l2t serve --model Qwen/other" in str(error.value)


@needs_vllm
@pytest.mark.slow
def test_a_run_whose_server_stays_away_is_saved_and_goes_on(server, tied_folder, tmp_path):
    settings = server_settings(server, tmp_path / "sync")
    record = run(
        "server", tied_folder, tmp_path, kill_after=[2, server.process.pid], vllm_server_timeout=1.0, **settings
    )
    assert "within 1 seconds (vllm_server_timeout)" in record["error"]
    assert "Step 2 is saved; go on from it with --resume_from_checkpoint auto." in record["error"]
    checkpoint, incomplete = last_complete_checkpoint(str(tmp_path))
    assert checkpoint.name == "checkpoint-2" and not incomplete
    server.kill()
    server.start()
    record = run("server", tied_folder, tmp_path, resume=str(checkpoint), **settings)
    assert record["error"] is None and [entry["step"] for entry in record["logs"]] == [1, 2, 3]
    assert max(differences(record)) < TOLERANCE


def test_no_server_at_all():
    with pytest.raises(requests.exceptions.ConnectionError) as error:
        RolloutClient(f"http://127.0.0.1:{free_port()}", group_port=0, connection_timeout=0.0)
    assert "within 0 seconds (vllm_server_timeout). Start one: l2t serve" in str(error.value)


@pytest.fixture
def web_server():
    """Something else behind a port: it answers everything with an empty page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def test_something_else_behind_the_port(web_server):
    with pytest.raises(requests.exceptions.ConnectionError, match="is no vLLM server"):
        RolloutClient(web_server, group_port=0, connection_timeout=0.0)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could use NCCL")
def test_nccl_without_a_gpu_is_refused(tied_folder, tmp_path):
    with pytest.raises(ValueError, match="Set weight_sync_dir to a folder"):
        make_trainer(L2TTrainer, tied_folder, tmp_path, use_vllm=True, vllm_mode="server")


# Weights in a folder


def test_weights_survive_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("l2t_trl.generation.weight_folder._FILE_BYTES", 100)
    (tmp_path / "l2t-weights-7").mkdir()  # another run's
    (tmp_path / "mine").mkdir()
    folder = WeightFolder(tmp_path)
    tensors = {f"layer.{index}": torch.full((5, 4), float(index)) for index in range(3)}
    for scale in (1.0, 2.0):
        folder.start()
        for name, value in tensors.items():
            folder.add(name, (value * scale).T)
        last = folder.finish()
        # Until the server has the new ones, the old ones are there.
        assert len(list(tmp_path.glob("l2t-weights-*"))) == (1 if scale == 1.0 else 2)
    folder.drop_others()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["l2t-weights-2", "mine"]
    files = sorted(last.iterdir())
    assert len(files) == 2  # 80 bytes each: two to a file, then what is left
    loaded = {name: value for file in files for name, value in load_file(file).items()}
    assert loaded.keys() == tensors.keys() == set(weight_names(files))
    assert all(torch.equal(loaded[name], 2 * value.T) for name, value in tensors.items())


def test_a_full_disk_ends_rollouts_with_a_message(tmp_path, monkeypatch):
    folder = WeightFolder(tmp_path)
    folder.start()
    folder.add("a", torch.ones(3))
    good = folder.finish()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("l2t_trl.generation.weight_folder.save_file", fail)
    folder.start()
    folder.add("a", torch.zeros(3))
    with pytest.raises(RolloutError, match=r"weight_sync_dir .*No space left on device.*Make room there"):
        folder.finish()
    # Nothing half is left, and the set before is whole.
    assert list(tmp_path.iterdir()) == [good] == [folder.current]
    assert load_file(good / "model-00001.safetensors")["a"].tolist() == [1.0, 1.0, 1.0]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="weight_sync_dir .* cannot be written"):
        WeightFolder(tmp_path / "file" / "sync")


def test_a_damaged_file_is_found_before_anything_is_loaded(tmp_path):
    (tmp_path / "model-00001.safetensors").write_bytes(b"\x10" + b"\x00" * 20)
    with pytest.raises(ValueError, match="model-00001.safetensors cannot be read"):
        weight_names(tmp_path.iterdir())


# The command


def parsed(*argv: str):
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--model", "folder", *argv])


def test_the_servers_command_line():
    command, environment = serve.server_command(parsed("--port", "81", "--", "--seed", "3"), "folder", has_gpu=True)
    text = " ".join(command)
    assert "vllm.entrypoints.openai.api_server --model folder --host 127.0.0.1 --port 81" in text
    assert "--logprobs-mode processed_logprobs --max-logprobs -1" in text
    assert '--weight-transfer-config {"backend": "nccl"}' in text and command[-2:] == ["--seed", "3"]
    assert "--dtype" not in text and "--enforce-eager" not in text
    assert environment == {"VLLM_SERVER_DEV_MODE": "1"}


def test_the_servers_command_line_without_a_gpu(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")  # the user's own
    command, environment = serve.server_command(parsed(), "folder", has_gpu=False)
    text = " ".join(command)
    assert "--enforce-eager" in text and "--dtype float32" in text and "nccl" not in text
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment and environment["VLLM_SERVER_DEV_MODE"] == "1"
    command, _ = serve.server_command(parsed("--dtype", "bfloat16"), "folder", has_gpu=False)
    assert "--dtype bfloat16" in " ".join(command)


def test_serving_needs_vllm(monkeypatch, capsys):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    assert main(["serve", "--model", "tiny"]) == 2
    assert "vLLM is not installed: make install VLLM=1" in capsys.readouterr().err


def test_failed_rollouts_are_one_message(capsys):
    from l2t_trl.cli import report_errors

    def fail():
        raise RolloutError("The server has gone.")

    assert report_errors("train", fail) == 1
    assert capsys.readouterr().err == "l2t train: error: The server has gone.\n"
    assert not issubclass(RolloutError, UserError)
