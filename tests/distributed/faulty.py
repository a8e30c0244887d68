"""`fastirt`, in which one rank meets a fault: KIND STEP RANK, then the arguments of `fastirt`.

After a restart by torchrun there is no fault. After the step STEP:

kill       SIGKILL
term       SIGTERM to the agent of the job
term-one   SIGTERM to the rank itself
full       no file can grow past 64 KiB
weights    one number of the rank's weights changes a little
nan        one number of the rank's weights becomes NaN
ring       two rows of its memory change places
gone       the data folder is moved
clock      the clock by which the rank saves is 1,000 seconds ahead

From the start on:

lr         another learning rate
seed       other weights
data       another data set, PATH-other
code       another version of fastirt
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fastirt.commands
import fastirt.training.health_checks
from fastirt.cli import main
from fastirt.model.build import build_encoder
from fastirt.step.train_step import TrainStep
from fastirt.training.saving import writer


def faulty(kind: str, at: int, rank: int) -> None:
    if int(os.environ.get("RANK", 0)) != rank or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return
    forward = TrainStep.__call__

    def step(self, batch):
        forward(self, batch)
        if batch.step != at:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "term":
            os.kill(os.getppid(), signal.SIGTERM)
        elif kind == "term-one":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        elif kind == "weights":
            self.networks.weights[3].data.view(-1)[0] += 1e-7
        elif kind == "ring":
            self.memory.embeddings[:2] = self.memory.embeddings[:2].flip(0)
        elif kind == "clock":
            writer.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)
        elif kind == "nan":
            self.networks.weights[3].data.view(-1)[0] = float("nan")
        elif kind == "gone":
            data = Path(sys.argv[sys.argv.index("--data-path") + 1])
            data.rename(data.with_name("moved"))

    TrainStep.__call__ = step
    if kind == "seed":

        def other(config, size):
            encoder = build_encoder(config, size)
            encoder.vit.cls_token.data[0, 0, 0] += 1
            return encoder

        fastirt.commands.build_encoder = other
    elif kind == "lr":
        sys.argv[sys.argv.index("--lr") + 1] = "5e-4"
    elif kind == "data":
        sys.argv[sys.argv.index("--data-path") + 1] += "-other"
    elif kind == "code":
        fastirt.training.health_checks.code_digest = lambda: "another"


if __name__ == "__main__":
    kind, at, rank = sys.argv[1:4]
    faulty(kind, int(at), int(rank))
    sys.exit(main(sys.argv[4:]))
