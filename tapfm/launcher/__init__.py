"""Runs a verb as many jobs, on processes of this machine or as an array of Slurm's.

    jobs.py      a job: commands, their log and result; which are left; the table of failures
    slurm.py     an array of them in Slurm's queue (`submitit`)
    slides.py    a verb over slides, some to a job

A job is a command line of `tapfm` that can be repeated: what it did stays, and it goes on from
there. So a launch is resumed by the same command, whatever ended it.
"""
