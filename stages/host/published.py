"""The figures of the report that this project rebuilds, as it printed them: Qwen1.5-4B, 100 GSM8K problems."""

from dataclasses import dataclass

from stages.scoring.statistics import wilson

SOURCE = "the report this project rebuilds, 100 GSM8K problems"
MODEL = "Qwen1.5-4B"
PROBLEMS = 100


@dataclass(frozen=True)
class Published:
    """One method's row; the report gave no intervals and no versions."""

    title: str
    right: int  # of PROBLEMS
    bleu: float  # in 0..1, as in metrics.json; the report did not say how it was computed
    hours: int
    gpu: str

    @property
    def pass_at_1(self) -> float:
        """In 0..1."""
        return self.right / PROBLEMS

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of pass@1, computed here."""
        return wilson(self.right, PROBLEMS)


PUBLISHED = {
    "qlora": Published("QLoRA", 41, 0.392, 7, "T4"),
    "grpo": Published("GRPO", 53, 0.453, 10, "P100"),
    "orpo": Published("ORPO", 49, 0.437, 6, "T4"),
}
