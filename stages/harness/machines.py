"""What machines that train together need beside torch: the network between them, and word of one that has failed or is gone."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count
from threading import Thread

from stages.harness.errors import InputError

WAIT = 900  # seconds until all machines must have come
BEAT = 1.0  # seconds between two words of a machine to the others: less than a process waits that has lost another (run_stage.PATIENCE)
SILENCE = 30.0  # seconds after which a machine that has said nothing is taken to be gone


def network(rendezvous: str | None) -> str:
    """The network over which processes talk: that which leads to the first machine; on one machine none leaves it."""
    if rendezvous is None:
        return "lo"
    import psutil

    host, port = rendezvous.split(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((host, int(port)))
            own = asking.getsockname()[0]
    except OSError as error:
        raise InputError(f"params.yaml: run.rendezvous: {host} cannot be reached from here ({error.strerror}): "
                         "give an address of the first machine that all others reach") from None  # fmt: skip
    if own.startswith("127."):
        raise InputError(f"params.yaml: run.rendezvous: {host} is {own} here, which no other machine reaches: give this machine's address")
    return next(name for name, found in psutil.net_if_addrs().items() if own in {each.address for each in found})


class Others:
    """The other machines of a run, heard through the store at which all met. When one fails or falls silent, this one ends too.

    torch ends the processes of one machine when one of them dies; what another machine's wait for is at best a connection that closes.
    """

    def __init__(self, stage: str, rendezvous: str, node: int, nodes: int) -> None:
        self.stage, self.rendezvous, self.node, self.nodes = stage, rendezvous, node, nodes
        self.heard: dict[int, float] = {}  # when each last said something new
        self.ended = False  # by another
        for work in (self._talk, self._listen):
            Thread(target=work, daemon=True).start()

    def tell(self, status: int) -> None:
        """Says that this machine has failed, if it has; the first, where the store is, waits until it has been heard."""
        if status and not self.ended:
            with suppress(RuntimeError):
                self._store(seconds=5).set(f"failed {self.node}", "")
                time.sleep(0 if self.node else 2 * BEAT)

    def _store(self, seconds: float):
        from torch.distributed import TCPStore

        host, port = self.rendezvous.split(":")
        return TCPStore(
            host, int(port), is_master=self.node == 0, multi_tenant=True, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )

    def _talk(self) -> None:
        words: dict[int, bytes] = {}
        with suppress(RuntimeError):  # the store is gone: its machine falls silent
            store = self._store(WAIT)
            for beat in count():
                store.set(f"beat {self.node}", str(beat))
                for other in set(range(self.nodes)) - {self.node}:
                    if store.check([f"failed {other}"]):
                        return self._end(f"machine {other} failed, and says why")
                    if store.check([f"beat {other}"]) and (word := store.get(f"beat {other}")) != words.get(other):
                        words[other], self.heard[other] = word, time.monotonic()
                time.sleep(BEAT)

    def _listen(self) -> None:
        """Apart from talking, which may wait for an answer that never comes."""
        while True:
            time.sleep(BEAT)
            for other, when in list(self.heard.items()):
                if time.monotonic() - when > SILENCE:
                    return self._end(f"machine {other} has said nothing for {SILENCE:.0f} s")

    def _end(self, why: str) -> None:
        self.ended = True
        print(f"{self.stage}: {why}: all end", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
