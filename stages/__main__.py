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
    """Writes results/report.md and the page results/report.html of the run that is here."""
    from stages.host.report import write_reports

    for path in write_reports(Path.cwd()):
        click.echo(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
