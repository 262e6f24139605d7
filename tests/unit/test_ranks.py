"""Processes that train together, as far as one is enough to tell."""

from stages.harness import ranks
from stages.harness.run_ranks import main


def test_a_process_alone_is_the_first_and_hears_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks.meet()
    assert (ranks.rank(), ranks.size(), ranks.is_first(), ranks.of_several_machines()) == (0, 1, True, False)
    assert ranks.told("a word") == "a word" and ranks.everybody(3) == [3]


def test_an_address_that_no_other_machine_reaches_is_one_sentence(capsys):
    assert main(["--processes", "1", "--nodes", "2", "--node", "0", "--rendezvous", "127.0.0.1:29400", "sft", "--scratch", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sft: params.yaml: run.rendezvous: 127.0.0.1 is 127.0.0.1 here") and said.count("\n") == 1
