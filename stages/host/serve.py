"""`mathmind serve`: a model of the graph behind the OpenAI-compatible server of the engine that runs it."""

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.host.models import gguf_of, prompt_of, template_in, weights_of
from stages.host.streaming import limits, llama_settings

HANDLER = "mathmind"  # how the server of llama-cpp-python finds our prompts
TEMPLATES = Path(".dvc/tmp/mathmind/serve")  # for vLLM, which reads a template from a file
UNASKED = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
GRACE = 3  # seconds that Ctrl-C leaves to replies under way
EXAMPLE = "Sam has 6 pens. He buys 8 more. How many pens does Sam have now?"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def example(name: str, host: str, port: int, key: str | None, stop: str | None = None) -> str:
    """A command that asks the server a question."""
    request = {"model": name, "messages": [{"role": "user", "content": EXAMPLE}]}
    where = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    headers = ["content-type: application/json", *(["authorization: Bearer $MATHMIND_API_KEY"] if key else [])]
    return " ".join([f"curl http://{where}:{port}/v1/chat/completions", *(f'-H "{header}"' for header in headers),
                     "-d", shlex.quote(json.dumps(request | ({"stop": [stop]} if stop else {})))])  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections, from before the model is there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", error)).partition(" (")[0]
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another --port or --host") from None


def serve_llama_cpp(folder: Path, name: str, form: str | None, host: str, port: int, key: str | None) -> None:
    """Serves a GGUF file until Ctrl-C: one reply at a time, each in the prompt that eval used and as if it were the first."""
    file, allowed = gguf_of(folder, name, form), limits(folder)
    listening = listen(host, port)
    import uvicorn

    from stages.inference.llama_cpp_library import llama_cpp

    llama_cpp()
    register_handler(folder, name)
    _draw_as_chat_does()
    from llama_cpp.server import app as server

    config = uvicorn.Config(_app(file, name, key, llama_settings(allowed)), log_level="warning", timeout_graceful_shutdown=GRACE)
    print(f"{name}/{file.name}, until Ctrl-C; try\n{example(name, host, listening.getsockname()[1], key)}", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has ended well, and hands the signal on
        pass
    finally:
        server._llama_proxy.free()  # later, as Python ends, freeing it ends in a segmentation fault


def _app(file: Path, name: str, key: str | None, settings: dict[str, Any]):
    """llama-cpp-python's own application, with settings that are all ours: by itself it takes some from any variable API_KEY, SEED, ..."""
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    os.environ.pop("CONFIG_FILE", None)
    try:
        return create_app(
            # interrupt_requests would cut a reply off where another is asked for.
            server_settings=ServerSettings.model_construct(api_key=key, interrupt_requests=False),
            model_settings=[ModelSettings.model_construct(model=str(file), model_alias=name, chat_format=HANDLER, **settings)],
        )
    except ValueError:
        raise InputError(f"{file} is no GGUF file that llama.cpp can read: export it again") from None


def _draw_as_chat_does() -> None:
    """Sets what a request that does not say gets: llama-cpp-python's own defaults draw, and punish repetition at any temperature.

    Called before its application is imported, which reads them then.
    """
    from llama_cpp.server import types

    for request in (types.CreateChatCompletionRequest, types.CreateCompletionRequest):
        for name, value in UNASKED.items():
            request.model_fields[name].default = value
        request.model_rebuild(force=True)


def register_handler(folder: Path, name: str) -> None:
    """Has the server ask as chat does."""
    from llama_cpp.llama_chat_format import (
        ChatFormatterResponse,
        chat_formatter_to_chat_completion_handler,
        register_chat_completion_handler,
    )

    from stages.corpus.chat_format import render_messages

    @register_chat_completion_handler(HANDLER)
    def handle(*, llama, **request):
        prompt = prompt_of(folder, name, llama.metadata.get("tokenizer.chat_template"))

        def rendered(*, messages, **_) -> ChatFormatterResponse:
            stop = [prompt.stop_text] if prompt.stop_text else None
            return ChatFormatterResponse(render_messages(prompt.template, messages), stop, added_special=True)

        llama.reset()  # else what was asked before would lend its cache, and bits with it
        request["model"] = name  # a reply says the file's path where the request names no model
        return chat_formatter_to_chat_completion_handler(rendered)(llama=llama, **request)


def serve_vllm(folder: Path, name: str, host: str, port: int, key: str | None) -> None:
    """Becomes vLLM's own server, `vllm serve`, on the model's whole weights."""
    weights = weights_of(folder, name)
    prompt, used = prompt_of(folder, name, template_in(weights)), folder / TEMPLATES / f"{name}.jinja"
    used.parent.mkdir(parents=True, exist_ok=True)
    used.write_text(prompt.template, encoding="utf-8")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(weights)]
    command += ["--served-model-name", name, "--host", host, "--port", str(port), "--chat-template", str(used)]
    command += ["--override-generation-config", json.dumps({"temperature": UNASKED["temperature"]})]
    if key:
        os.environ["VLLM_API_KEY"] = key  # not among the arguments, which every user of the machine can read
    print(f"{name} by vLLM, until Ctrl-C; when it is ready, try\n{example(name, host, port, key, prompt.stop_text)}", flush=True)
    os.execv(command[0], command)
