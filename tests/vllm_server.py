"""`vllm serve` on loopback for the time of a block, and a random model that it serves and that can spell any JSON.

The server is a process group of its own, which is ended by its id. What it prints goes to a file, whose end is shown
where the server did not start or did not last.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from trace_rl.workers import environment

MODEL = "tiny"
"""As the server names its model."""
MAX_MODEL_LEN = 8192
START_S = 240.0
"""It takes 20 s on two free cores."""
_COMPACT = '{"backend": "xgrammar", "disable_any_whitespace": true}'
"""Where the grammar allows blanks between the parts of JSON, a weak model may write nothing else."""


def write_random_model(folder: Path) -> None:
    """A tiny random Qwen3 with the byte-level tokenizer and the chat template of the embedded task."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from trace_rl.tasks.arithmetic import base_model_path

    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


class VllmServer:
    """`with VllmServer(model, log, key) as server:` serves a model at `server.base_url` to who knows the key.

    Args:
        model: folder in Hugging Face format.
        log: file that its output is written to.

    Raises:
        AssertionError: it was not ready within START_S, or had died by the end of the block; holds the end of its log.
    """

    def __init__(self, model: Path, log: Path, key: str) -> None:
        self._log = log
        self._port = _free_port()
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self._port)]
        self._command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
        self._command += ["--max-num-seqs", "32", "--gpu-memory-utilization", "0.1"]
        self._command += ["--structured-outputs-config", _COMPACT]
        self._environment = {**os.environ, **environment.variables(1), "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": key}

    def __enter__(self) -> VllmServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = self._process.poll()
        self._stop()
        assert status is None, f"vllm serve ended with {status}:\n{self._tail()}"

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            status = self._process.poll()
            assert status is None, f"vllm serve ended with {status}:\n{self._tail()}"
            assert time.monotonic() < deadline, f"vllm serve was not ready within {START_S:g} s:\n{self._tail()}"
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _stop(self) -> None:
        """End the server and what it has started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(15)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
