"""The user's command line, `mathmind`. No stage run opens it."""

from json import dumps
from pathlib import Path

import click

from stages.harness.errors import InputError
from stages.host import completing
from stages.host.models import ENGINES, FORMS, MODELS


class OneSentence(click.Group):
    """Shows an InputError as one sentence and exits with 2, as click does for its own errors."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except InputError as error:
            raise click.UsageError(str(error)) from None


@click.group(cls=OneSentence)
def main() -> None:
    """Works with the comparison beside `dvc repro`, which makes it.

    Exits with 2 and one sentence where something given is wrong; a command's --help names its other exits.

    \b
    The Tab key completes names in bash after
    eval "$(_MATHMIND_COMPLETE=bash_source mathmind)"
    """


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.command()
@click.option("--predictions", type=FILE, required=True, multiple=True, help="completions; give it twice for a paired test")
@click.option(
    "--gold", type=FILE, required=True, help="rows with GSM8K's question and answer, joined by id or by order"
)
@click.option("--json", is_flag=True, help="print JSON instead of a table")
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), help="write each verdict to this file")
@click.option("--seed", default=0, show_default=True, help="draws the bootstrap of BLEU's interval")
def score(predictions: tuple[Path, ...], gold: Path, json: bool, rows: Path | None, seed: int) -> None:
    """Scores predictions as eval does.

    A prediction is `{"id", "completion"}`, one a line; two files are also tested in pairs.

    \b
    mathmind score --predictions results/predictions/grpo.jsonl --gold data/mix/test.jsonl
    """
    from stages.harness.jsonl import write_rows
    from stages.host.score import Scored, as_json, as_table

    if len(set(predictions)) != len(predictions) or len(predictions) > 2:
        raise click.UsageError("--predictions takes one file, or two different ones for a paired test")
    if rows and len(predictions) == 2:
        raise click.UsageError("--rows writes the verdicts of one file: give one --predictions")
    scored = [Scored(path, gold, seed) for path in predictions]
    if rows:
        write_rows(rows, scored[0].rows())
    if json:
        click.echo(dumps(as_json(scored), indent=2))
    else:
        from rich.console import Console

        Console().print(as_table(scored))


@main.command()
@click.option("--n", type=click.IntRange(min=2), required=True, help="seeds in all, the committed run's counted")
@click.option("--json", is_flag=True, help="print the names of what is queued as JSON")
@click.argument("stages", nargs=-1, required=True, metavar="STAGE...", shell_complete=completing.seeded_stage)
def seeds(n: int, json: bool, stages: tuple[str, ...]) -> None:
    """Queues the same recipe under other seeds.

    STAGE is base-model, preference-pairs, sft, qlora, grpo or orpo. What is queued are DVC experiments; once they have run,
    `mathmind report` shows the spread of their scores.

    \b
    mathmind seeds --n 3 grpo orpo
    """
    from stages.host.seeds import queue

    names = queue(Path.cwd(), stages, n)
    if json:
        click.echo(dumps(names))
        return
    click.echo("\n".join(names) or "every seed has been asked for before")
    if names:
        click.echo("start them with `dvc queue start -j 1`; when they have ended, run `mathmind report`")


@main.command()
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="stages at a time; default: one a GPU, on CPUs two")
def repro(jobs: int | None) -> None:
    """Brings the graph up to date, several stages at a time.

    As `dvc repro` does, to the same bytes, but stages that do not need each other run side by side. Exits with 1 where a stage
    has failed; what was running beside it has come to its end.

    \b
    mathmind repro -j 4
    """
    from stages.host.repro import at_once, reproduce

    if failures := reproduce(jobs or at_once()):
        raise click.ClickException("\n".join(failures))


@main.command()
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="experiments at a time; default: one a GPU, on CPUs one")
def queue(jobs: int | None) -> None:
    """Works off the queued experiments and ends when none is left.

    Exits with 1 where one has failed. Told to end by a signal, it queues again what was running: the next start goes on from
    the last checkpoints.

    \b
    mathmind queue -j 2
    """
    from stages.host.queue import at_once, work_off

    if failed := work_off(Path.cwd(), jobs or at_once(Path.cwd())):
        raise click.ClickException(f"{', '.join(failed)} failed: `dvc queue logs {failed[0]}` says why")


@main.command()
@click.option("--json", is_flag=True, help="print JSON instead of a table")
def doctor(json: bool) -> None:
    """Says what the profile needs and lacks, and how to mend it.

    Exits with 1 where something is missing.
    """
    from stages.host.doctor import as_json, examine

    findings = examine(Path.cwd())
    if json:
        click.echo(dumps(as_json(findings), indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        colours = {"ok": "green", "note": "yellow", "missing": "bold red"}
        table = Table("", "", "found", "to mend it", box=None)
        for finding in findings:
            table.add_row(finding.subject, f"[{colours[finding.state]}]{finding.state}[/]", finding.found, finding.fix)
        Console().print(table)
    if any(finding.state == "missing" for finding in findings):
        raise SystemExit(1)


@main.command()
@click.option("--twice", is_flag=True, help="rebuild two times, and hold those to each other too")
@click.option("--stages", multiple=True, metavar="STAGE", shell_complete=completing.stage,
              help="these alone, from the inputs in DVC's cache; may be given again")  # fmt: skip
@click.option("--engine", type=click.Choice(["native", "docker", "podman"]), help="run stages so, whatever params.yaml says")
@click.option("--json", is_flag=True, help="print JSON instead of sentences")
def verify(twice: bool, stages: tuple[str, ...], engine: str | None, json: bool) -> None:
    """Rebuilds what is committed, and says if its bytes differ.

    It does so from nothing, in a clone of its own. Exits with 0 where they are the same, 3 where numbers are but for another
    machine's rounding, 1 where they differ. What was interrupted goes on when it is run again.

    \b
    mathmind verify
    mathmind verify --stages qlora --engine docker
    """
    from stages.host.verify import told
    from stages.host.verify import verify as rebuild

    verdict = rebuild(Path.cwd(), stages, twice=twice, engine=engine)
    click.echo(dumps(verdict.as_json(), indent=2) if json else "\n".join(told(verdict)))
    raise SystemExit(verdict.status)


@main.command()
@click.argument("traces", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", is_flag=True, help="print JSON instead of sentences")
def audit(traces: Path, json: bool) -> None:
    """Holds what stages opened to what dvc.yaml declares.

    TRACES is the folder that `MATHMIND_TRACE=$PWD/TRACES dvc repro` has filled (native engine, strace). Exits with 1 where a stage
    read what it does not declare, or wrote outside its scratch folder.
    """
    from stages.host.audit import audit as hold

    stages, wrong = hold(Path.cwd(), traces)
    if json:
        found = [{"stage": opened.stage, "did": "wrote" if opened.written else "read", "path": str(opened.path)} for opened in wrong]
        click.echo(dumps({"stages": stages, "undeclared": found}, indent=2))
        raise SystemExit(1 if wrong else 0)
    for opened in wrong:
        mend = "stages write below --scratch alone" if opened.written else "declare it in dvc.yaml, or do not read it"
        click.echo(f"{opened.stage} {'wrote' if opened.written else 'read'} {opened.path}: {mend}")
    seen = f"{sum(stages.values())} of {len(stages)} stages looked at"
    click.echo(seen if wrong else f"{seen}: each read what it declares and wrote below its scratch folder")
    raise SystemExit(1 if wrong else 0)


@main.command()
@click.argument("path", required=False, shell_complete=completing.out)
@click.option("--json", is_flag=True, help="print JSON instead of a tree; with --check, the list of what is otherwise")
@click.option("--attest", type=click.Path(dir_okay=False, path_type=Path), help="write it to this file, as an in-toto statement")
@click.option("--check", type=FILE, help="hold the files here to a statement that --attest wrote")
def explain(path: str | None, json: bool, attest: Path | None, check: Path | None) -> None:
    """Says what made an out, back to the sources.

    PATH is the out, such as models/grpo; what made it is code, parameters, data, packages, machine and seed. With --check, exits
    with 1 where something is not as the statement says.

    \b
    mathmind explain models/grpo
    mathmind explain models/grpo --attest grpo.intoto.json
    mathmind explain --check grpo.intoto.json
    """
    from stages.host import explain as made

    if bool(path) == bool(check):
        raise click.UsageError("name one out, or give --check with a statement")
    if check:
        wrong = made.check(Path.cwd(), check)
        click.echo(dumps(wrong) if json else "\n".join(wrong) or f"everything is as {check} says")
        raise SystemExit(1 if wrong else 0)
    if attest:
        click.echo(f"wrote {attest}: {made.attest(Path.cwd(), path, attest)} files of {path}")
    elif json:
        click.echo(dumps(made.as_json(made.explain(Path.cwd(), path)), indent=2))
    else:
        from rich.console import Console

        Console().print(made.as_tree(made.explain(Path.cwd(), path)))


@main.command()
@click.argument("name", required=False, shell_complete=completing.source)
@click.option(
    "--all", "everything", is_flag=True, help="every hub source of params.yaml and of the profiles in params/"
)
@click.option("--update", is_flag=True, help="move what is pinned to its branch's newest commit")
@click.option("--json", is_flag=True, help="print one JSON object a source")
def pin(name: str | None, everything: bool, update: bool, json: bool) -> None:
    """Pins a source on a hub to a commit.

    NAME is one of params.yaml's fetch.sources, or base-model; the commit is written to params/sources.lock.yaml. The hub is
    HF_ENDPOINT, the token for gated sources HF_TOKEN.

    \b
    mathmind pin --all
    """
    from dataclasses import asdict

    from stages.host.pin import pin

    if everything == bool(name):
        raise click.UsageError("name one source, or give --all")
    for outcome in pin(Path.cwd(), name, update=update):
        click.echo(dumps(asdict(outcome)) if json else str(outcome))


@main.command()
@click.option(
    "--base-url", help="the endpoint, such as http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL, or OpenAI's own"
)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="requests at a time")
@click.option("--limit", type=click.IntRange(min=1), help="ask at most so many, to see what they cost")
@click.option("--price-in", type=float, default=0.0, help="dollars for a million tokens of prompts")
@click.option("--price-out", type=float, default=0.0, help="dollars for a million tokens of replies")
@click.option("--json", is_flag=True, help="print JSON instead of sentences")
def teach(base_url: str | None, concurrency: int, limit: int | None, price_in: float, price_out: float, json: bool) -> None:
    """Has a teacher answer the problems of preference-pairs.

    It is asked over an OpenAI-compatible endpoint; what it has answered is kept, and not asked again. The key is read from
    OPENAI_API_KEY, the model and its instructions from params.yaml's preference_pairs.teacher.

    \b
    mathmind teach --limit 20 --price-in 0.5 --price-out 1.5
    """
    from dataclasses import asdict

    from stages.host.teach import teach as ask

    lesson = ask(Path.cwd(), base_url, concurrency, limit)
    if json:
        click.echo(dumps({**asdict(lesson), "dollars": lesson.cost(price_in, price_out)}, indent=2))
        return
    click.echo(
        f"{lesson.asked:,} asked, {lesson.had:,} had; tokens: {lesson.prompt_tokens:,} in, {lesson.completion_tokens:,} out"
    )
    if lesson.cut_off:
        click.echo(
            f"{lesson.cut_off:,} replies end at max_tokens and will be dropped: raise preference_pairs.teacher.max_tokens"
        )
    if price_in or price_out:
        click.echo(f"cost: ${lesson.cost(price_in, price_out):.2f}")


@main.command()
@click.option("--dry-run", is_flag=True, help="say what would be sent, and send nothing")
@click.option("--json", is_flag=True, help="print JSON instead of sentences")
def sync(dry_run: bool, json: bool) -> None:
    """Sends to W&B what was recorded below wandb/.

    That is the runs that were recorded offline, or that did not get through; what is sent is not sent again. The key is read from
    WANDB_API_KEY or what `wandb login` stored, the server from WANDB_BASE_URL.
    """
    from dataclasses import asdict

    from stages.host.wandb_sync import sync as send
    from stages.host.wandb_sync import told

    synced = send(Path.cwd(), dry_run=dry_run)
    click.echo(dumps(asdict(synced), indent=2) if json else "\n".join(told(synced)))


@main.command()
@click.argument("model", type=click.Choice(MODELS), metavar="MODEL", shell_complete=completing.model)
@click.option("--to", required=True, metavar="ORG/NAME", help="the repository on the hub; made where there is none")
@click.option("--public", is_flag=True, help="for everybody to see; else the repository is private")
@click.option("--adapter", is_flag=True, help="the LoRA adapter, with its tokenizer and chat template")
@click.option("--merged", is_flag=True, help="the merged 16-bit weights, with the same")
@click.option("--gguf", multiple=True, metavar="FORM", shell_complete=completing.form, help="a GGUF file, such as q8_0; may be given again")
@click.option("--license", metavar="ID", help="what you give the model under, such as mit, where its base and data leave that to you")
@click.option("--terms-read", multiple=True, metavar="SOURCE", help="you have read the terms of this source, and they allow it; may be given again")
@click.option("--dry-run", is_flag=True, help="say what would be published and what forbids it, ask no hub, and show the card")
@click.option("--card", type=click.Path(dir_okay=False, path_type=Path), help="with --dry-run: write the card to this file")
@click.option("--json", is_flag=True, help="print JSON instead of sentences")
def publish(
    model: str, to: str, public: bool, adapter: bool, merged: bool, gguf: tuple[str, ...],
    license: str | None, terms_read: tuple[str, ...], dry_run: bool, card: Path | None, json: bool,
) -> None:  # fmt: skip
    """Uploads a model and a card of what was measured to a hub.

    MODEL is base, sft, qlora, grpo or orpo. Where nothing is chosen, everything goes: the adapter, the merged weights and the GGUF
    forms of params.yaml's gguf_export.files; of base, its weights and GGUF forms. What the repository holds of an earlier
    publication and is not chosen now, goes. Refuses what the commit here would not make again, and what a licence forbids. The token
    is HF_TOKEN, or that of `hf auth login`; the hub is HF_ENDPOINT.

    \b
    mathmind publish grpo --to you/name --dry-run
    mathmind publish grpo --to you/name --gguf q8_0 --public
    """
    from stages.host import publish as hub

    if card and not dry_run:
        raise click.UsageError("--card goes with --dry-run: what is published carries its card as README.md")
    plan = hub.plan(Path.cwd(), model, to, adapter=adapter, merged=merged, gguf=gguf, license=license, read=terms_read)
    if not dry_run:
        done = hub.publish(plan, public=public)
        click.echo(dumps(done.as_json(), indent=2) if json else "\n".join(hub.told(plan, done)))
        return
    if card:
        card.write_text(plan.card, encoding="utf-8")
    if json:
        click.echo(dumps({**plan.as_json(), "card": plan.card}, indent=2))
    else:
        click.echo("\n".join(hub.foretold(plan, public=public)))
        click.echo(f"the card is in {card}" if card else f"\n{plan.card}", nl=bool(card))


@main.command()
@click.argument("model", type=click.Choice(MODELS), metavar="MODEL", shell_complete=completing.model)
@click.argument("question", required=False)
@click.option("--against", type=click.Choice(MODELS), metavar="MODEL", shell_complete=completing.model,
              help="ask this model too, and say whether the answers agree")  # fmt: skip
@click.option("--gguf", metavar="FORM", shell_complete=completing.form, help=f"which GGUF file; default: the first here of {', '.join(FORMS)}")
@click.option("--engine", type=click.Choice(ENGINES), help="what runs the model; default: on a GPU vllm or transformers, else llama_cpp")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token each time")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
              help="draw from the likeliest tokens that hold this share")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="length of an answer at most; default: eval_gguf.max_new_tokens of params.yaml")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="draws the tokens where the temperature is above 0")
@click.option("--json", is_flag=True, help="print one JSON object a question")
def chat(model: str, question: str | None, against: str | None, gguf: str | None, engine: str | None, temperature: float,
         top_p: float, max_tokens: int | None, seed: int, json: bool) -> None:  # fmt: skip
    """Asks a model questions, and shows its answers as they come.

    MODEL is base, sft, qlora, grpo or orpo, asked in the way that eval asked it: the QUESTION, each line of a pipe, or what is
    typed at a prompt. Every question is a conversation of its own.

    \b
    mathmind chat grpo "Sam has 6 pens. He buys 8 more. How many pens does Sam have now?"
    mathmind chat grpo --against qlora
    mathmind chat grpo --json < questions.txt
    """
    import sys

    from stages.host import chat as asking
    from stages.host.streaming import Drawing, choose_engine, limits, load

    if against == model:
        raise click.UsageError(f"--against {against} is {model} itself: name another model")
    names = [model, *filter(None, [against])]
    typed = question is None and sys.stdin.isatty()
    if typed and (json or not sys.stdout.isatty()):
        raise click.UsageError("there is no question: give one, or pipe some in, one a line")
    drawing = Drawing(max_tokens or limits(Path.cwd()).max_new_tokens, temperature, seed, top_p)
    chosen = choose_engine(engine, gguf, len(names))
    models = [load(Path.cwd(), name, chosen, gguf) for name in names]
    if typed:
        asking.talk(Path.cwd(), models, drawing)
    elif question is not None and sys.stdout.isatty() and not json:
        from rich.console import Console

        if not asking.show(Console(highlight=False), question, models, drawing):
            raise SystemExit(130)
    else:
        asking.answer_plainly(asking.piped_questions() if question is None else iter([question]), models, drawing, json)


@main.command()
@click.argument("model", type=click.Choice(MODELS), metavar="MODEL", shell_complete=completing.model)
@click.option("--gguf", metavar="FORM", shell_complete=completing.form, help=f"which GGUF file; default: the first here of {', '.join(FORMS)}")
@click.option("--engine", type=click.Choice(["llama_cpp", "vllm"]), help="what runs the model; default: vllm on a GPU where it is installed, else llama_cpp")
@click.option("--host", default="127.0.0.1", show_default=True, help="the address to listen on; 0.0.0.0 is every one")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one")
@click.option("--api-key", envvar="MATHMIND_API_KEY", show_envvar=True, help="what clients must send; the variable keeps it from `ps`")
def serve(model: str, gguf: str | None, engine: str | None, host: str, port: int, api_key: str | None) -> None:
    """Serves a model over OpenAI's API, until Ctrl-C.

    MODEL is base, sft, qlora, grpo or orpo, asked in the way that eval asked it. What answers is the engine's own server.

    \b
    mathmind serve grpo --port 8001
    """
    from stages.host import serve as serving
    from stages.host.streaming import choose_engine

    if not api_key and not serving.is_loopback(host):
        click.echo(f"warning: whoever reaches {host} can ask {model}: give --api-key, or leave --host out", err=True)
    if choose_engine(engine, gguf) == "vllm":
        serving.serve_vllm(Path.cwd(), model, host, port, api_key)
    else:
        serving.serve_llama_cpp(Path.cwd(), model, gguf, host, port, api_key)


@main.command()
@click.argument("stage", metavar="STAGE", shell_complete=completing.joined_stage)
@click.option("--node", type=click.IntRange(min=1), default=1, show_default=True, help="this machine's place; the first is 0")
def join(stage: str, node: int) -> None:
    """Trains a stage together with the machine that runs it.

    STAGE is base-model, sft, qlora or orpo. The first machine runs `dvc repro` and gets what is made; each of the others runs
    this, in the same commit with the same params.yaml and inputs. It ends with the stage.

    \b
    mathmind join qlora
    """
    from stages.host.launcher import join as become

    become(stage, node)


@main.command("plots-page")
def plots_page() -> None:
    """Writes the page that `dvc plots` fills, with no network.

    Vega is inside it; `make .venv` does this.
    """
    from stages.host.plots_page import write_plots_page

    click.echo(f"wrote {write_plots_page(Path.cwd()).relative_to(Path.cwd())}")


@main.command()
def report() -> None:
    """Writes results/report.md and results/report.html.

    They are of the run that dvc.lock holds: scores, tests in pairs, curves, times, and every answer to browse.
    """
    from stages.host.report import write_reports

    for path in write_reports(Path.cwd()):
        click.echo(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main(prog_name="mathmind")
