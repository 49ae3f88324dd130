"""Every rank: load the newest checkpoint of a run as a resume does, save it again at once, then update the topology.

``resave.py RUN OUT``: the checkpoint goes to OUT/checkpoints, the digest of the masks after it to OUT/digest.
"""

import sys
from pathlib import Path

from llm_cht import dist
from llm_cht.config import parse
from llm_cht.train.build import build
from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.config import RunSettings, resolved
from llm_cht.train.engine import start_engine
from llm_cht.train.run import _engine_settings
from llm_cht.train.rundir import find_run
from llm_cht.train.state import collect, restore

if __name__ == "__main__":
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    settings = resolved(parse(RunSettings, "resave", [str(run / "config.yaml"), "--run", str(run), "--resume", "auto"]))
    engine = start_engine(_engine_settings(settings))
    _, checkpoint = find_run(settings, print)
    assert checkpoint is not None
    built = build(settings, engine, fresh=False, say=print)
    restore(built.parts, checkpoint, settings.seed)
    tensors, values = collect(built.parts)
    values |= {key: checkpoint.state[key] for key in ("settings", "data_fingerprint", "model")}
    CheckpointStore(out / "checkpoints", 1).save(checkpoint.step, tensors, values)
    assert built.updater is not None
    step = next(s for s in range(checkpoint.step + 1, settings.train.steps) if built.updater.due(s))
    built.updater.update(step)
    digest = built.updater.digest()
    assert dist.gather(digest) == [digest] * dist.world_size()
    if dist.is_main():
        (out / "digest").write_text(digest)
    dist.close()
