"""Attacks on every verb, seeded: what was tried, and what survived.

    kills.py     SIGKILL, SIGTERM and SIGINT at random moments; the same command goes on
    disks.py     a full disk, a read-only one, limits of files and memory, a small /dev/shm
    hostile.py   slides, h5 files, weights, tables and YAML with bytes changed
    writers.py   several processes that write the same files
    syncs.py     bytes are on the disk before a file takes its name, by strace
    scale.py     tables of many slides
    tries.py     runs a verb in a process that may die, and counts how it ends

`python -m benchmarks.campaign.<script> --tries N --seed S` adds a row to
`benchmarks/results/campaign.csv` and rewrites the table in benchmarks/README.md. `disks` and
`syncs` need root and strace. Not in `make test`; a slice of each is in tests/test_campaign.py.
"""
