"""The user's command line, `mathmind`. No stage run opens it."""

from pathlib import Path

import click

from stages.harness.errors import InputError


class OneSentence(click.Group):
    """Shows an InputError as one sentence and exits with 2, as click does for its own errors."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except InputError as error:
            raise click.UsageError(str(error)) from None


@click.group(cls=OneSentence)
def main() -> None:
    """Works with the comparison beside `dvc repro`, which makes it."""


@main.command()
def report() -> None:
    """Joins scores, comparison and timing into results/report.md."""
    from stages.host.report import write_report

    click.echo(f"wrote {write_report(Path.cwd()).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
