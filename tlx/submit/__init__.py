"""`tlx submit`: a training as a Slurm job, checked before it is queued.

The job is slurm/train.sbatch with a head for this site and this training, kept in the run's folder: plain text, read by
people who know Slurm. (submitit would pickle a Python function and hide the script that runs it.)

=============  =====================================================================================
`site`         defaults of a cluster, from one small file; `times`: Slurm's way to write them
`template`     slurm/train.sbatch, taken apart
`job`          what is asked of Slurm; `script`: the text that it becomes
`checks`       what is looked at on the login node; `slurm`: the calls of Slurm's commands
`submission`   from the request to the queued job
=============  =====================================================================================
"""
