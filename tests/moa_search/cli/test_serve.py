"""`moa-serve`, talked to over loopback by OpenAI's own client."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from transformers.cli.serving import model_manager

import moa_search
from moa_search import ModelSignature, Plan, SpanRule
from moa_search.cli import serve

SERVE = [sys.executable, "-c", "from moa_search.cli.serve import main; main()"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
QUESTION = [{"role": "user", "content": "What is near and far? " * 20}]


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """The tiny model, saved under a plan that drops most keys of the question."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_model_dir, folder)
    model, tokenizer = moa_search.load_model(str(tiny_model_dir), dtype="float32", device="cpu")
    plan = Plan.uniform(SpanRule(48, 0), ModelSignature.of(model.config))
    moa_search.apply_plan(model, plan).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder):
    """A client of a server that serves the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*SERVE, str(folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = folder.parent / "server.log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()


def _wait(address, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address) as response:
                assert json.load(response) == {"status": "ok"}
                return
        except urllib.error.URLError:
            time.sleep(0.5)
    pytest.fail(f"no answer: {log.read_text()}")


def greedy(model, tokenizer, messages, new_tokens):
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_answers_come_from_the_plan_streamed_or_not_turn_after_turn(client, folder):
    options = {"model": str(folder), "max_tokens": 12, "temperature": 0}
    model = moa_search.from_pretrained(folder, dtype=torch.float32)
    tokenizer = moa_search.load_model(str(folder), dtype="float32", device="cpu")[1]
    messages = list(QUESTION)
    for _ in range(2):
        whole = client.chat.completions.create(messages=messages, **options)
        answer = whole.choices[0].message.content
        assert answer == greedy(model, tokenizer, messages, 12)
        assert whole.usage.completion_tokens == 12
        pieces = client.chat.completions.create(messages=messages, stream=True, **options)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert streamed == answer.removesuffix("\ufffd"), "half a character at the end is held back"
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    dense = moa_search.remove_plan(model)
    assert greedy(dense, tokenizer, QUESTION, 12) != greedy(moa_search.from_pretrained(folder), tokenizer, QUESTION, 12)
    assert [entry.id for entry in client.models.list().data] == [str(folder)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["FOLDER", "--continuous-batching"], "continuous batching can't run under a plan"),
        (["FOLDER", "--attn-implementation=sdpa"], "the plan is the attention"),
        (["DENSE"], "neither moa_plan.json nor its config.json holds a plan"),
    ],
)
def test_what_would_run_without_a_plan_is_refused(folder, tiny_model_dir, arguments, says, capsys):
    before = model_manager.ModelManager, list(sys.argv)
    places = {"FOLDER": str(folder), "DENSE": str(tiny_model_dir)}
    with pytest.raises(SystemExit) as stop:
        serve.main([places.get(argument, argument) for argument in arguments])
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("moa-serve: error: ")
    assert says in errors[-1]
    assert (model_manager.ModelManager, sys.argv) == before, "transformers is left as it was"


def test_without_the_serving_packages_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers.cli.serving", None)
    with pytest.raises(SystemExit) as stop:
        serve.main([str(folder)])
    assert stop.value.code == 2
    assert "pip install 'moa-search[serve]'" in capsys.readouterr().err


def test_transformers_serve_alone_refuses_it(folder):
    manager = model_manager.ModelManager(device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="serve it with moa-serve"):
        manager._load_model(f"{folder}@main")
