"""Models that answer as they go: each engine yields an answer's text so far, again with every token."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol
from uuid import uuid4

from ruamel.yaml.error import YAMLError

from stages.harness.errors import InputError
from stages.host.graph import read_yaml
from stages.host.models import gguf_of, prompt_of, weights_of
from stages.inference.engine import Sampling


@dataclass(frozen=True)
class Answer:
    """What a model has said so far, without stop tokens; `tokens` counts what was generated, a stop token included."""

    text: str = ""
    tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None  # None: it has not ended


@dataclass(frozen=True)
class Drawing(Sampling):
    """How to answer: Sampling, and of the likeliest tokens only so many that they hold the share `top_p`."""

    top_p: float = 1.0


class Model(Protocol):
    """A loaded model; every question is a conversation of its own."""

    name: str  # as the graph calls it
    made_of: str  # the file or folder, below models/

    def answer(self, question: str, drawing: Drawing) -> Iterator[Answer]:
        """Yields the answer so far with every token; the last one yielded has its finish_reason. Closing it stops the model."""
        ...


@dataclass(frozen=True)
class Limits:
    """What params.yaml's eval_gguf allows an answer, here as there."""

    max_new_tokens: int
    context: int
    threads: int


def limits(folder: Path) -> Limits:
    """Of the params.yaml that is here. Read without pydantic, whose import would double the time that the first token takes."""
    path = folder / "params.yaml"
    try:
        found = read_yaml(path)["eval_gguf"]
    except (YAMLError, LookupError, TypeError):
        from stages.harness.params import read_params

        found = read_params(path).get("eval_gguf")  # says what is wrong with the file
    found = found if isinstance(found, dict) else {}
    numbers = {field.name: found.get(field.name) for field in fields(Limits)}
    for name, number in numbers.items():
        if type(number) is not int or number <= 0:
            raise InputError(f"params.yaml: eval_gguf.{name} is {number!r} and must be a whole number above 0: every profile under "
                             "params/ has one")  # fmt: skip
    return Limits(**numbers)


def choose_engine(asked: str | None, form: str | None, models: int = 1) -> str:
    """The engine asked for; else on a GPU vLLM, or transformers where that is not installed or two models share it; else llama.cpp."""
    if form is not None and asked not in (None, "llama_cpp"):
        raise InputError(f"--gguf names a file of llama.cpp, which --engine {asked} does not read: leave one of them out")
    if asked in ("transformers", "vllm") and not find_spec("torch" if asked == "transformers" else asked):
        raise InputError(f"{asked} is not installed here: leave --engine out, or install docker/rollout.lock (docs/images.md)")
    if asked or form or not _torch_sees_a_gpu():
        return asked or "llama_cpp"
    return "vllm" if models == 1 and find_spec("vllm") else "transformers"


def load(folder: Path, name: str, engine: str, form: str | None) -> Model:
    """A model of the graph in an engine."""
    if engine == "llama_cpp":
        return LlamaCppModel(folder, name, form)
    return (TransformersModel if engine == "transformers" else VllmModel)(folder, name)


def _torch_sees_a_gpu() -> bool:
    if not shutil.which("nvidia-smi") or not find_spec("torch"):  # spares the seconds that torch's import takes
        return False
    import torch

    return torch.cuda.is_available()


class LlamaCppModel:
    """A GGUF file, read by llama-cpp-python's Llama; greedy, it says letter for letter what eval-gguf scored."""

    def __init__(self, folder: Path, name: str, form: str | None) -> None:
        file = gguf_of(folder, name, form)
        self.name, self.made_of = name, f"{name}/{file.name}"
        self.llama = read_gguf(file, limits(folder))
        self.prompt = prompt_of(folder, name, self.llama.metadata.get("tokenizer.chat_template"))

    def answer(self, question: str, drawing: Drawing) -> Iterator[Answer]:
        """See Model."""
        asked = self.llama.tokenize(self.prompt.ask(question).encode("utf-8"), add_bos=False, special=True)
        _check_room(len(asked), self.llama.n_ctx(), self.name)
        self.llama.reset()  # else the words shared with the last question would be taken from its cache, and bits with them
        text = ""
        for chunk in self.llama.create_completion(
            asked,
            max_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=0,
            min_p=0.0,
            seed=drawing.seed,
            stop=[self.prompt.stop_text] if self.prompt.stop_text else [],
            stream=True,
        ):
            choice = chunk["choices"][0]
            text += choice["text"]
            yield Answer(text, self.llama.n_tokens - len(asked) + 1, choice["finish_reason"])


def read_gguf(file: Path, allowed: Limits):
    """A llama_cpp.Llama, set to give the bits that LlamaCppEngine gives."""
    from stages.inference.llama_cpp_library import llama_cpp

    try:
        return llama_cpp().Llama(str(file), **llama_settings(allowed))
    except ValueError:
        raise InputError(f"{file} is no GGUF file that llama.cpp can read: export it again") from None


def llama_settings(allowed: Limits) -> dict[str, int | bool]:
    """Llama's arguments; flash attention is what llama.cpp chooses by itself and the Python class would switch off."""
    threads = {"n_threads": allowed.threads, "n_threads_batch": allowed.threads}
    return {"n_ctx": allowed.context, **threads, "flash_attn": True, "verbose": False}


def _check_room(tokens: int, room: int, name: str) -> None:
    if tokens >= room:
        raise InputError(f"the question and its prompt have {tokens} tokens, and {name} reads fewer than {room}: shorten the question")


class TransformersModel:
    """A model folder, generated from by transformers: on a GPU, or slowly on a CPU."""

    def __init__(self, folder: Path, name: str) -> None:
        from transformers.utils import logging

        from stages.inference.transformers_engine import TransformersEngine

        weights = weights_of(folder, name)
        logging.disable_progress_bar()
        self.name, self.made_of = name, str(weights.relative_to(folder / "models"))
        self.engine = TransformersEngine.from_folder(weights, batch_size=1)
        self.prompt = prompt_of(folder, name, self.engine.template)

    def answer(self, question: str, drawing: Drawing) -> Iterator[Answer]:
        """See Model. transformers generates in a thread of its own, which ends with this generator."""
        from queue import SimpleQueue
        from threading import Event, Thread

        import torch
        from transformers import GenerationConfig
        from transformers.generation import BaseStreamer

        tokenizer, model = self.engine.tokenizer, self.engine.model
        asked = tokenizer(self.prompt.ask(question), add_special_tokens=False, return_tensors="pt").to(model.device)
        _check_room(asked["input_ids"].shape[1], model.config.max_position_embeddings, self.name)
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        sampled = {"do_sample": True, "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=drawing.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            **(sampled if drawing.temperature > 0 else {"do_sample": False}),
        )
        tokens: SimpleQueue = SimpleQueue()  # ids; then None, or what went wrong
        stopped = Event()

        class Streamer(BaseStreamer):
            begun = False

            def put(self, value) -> None:
                if self.begun:  # the first is the prompt
                    tokens.put(value.item())
                self.begun = True

            def end(self) -> None:
                pass

        def generate() -> None:
            try:
                torch.manual_seed(drawing.seed)
                with torch.inference_mode():
                    model.generate(**asked, generation_config=config, streamer=Streamer(), stopping_criteria=[lambda *_: stopped.is_set()])
                tokens.put(None)
            except Exception as error:
                tokens.put(error)

        thread = Thread(target=generate)
        thread.start()
        try:
            yield from _read(iter(tokens.get, None), stops, self)
        finally:
            stopped.set()
            thread.join()


class VllmModel:
    """A model folder in vLLM."""

    def __init__(self, folder: Path, name: str) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it tells much as it starts
        from stages.harness.params import StageParams, read_params, section
        from stages.inference.vllm_engine import Vllm, VllmEngine

        class Gpu(StageParams, extra="ignore"):
            vllm: Vllm

        weights, params = weights_of(folder, name), folder / "params.yaml"
        self.name, self.made_of = name, str(weights.relative_to(folder / "models"))
        self.engine = VllmEngine(weights, 1, section(params, read_params(params), "eval", Gpu).vllm)
        self.prompt = prompt_of(folder, name, self.engine.template)

    def answer(self, question: str, drawing: Drawing) -> Iterator[Answer]:
        """See Model."""
        from vllm import SamplingParams

        asked = self.engine.tokenizer(self.prompt.ask(question), add_special_tokens=False)["input_ids"]
        running = self.engine.llm.llm_engine
        _check_room(len(asked), running.model_config.max_model_len, self.name)
        params = SamplingParams(
            max_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            seed=drawing.seed,
            stop_token_ids=self.engine.stops,
            detokenize=False,
        )
        request = running.add_request(str(uuid4()), {"prompt_token_ids": asked}, params)
        try:
            yield from _read(_drawn(running), self.engine.stops, self)
        finally:
            if running.has_unfinished_requests():
                running.abort_request([request], internal=True)


def _drawn(running) -> Iterator[int]:
    """The tokens of an engine's one request, as they come."""
    told = 0
    while running.has_unfinished_requests():
        for output in running.step():
            yield from output.outputs[0].token_ids[told:]
            told = len(output.outputs[0].token_ids)


def _read(tokens: Iterator[int | Exception], stops: list[int], model: TransformersModel | VllmModel) -> Iterator[Answer]:
    """The answer as it grows with each token."""
    said: list[int] = []
    for token in tokens:
        if isinstance(token, Exception):
            raise token
        said.append(token)
        ended = token in stops
        text = model.engine.tokenizer.decode(said[:-1] if ended else said, skip_special_tokens=True)
        answer = _until_stop_text(Answer(text, len(said), "stop" if ended else None), model.prompt.stop_text)
        yield answer
        if answer.finish_reason:
            return
    yield Answer(text, len(said), "length")


def _until_stop_text(answer: Answer, stop_text: str | None) -> Answer:
    """An answer up to the text that ends it, where there is one and the model wrote it."""
    before, found, _ = answer.text.partition(stop_text) if stop_text else (answer.text, "", "")
    return Answer(before, answer.tokens, "stop") if found else answer
