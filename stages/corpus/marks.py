"""The marks that a model writes and a reader looks for: stop tokens, and the tags of the answer form."""

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # ends an assistant's turn in ChatML
TEXT_END = "<|endoftext|>"  # ends a text in pretraining, and an Alpaca answer
STOP_TOKENS = (TURN_END, TEXT_END)  # a model may stop with either: both go into every generation config

WORKING_START = "<start_working_out>"
WORKING_END = "<end_working_out>"
SOLUTION_START = "<SOLUTION>"
SOLUTION_END = "</SOLUTION>"
TAGS = (WORKING_START, WORKING_END, SOLUTION_START, SOLUTION_END)
