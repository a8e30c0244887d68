"""Which checkpoint a run goes on from: --resume, and torchrun's restarts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Optional

from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.training import checkpoint
from fastirt.training.run_folder import RunFolder

log = logging.getLogger("fastirt")


def after_restart(flags: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Rewrite the flags for a torchrun restart (--max-restarts): resume from this job's folder.

    Without --output-dir the folder is named after the job, so that the next attempt finds it.
    Restart counts are per agent, so their maximum is used; `config.json` records the job's id, so
    another job's folder is never resumed.
    """
    own = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "MAX_RESTARTS", "RESTART_COUNT")]
    everyone = ranks.host.gather_json(own)
    job, most, attempts = own[0], *(max(int(other[i] or 0) for other in everyone) for i in (1, 2))
    if not job or not most:
        return flags
    if not flags.get("resume") and not flags.get("output_dir"):
        if job == "none":
            raise ranks.shared_error(
                "torchrun --max-restarts: pass --output-dir too, or the next attempt cannot find this one's checkpoints"
            )
        flags = {**flags, "output_dir": str(Path("outputs") / f"job-{job}")}
    folder = Path(flags.get("output_dir") or flags["resume"])
    # --resume RUN/checkpoints/step_N.safetensors
    folder = folder.parent.parent if folder.is_file() else folder

    def may_resume() -> bool:
        return RunFolder(folder).read_tree().get("job") in (None, job) and (
            "resume" not in flags or checkpoint.latest(folder) is not None
        )

    return (
        {**flags, "output_dir": str(folder), "resume": ""} if attempts and ranks.host.run_on_main(may_resume) else flags
    )


def checkpoint_to_resume(flags: dict[str, Any]) -> Optional[Path]:
    """The checkpoint that --resume names, or None for a fresh start.

    `--resume` alone means --output-dir; without a checkpoint there the run starts at step 0. Raises
    UserError.
    """
    if "resume" not in flags:
        return None
    place = flags["resume"] or flags.get("output_dir")
    if not place:
        raise UserError("--resume needs a run folder: --resume FOLDER, or --output-dir FOLDER --resume")
    found = checkpoint.latest(Path(place))
    if found is None:
        if flags["resume"]:
            raise UserError(
                f"--resume {place}: no checkpoint there (looked for {Path(place) / 'checkpoints'}/step_*.safetensors)"
            )
        log.info("no checkpoint in %s yet: starting from step 0", place)
    return found
