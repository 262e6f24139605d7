"""Two processes that train one model: the updates of one process, the same bytes again, also where they share the base out; and every death
of one told, survived and cleared up."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.harness.machines import BEAT
from stages.harness.ranks import SHARDED
from stages.training.checkpoints import SEAL
from tests.imports import ROOT
from tests.pipeline.conftest import CHANGES
from tests.pipeline.test_launcher import change, copy_of_the_tree, environment, only, scratch
from tests.pipeline.test_methods import RESUMED, digest

# Of what the curve tells after each update, as a share of it: measured 2e-6 at most, in six digits.
TOLERANCE = 1e-5
# Of an adapter's weights, the largest of which are 0.13 to 0.14: measured 4e-6; qlora's optimiser keeps 8 bits, which turn a rounding
# into a step of its scale: measured 6e-4.
WEIGHTS = {"sft": 2e-5, "qlora": 3e-3, "orpo": 2e-5}
ENDS_WITHIN = 60  # seconds
UNPADDED = {"rows": None, "recompute": None, "dequantise": None, "compile": False, "memory_gib": None}


@pytest.fixture(scope="session")
def together(small):
    """The small run's adapters, each trained again by two processes; orpo's also unpadded."""
    for stage in WEIGHTS:
        small.do(stage, processes=2, **RESUMED[stage][0], out=f"two-{stage}", out_curve=f"two-{stage}.csv")
    small.set_params({"orpo.packed": UNPADDED})
    small.do("orpo", processes=2, **RESUMED["orpo"][0], out="two-orpo-packed", out_curve="two-orpo-packed.csv")
    small.set_params({})
    return small


def curve(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", ["sft", "qlora", "orpo", "orpo-packed"])
def test_the_updates_of_two_processes_are_those_of_one(together, run):
    """Losses, gradients' norms, validation losses and adapters; sft and orpo end an epoch with too few rows for both."""
    from safetensors.torch import load_file

    stage = run.split("-")[0]
    one, two = curve(together / f"{stage}.csv"), curve(together / f"two-{run}.csv")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for column in two[0].keys() - {"logits.chosen", "logits.rejected"}:  # those are means over padding too
        assert [float(row[column]) for row in two] == pytest.approx([float(row[column]) for row in one], rel=TOLERANCE), column
    ours, theirs = (load_file(together / name / "adapter_model.safetensors") for name in (f"two-{run}", stage))
    assert ours.keys() == theirs.keys()
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert apart < WEIGHTS[stage]


def test_two_processes_pretrain_as_one_does(small):
    """The first twenty updates, in which the rate rises whatever the number of steps."""
    small.set_params({"base_model.steps": 20, "base_model.save_every": 20})
    small.do("base-model", processes=2, **RESUMED["base-model"][0], out="two-base", out_curve="two-base.csv")
    small.set_params({})
    (two,), one = curve(small / "two-base.csv"), curve(small / "base.csv")[0]
    assert two["step"] == one["step"] == "20" and float(two["loss"]) == pytest.approx(float(one["loss"]), rel=TOLERANCE)


def ranks_of(started: subprocess.Popen, count: int = 2) -> dict[int, psutil.Process]:
    """The processes that a run has started on its machine, by rank, once there are so many."""
    deadline = time.monotonic() + ENDS_WITHIN
    while time.monotonic() < deadline:
        found = {}
        for process in psutil.Process(started.pid).children(recursive=True):
            if "stages.harness.run_stage" in process.cmdline() and (rank := process.environ().get("RANK")):
                found[int(rank)] = process
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} processes have not come up")


def wait_for(path: Path, started: subprocess.Popen) -> None:
    while not path.exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)


def ended(started: subprocess.Popen, ranks: dict[int, psutil.Process]) -> str:
    """What a run has said that ended in time, all of its processes with it."""
    output, _ = started.communicate(timeout=ENDS_WITHIN)
    _, alive = psutil.wait_procs(ranks.values(), timeout=5)
    assert not alive
    return output


def test_a_run_of_two_survives_the_death_and_the_failure_of_one_and_the_death_of_both_to_the_same_bytes(together):
    """Process 1 is killed; then the one that started both; then process 1 cannot write its part of a checkpoint; then all goes well."""
    again = {**RESUMED["qlora"][0], "out": "two-again", "out_curve": "two-again.csv", "scratch": "two-killed", "processes": 2}
    checkpoints = together / "two-killed/checkpoints"

    started = together.start("qlora", **again)
    wait_for(checkpoints / "checkpoint-5" / SEAL, started)
    ranks = ranks_of(started)
    ranks[1].kill()
    output = ended(started, ranks)
    assert started.returncode == 128 + signal.SIGKILL
    assert output.splitlines()[-1] == "qlora: process 1 was killed (SIGKILL): the others ended with it" and "Traceback" not in output, output

    started = together.start("qlora", **again)
    ranks = ranks_of(started)
    started.kill()
    ended(started, ranks)

    started = together.start("qlora", **again)
    ranks = ranks_of(started)
    wait_for(checkpoints / "checkpoint-10" / SEAL, started)
    ranks[1].rlimit(psutil.RLIMIT_FSIZE, (10_000, 10_000))  # bytes: enough for its last words
    output = ended(started, ranks)
    assert started.returncode == 1
    assert "rng_state" in output and "peer" not in output, output  # process 1's own words, and none of the one that it left
    assert output.splitlines()[-1] == "qlora: process 1 failed first: the others ended with it"

    assert not (together / "two-again").exists()
    done = together.run("qlora", **again)
    assert done.returncode == 0, done.stdout
    assert digest(together / "two-again") == digest(together / "two-qlora")
    assert (together / "two-again.csv").read_bytes() == (together / "two-qlora.csv").read_bytes()


def test_two_processes_stop_together_when_the_first_has_seen_the_form(together, monkeypatch):
    """A share of answers that any model in training reaches; with the base shared out both answer, at the same update."""
    together.set_params({"sft.stop.every": 2, "sft.stop.problems": 8, "sft.stop.share": 1e-9, "sft.max_steps": 60})
    together.do("sft", processes=2, **RESUMED["sft"][0], out="two-stopped", out_curve="two-stopped.csv")
    monkeypatch.setitem(together.environment, SHARDED, "true")
    together.do("sft", processes=2, **RESUMED["sft"][0], out="shared-stopped", out_curve="shared-stopped.csv")
    together.set_params({})
    rows = curve(together / "two-stopped.csv")
    assert len(rows) < 60 and float(rows[-1]["form"]) > 0 and all(float(row["form"] or 0) == 0 for row in rows[:-1])
    assert_same(together, "shared-stopped", "two-stopped")


def assert_same(place, one: str, other: str) -> None:
    assert digest(place / one) == digest(place / other)
    assert (place / f"{one}.csv").read_bytes() == (place / f"{other}.csv").read_bytes()


def test_two_processes_that_share_a_4_bit_base_out_train_to_the_bytes_of_two_that_hold_all_of_it_also_after_a_kill(together, monkeypatch):
    """With validation losses, early stopping and the best checkpoint."""
    monkeypatch.setitem(together.environment, SHARDED, "true")
    again = {**RESUMED["qlora"][0], "out": "shared-qlora", "out_curve": "shared-qlora.csv", "scratch": "shared-killed", "processes": 2}
    started = together.start("qlora", **again)
    wait_for(together / "shared-killed/checkpoints/checkpoint-10" / SEAL, started)
    ranks = ranks_of(started)
    ranks[0].kill()
    ended(started, ranks)
    done = together.run("qlora", **again)
    assert done.returncode == 0, done.stdout
    assert json.loads((together / "shared-killed/stage.json").read_text())["sharded"] is True
    assert_same(together, "shared-qlora", "two-qlora")


def test_a_base_with_a_head_of_its_own_is_shared_out_to_the_same_bytes(together, monkeypatch, tmp_path):
    """orpo, unpadded, which reads the head's weights beside the model; every other base here has one matrix at both ends."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(together / "base", tmp_path / "base")
    config, file = tmp_path / "base/config.json", tmp_path / "base/model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * 1.1}, file, metadata={"format": "pt"})
    inputs = RESUMED["orpo"][0] | {"base": str(tmp_path / "base")}
    together.set_params({"orpo.packed": UNPADDED, "orpo.max_steps": 2})
    together.do("orpo", processes=2, **inputs, out="two-headed", out_curve="two-headed.csv")
    monkeypatch.setitem(together.environment, SHARDED, "true")
    together.do("orpo", processes=2, **inputs, out="shared-headed", out_curve="shared-headed.csv")
    together.set_params({})
    assert_same(together, "shared-headed", "two-headed")


@pytest.fixture(scope="session")
def canned(small):
    """Updates of grpo's trainer on given completions, by one process and by two."""
    out = small / "canned"
    out.mkdir()
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    for start in ([], ["torch.distributed.run", "--nproc-per-node", "2", *meet, "-m"]):
        done = subprocess.run([sys.executable, "-m", *start, "tests.pipeline.canned_grpo", "canned"], cwd=small.folder, env=small.environment,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert done.returncode == 0, done.stdout
    return out


@pytest.mark.parametrize("variant", ["padded", "packed", "little-room", "kl"])
def test_two_processes_train_grpo_on_the_prompts_of_one_in_their_order_and_by_its_updates(canned, variant):
    from safetensors.torch import load_file

    one, two = (json.loads((canned / f"{variant}-{processes}.json").read_text()) for processes in (1, 2))
    assert one["asked"] == two["asked"] and len(one["asked"][0]) == 8
    for figure in ("grad_norm", "reward", "reward_std", "num_tokens", "completions/mean_length"):
        found = [[log[figure] for log in run["told"] if figure in log] for run in (one, two)]  # some are told of new completions only
        assert found[0] and found[1] == pytest.approx(found[0], rel=TOLERANCE), figure
    assert [log["loss"] for log in two["told"]] == pytest.approx([log["loss"] for log in one["told"]], abs=TOLERANCE)
    ours, theirs = (load_file(canned / f"{variant}-{processes}.safetensors") for processes in (2, 1))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 2e-4  # of 0.14; measured 4e-5


def test_where_layers_are_recomputed_grpo_trains_as_where_all_is_kept(canned):
    from safetensors.torch import load_file

    less, more = (load_file(canned / f"{variant}-1.safetensors") for variant in ("little-room", "packed"))
    assert max(float((less[name] - more[name]).abs().max()) for name in more) < 1e-6


def test_engines_apart_get_the_adapter_as_it_stands_and_draw_what_one_beside_each_trainer_would(canned):
    assert (canned / "apart-2.safetensors").read_bytes() == (canned / "packed-2.safetensors").read_bytes()


def test_grpo_by_two_comes_again_after_the_death_of_one(small):
    twice = {**RESUMED["grpo"][0], "processes": 2}
    small.do("grpo", **twice, out="two-grpo", out_curve="two-grpo.csv")
    again = {**twice, "out": "two-grpo-again", "out_curve": "two-grpo-again.csv", "scratch": "two-grpo-killed"}
    started = small.start("grpo", **again)
    wait_for(small / "two-grpo-killed/checkpoints/checkpoint-2" / SEAL, started)
    ranks = ranks_of(started)
    ranks[1].kill()
    assert ended(started, ranks).splitlines()[-1] == "grpo: process 1 was killed (SIGKILL): the others ended with it"
    done = small.run("grpo", **again)
    assert done.returncode == 0, done.stdout
    assert digest(small / "two-grpo-again") == digest(small / "two-grpo")
    assert (small / "two-grpo-again.csv").read_bytes() == (small / "two-grpo.csv").read_bytes()


def namespaces_work() -> bool:
    made = subprocess.run(["ip", "netns", "add", "mathmind-try"], capture_output=True).returncode == 0 if shutil.which("ip") else False
    return made and subprocess.run(["ip", "netns", "del", "mathmind-try"], capture_output=True).returncode == 0


@pytest.fixture
def machines(together, tmp_path):
    """Two copies of the tree, each in a network of its own, with a wire between the two."""
    folders = [tmp_path / name for name in ("first", "other")]
    for folder in folders:
        copy_of_the_tree(folder)
        only(folder, "sft")
        shutil.copytree(together / "base", folder / "models/base", dirs_exist_ok=True)
        shutil.copytree(together / "mix", folder / "data/mix", dirs_exist_ok=True)
        changes = {name.replace(".", "__"): value for name, value in CHANGES.items()}
        change(folder, **changes, run__nodes=2, run__rendezvous="10.77.0.1:29400")
    names = [f"mathmind-{folder.name}" for folder in folders]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire-a", "netns", names[0], "type", "veth", "peer", "name", "wire-b", "netns", names[1])
        for name, wire, address in zip(names, ("wire-a", "wire-b"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("-n", name, "addr", "add", address, "dev", wire)
            for link in ("lo", wire):
                ip("-n", name, "link", "set", link, "up")
        yield [(folder, ["ip", "netns", "exec", name]) for folder, name in zip(folders, names, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


APART = pytest.mark.skipif(not namespaces_work(), reason="no network namespace can be made here: that takes root")


def both(machines) -> tuple[subprocess.Popen, subprocess.Popen]:
    """`dvc repro sft` on the first, `mathmind join sft` on the other."""
    commands = [["-m", "dvc", "repro", "sft"], ["-m", "stages", "join", "sft"]]
    return tuple(
        subprocess.Popen([*inside, sys.executable, *command], cwd=folder, env=environment(PYTHONPATH=str(folder)), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for (folder, inside), command in zip(machines, commands, strict=True)
    )  # fmt: skip


@APART
def test_two_machines_train_what_two_processes_of_one_do_and_the_first_has_it(together, machines):
    started, joined = both(machines)
    output, said = started.communicate()[0], joined.communicate(timeout=ENDS_WITHIN)[0]
    first, other = (folder for folder, _ in machines)
    assert started.returncode == 0, output + said
    assert joined.returncode == 0 and said.splitlines()[-1] == "sft: the first machine has its outs", said

    ours, theirs = digest(first / "models/sft"), digest(together / "two-sft")
    for found in (ours, theirs):
        del found["adapter_config.json"]  # it names the base's folder
    assert ours == theirs
    assert (first / "results/plots/sft.csv").read_bytes() == (together / "two-sft.csv").read_bytes()
    assert json.loads((first / "results/timing/sft.json").read_text())["processes"] == 2
    assert (first / "dvc.lock").exists() and not (other / "dvc.lock").exists()
    assert not (other / "models/sft").exists() and scratch(first) == scratch(other) == []
    assert (other / "results/timing/sft.json").read_bytes() == (ROOT / "results/timing/sft.json").read_bytes()


@APART
def test_when_one_machine_fails_the_other_says_so_and_ends(machines):
    started, joined = both(machines)
    mine, others = (ranks_of(run, 1) for run in (started, joined))
    wait_for(machines[0][0] / ".dvc/tmp/mathmind/sft", started)
    time.sleep(2 * BEAT)  # until each has heard of the other
    others[1].kill()
    assert "sft: process 1 was killed (SIGKILL)" in ended(joined, others)
    assert "sft: machine 1 failed, and says why: all end" in ended(started, mine)
    assert started.returncode and joined.returncode and not (machines[0][0] / "models/sft").exists()
