"""How a problem is put to a model and how the model is asked to answer: three prompts and their templates.

Every template is Jinja as tokenizers carry it, so that a model folder says by itself how it wants to be asked: given one
user message, it renders the whole prompt, the system message included. `{% generation %}` marks what is trained.
"""

import re
from collections.abc import Sequence
from functools import cache

from stages.corpus.marks import SOLUTION_END, SOLUTION_START, TEXT_END, TURN_END, WORKING_END, WORKING_START, Marks

# The text of Qwen's own template, with the marks of what is trained; Qwen's has none.
_CHATML = """\
{%- if messages[0]['role'] != 'system' and default_system -%}
{{- '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Stanford Alpaca's prompt without input (Taori et al. 2023).
_ALPACA = """\
{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- message['content'] + '<|endoftext|>' -}}{% endgeneration %}
{%- else -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}
{%- endif -%}
{%- endfor -%}"""

_FEW_SHOT = """\
{{- examples -}}
{{- 'Question: ' + messages[-1]['content'] + '\\nAnswer:' -}}"""

# A base model that is asked by example goes on with the next question: its answer ends there.
STOP_TEXTS = {"few_shot": "\nQuestion:"}


def render(template: str, question: str) -> str:
    """The whole prompt for one question, up to where the model's answer begins."""
    return render_messages(template, [{"role": "user", "content": question}])


def render_messages(template: str, messages: Sequence[dict[str, str]]) -> str:
    """The text of a chat ({"role", "content"} each); where no reply ends it, up to where one begins."""
    is_prompt = messages[-1]["role"] != "assistant"
    return _compiled(without_marks(template)).render(messages=messages, add_generation_prompt=is_prompt)


def without_marks(template: str) -> str:
    """A template without the marks of what is trained, which only training knows how to read."""
    return re.sub(r"{% (?:end)?generation %}", "", template)


@cache
def _compiled(template: str):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


def chatml(system: str = "", marks: Marks = Marks()) -> str:
    """The ChatML template; `system` is the message it puts first where the caller gives none, "" for none.

    A turn starts in ChatML's words whatever the base: where `<|im_start|>` is no token, it is read as plain text.
    """
    return _of_base(f"{{%- set default_system = {_literal(system)} -%}}\n{_CHATML}", marks)


def alpaca(marks: Marks = Marks()) -> str:
    """The Alpaca template."""
    return _of_base(_ALPACA, marks)


def few_shot(examples: Sequence[tuple[str, str]], marks: Marks = Marks()) -> str:
    """A template that shows (question, solution) pairs as plain text before the question; for base models."""
    shown = "".join(f"Question: {question}\nAnswer: {solution}\n\n" for question, solution in examples)
    return _of_base(f"{{%- set examples = {_literal(shown)} -%}}\n{_FEW_SHOT}", marks)


def _of_base(template: str, marks: Marks) -> str:
    """A template with the marks of a base; what begins a text is written out, as no tokenizer is asked to add anything here."""
    own = template.replace(TURN_END, marks.turn_end).replace(TEXT_END, marks.text_end)
    return f"{{{{- {_literal(marks.begin)} -}}}}\n{own}" if marks.begin else own


def tagged_answer(working: str, answer: str) -> str:
    """The answer form that the rewards of grpo read, and that sft teaches first."""
    return f"{WORKING_START}\n{working}\n{WORKING_END}\n{SOLUTION_START}{answer}{SOLUTION_END}"


def gsm8k_answer(working: str, answer: str) -> str:
    """The answer form of GSM8K's own solutions."""
    return f"{working}\n#### {answer}"


def _literal(text: str) -> str:
    """Text as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
