"""The marks that a model writes and a reader looks for: stop tokens, and the tags of the answer form."""

from dataclasses import dataclass

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # ends an assistant's turn in ChatML
TEXT_END = "<|endoftext|>"  # ends a text in pretraining, and an Alpaca answer
STOP_TOKENS = (TURN_END, TEXT_END)  # a model may stop with either: both go into every generation config

# Other families' names for the two; whichever a text holds, no reader takes it for a part of an answer.
TURN_ENDS = (TURN_END, "<end_of_turn>", "<|eot_id|>")  # Qwen's, Gemma's, Llama 3's
ANY_STOP = (*TURN_ENDS, TEXT_END, "<|end_of_text|>")

WORKING_START = "<start_working_out>"
WORKING_END = "<end_working_out>"
SOLUTION_START = "<SOLUTION>"
SOLUTION_END = "</SOLUTION>"
TAGS = (WORKING_START, WORKING_END, SOLUTION_START, SOLUTION_END)


@dataclass(frozen=True)
class Marks:
    """A base model's own marks, as texts that its tokenizer reads as one token each; by default Qwen's."""

    turn_end: str = TURN_END  # ends an assistant's turn
    text_end: str = TEXT_END  # ends a text, and an Alpaca answer
    begin: str = ""  # stands before every text that the model reads; "": none does

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens that end an answer; one where the base has no other for a turn."""
        return tuple(dict.fromkeys((self.turn_end, self.text_end)))
