"""How Ollama and llama.cpp's server are told to ask a GGUF file as its model was taught."""

import json
from collections.abc import Sequence

from stages.corpus.chat_format import render

MODELFILE = "Modelfile"
QUESTION = "{{ .Prompt }}"  # what stands in Ollama's Go template for the user's message


def go_template(template: str, begin: str = "") -> str:
    """A chat template's text around one question, which is all that a model here was taught; "" is the question alone.

    Ollama adds by itself what begins every text of a model (`begin`).
    """
    return render(template, QUESTION).removeprefix(begin) if template else QUESTION


def modelfile(gguf: str, template: str, stops: Sequence[str]) -> str:
    """What `ollama create` reads (docs.ollama.com/modelfile), for the file `gguf` beside it and a Go template.

    A Modelfile knows no escapes: a line's end in a stop text stands as it is.
    """
    stop = "".join(f'PARAMETER stop "{text}"\n' for text in stops)
    return f'FROM ./{gguf}\nTEMPLATE """{template}"""\nPARAMETER temperature 0\n{stop}'


def params(stops: Sequence[str]) -> str:
    """The same parameters as `ollama run hf.co/...` reads them, in a file of its own."""
    return json.dumps({"temperature": 0, "stop": list(stops)}, indent=2) + "\n"
