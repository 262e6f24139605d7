"""Generation with llama.cpp, greedy, many sequences in one batch.

llama-cpp-python's high-level class decodes one sequence at a time; its low-level binding is llama.cpp's own C interface,
which decodes many, each with a cache of its own, so that no sequence's text depends on its neighbours.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.progress import progress
from stages.inference.engine import Completion, Sampling
from stages.inference.llama_cpp_library import llama_cpp, token_ids


class LlamaCppEngine:
    """A GGUF file in memory, with room for `sequences` prompts side by side of `context` tokens each."""

    def __init__(self, file: Path, sequences: int, context: int, threads: int = 1) -> None:
        self.api = api = llama_cpp()
        self.sequences, self.context = sequences, context
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self.model:
            raise InputError(f"{file} is no GGUF file that llama.cpp can read: export it again")
        params = api.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = params.n_ubatch = max(context, sequences)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.memory_of = api.llama_init_from_model(self.model, params)
        self.vocab = api.llama_model_get_vocab(self.model)
        self.vocab_size = api.llama_vocab_n_tokens(self.vocab)
        found = api.llama_model_chat_template(self.model, None)
        self.template = found.decode("utf-8") if found else None
        self.batch = api.llama_batch_init(params.n_batch, 0, 1)

    def close(self) -> None:
        """Frees the model and its caches."""
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.memory_of)
        self.api.llama_model_free(self.model)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See Engine; only greedy."""
        if sampling.temperature > 0:
            raise InputError("the llama_cpp engine is greedy only: set temperature to 0")
        waiting = list(enumerate(map(self._tokens, prompts)))[::-1]
        for index, tokens in waiting:
            if len(tokens) + sampling.max_new_tokens > self.context:
                raise InputError(f"prompt {index + 1} has {len(tokens)} tokens: raise eval_gguf.context above "
                                 f"{len(tokens) + sampling.max_new_tokens}")  # fmt: skip
        done: dict[int, Completion] = {}
        running: dict[int, tuple[int, int, list[int]]] = {}  # sequence -> (prompt's index, its length, generated)
        with progress("llama.cpp", len(prompts)) as advance:
            while waiting or running:
                for sequence in range(self.sequences):  # a free place takes the next prompt
                    if sequence not in running and waiting:
                        index, tokens = waiting.pop()
                        running[sequence] = (index, len(tokens), [self._prefill(sequence, tokens)])
                for sequence, (index, _, generated) in list(running.items()):
                    stopped = self.api.llama_vocab_is_eog(self.vocab, generated[-1])
                    if stopped or len(generated) == sampling.max_new_tokens:
                        text = self._text(generated[:-1] if stopped else generated)
                        done[index] = Completion(text, "stop" if stopped else "length", len(generated))
                        self.api.llama_memory_seq_rm(self._memory(), sequence, -1, -1)
                        del running[sequence]
                        advance()
                self._step(running)
        return [done[index] for index in range(len(prompts))]

    def _prefill(self, sequence: int, tokens: list[int]) -> int:
        """Reads a prompt into a sequence's cache and returns the first token that follows."""
        self.batch.n_tokens = 0
        for place, token in enumerate(tokens):
            self._put(token, place, sequence, wanted=place == len(tokens) - 1)
        self._decode()
        return self._best(len(tokens) - 1)

    def _step(self, running: dict[int, tuple[int, int, list[int]]]) -> None:
        """Adds one token to every running sequence."""
        if not running:
            return
        self.batch.n_tokens = 0
        for sequence, (_, length, generated) in running.items():
            self._put(generated[-1], length + len(generated) - 1, sequence, wanted=True)
        self._decode()
        for row, (_, _, generated) in enumerate(running.values()):
            generated.append(self._best(row))

    def _put(self, token: int, place: int, sequence: int, wanted: bool) -> None:
        row = self.batch.n_tokens
        self.batch.token[row] = token
        self.batch.pos[row] = place
        self.batch.n_seq_id[row] = 1
        self.batch.seq_id[row][0] = sequence
        self.batch.logits[row] = wanted
        self.batch.n_tokens = row + 1

    def _decode(self) -> None:
        if status := self.api.llama_decode(self.memory_of, self.batch):
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _best(self, row: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.memory_of, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def _memory(self):
        return self.api.llama_get_memory(self.memory_of)

    def _tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt in which special tokens are written out; none is added."""
        return token_ids(self.api, self.vocab, prompt)

    def _text(self, tokens: list[int]) -> str:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        buffer = ctypes.create_string_buffer(64 * len(tokens) + 64)
        count = self.api.llama_detokenize(self.vocab, ids, len(tokens), buffer, len(buffer), False, False)
        return buffer.raw[:count].decode("utf-8", errors="replace")
