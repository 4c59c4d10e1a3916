"""An array of jobs in Slurm's queue, by way of `submitit` (extra `slurm`).

The queue itself is asked what still waits or runs (`squeue`), so no accounting database is needed,
and a job that its node's failure or a user puts back into the queue is waited for. What was
submitted is noted in `<folder>/submitted.json`: a launch that was interrupted finds its jobs again
instead of submitting them twice.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from slides.errors import SettingsError
from slides.files import write_json
from slides.progress import progress_bar
from tapfm.launcher.jobs import Job

POLL_S = 5.0  # between looks at the queue
NOTE = "submitted.json"
MINUTES = 24 * 60  # of a job, unless `time` is given


class Slurm:
    """Runs jobs as an array of Slurm's.

    Args:
        at_once: jobs of the array that run at the same time.
        options: of sbatch, by their long names: `partition`, `time` (minutes), `gpus-per-node`.

    Raises:
        SettingsError: `submitit` or Slurm's commands are missing.
    """

    def __init__(self, at_once: int = 64, options: Mapping[str, str] | None = None):
        try:
            import submitit  # noqa: F401, asked for before slides are looked at
        except ImportError:
            raise SettingsError(
                "--launcher slurm needs the package submitit: pip install 'tapfm[slurm]'"
            ) from None
        try:
            subprocess.run(["squeue", "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise SettingsError(
                "--launcher slurm needs Slurm's commands, and squeue does not run here. Start it "
                "on a login node, or take --launcher local."
            ) from None
        self.at_once, self.options = at_once, dict(options or {})

    def run(self, jobs: Sequence[Job], folder: Path) -> None:
        """Submit the jobs that are not queued yet, and wait for all to leave the queue."""
        note = folder / NOTE
        known = json.loads(note.read_text()) if note.exists() else {}
        queued = in_queue(known.values()) or set()
        known = {name: number for name, number in known.items() if number in queued}
        new = [job for job in jobs if job.name not in known]
        if new:
            known |= self._submit(new, folder)
            write_json(note, known)
        print(
            f"{folder}: {len(new)} jobs submitted, {len(jobs) - len(new)} were in the queue. "
            "Interrupted here, they go on; the same command waits for them again.",
            flush=True,
        )
        self._wait({job.name: known[job.name] for job in jobs}, folder)

    def _submit(self, jobs: Sequence[Job], folder: Path) -> dict[str, str]:
        import submitit

        own, options = {"time", "partition"}, dict(self.options)
        executor = submitit.SlurmExecutor(folder=(folder / "slurm").absolute())
        more = {key: value for key, value in options.items() if key not in own}
        executor.update_parameters(
            job_name="tapfm", time=int(options.get("time", MINUTES)), use_srun=False,
            array_parallelism=self.at_once, stderr_to_stdout=True,
            additional_parameters={"requeue": True, **more},
            **({"partition": options["partition"]} if "partition" in options else {}),
        )  # fmt: skip
        try:
            given = executor.map_array(Job.run, jobs, [folder.absolute()] * len(jobs))
        except Exception as error:  # submitit's own, with sbatch's words
            what = " ".join(str(error).split())
            raise SettingsError(f"--launcher slurm: sbatch refused the jobs: {what}") from error
        return {job.name: each.job_id for job, each in zip(jobs, given, strict=True)}

    def _wait(self, waiting: dict[str, str], folder: Path) -> None:
        with progress_bar(total=len(waiting), unit="job") as bar:
            missed: set[str] = set()
            while waiting:
                time.sleep(POLL_S)
                queued = in_queue(waiting.values())
                if queued is None:
                    continue  # the controller does not answer; it will
                gone = {name for name, number in waiting.items() if number not in queued}
                # a result may reach this machine later than the queue's word
                ended = {
                    name for name in gone if name in missed or (folder / f"{name}.json").exists()
                }
                missed = gone - ended
                waiting = {k: v for k, v in waiting.items() if k not in ended}
                bar.update(len(ended))


def in_queue(numbers: Sequence[str]) -> set[str] | None:
    """Return which jobs wait or run, such as 17_3; None if the controller does not answer."""
    arrays = sorted({str(number).partition("_")[0] for number in numbers})
    if not arrays:
        return set()
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(arrays)}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split())
