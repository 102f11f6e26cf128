"""Two servers side by side, dense and under a plan: the same conversations, and the memory that each takes.

    .venv-vllm/bin/python vllm-plugin/benchmarks/two_servers.py --plan profiles/smollm2-135m-instruct/quarter.json

Two conversations at once, streamed by OpenAI's client, for 30 turns. After every fifth turn a line says how long they
are, the server's resident memory, and the largest share of its KV pool that was in use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS = (
    "Tell me about the sea and the ships that cross it, and what sailors eat. " * 6,
    "What is the capital of France, and which rivers does it lie on? " * 9,
)
EVERY = 5
"""Turns between lines."""


def main() -> None:
    """Serve, converse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--new", type=int, default=12, help="tokens per answer at most")
    parser.add_argument("--pool", type=int, default=2**28, help="bytes of the KV pool")
    parser.add_argument("--output", type=Path, help="folder for the servers' logs and the conversations")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        from moa_search.modeling.source import find_source

        source = find_source(options.model).name
        dense = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            source,
            "--served-model-name",
            "it",
        ]
        planned = [sys.executable, "-c", "from moa_search.cli.serve import main; main()", options.model]
        planned += ["--plan", options.plan, "--served-model-name", "it"]
        print("| server | turn | tokens of both conversations | resident MiB | most of the pool in use |")
        print("|---|---|---|---|---|")
        for name, command in (("dense", dense), ("planned", planned)):
            with served(command, folder / f"{name}.log", options.pool) as (address, process):
                talks = converse(address, process, name, options)
            (folder / f"{name}.json").write_text(json.dumps(talks, indent=1))


def converse(address: str, process: subprocess.Popen[bytes], name: str, options: argparse.Namespace) -> list[Any]:
    """Both conversations, turn by turn; prints the lines."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    talks: list[list[Any]] = [[], []]
    tokens = [0, 0]
    most = 0.0

    def ask(number: int, text: str) -> None:
        talk = talks[number]
        talk.append({"role": "user", "content": text})
        pieces = client.chat.completions.create(
            model="it", messages=talk, max_tokens=options.new, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        answer = ""
        for piece in pieces:
            answer += "".join(choice.delta.content or "" for choice in piece.choices)
            if piece.usage:
                tokens[number] = piece.usage.total_tokens
        talk.append({"role": "assistant", "content": answer})

    for turn in range(1, options.turns + 1):
        texts = QUESTIONS if turn == 1 else (f"And then, for the {turn}. time?",) * 2
        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(texts)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, in_use(address))
            time.sleep(0.05)
        assert all(len(talk) == 2 * turn for talk in talks), "a turn failed"
        if turn == 1 or turn % EVERY == 0:
            print(f"| {name} | {turn} | {sum(tokens)} | {resident(process.pid):.0f} | {most:.1%} |", flush=True)
            most = 0.0
    assert in_use(address) == 0, "blocks are held by nobody"
    return talks


@contextlib.contextmanager
def served(command: list[str], log: Path, pool: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server's address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(pool)]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
    }
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    sys.exit(f"the server ended: {log.read_text().strip().splitlines()[-1]} ({log})")
                try:
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            yield address, process
        finally:
            process.terminate()


def in_use(address: str) -> float:
    """Share of the pool that requests hold, as vLLM tells Prometheus."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("vllm:kv_cache_usage_perc")).split()[-1])


def resident(root: int) -> float:
    """MiB of a process and its descendants."""
    import psutil

    process = psutil.Process(root)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20


if __name__ == "__main__":
    main()
