"""`moa-serve` on vLLM: OpenAI's client, two conversations at once, streaming, and answers of transformers' own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from engines import Reference, saved_under
from moa_search.cli import serve

SERVE = [sys.executable, "-c", "from moa_search.cli.serve import main; main()"]
TURNS, NEW = int(os.environ.get("MOA_TURNS", "5")), 12
"""Of each conversation, and new tokens of a turn; 30 turns take 4 minutes more."""

QUESTIONS = (
    "Tell me about the sea and the ships that cross it, and what sailors eat. " * 6,
    "What is the capital of France, and which rivers does it lie on? " * 9,
)


@pytest.fixture(scope="module")
def folder(demo_folder: str, plans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model saved under a plan."""
    return saved_under(demo_folder, plans / "quarter.json", tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[openai.OpenAI, str, Path]]:
    """A client, the server's address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**27)]
    log = folder.parent / "server.log"
    with (
        log.open("w") as output,
        subprocess.Popen([*SERVE, str(folder), *options], stdout=output, stderr=output) as run,
    ):
        try:
            wait(f"http://127.0.0.1:{port}/health", run, log)
            address = f"http://127.0.0.1:{port}"
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address, log
        finally:
            run.terminate()


def wait(address: str, run: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert run.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address):
                return
        except urllib.error.URLError:
            time.sleep(0.5)
    pytest.fail(log.read_text())


def blocks_used(address: str) -> float:
    """Share of the pool that requests hold, as vLLM tells Prometheus."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("vllm:kv_cache_usage_perc")).split()[-1])


def test_two_conversations_at_once(server: Any, folder: Path, demo_folder: str) -> None:
    client, address, log = server
    assert f"serves {folder} under the plan of {folder}" in log.read_text()
    talks: list[list[dict[str, str]]] = [[], []]
    failures: list[BaseException] = []

    def converse(talk: list[dict[str, str]], question: str) -> None:
        try:
            for turn in range(TURNS):
                talk.append({"role": "user", "content": question if not turn else f"And then, for the {turn}. time?"})
                pieces = client.chat.completions.create(
                    model=str(folder), messages=talk, max_tokens=NEW, temperature=0, stream=True
                )
                answer = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
                talk.append({"role": "assistant", "content": answer})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=converse, args=pair) for pair in zip(talks, QUESTIONS, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert blocks_used(address) == 0

    from transformers import AutoTokenizer

    reference, tokenizer = Reference(demo_folder, folder / "moa_plan.json"), AutoTokenizer.from_pretrained(demo_folder)
    for talk in talks:
        assert len(talk) == 2 * TURNS
        for turn in range(0, len(talk), 2):
            prompt = tokenizer.apply_chat_template(talk[: turn + 1], add_generation_prompt=True)["input_ids"]
            tokens = reference.run(prompt, NEW)
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            assert talk[turn + 1]["content"] == tokenizer.decode(tokens, skip_special_tokens=True), turn


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["FOLDER", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            "--speculative-config",
        ),
        (["FOLDER", "--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (["FOLDER", "--plan", "/nowhere.json"], "/nowhere.json"),
        (["DENSE"], "neither moa_plan.json nor its config.json holds a plan"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    folder: Path, demo_folder: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FOLDER": str(folder), "DENSE": demo_folder}
    with pytest.raises(SystemExit) as stop:
        serve.main([places.get(argument, argument) for argument in arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("moa-serve: error: ")
    assert says in last
