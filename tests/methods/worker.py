"""`jaxsynth` in a process that kills itself at a chosen place.

python worker.py PLACE ARGUMENTS...: PLACE is "nowhere", "fine-tune", "generate" or "classify".
"""

import os
import signal
import sys

from jaxsynth.cli import main as cli
from jaxsynth.data import store
from jaxsynth.training.checkpoint import Checkpoints


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str) -> None:
    """In the training of an adapter or a classifier, or between the files of the second shard."""
    if place == "generate":
        write = store.write_json

        def write_or_die(path, *args, **kwargs):
            if path.name == "00001.seal":
                die()
            write(path, *args, **kwargs)

        store.write_json = write_or_die
        return
    part = {"fine-tune": "adapter", "classify": "both"}[place]
    save = Checkpoints.save

    def save_or_die(self, step, *args, **kwargs):
        if step == 4 and part in self.folder.parts:
            die()
        save(self, step, *args, **kwargs)

    Checkpoints.save = save_or_die


if __name__ == "__main__":
    place, *arguments = sys.argv[1:]
    if place != "nowhere":
        die_at(place)
    sys.exit(cli.main(arguments))
