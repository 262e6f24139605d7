"""`mathmind publish` with the hub's own client, to a hub on loopback: what arrives, what is refused, and that the card's code runs.

The models are those of the embedded graph, as `dvc repro` left them in this folder.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from ruamel.yaml import YAML

from stages.harness.jsonl import read_json, read_rows, write_json
from stages.harness.params import read_params
from stages.host.card import card
from stages.host.graph import hash_of, read_graph, read_yaml
from stages.host.layout import choose, parts
from stages.host.measured import measured
from stages.host.verify import Commit
from tests.hub_server import serving
from tests.hub_uploads import WritableHub
from tests.imports import ROOT
from tests.pipeline.conftest import flip
from tests.pipeline.test_launcher import copy_of, copy_of_the_tree, environment, git

NEEDED = ("data/raw", "data/mix", "models/base", "models/sft", "models/grpo", "models/merged/grpo", "models/gguf/grpo",
          "results/predictions/grpo.jsonl")  # fmt: skip
TO = "team/mathmind-grpo"
FORMS = ("F16", "Q8_0", "Q4_K_M")

pytestmark = [
    pytest.mark.skipif(not all((ROOT / path).exists() for path in NEEDED), reason="the graph has not run here: run `make repro`"),
    pytest.mark.xdist_group("publish"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run, committed: this working tree with grpo's outs, and a lock that holds what lies there."""
    folder = tmp_path_factory.mktemp("publish") / "original"
    copy_of_the_tree(folder)
    for path in NEEDED:
        subprocess.run(["cp", "-a", str(ROOT / path), str((folder / path).parent)], check=True)
    lock_what_is_here(folder)
    return folder


def lock_what_is_here(folder):
    """Commits the tree with a dvc.lock of what lies in it, whatever made that."""
    lock, known = read_yaml(folder / "dvc.lock"), {}

    def hashed(part):
        path = part["path"]
        if path not in known:
            known[path] = hash_of(folder / path) if (folder / path).exists() else part["md5"]
        return known[path]

    for entry in lock["stages"].values():
        for part in (*entry["deps"], *entry["outs"]):
            part["md5"] = hashed(part)
    write_lock(folder, lock)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "a finished run")


def write_lock(folder, lock):
    with (folder / "dvc.lock").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(lock, file)


@pytest.fixture
def place(original, tmp_path):
    return copy_of(original, tmp_path / "place")


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "hub", WritableHub) as hub:
        yield hub


def start(folder, hub, *arguments, **more):
    """`mathmind publish grpo`, to a hub, or to one out of reach where there is none."""
    asked = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token} if hub else {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": ""}
    asked |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "home"), **more}
    command = [sys.executable, "-m", "stages", "publish", "grpo", "--to", TO, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(**asked), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def publish(folder, hub, *arguments, **more):
    running = start(folder, hub, *arguments, **more)
    output, _ = running.communicate()
    return subprocess.CompletedProcess(running.args, running.returncode, output)


def published(folder, hub, *arguments):
    done = publish(folder, hub, *arguments)
    assert done.returncode == 0, done.stdout
    assert hub.token not in done.stdout
    return done.stdout


def refused(done, sentence):
    assert done.returncode == 2, done.stdout
    assert sentence in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("Error: ")]) == 1


def refusals(folder, *arguments):
    """What --dry-run would refuse; there is no hub to ask, and no token."""
    done = publish(folder, None, "--dry-run", "--json", *arguments)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)["refusals"]


def files(folder, below=""):
    return {below + path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(original, tmp_path_factory):
    """The hub after one publication of everything, and what that said; its tests only read."""
    with serving(tmp_path_factory.mktemp("hub"), WritableHub) as hub:
        yield hub, published(original, hub, "--license", "mit")


def test_every_file_arrives_bit_for_bit_in_one_private_commit(original, whole):
    hub, said = whole
    got = hub.files(TO)
    wanted = files(original / "models/merged/grpo") | files(original / "models/grpo", "adapter/") | files(original / "models/base", "base/")
    wanted |= {f"mathmind-grpo-{form}.gguf": (original / f"models/gguf/grpo/{form.lower()}.gguf").read_bytes() for form in FORMS}
    config = "adapter/adapter_config.json"
    assert set(got) - set(wanted) == {"README.md", "Modelfile", "template", "params"} and set(wanted) <= set(got)
    assert {name: content for name, content in got.items() if name in wanted and name != config} == {
        name: content for name, content in wanted.items() if name != config
    }
    assert json.loads(got[config]) == json.loads(wanted[config]) | {"base_model_name_or_path": f"{TO}/base"}
    assert len(hub.repos["model", TO].commits) == 2 and hub.repos["model", TO].private
    assert f"{hub.endpoint}/{TO}: {len(got)} files," in said and "private" in said


def test_the_storage_host_sees_no_token(whole):
    hub, _ = whole
    puts = [seen for seen in hub.seen if seen.method == "PUT" and seen.server == "storage"]
    assert len(puts) == 6 and not any(seen.headers["Authorization"] for seen in puts)


def test_the_hubs_metadata_parses_and_its_numbers_are_those_of_metrics(original, whole, tmp_path):
    from huggingface_hub import ModelCard, metadata_load
    from huggingface_hub.repocard_data import eval_results_to_model_index

    hub, _ = whole
    (tmp_path / "README.md").write_bytes(hub.files(TO)["README.md"])
    card, scores = ModelCard.load(tmp_path / "README.md"), read_json(original / "metrics.json")["models"]["grpo"]
    assert {(result.metric_type, result.metric_value) for result in card.data.eval_results} == {
        ("pass@1", scores["pass_at_1"]), ("bleu", scores["bleu"]),
    }  # fmt: skip
    raw = metadata_load(tmp_path / "README.md")
    assert raw["model-index"] == eval_results_to_model_index("mathmind-grpo", card.data.eval_results)
    assert raw["license"] == "mit" and raw["pipeline_tag"] == "text-generation" and {"mathmind", "grpo"} <= set(raw["tags"])
    for share in ("pass_at_1", "pass_at_1_low", "pass_at_1_high", "bleu_low", "bleu_high"):
        assert f"{100 * scores[share]:.1f}" in card.text
    assert git(original, "rev-parse", "HEAD").strip() in card.text
    assert hashlib.sha256((original / "dvc.lock").read_bytes()).hexdigest() in card.text
    assert [seen.method for seen in hub.sent("/api/validate-yaml")] == ["POST"]


RUN = """
import contextlib, io, json, sys
said = {}
for name, code in json.load(open(sys.argv[1])).items():
    heard, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(heard):
        exec(code, scope)
    said[name] = heard.getvalue()
    if "model" in scope:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def answer(model, tokenizer):
            asked = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True,
                                                  return_tensors="pt", return_dict=True)
            ids = model.generate(**asked, max_new_tokens=96, do_sample=False)[0]
            return tokenizer.decode(ids[asked["input_ids"].shape[1]:], skip_special_tokens=True), model(**asked).logits

        local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("models/base"), "models/grpo")
        (text, logits), (wanted, exact) = answer(scope["model"], scope["tokenizer"]), answer(local, AutoTokenizer.from_pretrained("models/grpo"))
        said |= {"adapter": text, "local": wanted, "equal": torch.equal(logits, exact)}
print(json.dumps(said))
"""


def test_the_cards_own_code_brings_the_model_from_the_hub_and_gives_the_local_models_answers(original, whole, tmp_path):
    hub, _ = whole
    question = next(read_rows(original / "data/mix/test.jsonl"))["question"]
    blocks = re.findall(r"```python\n(.*?)```", hub.files(TO)["README.md"].decode(), re.DOTALL)
    write_json(tmp_path / "blocks.json", {"merged": blocks[0].replace("QUESTION", question), "adapter code": blocks[1]})
    asked = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "blocks.json"), question],
        cwd=original, env=environment(**asked, HF_HOME=str(tmp_path / "home")), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    answered = next(read_rows(original / "results/predictions/grpo.jsonl"))["completion"]
    assert said["merged"].strip() == answered.strip()
    assert said["adapter"] == said["local"] and said["equal"]


def test_ollama_is_given_the_very_prompt_that_was_scored(original, whole):
    hub, _ = whole
    got = {name: hub.files(TO)[name].decode() for name in ("Modelfile", "template", "params")}
    test, answers = read_rows(original / "data/mix/test.jsonl"), read_rows(original / "results/predictions/grpo.jsonl")
    for row, answer in zip(test, answers, strict=True):
        asked = got["template"].replace("{{ .Prompt }}", row["question"])
        assert hashlib.sha256(asked.encode()).hexdigest()[:16] == answer["prompt_sha256"]
    assert f'FROM ./mathmind-grpo-Q8_0.gguf\nTEMPLATE """{got["template"]}"""\n' in got["Modelfile"]
    assert json.loads(got["params"])["stop"] == re.findall(r'PARAMETER stop "(.*)"', got["Modelfile"]) == ["<|im_end|>", "<|endoftext|>"]


def test_a_second_run_changes_nothing_and_a_narrower_one_takes_away_what_is_not_chosen(place, hub):
    published(place, hub, "--gguf", "q8_0", "--adapter")
    repo, puts = hub.repos["model", TO], len(hub.sent(".gguf")) + len(hub.objects)
    assert "nothing new" in published(place, hub, "--gguf", "q8_0", "--adapter")
    assert len(repo.commits) == 2 and len(hub.objects) == puts == 3 and len(hub.sent("/commit/main")) == 1
    hub.advance(repo, {"notes.txt": b"by hand"}, [])
    said = published(place, hub, "--gguf", "q4_k_m", "--json")
    assert "mathmind-grpo-Q8_0.gguf" in json.loads(said)["removed"] and json.loads(said)["changed"]
    assert set(hub.files(TO)) == {"README.md", "Modelfile", "template", "params", "mathmind-grpo-Q4_K_M.gguf", "notes.txt"}


def test_only_public_is_public_and_nothing_private_goes_where_all_can_see(place, hub):
    published(place, hub, "--adapter")
    repo = hub.repos["model", TO]
    assert repo.private
    assert "for everybody to see" in published(place, hub, "--adapter", "--public") and not repo.private
    refused(publish(place, hub, "--adapter"), f"{TO} is public: give --public to publish there")
    assert len(repo.commits) == 2


def test_an_upload_that_was_cut_goes_on_with_what_is_missing(place, hub):
    weights = (place / "models/merged/grpo/model.safetensors").read_bytes()
    hub.stalled = {hashlib.sha256(weights).hexdigest()}
    running = start(place, hub)
    deadline = time.monotonic() + 300
    while len(hub.objects) < 5 and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.kill()
    running.communicate()
    assert len(hub.objects) == 5 and hub.files(TO) == {}, "nothing is to be seen before all has come"
    missing, hub.stalled = hub.stalled, set()
    hub.seen.clear()
    published(place, hub)
    assert {seen.path.rpartition("/")[2] for seen in hub.seen if seen.method == "PUT"} == missing
    assert hub.files(TO)["model.safetensors"] == weights


def test_whatever_the_hub_refuses_is_one_sentence_without_the_token(place, hub):
    wrong = publish(place, hub, "--adapter", HF_TOKEN="hf_" + "another")
    refused(wrong, f"refuses {TO} (401): set HF_TOKEN to a valid token that may write there")
    assert "another" not in wrong.stdout
    refused(publish(place, hub, "--adapter", HF_TOKEN="", HF_TOKEN_PATH=str(place / "none")), "there is no token: set HF_TOKEN")
    refused(publish(place, hub, "--adapter", HF_ENDPOINT="http://127.0.0.1:9"), "http://127.0.0.1:9 is out of reach or breaks off")
    hub.plant("/preupload/main", status=507)
    refused(publish(place, hub, "--adapter"), f"answers 507 for {TO}: run again when the hub is well")
    refused(publish(place, hub, "--adapter", HF_HUB_DISABLE_XET="0"), "(HF_HUB_DISABLE_XET=1, where the hub knows no Xet)")
    hub.plant("/api/validate-yaml", status=200)
    refused(publish(place, hub, "--adapter"), "does not answer as a hub does: mend HF_ENDPOINT")
    refused(publish(place, hub, "--adapter", "--license", "My Own"), 'does not take the card (Invalid metadata in README.md. - "license" must be')


def test_somebody_elses_repository_is_left_as_it_is(place, hub):
    hub.advance(hub.begin(TO, private=True), {"README.md": b"---\ntags: [mine]\n---\nA model of mine."}, [])
    refused(publish(place, hub, "--adapter"), f"{TO} holds something else than grpo from here: name another repository")
    assert set(hub.files(TO)) == {"README.md"}


def damage_committed_metrics(folder):
    metrics = read_json(folder / "metrics.json")
    metrics["models"]["grpo"]["pass_at_1"] = 0.99
    write_json(folder / "metrics.json", metrics)
    git(folder, "commit", "-qam", "better")


def results_of_other_weights(folder):
    """A lock whose results are of other weights than it says were written."""
    lock = read_yaml(folder / "dvc.lock")
    read = next(dep for dep in lock["stages"]["eval@grpo"]["deps"] if dep["path"] == "models/merged/grpo")
    read["md5"] = 32 * "0" + ".dir"
    write_lock(folder, lock)
    git(folder, "commit", "-qam", "another run's results")


def damage_source(folder, **terms):
    """Other terms of the source `reasoning`, as if a hub had given it, in a lock that fits."""
    about = read_json(folder / "data/raw/sources.json")
    about["reasoning"] |= {"kind": "hub", "repo": "team/maths", "revision": 40 * "a", "gated": False, **terms}
    (folder / "data/raw/sources.json").unlink()
    write_json(folder / "data/raw/sources.json", about)
    lock_what_is_here(folder)


def change(path):
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: change(folder / "README.md"), "README.md is not as committed"),
        (lambda folder: (folder / "stages/new.py").touch(), "stages/new.py is not as committed"),
        (lambda folder: flip(folder / "models/grpo/adapter_model.safetensors", 9000), "models/grpo is not what dvc.lock says"),
        (lambda folder: flip(folder / "models/gguf/grpo/q8_0.gguf", 9000), "models/gguf/grpo is not what dvc.lock says"),
        (lambda folder: shutil.rmtree(folder / "models/merged/grpo"), "models/merged/grpo is not here: bring it with `dvc pull`"),
        (damage_committed_metrics, "metrics.json (compare) is committed as"),
        (results_of_other_weights, "models/merged/grpo (eval@grpo) dvc.lock says that this stage read"),
        (lambda folder: damage_source(folder, license="cc-by-nc-nd-4.0"), "reasoning (team/maths) is under cc-by-nc-nd-4.0, which forbids"),
    ],
    ids=["tree", "new-file", "weights", "gguf", "missing", "metrics", "other-weights", "licence"],
)  # fmt: skip
def test_what_the_commit_would_not_make_again_or_a_licence_forbids_is_refused_before_the_hub_is_asked(place, hub, damage, sentence):
    damage(place)
    refused(publish(place, hub), f"not published: {sentence}")
    assert hub.seen == []


def test_terms_that_somebody_has_read_are_no_hindrance_and_the_card_says_so(place):
    damage_source(place, license="other", license_name="house-rules")
    assert "terms that are not known here, house-rules" in refusals(place)[0]
    done = publish(place, None, "--dry-run", "--json", "--terms-read", "reasoning")
    said = json.loads(done.stdout)
    assert said["refusals"] == [] and "has read the terms of reasoning" in said["card"]
    assert "[team/maths](https://huggingface.co/datasets/team/maths) at aaaaaaaaaaaa | 3,000 | house-rules" in said["card"]


def test_a_dry_run_lists_every_refusal_and_what_a_run_writes_beside_its_results_is_none(place):
    change(place / "results/report.md")
    change(place / "results/timing/grpo.json")
    assert refusals(place) == []
    damage_source(place, license=None)
    results_of_other_weights(place)
    change(place / "metrics.json")
    found = refusals(place)
    for sentence in ("metrics.json is not as committed", "models/merged/grpo (eval@grpo) dvc.lock says", "metrics.json is not what dvc.lock says",
                     "reasoning (team/maths) is under terms"):  # fmt: skip
        assert any(sentence in refusal for refusal in found), found


def test_a_dry_run_shows_files_with_sizes_and_writes_the_card_where_it_is_asked_to(place):
    done = publish(place, None, "--dry-run", "--gguf", "q8_0", "--card", "card.md")
    size = (place / "models/gguf/grpo/q8_0.gguf").stat().st_size
    assert f"{size:>14,}  mathmind-grpo-Q8_0.gguf" in done.stdout.splitlines() and "private: 5 files" in done.stdout
    assert (place / "card.md").read_text().startswith("---\nlanguage: en\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gguf", "q2_k"], "--gguf q2_k: params.yaml's gguf_export.files makes f16, q8_0, q4_k_m"),
        (["--to", "nobody"], "--to nobody: no name of a repository: write ORG/NAME"),
        (["--terms-read", "chat"], "--terms-read chat: the model is not made of that"),
        (["--card", "card.md"], "--card goes with --dry-run"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(original, arguments, sentence):
    refused(publish(original, None, *arguments), sentence)


def run_here(model):
    """A model of this working tree as the card sees it, from a repository whose address nobody knows."""
    params = read_params(ROOT / "params.yaml")
    return dataclasses.replace(measured(ROOT, model, params, read_graph(ROOT, params), Commit(ROOT)), origin=None)


def rendered(run, adapter=False, merged=False, gguf=(), to="your-name/mathmind-grpo", read=()):
    chosen = choose(run.model, run.params, adapter, merged, gguf)
    return card(run, to, chosen, list(parts(ROOT, run.model, to, chosen, run.base_source, run.asking)), None, read)


def test_the_card_of_a_published_base_names_it_and_its_terms_and_calls_nothing_a_toy():
    from huggingface_hub import ModelCard

    source = {"repo": "Qwen/Qwen1.5-4B", "revision": 40 * "b", "license": "other", "license_name": "tongyi-qianwen-research",
              "license_link": "https://example.org/LICENSE", "gated": False}  # fmt: skip
    test = {"kind": "hub", "repo": "openai/gsm8k", "revision": 40 * "c", "license": "mit", "gated": False, "rows": 1319}
    run = run_here("grpo")
    run = dataclasses.replace(
        run, base_source=source, sources={**run.sources, "rl": {**test, "repo": "team/rl"}, "test": test},
        params={**run.params, "base_model": {**run.params["base_model"], "kind": "hub", "repo": source["repo"]}},
    )  # fmt: skip
    read = ModelCard(rendered(run, adapter=True, read=("base-model",)))
    assert read.data.base_model == source["repo"] and read.data.base_model_relation == "adapter" and read.data.library_name == "peft"
    assert (read.data.license, read.data.license_name, read.data.license_link) == ("other", source["license_name"], source["license_link"])
    assert read.data.datasets == ["team/rl"]
    assert {(result.dataset_type, result.dataset_revision) for result in read.data.eval_results} == {("openai/gsm8k", 40 * "c")}
    assert f'from_pretrained("Qwen/Qwen1.5-4B", revision="{40 * "b"}")' in read.text
    assert "toy" not in read.text and "generated problems" not in read.text and "vllm serve" not in read.text and "ollama" not in read.text
    assert "has read the terms of base-model" in read.text and "given under tongyi-qianwen-research (https://example.org/LICENSE)" in read.text
    compile(re.search(r"```python\n(.*?)```", read.text, re.DOTALL)[1], "card", "exec")


@pytest.mark.parametrize("model", ["base", "sft", "qlora", "orpo"])
def test_every_model_has_a_card(model):
    text = rendered(run_here(model))
    assert ("has no chat template" in text) == (model == "base") and ("subfolder=\"adapter\"" in text) == (model != "base")
    assert "**This is a toy.**" in text and not re.search(r"\n\n\n", text) and not re.search(r"[ \t]+$", text, re.MULTILINE)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")


def test_the_card_in_the_docs_is_what_is_written_now():
    """But for the commit, the lock's hash and seconds; `docs/publishing.md` has the command that writes it."""
    assert _timeless((ROOT / "docs/card.md").read_text(encoding="utf-8")) == _timeless(rendered(run_here("grpo")))


def _timeless(card):
    card = re.sub(r"\b([0-9a-f]{40}|[0-9a-f]{64})\b", "#", card)
    return re.sub(r"^(\| [\w@-]+ \|) [\d.,]+ (\| .* \| (?:bitwise|statistical) \|)$", r"\1 # \2", card, flags=re.MULTILINE)
