"""llama.cpp's C interface as llama-cpp-python binds it, without its flood of log lines."""

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
