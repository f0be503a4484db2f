"""Runs as jobs of a cluster: SLURM, by submitit.

A submission is a folder OUTPUT/submitit/NUMBER/, beside submitit's own files and the jobs' logs with
  runs.json       the runs of each job
  ID_failed.json  why runs of a job failed
  warnings        what the jobs have to say to whoever waits for them
So whoever comes later, the same command or skiprnn.status, finds there the job of a run, and asks the queue about it.
"""
