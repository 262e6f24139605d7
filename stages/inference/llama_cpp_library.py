"""llama.cpp's C interface as llama-cpp-python binds it, without its flood of log lines."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_silence = None  # llama.cpp keeps a pointer to the callback, which must outlive every call


def llama_cpp():
    """The module `llama_cpp`, its log silenced: what fails says so by its return value."""
    import llama_cpp as library

    global _silence
    if _silence is None:
        _silence = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(_silence, None)
        library.llama_backend_init()
    return library


@contextmanager
def vocabulary(file: Path) -> Iterator[tuple[Callable[[str], list[int]], Callable[[int], bool]]]:
    """A GGUF file's vocabulary without its weights: what a text's token ids are, and whether a token ends an answer."""
    api = llama_cpp()
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}, which it has just written")
    vocab = api.llama_model_get_vocab(model)
    try:
        yield lambda text: token_ids(api, vocab, text), lambda token: bool(api.llama_vocab_is_eog(vocab, token))
    finally:
        api.llama_model_free(model)


def token_ids(api, vocab, text: str) -> list[int]:
    """Token ids of a text in which special tokens are written out; none is added."""
    encoded = text.encode("utf-8")
    ids = (ctypes.c_int32 * (len(encoded) + 8))()
    count = api.llama_tokenize(vocab, encoded, len(encoded), ids, len(ids), False, True)
    return list(ids[:count])
