"""What README.md and the pages of docs/ say to type, typed: in a clone with the committed outs, or in the small graph.

tests/unit/test_documents.py holds the pages to it: a command that no test types has a reason there.
"""

import json
import re
import shutil

import pytest

from stages.harness.jsonl import read_json
from stages.host.seeds import experiments
from tests import wandb_server
from tests.documents import in_blocks, read_page
from tests.hub_server import serving
from tests.hub_uploads import WritableHub
from tests.imports import ROOT
from tests.pipeline.reader import single, typed, typed_at_a_terminal, walk
from tests.pipeline.test_launcher import copy_of, copy_of_the_tree, git
from tests.wandb_files import recorded

BUTTONS = "Sam has 6 buttons and finds 8 more. Then he loses 2. How many buttons does he have now?"


@pytest.fixture(scope="session")
def committed(tmp_path_factory):
    """A clone with what its lock says, pulled from this tree's cache, which nothing here writes to."""
    folder = tmp_path_factory.mktemp("committed") / "mathmind"
    copy_of_the_tree(folder)
    for setting in ("user.name test", "user.email test@example.org"):
        git(folder, "config", *setting.split())
    cache = typed(ROOT, "dvc cache dir").strip()
    typed(folder, f"dvc remote add --local --quiet --default made '{cache}'")
    try:
        typed(folder, "dvc pull --quiet")
    except AssertionError as error:
        pytest.skip(f"DVC's cache lacks what dvc.lock names: run `make repro` ({str(error).splitlines()[-1]})")
    typed(folder, "dvc remote remove --local made && mathmind plots-page")
    return folder


@pytest.fixture
def clone(committed, tmp_path):
    """A copy of it that a test may change."""
    return copy_of(committed, tmp_path / "mathmind")


def test_the_readme_s_model_answers_and_scores_as_it_shows(committed):
    walk(committed, "README.md", "Talk to it", type=typed_at_a_terminal, alike=single)
    walk(committed, "README.md", "Score anything, trust it further", alike=single, COLUMNS="120")


def test_the_chats_of_the_page_say_what_it_shows(clone):
    (clone / "questions.txt").write_text(f"{BUTTONS}\n" * 2, encoding="utf-8")
    chats = {command.text for command in in_blocks("docs/chat.md") if BUTTONS in command.text}
    assert len(chats) == 2
    piped = dict.fromkeys([command.text for command in in_blocks("docs/chat.md") if command.text not in chats], "")
    walk(clone, "docs/chat.md", instead=piped, type=typed_at_a_terminal, alike=single)
    said = walk(clone, "docs/chat.md", "In a pipe")
    assert list(said.values())[:2] == ["answer: 12\n" * 2, "true\n" * 2]
    assert len(list(said.values())[2].splitlines()) == 20
    typed(clone, 'eval "$(_MATHMIND_COMPLETE=bash_source mathmind)"')


def test_a_model_is_published_by_the_commands_of_the_page_in_their_order(clone, tmp_path):
    with serving(tmp_path / "hub", WritableHub) as hub:
        account = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        walk(clone, "docs/publishing.md", instead={"your-name": hub.org}, **account)
        card = (tmp_path / "card.md").read_text(encoding="utf-8")
        assert hub.files("team/mathmind-grpo")["README.md"].decode() == card
        assert not hub.repos["model", "team/mathmind-grpo"].private
    assert "private: 24 files" in typed(clone, "mathmind publish grpo --to you/name --dry-run")


def test_what_the_readme_names_in_passing_is_there(clone, tmp_path):
    assert "up to date" in typed(clone, "dvc status")
    for page in ("dvc plots show", "dvc plots diff", "mathmind report"):
        (written,) = {line.split()[-1] for line in typed(clone, page).splitlines() if line.endswith(".html")}
        assert ".html" in written
    assert re.search("asked for before|start them with", typed(clone, "mathmind seeds --n 3 grpo orpo"))
    typed(clone, "dvc queue remove --all && mathmind doctor && git restore . && make clean")

    texts = tmp_path / "gsm8k"
    texts.mkdir()
    for name in ("train", "test"):
        (texts / f"{name}.jsonl").write_text("{}\n", encoding="utf-8")
    assert "params.yaml is now the gsm8k-local profile" in typed(clone, f"make gsm8k-local FROM='{texts}'")
    assert (clone / "params.yaml").read_bytes() == (ROOT / "params/gsm8k-local.yaml").read_bytes()
    for change_over in ("cp params/report-t4.yaml params.yaml", "cp params/scratch-gpu.yaml params.yaml"):
        typed(clone, change_over)
        assert "missing" in typed(clone, "mathmind doctor", status=1)


def test_the_first_changed_thing_is_changed_shown_taken_back_brought_back_and_removed(place):
    """The rate is another, for what has run once comes from the cache, and test_uses.py waits for the page's own to run."""
    page, instead = "docs/first-run.md", {". .venv/bin/activate": "", "grpo.lr=1e-4": "grpo.lr=2e-3"}
    said = walk(place, page, "The first changed thing", instead=instead)
    assert "0.001" in said["dvc params diff"] and "models.grpo.pass_at_1" in said["dvc metrics diff"]
    assert git(place, "status", "--porcelain") == ""
    assert "slower" in typed(place, "dvc exp show")
    typed(place, "dvc exp apply slower")
    assert git(place, "diff", "--stat", "params.yaml")
    typed(place, "git restore . && dvc checkout && dvc exp remove slower")
    assert experiments(place) == {} and git(place, "status", "--porcelain") == ""


def test_what_is_not_in_use_is_cleared_away_and_the_rest_stays(rebuilt, tmp_path):
    place = copy_of(rebuilt, tmp_path / "mathmind")  # with a cache of its own
    typed(place, "dvc gc --workspace --force && rm -r .dvc/tmp/mathmind && dvc unprotect models/grpo")
    assert "up to date" in typed(place, "dvc status")


def test_the_readme_s_stage_is_verified_explained_and_attested(place):
    instead = {"verify --stages qlora": "verify --stages prepare-mix"}  # which takes a moment
    walk(place, "README.md", "What is deterministic, and how that is checked", instead=instead)
    assert "everything is as" in typed(place, "mathmind explain --check grpo.intoto.json")
    assert json.loads(typed(place, "mathmind explain --check grpo.intoto.json --json")) == []


def test_parameters_that_pages_name_are_taken(place):
    typed(place, "dvc exp run -S prepare_mix.clean.duplicate=true -S prepare_mix.too_long=cut prepare-mix")
    assert read_json(place / "data/mix/account.json")["qlora"]["kept"] > 0
    typed(place, "git restore . && dvc exp run -S fetch.careless=0.5 fetch")


def test_a_machine_that_vanishes_is_gone_on_from_by_the_commands_of_the_page(place, tmp_path):
    git(tmp_path, "clone", "-q", "--bare", str(place), "drive.git")
    git(tmp_path, "clone", "-q", "drive.git", "first")
    first, second = tmp_path / "first", tmp_path / "second"
    for setting in ("user.name test", "user.email test@example.org"):
        git(first, "config", *setting.split())
    shutil.copy(place / ".dvc/config.local", first / ".dvc")  # a machine that has done the work
    typed(first, f"dvc checkout && dvc remote add --local --default drive '{tmp_path / 'drive'}'")
    typed(first, "dvc repro grpo && dvc push && git add --all && git commit -m grpo --allow-empty && git push")
    typed(first, "dvc push fetch prepare-mix preference-pairs sft qlora grpo orpo")

    git(tmp_path, "clone", "-q", "drive.git", "second")
    typed(second, f"dvc remote add --local --default drive '{tmp_path / 'drive'}' && dvc pull --allow-missing")
    assert "Running stage" not in typed(second, "dvc repro")


def test_experiments_are_recorded_and_sent_as_the_page_says(rebuilt, tmp_path):
    """Fetch and sft stand for what a changed grpo re-runs; the cache is the test's own, or nothing would run and be recorded."""
    place = copy_of(rebuilt, tmp_path / "mathmind")
    walk(place, "docs/tracking.md", "Switch it on", instead={"grpo.lr=1e-4": "fetch.sources.chat.rows=90", "grpo.lr=2e-3": "sft.lr=3e-3",
         "tracking.wandb=offline": "tracking.wandb=offline fetch", "tracking.tensorboard=true": "tracking.tensorboard=true sft"})  # fmt: skip
    assert [run.run.job_type for run in recorded(place)] == ["fetch"]
    assert [path.name for path in (place / "results/tensorboard").rglob("*tfevents*")]
    with wandb_server.serving() as server:
        said = walk(place, "docs/tracking.md", "Look at it", instead={"tensorboard --logdir results/tensorboard": ""}, **server.environment)
    assert "1" in said["mathmind sync --dry-run"] and len(server.runs) == 1


def test_every_page_is_found_from_the_readme():
    readme = read_page("README.md")
    for page in ("first-run", "experiments", "data", "reading-the-report", "going-to-a-gpu", "publishing", "chat", "tracking", "scoring", "clusters"):
        assert f"{page}.md" in readme
